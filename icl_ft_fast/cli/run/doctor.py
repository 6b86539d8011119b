"""The work of `icl-ft-fast doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict

from icl_ft_fast.cli.options import Terminal, device_of

EXTRAS = {"report": "matplotlib", "lm-eval": "lm_eval", "Triton kernels": "triton", "GPU energy": "pynvml"}


def run_doctor(options: argparse.Namespace) -> None:
    """`icl-ft-fast doctor`."""
    from rich.table import Table

    from icl_ft_fast.engine.loading import DTYPES
    from icl_ft_fast.engine.machine import ceilings, fingerprint
    from icl_ft_fast.engine.meters import Meter

    device = device_of(options)
    machine, reading = fingerprint(device), Meter(device).read()
    measured = [asdict(ceilings(device, dtype)) for dtype in DTYPES.values()]
    extras = {name: importlib.util.find_spec(module) is not None for name, module in EXTRAS.items()}
    energy = "unavailable" if reading.joules is None else "measured"
    if options.json:
        print(json.dumps(machine | {"ceilings": measured, "energy": energy, "extras": extras}))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    versions = ", ".join(f"{name} {version}" for name, version in machine.pop("versions").items())
    for name, value in machine.items():
        table.add_row(name, f"{value / 2**30:.1f} GiB" if name == "memory_bytes" else str(value))
    table.add_row("versions", versions)
    for ceiling in measured:
        table.add_row(f"{ceiling['dtype']} matmul", f"{ceiling['flops_per_s'] / 1e9:,.0f} GFLOP/s")
    table.add_row("memory", f"{measured[0]['bytes_per_s'] / 1e9:,.1f} GB/s (a copy, read and written)")
    table.add_row("energy counter", energy)
    for name, there in extras.items():
        table.add_row(name, "installed" if there else "not installed")
    Terminal().print(table)
