"""The one loop that forwards a tree: planned under the memory, chunk after chunk, in halves where memory runs out.

Scoring, prefilling, generation and distillation all go through it. It knows no request, question or document.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, TypeVar

import torch

from icl_ft_fast import ops
from icl_ft_fast.engine import memory, trie
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.defaults import CHUNK_TOKENS, GPU_CHUNK_TOKENS, MOST_CHUNK_TOKENS
from icl_ft_fast.engine.flops import Work, heads_of, work_of
from icl_ft_fast.engine.kv_cache import Context, KVCache
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.memory import Footprint
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.transfer import Sent, send
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.progress import Activity

_log = logging.getLogger(__name__)

LAYER_S, GPU_FLOPS_PER_S = 0.45e-3, 700e12  # of the host for a layer's 40 launches; of an H200's products


@dataclass(frozen=True)
class ScoringOptions:
    """How to score: what every layer passes on unchanged. Results do not depend on it beyond rounding.

    Attributes:
        chunk_tokens: tokens forwarded at a time, None for chunk_tokens_of(model); fewer where its memory asks for it.
        progress: whether to show a progress bar.
        store: of saved contexts; a shared prefix is taken from it, or forwarded and saved there.
    """

    chunk_tokens: int | None = None
    progress: bool = False
    store: ContextStore | None = None


class Reader(Protocol):
    """What is done with hidden states.

    Attributes:
        extra_bytes: what it allocates beside the forward passes.
    """

    extra_bytes: int

    def __call__(self, sent: Sent, hidden: torch.Tensor) -> None:
        """Read a chunk's hidden states [rows, E]; called again with halves of the chunk if memory runs out."""


class StartError(UserError):
    """A context that the tree does not begin with."""


def forward_chunks(
    model: Model,
    tree: trie.Trie,
    reader: Reader,
    *,
    options: ScoringOptions,
    ledger: Ledger,
    start: Context | None = None,
    shared_tokens: int = 0,
    phase: str = "query",
) -> Iterator[trie.Chunk]:
    """Forward a tree and yield each chunk as soon as `reader` has read its hidden states.

    Args:
        model: from load().
        tree: what to forward.
        reader: called with each chunk.
        options: chunk_tokens and progress are used.
        ledger: counts are added to it.
        start: from prefill(); the tree begins with its tokens, which are read from it and not forwarded again.
        shared_tokens: leading tokens that count as the ledger's phase "prefill".
        phase: of everything else.

    Raises:
        StartError: the tree does not begin with `start`.
        BudgetError: too little memory.
    """
    num_rows = len(tree.token)
    shared_rows = _common_rows(tree, shared_tokens)
    cut = shared_rows if model.device.type == "cpu" else _common_rows(tree, num_rows)
    known, room = 0, 0
    if start is not None:
        known, room = min(len(start.token), num_rows), start.room(model.memory.cache_dtype)
        begins = torch.from_numpy(start.token[:known]).equal(tree.token[:known])
        if not begins or not (tree.end[:known] == num_rows).all():
            raise StartError("start: not every request begins with its tokens")
    size, need = memory.fit(
        partial(trie.extent, tree, known=known, cut=cut),
        chunk_tokens_of(model) if options.chunk_tokens is None else options.chunk_tokens,
        model.memory,
        footprint_of(model),
        model.device,
        room=room,
        extra_bytes=reader.extra_bytes,
        temporary_bytes=partial(temporary_bytes_of, model),
    )
    plan = trie.plan(tree, size, known=known, cut=cut)
    cache = model.new_cache(plan.capacity, need.folder if need.offloaded_bytes else None)
    if start is not None:
        cache = start.open(cache)
    ledger.note_served_by(ops.served_by(model.device, model.head.weight.dtype))
    work, sent_of = work_of(model), lru_cache(maxsize=1)(partial(send, device=model.device))

    def prepare(chunk: trie.Chunk) -> None:
        if chunk.first_row >= known:
            cache.compact(chunk.keep, sent_of(chunk).moved)

    def undo(chunk: trie.Chunk) -> None:
        cache.truncate(chunk.cached_rows)

    def run(chunk: trie.Chunk) -> None:
        with ledger.phase("prefill" if known < chunk.last_row <= shared_rows else phase):
            if start is not None and chunk.first_row < known:
                hidden = start.hidden[chunk.first_row : chunk.last_row]
            else:
                hidden = model.forward_chunk(chunk, cache, sent_of(chunk))
                if chunk.first_row == known:
                    ledger.kv_bytes += plan.capacity * footprint_of(model).kv_row_bytes
                depth = tree.depth[chunk.first_row : chunk.last_row]
                ledger.ran(work, depth, chunk.cached_rows, 0)
                ledger.forwarded_tokens += len(chunk.token)
        with ledger.phase(phase):
            reader(sent_of(chunk), hidden)

    with Activity("scoring", total=num_rows, unit="token", initial=known, shown=options.progress) as shown:
        for chunk, _ in in_chunks(plan, run, prepare=prepare, undo=undo):
            shown.update(max(0, chunk.last_row - max(known, chunk.first_row)))
            yield chunk


def _common_rows(tree: trie.Trie, most: int) -> int:
    """How many of the first `most` rows all later ones are below: a beginning that all requests share."""
    return int((tree.end[:most] == len(tree.token)).int().cumprod(0).sum())


