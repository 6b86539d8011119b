"""A study's runs as tasks of an executor, which ends with the results of one process in the time of several.

First the model's augmentations are written, a task a call of the engine, then the arms are run, a task each: whoever
trains on an augmentation finds it written. What workers made is on the disk, in PARTS beside what the study keeps, and
is taken in when all is there; compare() then goes on as after a kill, and finds every run made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from icl_ft_fast.augment import Part
from icl_ft_fast.compare import At, Planned, Settings, make_run, study_key
from icl_ft_fast.cost import Ledger
from icl_ft_fast.cost.meters import Meter
from icl_ft_fast.durable import Kept
from icl_ft_fast.executors import Executor, ExecutorError, Ray, Task, kept_in, run_kept
from icl_ft_fast.model import Model, load

PARTS = "parts"
Job: TypeAlias = Part | tuple[Planned, dict[str, Any]]


@dataclass(frozen=True)
class Runner:
    """A worker: writes parts of augmentations and makes runs, each alone in its process.

    Attributes:
        model: from load().
        settings: of the study.
        workers: see compare.Run.
        checkpoints, checkpoint_s: see compare.compare().
    """

    model: Model
    settings: Settings
    workers: int | None
    checkpoints: Path | None
    checkpoint_s: float

    def __call__(self, job: Job) -> dict[str, Any]:
        """What is kept of a part, or of a run that comes with its parts by name."""
        if isinstance(job, Part):
            return job.write(self.model, Ledger(meter=Meter(self.model.device)))
        planned, parts = job
        kept = Kept(None)
        kept.add(parts)
        made = make_run(self.model, planned, self.settings, At(kept, self.checkpoints, self.checkpoint_s))
        return made | {"workers": self.workers}


@dataclass(frozen=True)
class RunnerElsewhere:
    """Makes a Runner in another process, perhaps on another machine.

    Attributes:
        name, loading: what load() is called with.
        key: study_key() where the command was started.
        settings, workers, checkpoint_s: of the Runner.
        folder: of the study; checkpoints are written there where it is seen.
    """

    name: str
    loading: dict[str, Any]
    key: str
    settings: Settings
    workers: int | None
    folder: Path
    checkpoint_s: float

    def __call__(self) -> Runner:
        """Load, check, make."""
        model = load(self.name, **self.loading)
        if study_key(model, self.settings) != self.key:
            raise ExecutorError(
                f"{self.name}: the model, the kind of machine, its threads or the versions of libraries are not those "
                "of where the command was started"
            )
        return self.of(model)

    def of(self, model: Model) -> Runner:
        """A Runner of a model that is loaded already."""
        checkpoints = self.folder / "checkpoints" if self.folder.is_dir() else None
        return Runner(model, self.settings, self.workers, checkpoints, self.checkpoint_s)


def make_runs(
    executor: Executor,
    elsewhere: RunnerElsewhere,
    model: Model,
    plans: Iterable[Planned],
    kept: Kept,
    *,
    progress: bool = False,
) -> bool:
    """Make the runs that are not kept yet, where an executor's workers are, and leave them in PARTS.

    Args:
        executor: who makes them.
        elsewhere: makes a worker.
        model: the same one, loaded in this process.
        plans: from compare.plan().
        kept: what is there already.
        progress: show bars of tasks.

    Returns:
        Whether this process is the one that goes on, with take_in().

    Raises:
        ExecutorError, LockedError, DamagedError: see executors.run_kept(); and whatever a run raises.
    """
    folder, start = elsewhere.folder / PARTS, elsewhere if isinstance(executor, Ray) else partial(elsewhere.of, model)
    # Whoever begins the longest last keeps all waiting: arms that train nothing come last.
    left = [p for p in sorted(plans, key=lambda p: p.arm in ("base", "icl")) if p.key not in kept.values]
    parts = {planned.key: planned.parts(model, elsewhere.settings) for planned in left}
    new = {part.name: part for its in parts.values() for part in its if part.name not in kept.values}

    def run(jobs: Mapping[str, Job], what: str, *, more: bool = False) -> bool:
        tasks = [Task(name, job, 0, group=name) for name, job in jobs.items()]
        with run_kept(executor, start, tasks, folder, progress=what if progress else "", more=more) as results:
            return results is not None

    run(new, "augmenting", more=True)
    executor.begin()  # when all is written
    there = kept.values | kept_in(folder, expected=new)
    return run({p.key: (p, {part.name: there[part.name] for part in parts[p.key]}) for p in left}, "comparing")


def take_in(kept: Kept, folder: Path) -> None:
    """Keep what workers left in a study's folder, and nowhere else."""
    if (folder / PARTS).is_dir():
        kept.add({key: value for key, value in kept_in(folder / PARTS).items() if key not in kept.values})
        shutil.rmtree(folder / PARTS)
