"""An arm of a study: how its weights are made, what stands before a question, and how both are put together.

arms.py has the arms that there are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from icl_ft_fast.augmentation.batches import PromptBatch, prompt_batches
from icl_ft_fast.augmentation.generators import Endpoint, LocalGenerator, TextGenerator
from icl_ft_fast.augmentation.self_study import ConversationBatch
from icl_ft_fast.augmentation.strategies import find
from icl_ft_fast.augmentation.strategy import Augmented, AugmentError
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.control_tokens import behind
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import has_chat_template, prompt_context
from icl_ft_fast.finetuning.data import Example, encode
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings, RunOptions, Watch, training_concerns
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.runtime.templates import fix_date
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.amortise import Samples
from icl_ft_fast.study.calibration import Calibration
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.progress import StudyProgress
from icl_ft_fast.study.records import CurvePoint, Sample
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.study.synthetic import general_texts, samples_for, token_count, writers
from icl_ft_fast.tasks.tables import silent
from icl_ft_fast.tasks.task import Document, Task

SAMPLES = 40  # augmentations in a run's record, for the report
CONTEXT_TOKENS = "query_context_tokens"  # the note of a run that has the mean tokens before a question
SYNTHETIC_TOKENS = "synthetic_tokens"  # the note of a run that has the tokens of what the model wrote


@dataclass(frozen=True)
class Workspace:
    """Where a run finds what was done before.

    Attributes:
        journal: results by what decides them.
        checkpoints: a folder for arms that are being trained; None to start over after a kill.
        checkpoint_s: seconds between checkpoints.
        store: contexts that were read before.
        writer: what writes augmentations; None where no arm needs any.
        tell: called with lines of text on what takes long.
        kept: a folder that each training's weights, or adapters, are left in, under kept_name(); None to leave none.
        trained: the arm that was trained last, under ArmJob.training_key, with its ledger: an arm with the same
            training does not repeat it, and books what it took.
        progress: where runs say that they are made.
    """

    journal: ResultJournal
    checkpoints: Path | None = None
    checkpoint_s: float = 600.0
    store: ContextStore | None = None
    writer: TextGenerator | None = None
    tell: Callable[[str], None] = silent
    kept: Path | None = None
    trained: dict[str, tuple[Prepared, dict[str, Any]]] = field(default_factory=dict)
    progress: StudyProgress = field(default_factory=lambda: StudyProgress(None))


WritingBatch = PromptBatch | ConversationBatch  # what the model writes in one call


@dataclass(frozen=True)
class ArmJob:
    """What an arm works with under one seed.

    Attributes:
        model: as it was loaded; never changed.
        task, seed, settings: of the study.
        ledger: counts what the arm does.
        workspace: see Workspace.
        key: a digest of all that decides the run.
        training_key: a digest of all that decides the run's weights.
        batches: what the model is to write, in arms that train on that.
        progress: show bars.
        arm: the arm's name.
    """

    model: Model
    task: Task
    seed: int
    settings: StudySettings
    ledger: Ledger
    workspace: Workspace
    key: str
    training_key: str = ""
    batches: tuple[WritingBatch, ...] = ()
    progress: bool = False
    arm: str = ""


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
        contexts: text before each question of the task, where each has its own; it takes the place of `context`.
        kept: what each of `contexts` begins with that `store` keeps, because several questions share it.
        before: texts before other questions, from their prompts, where each question has its own.
        store: where the context's keys and values are looked up and left.
        notes: counts for the record.
        losses: mean loss of each training step.
        curve: accuracy by training step.
        samples: some augmentations.
        folder: a temporary one that `store` lies in, until close().
    """

    model: Model
    context: str
    contexts: tuple[str, ...] | None = None
    kept: tuple[str, ...] | None = None
    before: Callable[[Sequence[str], Ledger], list[str]] | None = None
    store: ContextStore | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    samples: tuple[Sample, ...] = ()
    folder: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        """Delete the temporary folder."""
        if self.folder is not None:
            self.folder.cleanup()


@dataclass(frozen=True)
class Expected:
    """What an asking is expected to do before the first question, and what then stands there.

    Attributes:
        slots: keys and values that stand before every question.
        read_tokens, written_tokens, trained_tokens, flops, seconds: of making them.
        shared: (a name, seconds) of what arms of the same name make once for all of them.
    """

    slots: int = 0
    read_tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    written_tokens: float = 0.0
    trained_tokens: float = 0.0
    shared: tuple[str, float] = ("", 0.0)


