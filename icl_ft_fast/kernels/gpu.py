"""What the launchers ask of the GPU they launch on, and what their kernels have in common."""

from functools import cache
from typing import NamedTuple

import torch
import triton


class Gpu(NamedTuple):
    """Shared memory that a program may have, in bytes, and how products of float32 are made.

    NVIDIA's matrix units have no float32: each factor is the sum of three bfloat16, each product that of six of theirs.
    AMD's have.
    """

    shared_bytes: int
    precision: str


@cache
def gpu(device: torch.device) -> Gpu:
    """That of a device; on a CPU, where kernels are interpreted, an H100's."""
    if device.type != "cuda":
        return Gpu(232_448, "bf16x6")
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return Gpu(int(properties["max_shared_mem"]), "ieee" if torch.version.hip else "bf16x6")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Cost(NamedTuple):
    """What all programs of one launch do, from shapes and the trie alone.

    flops: of matrix products, the padding of tiles included.
    read_bytes, written_bytes: of loads and stores, each as often as a program makes it; caches may serve some.
    whole, partial, skipped: tiles met without a mask, with one, and not at all, over the key/value heads.
    """

    flops: int
    read_bytes: int
    written_bytes: int
    whole: int = 0
    partial: int = 0
    skipped: int = 0
