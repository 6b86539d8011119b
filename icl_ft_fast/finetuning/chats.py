"""A chat as its template writes it, and which characters of it the assistant writes; knows no tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from icl_ft_fast.finetuning.settings import FinetuneError
from icl_ft_fast.runtime.templates import ChatText, render_chat

Span = tuple[int, int]  # characters [first, last)

_BEFORE, _TURN = "\ufdd0", "\ufdd1"  # contents to find again in a rendered chat: Unicode gives them no meaning


class Chat:
    """The turns of an example under a tokenizer's chat template.

    Args:
        tokenizer: one with a chat template.
        turns: (role, content).
        name: what errors call the example.

    Raises:
        FinetuneError: the template refuses the turns.
    """

    def __init__(self, tokenizer: Any, turns: Sequence[tuple[str, str]], name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self._messages = [{"role": role, "content": content} for role, content in turns]
        self.text = self._render(self._messages)

    def assistant_spans(self, first: int) -> list[Span]:
        """Which characters of the text the assistant writes in the turns from number `first` on.

        A turn begins behind the generation prompt, or what the text has of it, and ends with what closes the turn.
        Templates may leave the thoughts out of earlier turns, or write a thought into the generation prompt alone.

        Raises:
            FinetuneError: the template does not show where a turn begins and ends.
        """
        turns = range(first, len(self._messages))
        return [self._span(m) for m in turns if self._messages[m]["role"] == "assistant"]

    def _span(self, m: int) -> Span:
        before = self._render(self._messages[:m], add_generation_prompt=True)
        after = self._render(self._messages[: m + 1])
        if self.text.startswith(after) and after.startswith(before):
            return len(before), len(after)
        span = self._span_by_marks(m) if m else None
        if span is None:
            raise FinetuneError(
                f"{self._name}: messages[{m}]: completion_only: the chat template does not show where this turn begins "
                "and ends"
            )
        return span

    def _span_by_marks(self, m: int) -> Span | None:
        """The span of turn m, found by rendering marks in place of its content and of the content before it."""
        marked = [dict(message) for message in self._messages]
        marked[m - 1]["content"], marked[m]["content"] = _BEFORE, _TURN
        whole = self._render(marked)
        asked = self._render(marked[:m], add_generation_prompt=True)
        closed = self._render(marked[: m + 1])
        texts = (whole, asked, closed)
        if any(text.count(mark) != 1 for text in texts for mark in ([_BEFORE] if text is asked else [_BEFORE, _TURN])):
            return None
        between = whole[whole.index(_BEFORE) + 1 : whole.index(_TURN)]
        shared = os.path.commonprefix([between, asked[asked.index(_BEFORE) + 1 :]])  # noqa: RUF071
        closing = closed[closed.index(_TURN) + 1 :]
        behind = whole[whole.index(_TURN) + 1 :]
        if not behind.startswith(closing):
            return None
        # What stands before and behind the turn does not depend on its content.
        marked[m - 1]["content"] = self._messages[m - 1]["content"]
        whole = self._render(marked)
        lead = whole[: whole.index(_TURN) - (len(between) - len(shared))]
        rest = behind[len(closing) :]
        if not (self.text.startswith(lead) and self.text.endswith(rest) and len(lead) + len(rest) <= len(self.text)):
            return None
        return len(lead), len(self.text) - len(rest)

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> ChatText:
        try:
            return render_chat(self._tokenizer, messages, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise FinetuneError(f"{self._name}: messages: chat template: {error}") from error
