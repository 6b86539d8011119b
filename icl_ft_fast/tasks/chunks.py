"""Documents cut into passages: at paragraphs where they are short enough, else at lines, sentences, words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from icl_ft_fast.tasks.task import Document

MAX_CHARACTERS = 1024
# Where to cut, the best place first. Scripts without spaces end a sentence with a mark of their own.
_BOUNDARIES = tuple(map(re.compile, (r"\n(?:[^\S\n]*\n)+", r"\n", r"(?<=[.!?।॥۔])\s+|(?<=[。！？])", r"\s+")))


@dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
        document_id: the document's id.
        start: characters of the document before it.
        text: without the spaces around it.
    """

    document_id: str
    start: int
    text: str


def split_documents(documents: Sequence[Document], max_characters: int = MAX_CHARACTERS) -> tuple[Passage, ...]:
    r"""The passages of all documents, in their order.

    Args:
        documents: a document without any character but spaces has no passage.
        max_characters: of a passage, at least 1. Paragraphs that fit into one together stay together; one that is
            longer is cut at its lines, a longer line at its sentences, a longer sentence between words, and a longer
            word anywhere. Passages do not overlap.

    Raises:
        ValueError: max_characters below 1.

    Examples:
        >>> [passage.text for passage in iff.split_documents([iff.Document("d", "One.\n\nTwo.")], 4)]
        ['One.', 'Two.']
    """
    if max_characters < 1:
        raise ValueError(f"max_characters: expected at least 1, got {max_characters}")
    return tuple(
        Passage(document.id, start, document.text[start:end])
        for document in documents
        for start, end in _cut(document.text, *_stripped(document.text, 0, len(document.text)), max_characters, 0)
    )


def _cut(text: str, start: int, end: int, most: int, level: int) -> list[tuple[int, int]]:
    """Spans of text[start:end], which has no spaces around it, cut at the boundaries of this level and the next."""
    if end - start <= most:
        return [(start, end)] if start < end else []
    if level == len(_BOUNDARIES):
        return [(at, min(at + most, end)) for at in range(start, end, most)]
    spans: list[tuple[int, int]] = []
    can_grow = False  # whether the last span is of whole pieces of this level
    for piece_start, piece_end in _pieces(text, start, end, _BOUNDARIES[level]):
        if piece_end - piece_start > most:
            spans += _cut(text, piece_start, piece_end, most, level + 1)
            can_grow = False
        elif can_grow and piece_end - spans[-1][0] <= most:
            spans[-1] = spans[-1][0], piece_end
        else:
            spans.append((piece_start, piece_end))
            can_grow = True
    return spans


def _pieces(text: str, start: int, end: int, boundary: re.Pattern[str]) -> list[tuple[int, int]]:
    """What lies between the boundaries, without the spaces around it; empty pieces are left out."""
    matches = list(boundary.finditer(text, start, end))
    starts, ends = [start, *(match.end() for match in matches)], [*(match.start() for match in matches), end]
    spans = (_stripped(text, *span) for span in zip(starts, ends, strict=True))
    return [(first, last) for first, last in spans if first < last]


def _stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without the spaces around it."""
    inner = text[start:end]
    return (start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip())) if inner.strip() else (start, start)
