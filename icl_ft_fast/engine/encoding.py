"""Text to token ids, with one rule for the boundary between context and continuation and one for BOS.

Boundary (lm-evaluation-harness's): spaces that end the context move to the continuation, both are encoded together, and
the continuation is what follows the tokens of the context encoded alone; how many continuations a token that spans the
join has shortened is logged. BOS: the tokenizer's own habit, never twice, and none before ChatText, whose template
writes it; an empty context becomes BOS, or EOS where there is none. A long prefix that texts share is encoded once.
Knows nothing of models or tries.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from icl_ft_fast.engine import control_tokens
from icl_ft_fast.runtime.templates import ChatText

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, not imported here: importing the package stays light


_log = logging.getLogger(__name__)


def opening(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer begins a text with by itself: BOS, none, or (glm4) several."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return list(whole[: next(starts)])


def prefix_token_id(tokenizer: Tokenizer) -> int:
    """The token that stands for an empty context: BOS, else EOS.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError("tokenizer: has neither a BOS nor an EOS token, so an empty context cannot be scored")


def vocabulary_words(tokenizer: Tokenizer) -> frozenset[str]:
    """What the pieces of the vocabulary spell in the letters a to z, in lower case, marks of spaces left out."""
    pieces = (re.fullmatch(r"[^A-Za-z]*([A-Za-z]+)", piece) for piece in tokenizer.get_vocab())
    return frozenset(match[1].lower() for match in pieces if match)


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, bos: bool | None = None) -> list[list[int]]:
    """Token ids of each text, opened as the tokenizer does it unless the text begins so already.

    Args:
        tokenizer: a transformers tokenizer.
        texts: any strings.
        bos: True begins every text with BOS, False none; None leaves it to the tokenizer, or a chat's template.

    Raises:
        ValueError: bos is True and the tokenizer has no BOS token.
    """
    return [head + tail for head, tail in _encode(tokenizer, texts, bos)]


def encode_pairs(
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    bos: bool | None = None,
    prefix: int | None = None,
    whole_tokens: bool = False,
) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation) pairs; each context has at least one token.

    Args:
        tokenizer: a transformers tokenizer.
        pairs: context and continuation texts.
        bos: see encode().
        prefix: the token that stands for an empty context, instead of prefix_token_id().
        whole_tokens: a token that spans the join belongs to the continuation, whose context ends before it. Otherwise
            the context keeps its own tokens and the continuation is cut, as lm-evaluation-harness does it.

    Returns:
        For each pair, context ids and continuation ids. A continuation may come out empty when its text is empty or
        the tokenizer merges it into the context's last token; callers reject it with the name they know it by.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encoded = _encode(tokenizer, contexts + [context + continuation for context, continuation in moved], bos)
    encoded_context = {text: (*parts, parts[0] + parts[1]) for text, parts in zip(contexts, encoded, strict=False)}
    encoded_alone = iter(encode(tokenizer, [continuation for context, continuation in pairs if not context], bos=False))
    requests, num_spanned = [], 0
    for (given, _), (context, _), (head, whole) in zip(pairs, moved, encoded[len(contexts) :], strict=True):
        if given:
            its_head, start, context_ids = encoded_context[context]
            if its_head is not head:
                start, whole = context_ids, head + whole
        else:
            start, whole, context_ids = [], next(encoded_alone), []
        if whole[: len(start)] != start:
            num_spanned += 1
            if whole_tokens:
                kept = common(start, whole)
                start, context_ids = start[:kept], context_ids[: len(context_ids) - len(start) + kept]
        if context_ids:
            requests.append((context_ids, whole[len(start) :]))
        else:
            first = prefix_token_id(tokenizer) if prefix is None else prefix
            requests.append(([first], whole[1:] if whole[:1] == [first] else whole))
    if num_spanned:
        _log.warning(
            "%d of %d continuations: a token spans the end of the context; %s",
            num_spanned,
            len(pairs),
            "it counts to the continuation" if whole_tokens else "they are cut as lm-evaluation-harness cuts them",
        )
    return requests


def common(a: Sequence[int] | str, b: Sequence[int] | str) -> int:
    """Leading tokens, or characters, that are equal."""
    if a == b[: len(a)]:
        return len(a)
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


