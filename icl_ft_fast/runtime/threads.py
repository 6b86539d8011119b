"""How OpenMP's threads wait for each other, by whether other processes want this one's cores. Imports no torch."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SPIN_VARIABLE, SPIN_BESIDE = "GOMP_SPINCOUNT", "2000"  # turns at a barrier before a thread sleeps: for own programs
WAIT_VARIABLES = (SPIN_VARIABLE, "OMP_WAIT_POLICY")
STAT = Path("/proc/stat")
SECONDS = 1.0  # between two looks at who uses the cores
BUSY = 0.5  # cores too few from which on threads sleep
CALM = 5  # looks in a row that find enough cores until threads spin again


@dataclass(frozen=True)
class Use:
    """What has been used until now, in seconds.

    Attributes:
        now: by the clock.
        all: processor time on this process's cores.
        own: processor time of this process.
    """

    now: float
    all: float
    own: float


def share_cores() -> None:
    """From now on let threads that wait for others sleep at once while other processes want their cores.

    libgomp lets them spin 300,000 turns at every barrier. Beside another process those turns keep a core from the
    thread that all wait for: calls took 7 to 18 times as long. Where nothing else runs, a thread that sleeps has to be
    woken, and calls took up to 1.5 times as long. So a thread looks every second, as long as the process runs. Nothing
    is done where the user chose how threads wait, or where the system does not say who uses the cores.
    """
    if not any(name in os.environ for name in WAIT_VARIABLES) and used() is not None:
        _start_once()


@cache
def _start_once() -> None:
    threading.Thread(target=_watch, daemon=True, name="share_cores").start()


def _watch() -> None:
    before, calm = used(), CALM
    while before is not None:
        time.sleep(SECONDS)
        after, native, torch = used(), sys.modules.get("icl_ft_fast._C"), sys.modules.get("torch")
        if after is not None and native is not None and torch is not None:  # else nothing is computed yet
            missing = torch.get_num_threads() + cores_of_others(before, after) - len(os.sched_getaffinity(0))
            calm = 0 if missing >= BUSY else calm + 1
            native.sleep_at_barriers(calm < CALM)
        before = after


def cores_of_others(before: Use, after: Use) -> float:
    """How many of this process's cores others used between two looks."""
    return max(0.0, after.all - before.all - (after.own - before.own)) / (after.now - before.now)


def used() -> Use | None:
    """What has been used; None where the system does not say."""
    try:
        lines = [line.split() for line in STAT.read_text().splitlines()]
        own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):  # no Linux
        return None
    # User, nice, system; idle and waiting for disks; interrupts. Not what a hypervisor takes: no thread could have it.
    ticks = [sum(map(int, line[1:4] + line[6:8])) for line in lines if line[0] in own]
    if len(ticks) != len(own):
        return None
    times = os.times()
    return Use(time.monotonic(), sum(ticks) / os.sysconf("SC_CLK_TCK"), times.user + times.system)


def waiting() -> str:
    """What decides how this process's threads wait."""
    chosen = [f"{name}={os.environ[name]}" for name in WAIT_VARIABLES if name in os.environ]
    if chosen:
        return ", ".join(chosen)
    if used() is None:
        return f"libgomp's default, which spins; set {SPIN_VARIABLE}={SPIN_BESIDE} beside other work"
    return f"asleep while others want the cores; in your own programs after {__name__}.share_cores()"
