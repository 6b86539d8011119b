"""The work of `icl-ft-fast score`."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from functools import partial

from icl_ft_fast.cli.options import (
    check_new,
    executor_of,
    load_model,
    loading,
    show_progress,
)
from icl_ft_fast.engine import shards
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.engine.score import Score, encode_questions, score_of
from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.runtime.executors import Ray, run_journaled
from icl_ft_fast.tasks.task import read_documents, read_questions


def run_score(options: argparse.Namespace) -> None:
    """`icl-ft-fast score`."""
    parts = options.out.with_name(options.out.name + ".shards")
    check_new(options.out, options.overwrite or any(parts.glob("*.jsonl")))  # a run that was killed at its very end
    questions = read_questions(options.questions)
    context = icl_context(read_documents(options.documents)) if options.documents else ""
    executor, began = executor_of(options), time.perf_counter()
    model, ledger = load_model(options), Ledger()
    encoded, shared = encode_questions(model, questions, context, ledger)
    requests, work, how = [request for its in encoded for request in its], work_of(model), loading(options)
    cuts = shards.cut(requests, work, shard_tokens=options.shard_tokens, stem_tokens=len(shared))
    identity = {"model": model.fingerprint(), "chunk_tokens": options.chunk_tokens, "loading": repr(how)}
    jobs = shards.jobs_of(requests, cuts, work, identity)
    elsewhere = shards.ScorerElsewhere(
        options.model,
        how,
        identity["model"],
        options.chunk_tokens,
        options.store if shared else None,
        int(options.store_limit * 1e9),
    )
    start = elsewhere if isinstance(executor, Ray) else partial(elsewhere.of, model)
    progress = "scoring" if show_progress(options) else ""
    with run_journaled(executor, start, jobs, parts, progress=progress) as results:
        if results is None:
            return
        for result in results:
            ledger.include(result["ledger"])
        found = iter(shards.in_order(cuts, results))
        scores = [score_of(q, its, [next(found) for _ in its]) for q, its in zip(questions, encoded, strict=True)]
        lines = "".join(json.dumps(asdict(score)) + "\n" for score in scores).encode()
        if not options.out.is_file() or options.out.read_bytes() != lines:
            check_new(options.out, options.overwrite)
            with replacing(options.out) as path:
                path.write_bytes(lines)
        shutil.rmtree(parts)
    _tell(options, scores, ledger, time.perf_counter() - began)


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
        f"{ledger.request_tokens:,} request tokens, "
        f"{ledger.forwarded_tokens:,} rows forwarded "
        f"(1 in {ledger.request_tokens / max(1, ledger.forwarded_tokens):.0f}), "
        f"{f'{taken:,} taken from {options.store}, ' if options.store else ''}"
        f"{ledger.head_tokens:,} through the head. Written to {options.out}"
    )