@dataclass(frozen=True)
class Training:
    """How an arm's weights are made.

    Attributes:
        augment: writes texts to train on beside the documents; None to train on the documents alone.
        generates: whether the model writes them, call by call: ArmJob.batches then has the prompts.
        asks_itself: whether it writes questions alone, see synthetic.writers().
        tokens: of what the model writes; None for what one go through the prompts gives.
        is_control: whether it is trained on the documents alone, for as many tokens as with what `augment` writes,
            whose cost is not its own.
        has_teacher: whether the training follows the model itself with the documents in its context.
        check: raises ProtocolError on a task that the training cannot take.
    """

    augment: Callable[[ArmJob], Augmented] | None = None
    generates: bool = False
    asks_itself: bool = False
    tokens: int | None = None
    is_control: bool = False
    has_teacher: bool = False
    check: Callable[[Task], None] = lambda _: None


@dataclass(frozen=True)
class Asking:
    """What stands before a question, and what that costs.

    Attributes:
        ways: the ways of answering by name with their costs, from the arm's title; none where they were not measured.
        context: documents for the context of every question; None where there are none, or not the same for all.
        prepare: from an arm whose weights are made to one that is ready for its first question; None to do what
            `context` says.
        check: raises UserError on a task that cannot be asked about so.
        batches: what the model is asked to write before `prepare`, from model, task, seed, settings and a key; arms of
            one function share what it writes under a seed. None for nothing.
        is_kept: whether what `prepare` puts before several questions is looked up in the study's store and left there.
        is_quick: whether `prepare` takes no time to speak of, so that a plan does it too.
        expect: what `prepare` will take, for a plan, where it is not quick; None where that is not known.
        is_control: whether it shows what others could reach and cannot itself be chosen, such as an oracle.
        has_slots: whether keys and values that are no text stand there, which no hosted model takes.
        ignores_seed: whether the same stands there under every seed: nothing is drawn or put in an order.
    """

    ways: Callable[[str, ArmCosts], dict[str, Samples]]
    context: Callable[[Model, Task, int, StudySettings], ContextText] | None = None
    prepare: Callable[[ArmJob, Prepared], Prepared] | None = None
    check: Callable[[Task], None] = lambda _: None
    batches: Callable[[Model, Task, int, StudySettings, str], Sequence[WritingBatch]] | None = None
    is_kept: bool = False
    is_quick: bool = False
    expect: Callable[[ArmJob, Calibration], Expected] | None = None
    is_control: bool = False
    has_slots: bool = False
    ignores_seed: bool = False


@dataclass(frozen=True)
class Arm:
    """A way of answering.

    Attributes:
        name: in options and files.
        title: in tables and charts.
        asking: what stands before a question.
        training: how its weights are made; None for the model as it was loaded.
        sized: the same arm in another size (name@size), such as another number of passages; None where it has none.
        sizes: those that its plain name stands for in a list of arms; none for itself.
    """

    name: str
    title: str
    asking: Asking
    training: Training | None = None
    sized: Callable[[int], Arm] | None = None
    sizes: tuple[int, ...] = ()

    @property
    def reads_context(self) -> bool:
        """Whether the same documents stand before every question, as text that a store may hold."""
        return self.asking.context is not None

    @property
    def uses_store(self) -> bool:
        """Whether its texts are looked up in the study's store: what it finds depends on the arms before it."""
        return self.training is None and (self.reads_context or self.asking.is_kept)

    @property
    def trains(self) -> bool:
        """Whether weights or slots are trained, which another seed makes others of."""
        return self.training is not None or self.asking.batches is not None

    @property
    def ignores_seed(self) -> bool:
        """Whether it answers the same questions alike under every seed."""
        return self.training is None and self.asking.ignores_seed

    @property
    def is_rival(self) -> bool:
        """Whether it takes documents to each question instead of training, which trained arms are compared with."""
        reads = self.asking.context is not None or self.asking.prepare is not None
        return not self.trains and reads and not self.asking.is_control

    def check(self, task: Task) -> None:
        """Raise UserError on a task that the arm cannot take."""
        if self.training is not None:
            self.training.check(task)
        self.asking.check(task)

    def prepare(self, job: ArmJob) -> Prepared:
        """Train and read what there is to, before the first question.

        Raises:
            FinetuneError, GenerateError, ProtocolError: see finetune(), augment_by_model() and fit_documents().
            RetrievalError, CompactionError, SelfStudyError: of arms that retrieve, compact or train a prefix.
        """
        ready = Prepared(job.model, prompt_context(job.model, [], job.settings.template))
        if self.training is not None:
            ready = _trained(self.training, job, ready)
        if self.asking.prepare is not None:
            return self.asking.prepare(job, ready)
        if self.asking.context is None:
            return ready
        read = self.asking.context(ready.model, job.task, job.seed, job.settings)
        limited = {} if job.settings.icl_tokens is None else {"left_out_documents": read.num_left_out}
        tokens = len(encoding.encode(ready.model.tokenizer, [read.text.rstrip()])[0]) if read.text else 0
        notes = ready.notes | limited | {"context_documents": len(read.documents), CONTEXT_TOKENS: tokens}
        store = None if self.training is not None else _store_as_begun(job, read.text)
        return replace(ready, context=read.text, store=store, notes=notes)

    @property
    def writes(self) -> object:
        """What tells arms apart that have other things written under a seed; None where nothing is."""
        if self.training is not None and self.training.generates:
            return "augmentations", self.training.asks_itself, self.training.tokens
        return self.asking.batches

    def batches(
        self, model: Model, writer: TextGenerator | None, task: Task, seed: int, settings: StudySettings, key: str
    ) -> Sequence[WritingBatch]:
        """What the model, or the generator of augmentations, is asked to write for the arm; nothing for most."""
        if self.asking.batches is not None:
            return self.asking.batches(model, task, seed, settings, key)
        training, made = self.training, list[PromptBatch]()
        if writer is None or training is None or not training.generates:
            return made
        for strategy, share in writers(writer.is_chat, settings, asks_itself=training.asks_itself).items():
            units = sum(len(find(strategy).units(document)) for document in task.documents)
            budget = None if training.tokens is None else training.tokens * share
            made += prompt_batches(
                writer,
                task.documents,
                strategy,
                samples=samples_for(strategy, units, budget, settings.samples),
                among=lambda drawn: _chosen_documents(task, drawn, settings),
                seed=seed,
                key=key,
                apart=budget is not None,
            )
        return made


