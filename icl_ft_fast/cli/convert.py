"""`icl-ft-fast convert`: a GGUF file as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.cli.options import Commands, command, later


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "convert",
        later("convert", "run_convert"),
        "write the model in a GGUF file as a checkpoint folder: float32 safetensors, tokenizer and chat template",
        "icl-ft-fast convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2/",
    )
    group = parser.group("model")
    group.add_argument("file", type=Path, metavar="FILE", help="GGUF file; --model takes it as it is")
    group.add_argument("folder", type=Path, metavar="DIR", help="folder to write, which must not exist")
