"""A study's runs as tasks of an executor, which ends with the results of one process in the time of several.

First the model's augmentations are written, a task a call of the engine, then the arms are run, a task each: whoever
trains on an augmentation finds it written. What workers made is on the disk, in PARTS beside what the study keeps, and
is taken in when all is there; compare() then goes on as after a kill, and finds every run made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
Job: TypeAlias = Part | Planned


@dataclass(frozen=True)
class Runner:
    """A worker: writes parts of augmentations and makes runs, each alone in its process.

    Attributes:
        model: from load().
        settings: of the study.
        at: where runs find what was made before.
        workers: see compare.Run.
    """

    model: Model
    settings: Settings
    at: At
    workers: int | None

    def __call__(self, job: Job) -> dict[str, Any]:
        """What is kept of a job."""
        if isinstance(job, Part):
            return job.write(self.model, Ledger(meter=Meter(self.model.device)))
        return make_run(self.model, job, self.settings, self.at) | {"workers": self.workers}


@dataclass(frozen=True)
class RunnerElsewhere:
    """Makes a Runner in another process, perhaps on another machine.

    Attributes:
        name, loading: what load() is called with.
        key: study_key() where the command was started.
        settings, workers: of the Runner.
        folder: of the study. Checkpoints are written there where it is seen.
        checkpoint_s: seconds between them.
        found: augmentations that are written, by name.
    """

    name: str
    loading: dict[str, Any]
    key: str
    settings: Settings
    workers: int | None
    folder: Path
    checkpoint_s: float
    found: dict[str, Any] = field(default_factory=dict)

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
        kept = Kept(None)
        kept.add(self.found)
        checkpoints = self.folder / "checkpoints" if self.folder.is_dir() else None
        return Runner(model, self.settings, At(kept, checkpoints, self.checkpoint_s), self.workers)


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
    folder, settings = elsewhere.folder / PARTS, elsewhere.settings
    # Whoever begins the longest last keeps all waiting: arms that train nothing come last.
    runs = {one.key: one for one in sorted(plans, key=lambda one: one.arm in ("base", "icl"))}
    left = [one for one in runs.values() if one.key not in kept.values]
    parts = {part.name: part for one in left for part in one.parts(model, settings)}

    def with_parts() -> RunnerElsewhere:
        there = kept.values | kept_in(folder)
        return replace(elsewhere, found={name: there[name] for name in parts if name in there})

    goes_on = False
    for what, jobs in (("augmenting", parts), ("comparing", runs)):
        listed = [Task(name, job, 0, group=name) for name, job in jobs.items() if name not in kept.values]
        start = with_parts() if isinstance(executor, Ray) else lambda: with_parts().of(model)
        with run_kept(executor, start, listed, folder, progress=what if progress else "") as results:
            goes_on = results is not None
    return goes_on


def take_in(kept: Kept, folder: Path) -> None:
    """Keep what workers left in a study's folder, and nowhere else."""
    if (folder / PARTS).is_dir():
        kept.add({key: value for key, value in kept_in(folder / PARTS).items() if key not in kept.values})
        shutil.rmtree(folder / PARTS)
