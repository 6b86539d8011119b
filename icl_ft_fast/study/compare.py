"""The study as one call: every arm under every seed on a task, what each costs, and results.json.

Every arm ends in the same questions through the same scorer; arms differ in what stands in the context and in what was
trained on. What is paid once is in each run's ledger; what a query costs is measured separately, by sweep.py.

A finished run is journaled under a digest of all that it depends on, with the figures that were measured as it was
made: a study that was killed and started again reads them back, and ends with the results of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from icl_ft_fast.augmentation.generators import TextGenerator
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.control_tokens import set_mode
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.machine import Ceilings, ceilings, slow_dtype
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import ProtocolError, check_prompts, chosen_template, shown_prompt
from icl_ft_fast.finetuning.settings import LoraSettings
from icl_ft_fast.runtime.durable import ResultJournal, digest, locked
from icl_ft_fast.runtime.executors import Executor, InProcess, Ray, follow
from icl_ft_fast.runtime.templates import fix_date, set_template_arguments
from icl_ft_fast.study import sweep, workers
from icl_ft_fast.study.arm import CONTEXT_TOKENS, ContextText, Workspace, kept_name, writer_of
from icl_ft_fast.study.arms import arm_named, arms_of
from icl_ft_fast.study.progress import StudyProgress
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import Results, ResultsError, Setting, as_json, parse_results, write_results
from icl_ft_fast.study.runs import PlannedRun, make_runs, plan, study_key
from icl_ft_fast.study.settings import CHECKPOINT_S, LORA_FROM, MEASURE_S, StudySettings
from icl_ft_fast.study.slotted import SLOTS
from icl_ft_fast.tasks.tables import silent
from icl_ft_fast.tasks.task import Task

RESULTS, JOURNAL, CHECKPOINTS = "results.json", "journal.jsonl", "checkpoints"  # in a study's folder
_SWEEP = TypeAdapter(sweep.Sweep)


@dataclass(frozen=True)
class StudyOptions:
    """How a study runs; nothing here decides an answer.

    Attributes:
        executor: who makes the runs.
        loading: keyword arguments of load(), for workers on other machines.
        store: a folder where contexts that were read before are found, and new ones left; None for no such folder.
        store_bytes: the most that the contexts there may take.
        checkpoint_s: seconds between the checkpoints of a training, in the study's folder.
        answer_tokens: of an answer; queries are then measured with decoding, and 0 measures them without.
        measure_s: limit of measuring what queries cost; 0 measures nothing, and there is no break-even then.
        task_name: of the task in results.json.
        arguments: a digest of all that the caller was asked for, by which a rerun is told from another study.
        overwrite: replace the results of another study.
        kept: a folder that each arm's trained weights, or adapters, are left in, one for each training and seed; None
            to leave none.
        on_run: called with each run as it ends.
        tell: called with lines of text on what takes long and what the settings leave to the model.
    """

    executor: Executor = field(default_factory=InProcess)
    loading: Mapping[str, Any] = field(default_factory=dict)
    store: Path | None = None
    store_bytes: int = 20 * 10**9
    checkpoint_s: float = CHECKPOINT_S
    measure_s: float = MEASURE_S
    answer_tokens: int = 0
    task_name: str = "task"
    arguments: str = ""
    overwrite: bool = False
    kept: Path | None = None
    on_run: Callable[[Run], None] | None = None
    tell: Callable[[str], None] = silent

    def __post_init__(self) -> None:
        for name in ("store", "kept"):  # in Python a folder may be a string
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else Path(given))


def compare(
    model: Model | Callable[[], tuple[Model, Ledger]],
    task: Task | Callable[[int], Task],
    settings: StudySettings | None = None,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    out: str | Path | None = None,
    options: StudyOptions | None = None,
    progress: bool = False,
) -> Results | None:
    """Run every arm under every seed, measure what queries cost, and return the results.

    Args:
        model: from load(), float32 if an arm trains; left as it is. Or a function that loads it, which is called once
            `out` is locked, and returns the ledger of loading too.
        task: one for all seeds, or a function that makes one for a seed.
        settings: what to compare and how.
        arms: in place of those of the settings.
        seeds: in place of those of the settings.
        out: a folder for results.json and for what is finished, from which the same call resumes after a kill; None
            keeps everything in memory.
        options: how to run it.
        progress: show bars.

    Returns:
        What results.json holds; None in an executor's processes of other rank than 0.

    Raises:
        ProtocolError: an arm that cannot take the task.
        ResultsError: `out` holds another study's results.
        LockedError: another process is at work in `out`.
        ValueError: an unknown arm, or whatever scoring, generating or training raises.

    Examples:
        >>> question = iff.Question("q", "femp are", (" wider than glon.", " less wide than glon."), answer=0)
        >>> task = iff.Task((iff.Document("d", "femp are wider than glon."),), (question,))
        >>> settings = iff.StudySettings(arms=("base", "icl"), seeds=(0,))
        >>> options = iff.StudyOptions(measure_s=0)
        >>> results = iff.compare(iff.load("shipped"), task, settings, options=options)
        >>> results.runs[1].accuracy["test"].value
        1.0
    """
    settings, options = settings or StudySettings(), options or StudyOptions()
    settings = replace(settings, arms=tuple(arms or settings.arms), seeds=tuple(seeds or settings.seeds))
    task_of_seed: Callable[[int], Task] = cache(task) if callable(task) else lambda _: task
    settings = replace(settings, arms=arms_of(settings, task_of_seed(settings.seeds[0])))
    folder = None if out is None else Path(out)
    with nullcontext() if folder is None or options.executor.rank else _begun(folder, options):
        follow(options.executor)  # until rank 0 holds the lock, and measures nothing any more of a study before
        journal = ResultJournal(None if folder is None else folder / JOURNAL)
        loaded, load = (model, None) if isinstance(model, Model) else model()
        set_mode(loaded.tokenizer, settings.special_tokens)
        date = fix_date(loaded.tokenizer, settings.template_date or journal.values.get(_begin_key(options)))
        set_template_arguments(loaded.tokenizer, settings.chat_template_kwargs or {})
        asked, settings = settings, settled(loaded, replace(settings, template_date=date))
        if not options.arguments:
            options = replace(options, arguments=digest(study_key(loaded, settings), settings.arms, settings.seeds))
        if folder is not None:
            _check_folder(folder, options)
        slow = "" if options.executor.rank else slow_dtype(loaded.device, loaded.network.dtype)
        for line in [*_left_to_model(loaded, settings, asked), *filter(None, [slow])]:
            options.tell(line)
        study = _Study(loaded, load, settings, options, folder, journal, progress)
        return study.run(task_of_seed)


def settled(model: Model, settings: StudySettings) -> StudySettings:
    """The settings with what they leave to the model: the template, and whether adapters are trained."""
    trained = settings.finetune
    wants_lora = settings.use_peft if settings.use_peft is not None else model.num_parameters >= LORA_FROM
    if settings.use_peft is False or (wants_lora and trained.lora is None):
        trained = replace(trained, lora=LoraSettings() if wants_lora else None)
    return replace(settings, template=chosen_template(model, settings.template), finetune=trained)


def _left_to_model(model: Model, settings: StudySettings, asked: StudySettings) -> list[str]:
    """What settled() chose, in sentences."""
    found = []
    if asked.template == "auto" and settings.template == "chat":
        found.append(f"template: chat, as {model.name} has a chat template; base asks without it")
    lora, trains = settings.finetune.lora, any(arm_named(name).training is not None for name in settings.arms)
    if trains and lora is not None and asked.use_peft is None and asked.finetune.lora is None:
        found.append(
            f"fine-tuning: LoRA adapters of rank {lora.r}, the default from {LORA_FROM:,} parameters on; "
            "use_peft false trains all weights"
        )
    return found


def _begin_key(options: StudyOptions) -> str:
    """The journal's key of the day on which the study began."""
    return digest("begun", options.arguments)


