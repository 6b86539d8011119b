"""The machine: its fingerprint and the ceilings that figures are held against."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("icl_ft_fast", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton")


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured: FLOPs of a matrix product and bytes of a copy (read and written)."""

    dtype: str
    flops_per_s: float
    bytes_per_s: float


def fingerprint(device: torch.device | str) -> dict[str, Any]:
    """The hardware and the versions that figures were taken with."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(_versions()),
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Of the packages that decide figures, those that are installed; read from their files once."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    """The processor's name as Linux gives it, or its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def ceilings(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 1.0) -> Ceilings:
    """Measure a device: the best of a square matrix product and of a copy larger than the caches."""
    device = torch.device(device)
    size, count = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source, target = (torch.ones(count, device=device) for _ in range(2))
    product_s = _least_s(lambda: a @ b, device, seconds)
    copy_s = _least_s(lambda: target.copy_(source), device, seconds)
    return Ceilings(str(dtype).removeprefix("torch."), 2 * size**3 / product_s, 2 * source.nbytes / copy_s)


SLOWER = 1.5  # times float32's seconds, from which on a dtype is told to be slow


def slow_dtype(device: torch.device | str, dtype: torch.dtype) -> str:
    """A sentence on a dtype whose matrix products a CPU has no instructions for; else empty."""
    if torch.device(device).type != "cpu" or dtype == torch.float32:
        return ""
    taken = []
    for each in (dtype, torch.float32):
        a, b = (torch.randn(512, 512).to(each) for _ in range(2))
        taken.append(_least_s(lambda a=a, b=b: a @ b, "cpu", 0.05))  # type: ignore[misc]
    times = taken[0] / taken[1]
    name = str(dtype).removeprefix("torch.")
    return f"{name}: its products take {times:.1f} times float32's seconds on this CPU" if times > SLOWER else ""


def _least_s(call: Callable[[], object], device: torch.device | str, seconds: float) -> float:
    """Least seconds of a call, after one that warms up: what others do meanwhile lowers no ceiling."""
    samples: list[float] = []
    device = torch.device(device)
    call()
    while len(samples) < 3 or sum(samples) < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return min(samples)
