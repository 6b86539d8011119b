"""Text to token ids, with one rule for the boundary between context and continuation and one for BOS.

Boundary (lm-evaluation-harness's): spaces that end the context move to the continuation, both are encoded together, and
the continuation is what follows the tokens of the context encoded alone. BOS: the tokenizer's own habit, never twice;
an empty context becomes BOS, or EOS where there is none. Knows nothing of models or tries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Tokenizer = Any  # transformers.PreTrainedTokenizerBase, not imported here: importing the package stays light


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer begins a text with BOS by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def prefix_token_id(tokenizer: Tokenizer) -> int:
    """The token that stands for an empty context: BOS, else EOS.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError("tokenizer: has neither a BOS nor an EOS token, so an empty context cannot be scored")


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with BOS where the tokenizer adds it and the text does not begin with it already."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if adds_bos(tokenizer):
        bos = tokenizer.bos_token_id
        return [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    return encoded


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (context, continuation) pairs; each context has at least one token.

    Args:
        tokenizer: a transformers tokenizer.
        pairs: context and continuation texts.

    Returns:
        For each pair, context ids and continuation ids. A continuation may come out empty when its text is empty or
        the tokenizer merges it into the context's last token; callers reject it with the name they know it by.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encoded_context = dict(zip(contexts, encode(tokenizer, contexts), strict=True))
    encoded_whole = encode(tokenizer, [context + continuation for context, continuation in moved])
    requests = []
    for (context, _), whole in zip(moved, encoded_whole, strict=True):
        context_ids = encoded_context[context]
        if context_ids:
            requests.append((context_ids, whole[len(context_ids) :]))
        else:
            prefix = prefix_token_id(tokenizer)
            requests.append(([prefix], whole[1:] if whole[:1] == [prefix] else whole))
    return requests