@contextmanager
def _begun(folder: Path, options: StudyOptions) -> Iterator[None]:
    """Hold a study's folder, and note the day on which it begins, which a chat template may write.

    A resumed study has its first day; one that fails before it has done anything leaves nothing.
    """
    path = folder / JOURNAL
    with locked(folder / ".lock"):
        if options.arguments:  # refused before the model is loaded
            _check_folder(folder, options)
        is_new = not path.exists()
        ResultJournal(path).once(_begin_key(options), lambda: datetime.now().date().isoformat())
        size = path.stat().st_size
        try:
            yield
        except BaseException:
            if is_new and path.stat().st_size == size:
                path.unlink()
            raise


def _check_folder(folder: Path, options: StudyOptions) -> None:
    """Refuse to replace the results of another study."""
    path = folder / RESULTS
    is_rerun = path.exists() and f'"arguments": "{options.arguments}"' in path.read_text(errors="replace")
    if path.exists() and not is_rerun and not options.overwrite:
        raise ResultsError(f"{path}: holds the results of another study; choose another folder or overwrite it")


@dataclass(frozen=True)
class _Study:
    """A study whose folder is locked and whose model is loaded."""

    model: Model
    load: Ledger | None
    settings: StudySettings
    options: StudyOptions
    folder: Path | None
    journal: ResultJournal
    progress: bool

    def run(self, task_of_seed: Callable[[int], Task]) -> Results | None:
        """Make what is not in the journal yet; rank 0 returns the results."""
        model, settings, options, journal = self.model, self.settings, self.options, self.journal
        progress = StudyProgress(self.folder)
        if not options.executor.rank:
            trained = [name for name in settings.arms if arm_named(name).training is not None]
            progress.begin(settings.arms, settings.seeds, trained)
        generates = any(t.generates for name in settings.arms if (t := arm_named(name).training) is not None)
        writer = writer_of(model, settings) if generates else None
        planned = plan(model, task_of_seed, settings, journal, writer=writer, has_store=options.store is not None)
        self._check_kept(planned)
        before = len(journal.values)
        _check_room(model, planned[0].task, settings)
        if not isinstance(options.executor, InProcess) and not self._make_elsewhere(planned, writer):
            return None
        if self.folder is not None:
            workers.take_in(journal, self.folder)
        runs, first = list[Run](), planned[0].task
        shown = shown_prompt(model, first.documents, first.questions[0], settings.template) if first.questions else None
        setting = Setting(model, options.task_name, settings, options.arguments, shown)

        def keep(run: Run) -> None:
            runs.append(run)
            if len(journal.values) > before:  # else results.json may be whole already
                self._write(as_json(setting, runs))
            if options.on_run is not None:
                options.on_run(run)

        checkpoints = None if self.folder is None else self.folder / CHECKPOINTS
        store = None if options.store is None else ContextStore(options.store, model, options.store_bytes)
        workspace = Workspace(
            journal,
            checkpoints,
            options.checkpoint_s,
            store,
            writer,
            options.tell,
            progress=progress,
            kept=options.kept,
        )
        make_runs(model, planned, settings, workspace, progress=self.progress, on_run=keep)
        key, costs, best, load = study_key(model, settings), sweep.Sweep(), None, self.load
        if options.measure_s:
            task, limit = planned[0].task, options.measure_s  # the first seed's
            needed = context_lengths(runs)
            costs = measure(
                model,
                task,
                settings,
                needed,
                seconds=limit,
                decoded=options.answer_tokens,
                journal=journal,
                progress=self.progress,
            )
            options.tell(f"Measured what queries take for {costs.measured_s:,.0f} s.")
            measured = journal.once(
                digest(key, "ceilings"), lambda: asdict(ceilings(model.device, model.network.dtype))
            )
            best = Ceilings(**measured)
        told = None if load is None else journal.once(digest(key, "load"), load.as_dict)
        found = as_json(setting, runs, costs=costs, load=told, ceilings=best)
        self._write(found)
        progress.end()
        return parse_results(found)

    def _check_kept(self, planned: Sequence[PlannedRun]) -> None:
        """Refuse to replace models that are not this study's, and to go on where a finished run left none."""
        kept, journal = self.options.kept, self.journal
        if kept is None:
            return
        for run in planned:
            path, mark = kept / kept_name(run.arm, run.seed), digest(run.training_key, "kept")
            if run.trains and path.exists() and mark not in journal.values and not self.options.overwrite:
                raise ResultsError(f"{path}: holds a model of another study; choose another folder or overwrite it")
            if run.trains and not path.exists() and run.key in journal.values:
                raise ResultsError(f"{path}: not there, though its run is finished; compare into another folder")
            if run.trains and not self.options.executor.rank:
                journal.once(mark, lambda: True)

    def _make_elsewhere(self, planned: Sequence[PlannedRun], writer: TextGenerator | None) -> bool:
        """Have the executor's workers make the runs; whether this process is the one that goes on."""
        if self.folder is None:
            raise ValueError("out: an executor's workers leave their runs in a folder; give one")
        options = self.options
        if options.store is not None:
            options.store.mkdir(parents=True, exist_ok=True)
        start = workers.StudyWorkers(
            self.model.name,
            dict(options.loading),
            study_key(self.model, self.settings),
            self.settings,
            options.executor.workers,
            self.folder.absolute(),
            options.checkpoint_s,
            None if isinstance(options.executor, Ray) else writer,
            None if options.store is None else options.store.absolute(),
            options.store_bytes,
            kept=options.kept and options.kept.absolute(),
        )
        # What an arm finds in a store is what was left there before: rank 0 goes through such arms in their order.
        shared = [one for one in planned if options.store is None or not one.uses_store]
        return workers.make_runs(options.executor, start, self.model, shared, self.journal, progress=self.progress)

    def _write(self, found: dict[str, Any]) -> None:
        if self.folder is not None:
            write_results(self.folder / RESULTS, found)


