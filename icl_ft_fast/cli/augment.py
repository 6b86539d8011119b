"""`icl-ft-fast augment`: write what follows from a task's documents, by a model, an endpoint, a file or by rule."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from icl_ft_fast.augmentation import Augmented, augment_by_rule, steps
from icl_ft_fast.augmentation.batches import prompts
from icl_ft_fast.augmentation.generators import Endpoint, LocalGenerator, Recorded, TextGenerator
from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.run import AugmentationRun, Estimate, Price, Replying, ReplyingElsewhere
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.cli.options import (
    OUTPUT,
    Commands,
    UsageError,
    add_executor_options,
    add_model_options,
    add_output_options,
    alone,
    arguments_digest,
    command,
    executor_of,
    load_model,
    loading,
    positive,
)
from icl_ft_fast.cli.task import add_task_options, task_of_seed
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.runtime.executors import Executor, InProcess, Ray
from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.tasks.check import check
from icl_ft_fast.tasks.generated import deny
from icl_ft_fast.tasks.task import Document, Task, write_jsonl


def add(commands: Commands) -> None:
    """Add the command."""
    parser = command(
        commands,
        "augment",
        _augment,
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
    prompts.add_argument("--chat", action="store_true", help="use chat prompts through the model's chat template")
    help = "jinja2 file that replaces the strategy's prompt"
    prompts.add_argument("--prompt-template", type=Path, metavar="FILE", help=help)
    help = "documents in the context of the global strategy, drawn by --seed (default: as many as fit)"
    prompts.add_argument("--global-documents", type=positive, metavar="N", help=help)
    prompts.add_argument("--limit", type=positive, metavar="N", help="ask for at most N replies in this run")
    sampling = parser.group("sampling")
    sampling.add_argument("--samples", type=positive, default=1, metavar="N", help="replies per prompt")
    help = "sampling temperature; 0 is greedy (default: 1 in the global strategy, else 0)"
    sampling.add_argument("--temperature", type=float, help=help)
    sampling.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling: probability mass to sample from")
    help = "tokens per reply (default: the strategy's, 64 to 512)"
    sampling.add_argument("--max-new-tokens", type=positive, metavar="N", help=help)
    sampling.add_argument("--seed", type=int, default=0, help="random seed of the generated task and of sampling")
    filters = parser.group("filters")
    help = "keep texts of A to B words (default: 2-200)"
    filters.add_argument("--words", type=_range, default=(2, 200), metavar="A-B", help=help)
    filters.add_argument(
        "--near-duplicates",
        type=_fraction,
        default=0.9,
        metavar="J",
        help="drop texts whose 3-word shingles have this Jaccard similarity with an earlier text's; 1 drops none",
    )
    filters.add_argument(
        "--self-consistent",
        action="store_true",
        help="drop comparisons that --model finds less likely than their opposites, given their source documents",
    )
    cost = parser.group("cost")
    help = "US dollars per million prompt and completion tokens"
    cost.add_argument("--price", type=_price, default=Price(), metavar="IN,OUT", help=f"{help} (default: 0,0)")
    help = "spending limit in US dollars, earlier runs included"
    cost.add_argument("--max-cost", type=float, metavar="USD", help=help)
    cost.add_argument("--dry-run", action="store_true", help="estimate requests, tokens and cost; ask for nothing")
    help = "folder for replies/, rows.jsonl and report.json; the same command resumes from stored replies"
    parser.group(OUTPUT).add_argument("--out", type=Path, required=True, metavar="DIR", help=help)
    add_output_options(parser)
    add_executor_options(parser)


def _augment(options: argparse.Namespace) -> None:
    make_task, preset = task_of_seed(options)
    options.strategy = options.strategy or preset.study.get("strategy", "local")
    by_rule = STRATEGIES[options.strategy].infer is not None
    if options.dry_run and by_rule:
        raise UsageError(f"--dry-run: {options.strategy} needs no model; it takes no time and no money")
    if options.self_consistent and (by_rule or options.endpoint or options.recorded):
        raise UsageError("--self-consistent: needs a strategy of a --model that is loaded here")
    executor = executor_of(options)
    if not isinstance(executor, InProcess) and (
        by_rule or options.endpoint or options.recorded or options.limit or options.max_cost
    ):
        raise UsageError(
            "--executor: workers load --model here for all replies: no --endpoint, --recorded, --limit, --max-cost"
        )
    task = make_task(options.seed)
    if options.dry_run:
        print(_described(_run(options, task, _generator(options)).estimate(options.price, options.limit)))
        return
    has_report = (options.out / "report.json").exists()  # it is written first, and says of which arguments
    names = ["report.json"] if has_report else ["report.json", "rows.jsonl"]
    with alone(options, *names) if executor.rank == 0 else nullcontext():
        _write(options, task, executor)


def _write(options: argparse.Namespace, task: Task, executor: Executor) -> None:
    model = None
    if STRATEGIES[options.strategy].infer is not None:
        made = augment_by_rule(task.documents, options.strategy)
    else:
        generator = _generator(options)
        model = generator.model if isinstance(generator, LocalGenerator) else None
        run = _run(options, task, generator)
        if isinstance(executor, InProcess):
            run.collect(price=options.price, limit=options.limit, max_usd=options.max_cost, progress=not options.quiet)
        else:
            fingerprint = model.fingerprint() if model else ""
            elsewhere = ReplyingElsewhere(options.model, loading(options), fingerprint, options.chat)
            if not run.collect_by(executor, elsewhere if isinstance(executor, Ray) else partial(Replying, generator)):
                return
        made = run.read()
    filtered = steps.filtered(made, options.words, options.near_duplicates)
    report: dict[str, Any] = {"strategy": options.strategy, "documents": len(task.documents)}
    if options.self_consistent and model is not None:
        by_id = {document.id: document for document in task.documents}
        kept, report["asked_for_consistency"] = steps.self_consistent(
            model, filtered.rows, lambda row: icl_context([by_id[name] for name in row.origin["source_ids"]]), deny
        )
        inconsistent = {"inconsistent": len(filtered.rows) - len(kept)}
        filtered = Augmented(tuple(kept), filtered.dropped | inconsistent)
    _report(options, task, filtered, report)


def _report(options: argparse.Namespace, task: Task, made: Augmented, report: dict[str, Any]) -> None:
    """Write report.json and rows.jsonl, and print the counts."""
    contained = check((Document(row.source_id, row.text) for row in made.rows), task.questions).leaked
    report |= {"rows": len(made.rows), "dropped": made.dropped}
    report["questions_contained"] = {split: len(ids) for split, ids in contained.items()}
    write_jsonl(options.out / "report.json", [report | {"arguments": arguments_digest(options)}])
    write_jsonl(
        options.out / "rows.jsonl",
        (
            {"id": f"{row.source_id}+{number}", "text": row.text, "kind": row.kind, **row.origin}
            for number, row in enumerate(made.rows)
        ),
    )
    counts = ", ".join(f"{count} {step.replace('_', ' ')}" for step, count in made.dropped.items())
    print(f"{len(made.rows)} rows of {len(task.documents)} documents written to {options.out}; dropped: {counts}")
    for split, ids in contained.items():
        print(f"answers found in the rows, split {printable(split)}: {len(ids)} of the questions")


def _generator(options: argparse.Namespace) -> TextGenerator:
    """The generator that the options name."""
    if options.recorded is not None:
        if options.model or options.endpoint:
            raise UsageError("--recorded: replies come from the file; leave --model and --endpoint out")
        return Recorded(options.recorded)
    if options.model is None:
        raise UsageError(f"--model: needed for the strategy {options.strategy}, or --recorded")
    if options.endpoint is not None:
        return Endpoint(options.endpoint, options.model, options.chat, options.concurrency)
    return LocalGenerator(load_model(options), options.chat)


def _run(options: argparse.Namespace, task: Task, generator: TextGenerator) -> AugmentationRun:
    """The prompts that the options ask for; in the global strategy, the documents that fit."""
    strategy = STRATEGIES[options.strategy]
    temperature = strategy.temperature if options.temperature is None else options.temperature
    sampling = Sampling(
        options.max_new_tokens or strategy.max_new_tokens,
        temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=() if options.chat else ("\n\n",),
    )
    if options.samples > 1 and not temperature:
        raise UsageError("--samples: greedy replies are all alike; give --temperature")
    prompting = Prompting.of(options.strategy, is_chat=options.chat, template=options.prompt_template)
    made, shown = prompts(
        prompting,
        task.documents,
        generator,
        sampling.max_new_tokens,
        samples=options.samples,
        most=options.global_documents,
        seed=options.seed,
    )
    if strategy.shows_documents:
        print(f"{len(shown)} of {len(task.documents)} documents in context")
    return AugmentationRun(prompting, made, generator, sampling, options.out / "replies")


def _described(estimate: Estimate) -> str:
    seconds = "unknown until some replies are stored" if estimate.seconds is None else f"{estimate.seconds:,.0f} s"
    return (
        f"{estimate.replies:,} replies to generate, {estimate.stored:,} stored; at most {estimate.prompt_tokens:,} "
        f"prompt tokens and {estimate.completion_tokens:,} completion tokens; at most "
        f"${estimate.usd:,.4f}; time: {seconds}"
    )


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"expected A-B, got {text!r}")
    return int(first), int(last)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, got {text!r}")
    return value


def _price(text: str) -> Price:
    try:
        prompt_usd, completion_usd = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected IN,OUT in dollars a million tokens, got {text!r}") from error
    if not (prompt_usd >= 0 and completion_usd >= 0):
        raise argparse.ArgumentTypeError(f"expected dollars of 0 or more, got {text!r}")
    return Price(prompt_usd, completion_usd)
