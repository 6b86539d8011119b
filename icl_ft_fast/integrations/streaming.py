"""The events of a stream: what can be sent of each choice after each token; knows no HTTP and no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from icl_ft_fast.engine.detokenize import Detokenizer
from icl_ft_fast.engine.generate import Generation, NewToken
from icl_ft_fast.integrations.protocol import (
    ChatRequest,
    CompletionRequest,
    ScoredToken,
    chat_logprobs,
    logprobs,
)
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
        self._pieces: list[str] = []  # of tokens that ready() did not return
        self._sent = {"content": "", "reasoning_content": ""}

    def push(self, token: int) -> dict[str, str]:
        """What a token adds, under "content" and "reasoning_content"; nothing where it is held back."""
        self._pieces.append(self._reader.push(token))
        self._text += self._pieces[-1]
        if self._stop and any(mark in self._text for mark in self._stop):  # the last token: finish() is next
            return self._new(min((self._text.split(mark)[0] for mark in self._stop), key=len))
        marks = self._stop if self._opened is None else (*self._stop, *(mark for pair in MARKS for mark in pair))
        return self._new(self._text[: len(self._text) - held_back(self._text, marks)])

    def finish(self, text: str) -> dict[str, str]:
        """What is left of the whole text."""
        if self._pieces:
            self._pieces[-1] += self._reader.rest
        return self._new(text)

    def ready(self, *, all: bool = False) -> list[str]:
        """The texts of the tokens since the last call, up to the last that completed a character; at the end, all."""
        known = next((i for i in range(len(self._pieces), 0, -1) if all or self._pieces[i - 1]), 0)
        texts, self._pieces = self._pieces[:known], self._pieces[known:]
        return texts

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


class Chunks:
    """The events of a stream's choices.

    Args:
        body: what was asked.
        envelope: makes what every event has, of a kind and a prefix of its id.
        texts: of the choices.
        name: what a token that was not generated is called.
        starts: what chats send before the first token, and the texts before completions, sent if they are echoed.

    `top` is how many of the likeliest tokens are needed with each.
    """

    def __init__(
        self,
        body: CompletionRequest | ChatRequest,
        envelope: Callable[[str, str], dict[str, Any]],
        texts: Sequence[StreamedText],
        name: Callable[[int], str],
        starts: Sequence[dict[str, str]],
    ) -> None:
        self._texts, self._name, self._is_chat = texts, name, isinstance(body, ChatRequest)
        kind = ("chat.completion.chunk", "chatcmpl") if self._is_chat else ("text_completion", "cmpl")
        self.envelope = envelope(*kind)
        self._tells = bool(body.logprobs) if isinstance(body, ChatRequest) else body.logprobs is not None
        self._listed = (body.top_logprobs if isinstance(body, ChatRequest) else body.logprobs) or 0
        self.top = max(1, self._listed) if self._tells else 0
        self._tokens: list[list[ScoredToken]] = [[] for _ in texts]  # that no event has told of
        self._offset = [len(start.get("text", "")) for start in starts]
        self._starts = starts if isinstance(body, ChatRequest) or body.echo else ()

    def begin(self) -> list[str]:
        """What is sent before the first token."""
        return [self._event(index, start, None) for index, start in enumerate(self._starts) if any(start.values())]

    def push(self, index: int, token: NewToken) -> str:
        """What a token adds; empty where that is nothing yet."""
        self._tokens[index].append(ScoredToken(*token))
        new, told = self._texts[index].push(token.id), self._told(index)
        return self._event(index, new, told) if new or told else ""

    def finish(self, index: int, generation: Generation) -> list[str]:
        """What is left of a choice, and why it ended."""
        new = self._texts[index].finish(generation.text)
        told = self._told(index, all=True)
        rest = [self._event(index, new, told)] if new or told else []
        return [*rest, self._event(index, {}, None, "length" if generation.finish == "length" else "stop")]

    def _told(self, index: int, *, all: bool = False) -> dict[str, Any] | None:
        """The log-probabilities of the tokens whose text is known."""
        texts = self._texts[index].ready(all=all)
        if not texts or not self._tells:
            return None
        tokens, self._tokens[index] = self._tokens[index][: len(texts)], self._tokens[index][len(texts) :]
        if self._is_chat:
            return chat_logprobs(tokens, texts, self._listed, self._name)
        offset = self._offset[index]
        self._offset[index] += sum(map(len, texts))
        return logprobs(tokens, texts, self._listed, offset, self._name)

    def _event(self, index: int, new: dict[str, str], told: dict[str, Any] | None, finish: str | None = None) -> str:
        said: dict[str, Any] = {"delta": new} if self._is_chat else {"text": new.get("content", new.get("text", ""))}
        choice = {"index": index, **said, "logprobs": told, "finish_reason": finish}
        return event(self.envelope | {"choices": [choice]})
