"""Work on one or many processes and machines: jobs, the order they are pulled in, and what is kept of them on disk.

An executor starts workers and gives each jobs until none is left: this process alone, the ranks that torchrun started,
or Ray's actors. A job is done whole by one worker and named by its content, so results do not depend on how many
workers there were, on their order, or on how often they were killed. Knows nothing of models or of what is in a job.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from icl_ft_fast.runtime.durable import ResultJournal, locked
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.runtime.threads import share_cores

Worker = Callable[[Any], Any]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun and its like set
_FOREVER = timedelta(weeks=52)
_log = logging.getLogger(__name__)


class ExecutorError(UserError):
    """Workers that cannot be had, died too often, or do not agree on the work; the message says which."""


@dataclass(frozen=True)
class Job:
    """Something for one worker.

    Attributes:
        name: the same for the same work and for no other, in every run.
        work: what a worker is called with; its result is JSON.
        flops: estimated, without what the group shares. Where all are 0, groups are begun in their order.
        group: jobs of one group share something that a worker makes at the first and keeps for the next.
        start_flops: estimated, of making it.
    """

    name: str
    work: Any
    flops: int
    group: str = ""
    start_flops: int = 0


Start: TypeAlias = Callable[[], Worker]
Ended: TypeAlias = Iterator[tuple[Job, Any]]


class Executor(Protocol):
    """Who works, and where.

    Attributes:
        rank: of this process; 0 is the one that takes locks, says what is to be done and puts results together.
    """

    rank: int

    @property
    def workers(self) -> int | None:
        """Those at work at once; None for as many as a cluster has room for."""

    def run(self, start: Start, jobs: Sequence[Job], done: Collection[str], *, more: bool = False) -> Ended:
        """Yield (job, result) as jobs end; together the processes yield each once, and none before rank 0 begins.

        Args:
            start: makes a worker, in the process that it works in.
            jobs: of the run, the same in every process.
            done: names of those to leave out; rank 0's counts.
            more: the next run is the same workers', who stay.

        Raises:
            ExecutorError: see there; and whatever a worker raises.
        """

    def is_last(self) -> bool:
        """Whether this process goes on: rank 0, once every other has come here too."""


def pull(jobs: Sequence[Job], worker: int, num_workers: int, take: Callable[[int, int], int]) -> Iterator[int]:
    """Yield the indices of the jobs that fall to a worker, who shares nothing with the others but a counter a group.

    It begins in its own part of the groups (parts are equal in FLOPs), so that what a group shares is made by few; then
    it helps wherever more is left than making what is shared would take. Whoever began a group never leaves it before
    its end, so every job is yielded once.

    Args:
        jobs: in the order of the run.
        worker: 0 to num_workers - 1.
        num_workers: of the run.
        take: take(group, n) adds n to the counter of a group and returns what it was before; groups count from 0 in
            order of first appearance.
    """
    groups: dict[str, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.group, []).append(i)
    members = list(groups.values())
    flops = [jobs[its[0]].start_flops + sum(jobs[i].flops for i in its) for its in members]
    middles = [end - own / 2 for end, own in zip(accumulate(flops), flops, strict=True)]
    first = bisect_left(middles, sum(flops) * worker / num_workers)
    for g in (*range(first, len(members)), *range(first)):
        its = members[g]
        taken = take(g, 0)
        if taken and sum(jobs[i].flops for i in its[taken:]) <= jobs[its[0]].start_flops:
            continue
        while (taken := take(g, 1)) < len(its):
            yield its[taken]


class InProcess:
    """One worker: this process."""

    rank, workers = 0, 1

    def run(self, start: Start, jobs: Sequence[Job], done: Collection[str], *, more: bool = False) -> Ended:
        """See Executor."""
        left = [job for job in jobs if job.name not in done]
        worker: Worker | None = None
        for i in pull(left, 0, 1, _Counters().take):
            worker = worker or start()
            yield left[i], worker(left[i].work)

    def is_last(self) -> bool:
        """See Executor."""
        return True


class Torchrun:
    """A worker a rank, as torchrun started them on one or several nodes; their folders are on a shared file system.

    Ranks meet in torch's TCPStore alone, which holds the names of the jobs and the counters they are pulled by: there
    is no process group and no collective. A rank that dies ends the run, which torchrun starts again where it was given
    --max-restarts.
    """

    def __init__(self) -> None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, self.rank, self.workers = next(iter(rendezvous("env://")))
        self._store = PrefixStore(f"icl_ft_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._runs = 0

    def run(self, start: Start, jobs: Sequence[Job], done: Collection[str], *, more: bool = False) -> Ended:
        """See Executor."""
        self._runs += 1
        if self.rank == 0:
            names = [job.name for job in jobs if job.name not in done]
            self._store.set(f"{self._runs}/jobs", json.dumps(names))
        self._store.wait([f"{self._runs}/jobs"], _FOREVER)
        names = json.loads(self._store.get(f"{self._runs}/jobs"))
        mine = {job.name: job for job in jobs}
        if unknown := [name for name in names if name not in mine]:
            raise ExecutorError(
                f"rank {self.rank}: {len(unknown)} of rank 0's {len(names)} jobs are not known here: give every node "
                "the same model, input and options, and for `compare` be of one kind, with equal threads and versions"
            )
        worker: Worker | None = None
        for i in pull([mine[name] for name in names], self.rank, self.workers, self._take):
            worker = worker or start()
            yield mine[names[i]], worker(mine[names[i]].work)

    def _take(self, group: int, n: int) -> int:
        return int(self._store.add(f"{self._runs}/{group}", n)) - n

    def is_last(self) -> bool:
        """See Executor."""
        if self.rank:
            self._store.set(f"{self._runs}/ended/{self.rank}", "")
            return False
        if self.workers > 1:
            self._store.wait([f"{self._runs}/ended/{rank}" for rank in range(1, self.workers)], _FOREVER)
        return True


class Ray:
    """Ray's actors, on this machine or on a cluster; this process sends jobs, and receives and writes what they make.

    Args:
        workers: actors; None for as many as the cluster has room for.
        address: of a cluster, as ray.init() takes it; None starts one here.
        cpus: reserved for an actor, which is also its number of threads.
        gpus: reserved for an actor.

    An actor that dies is started again, on another node if its own is gone, and its job is tried RETRIES times more.

    Raises:
        ExecutorError: ray is not installed.
    """

    rank = 0
    RETRIES = 3

    def __init__(self, workers: int | None, *, address: str | None = None, cpus: int = 1, gpus: int = 0) -> None:
        self.workers = workers or (None if address else max(1, cores() // cpus))
        self.address, self.cpus, self.gpus = address, cpus, gpus
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report what it runs to its makers
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ExecutorError("ray: not installed: pip install 'icl_ft_fast[ray]'") from error
        self._ray, self._actors = ray, list[Any]()

    def run(self, start: Start, jobs: Sequence[Job], done: Collection[str], *, more: bool = False) -> Ended:
        """See Executor."""
        left, stay = [job for job in jobs if job.name not in done], False
        here = {} if self.address else {"num_cpus": self.cpus * (self.workers or 1)}
        try:
            if left and not self._actors:
                self._ray.init(
                    self.address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **here
                )
            if left:
                yield from self._run(start, left)
            stay = more
        finally:
            if (left or self._actors) and not stay:
                self._actors = []
                self._ray.shutdown()

    def _run(self, start: Start, jobs: list[Job]) -> Ended:
        ray, errors = self._ray, self._ray.exceptions
        reserved = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        each, room = ("GPU", self.gpus) if self.gpus else ("CPU", self.cpus)
        workers = self.workers or max(1, int(ray.cluster_resources().get(each, 0) // room))
        make = ray.remote(max_restarts=-1, max_task_retries=self.RETRIES, **reserved)(_Actor)
        self._actors += [make.remote(start) for _ in range(len(self._actors), min(workers, len(jobs)))]
        actors = self._actors
        counters, running = _Counters(), dict[Any, tuple[int, int]]()
        pulls = [pull(jobs, a, len(actors), counters.take) for a in range(len(actors))]

        def give(a: int) -> None:
            if (i := next(pulls[a], None)) is not None:
                running[actors[a].do.remote(jobs[i].work)] = a, i

        for a in range(len(actors)):
            give(a)
        while running:
            (ready,), _ = ray.wait(list(running))
            a, i = running.pop(ready)
            try:
                result = ray.get(ready)
            except errors.RayTaskError as error:  # what the worker raised
                raise error.cause from None
            except errors.RayActorError as error:
                why = str(error).strip().splitlines()[-1]
                raise ExecutorError(f"ray: the worker of job {jobs[i].name} died: {why}") from error
            give(a)
            yield jobs[i], result

    def is_last(self) -> bool:
        """See Executor."""
        return True


class _Actor:
    def __init__(self, start: Callable[[], Worker]) -> None:
        share_cores()  # a process of its own, as a command is
        self._worker = start()

    def do(self, work: Any) -> Any:
        return self._worker(work)


class _Counters(dict[int, int]):
    """Counters of groups in this process's memory."""

    def take(self, group: int, n: int) -> int:
        before = self.get(group, 0)
        self[group] = before + n
        return before


