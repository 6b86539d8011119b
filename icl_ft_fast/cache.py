"""The KV stack: keys and values of the rows that later rows can still see, one contiguous pair of tensors a layer.

The forest is forwarded in depth-first order, so the rows still visible are exactly the open ancestors of the next
row. Before each chunk the stack is compacted to them, and each layer appends the chunk's own keys and values.
"""

from __future__ import annotations

import torch


class KVStack:
    """Keys and values by layer, grown to `capacity` rows at most.

    Args:
        capacity: the most rows the stack ever holds; layers allocate it once, on first use.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.rows = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a chunk's k [T, G, D] and v [T, G, Dv] after the kept rows; returns views of the whole stack.

        The rows count as appended for this layer only; `commit` makes them part of the stack for all.
        """
        return self.write(layer, slice(self.rows, self.rows + k.shape[0]), k, v, self.rows + k.shape[0])

    def write(
        self, layer: int, where: slice | torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k [T, G, D] and v [T, G, Dv] at the positions `where`; returns views of the first `rows` rows."""
        if rows > self.capacity:
            raise ValueError(f"rows: the stack holds {self.capacity}, got {rows}")
        if layer not in self._layers:
            self._layers[layer] = (k.new_zeros(self.capacity, *k.shape[1:]), v.new_zeros(self.capacity, *v.shape[1:]))
        keys, values = self._layers[layer]
        keys[where] = k
        values[where] = v
        return keys[:rows], values[:rows]

    def commit(self, rows: int) -> None:
        """Make the last `rows` appended rows part of the stack."""
        self.rows += rows

    def compact(self, keep: torch.Tensor) -> None:
        """Keep only the positions `keep` (int64, ascending), in that order; what stays where it is costs nothing."""
        stay = int((keep == torch.arange(len(keep))).sum())  # keep ascends, so these come first
        if stay < len(keep):
            for keys, values in self._layers.values():
                where = keep[stay:].to(keys.device)
                keys[stay : len(keep)] = keys[where]
                values[stay : len(keep)] = values[where]
        self.rows = len(keep)