def writer_of(model: Model, settings: StudySettings) -> TextGenerator:
    """What writes augmentations: the model of the study, or the generator that the settings name, which is loaded here.

    Raises:
        UserError: a generator that cannot be loaded, or an address that is none.
    """
    if settings.generator_url:
        return Endpoint(settings.generator_url, settings.generator)
    if settings.generator:
        dtype = str(model.network.dtype).removeprefix("torch.")
        model = load(settings.generator, dtype=dtype, device=str(model.device), special_tokens=settings.special_tokens)
        fix_date(model.tokenizer, settings.template_date)
    return LocalGenerator(model, is_chat=settings.template != "base" and has_chat_template(model))


def kept_name(arm: str, seed: int) -> str:
    """The folder of a training's weights; arms that differ only in what stands before a question share it."""
    return f"{arm.partition('+')[0]}-seed{seed}"


def _trained(training: Training, job: ArmJob, ready: Prepared) -> Prepared:
    """The arm after training: that of the workspace, if it was the last, else a new one, which takes its place."""
    kept = job.workspace.trained
    if job.training_key not in kept:
        kept.clear()
        ledger = Ledger(meter=job.ledger.meter)
        kept[job.training_key] = _train(training, replace(job, ledger=ledger), ready), ledger.as_dict()
    made, ledger_of_training = kept[job.training_key]
    job.ledger.include(ledger_of_training)
    return made


