"""The processes of a data-parallel run, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from icl_ft_fast.runtime.executors import launched

_log = logging.getLogger(__name__)


class Processes:
    """This process's place among those that share a run; alone if asked for, or where no launcher said otherwise.

    They meet over gloo whatever the device, since only counts and results travel. How long one waits for the slowest
    is not limited: shares of a run are uneven.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.size = 1 if alone or not launched() else int(os.environ["WORLD_SIZE"])
        self.rank = int(os.environ["RANK"]) if self.size > 1 else 0
        self.local_rank = int(os.environ["LOCAL_RANK"]) if self.size > 1 else 0
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(weeks=52))

    def all(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; returns once all have given theirs."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def device(self, asked: str) -> str:
        """The device of this process where `asked` is wanted: CUDA is its own GPU, or the CPU where there is none."""
        if not asked.startswith("cuda"):
            return asked
        if not torch.cuda.is_available():
            _log.warning("device: %s: no CUDA device here; on the CPU instead", asked)
            return "cpu"
        return asked if self.size == 1 else f"cuda:{self.local_rank}"
