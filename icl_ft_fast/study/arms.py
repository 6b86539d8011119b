"""The ways of answering that a study compares: each an Arm, which knows how it trains, asks and costs.

An arm is one object in ARMS; nothing else in the package compares arms by name. It is made of two independent parts:
how its weights are made (Training, or none) and what stands before a question (Asking). To add one, write the part that
is new and add the Arm to ARMS and its name to settings.ARM_NAMES; docs/add-an-arm.md goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icl_ft_fast.augmentation.batches import PromptBatch, augment_by_model, augment_by_rule, prompt_batches
from icl_ft_fast.augmentation.strategy import Augmented
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import ProtocolError, prompt_context
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import RunOptions
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.records import Sample
from icl_ft_fast.study.settings import ARM_NAMES, StudySettings
from icl_ft_fast.tasks.task import Document, Task

SAMPLES = 40  # augmentations in a run's record, for the report


@dataclass(frozen=True)
class Workspace:
    """Where a run finds what was done before.

    Attributes:
        journal: results by what decides them.
        checkpoints: a folder for arms that are being trained; None to start over after a kill.
        checkpoint_s: seconds between checkpoints.
        store: contexts that were read before.
    """

    journal: ResultJournal
    checkpoints: Path | None = None
    checkpoint_s: float = 600.0
    store: ContextStore | None = None


@dataclass(frozen=True)
class ArmJob:
    """What an arm works with under one seed.

    Attributes:
        model: as it was loaded; never changed.
        task, seed, settings: of the study.
        ledger: counts what the arm does.
        workspace: see Workspace.
        key: a digest of all that decides the run.
        batches: prompts for the model, in arms that train on what it writes.
        progress: show bars.
    """

    model: Model
    task: Task
    seed: int
    settings: StudySettings
    ledger: Ledger
    workspace: Workspace
    key: str
    batches: tuple[PromptBatch, ...] = ()
    progress: bool = False


@dataclass(frozen=True)
class ContextText:
    """Documents in front of every question.

    Attributes:
        documents: those that are read.
        text: what stands before each prompt.
        num_left_out: documents that did not fit the tokens they may take.
    """

    documents: tuple[Document, ...]
    text: str
    num_left_out: int = 0


@dataclass(frozen=True)
class Prepared:
    """An arm that is ready for its first question.

    Attributes:
        model: the one that answers.
        context: text before each question.
        store: where the context's keys and values are looked up and left.
        notes: counts for the record.
        losses: mean loss of each training step.
        samples: some augmentations.
    """

    model: Model
    context: str
    store: ContextStore | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Training:
    """How an arm's weights are made.

    Attributes:
        augment: writes texts to train on beside the documents; None to train on the documents alone.
        generates: whether the model writes them, call by call: ArmJob.batches then has the prompts.
        has_teacher: whether the training follows the model itself with the documents in its context.
        check: raises ProtocolError on a task that the training cannot take.
    """

    augment: Callable[[ArmJob], Augmented] | None = None
    generates: bool = False
    has_teacher: bool = False
    check: Callable[[Task], None] = lambda _: None


@dataclass(frozen=True)
class Asking:
    """What stands before a question, and what that costs.

    Attributes:
        ways: the ways of answering by name with their costs, from the arm's title; none where they were not measured.
        context: documents for the context of every question; None to ask without.
        ask: the answers of an arm that is ready.
    """

    ways: Callable[[str, ArmCosts], dict[str, Samples]]
    context: Callable[[Model, Task, int, StudySettings], ContextText] | None = None
    ask: Callable[[ArmJob, Prepared], list[evaluate.Answer]] = lambda job, ready: ask_behind_context(job, ready)


@dataclass(frozen=True)
class Arm:
    """A way of answering.

    Attributes:
        name: in options and files.
        title: in tables and charts.
        training: how its weights are made; None for the model as it was loaded.
        asking: what stands before a question.
    """

    name: str
    title: str
    asking: Asking
    training: Training | None = None

    @property
    def reads_context(self) -> bool:
        """Whether documents stand before every question."""
        return self.asking.context is not None

    def prepare(self, job: ArmJob) -> Prepared:
        """Train and read what there is to, before the first question.

        Raises:
            FinetuneError, GenerateError, ProtocolError: see finetune(), augment_by_model() and fit_documents().
        """
        ready = Prepared(job.model, prompt_context(job.model, [], job.settings.template))
        if self.training is not None:
            ready = _train(self.training, job, ready)
        if self.asking.context is None:
            return ready
        read = self.asking.context(ready.model, job.task, job.seed, job.settings)
        limited = {} if job.settings.icl_tokens is None else {"left_out_documents": read.num_left_out}
        notes = ready.notes | limited | {"context_documents": len(read.documents)}
        store = None if self.training is not None else _store_as_begun(job, read.text)
        return Prepared(ready.model, read.text, store, notes, ready.losses, ready.samples)

    def batches(self, model: Model, task: Task, seed: int, settings: StudySettings, key: str) -> list[PromptBatch]:
        """What the model is asked to write for the arm; nothing for most."""
        if self.training is None or not self.training.generates:
            return []
        return prompt_batches(
            model,
            task.documents,
            settings.strategy,
            samples=settings.samples,
            among=lambda drawn: _chosen_documents(task, drawn, settings),
            seed=seed,
            key=key,
        )


def _train(training: Training, job: ArmJob, ready: Prepared) -> Prepared:
    """Fine-tune a copy of the model."""
    texts, notes = [document.text for document in job.task.documents], dict(ready.notes)
    samples: tuple[Sample, ...] = ()
    if training.augment is not None:
        augmented = training.augment(job)
        texts += [row.text for row in augmented.rows]
        sources = {document.id: document.text for document in job.task.documents}
        shown = augmented.rows[:: -(-len(augmented.rows) // SAMPLES) or 1]
        samples = tuple(Sample(sources[row.source_id], row.kind, row.text) for row in shown)
        notes["augmentations"] = len(augmented.rows)
        notes |= {f"dropped_{step}": count for step, count in augmented.dropped.items()}
    teacher = all_documents(job.model, job.task, job.seed, job.settings).text if training.has_teacher else None
    checkpoints = job.workspace.checkpoints
    tuned = finetune(
        job.model,
        texts,
        job.settings.finetune,
        seed=job.seed,
        teacher_context=teacher,
        ledger=job.ledger,
        options=RunOptions(
            output_dir=checkpoints and checkpoints / job.key,
            resume=checkpoints is not None,
            checkpoint_s=None if checkpoints is None else job.workspace.checkpoint_s,
            progress=job.progress,
        ),
    )
    notes["final_loss"] = tuned.losses[-1]
    return Prepared(tuned.model, ready.context, None, notes, tuned.losses, samples)


def _store_as_begun(job: ArmJob, context: str) -> ContextStore | None:
    """The store, with no more of this context in it than when the run was begun: a kill must not change its cost."""
    if (store := job.workspace.store) is None:
        return None
    (token,) = encoding.encode(job.model.tokenizer, [context.rstrip()])

    def stored_tokens() -> int:
        found = store.find(token)
        return 0 if found is None else len(found.token)

    return store.up_to(job.workspace.journal.once(digest(job.key, "stored tokens"), stored_tokens))


def _chosen_documents(task: Task, seed: int, settings: StudySettings) -> list[Document]:
    """The documents that a context shows, and that first samples of the global strategy of augmentation see."""
    return evaluate.select_documents(
        task.documents, seed, per_topic=settings.icl_per_topic, subsample=settings.icl_subsample
    )


# How to ask -----------------------------------------------------------------------------------------------------------


def ask_behind_context(job: ArmJob, ready: Prepared) -> list[evaluate.Answer]:
    """Every question behind the same context."""
    return evaluate.answers(
        ready.model,
        job.task.questions,
        context=ready.context,
        normalization=job.settings.normalization,
        store=ready.store,
        ledger=job.ledger,
        progress=job.progress,
    )


def all_documents(model: Model, task: Task, seed: int, settings: StudySettings) -> ContextText:
    """The documents that the settings choose, as many as fit."""
    chosen = documents = _chosen_documents(task, seed, settings)
    if settings.icl_tokens is not None:
        documents = evaluate.fit_documents(model, chosen, settings.icl_tokens, settings.template)
    text = prompt_context(model, documents, settings.template)
    return ContextText(tuple(documents), text, len(chosen) - len(documents))


def ways_without_context(title: str, costs: ArmCosts) -> dict[str, Samples]:
    """A setup a run, then a query each."""
    point, setup = costs.point(0), costs.setup
    if point is None or setup is None or (query := costs.query(point)) is None:
        return {}
    return {title: Samples(setup, (), query)}


def ways_behind_context(title: str, costs: ArmCosts) -> dict[str, Samples]:
    """The context is read for each batch of queries; or cached in memory; or kept in a file that is read back."""
    point, setup = costs.point(costs.sweep.context_tokens), costs.setup
    if point is None or setup is None or (query := costs.query(point)) is None:
        return {}
    reading = costs.reading(point)
    found = {title: Samples(setup, reading, query, float(point.batch))}
    if costs.cache_lifetime > point.batch:
        found[f"{title} cached"] = Samples(setup, reading, query, costs.cache_lifetime)
    if point.load_s and costs.resource != "joules":  # a file's joules were not measured
        load, save = costs.of_seconds(point.load_s), costs.of_seconds(point.save_s)
        once = Samples((), reading).line.reading + Samples((), save).line.reading
        saved = tuple(own + once for own in setup or (0.0,))
        found[f"{title} from file"] = Samples(saved, load, query, max(float(costs.batch), costs.cache_lifetime))
    return found


CLOSED_BOOK = Asking(ways_without_context)
IN_CONTEXT = Asking(ways_behind_context, context=all_documents)

# How to train ---------------------------------------------------------------------------------------------------------


def _by_model(job: ArmJob) -> Augmented:
    return augment_by_model(
        job.model, job.batches, journal=job.workspace.journal, ledger=job.ledger, progress=job.progress
    )


def _by_rule(job: ArmJob) -> Augmented:
    with job.ledger.phase("filter"):
        return augment_by_rule(job.task.documents)


def _check_rules(task: Task) -> None:
    if not augment_by_rule(task.documents).rows:
        raise ProtocolError("arms: rules-ft: no document states a comparison, which is all that the rules know")


ARMS = (
    Arm("base", "base", CLOSED_BOOK),
    Arm("icl", "ICL", IN_CONTEXT),
    Arm("ft", "fine-tuned", CLOSED_BOOK, Training()),
    Arm("augmented-ft", "augmented", CLOSED_BOOK, Training(_by_model, generates=True)),
    Arm("rules-ft", "by rule", CLOSED_BOOK, Training(_by_rule, check=_check_rules)),
    Arm("distilled", "distilled", CLOSED_BOOK, Training(_by_model, generates=True, has_teacher=True)),
)
_BY_NAME = {arm.name: arm for arm in ARMS}


def arm_named(name: str) -> Arm:
    """The arm of a name.

    Raises:
        ValueError: no arm has it.
    """
    if name not in _BY_NAME:
        raise ValueError(f"arms: expected some of {', '.join(ARM_NAMES)}, got {name!r}")
    return _BY_NAME[name]


def recorded_arm(name: str) -> Arm:
    """The arm of a name in a results file; one of another version of this package is a trained arm under its name."""
    return _BY_NAME.get(name) or Arm(name, name, CLOSED_BOOK, Training())
