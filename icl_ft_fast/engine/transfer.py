"""Between host and device: what a chunk needs goes there in one copy, and results come back in copies read later.

A copy that is waited for lets a GPU stand still, and the host cannot prepare the next chunk meanwhile. So a chunk's
numbers lie in one pinned buffer, and its results are read when the next chunk is on its way. Knows no network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icl_ft_fast import ops
from icl_ft_fast.engine import trie
from icl_ft_fast.engine.kv_cache import num_staying


@dataclass(frozen=True, eq=False)
class Sent:
    """A chunk and, on the device, what its forward and its reader need: the chunk's own tensors, of the same names.

    Attributes:
        chunk: on the host.
        moved: int64, what of chunk.keep does not stay where it is, see KVCache.compact().
        token: int64 [T].
        row_q: int32 [T], the positions of its rows in the cache.
        end_k, depth_k: int32 [S].
        head_rows, target_row, target_token: int32.
        num_shared, max_depth: see ops.TreeIndex.
    """

    chunk: trie.Chunk
    moved: torch.Tensor
    token: torch.Tensor
    row_q: torch.Tensor
    end_k: torch.Tensor
    depth_k: torch.Tensor
    head_rows: torch.Tensor
    target_row: torch.Tensor
    target_token: torch.Tensor
    num_shared: int
    max_depth: int


def send(chunk: trie.Chunk, device: torch.device) -> Sent:
    """Copy what a chunk needs to the device, without waiting for it."""
    keep, end_k, depth_k = chunk.keep, chunk.end_k, chunk.depth_k
    parts = (
        keep[num_staying(keep) :].int(),
        chunk.token,
        torch.arange(chunk.cached_rows, len(end_k), dtype=torch.int32),
        end_k,
        depth_k,
        chunk.head_rows,
        chunk.target_row,
        chunk.target_token,
    )
    moved, token, row_q, its_end_k, its_depth_k, head_rows, target_row, target_token = copied(parts, device)
    return Sent(
        chunk=chunk,
        moved=moved.long(),
        token=token.long(),
        row_q=row_q,
        end_k=its_end_k,
        depth_k=its_depth_k,
        head_rows=head_rows,
        target_row=target_row,
        target_token=target_token,
        num_shared=ops.shared_keys(end_k, chunk.cached_rows),
        max_depth=int(depth_k[chunk.cached_rows :].max()),
    )


def copied(parts: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Vectors of the host on the device, all int32 or all float32: one buffer, pinned for a GPU, one copy, no wait.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for one that does not.
    """
    sizes = [-(-len(part) // 4) * 4 for part in parts]
    packed = torch.empty(sum(sizes), dtype=parts[0].dtype, pin_memory=device.type == "cuda")
    for place, part in zip(packed.split(sizes), parts, strict=True):
        place[: len(part)] = part
    places = packed.to(device, non_blocking=True).split(sizes)
    return tuple(place[: len(part)] for place, part in zip(places, parts, strict=True))


def is_late(device: torch.device) -> bool:
    """Whether results are read when the next chunk is on its way; on a CPU there is nothing to wait for."""
    return device.type != "cpu"


class Fetched:
    """Copies of a device's tensors on their way to the host."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned where it is from a GPU
        self._arrived = _marked(tensors[0].device)

    def read(self) -> list[torch.Tensor]:
        """The copies; waits for them only."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


def _marked(device: torch.device) -> torch.cuda.Event | None:
    """An event behind what has been given to a GPU so far; None on a device that works at once."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
