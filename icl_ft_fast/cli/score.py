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
from icl_ft_fast.engine.defaults import CHUNK_TOKENS, SHARD_TOKENS


def add(commands: Commands) -> None:
    """Add the command."""
    scoring = command(
        commands,
        "score",
        later("score", "run_score"),
        "log-likelihoods of multiple-choice questions over documents",
        "icl-ft-fast score --model DIR --documents documents.jsonl --questions questions.jsonl --out scores.jsonl",
    )
    add_model_options(scoring)
    data = scoring.group("data")
    help = "JSON lines file with id, prompt, choices and optionally answer and split"
    data.add_argument("--questions", type=Path, required=True, metavar="FILE", help=help)
    help = "JSON lines file with id and text; all documents precede every prompt"
    data.add_argument("--documents", type=Path, metavar="FILE", help=help)
    scoring.group(OUTPUT).add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines file, a line per question; finished shards are stored in FILE.shards/ meanwhile, and the same "
        "command resumes from them",
    )
    add_output_options(scoring)
    add_store_options(scoring)
    add_memory_options(scoring)
    help = "tokens per forward pass"
    scoring.group("memory").add_argument("--chunk-tokens", type=positive, default=CHUNK_TOKENS, metavar="N", help=help)
    add_executor_options(scoring)
    scoring.group("workers").add_argument(
        "--shard-tokens",
        type=positive,
        default=SHARD_TOKENS,
        metavar="N",
        help="average tokens per shard, the unit of work that a killed worker loses",
    )
    add_json_option(scoring)
