"""The work of `icl-ft-fast doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

from icl_ft_fast.cli.options import Terminal, device_of
from icl_ft_fast.runtime.threads import waiting

EXTRAS = {
    "report": "matplotlib",
    "LoRA": "peft",
    "GGUF": "gguf",
    "lm-eval": "lm_eval",
    "Triton kernels": "triton",
    "FlashAttention 4": "flash_attn/cute",
    "FlashAttention 2": "flash_attn/flash_attn_interface",
    "GPU energy": "pynvml",
}


def _is_installed(module: str) -> bool:
    """Whether a module, or one in a package, can be found; nothing is imported."""
    package, _, within = module.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not within:
        return spec is not None
    folders = [Path(folder) / within for folder in spec.submodule_search_locations or ()]
    return any(folder.is_dir() or folder.with_suffix(".py").is_file() for folder in folders)


def run_doctor(options: argparse.Namespace) -> None:
    """`icl-ft-fast doctor`."""
    from rich.table import Table

    from icl_ft_fast.engine.loading import DTYPES
    from icl_ft_fast.engine.machine import ceilings, fingerprint
    from icl_ft_fast.engine.meters import Meter
    from icl_ft_fast.ops import served_by

    device = device_of(options)
    machine, reading = fingerprint(device), Meter(device).read()
    measured = [asdict(ceilings(device, dtype)) for dtype in DTYPES.values()]
    extras = {name: _is_installed(module) for name, module in EXTRAS.items()}
    attention = {name: served_by(device, dtype) for name, dtype in DTYPES.items()}
    energy = "unavailable" if reading.joules is None else "measured"
    if options.json:
        found = {"ceilings": measured, "attention": attention, "energy": energy, "extras": extras}
        print(json.dumps(machine | found | {"waiting": waiting()}))
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
    for name, served in attention.items():
        table.add_row(f"{name} attention", served)
    table.add_row("energy counter", energy)
    table.add_row("waiting threads", waiting())
    for name, there in extras.items():
        table.add_row(name, "installed" if there else "not installed")
    Terminal().print(table)
