"""The study: base, ICL, fine-tuning and augmented fine-tuning on one task, over seeds, with what each costs.

Every arm ends in the same questions through the same scorer; they differ in what is in the context and what was trained
on. Costs are wall seconds on this machine and rows forwarded, measured in the run itself.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from icl_ft_fast import augment, encoding, evaluate, statistics
from icl_ft_fast.cost import Ledger
from icl_ft_fast.finetune import FinetuneSettings, finetune
from icl_ft_fast.model import Model
from icl_ft_fast.score import loglikelihood, score
from icl_ft_fast.tasks.task import Document, Question, Task

DEFAULT_ARMS = ("base", "icl", "ft", "augmented-ft", "rules-ft")
ARMS = (*DEFAULT_ARMS, "distilled")
SCHEMA_VERSION = 2  # 2: answers, normalization, template, splitting
UNCACHED_SAMPLE = 3  # questions scored one by one to measure what a query costs when nothing is reused


@dataclass(frozen=True)
class Settings:
    """What to compare and how.

    Attributes:
        arms: some of ARMS.
        seeds: one run of every arm each; a generated task is generated anew for each seed.
        icl_per_topic: documents of each topic in the context; None for all.
        icl_subsample: of those, one in this many.
        icl_tokens: of those, the ones that fit so many tokens; None if all must.
        normalization: of the choices' log-likelihoods, see evaluate.NORMALIZATIONS.
        template: of the prompt, see evaluate.prompt_context.
        finetune: steps, batch size, learning rate.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    icl_per_topic: int | None = None
    icl_subsample: int = 1
    icl_tokens: int | None = None
    normalization: str = "sum"
    template: str = "base"
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)


@dataclass(frozen=True)
class Run:
    """One arm under one seed.

    Attributes:
        arm: one of ARMS.
        seed: the seed.
        accuracy: correct and total answers by split.
        answers: each question's choice probabilities, for those whose answer is known.
        setup_s: seconds spent once before the first query: augmentation, training, or the context's prefill.
        query_s: seconds a query costs after that, all questions scored together.
        query_tokens: tokens of one query's requests, as a scorer without reuse forwards them.
        query_rows: rows actually forwarded a query, without the context's prefill.
        uncached_query_s: seconds a query costs when its context is forwarded for it alone.
        counts: the ledger of the whole run, phases in seconds.
        notes: augmentation counts and the like.
    """

    arm: str
    seed: int
    accuracy: dict[str, evaluate.Accuracy]
    answers: tuple[evaluate.Answer, ...]
    setup_s: float
    query_s: float
    query_tokens: float
    query_rows: float
    uncached_query_s: float
    counts: dict[str, Any]
    notes: dict[str, Any]


