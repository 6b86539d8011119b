"""Where sentences end."""

from __future__ import annotations

import re

SPLITTINGS = ("none", "independent", "cumulative")
_END = re.compile(r"(?<=[.!?])\s+|\s*\n\s*")


def split_sentences(text: str, splitting: str) -> list[str]:
    """The examples that a text makes under one of SPLITTINGS; sentences end at .!? before a space, or with a line."""
    if splitting == "none":
        return [text]
    ends = [match.span() for match in _END.finditer(text)] + [(len(text), len(text))]
    starts = [0, *(after for _, after in ends)]
    parts = [(start, end) for start, (end, _) in zip(starts, ends, strict=False) if text[start:end].strip()]
    return [text[0 if splitting == "cumulative" else start : end] for start, end in parts] or [text]
