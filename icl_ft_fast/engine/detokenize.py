"""Text of generated tokens as it stands behind the tokens before them, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_TAIL = 8  # tokens before a text that decide how it begins: some tokenizers drop the space of a first token
_UNFINISHED = "\ufffd"  # what bytes of a character read as until all of them are there


class Detokenizer:
    """Turns token ids into text one by one; the texts joined are the text behind what came before.

    Args:
        tokenizer: a transformers tokenizer.
        before: ids of the tokens in front, whose text is not returned.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._ids = tokenizer, list(before[-_TAIL:])
        self._first, self._read = 0, len(self._ids)
        while self._read and self._decode(0, self._read).endswith(_UNFINISHED):
            self._read -= 1

    def push(self, token: int) -> str:
        """The text that this token completes; empty within a character."""
        self._ids.append(token)
        known, text = self._decode(self._first, self._read), self._decode(self._first, len(self._ids))
        if len(text) <= len(known) or text.endswith(_UNFINISHED):
            return ""
        self._first, self._read = self._read, len(self._ids)
        return text[len(known) :]

    @property
    def rest(self) -> str:
        """The text of tokens that no push() returned: bytes that are no character yet."""
        known, text = self._decode(self._first, self._read), self._decode(self._first, len(self._ids))
        return text[len(known) :]

    def _decode(self, first: int, last: int) -> str:
        return str(self._tokenizer.decode(self._ids[first:last])) if first < last else ""


def pieces(tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """The text of each token behind those before it; joined they are the whole text.

    A character of several tokens is the last one's.
    """
    reader = Detokenizer(tokenizer, before)
    found = [reader.push(token) for token in ids]
    if found:
        found[-1] += reader.rest
    return found
