"""Text that others wrote, on its way to a terminal or a page: what would act there is spelt out, to be read."""

from __future__ import annotations

import re

# Control characters but tab and line feed, what turns the direction of writing, and half surrogate pairs.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with such characters written as \x1b, \u202e, ..."""
    return _ACTS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
