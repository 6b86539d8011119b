"""Which row of the KV cache holds which token while sequences are decoded; bookkeeping alone, without a model.

Prompts enter in the order of their tokens, so what they share is still in the cache: each appends its own rows, and
rows reserved for what is generated after it. A prompt's row stays open (its end is beyond every row) until a prompt
that does not begin with it enters. A reserved row has end 0 until it is filled, so nobody sees it. When the cache is
full, the rows that no running sequence and no coming prompt sees are squeezed out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

OPEN = 2**31 - 1  # the end of a row that rows to come may see


class RowAllocator:
    """The rows of a cache in use: row i sees row j if and only if j <= i < end_k[j].

    Args:
        capacity: rows of the cache.

    Attributes:
        end_k, depth_k: int32 [capacity], of each row; a free row has end 0.
        top: rows in use, reserved ones included.
        path: int64, the rows of the prompt that entered last, in order.
    """

    def __init__(self, capacity: int) -> None:
        self.end_k = torch.zeros(capacity, dtype=torch.int32)
        self.depth_k = torch.zeros(capacity, dtype=torch.int32)
        self.top = 0
        self.path = torch.empty(0, dtype=torch.int64)
        self._reserved: dict[Hashable, range] = {}
        self._may_shrink = True  # whether anything may have become free since the last squeeze

    def has_room(self, rows: int) -> bool:
        """Whether so many rows more fit."""
        return self.top + rows <= len(self.end_k)

    def enter(self, depth: torch.Tensor) -> torch.Tensor:
        """Rows, int64 [n], for the tokens that the next prompt does not share with the one before it.

        Args:
            depth: int32 [n], their consecutive depths; prompts enter in the order of their tokens.
        """
        shared, rows = int(depth[0]), torch.arange(self.top, self.top + len(depth))
        self._leave(shared)
        self.end_k[rows], self.depth_k[rows] = OPEN, depth
        self.path = torch.cat([self.path, rows])
        self.top += len(rows)
        return rows

    def reserve(self, sequence: Hashable, rows: int) -> None:
        """Set rows apart for what a sequence will generate after the prompt that entered last."""
        self._reserved[sequence] = range(self.top, self.top + rows)
        self.end_k[self.top : self.top + rows] = 0
        self.top += rows

    def fill(self, sequences: Sequence[Hashable], places: Sequence[int], depth: torch.Tensor) -> torch.Tensor:
        """The rows, int64 [n], of each sequence's newest token, which is number `places` of what it has generated."""
        reserved = [self._reserved[sequence] for sequence in sequences]
        rows = torch.tensor([its.start + n for its, n in zip(reserved, places, strict=True)], dtype=torch.int64)
        self.end_k[rows] = torch.tensor([its.stop for its in reserved], dtype=torch.int32)
        self.depth_k[rows] = depth
        return rows

    def release(self, sequence: Hashable) -> None:
        """Give up the rows of a sequence that has ended."""
        del self._reserved[sequence]
        self._may_shrink = True

    def squeeze(self, shared: int) -> torch.Tensor | None:
        """Drop what neither a running sequence nor the next prompt sees; the rows kept, int64, in their order.

        Args:
            shared: tokens that the next prompt has in common with the one that entered last.

        Returns:
            What to compact the cache to; None where nothing has become free since the last time.
        """
        if not self._may_shrink:
            return None
        self._leave(shared)
        keep = torch.zeros(self.top, dtype=torch.bool)
        keep[self.path] = True
        for its in self._reserved.values():
            keep[: its.stop] |= self.end_k[: its.stop] >= its.stop
            keep[its.start : its.stop] = True
        moved = torch.nn.functional.pad(keep.cumsum(0), (1, 0))  # rows kept before each
        kept = keep.nonzero()[:, 0]
        ends = self.end_k[kept]
        self.end_k[: len(kept)] = torch.where(ends == OPEN, ends, moved[ends.clamp(max=self.top)].int())
        self.depth_k[: len(kept)] = self.depth_k[kept]
        self.path = moved[self.path]
        for sequence, its in self._reserved.items():
            first = int(moved[its.start])
            self._reserved[sequence] = range(first, first + len(its))
        self.top, self._may_shrink = len(kept), False
        self.end_k[self.top :] = 0
        return kept

    def _leave(self, shared: int) -> None:
        """Close the rows that a prompt with so many shared tokens is not below."""
        self.end_k[self.path[shared:]] = self.top
        self.path = self.path[:shared]
