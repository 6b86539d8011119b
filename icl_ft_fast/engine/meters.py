"""Readings of the device: time, energy, memory. What a machine does not tell is None, never a guess."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Reading:
    """Counters at one moment; only differences mean anything.

    Attributes:
        wall_s: of the clock.
        device_s: of the GPU's stream, or of all the process's threads on a CPU.
        joules: used so far.
        bytes: memory in use now: allocated on a GPU, resident on a CPU.
        peak_bytes: the most since the reading before.
    """

    wall_s: float
    device_s: float | None = None
    joules: float | None = None
    bytes: int | None = None
    peak_bytes: int | None = None


class Meter:
    """Reads one device; on a GPU each reading waits for it.

    Args:
        device: a torch device.
        rapl: the folder of the processors' energy counters.
    """

    def __init__(self, device: torch.device | str = "cpu", *, rapl: Path = RAPL) -> None:
        self.device = torch.device(device)
        self._rapl = [_Rapl(path) for path in sorted(rapl.glob("intel-rapl:?")) if _readable(path / "energy_uj")]
        if self.device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()

    def read(self) -> Reading:
        """The counters now; the peak of memory starts anew."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
            torch.cuda.synchronize(self.device)
            device_s, most = self._start.elapsed_time(now) / 1e3, torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            return Reading(time.perf_counter(), device_s, self._nvml_joules(), allocated, most)
        peak, used = _status_bytes("VmHWM"), _status_bytes("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
        except OSError:
            peak = None
        joules = sum(counter.joules() for counter in self._rapl) if self._rapl else None
        return Reading(time.perf_counter(), time.process_time(), joules, used, peak)

    def _nvml_joules(self) -> float | None:
        """The GPU's energy counter; None without the package nvidia-ml-py or on a GPU that has no counter."""
        if importlib.util.find_spec("pynvml") is None:
            return None
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid))) / 1e3
        except pynvml.NVMLError:
            return None


class _Rapl:
    """One processor package's counter of microjoules, which starts again at its range."""

    def __init__(self, folder: Path) -> None:
        self._energy, self._range = folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())
        self._last = self._first = int(self._energy.read_text())
        self._wrapped = 0

    def joules(self) -> float:
        now = int(self._energy.read_text())
        self._wrapped += self._range if now < self._last else 0
        self._last = now
        return (now + self._wrapped - self._first) / 1e6


def _readable(path: Path) -> bool:
    try:
        return bool(path.read_text())
    except OSError:
        return False


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status; None where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)