def _check_room(model: Model, task: Task, settings: StudySettings) -> None:
    """Refuse, before anything runs, documents that leave the longest question no positions."""
    for context in _contexts(settings) if task.questions else ():
        read = context(model, task, settings.seeds[0], settings)
        found = check_prompts(model, read.documents, task.questions, settings.template)
        if found.longest_tokens > model.max_positions + 1:
            raise ProtocolError(
                f"icl_tokens: documents and the longest question take {found.longest_tokens:,} tokens of the model's "
                f"{model.max_positions:,} positions; {max(found.room, 0)} leave room for it"
            )


def _contexts(settings: StudySettings) -> list[Callable[[Model, Task, int, StudySettings], ContextText]]:
    """What makes the documents that stand before every question, once for all arms of the same."""
    asked = (arm_named(name).asking.context for name in settings.arms)
    return list(dict.fromkeys(context for context in asked if context is not None))


def context_lengths(runs: Sequence[Run]) -> list[int]:
    """Tokens before a query, and slots, of the first seed's arms that have contexts of their own."""
    first = [run.notes for run in runs if run.seed == runs[0].seed]
    return sorted({int(notes[name]) for notes in first for name in (CONTEXT_TOKENS, SLOTS) if name in notes})


def measure(
    model: Model,
    task: Task,
    settings: StudySettings,
    needed: Sequence[int] = (),
    *,
    seconds: float = MEASURE_S,
    decoded: int = 0,
    journal: ResultJournal | None = None,
    progress: bool = False,
) -> sweep.Sweep:
    """What queries cost without a context, behind the longest that an arm reads, and behind `needed` and others."""
    texts = [context(model, task, settings.seeds[0], settings).text for context in _contexts(settings)]
    text, lengths = max(texts, key=len, default=""), sweep.LENGTHS if texts else ()

    def run() -> dict[str, Any]:
        found = sweep.sweep(
            model,
            task.questions,
            text,
            lengths=lengths,
            needed=needed,
            seconds=seconds,
            decoded=decoded,
            progress=progress,
        )
        return asdict(found)

    questions = [asdict(question) for question in task.questions]
    key = digest(study_key(model, settings), questions, text, list(needed), seconds, *([decoded] if decoded else []))
    measured: sweep.Sweep = _SWEEP.validate_python((journal or ResultJournal(None)).once(key, run))
    return measured
