"""The work of `icl-ft-fast convert`."""

from __future__ import annotations

import argparse

from icl_ft_fast.engine.conversion import convert
from icl_ft_fast.runtime.durable import locked


def run_convert(options: argparse.Namespace) -> None:
    """`icl-ft-fast convert`."""
    folder = options.folder.absolute()
    with locked(folder.with_name(f".{folder.name}.lock")):
        header = convert(options.file, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{header.num_values:,} weights ({header.quantization}) and the tokenizer written to {options.folder}: "
        f"{size / 1e6:,.0f} MB"
    )
