"""Compaction: fewer keys and values that attention reads like a whole context's. No training, least squares only.

For each layer and key/value head, with K and V [S, D] of the context and queries Q [N, D] of tokens that come after it,
t rows K', V' are found such that for the queries

    logsumexp(Q @ K'.T) = logsumexp(Q @ K.T)        the context keeps its weight beside the tokens that follow it
    softmax(Q @ K'.T) @ V' = softmax(Q @ K.T) @ V   and says the same

K' are the keys whose attention differs most, moved so that each also stands for some of those left out; V' solve the
second equation. Source: attention matching (arXiv 2602.16284), whose weight for each key is folded into the key here,
because attention has no place for it. Knows no document and no question.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from icl_ft_fast.engine.defaults import CHUNK_TOKENS
from icl_ft_fast.engine.flops import heads_of, work_of
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import ATTENTION, Model, Rows
from icl_ft_fast.runtime.errors import UserError

OPEN = 2**31 - 1  # the end of a key that all later queries see
RECORDING = f"{ATTENTION}_recording"
RIDGE = 1e-4  # of the mean square of what is solved for: keeps values near those of the chosen keys
CHECKED = 16  # tokens that a model is tried on
WEIGHT_FLOPS, CHOOSING_FLOPS = 800, 64  # that a weight, and a product in choosing, take the time of
SHIFT_TOLERANCE = 2e-2  # hidden states that move by more than this, relatively, depend on absolute positions


class CompactionError(UserError):
    """A context or a model that cannot be compacted; the message names the reason."""


@dataclass(frozen=True)
class Compacted:
    """What stands for a context.

    Attributes:
        layers: keys [t, G, D] and values [t, G, Dv] by layer, for positions 0 to t - 1.
        hidden: of the context's last token, [E].
        error: root mean square error of attention's output over the queries, relative to the output, by layer.
    """

    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor
    error: dict[int, float]

    @property
    def mean_error(self) -> float:
        """Over the layers."""
        return sum(self.error.values()) / len(self.error)


@torch.inference_mode()
def compact(
    model: Model,
    token: Sequence[int],
    num_slots: int,
    followers: Sequence[Sequence[int]],
    *,
    ledger: Ledger | None = None,
) -> Compacted:
    """Keys and values of `num_slots` tokens that stand for those of a longer context.

    Args:
        model: from load(), with positions that only their differences matter of (rotary), and attention without
            sliding windows, soft-caps or sinks.
        token: ids of the context.
        num_slots: t, from 1 to the context's tokens.
        followers: token ids of texts that may come after the context. Their queries are what is matched: the documents
            themselves, or what the model writes about them.
        ledger: counts of the phase "compact" are added to it.

    Raises:
        CompactionError: num_slots out of range, no followers, or a model without these properties.
    """
    ledger = ledger or Ledger()
    if not 1 <= num_slots <= len(token):
        raise CompactionError(f"num_slots: expected 1 to the context's {len(token)} tokens, got {num_slots}")
    if not any(map(len, followers)):
        raise CompactionError("followers: expected at least one token")
    if (longest := len(token) + min(CHUNK_TOKENS, max(map(len, followers)))) > model.max_positions:
        raise CompactionError(
            f"token: {longest} tokens with what follows, the model has {model.max_positions} positions"
        )
    with ledger.phase("compact"):
        _check_positions(model, token)
        first = num_slots - len(token)  # the last token stands where the last slot will
        cache, last_hidden = _read(model, token, first, followers, ledger)
        layers, errors = {}, {}
        for layer, (keys, values) in cache.keys_values.items():
            kept = [
                _matched(q, keys[:, g].double(), values[:, g].double(), num_slots, cache.scale[layer])
                for g, q in enumerate(cache.queries_of(layer, keys.shape[1]))
            ]
            layers[layer] = (
                torch.stack([k for k, _, _ in kept], 1).to(keys.dtype),
                torch.stack([v for _, v, _ in kept], 1).to(values.dtype),
            )
            errors[layer] = (sum(error**2 for _, _, error in kept) / len(kept)) ** 0.5
    return Compacted(layers, last_hidden, errors)


def compacting_flops(model: Model, num_tokens: int, num_slots: int, follower_tokens: int) -> tuple[float, float]:
    """FLOPs of compact(), about: of reading, and of matching in float64, which is cubic.

    Each of a layer's queries meets every two keys of the context, and every two slots three times. Each slot that is
    chosen goes over the columns of those before it, and each query's logits become weights: that waits for memory and
    for exponentials, and counts as so many FLOPs of a product.
    """
    work, (heads, sizes) = work_of(model), heads_of(model)
    path = work.path_flops(num_tokens + 1)
    queries = follower_tokens * heads
    products = 2 * queries * (num_tokens**2 + 3 * num_slots**2)
    weights = WEIGHT_FLOPS * queries * (num_tokens + 2 * num_slots)
    choosing = CHOOSING_FLOPS * max(groups for _, _, groups in sizes) * num_tokens * num_slots**2 / 2
    reading = float(path[-2] + follower_tokens * (path[-1] - path[-2]))
    return reading, len(work.attention) * (products + weights + choosing)


@dataclass
class _Record:
    """Queries of each layer as attention gets them, and what is read of the context."""

    queries: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    scale: dict[int, float] = field(default_factory=dict)
    keys_values: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def queries_of(self, layer: int, groups: int) -> list[torch.Tensor]:
        """The queries [N, D] of each key/value head, those of the query heads that share it together."""
        queries = torch.cat(self.queries[layer]).double()  # [T, H, D]
        return [part.reshape(-1, queries.shape[-1]) for part in queries.chunk(groups, 1)]


def _read(
    model: Model, token: Sequence[int], first: int, followers: Sequence[Sequence[int]], ledger: Ledger
) -> tuple[_Record, torch.Tensor]:
    """Forward the context from position `first` on, then each follower behind it; also the last hidden state."""
    size = len(token)
    cache, record, work = model.new_cache(size + CHUNK_TOKENS), _Record(), work_of(model)
    for start in range(0, size, CHUNK_TOKENS):
        hidden = _forward(model, token[start : start + CHUNK_TOKENS], first + start, cache)
        cache.commit(len(hidden))
    seen = torch.arange(size)
    ledger.ran(work, seen, 0, 0)
    last_hidden = hidden[-1]
    with _recording(model, record):
        for follower in followers:
            ids = follower[:CHUNK_TOKENS]
            if ids:
                _forward(model, ids, first + size, cache)
                ledger.ran(work, seen[-1] + 1 + torch.arange(len(ids)), size, 0)
    ledger.forwarded_tokens += size + sum(len(f[:CHUNK_TOKENS]) for f in followers)
    ledger.kv_bytes += cache.nbytes
    record.keys_values = cache.layers(size)
    return record, last_hidden


def _forward(model: Model, token: Sequence[int], position: int, cache: KVCache) -> torch.Tensor:
    """Hidden states of one sequence that begins at a position, behind all rows of the cache."""
    device, before, num_rows = model.device, cache.rows, len(token)
    end_k = torch.full((before + num_rows,), OPEN, dtype=torch.int32, device=device)
    depth_k = torch.arange(position - before, position + num_rows, dtype=torch.int32, device=device)
    row_q = torch.arange(before, before + num_rows, dtype=torch.int32, device=device)
    ids = torch.tensor(list(token), dtype=torch.int64, device=device)
    return model.forward(Rows(ids, depth_k[before:], row_q, end_k, depth_k, cache))


def _check_positions(model: Model, token: Sequence[int]) -> None:
    """Raise unless hidden states are the same wherever a text begins, and attention is one that can be matched."""
    some = token[:CHECKED]
    with _recording(model, _Record()):
        here, there = (
            _forward(model, some, at, model.new_cache(len(some))).float() for at in (0, model.max_positions // 2)
        )
    if not (here - there).norm() <= SHIFT_TOLERANCE * here.norm():
        raise CompactionError(f"{model.name}: its positions are absolute; only rotary positions can be compacted")


@contextlib.contextmanager
def _recording(model: Model, record: _Record) -> Iterator[None]:
    """Note the queries of every forward in the block."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS[ATTENTION]

    def attention(module: Any, query: torch.Tensor, *rest: Any, scaling: float | None = None, **given: Any) -> Any:
        if any(given.get(name) is not None for name in ("sliding_window", "softcap", "s_aux")):
            raise CompactionError(f"{model.name}: attention with a sliding window, a soft-cap or sinks")
        record.scale[module.layer_idx] = query.shape[-1] ** -0.5 if scaling is None else scaling
        record.queries.setdefault(module.layer_idx, []).append(query[0].transpose(0, 1).clone())
        return attend(module, query, *rest, scaling=scaling, **given)

    ALL_ATTENTION_FUNCTIONS.register(RECORDING, attention)
    model.network.set_attn_implementation(RECORDING)
    try:
        yield
    finally:
        model.network.set_attn_implementation(ATTENTION)


