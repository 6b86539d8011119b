"""The one timing module: interleaved variants, medians, peak memory, and the machine they were measured on."""

import csv
import ctypes
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

HEAD_START_MS = 1.0  # that a GPU waits before a call is timed, while the host starts it


@dataclass(frozen=True)
class Row:
    """One measurement, the same columns in every suite; `rate` is in `unit`, and None is what does not apply."""

    suite: str
    case: str
    variant: str
    ms: float
    p20_ms: float
    p80_ms: float
    rate: float
    unit: str
    peak_percent: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, 20th and 80th percentile; and of what the host did meanwhile, on CUDA."""

    ms: float
    p20_ms: float
    p80_ms: float
    host_ms: float | None = None


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    min_rounds: int = 7,
    max_rounds: int = 1000,
    seconds: float = 1.0,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time each variant once a round, in turn, so that a slow spell of the machine falls on all of them.

    After a warm-up round, if asked for, at least `min_rounds` are run, then more until `seconds` have passed for each
    variant. On CUDA a call is timed by events after the L2 cache has been overwritten, and the host has a head start:
    calls that it starts within HEAD_START_MS are the device's time alone. On the CPU, inputs should exceed the cache.
    """
    clock = _cuda_clock() if torch.device(device).type == "cuda" else _cpu_clock
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for call in variants.values() if warm_up else ():
        call()
    deadline = time.perf_counter() + seconds * len(variants)
    for i in range(max_rounds):
        if i >= min_rounds and time.perf_counter() > deadline:
            break
        for name, call in variants.items():
            samples[name].append(clock(call))
    return {name: _timing(np.array(its), torch.device(device)) for name, its in samples.items()}


def _timing(samples: NDArray[np.float64], device: torch.device) -> Timing:
    """Of (ms, host ms) of each call."""
    host_ms = float(np.median(samples[:, 1])) if device.type == "cuda" else None
    return Timing(*np.percentile(samples[:, 0], [50, 20, 80]).tolist(), host_ms)


def peak_bytes(call: Callable[[], object], device: str | torch.device = "cpu") -> int | None:
    """Memory a call adds at its highest point, its result included; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call reuses freed memory that still counts as resident
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
        before = status_bytes("VmRSS")
        call()
        return status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """The hardware and versions a row was measured on."""
    cuda = torch.device(device).type == "cuda"
    packages = ("numpy", "torch", "triton", "transformers")
    versions = {name: _version(name) for name in packages}
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


def append_csv(folder: Path, rows: list[Row], on: Mapping[str, str | int]) -> Path:
    """Append rows to the device's file in `folder`, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"\W+", "-", str(on["device"]).lower()).strip("-") + ".csv")
    names = [*(f.name for f in fields(Row)), *on]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if new:
            writer.writeheader()
        writer.writerows(record(row) | dict(on) for row in rows)
    return path


def record(row: Row) -> dict[str, object]:
    """A row's columns, to four digits."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(row).items()}


def _cpu_clock(call: Callable[[], object]) -> tuple[float, float]:
    start = time.perf_counter()
    call()
    ms = (time.perf_counter() - start) * 1e3
    return ms, ms


def _cuda_clock() -> Callable[[Callable[[], object]], tuple[float, float]]:
    scratch = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def clock(call: Callable[[], object]) -> tuple[float, float]:
        scratch.zero_()
        torch.cuda._sleep(int(HEAD_START_MS * 2e6))  # of cycles, at about 2 GHz
        start.record()
        began = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - began) * 1e3
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)), host_ms

    return clock


def status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _cpu_name() -> str:
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()} x{os.cpu_count()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
