"""From answers to rows to train on: each step drops some and says how many."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from icl_ft_fast.augmentation.prompts import LABELS, PREMISE, AugmentError
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.score import loglikelihood

SHINGLE_WORDS = 3
_LINE = re.compile(r"(\w+): (\S.*)")


@dataclass(frozen=True)
class Augmentation:
    """A statement written from documents.

    Attributes:
        source_id: the document it was written from.
        kind: its label in lower case ("reversed", "rephrased", ...), or the rule that made it.
        text: the statement.
        origin: where it comes from: strategy, source_ids, template, generator, sampling, seed, token counts, ...
    """

    source_id: str
    kind: str
    text: str
    origin: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Augmented:
    """What was written and what each step dropped.

    Attributes:
        rows: the augmentations, in the documents' order.
        dropped: by step, in the order of the steps, the lines or rows that it dropped.
    """

    rows: tuple[Augmentation, ...]
    dropped: dict[str, int]


def parse(strategy: str, told: str, text: str) -> tuple[list[tuple[str, str]], int, int]:
    """(kind, statement) of each line of an answer; lines without a known label; lines that repeat.

    The global strategy's premises count as none of these. A line repeats if it says what the prompt's sentence or
    document says, or an earlier line of the answer.
    """
    found, unparsed, repeats, seen, question = [], 0, 0, {normalized(told)}, None
    for line in text.strip().splitlines():
        match = _LINE.fullmatch(line.strip())
        label, statement = (match[1], normalized(match[2])) if match else ("", "")
        if label == "Question" and strategy == "self-qa":
            unparsed += question is not None
            question = statement
            continue
        if label == PREMISE and strategy == "global":
            continue
        if label not in LABELS[strategy] or (label == "Answer" and question is None):
            unparsed += 1
            continue
        if label == "Answer":
            statement, question = f"{question} {statement}", None
        if statement in seen:
            repeats += 1
            continue
        seen.add(statement)
        found.append((label.lower(), statement))
    return found, unparsed + (question is not None), repeats


def normalized(text: str) -> str:
    """NFC, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def within_length(rows: Iterable[Augmentation], shortest: int, longest: int) -> list[Augmentation]:
    """Rows of `shortest` to `longest` words."""
    return [row for row in rows if shortest <= len(row.text.split()) <= longest]


def without_duplicates(rows: Iterable[Augmentation]) -> list[Augmentation]:
    """The first row of each text, but for case."""
    first: dict[str, Augmentation] = {}
    for row in rows:
        first.setdefault(row.text.casefold(), row)
    return list(first.values())


def without_near_duplicates(rows: Iterable[Augmentation], similarity: float) -> list[Augmentation]:
    """Rows whose word shingles have a Jaccard similarity below `similarity` with those of every row kept before.

    MinHash with banding finds the candidates (Broder 1997; Leskovec et al., Mining of Massive Datasets, chapter 3),
    their shingles decide. A candidate is missed with a small probability; nothing is dropped wrongly.

    Raises:
        AugmentError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ModuleNotFoundError as error:
        raise AugmentError("near duplicates: needs datasketch: pip install 'icl_ft_fast[augment]'") from error
    index = MinHashLSH(threshold=similarity, num_perm=128, weights=(0.05, 0.95))
    kept: list[Augmentation] = []
    shingles: list[set[str]] = []
    for row in rows:
        words = re.findall(r"\w+", row.text.casefold())
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        mine = {" ".join(words[first : first + SHINGLE_WORDS]) for first in range(count)}
        sketch = MinHash(num_perm=128, seed=1)
        sketch.update_batch([shingle.encode() for shingle in sorted(mine)])
        if any(len(mine & shingles[k]) >= similarity * len(mine | shingles[k]) for k in index.query(sketch)):
            continue
        index.insert(len(kept), sketch)
        kept.append(row)
        shingles.append(mine)
    return kept


def self_consistent(
    model: Model,
    rows: Sequence[Augmentation],
    context: Callable[[Augmentation], str],
    deny: Callable[[str], str | None],
    ledger: Ledger | None = None,
) -> tuple[list[Augmentation], int]:
    """Rows that the model finds likelier than their contradiction, and how many rows have one.

    Args:
        model: scores a row and its contradiction.
        rows: to filter; those without a contradiction stay.
        context: the text before a row.
        deny: the contradiction of a statement, None if it has none; see tasks.generated.deny.
        ledger: counts the work.
    """
    scored = [(row, denial) for row in rows if (denial := deny(row.text)) is not None]
    pairs = [(context(row), text) for row, denial in scored for text in (row.text, denial)]
    logp = [result.logp for result in loglikelihood(model, pairs, ledger=ledger)]
    wrong = {
        id(row) for (row, _), stated, denied in zip(scored, logp[::2], logp[1::2], strict=True) if stated <= denied
    }
    return [row for row in rows if id(row) not in wrong], len(scored)
