"""How long OpenMP's threads wait actively: chosen for a process before torch loads libgomp. Imports no torch."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

SPIN_VARIABLE = "GOMP_SPINCOUNT"
SPIN_ALONE, SPIN_BESIDE = "20000", "2000"  # turns at a barrier before a thread sleeps
WAIT_VARIABLES = (SPIN_VARIABLE, "OMP_WAIT_POLICY")
STAT = Path("/proc/stat")
BUSY, SECONDS = 0.5, 0.1  # cores that others use from which on a process is not alone; how long that is looked at


def bound_spinning() -> None:
    """Let threads that wait for others sleep after some turns, unless the user chose or torch is loaded.

    libgomp lets them spin 300,000 turns at every barrier. Beside another process those turns keep a core from the
    thread that all wait for: a training step of 135M parameters took 7 times as long. Where nothing else runs, a thread
    that sleeps has to be woken, which made such a step take up to 1.4 times as long at 2,000 turns. So it depends on
    whether other processes use cores now (docs/executors.md has both sides). Children inherit the choice.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAIT_VARIABLES):
        used = cores_of_others()
        os.environ[SPIN_VARIABLE] = SPIN_ALONE if used is not None and used < BUSY else SPIN_BESIDE


def cores_of_others() -> float | None:
    """How many of this process's cores are in use while it sleeps a moment; None where the system does not say."""
    before = _idle_s()
    start = time.monotonic()
    time.sleep(SECONDS)
    after, seconds = _idle_s(), time.monotonic() - start
    if before is None or after is None:
        return None
    return max(0.0, len(os.sched_getaffinity(0)) - (after - before) / seconds)


def _idle_s() -> float | None:
    """Seconds that this process's cores have been idle since the start, waiting for disks included."""
    try:
        lines = STAT.read_text().splitlines()
        own = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):  # no Linux
        return None
    idle = [sum(map(int, line.split()[4:6])) for line in lines if line.split()[0] in own]
    return sum(idle) / os.sysconf("SC_CLK_TCK") if len(idle) == len(own) else None


def waiting() -> str:
    """What decides how this process's threads wait."""
    chosen = [f"{name}={os.environ[name]}" for name in WAIT_VARIABLES if name in os.environ]
    return ", ".join(chosen) or f"libgomp's default, which spins; set {SPIN_VARIABLE}={SPIN_BESIDE} beside other work"