def compare(
    model: Model,
    task_of_seed: Callable[[int], Task],
    settings: Settings | None = None,
    *,
    progress: bool = False,
    on_run: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Run every arm under every seed.

    Args:
        model: from load(), float32 if an arm trains; left as it is.
        task_of_seed: the task for a seed (the same one each time, if it was read from a folder).
        settings: see Settings.
        progress: show bars.
        on_run: called with each run as it ends.

    Returns:
        The runs, seeds outermost.

    Raises:
        ProtocolError: rules-ft on documents that it has no rule for.
        ValueError: an unknown arm, or whatever scoring, generating or training raises.
    """
    settings = settings or Settings()
    unknown = [arm for arm in settings.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
    runs = []
    for seed in settings.seeds:
        task = task_of_seed(seed)
        if "rules-ft" in settings.arms and not augment.augment_rules(task.documents).rows:
            raise evaluate.ProtocolError("arms: rules-ft: no document states a comparison, all that the rules know")
        for arm in settings.arms:
            runs.append(_run(model, task, arm, seed, settings, progress))
            if on_run is not None:
                on_run(runs[-1])
    return runs


def _run(model: Model, task: Task, arm: str, seed: int, settings: Settings, progress: bool) -> Run:
    ledger = Ledger()
    documents: list[Document] = []
    context = evaluate.prompt_context(model, documents, settings.template)
    notes: dict[str, Any] = {}
    if arm == "icl":
        documents, context, left_out = _icl_context(model, task, seed, settings)
        if settings.icl_tokens is not None:
            notes["left_out_documents"] = left_out
        notes["context_documents"] = len(documents)
    elif arm != "base":
        texts = [document.text for document in task.documents]
        if arm != "ft":
            with ledger.phase("augment"):
                if arm == "rules-ft":
                    augmented = augment.augment_rules(task.documents)
                else:
                    augmented = augment.augment_local(model, task.documents, ledger=ledger, progress=progress)
            texts += [row.text for row in augmented.rows]
            notes["augmentations"] = len(augmented.rows)
            notes |= {f"dropped_{step}": count for step, count in augmented.dropped.items()}
        teacher_context = _icl_context(model, task, seed, settings)[1] if arm == "distilled" else None
        with ledger.phase("train"):
            tuned = finetune(
                model, texts, settings.finetune, seed=seed, teacher_context=teacher_context, ledger=ledger,
                progress=progress,
            )  # fmt: skip
        notes["final_loss"] = tuned.losses[-1]
        model = tuned.model
    uncached_s = _uncached_query_s(model, task.questions, context)
    queries = Ledger()
    with queries.phase("query"):
        answers = evaluate.answers(
            model, task.questions, context=context, normalization=settings.normalization, ledger=queries,
            progress=progress,
        )  # fmt: skip
    setup_s = math.fsum(ledger.seconds.values())
    query_s: float = queries.seconds["query"]
    rows = queries.forwarded_rows
    if documents:
        prefill = Ledger()
        with prefill.phase("prefill"):
            context_ids = encoding.encode(model.tokenizer, [context.rstrip()])[0]
            loglikelihood(model, [(context_ids, context_ids[:1])], ledger=prefill)
        setup_s = prefill.seconds["prefill"]
        query_s, rows = max(0.0, query_s - setup_s), rows - prefill.forwarded_rows
        ledger.seconds["prefill"] = setup_s
    ledger.seconds["query"] = query_s
    for name in ("request_tokens", "forwarded_rows", "head_rows", "scored_tokens"):
        setattr(ledger, name, getattr(ledger, name) + getattr(queries, name))
    n = len(task.questions)
    return Run(
        arm=arm, seed=seed, accuracy=evaluate.accuracies(answers), answers=tuple(answers),
        setup_s=setup_s, query_s=query_s / n, query_tokens=queries.request_tokens / n, query_rows=rows / n,
        uncached_query_s=uncached_s,
        counts=ledger.as_dict(), notes=notes,
    )  # fmt: skip


def _icl_context(model: Model, task: Task, seed: int, settings: Settings) -> tuple[list[Document], str, int]:
    """The documents that ICL reads, what stands before each prompt then, and how many documents did not fit."""
    documents = evaluate.select_documents(
        task.documents, seed, per_topic=settings.icl_per_topic, subsample=settings.icl_subsample
    )
    chosen = len(documents)
    if settings.icl_tokens is not None:
        documents = evaluate.fit_documents(model, documents, settings.icl_tokens, settings.template)
    return documents, evaluate.prompt_context(model, documents, settings.template), chosen - len(documents)


def _uncached_query_s(model: Model, questions: Sequence[Question], context: str) -> float:
    """Median seconds of scoring one question alone, its context forwarded for it."""
    seconds = []
    for question in questions[:UNCACHED_SAMPLE]:
        start = time.perf_counter()
        score(model, [question], context=context)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


@dataclass(frozen=True)
class Paired:
    """Two arms on the same questions of a split.

    Attributes:
        first, second: the arms.
        split: the split.
        difference: accuracy of the first less that of the second.
        p: exact two-sided p-value of the sign-flip test over topics, Holm-adjusted for all tests made together.
    """

    first: str
    second: str
    split: str
    difference: float
    p: float


def paired_tests(runs: Sequence[Run]) -> list[Paired]:
    """Every two arms in every split, on the questions and seeds that both have."""
    arms = dict.fromkeys(run.arm for run in runs)
    right: dict[str, dict[tuple[int, str], evaluate.Answer]] = {
        arm: {(run.seed, answer.question_id): answer for run in runs if run.arm == arm for answer in run.answers}
        for arm in arms
    }
    tests = []
    for first, second in itertools.combinations(arms, 2):
        differences: dict[str, dict[str, list[int]]] = {}
        for key in right[first].keys() & right[second].keys():
            a, b = right[first][key], right[second][key]
            topics = differences.setdefault(a.split, {})
            topics.setdefault(a.topic, []).append(a.is_correct - b.is_correct)
        for split in dict.fromkeys(answer.split for answer in right[first].values()):
            if topics := differences.get(split, {}):
                each = [difference for topic in topics.values() for difference in topic]
                p = statistics.sign_flip_test([sum(topic) for topic in topics.values()])
                tests.append(Paired(first, second, split, sum(each) / len(each), p))
    adjusted = statistics.holm([test.p for test in tests])
    return [replace(test, p=p) for test, p in zip(tests, adjusted, strict=True)]


def break_even(setup_s: float, query_s: float, rival_setup_s: float, rival_query_s: float) -> float | None:
    """The number of queries from which on setup + n * query costs less than the rival; 0 if always, None if never.

    What starts cheaper and ends dearer has no such number either.
    """
    if query_s >= rival_query_s:
        return 0.0 if query_s == rival_query_s and setup_s < rival_setup_s else None
    return max(0.0, (setup_s - rival_setup_s) / (rival_query_s - query_s))


def as_json(model: Model, task_name: str, settings: Settings, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything results.json holds."""
    import transformers

    return {
        "schema_version": SCHEMA_VERSION,
        "model": model.name,
        "parameters": model.num_parameters,
        "task": task_name,
        "settings": asdict(settings),
        "machine": {
            "device": str(model.device), "processor": platform.machine(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "runs": [asdict(run) for run in runs],
    }  # fmt: skip


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results.json atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
