"""How long OpenMP's threads wait actively: chosen for a process before torch loads libgomp. Imports no torch."""

from __future__ import annotations

import os
import sys

SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "2000"
WAIT_VARIABLES = (SPIN_VARIABLE, "OMP_WAIT_POLICY")


def bound_spinning() -> None:
    """Let threads that wait for others sleep after SPIN_COUNT turns, unless the user chose or torch is loaded.

    libgomp lets them spin 300,000 turns at every barrier. Beside another process those turns keep a core from the
    thread that all wait for: a training step of 135M parameters took 7 times as long. Children inherit the choice.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ[SPIN_VARIABLE] = SPIN_COUNT


def waiting() -> str:
    """What decides how this process's threads wait."""
    chosen = [f"{name}={os.environ[name]}" for name in WAIT_VARIABLES if name in os.environ]
    return ", ".join(chosen) or "libgomp's default, which spins; set GOMP_SPINCOUNT=2000 beside other work"
