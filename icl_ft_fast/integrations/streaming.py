"""The text of a streamed choice: what can be sent of it after each token; knows no HTTP and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icl_ft_fast.engine.detokenize import Detokenizer
from icl_ft_fast.runtime.reasoning import MARKS, split_reasoning

DONE = "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def held_back(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of one of the marks."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


class StreamedText:
    """What a choice has written, and what of it was sent.

    Args:
        tokenizer: a transformers tokenizer that no other thread uses.
        prompt: token ids before the text.
        stop: strings that end the text and are no part of it.
        opened: the mark of reasoning that the prompt ends in; None where reasoning is text like any other.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str], opened: str | None = None) -> None:
        self._reader, self._stop, self._opened = Detokenizer(tokenizer, prompt), tuple(stop), opened
        self._text = ""
        self._sent = {"content": "", "reasoning_content": ""}

    def push(self, token: int) -> dict[str, str]:
        """What a token adds, under "content" and "reasoning_content"; nothing where it is held back."""
        self._text += self._reader.push(token)
        marks = self._stop if self._opened is None else (*self._stop, *(mark for pair in MARKS for mark in pair))
        return self._new(self._text[: len(self._text) - held_back(self._text, marks)])

    def finish(self, text: str) -> dict[str, str]:
        """What is left of the whole text."""
        return self._new(text)

    def _new(self, text: str) -> dict[str, str]:
        parts = {"content": text}
        if self._opened is not None:
            reasoning, answer = split_reasoning(self._opened + text)
            parts = {"reasoning_content": reasoning, "content": answer.lstrip("\n") if reasoning else answer}
        new = {}
        for name, whole in parts.items():
            if whole.startswith(self._sent[name]) and len(whole) > len(self._sent[name]):
                new[name] = whole[len(self._sent[name]) :]
                self._sent[name] = whole
        return new
