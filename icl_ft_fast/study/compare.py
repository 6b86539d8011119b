"""The study: base, ICL, fine-tuning and augmented fine-tuning on one task, over seeds, with what each costs.

Every arm ends in the same questions through the same scorer; they differ in what is in the context and what was trained
on. What was paid once is in each arm's ledger; what a query costs is measured apart, by sweep.py.

What is finished is kept under a digest of all that it depends on, with the figures that were measured as it was made:
a study that was killed and started again reads them back, and ends with the results of one that was not.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from icl_ft_fast import augmentation
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.machine import Ceilings, fingerprint
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import ProtocolError, prompt_context
from icl_ft_fast.finetuning import FinetuneSettings, RunOptions, finetune
from icl_ft_fast.runtime.durable import ResultJournal, digest, replacing
from icl_ft_fast.study import evaluate, statistics, sweep
from icl_ft_fast.tasks.task import Document, Question, Task

DEFAULT_ARMS = ("base", "icl", "ft", "augmented-ft")
ARMS = (*DEFAULT_ARMS, "rules-ft", "distilled")
WRITTEN = ("augmented-ft", "distilled")  # arms that train on what the model writes
# 2: answers, normalization, template, splitting; 3: phases, sweep, questions, losses, samples, fingerprint
SCHEMA_VERSION = 3
ANSWERING = ("tokenise", "context", "prefill", "query")  # phases of asking; all others are paid once, before
SAMPLES = 40  # augmentations kept for the report
CHECKPOINT_S = 600.0


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
        template: of the prompt, see prompt_context.
        strategy, samples: of augmented-ft, see augmentation.prompt_batches().
        finetune: steps, batch size, learning rate.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    icl_per_topic: int | None = None
    icl_subsample: int = 1
    icl_tokens: int | None = None
    normalization: str = "sum"
    template: str = "base"
    strategy: str = "local"
    samples: int = 1
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)


@dataclass(frozen=True)
class Sample:
    """An augmentation and the document it was written from."""

    source: str
    kind: str
    text: str


@dataclass(frozen=True)
class Run:
    """One arm under one seed.

    Attributes:
        arm: one of ARMS.
        seed: the seed.
        accuracy: correct and total answers by split.
        answers: each question's choice probabilities, for those whose answer is known.
        setup_s: seconds spent once before the first query: augmentation and training.
        query_s: seconds a query took after that and after the context's prefill, all questions scored together.
        query_tokens: tokens of one query's requests, as a scorer without reuse forwards them.
        query_rows: rows actually forwarded a query, without the context's prefill.
        counts: the ledger of the whole run.
        notes: augmentation counts and the like.
        losses: mean loss per target token (nats) of each training step.
        samples: some augmentations, each with the text it was written from.
        workers: runs that were made at once when this one's figures were measured, itself included; None for as many
            as a cluster had room for.
        questions: what was asked.
    """

    arm: str
    seed: int
    accuracy: dict[str, evaluate.Accuracy]
    answers: tuple[evaluate.Answer, ...]
    setup_s: float
    query_s: float
    query_tokens: float
    query_rows: float
    counts: dict[str, Any]
    notes: dict[str, Any]
    losses: tuple[float, ...] = ()
    samples: tuple[Sample, ...] = ()
    workers: int | None = 1
    questions: tuple[Question, ...] = field(default=(), repr=False)


def compare(
    model: Model,
    task_of_seed: Callable[[int], Task],
    settings: Settings | None = None,
    *,
    kept: ResultJournal | None = None,
    checkpoints: Path | None = None,
    checkpoint_s: float = CHECKPOINT_S,
    store: ContextStore | None = None,
    progress: bool = False,
    on_run: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Run every arm under every seed.

    Args:
        model: from load(), float32 if an arm trains; left as it is.
        task_of_seed: the task for a seed (the same one each time, if it was read from a folder).
        settings: see Settings.
        kept: where finished runs are looked up and put, under all that decides them: weights, the task's content,
            settings, machine and versions.
        checkpoints: a folder for arms that are being fine-tuned, each of which goes on from where it was.
        checkpoint_s: seconds between checkpoints.
        store: where the ICL arm finds what its context was read to, or leaves it.
        progress: show bars.
        on_run: called with each run as it ends.

    Returns:
        The runs, seeds outermost.

    Raises:
        ProtocolError: rules-ft on documents that it has no rule for.
        ValueError: an unknown arm, or whatever scoring, generating or training raises.
    """
    settings, kept, runs = settings or Settings(), kept or ResultJournal(None), []
    at = At(kept, checkpoints, checkpoint_s, store)
    for planned in plan(model, task_of_seed, settings, has_store=store is not None):
        found = kept.once(planned.key, partial(make_run, model, planned, settings, at, progress=progress))
        runs.append(replace(_RUN.validate_python(found), questions=planned.task.questions))
        if checkpoints is not None and (checkpoints / planned.key).exists():
            shutil.rmtree(checkpoints / planned.key)
            if not any(checkpoints.iterdir()):
                checkpoints.rmdir()
        if on_run is not None:
            on_run(runs[-1])
    return runs


