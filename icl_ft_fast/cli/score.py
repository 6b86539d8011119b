"""`icl-ft-fast score`: log-likelihoods of multiple-choice questions over documents."""

from __future__ import annotations

from pathlib import Path

from icl_ft_fast.cli.options import (
    OUTPUT,
    Commands,
    add_executor_options,
    add_json_option,
    add_memory_options,
    add_model_options,
    add_output_options,
    add_store_options,
    command,
    later,
    positive,
)
from icl_ft_fast.engine.defaults import CHUNK_TOKENS, GPU_CHUNK_TOKENS, SHARD_CHUNKS


def add(commands: Commands) -> None:
    """Add the command."""
    scoring = command(
        commands,
        "score",
        later("score", "run_score"),
        "log-likelihoods of multiple-choice questions over documents",
        "icl-ft-fast score --model DIR --documents documents.jsonl --questions questions.jsonl --out scores.jsonl\n"
        "icl-ft-fast score --model DIR --model QUANTISED --questions questions.jsonl --out scores.jsonl",
    )
    add_model_options(scoring, several=True)
    data = scoring.group("data")
    help = "JSON lines file with id, prompt, choices and optionally answer and split"
    data.add_argument("--questions", type=Path, required=True, metavar="FILE", help=help)
    help = "JSON lines file with id and text; all documents precede every prompt"
    data.add_argument("--documents", type=Path, metavar="FILE", help=help)
    help = (
        "saved context in --store that precedes every prompt, such as a trained prefix; its id as shown by context list"
    )
    data.add_argument("--context", metavar="ID", help=help)
    scoring.group(OUTPUT).add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines file, a line per question, and FILE.2, FILE.3 for further models; finished shards are "
        "stored in FILE.shards/ meanwhile, and the same command resumes from them",
    )
    add_output_options(scoring)
    add_store_options(scoring)
    add_memory_options(scoring)
    help = f"tokens per forward pass (default: {CHUNK_TOKENS} on the CPU, {GPU_CHUNK_TOKENS:,} or more on a GPU)"
    scoring.group("memory").add_argument("--chunk-tokens", type=positive, metavar="N", help=help)
    add_executor_options(scoring)
    scoring.group("workers").add_argument(
        "--shard-tokens",
        type=positive,
        metavar="N",
        help=f"average tokens per shard, the unit of work that a killed worker loses (default: {SHARD_CHUNKS} forward "
        "passes of the device's default size)",
    )
    add_json_option(scoring)
