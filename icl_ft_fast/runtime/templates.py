"""Templates that others wrote, such as a checkpoint's chat template, rendered in a bounded number of steps.

jinja2's sandbox, in which transformers renders too, keeps them from Python's objects and from ranges beyond 100,000,
not from loops within loops. Memory is not bounded: a template may make a text as long as the machine can hold.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, time
from types import FrameType
from typing import Any

from jinja2 import TemplateError

from icl_ft_fast.runtime.errors import UserError

_DATE, _ARGUMENTS = "_icl_ft_fast_date", "_icl_ft_fast_template_arguments"  # attributes of a tokenizer
# Templates call strftime_now, which transformers lets nobody replace but a macro. It marks the format in the text, by
# characters that Unicode gives no meaning, and the date is put there afterwards. The line break is trimmed by jinja.
_CLOCK = "{% macro strftime_now(format) %}{{ '\ufdd2' }}{{ format }}{{ '\ufdd3' }}{% endmacro %}\n"
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
STEPS = 3_000_000  # lines of Python: a second or two; a chat of a thousand turns takes some ten thousand


class DateError(UserError):
    """A date for chat templates that is none."""


@contextmanager
def bounded() -> Iterator[None]:
    """Within the block, functions called by this thread take at most STEPS steps; then TemplateError is raised."""
    left, before = STEPS, sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise TemplateError(f"not done after {STEPS:,} steps")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class ChatText(str):
    """Text that a chat template wrote, and what is appended to it.

    The template writes BOS and EOS where they belong, so encoding adds neither: the token ids are those of
    transformers' apply_chat_template(tokenize=True).
    """

    __slots__ = ()

    def __add__(self, other: str) -> ChatText:
        return ChatText(str(self) + other)

    def rstrip(self, chars: str | None = None, /) -> ChatText:
        """See str."""
        return ChatText(str(self).rstrip(chars))


def reads_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes the date into a chat (Llama 3.1, SmolLM3, Granite and others do)."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def check_date(date: str) -> datetime:
    """A date from YYYY-MM-DD; raises DateError."""
    try:
        return datetime.strptime(date, "%Y-%m-%d")
    except ValueError as error:
        raise DateError(f"template_date: expected YYYY-MM-DD, got {date!r}") from error


def fix_date(tokenizer: Any, date: str | None = None) -> str | None:
    """Fix the date that the tokenizer's chat template writes from now on; without this it is that of each rendering.

    Args:
        tokenizer: a transformers tokenizer.
        date: YYYY-MM-DD; None is today, or the date that was fixed before.

    Returns:
        The date, or None where the template reads none.

    Raises:
        DateError: not a date.
    """
    fixed = getattr(tokenizer, _DATE, None) if date is None else check_date(date)
    if not reads_date(tokenizer):
        return None
    fixed = fixed or datetime.combine(datetime.now().date(), time())
    setattr(tokenizer, _DATE, fixed)
    return fixed.date().isoformat()


def set_template_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Give the tokenizer's chat template these arguments, such as enable_thinking, in every chat from now on."""
    setattr(tokenizer, _ARGUMENTS, dict(arguments))


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> ChatText:
    """The prompt that the tokenizer's chat template makes of messages, each with its role and content.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.
        messages: the turns.
        options: what the template takes besides, over set_template_arguments(); add_generation_prompt is true unless
            given.

    Raises:
        jinja2.TemplateError: the template refuses the messages, reaches out of the sandbox, or does not end.
    """
    with bounded():
        options = {"add_generation_prompt": True} | getattr(tokenizer, _ARGUMENTS, {}) | options
        date = getattr(tokenizer, _DATE, None)
        if date is None:
            return ChatText(tokenizer.apply_chat_template(messages, tokenize=False, **options))
        template = _CLOCK + tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
    return ChatText(re.sub("\ufdd2(.*?)\ufdd3", lambda match: _in_english(date, match[1]), text))


def _in_english(date: datetime, format: str) -> str:
    """strftime() with the names of months and days that models were trained on, whatever the locale."""
    names = {"%b": _MONTHS[date.month - 1][:3], "%B": _MONTHS[date.month - 1], "%p": "PM" if date.hour > 11 else "AM"}
    names |= {"%a": _DAYS[date.weekday()][:3], "%A": _DAYS[date.weekday()]}
    return date.strftime(re.sub("%.", lambda match: names.get(match[0], match[0]), format))
