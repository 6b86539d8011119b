"""Control tokens that are spelt in a document, a question or a choice are text there, not the tokens themselves.

`as_text` marks them where the document meets the model; templates, contexts and chats may then be put around it. The
encoder reads a marked spelling as ordinary text, and every other one as the token. Pre-rendered prompts that are to
hold control tokens, such as requests of loglikelihood() and generate(), are not marked.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from icl_ft_fast.runtime.templates import ChatText

MODES = ("text", "keep")

# Unicode gives these characters no meaning, for use inside of a program; alone they stay what they are.
_MARK, _OPEN, _CLOSE = "\ufdd4", "\ufdd5", "\ufdd6"
_MODE = "_icl_ft_fast_special_tokens"  # attribute of a tokenizer


def set_mode(tokenizer: Any, mode: str) -> None:
    """Whether as_text() marks control tokens ("text", as without this call) or leaves them in force ("keep").

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"special_tokens: expected one of {', '.join(MODES)}, got {mode!r}")
    setattr(tokenizer, _MODE, mode)


class MarkedText(str):
    """A text whose foreign parts are marked already, around which a template may have put control tokens."""

    __slots__ = ()


def as_text(tokenizer: Any, text: str, but: Collection[str] = ()) -> str:
    """The text with its control tokens marked as text; the same object where it spells none, or is a prompt already.

    Those of `but` stay in force.
    """
    if getattr(tokenizer, _MODE, "text") == "keep" or isinstance(text, MarkedText | ChatText):
        return text
    spelt = _spellings(tokenizer)

    def mark(match: re.Match[str]) -> str:
        return match[0] if match[0] in but else match[0][0] + _MARK + match[0][1:]

    return text if spelt.search(text) is None else spelt.sub(mark, text)


def behind(tokenizer: Any, context: str, text: str) -> str:
    """A prompt: the text, its control tokens marked, behind a context from prompt_context()."""
    whole = context + as_text(tokenizer, text)
    return whole if isinstance(whole, ChatText) else MarkedText(whole)


def plain(text: str) -> str:
    """The text without marks, to show it."""
    return text.replace(_MARK, "")


def is_marked(text: str) -> bool:
    """Whether as_text() has marked something in it."""
    return _MARK in text


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of marked texts, without BOS or EOS around them.

    A slow tokenizer cannot tell one spelling from another: all of them become text.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        whole = [_marks(tokenizer).sub("", text) for text in texts]
        slow: list[list[int]] = tokenizer(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return slow
    clone, alias_of, id_of = _clone(tokenizer)
    # A marked spelling does not match; what matches is the template's, and gets a name that no text has.
    named = [_spellings(tokenizer).sub(lambda match: alias_of[match[0]], text) for text in texts]
    written = [_marks(tokenizer).sub("", text) for text in named]
    encoded = clone.encode_batch(written, add_special_tokens=False)
    return [[id_of.get(token, token) for token in one.ids] for one in encoded]


def encode_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text without BOS or EOS around it, and which characters of it each token stands for."""
    if not is_marked(text):
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return coded["input_ids"], coded["offset_mapping"]
    clone, alias_of, id_of = _clone(tokenizer)
    written, places, last = "", list[tuple[int, int]](), 0  # of each character written, where it stands in the text
    marks = {match.start() for match in _marks(tokenizer).finditer(text)}
    for match in [*_spellings(tokenizer).finditer(text), None]:
        stop = len(text) if match is None else match.start()
        between = [place for place in range(last, stop) if place not in marks]
        written += "".join(text[place] for place in between)
        places += [(place, place + 1) for place in between]
        if match is not None:
            written += alias_of[match[0]]
            places += [match.span()] * len(alias_of[match[0]])
            last = match.end()
    coded = clone.encode(written, add_special_tokens=False)
    offsets = [(places[a][0], places[b - 1][1]) if a < b else (0, 0) for a, b in coded.offsets]
    return [id_of.get(token, token) for token in coded.ids], offsets


@functools.lru_cache(maxsize=8)
def _spellings(tokenizer: Any) -> re.Pattern[str]:
    """Any control token of more than one character, the longest first."""
    contents = sorted((token.content for token in _special(tokenizer).values()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents)) or "(?!)")


@functools.lru_cache(maxsize=8)
def _marks(tokenizer: Any) -> re.Pattern[str]:
    """The marks of as_text(): behind the first character of a control token; elsewhere the character is the text's."""
    contents = [token.content for token in _special(tokenizer).values()]
    marks = (f"(?<={re.escape(text[0])}){_MARK}(?={re.escape(text[1:])})" for text in contents)
    return re.compile("|".join(marks) or "(?!)")


def _special(tokenizer: Any) -> dict[int, Any]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i: token for i, token in added.items() if token.special and len(token.content) > 1}


@functools.lru_cache(maxsize=2)
def _clone(tokenizer: Any) -> tuple[Any, dict[str, str], dict[int | None, int]]:
    """A backend that reads control tokens as text and their aliases as tokens; the aliases; tokens by alias id."""
    from tokenizers import AddedToken, Tokenizer

    special = _special(tokenizer)
    alias_of = {token.content: f"{_OPEN}{i}{_CLOSE}" for i, token in special.items()}
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    if written["model"]["type"] == "Unigram":  # it would take a control token's spelling for the piece of that name
        for piece in written["model"]["vocab"]:
            piece[0] = f"{alias_of[piece[0]]}{_OPEN}" if piece[0] in alias_of else piece[0]
    clone = Tokenizer.from_str(json.dumps(written))
    clone.no_truncation()
    clone.no_padding()
    clone.encode_special_tokens = True
    added = {clone.token_to_id(token.content): i for i, token in tokenizer.added_tokens_decoder.items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    clone.add_tokens(
        [
            AddedToken(alias_of[token.content], special=False, **{flag: getattr(token, flag) for flag in flags})
            for token in special.values()
        ]
    )
    return clone, alias_of, added | {clone.token_to_id(alias_of[token.content]): i for i, token in special.items()}
