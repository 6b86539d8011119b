"""What a study's processes are at, as files in its folder: read from another terminal, and where it is told to pause.

Each process writes a file of its own, whole at each change, so that several can on a disk that machines share. The
folder goes when the study ends well; a finished study's results.json says the rest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from icl_ft_fast.runtime.durable import is_locked, replacing
from icl_ft_fast.runtime.errors import UserError

PROGRESS, PLAN, PAUSED = "progress", "plan.json", "paused"
LOOK_S = 1.0  # between looks at whether a pause has ended
STEP_S = 2.0  # between a training's steps that are told


class StatusError(UserError):
    """A folder without a study; the message names it."""


@dataclass(frozen=True)
class StudyProgress:
    """Where a process says what it is at.

    Attributes:
        folder: of the study; None to say nothing, also where the folder is on another machine.
        events: what this process has begun, the latest last.
    """

    folder: Path | None
    events: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, arms: Sequence[str], seeds: Sequence[int], trained: Sequence[str] = ()) -> None:
        """Say what is to be run, and which arms train, before anything is; whoever begins again ends a pause."""
        if self.folder is not None:
            (self.folder / PROGRESS / PAUSED).unlink(missing_ok=True)
            plan = {"arms": list(arms), "seeds": list(seeds), "trained": list(trained), "began": time.time()}
            _write(self.folder / PROGRESS / PLAN, plan)

    def end(self) -> None:
        """Take it all away: the study has ended well."""
        if self.folder is not None:
            shutil.rmtree(self.folder / PROGRESS, ignore_errors=True)

    @contextmanager
    def running(self, arm: str, seed: int) -> Iterator[Callable[[int, int], None]]:
        """Say that a run is made, after any pause, and how it ended; to be called with correct and total answers."""
        self._wait()
        event: dict[str, Any] = {"arm": arm, "seed": seed, "began": time.time()}
        self.events.append(event)
        self._tell()

        def ended(correct: int, total: int) -> None:
            event.update(ended=time.time(), correct=correct, total=total)

        try:
            yield ended
        except BaseException as error:
            event["error"] = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._tell()

    def step(self, done: int, total: int) -> None:
        """Say how far the training of the run that this process makes is."""
        if self.folder is None:
            return
        event, now = self.events[-1], time.time()
        event.setdefault("stepping", [done, now])
        if now - event.get("at", [0, 0, 0])[2] >= STEP_S or done == total:
            event["at"] = [done, total, now]
            self._tell()

    def _wait(self) -> None:
        """Begin nothing while the study is paused."""
        while self.folder is not None and (self.folder / PROGRESS / PAUSED).exists():
            time.sleep(LOOK_S)

    def _tell(self) -> None:
        if self.folder is not None and self.folder.is_dir():
            _write(self.folder / PROGRESS / f"{socket.gethostname()}-{os.getpid()}.json", {"events": self.events})


def _write(path: Path, value: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value), encoding="utf-8")


@dataclass(frozen=True)
class Status:
    """What a study is at.

    Attributes:
        state: "starting" (the model is loaded), "running", "measuring" (all runs are done; what a query takes is
            measured), "paused", "stopped" (nobody is at work; the same command resumes) or "finished".
        planned, done: runs, an arm under a seed each.
        running: (arm, seed, seconds so far, training steps done, steps in all); 0 and 0 where nothing is trained yet.
        accuracy: by arm, correct and total answers so far.
        seconds_left: by what runs of the same arm took, or will by their steps, else of arms that train or do not, over
            the processes at work; runs without training count from the first one's end on. None before that is known
            of one that trains.
        error: of the last run that failed since the study was begun or resumed; "" for none.
    """

    state: str
    planned: int
    done: int
    running: tuple[tuple[str, int, float, int, int], ...]
    accuracy: dict[str, tuple[int, int]]
    seconds_left: float | None
    error: str


def status_of(folder: Path) -> Status:
    """Read what a study is at, from any machine that sees its folder.

    Raises:
        StatusError: no study was begun there.
    """
    plan, results = _read(folder / PROGRESS / PLAN), _read(folder / "results.json")
    if not plan and not results and is_locked(folder / ".lock"):
        return Status("starting", 0, 0, (), {}, None, "")
    if not plan and not results:
        raise StatusError(f"{folder}: no study was begun here; expected the --out of compare")
    settings = plan or results.get("settings", {})
    planned = [(arm, seed) for seed in settings.get("seeds", ()) for arm in settings.get("arms", ())]
    files = sorted((folder / PROGRESS).glob("*-*.json"))
    events = sorted((e for file in files for e in _read(file).get("events", ())), key=lambda e: e["began"])
    counts: dict[tuple[str, int], tuple[int, int]] = {}
    for run in results.get("runs", ()):
        some = run["accuracy"].values()
        counts[run["arm"], run["seed"]] = sum(a["correct"] for a in some), sum(a["total"] for a in some)
    counts |= {(e["arm"], e["seed"]): (e["correct"], e["total"]) for e in events if "ended" in e}
    is_held, now = is_locked(folder / ".lock"), time.time()
    since = plan.get("began", 0.0)  # of what was begun before that, the processes are gone
    latest = {(e["arm"], e["seed"]): e for e in events if e["began"] >= since}  # another took on what a killed one left
    at_work = [e for e in latest.values() if is_held and not {"ended", "error"} & e.keys()]
    accuracy: dict[str, tuple[int, int]] = {}
    for (arm, _), (correct, total) in counts.items():
        before = accuracy.get(arm, (0, 0))
        accuracy[arm] = before[0] + correct, before[1] + total
    state = "finished" if set(planned) <= counts.keys() and not plan else "running" if is_held else "stopped"
    if state == "running" and set(planned) <= counts.keys():
        state = "measuring"
    elif state == "running" and (folder / PROGRESS / PAUSED).exists():
        state = "paused"
    errors = [e["error"] for e in events if "error" in e and e["began"] >= since]
    return Status(
        state,
        len(planned),
        len(set(planned) & counts.keys()),
        tuple((e["arm"], e["seed"], now - e["began"], *e.get("at", (0, 0))[:2]) for e in at_work),
        accuracy,
        _seconds_left([key for key in planned if key not in counts], events, at_work, now, plan.get("trained", ())),
        errors[-1] if errors else "",
    )


def _seconds_left(
    left: Sequence[tuple[str, int]],
    events: Sequence[dict[str, Any]],
    at_work: Sequence[dict[str, Any]],
    now: float,
    trained: Sequence[str],
) -> float | None:
    """By the mean of the arm's runs, or of its kind's where it has none, less what those at work have had."""
    took: dict[str, list[float]] = {}
    for event in events:
        if "ended" in event:
            took.setdefault(event["arm"], []).append(event["ended"] - event["began"])
    for event in at_work:
        (done, total, told), (first, since) = event.get("at", (0, 0, 0)), event.get("stepping", (0, 0))
        if done > first:  # as fast as since its first step, or since it was resumed
            whole = told - event["began"] + (total - done) * (told - since) / (done - first)
            took.setdefault(event["arm"], []).append(whole)
    if not left:
        return 0.0
    of_kind = {
        kind: [s for arm, some in took.items() if (arm in trained) == kind for s in some] for kind in (True, False)
    }
    unknown = {arm in trained for arm, _ in left if arm not in took and not of_kind[arm in trained]}
    if not took or True in unknown:
        return None
    needed = {key: fmean(took.get(key[0]) or of_kind[key[0] in trained] or [0.0]) for key in left}
    for event in at_work:
        key = event["arm"], event["seed"]
        if key in needed:
            needed[key] = max(0.0, needed[key] - (now - event["began"]))
    return math.fsum(needed.values()) / max(1, len(at_work))


def set_paused(folder: Path, paused: bool) -> None:
    """Let a study begin no new run, or go on.

    Raises:
        StatusError: no study is at work there.
    """
    if not (folder / PROGRESS / PLAN).exists() or not is_locked(folder / ".lock"):
        raise StatusError(f"{folder}: no study is at work here; expected the --out of compare")
    path = folder / PROGRESS / PAUSED
    if paused:
        _write(path, {"since": time.time()})
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none, or one that another version wrote."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StatusError(f"{path}: not UTF-8 JSON: {error}") from error
    return found if isinstance(found, dict) else {}