def study_key(model: Model, settings: Settings) -> str:
    """A digest of what decides every run: weights, settings but for arms and seeds, the machine and its versions."""
    machine = fingerprint(model.device) | {"device": model.device.type}
    del machine["memory_bytes"]  # machines of one kind differ in it by a little
    return digest("study 2", model.fingerprint(), asdict(replace(settings, arms=(), seeds=())), machine)


_RUN, _SWEEP = TypeAdapter(Run), TypeAdapter(sweep.Sweep)


@dataclass(frozen=True)
class Planned:
    """A run to be made.

    Attributes:
        task: of the seed.
        arm, seed: of the run.
        written_key: a digest of what the model's augmentations depend on, beside how it is asked: the same for a seed's
            arms.
        key: a digest of all that decides the run.
    """

    task: Task
    arm: str
    seed: int
    written_key: str
    key: str

    def parts(self, model: Model, settings: Settings) -> list[augmentation.PromptBatch]:
        """What the model writes for the run; nothing for most arms."""
        if self.arm not in WRITTEN:
            return []
        return augmentation.prompt_batches(
            model,
            self.task.documents,
            settings.strategy,
            samples=settings.samples,
            among=lambda drawn: _icl_documents(self.task, drawn, settings),
            seed=self.seed,
            key=self.written_key,
        )


def plan(
    model: Model, task_of_seed: Callable[[int], Task], settings: Settings, *, has_store: bool = False
) -> Iterator[Planned]:
    """The runs of a study, seeds outermost; arguments and errors are compare()'s."""
    unknown = [arm for arm in settings.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"arms: expected some of {', '.join(ARMS)}, got {unknown[0]!r}")
    identity = study_key(model, settings)
    for seed in settings.seeds:
        task = task_of_seed(seed)
        if "rules-ft" in settings.arms and not augmentation.augment_by_rule(task.documents).rows:
            raise ProtocolError("arms: rules-ft: no document states a comparison, all that the rules know")
        content = digest(identity, asdict(task))
        for arm in settings.arms:
            key = digest(content, arm, seed, arm == "icl" and has_store)
            yield Planned(task, arm, seed, digest(content, seed), key)


@dataclass(frozen=True)
class At:
    """Where a run finds what was done before; its attributes are compare()'s arguments."""

    kept: ResultJournal
    checkpoints: Path | None
    checkpoint_s: float
    store: ContextStore | None = None


