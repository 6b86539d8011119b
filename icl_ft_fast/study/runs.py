"""A study's runs as jobs of an executor, which ends with the results of one process in the time of several.

First the model's augmentations are written, a job a call of the engine, then the arms are run, a job each: whoever
trains on an augmentation finds it written. What workers made is on the disk, in PARTS beside what the study keeps, and
is taken in when all is there; compare() then goes on as after a kill, and finds every run made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from icl_ft_fast.augmentation import PromptBatch
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model, load
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
from icl_ft_fast.study.compare import At, Planned, Settings, make_run, study_key

PARTS = "parts"


@dataclass(frozen=True)
class Runs:
    """Makes workers of a study, in this process or another, perhaps on another machine.

    Attributes:
        name, loading: what load() is called with.
        key: study_key() where the command was started.
        settings: of the study.
        workers: see compare.Run.
        folder: of the study; checkpoints are written there where it is seen.
        checkpoint_s: seconds between them.
    """

    name: str
    loading: dict[str, Any]
    key: str
    settings: Settings
    workers: int | None
    folder: Path
    checkpoint_s: float

    def __call__(self) -> Worker:
        """A worker elsewhere, that loads its own model; raises ExecutorError where that or the machine is another."""
        model = load(self.name, **self.loading)
        if study_key(model, self.settings) != self.key:
            raise ExecutorError(
                f"{self.name}: the model, the kind of machine, its threads or the versions of libraries are not those "
                "of where the command was started"
            )
        return partial(self.do, model)

    def do(self, model: Model, job: PromptBatch | tuple[Planned, dict[str, Any]]) -> dict[str, Any]:
        """What is kept of a part of an augmentation, or of a run, which comes with its parts by name."""
        if isinstance(job, PromptBatch):
            return job.generate(model, Ledger(meter=Meter(model.device)))
        planned, parts = job
        kept = ResultJournal(None)
        kept.add(parts)
        at = At(kept, self.folder / "checkpoints" if self.folder.is_dir() else None, self.checkpoint_s)
        return make_run(model, planned, self.settings, at) | {"workers": self.workers}


def make_runs(
    executor: Executor,
    start: Runs,
    model: Model,
    plans: Iterable[Planned],
    kept: ResultJournal,
    *,
    progress: bool = False,
) -> bool:
    """Make the runs that are not kept yet, where an executor's workers are, and leave them in PARTS.

    Args:
        executor: who makes them.
        start: makes a worker.
        model: the same one, loaded in this process.
        plans: from compare.plan().
        kept: what is there already.
        progress: show bars of jobs.

    Returns:
        Whether this process is the one that goes on, with take_in().

    Raises:
        ExecutorError, LockedError, DamagedError: see executors.run_journaled(); and whatever a run raises.
    """
    folder = start.folder / PARTS
    # Whoever begins the longest last keeps all waiting: arms that train nothing come last.
    left = [p for p in sorted(plans, key=lambda p: p.arm in ("base", "icl")) if p.key not in kept.values]
    parts = {p.key: p.parts(model, start.settings) for p in left}
    new = {part.name: part for its in parts.values() for part in its if part.name not in kept.values}

    def run(jobs: dict[str, Any], what: str, *, more: bool = False) -> bool:
        named = [Job(name, work, 0, group=name) for name, work in jobs.items()]
        worker = start if isinstance(executor, Ray) else lambda: partial(start.do, model)
        with run_journaled(executor, worker, named, folder, progress=what if progress else "", more=more) as results:
            return results is not None

    run(new, "augmenting", more=True)
    follow(executor)  # until all is written
    there = kept.values | journaled_in(folder, expected=new)
    return run({p.key: (p, {part.name: there[part.name] for part in parts[p.key]}) for p in left}, "comparing")


def take_in(kept: ResultJournal, folder: Path) -> None:
    """Keep what workers left in a study's folder, and nowhere else."""
    if (folder / PARTS).is_dir():
        kept.add({key: value for key, value in journaled_in(folder / PARTS).items() if key not in kept.values})
        shutil.rmtree(folder / PARTS)
