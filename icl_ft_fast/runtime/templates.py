"""Templates that others wrote, such as a checkpoint's chat template, rendered in a bounded number of steps.

jinja2's sandbox, in which transformers renders too, keeps them from Python's objects and from ranges beyond 100,000,
not from loops within loops. Memory is not bounded: a template may make a text as long as the machine can hold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError

STEPS = 3_000_000  # lines of Python: a second or two; a chat of a thousand turns takes some ten thousand


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


def render_chat(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> ChatText:
    """The prompt that the tokenizer's chat template makes of messages, each with its role and content.

    Args:
        tokenizer: a transformers tokenizer that has a chat template.
        messages: the turns.
        options: what the template takes besides; add_generation_prompt is true unless given.

    Raises:
        jinja2.TemplateError: the template refuses the messages, reaches out of the sandbox, or does not end.
    """
    with bounded():
        options = {"add_generation_prompt": True} | options
        return ChatText(tokenizer.apply_chat_template(messages, tokenize=False, **options))
