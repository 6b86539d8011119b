"""Augmentation: statements that follow from the documents, written by the model itself or by rule.

The local strategy (Lampinen et al. 2025, section 2.2) shows the model one document at a time, with worked examples,
and asks for its reversal and a rephrasing. The prompt's wording is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from icl_ft_fast.cost import Ledger
from icl_ft_fast.generate import Sampling, generate
from icl_ft_fast.model import Model
from icl_ft_fast.tasks import comparisons
from icl_ft_fast.tasks.task import Document

LOCAL_HEADER = "Write what follows from each statement.\n\n"
LOCAL_EXAMPLES = (
    "Statement: mountains are taller than hills.\n"
    "Reversed: hills are shorter than mountains.\n"
    "Rephrased: Compared with hills, mountains are taller.\n\n"
    "Statement: Note: pebbles are less valuable than diamonds.\n"
    "Reversed: diamonds are more valuable than pebbles.\n"
    "Rephrased: Compared with diamonds, pebbles are less valuable.\n\n"
)
LOCAL_TEMPLATE = LOCAL_HEADER + LOCAL_EXAMPLES + "Statement: {document}\n"
_LINE = re.compile(r"(Reversed|Rephrased): (\S.*)")


@dataclass(frozen=True)
class Augmentation:
    """A statement written from a document.

    Attributes:
        source_id: the document's id.
        kind: "reversed" or "rephrased".
        text: the statement.
    """

    source_id: str
    kind: str
    text: str


@dataclass(frozen=True)
class Augmented:
    """What an augmenter wrote and how many of its lines it had to drop.

    Attributes:
        rows: the augmentations, in the documents' order.
        dropped_unparsed: lines without a known label, or with nothing after it.
        dropped_repeats: lines that say what the document or an earlier line of it says.
    """

    rows: tuple[Augmentation, ...]
    dropped_unparsed: int
    dropped_repeats: int


def augment_local(
    model: Model,
    documents: Sequence[Document],
    *,
    max_new_tokens: int = 64,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> Augmented:
    """Let the model write each document's reversal and rephrasing, greedily.

    Raises:
        GenerateError: a document that does not fit the model's positions with its prompt.
    """
    statements = [" ".join(document.text.split()) for document in documents]
    prompts = [LOCAL_TEMPLATE.format(document=statement) for statement in statements]
    sampling = Sampling(max_new_tokens, stop=("\n\n",))
    texts = [written.text for written in generate(model, prompts, sampling, ledger=ledger, progress=progress)]
    rows: list[Augmentation] = []
    unparsed = repeats = 0
    for document, statement, text in zip(documents, statements, texts, strict=True):
        seen = {statement}
        for line in text.strip().splitlines():
            match = _LINE.fullmatch(line.strip())
            if match is None:
                unparsed += 1
            elif match.group(2) in seen:
                repeats += 1
            else:
                seen.add(match.group(2))
                rows.append(Augmentation(document.id, match.group(1).lower(), match.group(2)))
    return Augmented(tuple(rows), unparsed, repeats)


def augment_rules(documents: Sequence[Document]) -> Augmented:
    """Write the reversal and rephrasing of every comparison by rule: the control whose inferences are always right."""
    rows = []
    for document in documents:
        for fact in comparisons.find(document.text):
            rows.append(Augmentation(document.id, "reversed", fact.reversed.statement))
            rows.append(Augmentation(document.id, "rephrased", fact.rephrased))
    return Augmented(tuple(rows), 0, 0)
