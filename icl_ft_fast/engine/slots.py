"""Contexts of slots: keys and values that no text makes, such as a compacted context's or a trained prefix's.

A context of slots is a Context like any other, so files, stores, scorer and server take it as it is. Requests find a
context by its tokens; those of slots are a key: a text of as many tokens as there are slots, which stands in no
document. Whoever writes the key's text before a question asks behind the slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextError, ContextStore, contexts_in, load_context
from icl_ft_fast.engine.kv_cache import Context, KVCache, common_tokens
from icl_ft_fast.engine.model import Model

LABEL = "slots: "  # begins the label of a saved context of slots, before its key
_TRIES = 1000


def key_of(model: Model, name: str, num_slots: int) -> tuple[str, list[int]]:
    """The text that stands for slots of this name, and its `num_slots` token ids; the same each time.

    Args:
        model: its tokenizer makes the tokens.
        name: what tells these slots from others, such as a digest of them.
        num_slots: at least 1, and more than the special tokens that the tokenizer begins a text with.

    Raises:
        ValueError: the tokenizer gives no text of so many tokens back as the same tokens.
    """
    tokenizer, opening = model.tokenizer, encoding.opening(model.tokenizer)
    for attempt in range(_TRIES):
        letters = hashlib.sha256(f"{name} {num_slots} {attempt}".encode()).hexdigest()
        pool = " ".join(letters[i : i + 4] for i in range(0, len(letters), 4))
        (ids,) = encoding.encode(tokenizer, [f"[{pool}" + f" {pool}" * (num_slots // 16)])
        text = tokenizer.decode(ids[len(opening) : num_slots])
        if text and encoding.encode(tokenizer, [text])[0] == ids[:num_slots] and len(ids) >= num_slots:
            follow = encoding.encode_pairs(tokenizer, [(text, " The")])[0]
            if follow[0] == ids[:num_slots]:
                return text, ids[:num_slots]
    raise ValueError(f"num_slots: {model.name} has no text of {num_slots} tokens that is read back as the same tokens")


def text_of(model: Model, token: Sequence[int] | NDArray[np.int32]) -> str:
    """The text that a context of these tokens is found by, such as a key.

    Raises:
        ContextError: the tokenizer reads the text as other tokens.
    """
    tokenizer, opening, ids = model.tokenizer, encoding.opening(model.tokenizer), [int(t) for t in token]
    text = str(tokenizer.decode(ids[len(opening) :] if ids[: len(opening)] == opening else ids))
    if not text or encoding.encode(tokenizer, [text])[0] != ids:
        raise ContextError(f"{model.name} reads the context's text as other tokens; give the documents themselves")
    return text


def slots_context(
    model: Model, layers: dict[int, tuple[torch.Tensor, torch.Tensor]], hidden: torch.Tensor, token: list[int]
) -> Context:
    """A context of keys [p, G, D] and values [p, G, Dv] by layer.

    Args:
        model: whose layers they are.
        layers: for positions 0 to p - 1, rotated as the model does it.
        hidden: what the first token after the slots is predicted from, [E].
        token: ids of the key, [p].
    """
    return Context(np.asarray(token, np.int32), hidden.expand(len(token), -1).clone(), KVCache.of(layers))


class SavedSlots:
    """The contexts of slots in a store, held in memory: whoever asks behind a key must not miss what stands for it.

    Args:
        store: whose folder is looked at again when something was added to it or removed.
    """

    def __init__(self, store: ContextStore) -> None:
        self._store = store
        self._seen_ns = 0
        self._contexts: dict[str, Context] = {}

    def before(self, token: NDArray[np.int32]) -> Context | None:
        """The slots whose key `token` begins with; None if there are none.

        Raises:
            ContextError: a damaged file.
        """
        store = self._store
        changed_ns = store.folder.stat().st_mtime_ns if store.folder.is_dir() else 0
        if changed_ns != self._seen_ns:
            saved = {s.id: s for s in contexts_in(store.folder) if s.fingerprint == store.fingerprint}
            slots = {name: s for name, s in saved.items() if s.label.startswith(LABEL)}
            kept = {name: context for name, context in self._contexts.items() if name in slots}
            self._contexts = kept | {
                name: load_context(slots[name].path, store.model, fingerprint=store.fingerprint)
                for name in slots.keys() - kept.keys()
            }
            self._seen_ns = changed_ns
        return next((c for c in self._contexts.values() if common_tokens(c.token, token) == len(c.token)), None)