def _matched(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_slots: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """K', V' and the relative error for queries [N, D], keys [S, D] and values [S, Dv], all float64."""
    logits = scale * q @ k.T
    mass = logits.logsumexp(-1, keepdim=True)
    attention = (logits - mass).exp()
    output = attention @ v
    if num_slots == len(k):
        return k, v, 0.0
    chosen = _chosen(attention, num_slots)
    weight = _weights(attention[:, chosen])
    direction = _ridge(scale * q, torch.ones(len(q), 1, dtype=q.dtype), 1e-2)[:, 0]
    k_new = k[chosen] + weight.log()[:, None] * direction
    error, best = float("inf"), (k[chosen], v[chosen])
    for keys in (k_new, k[chosen]):  # a head whose queries have no direction in common gains nothing by moved keys
        matched = (scale * q @ keys.T).softmax(-1)
        values = v[chosen] + _ridge(matched, output - matched @ v[chosen], RIDGE)
        gap = (scale * q @ keys.T).logsumexp(-1, keepdim=True) - mass
        # Half of the attention is taken to go to the context: then its weight's error counts like its output's.
        off = (output * (2 * torch.sigmoid(gap) - 1)).square().sum() + (matched @ values - output).square().sum()
        if float(off) < error:
            error, best = float(off), (keys, values)
    return *best, (error / max(float(output.square().sum()), 1e-30)) ** 0.5


def _chosen(attention: torch.Tensor, num_slots: int) -> torch.Tensor:
    """The keys whose attention [N, S] differs most from what those chosen before it explain; int64 [t], ascending."""
    gram = attention.T @ attention
    left, chosen = gram.diagonal().clone(), []
    factor = gram.new_zeros(len(gram), num_slots)  # pivoted Cholesky
    for i in range(num_slots):
        key = int(left.argmax())
        column = gram[:, key] - factor[:, :i] @ factor[key, :i]
        factor[:, i] = column / left[key].clamp(min=1e-30).sqrt()
        left -= factor[:, i].square()
        chosen.append(key)
        left[key] = float("-inf")
    return torch.tensor(chosen, device=gram.device).sort().values


def _weights(attention: torch.Tensor, steps: int = 100) -> torch.Tensor:
    """Positive weights w [t] with attention [N, t] @ w near 1, by multiplicative updates (Lee and Seung 2001)."""
    weight = torch.full((attention.shape[1],), 1.0, dtype=attention.dtype)
    wanted, gram = attention.sum(0), attention.T @ attention
    for _ in range(steps):
        weight *= (wanted / (gram @ weight).clamp(min=1e-30)).clamp(0.1, 10)
    return weight.clamp(1e-3, 1e3)


def _ridge(a: torch.Tensor, b: torch.Tensor, ridge: float) -> torch.Tensor:
    """The x [t, D] that minimises |a x - b|^2 + ridge * mean square of a's columns * |x|^2."""
    gram = a.T @ a
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    solved: torch.Tensor = torch.linalg.solve(gram, a.T @ b)
    return solved
