"""Filters of rows: lengths, duplicates, near-duplicates, and rows less likely than their contradiction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from icl_ft_fast.augmentation.strategy import Augmentation, Augmented, AugmentError
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.model import Model
from icl_ft_fast.tasks.near import NearRepeats
from icl_ft_fast.tasks.sentences import count_words


def filtered(made: Augmented, words: tuple[int, int], similarity: float) -> Augmented:
    """The rows within so many words, without duplicates and, below a similarity of 1, without near-duplicates."""
    rows, dropped = list(made.rows), dict(made.dropped)
    filters: dict[str, Callable[[list[Augmentation]], list[Augmentation]]] = {
        "length": lambda rows: within_length(rows, *words),
        "duplicates": without_duplicates,
    }
    if similarity < 1:
        filters["near_duplicates"] = lambda rows: without_near_duplicates(rows, similarity)
    for step, keep in filters.items():
        kept = keep(rows)
        dropped[step], rows = len(rows) - len(kept), kept
    return replace(made, rows=tuple(rows), dropped=dropped)


def within_length(rows: Iterable[Augmentation], shortest: int, longest: int) -> list[Augmentation]:
    """Rows of `shortest` to `longest` words."""
    return [row for row in rows if shortest <= count_words(row.text) <= longest]


def without_duplicates(rows: Iterable[Augmentation]) -> list[Augmentation]:
    """The first row of each text, but for case."""
    first: dict[str, Augmentation] = {}
    for row in rows:
        first.setdefault(row.text.casefold(), row)
    return list(first.values())


def without_near_duplicates(rows: Iterable[Augmentation], similarity: float) -> list[Augmentation]:
    """Rows whose 3-word shingles have a Jaccard similarity below `similarity` with those of every row kept before.

    Raises:
        AugmentError: datasketch is not installed.
    """
    try:
        repeats = NearRepeats(similarity)
    except ModuleNotFoundError as error:
        raise AugmentError("near duplicates: needs datasketch: pip install 'icl_ft_fast[augment]'") from error
    return [row for row in rows if repeats.add(row.text)]


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
