"""The work of `icl-ft-fast score`."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict

from icl_ft_fast.cli.options import (
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
from icl_ft_fast.tasks.task import read_documents, read_questions


def run_score(options: argparse.Namespace) -> None:
    """`icl-ft-fast score`."""
    if options.context is not None and (options.documents is not None or options.store is None):
        raise UsageError("--context: needs --store, where it is, and takes the place of --documents")
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
            return
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in scores).encode()
        if not options.out.is_file() or options.out.read_bytes() != lines:
            check_new(options.out, options.overwrite)
            with replacing(options.out) as path:
                path.write_bytes(lines)
        shutil.rmtree(parts)
    _tell(options, scores, ledger, time.perf_counter() - began)


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