_ALIKE = 512  # characters: texts that begin alike for so long are looked at together
_MARGIN = 64  # characters shared after a cut, so that what differs cannot reach back to it
_SEEN = 2048  # characters on both sides of a cut that are encoded in one part and in two
_WORTH = 20_000  # characters that a cut must save
_CUTS = 64  # places for a cut that are tried, from the last one on


def _encode(tokenizer: Tokenizer, texts: Sequence[str], bos: bool | None) -> list[tuple[list[int], list[int]]]:
    """encode() in two parts, of which the first is one object for all texts whose long prefix was encoded once."""
    if not texts:
        return []
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos: the tokenizer has no BOS token to begin a text with")
    habit = opening(tokenizer) if bos is None else [tokenizer.bos_token_id] * bos

    def opened(ids: list[int], text: str) -> list[int]:
        first = [] if bos is None and isinstance(text, ChatText) else habit
        return ids if not first or ids[:1] == first[:1] else first + ids

    encoded: list[tuple[list[int], list[int]]] = [([], [])] * len(texts)
    groups: dict[tuple[str, bool], list[int]] = {}
    for t, text in enumerate(texts):
        groups.setdefault((text[:_ALIKE], isinstance(text, ChatText)), []).append(t)
    whole: list[int] = []
    nothing: list[int] = []
    for members in groups.values():
        cut = _shared_cut(tokenizer, [texts[t] for t in members])
        if not cut:
            whole += members
            continue
        (head,) = _ids(tokenizer, [texts[members[0]][:cut]])
        head = opened(head, texts[members[0]])
        heads: dict[int, list[int]] = {}  # a beginning of the rest that is shared in its turn, behind this one
        rest = _encode(tokenizer, [texts[t][cut:] for t in members], bos=False)
        for t, (more, tail) in zip(members, rest, strict=True):
            if id(more) not in heads:
                heads[id(more)] = head + more
            encoded[t] = heads[id(more)], tail
    for t, ids in zip(whole, _ids(tokenizer, [texts[t] for t in whole]), strict=True):
        encoded[t] = nothing, opened(ids, texts[t])
    return encoded


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    marked = [t for t, text in enumerate(texts) if control_tokens.is_marked(text)]
    if marked:
        for t, its in zip(marked, control_tokens.encode(tokenizer, [texts[t] for t in marked]), strict=True):
            ids[t] = its
    return ids


def _shared_cut(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Length of a beginning of all `texts` that can be encoded apart from the rest with the same result; 0 if none can.

    The cut is before a space between two letters. No piece of the vocabulary goes over such a place, so no merge does;
    no added token is near it; and what is around it is seen to come out the same in one part and in two, so that the
    tokenizer puts nothing before a text and splits words alike wherever it starts.
    """
    if (len(texts) - 1) * len(texts[0]) < _WORTH:
        return 0
    shared = os.path.commonprefix(texts)  # noqa: RUF071
    if (len(texts) - 1) * len(shared) < _WORTH or not _keeps_words_apart(tokenizer):
        return 0
    added = [token.lower() for token in tokenizer.get_added_vocab()]

    def is_apart(cut: int) -> bool:
        around = shared[max(0, cut - _MARGIN) : cut + _MARGIN].lower()
        return not any(token in around for token in added)

    cuts = [match.end() for match in re.finditer("[a-z](?= [a-z])", shared[:-_MARGIN])]
    cut = next(filter(is_apart, cuts[: -_CUTS - 1 : -1]), 0)  # a chat's turns end in added tokens
    if not cut:
        return 0
    before, after = shared[max(0, cut - _SEEN) : cut], shared[cut : cut + _SEEN]
    head, tail, both = _ids(tokenizer, [before, after, before + after])
    return cut if head + tail == both else 0


@functools.lru_cache(maxsize=8)
def _keeps_words_apart(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary is one of BPE or unigram pieces none of which goes from a letter to a space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ not in ("BPE", "Unigram"):
        return False
    if getattr(backend.model, "dropout", None):  # random pieces
        return False
    crosses = re.compile("[a-z][ \u0120\u2581]")  # a space itself, in byte-level pieces, in SentencePiece's
    return not any(crosses.search(piece) for piece in backend.get_vocab(with_added_tokens=False))