def make_run(model: Model, planned: Planned, settings: Settings, at: At, *, progress: bool = False) -> dict[str, Any]:
    """A run's fields but for the questions."""
    task, arm, seed = planned.task, planned.arm, planned.seed
    ledger, store = Ledger(meter=Meter(model.device)), None
    documents: list[Document] = []
    context = prompt_context(model, documents, settings.template)
    notes: dict[str, Any] = {}
    losses: tuple[float, ...] = ()
    samples: list[Sample] = []
    if arm == "icl":
        documents, context, left_out = _icl_context(model, task, seed, settings)
        if settings.icl_tokens is not None:
            notes["left_out_documents"] = left_out
        notes["context_documents"] = len(documents)
        store = _as_begun(model, context, at, planned.key)
    elif arm != "base":
        texts = [document.text for document in task.documents]
        if arm != "ft":
            if arm == "rules-ft":
                with ledger.phase("filter"):
                    augmented = augmentation.augment_by_rule(task.documents)
            else:
                parts = planned.parts(model, settings)
                augmented = augmentation.augment_by_model(
                    model, parts, journal=at.kept, ledger=ledger, progress=progress
                )
            texts += [row.text for row in augmented.rows]
            sources = {document.id: document.text for document in task.documents}
            kept = augmented.rows[:: -(-len(augmented.rows) // SAMPLES) or 1]
            samples = [Sample(sources[row.source_id], row.kind, row.text) for row in kept]
            notes["augmentations"] = len(augmented.rows)
            notes |= {f"dropped_{step}": count for step, count in augmented.dropped.items()}
        teacher_context = _icl_context(model, task, seed, settings)[1] if arm == "distilled" else None
        resumed = at.checkpoints is not None
        tuned = finetune(
            model,
            texts,
            settings.finetune,
            seed=seed,
            teacher_context=teacher_context,
            ledger=ledger,
            options=RunOptions(
                output_dir=at.checkpoints and at.checkpoints / planned.key,
                resume=resumed,
                checkpoint_s=at.checkpoint_s if resumed else None,
                progress=progress,
            ),
        )
        losses, model = tuned.losses, tuned.model
        notes["final_loss"] = losses[-1]
    setup_s = math.fsum(ledger.seconds.values())
    asked = ledger.request_tokens
    answers = evaluate.answers(
        model,
        task.questions,
        context=context,
        normalization=settings.normalization,
        store=store,
        ledger=ledger,
        progress=progress,
    )
    n, query = len(task.questions), ledger.phases["query"]
    run = Run(
        arm=arm,
        seed=seed,
        accuracy=evaluate.accuracies(answers),
        answers=tuple(answers),
        setup_s=setup_s,
        query_s=(query.wall_s + ledger.phases["tokenise"].wall_s) / n,
        query_tokens=(ledger.request_tokens - asked) / n,
        query_rows=query.forwarded_tokens / n,
        counts=ledger.as_dict(),
        notes=notes,
        losses=losses,
        samples=tuple(samples),
    )
    return asdict(run)


def _as_begun(model: Model, context: str, at: At, key: str) -> ContextStore | None:
    """The store, with no more of this context in it than when the run was begun: a kill must not change its cost."""
    if (store := at.store) is None:
        return None
    (token,) = encoding.encode(model.tokenizer, [context.rstrip()])

    def stored_tokens() -> int:
        found = store.find(token)
        return 0 if found is None else len(found.token)

    return store.up_to(at.kept.once(digest(key, "stored tokens"), stored_tokens))


def _icl_documents(task: Task, seed: int, settings: Settings) -> list[Document]:
    """The documents that ICL reads, and that first samples of the global strategy of augmentation show, if they fit."""
    return evaluate.select_documents(
        task.documents, seed, per_topic=settings.icl_per_topic, subsample=settings.icl_subsample
    )


def _icl_context(model: Model, task: Task, seed: int, settings: Settings) -> tuple[list[Document], str, int]:
    """The documents that ICL reads, what stands before each prompt then, and how many documents did not fit."""
    documents = _icl_documents(task, seed, settings)
    chosen = len(documents)
    if settings.icl_tokens is not None:
        documents = evaluate.fit_documents(model, documents, settings.icl_tokens, settings.template)
    return documents, prompt_context(model, documents, settings.template), chosen - len(documents)


def measure(
    model: Model,
    task: Task,
    settings: Settings,
    *,
    seconds: float = 30.0,
    kept: ResultJournal | None = None,
    progress: bool = False,
) -> sweep.Sweep:
    """What queries cost behind none and, with an ICL arm, behind its context and other lengths; see sweep.sweep()."""
    context, lengths = "", ()
    if "icl" in settings.arms:
        (_, context, _), lengths = _icl_context(model, task, settings.seeds[0], settings), sweep.LENGTHS

    def run() -> dict[str, Any]:
        measured = sweep.sweep(model, task.questions, context, lengths=lengths, seconds=seconds, progress=progress)
        return asdict(measured)

    key = digest(study_key(model, settings), [asdict(question) for question in task.questions], context, seconds)
    found: sweep.Sweep = _SWEEP.validate_python((kept or ResultJournal(None)).once(key, run))
    return found


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


def as_json(
    model: Model,
    task_name: str,
    settings: Settings,
    runs: Sequence[Run],
    *,
    costs: sweep.Sweep | None = None,
    load: dict[str, Any] | None = None,
    ceilings: Ceilings | None = None,
    arguments: str = "",
) -> dict[str, Any]:
    """Everything results.json holds; results.py reads it. Of an absolute path it names the last two parts.

    `costs` are those of measure(), `load` is the ledger of loading the model, `arguments` a digest of the command's.
    """
    asked: dict[tuple[Question, ...], list[int]] = {}
    for run in runs:
        seeds = asked.setdefault(run.questions, [])
        seeds += [run.seed] * (run.seed not in seeds)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": _public(model.name),
        "parameters": model.num_parameters,
        "weight_bytes": work_of(model).weight_bytes,
        "task": _public(task_name),
        "settings": asdict(settings),
        "machine": fingerprint(model.device) | {"ceilings": None if ceilings is None else asdict(ceilings)},
        "load": load,
        "arguments": arguments,
        "sweep": asdict(costs or sweep.Sweep()),
        "questions": [
            {"seeds": seeds, "questions": [{"id": q.id, "prompt": q.prompt, "choices": q.choices} for q in questions]}
            for questions, seeds in asked.items()
        ],
        "runs": [asdict(replace(run, questions=())) for run in runs],
    }


def _public(name: str) -> str:
    """A path as others may read it: of an absolute one the last two parts."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write results.json atomically, with a digest of it all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(results | {"checksum": digest(results)}, indent=1) + "\n", encoding="utf-8")
