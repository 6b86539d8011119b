"""The KV stack: keys and values of the rows that later rows can still see, one contiguous pair of tensors a layer.

The forest is forwarded in depth-first order, so the rows still visible are exactly the open ancestors of the next
row. Before each chunk the stack is compacted to them, and each layer appends the chunk's own keys and values. What
requests have in common can stay on a stack, as a Context that later requests start from. Knows no model and no text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


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

    def copy(self, rows: int, capacity: int) -> KVStack:
        """Another stack, of the first `rows` rows of this one and with room for `capacity`."""
        other = KVStack(capacity)
        for layer, (keys, values) in self._layers.items():
            other.write(layer, slice(rows), keys[:rows], values[:rows], rows)
        other.commit(rows)
        return other

    @classmethod
    def of(cls, layers: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> KVStack:
        """A full stack of keys [S, G, D] and values [S, G, Dv] by layer, which it does not copy."""
        rows = len(next(iter(layers.values()))[0])
        stack = cls(rows)
        stack._layers, stack.rows = layers, rows
        return stack

    def layers(self, rows: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the first `rows` rows by layer; views."""
        return {layer: (keys[:rows], values[:rows]) for layer, (keys, values) in self._layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of every layer, free rows included."""
        return sum(tensor.nbytes for tensors in self._layers.values() for tensor in tensors)


def common_tokens(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two sequences have in common before they part."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


@dataclass(eq=False)
class Context:
    """A beginning of token sequences, forwarded: requests that begin with it forward what follows it only.

    One run at a time may start from it: the run's rows go onto its stack, after its own.

    Attributes:
        token: int32 [S].
        hidden: hidden states of the tokens, [S, E], so that probabilities within and right after it can be asked for.
        stack: their keys and values.
    """

    token: NDArray[np.int32]
    hidden: torch.Tensor
    stack: KVStack

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values (with the stack's free rows) and hidden states."""
        return self.stack.nbytes + self.hidden.nbytes

    def open(self, capacity: int) -> KVStack:
        """The stack with the context's rows on it and nothing else, and room for `capacity` in all."""
        if capacity > self.stack.capacity:
            self.stack = self.stack.copy(len(self.token), capacity)
        self.stack.rows = len(self.token)
        return self.stack


class ContextCache:
    """Contexts kept for later requests; beyond `max_bytes` the least recently used are dropped."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._contexts: list[Context] = []  # the most recently used last

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def nbytes(self) -> int:
        """Bytes of all kept contexts."""
        return sum(context.nbytes for context in self._contexts)

    def find(self, token: NDArray[np.int32], *, whole: bool = True) -> Context | None:
        """The context that has the longest beginning in common with `token`, None if none has any.

        Args:
            token: int32 ids.
            whole: only contexts that `token` begins with, so that it can start from them; it counts as their use.
        """
        common = [(common_tokens(context.token, token), context) for context in self._contexts]
        lengths = [n if not whole or n == len(context.token) else 0 for n, context in common]
        if not any(lengths):
            return None
        best = self._contexts[lengths.index(max(lengths))]
        if whole:
            self._contexts.remove(best)
            self._contexts.append(best)
        return best

    def add(self, context: Context) -> None:
        """Keep a context."""
        self._contexts.append(context)
        self.trim()

    def trim(self) -> None:
        """Drop what is over the budget: stacks grow as runs start from them."""
        while self.nbytes > self.max_bytes:
            del self._contexts[0]
