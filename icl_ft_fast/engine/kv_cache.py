"""The KV cache: keys and values of the rows that later rows can still see, one contiguous pair of tensors a layer.

It is a stack. The tree is forwarded in depth-first order, so the rows that later rows can see are exactly the open
ancestors of the next row. Before each chunk the cache is compacted to them; then each layer appends the chunk's own
keys and values. A prefix that requests share can stay in a cache, as a Context that later requests start from. This
module knows no model and no text.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

PackedRows: TypeAlias = tuple[torch.Tensor, ...]


def pack(rows: torch.Tensor, kv_dtype: torch.dtype | None) -> PackedRows:
    """Rows [T, G, D] as a cache keeps them: as they are (None), rounded, or int8 with a scale for each row and head.

        scale = rows.abs().amax(-1, keepdim=True) / 127
        kept = (rows / scale).round()

    Returns:
        The rows in kv_dtype, and for int8 the scales, float32 [T, G, 1]. What unpack() makes of them is off by at most
        2**-8 of itself (bfloat16), or 1/254 of the largest component of its row and head (int8), beyond rounding.
    """
    if kv_dtype != torch.int8:
        return (rows.to(kv_dtype or rows.dtype),)
    scale = rows.abs().amax(-1, keepdim=True).float() / 127
    return (rows / scale.masked_fill(scale == 0, 1)).round().to(torch.int8), scale


def unpack(kept: PackedRows, dtype: torch.dtype) -> torch.Tensor:
    """Rows [T, G, D] of pack() in `dtype`; the very tensor where that is how they are kept."""
    rows, *scale = kept
    return rows.to(dtype).mul_(scale[0]) if scale else rows.to(dtype)


class KVCache:
    """Keys and values by layer, grown to `capacity` rows at most.

    Args:
        capacity: the most rows the cache ever holds; layers allocate it once, on first use.
        kv_dtype: what rows are kept in, see pack(); None for what they come in. A chunk's own rows too are read as they
            are kept, so that results do not depend on where chunks end.
        folder: to offload to: each layer's rows lie in a nameless file there, and only the layer at work is resident.
    """

    def __init__(self, capacity: int, *, kv_dtype: torch.dtype | None = None, folder: Path | None = None) -> None:
        self.capacity, self.kv_dtype, self.folder = capacity, kv_dtype, folder
        self.rows = 0
        self._layers: dict[int, PackedRows] = {}  # keys as they are kept, then values
        self._dtype = torch.float32  # what they come in
        self._files: dict[int, mmap.mmap] = {}
        self._at_work = -1  # the layer whose file may be resident

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk's k [T, G, D] and v [T, G, Dv] after the rows it holds; returns all rows, see write().

        The rows count as appended for this layer only; `commit` makes them part of the cache for all.
        """
        return self.write(layer, slice(self.rows, self.rows + k.shape[0]), k, v, self.rows + k.shape[0])

    def write(
        self, layer: int, where: slice | torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k [T, G, D] and v [T, G, Dv] at the positions `where`; returns the first `rows` rows.

        They are views of the cache, or copies where it keeps them in another dtype.
        """
        if rows > self.capacity:
            raise ValueError(f"rows: the cache holds {self.capacity}, got {rows}")
        self._dtype = k.dtype
        self._put(layer, where, pack(k, self.kv_dtype) + pack(v, self.kv_dtype))
        return self._read(layer, rows)

    def commit(self, rows: int) -> None:
        """Make the last `rows` appended rows part of the cache."""
        self.rows += rows

    def truncate(self, rows: int) -> None:
        """Forget all rows but the first `rows`, and what was appended and not committed."""
        self.rows = rows

    def compact(self, keep: torch.Tensor, moved: torch.Tensor | None = None) -> None:
        """Keep only the positions `keep` (int64, ascending), in that order; what stays where it is costs nothing.

        If memory runs out meanwhile, only the rows that stay where they are can still be used: truncate to them.

        Args:
            keep: on the host.
            moved: keep[num_staying(keep):] on the device of the cache, where it is there already.
        """
        stay = num_staying(keep)
        if stay < len(keep):
            moved = keep[stay:] if moved is None else moved
            for layer, parts in self._layers.items():
                self._work_on(layer)
                for part in parts:
                    moved = moved.to(part.device)
                    part[stay : len(keep)] = part[moved]
        self.rows = len(keep)

    def copy(self, rows: int, other: KVCache) -> KVCache:
        """Put the first `rows` rows on another cache, which is empty, and return that."""
        self.copy_rows(slice(rows), other, slice(rows))
        other.commit(rows)
        return other

    def copy_rows(self, rows: slice | torch.Tensor, other: KVCache, where: slice) -> None:
        """Put rows, by position, on the rows `where` of another cache; they are not committed there."""
        other._dtype = self._dtype
        for layer, parts in self._layers.items():
            kept = tuple(part[rows] for part in parts)
            if other.kv_dtype != self.kv_dtype:
                half = len(kept) // 2
                keys, values = unpack(kept[:half], self._dtype), unpack(kept[half:], self._dtype)
                kept = pack(keys, other.kv_dtype) + pack(values, other.kv_dtype)
            other._put(layer, where, kept)

    @classmethod
    def of(cls, layers: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> KVCache:
        """A full cache of keys [S, G, D] and values [S, G, Dv] by layer, which it does not copy."""
        keys, _ = next(iter(layers.values()))
        cache = cls(len(keys))
        cache._layers, cache.rows, cache._dtype = {**layers}, len(keys), keys.dtype
        return cache

    def layers(self, rows: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first `rows` rows by layer, as write() returns them."""
        return {layer: self._read(layer, rows) for layer in self._layers}

    @property
    def nbytes(self) -> int:
        """Bytes of every layer, free rows included."""
        return sum(part.nbytes for parts in self._layers.values() for part in parts)

    def _read(self, layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = tuple(part[:rows] for part in self._layers[layer])
        half = len(parts) // 2
        return unpack(parts[:half], self._dtype), unpack(parts[half:], self._dtype)

    def _put(self, layer: int, where: slice | torch.Tensor, new: PackedRows) -> None:
        if layer not in self._layers:  # zeros: nobody sees a row that is not filled, but 0 * NaN is NaN
            shapes = [(self.capacity, *part.shape[1:]) for part in new]
            if self.folder is None:
                self._layers[layer] = tuple(part.new_zeros(shape) for part, shape in zip(new, shapes, strict=True))
            else:
                self._files[layer], self._layers[layer] = _in_a_file(
                    self.folder, [(part.dtype, shape) for part, shape in zip(new, shapes, strict=True)]
                )
        self._work_on(layer)
        for mine, part in zip(self._layers[layer], new, strict=True):
            mine[where] = part

    def _work_on(self, layer: int) -> None:
        """Let the pages of the layer before go; what they hold stays in its file."""
        if self._at_work != layer and self._at_work in self._files:
            self._files[self._at_work].madvise(mmap.MADV_DONTNEED)
        self._at_work = layer


def num_staying(keep: torch.Tensor) -> int:
    """How many of the positions `keep`, which ascend, stay where they are when a cache is compacted to them."""
    return int((keep == torch.arange(len(keep))).sum())  # these come first


_ALIGNED = 64  # bytes that a tensor's memory starts at a multiple of, as torch's own does


def _in_a_file(folder: Path, shapes: list[tuple[torch.dtype, tuple[int, ...]]]) -> tuple[mmap.mmap, PackedRows]:
    """Zero tensors that lie in a file without a name, which the system drops with the process whatever ends it."""
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in shapes]
    starts = [0, *itertools.accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, starts[-1])  # a full disk is an error here, not a signal later
            mapped = mmap.mmap(file.fileno(), starts[-1])
    except OSError as error:
        raise OSError(
            error.errno, f"{starts[-1]:,} bytes of offloaded keys and values: {error.strerror}", str(folder)
        ) from error
    tensors = tuple(
        torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
        for (dtype, shape), start in zip(shapes, starts, strict=False)
    )
    return mapped, tensors


def common_tokens(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two sequences have in common before they part."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


@dataclass(eq=False)
class Context:
    """A prefix of token sequences, forwarded: requests that begin with it forward only what follows it.

    One run at a time may start from it: the run's rows go into its cache, after its own.

    Attributes:
        token: int32 [S].
        hidden: hidden states of the tokens, [S, E], so that probabilities within and right after it can be asked for.
        cache: their keys and values.
        is_borrowed: whether the cache is another context's, so that a run must copy it.
    """

    token: NDArray[np.int32]
    hidden: torch.Tensor
    cache: KVCache
    is_borrowed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values (with the cache's free rows) and hidden states."""
        return self.cache.nbytes + self.hidden.nbytes

    @classmethod
    def empty(cls, hidden: torch.Tensor) -> Context:
        """A context of no tokens, whose hidden states are like these."""
        return cls(np.empty(0, np.int32), hidden[:0], KVCache(0))

    def prefix(self, num_tokens: int) -> Context:
        """Its first tokens, to start from; this one stays as it is."""
        return Context(self.token[:num_tokens], self.hidden[:num_tokens], self.cache, is_borrowed=True)

    def room(self, kv_dtype: torch.dtype | None) -> int:
        """Rows that open() has without another cache, if rows are to be kept in this dtype."""
        return 0 if self.is_borrowed or self.cache.kv_dtype != kv_dtype else self.cache.capacity

    def open(self, empty: KVCache) -> KVCache:
        """The cache with the context's rows in it and nothing else, moved to `empty` unless it has as much room."""
        if empty.capacity > self.room(empty.kv_dtype):
            self.cache, self.is_borrowed = self.cache.copy(len(self.token), empty), False
        self.cache.truncate(len(self.token))
        return self.cache


class ContextCache:
    """Contexts retained for later requests; beyond `max_bytes` the least recently used are dropped."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._contexts: list[Context] = []  # the most recently used last

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(context.nbytes for context in self._contexts)

    def find(self, token: NDArray[np.int32], *, whole: bool = True) -> Context | None:
        """The context that shares the longest prefix with `token`, None if none shares any.

        Args:
            token: int32 ids.
            whole: only contexts that `token` begins with, so that a score can start from them; it counts as their use.
        """
        common = [(common_tokens(context.token, token), context) for context in self._contexts]
        lengths = [n if not whole or n == len(context.token) else 0 for n, context in common]
        if not any(lengths):
            return None
        best = self._contexts[lengths.index(max(lengths))]
        if whole:
            self.use(best)
        return best

    def use(self, context: Context) -> None:
        """Count a context as used, if it is still there."""
        if context in self._contexts:
            self._contexts.remove(context)
            self._contexts.append(context)

    def add(self, context: Context) -> None:
        """Retain a context."""
        self._contexts.append(context)
        self.trim()

    def remove(self, context: Context) -> None:
        """Drop a context, if it is still there."""
        if context in self._contexts:
            self._contexts.remove(context)

    def trim(self) -> None:
        """Drop what is over the budget: caches grow as runs start from them."""
        while self.nbytes > self.max_bytes:
            del self._contexts[0]
