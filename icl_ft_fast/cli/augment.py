"""`icl-ft-fast augment`: write what follows from a task's documents, by a model, an endpoint, a file or by rule."""

from __future__ import annotations

import argparse
from pathlib import Path

from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.cli.options import (
    OUTPUT,
    Commands,
    add_executor_options,
    add_model_options,
    add_output_options,
    add_template_arguments_option,
    add_template_option,
    amount_or_0,
    between,
    command,
    day,
    later,
    positive,
    seed,
)
from icl_ft_fast.cli.task import add_task_options


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "augment",
        later("augment", "run_augment"),
        "write what follows from a task's documents, to train on",
        "icl-ft-fast augment --task FOLDER --model DIR --out out/augmented\n"
        "icl-ft-fast augment --task FOLDER --strategy global --chat --model NAME --endpoint http://HOST:8000/v1 "
        "--dry-run\n"
        "icl-ft-fast augment --task FOLDER --strategy rules --out out/by_rule",
    )
    add_task_options(parser)
    model = parser.group("model")
    add_model_options(parser, required=False)
    model.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server of --model; key in OPENAI_API_KEY")
    help = 'take replies from JSON lines {"source_id", "text"} instead of a model'
    model.add_argument("--recorded", type=Path, metavar="FILE", help=help)
    help = "concurrent requests to --endpoint"
    model.add_argument("--concurrency", type=positive, default=8, metavar="N", help=help)
    prompts = parser.group("prompts")
    described = "; ".join(f"{name}: {strategy.sees}" for name, strategy in STRATEGIES.items())
    help = f"what a prompt shows ({described}; default: the preset's, or local)"
    prompts.add_argument("--strategy", choices=STRATEGIES, help=help)
    add_template_option(prompts)
    prompts.add_argument("--chat", action="store_true", help="the same as --template chat")
    add_template_arguments_option(prompts)
    help = "day that a chat template writes as today's (default: the day of the first reply in --out)"
    prompts.add_argument("--template-date", type=day, metavar="YYYY-MM-DD", help=help)
    help = "jinja2 file that replaces the strategy's prompt"
    prompts.add_argument("--prompt-template", type=Path, metavar="FILE", help=help)
    help = "documents in the context of the global strategy, drawn by --seed (default: as many as fit)"
    prompts.add_argument("--global-documents", type=positive, metavar="N", help=help)
    prompts.add_argument("--limit", type=positive, metavar="N", help="ask for at most N replies in this run")
    sampling = parser.group("sampling")
    sampling.add_argument("--samples", type=positive, default=1, metavar="N", help="replies per prompt")
    help = "sampling temperature; 0 is greedy (default: the strategy's: 0 in local, document and self-qa, else 1)"
    sampling.add_argument("--temperature", type=between(0, 100), help=help)
    help_p = "nucleus sampling: probability mass to sample from"
    sampling.add_argument("--top-p", type=between(0, 1, above=True), default=1.0, metavar="P", help=help_p)
    help = "tokens per reply (default: the strategy's, 64 to 512)"
    sampling.add_argument("--max-new-tokens", type=positive, metavar="N", help=help)
    sampling.add_argument("--seed", type=seed, default=0, help="random seed of the generated task and of sampling")
    filters = parser.group("filters")
    help = "keep texts of A to B words (default: 2-200; up to 2000 in strategies that write whole texts)"
    filters.add_argument("--words", type=_range, metavar="A-B", help=help)
    filters.add_argument(
        "--near-duplicates",
        type=between(0, 1, above=True),
        default=0.9,
        metavar="J",
        help="drop texts whose 3-word shingles have this Jaccard similarity with an earlier text's; 1 drops none",
    )
    filters.add_argument(
        "--self-consistent",
        action="store_true",
        help="drop comparisons that --model finds less likely than their opposites, given their source documents",
    )
    help = (
        "drop rows with a name or number that their sources lack, and rows that --model, given their sources, finds no "
        "likelier than with key words exchanged"
    )
    filters.add_argument("--supported", action="store_true", help=help)
    cost = parser.group("cost")
    help = "US dollars per million prompt and completion tokens"
    cost.add_argument("--price", type=_price, default=(0.0, 0.0), metavar="IN,OUT", help=f"{help} (default: 0,0)")
    help = "spending limit in US dollars, earlier runs included"
    cost.add_argument("--max-cost", type=amount_or_0, metavar="USD", help=help)
    cost.add_argument("--dry-run", action="store_true", help="estimate requests, tokens and cost; ask for nothing")
    help = "folder for replies/, rows.jsonl and report.json; the same command resumes from stored replies"
    parser.group(OUTPUT).add_argument("--out", type=Path, required=True, metavar="DIR", help=help)
    add_output_options(parser)
    add_executor_options(parser)


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected A-B, got {text!r}")
    return int(first), int(last)


def _price(text: str) -> tuple[float, float]:
    try:
        prompt_usd, completion_usd = text.split(",")
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected IN,OUT in dollars a million tokens, got {text!r}") from error
    return amount_or_0(prompt_usd), amount_or_0(completion_usd)
