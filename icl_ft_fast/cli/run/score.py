"""The work of `icl-ft-fast score`."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.markup import escape
from rich.table import Table

from icl_ft_fast.cli.options import (
    Terminal,
    UsageError,
    check_new,
    executor_of,
    load_model,
    loading,
    open_store,
    show_progress,
)
from icl_ft_fast.cli.run.context import named_context
from icl_ft_fast.engine.contexts import load_context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.score import Score, score
from icl_ft_fast.engine.shards import ShardedRun
from icl_ft_fast.engine.slots import text_of
from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.runtime.executors import InProcess
from icl_ft_fast.study.models import ModelGap, compare_scores
from icl_ft_fast.tasks.task import read_documents, read_questions


def run_score(options: argparse.Namespace) -> None:
    """`icl-ft-fast score`."""
    if options.context is not None and (options.documents is not None or options.store is None):
        raise UsageError("--context: needs --store, where it is, and takes the place of --documents")
    if len(options.model) == 1:
        _scored(argparse.Namespace(**vars(options) | {"model": options.model[0]}))
    else:
        _compare_models(options)


def _compare_models(options: argparse.Namespace) -> None:
    """Each model in turn on the same questions, then all of them against the first."""
    if not isinstance(executor_of(options), InProcess):
        raise UsageError("--model: several are compared in one process; leave --executor out")
    if len(set(options.model)) < len(options.model):
        raise UsageError("--model: a model is given twice")
    questions, scores = read_questions(options.questions), list[list[Score]]()
    outs = [options.out, *(options.out.with_name(f"{options.out.name}.{i}") for i in range(2, len(options.model) + 1))]
    for out in outs:
        check_new(out, options.overwrite or out.with_name(out.name + ".shards").is_dir())
    for model, out in zip(options.model, outs, strict=True):
        one = argparse.Namespace(**vars(options) | {"model": model, "out": out, "json": False})
        scores.append(_scored(one, is_told=not options.json))
    found = [compare_scores(questions, scores[0], other) for other in scores]
    if options.json:
        rows = zip(options.model, outs, found, strict=True)
        print(json.dumps([{"model": str(name), "out": str(out)} | asdict(gap) for name, out, gap in rows]))
        return
    Terminal().print(_table([str(name) for name in options.model], found))


def _table(names: Sequence[str], found: Sequence[ModelGap]) -> Table:
    caption = (
        "Against the first model, on the same questions. gap: accuracy minus the first's, with its 95% interval over "
        "topics, and p of the mid-p sign-flip test. changed: predicted choices that are others. |logp|: mean and "
        "largest difference of a choice's log-likelihood, nats."
    )
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    for column in ("accuracy\n95%", "gap, p\n95%", "gained\nlost", "changed", "|logp|\nmost"):
        table.add_column(column, justify="right")
    for i, (name, gap) in enumerate(zip(names, found, strict=True)):
        accuracy = gaps = "-"
        if gap.known:
            accuracy = f"{gap.correct / gap.known:.3f}\n{gap.low:.2f}-{gap.high:.2f}"
            gaps = "-" if i == 0 else f"{gap.gap:+.3f} {gap.p:.3f}\n{gap.gap_low:+.2f} to {gap.gap_high:+.2f}"
        flips = ("-", "-") if i == 0 else (f"+{gap.gained}\n-{gap.lost}", f"{gap.changed}")
        distance = "-" if i == 0 else f"{gap.mean_logp_distance:.2g}\n{gap.most_logp_distance:.2g}"
        table.add_row(escape(name), accuracy, gaps, *flips, distance)
    return table


def _scored(options: argparse.Namespace, *, is_told: bool = True) -> list[Score]:
    """Score with one model and write what it says; nothing in processes of other rank than 0."""
    parts = options.out.with_name(options.out.name + ".shards")
    check_new(options.out, options.overwrite or parts.is_dir())  # a run that was killed at its very end
    questions = read_questions(options.questions)
    documents = read_documents(options.documents) if options.documents else []
    executor, began = executor_of(options), time.perf_counter()
    model, ledger = load_model(options), Ledger()
    context = prompt_context(model, documents) if options.context is None else _saved_text(options, model)
    run = ShardedRun(executor, parts, options.model, loading(options), shard_tokens=options.shard_tokens)
    with run:
        scores = score(
            model,
            questions,
            context=context,
            chunk_tokens=options.chunk_tokens,
            ledger=ledger,
            progress=show_progress(options),
            store=open_store(options, model),
            sharded=run,
        )
        if executor.rank:
            return []
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in scores).encode()
        if not options.out.is_file() or options.out.read_bytes() != lines:
            check_new(options.out, options.overwrite)
            with replacing(options.out) as path:
                path.write_bytes(lines)
        shutil.rmtree(parts)
    if is_told:
        _tell(options, scores, ledger, time.perf_counter() - began)
    return scores


def _saved_text(options: argparse.Namespace, model: Model) -> str:
    """The text that stands for a saved context, and a space."""
    saved = named_context(options.store, options.context, "--context")
    return f"{text_of(model, load_context(saved.path, model).token)} "


def _tell(options: argparse.Namespace, scores: list[Score], ledger: Ledger, seconds: float) -> None:
    known = sum(score.answer is not None for score in scores)
    correct = sum(score.is_correct is True for score in scores)
    if options.json:
        known_correct = {"known": known, "correct": correct}
        print(json.dumps({"questions": len(scores), **known_correct, "out": str(options.out), **ledger.as_dict()}))
        return
    taken = ledger.phases["prefill"].cached_tokens if "prefill" in ledger.phases else 0
    accuracy = f", {correct} of {known} correct" if known else ""
    print(
        f"{len(scores)} questions in {seconds:.1f} s{accuracy}: "
        f"{ledger.request_tokens:,} tokens requested, {ledger.forwarded_tokens:,} computed "
        f"(1 in {ledger.request_tokens / max(1, ledger.forwarded_tokens):.0f}), "
        f"{f'{taken:,} read from {options.store}, ' if options.store else ''}"
        f"{ledger.head_tokens:,} through the output head. Written to {options.out}"
    )
