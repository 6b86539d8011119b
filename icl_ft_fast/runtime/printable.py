"""Texts and figures on their way to a terminal or a page: one form for each, and nothing that acts there."""

from __future__ import annotations

import math
import re

# Control characters but tab and line feed, what turns the direction of writing, and half surrogate pairs.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with such characters written as \x1b, \u202e, ..."""
    return _ACTS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def duration(seconds: float) -> str:
    """Seconds as people say them: 7 h 30 min, 2 min 5 s, 12 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def amount(value: float) -> str:
    """Seconds, money or another quantity with four significant digits, never an exponent: 27,000, 315.9, 0.0123."""
    if not math.isfinite(value) or not value:
        return f"{value:g}"
    digits = 3 - math.floor(math.log10(abs(value)))
    text = f"{round(value, digits):,.{max(0, digits)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