def chunk_tokens_of(model: Model) -> int:
    """Tokens forwarded at a time unless asked otherwise: what suits the model's device, see suited_chunk_tokens()."""
    return suited_chunk_tokens(model.device, work_of(model))


def suited_chunk_tokens(device: torch.device, work: Work) -> int:
    """CHUNK_TOKENS on a CPU; on a GPU so many that a layer's products take it longer than the host takes to start them.

    That is estimated: about LAYER_S for the host, at GPU_FLOPS_PER_S for the GPU. A power of two.
    """
    if device.type == "cpu":
        return CHUNK_TOKENS
    rows, suited = LAYER_S * GPU_FLOPS_PER_S * len(work.attention) / work.row_flops, GPU_CHUNK_TOKENS
    while suited < min(rows, MOST_CHUNK_TOKENS):
        suited *= 2
    return suited


def temporary_bytes_of(model: Model, rows: int, capacity: int) -> int:
    """The most that the ops allocate beside their results in a forward of so many rows, on such a KV cache."""
    heads, sizes = heads_of(model)
    of_ops = partial(ops.temporary_bytes, model.device, model.head.weight.dtype, num_queries=rows, num_keys=capacity)
    return max(of_ops(heads=(heads, groups), sizes=(key, value)) for key, value, groups in sizes)


def footprint_of(model: Model) -> Footprint:
    """Bytes that weights and rows take, measured once while a few rows are forwarded: exact for any architecture.

    What is computed of the same rows is told by flops.work_of(), from shapes.
    """
    if model.measured.footprint is None:
        model.measured.footprint = _measured_footprint(model)
    return model.measured.footprint


@torch.inference_mode()
def _measured_footprint(model: Model) -> Footprint:
    most = min(128, model.max_positions)  # and half of it, both more than ops.linear has a road of its own for
    cache, peaks = model.new_cache(most), []
    for rows in (most, most // 2, most):  # the first also makes the cache
        plan = trie.plan(trie.build_from_lists([([0] * rows, [])], whole=True), rows)
        peaks.append(memory.live_bytes(partial(list, hidden_states(model, plan, cache))))
        cache.truncate(0)
    layers = cache.layers(most)
    # The copy of a layer that is read, and, of an int8 one, the float32 that it is made from.
    opened = max((k.nbytes + v.nbytes) * 4 // k.element_size() for k, v in layers.values())
    return Footprint(
        weight_bytes=sum(p.numel() * p.element_size() for p in model.network.parameters()),
        row_bytes=(peaks[2] - peaks[1]) // (most - most // 2),
        kv_row_bytes=cache.nbytes // most,
        layers=len(layers),
        open_row_bytes=0 if model.memory.kv_dtype is None else opened // most,
        block_bytes=peaks[2] if model.batch_invariant else 0,
    )


def hidden_states(model: Model, plan: trie.Plan, cache: KVCache) -> Iterator[tuple[trie.Chunk, torch.Tensor]]:
    """Each chunk of a plan with its hidden states [rows, E]; for trees that need no memory plan."""
    sent_of = lru_cache(maxsize=1)(partial(send, device=model.device))
    yield from in_chunks(
        plan,
        lambda chunk: model.forward_chunk(chunk, cache, sent_of(chunk)),
        prepare=lambda chunk: cache.compact(chunk.keep, sent_of(chunk).moved),
        undo=lambda chunk: cache.truncate(chunk.cached_rows),
    )


Part = TypeVar("Part", bound="RowRange")
Result = TypeVar("Result")


class RowRange(Protocol):
    """Consecutive rows that are forwarded together: a trie.Chunk, or a trie.Slice."""

    @property
    def first_row(self) -> int:
        """Of the first."""

    @property
    def last_row(self) -> int:
        """Of the first row behind them."""


class Parts(Protocol[Part]):
    """Rows in the order they are forwarded in: a trie.Plan, or trie.Slices."""

    @property
    def chunks(self) -> Sequence[Part]:
        """All of them."""

    def halved(self, k: int) -> Parts[Part]:
        """Those from number k on, none longer than half of that one."""


def in_chunks(
    plan: Parts[Part],
    run: Callable[[Part], Result],
    *,
    prepare: Callable[[Part], None] = lambda _: None,
    undo: Callable[[Part], None] = lambda _: None,
) -> Iterator[tuple[Part, Result]]:
    """Run chunks in turn, each yielded with its result when it is done.

    A chunk that memory runs out on, and all after it, are run in halves.

    Args:
        plan: the chunks.
        run: forwards one, and may raise for want of memory.
        prepare: called before run(); if it runs out of memory, so does the caller.
        undo: called after a run() that ran out of memory, to forget what it has done.
    """
    k = 0
    while k < len(plan.chunks):
        chunk = plan.chunks[k]
        rows = chunk.last_row - chunk.first_row
        prepare(chunk)
        try:
            result = run(chunk)
        except (MemoryError, RuntimeError) as error:
            if not memory.is_exhausted(error) or rows == 1:
                raise
            _log.warning("memory: ran out with %d tokens at a time; resuming with %d (%s)", rows, -(-rows // 2), error)
            undo(chunk)
            plan, k = plan.halved(k), 0
        else:
            yield chunk, result
            k += 1
