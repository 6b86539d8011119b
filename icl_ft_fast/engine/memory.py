"""The memory of a run: what is free, what a run takes, and the chunk size and place of the KV cache that fit.

    total = held + rows * row_bytes + capacity * (kv_row_bytes + open_row_bytes + INDEX_BYTES) + other

A process holds its weights and libraries; a chunk has `rows` rows, and the KV cache `capacity`, which the longest path
bounds. Of an offloaded cache only a layer counts. Knows tries and shapes, no network and no text.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from icl_ft_fast.engine.defaults import KV_DTYPE_NAMES
from icl_ft_fast.runtime.errors import UserError

SHARE = 0.9  # of what is free, where no limit is given
LEAST_ROWS = 32  # of a chunk; rather than go below, the cache is offloaded
INDEX_BYTES = 64  # of a cache row's ends, depths and positions while a chunk is prepared
OTHER_BYTES = 32 << 20  # workspaces of kernels and libraries, and what the allocator keeps, whatever the sizes
GPU_OTHER_BYTES = 256 << 20  # the same on a GPU, where that of cuBLAS alone may be 32 MiB, and blocks are rounded up
KV_DTYPES = {name: getattr(torch, name) for name in KV_DTYPE_NAMES}

_log = logging.getLogger(__name__)


class BudgetError(UserError):
    """A run that does not fit its memory; the message says what takes how much and what to change."""


@dataclass(frozen=True)
class Memory:
    """What scoring may take.

    Attributes:
        limit_bytes: of the process on a CPU, of its allocations on a GPU. None: what it holds when a run begins and
            SHARE of what is free then.
        kv_dtype: "bfloat16" or "int8" keeps keys and values so, approximately; None as the network makes them.
        offload: folder for keys and values that do not fit; None for the system's temporary one.
    """

    limit_bytes: int | None = None
    kv_dtype: str | None = None
    offload: Path | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise ValueError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)} or None, got {self.kv_dtype!r}")

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """kv_dtype as torch knows it."""
        return None if self.kv_dtype is None else KV_DTYPES[self.kv_dtype]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a network takes in memory, measured; what it computes is flops.Work, from shapes.

    Attributes:
        weight_bytes: of all weights.
        row_bytes: of a row's activations, where most are alive.
        block_bytes: of activations whatever the rows are: those of a batch-invariant model's block.
        kv_row_bytes: of a row's keys and values in all layers, as they are kept.
        layers: that keep any.
        open_row_bytes: of the copy that a layer's keys and values are read from, for each row; 0 where there is none.
    """

    weight_bytes: int
    row_bytes: int
    kv_row_bytes: int
    layers: int
    open_row_bytes: int
    block_bytes: int = 0


@dataclass(frozen=True)
class Need:
    """What a planned run takes at most.

    Attributes:
        limit_bytes: what it may take.
        held_bytes: what the process holds before it, weights included.
        rows: of the longest chunk.
        capacity: rows of the KV cache.
        kv_bytes: of the cache; of an offloaded one what is resident.
        activation_bytes: of a chunk, with what it reads of the cache in another dtype.
        other_bytes: everything else.
        offloaded_bytes: of the cache in its files; 0 where it is in memory.
        folder: of the files.
    """

    limit_bytes: int
    held_bytes: int
    rows: int
    capacity: int
    kv_bytes: int
    activation_bytes: int
    other_bytes: int
    offloaded_bytes: int
    folder: Path

    @property
    def total_bytes(self) -> int:
        """The most that the process holds at any time."""
        return self.held_bytes + self.kv_bytes + self.activation_bytes + self.other_bytes

    def __str__(self) -> str:
        offloaded = f", offloaded to {self.folder} ({_gb(self.offloaded_bytes)})" if self.offloaded_bytes else ""
        return (
            f"{_gb(self.total_bytes)} of {_gb(self.limit_bytes)}: {_gb(self.held_bytes)} held by the process with the "
            f"weights, {_gb(self.kv_bytes)} keys and values of {self.capacity:,} rows{offloaded}, "
            f"{_gb(self.activation_bytes)} for {self.rows:,} tokens at a time, {_gb(self.other_bytes)} else"
        )


