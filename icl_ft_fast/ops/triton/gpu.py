"""What the launchers ask of the GPU they launch on, and what their kernels have in common."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget


class Gpu(NamedTuple):
    """What launchers choose by.

    matrix: the matrix units, "wgmma" (sm_90), "tcgen05" (sm_100 to sm_119), "mma" (NVIDIA's others) or "mfma" (AMD's).
    shared_bytes: the shared memory that a program may have.
    multiprocessors: how many there are.
    """

    matrix: str
    shared_bytes: int
    multiprocessors: int

    @property
    def precision(self) -> str:
        """How products of float32 are made.

        NVIDIA's matrix units have no float32: each factor is the sum of three bfloat16, each product that of six of
        theirs. AMD's have.
        """
        return "ieee" if self.matrix == "mfma" else "bf16x6"


def described(target: GPUTarget, shared_bytes: int, multiprocessors: int) -> Gpu:
    """That of what Triton compiles for; for NVIDIA's, arch is ten times the compute capability."""
    if target.backend != "cuda":
        return Gpu("mfma", shared_bytes, multiprocessors)
    matrix = {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(target.arch // 10, "mma")
    return Gpu(matrix, shared_bytes, multiprocessors)


@cache
def gpu(device: torch.device) -> Gpu:
    """That of a device; on a CPU, where kernels are interpreted, an H100's."""
    if device.type != "cuda":
        return described(GPUTarget("cuda", 90, 32), 232_448, 132)
    driver = triton.runtime.driver.active
    with torch.cuda.device(device):
        target = driver.get_current_target()
    found = driver.utils.get_device_properties(device.index)
    return described(target, int(found["max_shared_mem"]), int(found["multiprocessor_count"]))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