def follow(executor: Executor) -> None:
    """Wait until rank 0 has come here: a run of no jobs, which none begins before it."""
    for _ in executor.run(lambda: str, [], (), more=True):
        pass


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun or its like started: the one that talks."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process.

    Clusters set some of them without a launcher; that counts where there is more than one process.

    Raises:
        ExecutorError: WORLD_SIZE says several processes, and a variable that they would need is not set.
    """
    missing = [name for name in LAUNCHER if not os.environ.get(name)]
    size = os.environ.get("WORLD_SIZE") or "1"
    if missing and size != "1":
        raise ExecutorError(
            f"WORLD_SIZE is {size} in the environment, and {', '.join(missing)} not set: start the command with "
            "torchrun, or unset WORLD_SIZE to run alone"
        )
    return not missing


def threads_wanted() -> int | None:
    """Threads that OMP_NUM_THREADS asks for, as OpenMP reads it (4, or 4,2 by level); None where it asks for none."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def run_journaled(
    executor: Executor, start: Start, jobs: Sequence[Job], folder: Path, *, progress: str = "", more: bool = False
) -> Iterator[list[Any] | None]:
    """Do the jobs that have no result in `folder` yet, and keep each result there as it comes.

    Every process that writes has a file of its own in the folder, a line a job, on the disk before the next. What a
    kill cut short is done again; what has a line is not. Results of other jobs in the folder are left alone.

    Args:
        executor: who does them.
        start: makes a worker.
        jobs: all of the run's.
        folder: made when missing, and locked during the block.
        progress: what a bar of jobs is called; "" shows none. Rank 0's own is shown.
        more: see Executor.run().

    Returns:
        For the block, the jobs' results; None in processes of other rank than 0.

    Raises:
        LockedError: another run is at work in this folder.
        DamagedError: a line in it is not what was written.
        ExecutorError, and whatever a worker raises.
    """
    with locked(folder / ".lock") if executor.rank == 0 else nullcontext():
        names = {job.name for job in jobs}
        done = names & journaled_in(folder, tell=True).keys() if executor.rank == 0 else set()
        kept = ResultJournal(folder / f"{socket.gethostname()}-{os.getpid()}.jsonl")
        shown = bool(progress) and executor.rank == 0
        with Activity(progress, total=len(names), unit="job", initial=len(done), shown=shown) as bar:
            for job, result in executor.run(start, jobs, done, more=more):
                kept.add({job.name: result})
                bar.update()
        if not executor.is_last():
            yield None
            return
        found = journaled_in(folder, expected=names)
        yield [found[job.name] for job in jobs]


def journaled_in(folder: Path, *, expected: Collection[str] = (), tell: bool = False) -> dict[str, Any]:
    """Results by job name in the files of a folder.

    Args:
        folder: of run_journaled().
        expected: names that must be there.
        tell: which file ends in a line that was cut short.

    Raises:
        ExecutorError: a name that is not there.
        DamagedError: see run_journaled().
    """
    kept: dict[str, Any] = {}
    for path in sorted(folder.glob("*.jsonl")):
        if tell and path.read_bytes()[-1:] not in (b"", b"\n"):
            _log.warning("%s: its last line was cut short by a kill; that part is done again", path)
        kept |= ResultJournal(path).values
    if lost := set(expected) - kept.keys():
        raise ExecutorError(f"{folder}: {len(lost)} results are not seen here; all nodes must share the folder")
    return kept
