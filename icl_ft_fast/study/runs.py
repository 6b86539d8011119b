"""The runs of a study: planned once, each found in the journal or made."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter

from icl_ft_fast.augmentation.generators import LocalGenerator, TextGenerator
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.machine import fingerprint
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.study import evaluate
from icl_ft_fast.study.arm import Arm, ArmJob, Workspace, WritingBatch, ask, writer_of
from icl_ft_fast.study.arms import arm_named
from icl_ft_fast.study.costs import ANSWERING
from icl_ft_fast.study.harm import SHARED_WITH_GENERAL, general_questions, measure_harm, shared_with
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.task import Task

_RUN = TypeAdapter(Run)


def study_key(model: Model, settings: StudySettings) -> str:
    """A digest of what decides every run: weights, settings except arms and seeds, the machine and its versions."""
    machine = fingerprint(model.device) | {"device": model.device.type}
    del machine["memory_bytes"]  # machines of one kind differ in it by a little
    shared = asdict(replace(settings, arms=(), seeds=(), prefix_tokens=(), synthetic_tokens=(), arm_training=None))
    return digest("study 3", model.fingerprint(), shared, machine)


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made.

    Attributes:
        arm: the name of the arm.
        seed: of the run.
        task: of the seed.
        key: a digest of all that decides the run; runs of several seeds share it where the arm ignores the seed.
        training_key: a digest of all that decides its weights.
        batches: prompts that the model answers for the run, call by call; empty where the run was found in the journal.
    """

    arm: str
    seed: int
    task: Task
    key: str
    training_key: str = ""
    batches: tuple[WritingBatch, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether the arm trains weights or a prefix, which takes longest."""
        return arm_named(self.arm).trains

    @property
    def tokens(self) -> int | None:
        """The budget of what the model writes for the arm; None for what one go through the prompts gives."""
        training = arm_named(self.arm).training
        return None if training is None else training.tokens

    @property
    def uses_store(self) -> bool:
        """Whether the arm looks its texts up in a store."""
        return arm_named(self.arm).uses_store


def plan(
    model: Model,
    task_of_seed: Callable[[int], Task],
    settings: StudySettings,
    journal: ResultJournal,
    *,
    writer: TextGenerator | None = None,
    has_store: bool = False,
) -> list[PlannedRun]:
    """Every arm under every seed, seeds outermost.

    Args:
        model: from load().
        task_of_seed: the task for a seed.
        settings: of the study.
        journal: runs that were made before; their prompts are not needed any more.
        writer: of augmentations, for arms that need some; None for the model itself.
        has_store: whether contexts are looked up in a store, which changes what reading them costs.

    Raises:
        ProtocolError: an arm that cannot take the task.
        ValueError: an unknown arm.
    """
    arms = [arm_named(name) for name in settings.arms]
    general = [asdict(question) for question in general_questions(settings.general)]
    if writer is None and any(arm.training is not None and arm.training.generates for arm in arms):
        writer = writer_of(model, settings)
    identity, planned = digest(study_key(model, settings), general, _elsewhere(writer, model)), []
    for seed in settings.seeds:
        task = task_of_seed(seed)
        content = digest(identity, asdict(task))
        batches = dict[object, tuple[WritingBatch, ...]]()
        for arm in arms:
            arm.check(task)
            same = settings.seeds[0] if is_made_once(arm, settings, has_store) else seed
            own = [settings.own_training(arm.name)] if arm.training is not None else []
            own = own if any(own) else []  # decides this arm's runs and no others
            key = digest(content, arm.name, same, arm.uses_store and has_store, *own)
            writes = None if key in journal.values else arm.writes
            if writes is not None and writes not in batches:  # the same for every such arm of the seed
                batches[writes] = tuple(arm.batches(model, writer, task, seed, settings, content))
            training_key = digest(content, arm.name.partition("+")[0], seed, *own)
            planned.append(PlannedRun(arm.name, seed, task, key, training_key, batches.get(writes, ())))
    return planned


def is_made_once(arm: Arm, settings: StudySettings, has_store: bool) -> bool:
    """Whether one run serves all seeds of a task; in a store a run finds what the seed before left."""
    return arm.ignores_seed and not settings.general and not (arm.uses_store and has_store)


def _elsewhere(writer: TextGenerator | None, model: Model) -> str:
    """The fingerprint of a generator that is not the study's own model."""
    if writer is None:
        return ""
    return "" if isinstance(writer, LocalGenerator) and writer.model is model else writer.fingerprint


def make_run(
    model: Model, planned: PlannedRun, settings: StudySettings, workspace: Workspace, *, progress: bool = False
) -> dict[str, Any]:
    """A run's fields except the questions, as plain values; the workspace's progress hears of it."""
    under_way = Activity(f"{arm_named(planned.arm).title}, seed {planned.seed}", shown=progress)
    with workspace.progress.running(planned.arm, planned.seed) as ended, under_way:
        made = _make_run(model, planned, settings, workspace, progress)
        counts = made["accuracy"].values()
        ended(sum(a["correct"] for a in counts), sum(a["total"] for a in counts))
    return made


def _make_run(
    model: Model, planned: PlannedRun, settings: StudySettings, workspace: Workspace, progress: bool
) -> dict[str, Any]:
    ledger, task = Ledger(meter=Meter(model.device)), planned.task
    keys = planned.key, planned.training_key
    job = ArmJob(model, task, planned.seed, settings, ledger, workspace, *keys, planned.batches, progress, planned.arm)
    arm: Arm = arm_named(planned.arm)
    ready = arm.prepare(job)
    setup_s = math.fsum(seconds for phase, seconds in ledger.seconds.items() if phase not in ANSWERING)
    before = ledger.request_tokens
    with closing(ready):
        answers = ask(job, ready)
        general = general_questions(settings.general)
        with Activity("measuring harm", shown=progress):
            harm = measure_harm(job, ready, general) if general else None
    shared = shared_with(settings.general, task)
    told = {SHARED_WITH_GENERAL: shared} if shared else {}
    num_questions, query = len(task.questions), ledger.phases["query"]
    run = Run(
        arm=planned.arm,
        seed=planned.seed,
        accuracy=evaluate.accuracies(answers),
        answers=tuple(answers),
        setup_s=setup_s,
        query_s=(query.wall_s + ledger.phases["tokenise"].wall_s) / num_questions,
        query_request_tokens=(ledger.request_tokens - before) / num_questions,
        query_forwarded_tokens=query.forwarded_tokens / num_questions,
        counts=ledger.as_dict(),
        notes=ready.notes | told,
        losses=ready.losses,
        curve=ready.curve,
        samples=ready.samples,
        harm=harm,
    )
    return asdict(run)


def make_runs(
    model: Model,
    planned: Sequence[PlannedRun],
    settings: StudySettings,
    workspace: Workspace,
    *,
    progress: bool = False,
    on_run: Callable[[Run], None] | None = None,
) -> list[Run]:
    """The planned runs: those in the journal as they are, the others made here and left in it.

    Args:
        model: float32 if an arm trains; left as it is.
        planned: from plan().
        settings: of the study.
        workspace: see Workspace.
        progress: show bars.
        on_run: called with each run as it ends.
    """
    runs, checkpoints = [], workspace.checkpoints
    for one in planned:
        made = workspace.journal.once(one.key, partial(make_run, model, one, settings, workspace, progress=progress))
        runs.append(replace(_RUN.validate_python(made), seed=one.seed, questions=one.task.questions))
        if checkpoints is not None and (checkpoints / one.key).exists():
            shutil.rmtree(checkpoints / one.key)
            if not any(checkpoints.iterdir()):
                checkpoints.rmdir()
        if on_run is not None:
            on_run(runs[-1])
    return runs
