"""A study's runs as jobs of an executor, which ends with the results of one process in the time of several.

First the model writes the augmentations, a job a call of the engine; then the arms run, a job each, and whoever trains
on an augmentation finds it written. What workers made is on the disk, in the folder WORKERS beside the study's journal,
and is taken into it when all is there; compare() then goes on as after a kill, and finds every run made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from icl_ft_fast.augmentation.batches import PromptBatch
from icl_ft_fast.augmentation.generators import TextGenerator
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.control_tokens import set_mode
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.runtime.executors import (
    Executor,
    ExecutorError,
    Job,
    Ray,
    Worker,
    follow,
    journaled_in,
    run_journaled,
)
from icl_ft_fast.runtime.templates import fix_date, set_template_arguments
from icl_ft_fast.study.arm import Workspace, WritingBatch, writer_of
from icl_ft_fast.study.progress import StudyProgress
from icl_ft_fast.study.runs import PlannedRun, make_run, study_key
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.study.synthetic import surely_needed

WORKERS = "workers"


@dataclass(frozen=True)
class StudyWorkers:
    """Makes workers of a study, in this process or another, perhaps on another machine.

    Attributes:
        name, loading: what load() is called with.
        key: study_key() where the command was started.
        settings: of the study.
        workers: see records.Run.
        folder: of the study; checkpoints are written there where it is seen.
        checkpoint_s: seconds between them.
        writer: of augmentations; None where each worker makes its own.
        store, store_bytes: where slots are left, if it is seen; None for nowhere.
        events: what this worker's process has begun.
        kept: see Workspace.
    """

    name: str
    loading: dict[str, Any]
    key: str
    settings: StudySettings
    workers: int | None
    folder: Path
    checkpoint_s: float
    writer: TextGenerator | None = None
    store: Path | None = None
    store_bytes: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    kept: Path | None = None

    def __call__(self) -> Worker:
        """A worker elsewhere, that loads its own model; raises ExecutorError where that or the machine is another."""
        model = load(self.name, **self.loading)
        set_mode(model.tokenizer, self.settings.special_tokens)
        fix_date(model.tokenizer, self.settings.template_date)
        set_template_arguments(model.tokenizer, self.settings.chat_template_kwargs or {})
        if study_key(model, self.settings) != self.key:
            raise ExecutorError(
                f"{self.name}: the model, the kind of machine, its threads or the versions of libraries are not those "
                "of where the command was started"
            )
        return partial(replace(self, writer=writer_of(model, self.settings)).do, model)

    def do(self, model: Model, job: WritingBatch | tuple[PlannedRun, dict[str, Any]]) -> dict[str, Any]:
        """What a batch of writing gave, or a run, which comes with what its batches gave by name."""
        if isinstance(job, PromptBatch):
            return job.generate(self.writer or writer_of(model, self.settings), Ledger(meter=Meter(model.device)))
        if not isinstance(job, tuple):
            return job.generate(model, Ledger(meter=Meter(model.device)))
        planned, written = job
        journal = ResultJournal(None)
        journal.add(written)
        is_seen = self.folder.is_dir()
        checkpoints = self.folder / "checkpoints" if is_seen else None
        progress = StudyProgress(self.folder if is_seen else None, self.events)
        has_store = self.store is not None and self.store.is_dir()
        store = ContextStore(self.store, model, self.store_bytes) if self.store is not None and has_store else None
        workspace = Workspace(
            journal, checkpoints, self.checkpoint_s, store, self.writer, progress=progress, kept=self.kept
        )
        return make_run(model, planned, self.settings, workspace) | {"workers": self.workers}


def make_runs(
    executor: Executor,
    start: StudyWorkers,
    model: Model,
    planned: Iterable[PlannedRun],
    journal: ResultJournal,
    *,
    progress: bool = False,
) -> bool:
    """Make the runs that are not in the journal yet, where an executor's workers are, and leave them in WORKERS.

    Args:
        executor: who makes them.
        start: makes a worker.
        model: the same one, loaded in this process.
        planned: from runs.plan().
        journal: what is there already.
        progress: show bars of jobs.

    Returns:
        Whether this process is the one that goes on, with take_in().

    Raises:
        ExecutorError, LockedError, DamagedError: see executors.run_journaled(); and whatever a run raises.
    """
    folder = start.folder / WORKERS
    # Whoever begins the longest job last keeps all waiting: arms that train nothing come last.
    left = [p for p in sorted(planned, key=lambda p: not p.trains) if p.key not in journal.values]
    left = [p for i, p in enumerate(left) if p.key not in {other.key for other in left[:i]}]  # what seeds share, once
    new = {batch.name: batch for p in left for batch in _beforehand(p)}
    new = {name: batch for name, batch in new.items() if name not in journal.values}

    def run(jobs: dict[str, Any], what: str, *, more: bool = False) -> bool:
        named = [Job(name, job, 0, group=name) for name, job in jobs.items()]
        worker = start if isinstance(executor, Ray) else lambda: partial(start.do, model)
        with run_journaled(executor, worker, named, folder, progress=what if progress else "", more=more) as results:
            return results is not None

    run(new, "augmenting", more=True)
    follow(executor)  # until all is written
    there = journal.values | journaled_in(folder, expected=new)
    written = ({batch.name: there[batch.name] for batch in p.batches if batch.name in there} for p in left)
    return run({p.key: (p, its) for p, its in zip(left, written, strict=True)}, "comparing")


def _beforehand(planned: PlannedRun) -> list[WritingBatch]:
    """What is written before a run begins: what it surely needs."""
    if planned.tokens is None:
        return list(planned.batches)
    return [*surely_needed([b for b in planned.batches if isinstance(b, PromptBatch)], planned.tokens)]


def take_in(journal: ResultJournal, folder: Path) -> None:
    """Move what workers left in a study's folder into its journal."""
    if (folder / WORKERS).is_dir():
        found = journaled_in(folder / WORKERS)
        journal.add({key: value for key, value in found.items() if key not in journal.values})
        shutil.rmtree(folder / WORKERS)
