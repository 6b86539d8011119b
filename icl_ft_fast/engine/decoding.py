"""The newest tokens of running sequences, forwarded in constant shapes, so that a GPU can replay a step as a graph.

A step of a few rows is over before the host has started its thousand kernels one by one. A CUDA graph starts them all
at once, but only in the shapes it was captured with. So rows are filled up to a batch size, and all of the KV cache is
passed, whose free rows have end 0. Knows no prompt and no text.
"""

from __future__ import annotations

import logging
import warnings

import torch

from icl_ft_fast.engine import memory
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.model import Model, Rows
from icl_ft_fast.engine.transfer import copied

_log = logging.getLogger(__name__)

LEAST_SIZE = 8  # of a batch: fewer rows take a GPU no less time


class NewestTokens:
    """Forwards one row of each running sequence.

    Args:
        model: from load().
        cache: where the rows' keys and values go. Its last row is nobody's: those that fill a batch up write to it.
        most: rows of the largest batch.
    """

    def __init__(self, model: Model, cache: KVCache, most: int) -> None:
        self.model, self.cache, self.most = model, cache, most
        self._batches: dict[int, _Batch] = {}

    def logits(
        self,
        token: torch.Tensor,
        depth: torch.Tensor,
        rows: torch.Tensor,
        end_k: torch.Tensor,
        depth_k: torch.Tensor,
    ) -> torch.Tensor:
        """Float32 logits [n, V] after n rows; to be read before the next call.

        Rows that fill the batch up stand where the last one stands, which adds no tile to what attention meets.

        Args:
            token: int32 [n]; this and the others are on the host.
            depth: int32 [n].
            rows: int64 [n], cache rows, where they are written to.
            end_k: int32 [S - 1], of all cache rows but the last; 0 in a free one.
            depth_k: int32 [S - 1].
        """
        n, size = len(token), batch_size(len(token), self.most)
        row_q = rows.int()
        slots, nobodys = row_q, torch.full((size - n,), self.cache.capacity - 1, dtype=torch.int32)
        filled = [torch.cat([x, x[-1:].expand(size - n)]) for x in (token, depth, row_q)]
        numbers = torch.cat([*filled, slots, nobodys, end_k, end_k.new_zeros(1), depth_k, depth_k.new_zeros(1)])
        if size not in self._batches:
            self._batches[size] = _Batch(self.model, self.cache, size, numbers)
        return self._batches[size].logits(numbers)[:n]


def batch_size(rows: int, most: int) -> int:
    """The rows of the batch for so many: a power of two from LEAST_SIZE on, or `most`."""
    size = LEAST_SIZE
    while size < rows:
        size *= 2
    return min(size, most)


class _Batch:
    """Forwards of one batch size: all it reads lies in one tensor that stays where it is."""

    def __init__(self, model: Model, cache: KVCache, size: int, numbers: torch.Tensor) -> None:
        self.model, self.cache = model, cache
        (self._numbers,) = (x.clone() for x in copied((numbers,), model.device))
        self._sizes = [*[size] * 4, *[cache.capacity] * 2]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        self._is_replayed = self._can_be_replayed()

    def logits(self, numbers: torch.Tensor) -> torch.Tensor:
        """Float32 logits of all rows."""
        (new,) = copied((numbers,), self.model.device)
        self._numbers.copy_(new)
        if not self._is_replayed:
            return self._forward()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.device_of(self._numbers), torch.cuda.graph(self._graph):
                self._logits = self._forward()
        self._graph.replay()
        return self._logits

    def _forward(self) -> torch.Tensor:
        token, depth, row_q, slots, end_k, depth_k = self._numbers.split(self._sizes)
        rows = Rows(token.long(), depth, row_q, end_k, depth_k, self.cache, slots.long())
        return self.model.head.logits(self.model.forward(rows))

    def _can_be_replayed(self) -> bool:
        """Whether a GPU's forward reads nothing back, which a graph cannot. Also compiles what is not compiled yet."""
        device = self.model.device
        if device.type != "cuda":
            return False
        mode = torch.cuda.get_sync_debug_mode()
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with warnings.catch_warnings(), torch.cuda.stream(stream):
                warnings.simplefilter("ignore")  # that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
                self._forward()
        except RuntimeError as error:
            if memory.is_exhausted(error):
                raise
            _log.warning("%s: tokens are generated without a CUDA graph: %s", self.model.name, error)
            return False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(stream)
        return True
