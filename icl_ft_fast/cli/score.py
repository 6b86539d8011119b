"""`icl-ft-fast score`: log-likelihoods of multiple-choice questions over documents."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

from icl_ft_fast.cli.options import (
    Commands,
    add_json_option,
    add_memory_options,
    add_model_options,
    add_output_options,
    check_new,
    command,
    load_model,
    positive,
    show_progress,
)
from icl_ft_fast.contexts import ContextStore
from icl_ft_fast.cost import Ledger
from icl_ft_fast.evaluate import icl_context
from icl_ft_fast.model import CHUNK_ROWS
from icl_ft_fast.score import iter_scores
from icl_ft_fast.tasks.task import read_documents, read_questions


def add(commands: Commands) -> None:
    """Add the command."""
    scoring = command(
        commands, "score", _score, "log-likelihoods of multiple-choice questions over documents",
        "icl-ft-fast score --model DIR --documents documents.jsonl --questions questions.jsonl --out scores.jsonl",
    )  # fmt: skip
    add_model_options(scoring)
    scoring.add_argument(
        "--questions", type=Path, required=True, help="JSON lines with id, prompt, choices, answer, split"
    )
    scoring.add_argument("--documents", type=Path, help="JSON lines with id, text: all go before every prompt")
    scoring.add_argument(
        "--chunk-rows", type=positive, default=CHUNK_ROWS, help="rows a forward (default: %(default)s)"
    )
    scoring.add_argument(
        "--out", type=Path, required=True, help="JSON lines, one a question, written as they are ready"
    )
    scoring.add_argument(
        "--store", type=Path, metavar="DIR", help="folder of saved contexts to take the documents' from"
    )
    scoring.add_argument(
        "--store-limit", type=float, default=20, metavar="GB", help="of all contexts there (default: %(default)s)"
    )
    add_json_option(scoring)
    add_memory_options(scoring)
    add_output_options(scoring)


def _score(options: argparse.Namespace) -> None:
    check_new(options.out, options.overwrite)
    questions = read_questions(options.questions)
    context = icl_context(read_documents(options.documents)) if options.documents else ""
    model = load_model(options)
    ledger = Ledger()
    store = None if options.store is None else ContextStore(options.store, model, int(options.store_limit * 1e9))
    scores = iter_scores(
        model, questions, context=context, chunk_rows=options.chunk_rows, ledger=ledger, store=store,
        progress=show_progress(options),
    )  # fmt: skip
    correct = known = 0
    with ledger.phase("score"):
        first = next(scores)  # requests that cannot be scored are refused here, before the output is touched
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", encoding="utf-8") as file:
            for result in itertools.chain([first], scores):
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                known += result.answer is not None
                correct += bool(result.is_correct)
    seconds = sum(ledger.seconds.values())
    if options.json:
        known_correct = {"known": known, "correct": correct}
        print(json.dumps({"questions": len(questions), **known_correct, "out": str(options.out), **ledger.as_dict()}))
        return
    accuracy = f", {correct} of {known} correct" if known else ""
    print(
        f"{len(questions)} questions in {seconds:.1f} s{accuracy}: "
        f"{ledger.request_tokens:,} request tokens, "
        f"{ledger.forwarded_rows:,} rows forwarded (1 in {ledger.request_tokens / ledger.forwarded_rows:.0f}), "
        f"{f'{ledger.reused_rows:,} taken from {options.store}, ' if store else ''}"
        f"{ledger.head_rows:,} through the head. Written to {options.out}"
    )