def _train(training: Training, job: ArmJob, ready: Prepared) -> Prepared:
    """Fine-tune a copy of the model."""
    notes = dict(ready.notes)
    examples = [Example(document.text, where=f"document {document.id!r}") for document in job.task.documents]
    samples: tuple[Sample, ...] = ()
    settings = job.settings.training_of(job.arm)
    if training.augment is not None and training.is_control:
        others = training.augment(replace(job, ledger=Ledger(meter=job.ledger.meter)))
        settings = _as_many_tokens(job, [row.text for row in others.rows])
        notes["steps"] = settings.steps
    elif training.augment is not None:
        augmented = training.augment(job)
        if not augmented.rows:
            lost = "".join(f", {count} {step.replace('_', ' ')}" for step, count in augmented.dropped.items() if count)
            asked = (batch for batch in job.batches if isinstance(batch, PromptBatch))
            names = dict.fromkeys(batch.prompting.strategy.name for batch in asked)
            strategy = ", ".join(names) or job.settings.strategy
            raise AugmentError(
                f"strategy: {strategy}: {augmented.prompts} prompts gave no row{lost}; try "
                "another strategy or a stronger generator, or leave the arm out"
            )
        if training.generates:
            notes[SYNTHETIC_TOKENS] = token_count(job.model, [row.text for row in augmented.rows])
        examples += [Example(row.text, where=f"a row of document {row.source_id!r}") for row in augmented.rows]
        sources = {document.id: document.text for document in job.task.documents}
        shown = augmented.rows[:: -(-len(augmented.rows) // SAMPLES) or 1]
        samples = tuple(Sample(sources[row.source_id], row.kind, row.text) for row in shown)
        notes["augmentations"] = len(augmented.rows)
        notes |= {"augmentation_prompts": augmented.prompts, "augmentation_productive": augmented.productive}
        notes |= {f"dropped_{step}": count for step, count in augmented.dropped.items()}
    if share := job.settings.replay:
        tokens = token_count(job.model, [example.completion for example in examples]) * share / (1 - share)
        replayed = general_texts(job.model, tokens, job.seed, journal=job.workspace.journal, ledger=job.ledger)
        notes["replay_tokens"] = token_count(job.model, replayed)
        examples += [Example(text, where="the model's own text") for text in replayed]
    watch = None
    if job.settings.eval_steps is not None:
        watch = Watch(job.settings.eval_steps, lambda model: _accuracy_of(job, model, ready.context))
    teacher = all_documents(job.model, job.task, job.seed, job.settings).text if training.has_teacher else None
    checkpoints = job.workspace.checkpoints
    tuned = finetune(
        job.model,
        examples,
        settings,
        seed=job.seed,
        teacher_context=teacher,
        ledger=job.ledger,
        options=RunOptions(
            output_dir=checkpoints and checkpoints / job.key,
            resume=checkpoints is not None,
            checkpoint_s=None if checkpoints is None else job.workspace.checkpoint_s,
            keep=job.workspace.kept and job.workspace.kept / kept_name(job.arm, job.seed),
            progress=job.progress,
            tell=job.workspace.tell,
            watch=watch,
            on_step=job.workspace.progress.step,
        ),
    )
    notes["final_loss"] = tuned.losses[-1]
    if concerns := training_concerns(settings, tuned.losses):
        notes["training_concerns"] = concerns
    curve = tuple(CurvePoint(step, figures) for step, figures in tuned.watched)
    return replace(ready, model=tuned.model, notes=notes, losses=tuned.losses, curve=curve, samples=samples)


def _accuracy_of(job: ArmJob, model: Model, context: str) -> dict[str, float]:
    """Accuracy by split of a model in training, without documents; in nobody's ledger."""
    given = evaluate.answers(
        model, job.task.questions, context=context, normalization=job.settings.normalization, ledger=Ledger()
    )
    return {split: accuracy.value for split, accuracy in evaluate.accuracies(given).items()}


def kept_store(job: ArmJob) -> ContextStore | None:
    """The store, with nothing in it but what was there when the run was begun: a kill must not change its cost."""
    if (store := job.workspace.store) is None:
        return None
    return store.with_only(job.workspace.journal.once(digest(job.key, "stored contexts"), store.ids))


def _as_many_tokens(job: ArmJob, more: Sequence[str]) -> FinetuneSettings:
    """Settings with the steps that see as many tokens of the documents as the settings' steps see with `more`."""
    settings, documents = job.settings.training_of(job.arm), [document.text for document in job.task.documents]

    def length(texts: Sequence[str]) -> float:
        encoded = encode(
            job.model.tokenizer, texts, max_positions=job.model.max_positions, splitting=settings.splitting
        )
        return fmean(len(example.ids) for example in encoded)

    return replace(settings, steps=max(1, round(settings.steps * length([*documents, *more]) / length(documents))))


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


def ask(job: ArmJob, ready: Prepared) -> list[evaluate.Answer]:
    """Answers to the task's questions, each behind what stands before it."""
    questions, context = job.task.questions, ready.context
    tokenizer, groups = ready.model.tokenizer, {ready.context: list(range(len(questions)))}
    if ready.contexts is not None:
        kept = ready.kept if ready.store is not None and ready.kept is not None else ("",) * len(questions)
        groups, asked = {}, []
        for q, (question, own, text) in enumerate(zip(questions, ready.contexts, kept, strict=True)):
            groups.setdefault(text, []).append(q)
            asked.append(replace(question, prompt=behind(tokenizer, own[len(text) :], question.prompt)))
        questions = tuple(asked)
    given: dict[int, evaluate.Answer] = {}
    for context, members in sorted(groups.items()):
        found = evaluate.answers(
            ready.model,
            [questions[q] for q in members],
            context=context,
            normalization=job.settings.normalization,
            store=ready.store,
            ledger=job.ledger,
            progress=job.progress,
        )
        known = [q for q in members if questions[q].answer is not None]
        given |= dict(zip(known, found, strict=True))
    return [given[q] for q in sorted(given)]


def all_documents(model: Model, task: Task, seed: int, settings: StudySettings) -> ContextText:
    """The documents that the settings choose, as many as fit."""
    chosen = documents = _chosen_documents(task, seed, settings)
    if settings.icl_tokens is not None:
        documents = evaluate.fit_documents(model, chosen, settings.icl_tokens, settings.template)
    text = prompt_context(model, documents, settings.template)
    return ContextText(tuple(documents), text, len(chosen) - len(documents))
