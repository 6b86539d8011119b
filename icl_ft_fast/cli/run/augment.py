"""The work of `icl-ft-fast augment`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from icl_ft_fast.augmentation import steps, support
from icl_ft_fast.augmentation.batches import augment_by_rule, prompting_of, prompts, stop_of
from icl_ft_fast.augmentation.generators import Endpoint, LocalGenerator, Recorded, TextGenerator
from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.run import AugmentationRun, Estimate, Price, Replying, ReplyingElsewhere
from icl_ft_fast.augmentation.store import recorded_date
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategy import Augmented, AugmentError
from icl_ft_fast.cli.options import (
    UsageError,
    alone,
    arguments_digest,
    executor_of,
    load_model,
    loading,
)
from icl_ft_fast.cli.run.task import task_of_seed
from icl_ft_fast.engine.generate import Sampling
from icl_ft_fast.engine.prompting import chosen_template, icl_context
from icl_ft_fast.runtime.executors import Executor, InProcess, Ray
from icl_ft_fast.runtime.printable import duration, printable
from icl_ft_fast.tasks.check import check
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.generated import deny
from icl_ft_fast.tasks.task import Document, Task


def run_augment(options: argparse.Namespace) -> None:
    """`icl-ft-fast augment`."""
    if options.chat:
        options.template = "chat"
    make_task, preset = task_of_seed(options)
    options.strategy = options.strategy or preset.study.get("strategy", "local")
    by_rule = STRATEGIES[options.strategy].infer is not None
    if options.prompt_template is not None:  # read before the model is loaded
        Prompting.of(options.strategy, template=options.prompt_template)
    if options.dry_run and by_rule:
        raise UsageError(f"--dry-run: {options.strategy} needs no model; it takes no time and no money")
    for name in ("self_consistent", "supported"):
        if getattr(options, name) and (by_rule or options.endpoint or options.recorded):
            raise UsageError(f"--{name.replace('_', '-')}: needs a strategy of a --model that is loaded here")
    if options.template_date and (by_rule or options.endpoint or options.recorded or options.template == "base"):
        raise UsageError("--template-date: needs chat prompts for a --model that is loaded here")
    executor = executor_of(options)
    if not isinstance(executor, InProcess) and (
        by_rule or options.endpoint or options.recorded or options.limit or options.max_cost
    ):
        raise UsageError(
            "--executor: workers load --model here for all replies: no --endpoint, --recorded, --limit, --max-cost"
        )
    task = make_task(options.seed)
    if options.dry_run:
        print(_described(_run(options, task, _generator(options)).estimate(Price(*options.price), options.limit)))
        return
    has_report = (options.out / "report.json").exists()  # it is written first, and says of which arguments
    names = ["report.json"] if has_report else ["report.json", "rows.jsonl"]
    with alone(options, *names) if executor.rank == 0 else nullcontext():
        _write(options, task, executor)


def _write(options: argparse.Namespace, task: Task, executor: Executor) -> None:
    model, strategy = None, STRATEGIES[options.strategy]
    report: dict[str, Any] = {"strategy": options.strategy, "documents": len(task.documents)}
    if strategy.infer is not None:
        made = augment_by_rule(task.documents, options.strategy)
    else:
        generator = _generator(options)
        model = generator.model if isinstance(generator, LocalGenerator) else None
        run = _run(options, task, generator)
        strategy = run.prompting.strategy
        if isinstance(executor, InProcess):
            run.collect(
                price=Price(*options.price), limit=options.limit, max_usd=options.max_cost, progress=not options.quiet
            )
        else:
            fingerprint = model.fingerprint() if model else ""
            date = generator.date if isinstance(generator, LocalGenerator) else None
            how, kwargs = (run.prompting, run.sampling), options.chat_template_kwargs
            elsewhere = ReplyingElsewhere(
                *how, options.model, loading(options), fingerprint, generator.is_chat, kwargs, date
            )
            here = partial(Replying, generator, *how)
            if not run.collect_by(executor, elsewhere if isinstance(executor, Ray) else here):
                return
        if isinstance(generator, Recorded):
            _tell_unused(generator.unused({prompt.id for prompt, _ in run.known()}))
        made = run.read()
        report |= {"template_date": run.identity["template_date"]} if "template_date" in run.identity else {}
    words = options.words or strategy.words
    filtered = steps.filtered(made, words, options.near_duplicates)
    if options.self_consistent and model is not None:
        by_id = {document.id: document for document in task.documents}
        kept, report["asked_for_consistency"] = steps.self_consistent(
            model, filtered.rows, lambda row: icl_context([by_id[name] for name in row.origin["source_ids"]]), deny
        )
        inconsistent = {"inconsistent": len(filtered.rows) - len(kept)}
        filtered = replace(filtered, rows=tuple(kept), dropped=filtered.dropped | inconsistent)
    if options.supported and model is not None:
        kept, failed = support.supported(model, filtered.rows, task.documents)
        filtered = replace(filtered, rows=tuple(kept), dropped=filtered.dropped | failed)
    _report(options, task, filtered, report)


def _tell_unused(places: list[str]) -> None:
    if places:
        print(
            f"replies of {len(places)} source_ids belong to no prompt and were not used: {printable(places[0])} first"
        )


def _report(options: argparse.Namespace, task: Task, made: Augmented, report: dict[str, Any]) -> None:
    """Write report.json and rows.jsonl, and print the counts."""
    contained = check((Document(row.source_id, row.text) for row in made.rows), task.questions).leaked
    report |= {"rows": len(made.rows), "dropped": made.dropped}
    if made.prompts:
        report |= {"prompts": made.prompts, "parsed": made.parsed, "productive": made.productive}
    report["questions_contained"] = {split: len(ids) for split, ids in contained.items()}
    write_jsonl(options.out / "report.json", [report | {"arguments": arguments_digest(options)}])
    write_jsonl(
        options.out / "rows.jsonl",
        (
            {"id": f"{row.source_id}+{number}", "text": row.text, "kind": row.kind, **row.origin}
            for number, row in enumerate(made.rows)
        ),
    )
    if made.prompts:
        print(f"{made.parsed} of {made.prompts} replies are in the form asked for, {made.productive} gave a row")
    counts = ", ".join(f"{count} {step.replace('_', ' ')}" for step, count in made.dropped.items())
    print(f"{len(made.rows)} rows of {len(task.documents)} documents written to {options.out}; dropped: {counts}")
    if date := report.get("template_date"):
        print(f"The chat template wrote the date {date}; --template-date sets it.")
    if 2 * made.productive < made.prompts:
        print(
            f"icl-ft-fast augment: warning: only {made.productive} of {made.prompts} prompts gave a row; look at "
            "replies/ and try --template, --prompt-template or another model",
            file=sys.stderr,
        )
    if made.prompts and not made.rows:
        raise AugmentError(f"{options.out}: no row of {made.prompts} prompts; report.json counts what was dropped")
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
        return Endpoint(
            options.endpoint,
            options.model,
            options.template == "chat",
            options.concurrency,
            template_options=options.chat_template_kwargs,
            tell=lambda note: print(printable(note)),
        )
    model = load_model(options)
    return LocalGenerator(
        model,
        chosen_template(model, options.template) == "chat",
        template_options=options.chat_template_kwargs,
        template_date=options.template_date or recorded_date(options.out / "replies"),
    )


def _run(options: argparse.Namespace, task: Task, generator: TextGenerator) -> AugmentationRun:
    """The prompts that the options ask for; in the global strategy, the documents that fit."""
    prompting = prompting_of(options.strategy, generator, options.prompt_template)
    strategy = prompting.strategy
    temperature = strategy.temperature if options.temperature is None else options.temperature
    sampling = Sampling(
        options.max_new_tokens or strategy.max_new_tokens,
        temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if options.samples > 1 and not temperature:
        raise UsageError("--samples: greedy replies are all alike; give --temperature")
    sampling = replace(sampling, stop=stop_of(prompting, generator))
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
    seconds = "unknown until some replies are stored" if estimate.seconds is None else duration(estimate.seconds)
    return (
        f"{estimate.replies:,} replies to generate, {estimate.stored:,} stored; at most {estimate.prompt_tokens:,} "
        f"prompt tokens and {estimate.completion_tokens:,} completion tokens; at most "
        f"${estimate.usd:,.4f}; time: {seconds}"
    )