def fit(
    extent: Callable[[int], tuple[int, int]],
    chunk_tokens: int,
    memory: Memory,
    footprint: Footprint,
    device: torch.device,
    *,
    room: int = 0,
    extra_bytes: int = 0,
    temporary_bytes: Callable[[int, int], int] = lambda rows, capacity: 0,
) -> tuple[int, Need]:
    """How many tokens to forward at a time so that a run fits the memory, and what it takes then.

    A run that does not fit as it is gets smaller chunks, or a cache in a file.

    Args:
        extent: of a number of tokens at a time, the most rows that are forwarded together, and rows of the KV cache.
        chunk_tokens: tokens at a time, as long as they fit; halved until they do.
        memory: what may be taken.
        footprint: of the network.
        device: where it is. Only a CPU's cache can be offloaded.
        room: rows that there is a cache for already.
        extra_bytes: of what the caller allocates beside.
        temporary_bytes: that the ops allocate beside their results, of the longest chunk and the rows of the KV cache.

    Raises:
        BudgetError: even a token at a time does not fit.
    """
    held = held_bytes(device)
    limit = memory.limit_bytes or held + int(SHARE * free_bytes(device))
    folder, constant = memory.offload or Path(tempfile.gettempdir()), other_bytes(device)
    sizes = [chunk_tokens]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    can_offload = device.type == "cpu" and hasattr(os, "posix_fallocate")
    choices = [(rows, False) for rows in sizes if rows >= min(LEAST_ROWS, chunk_tokens) or not can_offload]
    for size, is_offloaded in choices + [(rows, True) for rows in sizes if can_offload]:
        rows, capacity = extent(size)
        new = 0 if capacity <= room else capacity
        kv_bytes = new * footprint.kv_row_bytes
        need = Need(
            limit_bytes=limit,
            held_bytes=held,
            rows=rows,
            capacity=capacity,
            kv_bytes=kv_bytes // footprint.layers if is_offloaded else kv_bytes,
            activation_bytes=footprint.block_bytes
            + rows * footprint.row_bytes
            + capacity * (footprint.open_row_bytes + INDEX_BYTES),
            other_bytes=extra_bytes + temporary_bytes(rows, capacity) + constant,
            offloaded_bytes=kv_bytes if is_offloaded else 0,
            folder=folder,
        )
        if need.total_bytes <= limit:
            break
    else:
        raise BudgetError(
            f"memory: too little: {need}, at the least (weights: {_gb(footprint.weight_bytes)}); "
            f"give --memory (memory=) {math.ceil(need.total_bytes / 1e6)}MB or more, "
            f"{'shorter requests' if memory.kv_dtype else '--kv-dtype int8 (kv_dtype=), shorter requests'} "
            "or a smaller model"
        )
    if need.offloaded_bytes and need.offloaded_bytes > (free := shutil.disk_usage(folder).free):
        raise BudgetError(
            f"memory: too little: {need}; {folder} has {_gb(free)} free: name another folder with --offload "
            "(offload=), or give --memory (memory=) more"
        )
    _log.log(logging.WARNING if need.offloaded_bytes or size < chunk_tokens else logging.INFO, "memory: %s", need)
    return size, need


def other_bytes(device: torch.device) -> int:
    """What a run takes whatever its sizes."""
    return OTHER_BYTES if device.type == "cpu" else GPU_OTHER_BYTES


def held_bytes(device: torch.device) -> int:
    """What this process has resident on a CPU, or allocated on a GPU; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else 0


def free_bytes(device: torch.device) -> int:
    """What this process may take beside, as things are: of the GPU, or of the machine within its control groups."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + int(torch.cuda.memory_reserved(device)) - held_bytes(device)
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (available,) = (line.split()[1] for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(min(int(available) * 1024, group_free_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))))


def group_free_bytes(membership: Path, root: Path) -> float:
    """What the control groups of a process (versions 1 and 2) leave it; infinite without a limit.

    Args:
        membership: /proc/self/cgroup.
        root: where the groups' folders are.
    """
    least = math.inf
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        limit, usage, reclaimable = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            if controllers
            else ("memory.max", "memory.current", "inactive_file ")
        )
        base = root / controllers
        below = base / path.lstrip("/")
        for folder in (below, *below.parents):  # a limit on a group holds for those in it too
            if folder.is_relative_to(base) and (folder / limit).is_file():
                most = (folder / limit).read_text().strip()
                stat = (folder / "memory.stat").read_text().splitlines()
                cache = sum(int(entry.split()[1]) for entry in stat if entry.startswith(reclaimable))
                if most != "max":
                    least = min(least, int(most) - int((folder / usage).read_text()) + cache)
    return max(0, least)


def is_exhausted(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def live_bytes(call: Callable[[], Any]) -> int:
    """The most bytes of tensors, made by the operations of a call, that are alive at a time; deterministic."""
    live = _Live()
    with live:
        call()
    return live.most


class _Live(TorchDispatchMode):
    """Adds up the storages that operations return and that did not come with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage.data_ptr() not in given:
                self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {address: kept for address, kept in self._alive.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
