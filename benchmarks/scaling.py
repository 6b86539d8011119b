"""How scoring scales with workers: measured for one and two, and from the measured costs simulated for up to 256.

    python -m benchmarks.scaling measure    # one worker, then two, a thread each: benchmarks/results/scaling.json
    python -m benchmarks.scaling            # docs/executors.svg and the tables of docs/executors.md, from that file

The simulation gives the shards of a workload, as `score` cuts them, to workers by the rule that the executors follow
(executors.pull). A worker starts up; it forwards a shard's stem unless it holds it; it scores the shard; each look at a
counter takes a round trip. What it leaves out: network and disk are never busy, workers are alike, and none fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np
import torch

import icl_ft_fast as iff
from benchmarks import readme
from benchmarks.score import SIZES, save_model
from benchmarks.timing import machine
from icl_ft_fast.engine import encoding, shards
from icl_ft_fast.engine.flops import Work, work_of
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.runtime.executors import InProcess, Job, Torchrun, pull, run_journaled
from icl_ft_fast.tasks.reversals import simple_reversals

MEASURED = readme.RESULTS / "scaling.json"
CHART = readme.ROOT / "docs" / "executors.svg"
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Questions over contexts of random tokens. A context's first QUESTIONS are cut as `score` cuts them, and their shards
# repeated until there are TOTAL questions, so that a workload of any size is made in a moment.
QUESTIONS, TOTAL, CHOICES, PROMPT, CHOICE, CONTEXT = 800, 204_800, 2, 16, 8, 2000
WORKLOADS = {"256 contexts": 256, "16 contexts": 16, "one context": 1}


@dataclass(frozen=True)
class Costs:
    """Seconds with one thread: of start-up, of a look at a counter, and of a FLOP of a shard's and of a stem's."""

    startup_s: float
    pull_s: float
    shard_s_per_flop: float
    stem_s_per_flop: float


def simulate(
    jobs: Sequence[Job],
    seconds: Sequence[float],
    stem_seconds: Mapping[str, float],
    workers: int,
    *,
    startup_s: float = 0.0,
    pull_s: float = 0.0,
) -> float:
    """Seconds until the last of so many workers ends.

    Args:
        jobs: of the run.
        seconds: of each job, behind its stem.
        stem_seconds: of each group's stem.
        workers: how many.
        startup_s: of each worker.
        pull_s: of each look at a counter.
    """
    counters: Counter[int] = Counter()
    looks = 0

    def take(group: int, n: int) -> int:
        nonlocal looks
        looks += 1
        counters[group] += n
        return counters[group] - n

    pulls = [pull(jobs, worker, workers, take) for worker in range(workers)]
    holds: list[str | None] = [None] * workers
    free, last = [(startup_s, worker) for worker in range(workers)], startup_s
    heapify(free)
    while free:
        now, worker = heappop(free)
        looks = 0
        i = next(pulls[worker], None)
        now += looks * pull_s
        last = max(last, now)
        if i is not None:
            stem = 0.0 if holds[worker] == jobs[i].group else stem_seconds[jobs[i].group]
            holds[worker] = jobs[i].group
            heappush(free, (now + stem + seconds[i], worker))
    return last


def costs_of(measured: Mapping[str, Any]) -> Costs:
    """What one worker took; only the shards that forwarded their stem tell what stems cost."""
    rows = measured["one"]["shards"]
    stems = [row for row in rows if row["prefill_s"]]
    return Costs(
        startup_s=measured["one"]["startup_s"],
        pull_s=measured["pull_s"],
        shard_s_per_flop=sum(row["query_s"] for row in rows) / sum(row["flops"] for row in rows),
        stem_s_per_flop=sum(row["prefill_s"] for row in stems) / sum(row["start_flops"] for row in stems),
    )


def predicted(jobs: Sequence[Job], costs: Costs, workers: int) -> float:
    """simulate() with these costs."""
    seconds = [costs.shard_s_per_flop * job.flops for job in jobs]
    stems = {job.group: costs.stem_s_per_flop * job.start_flops for job in jobs}
    return simulate(jobs, seconds, stems, workers, startup_s=costs.startup_s, pull_s=costs.pull_s)


def workload(num_contexts: int, work: Work) -> list[Job]:
    """The shards of TOTAL questions, evenly over so many contexts."""
    rng = np.random.default_rng(0)
    context = [0, *rng.integers(2, 8000, CONTEXT - 1).tolist()]
    requests = []
    for _ in range(QUESTIONS):
        whole = context + rng.integers(2, 8000, PROMPT).tolist()
        requests += [(whole, rng.integers(2, 8000, CHOICE).tolist()) for _ in range(CHOICES)]
    jobs = shards.jobs_of(requests, shards.cut(requests, work), work, {})
    repeats = TOTAL // QUESTIONS // num_contexts
    return [
        replace(job, name=f"{n}.{repeat}.{job.name}", group=str(n))
        for n in range(num_contexts)
        for repeat in range(repeats)
        for job in jobs
    ]


def table() -> str:
    """What was measured, what the simulation says of it, and its efficiency by workload and workers."""
    measured = json.loads(MEASURED.read_text())
    costs, one, two = costs_of(measured), measured["one"], measured["two"]
    jobs = [Job(row["name"], None, row["flops"], row["group"], row["start_flops"]) for row in one["shards"]]
    stems: dict[str, float] = {}
    for row in one["shards"]:
        stems[row["group"]] = max(stems.get(row["group"], 0.0), row["prefill_s"])
    seconds = [row["query_s"] for row in one["shards"]]
    expected = [simulate(jobs, seconds, stems, workers, pull_s=measured["pull_s"]) for workers in (1, 2)]

    def against(a: float, b: float) -> str:
        return f"{a:.1f} and {b:.1f} s, {a / b:.2f} times as fast"

    device, date = measured["machine"]["device"], measured["machine"]["date"]
    lines = [
        f"Measured on {device} ({date}), {measured['what']}, one thread a worker. One worker and two: "
        f"{against(one['seconds'], two['seconds'])}; with start-up {against(one['command_s'], two['command_s'])}. "
        f"The simulation, from the shards' own seconds: {against(*expected)}.",
        "",
        f"Costs of a worker there: start-up {costs.startup_s:.1f} s; a look at a counter {costs.pull_s * 1e6:.0f} us; "
        f"1 s for each {1e-9 / costs.shard_s_per_flop:.0f} GFLOP of shards and {1e-9 / costs.stem_s_per_flop:.0f} "
        f"GFLOP of stems. With them, {TOTAL:,} questions of {CHOICES} choices over contexts of {CONTEXT:,} tokens:",
        "",
        "| seconds (efficiency) | shards | " + " | ".join(f"{workers}" for workers in WORKERS) + " |",
        "|---" * (len(WORKERS) + 2) + "|",
    ]
    for name, (shards_of, times) in curves(measured).items():
        cells = [f"{s:,.0f} ({times[0] / (w * s):.0%})" for w, s in zip(WORKERS, times, strict=True)]
        lines.append(f"| {name} | {shards_of} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curves(measured: Mapping[str, Any]) -> dict[str, tuple[int, list[float]]]:
    """For each workload its number of shards, and seconds by number of workers."""
    work, costs = Work(**measured["work"]), costs_of(measured)
    found = {}
    for name, num_contexts in WORKLOADS.items():
        jobs = workload(num_contexts, work)
        found[name] = len(jobs), [predicted(jobs, costs, workers) for workers in WORKERS]
    return found


def chart(measured: Mapping[str, Any]) -> str:
    """The efficiency curves as SVG."""
    import matplotlib as mpl

    from icl_ft_fast.report.charts import LIGHT, MARKS, STYLE, Chart, _axes, svg

    with mpl.rc_context(STYLE):
        figure, axes = _axes(6.0, 3.4)
        for n, (name, (_, times)) in enumerate(curves(measured).items()):
            efficiency = [times[0] / (w * s) for w, s in zip(WORKERS, times, strict=True)]
            axes.plot(WORKERS, efficiency, marker=MARKS[n], color=LIGHT[f"arm{n + 1}"], markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set(ylim=(0, 1.05), xlabel="workers", ylabel="efficiency")
        axes.set_xticks(WORKERS, [str(workers) for workers in WORKERS])
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.legend(loc="lower left")
    told = "simulated efficiency by number of workers"
    page = svg(Chart("executors", told, told, figure))
    return page.replace("<svg ", '<svg style="background: #fff" ', 1)


def measure() -> None:
    """Run one worker and two on two contexts, each a command of its own, and keep what they tell."""
    with tempfile.TemporaryDirectory() as folder:
        tasks = [simple_reversals(seed, num_facts=500, num_articles=1) for seed in (0, 1)]
        contexts = [icl_context(task.documents) for task in tasks]
        pairs = [
            [context + question.prompt, choice]
            for task, context in zip(tasks, contexts, strict=True)
            for question in task.questions
            for choice in question.choices
        ]
        save_model(Path(folder) / "model", SIZES["30M"], [text for pair in pairs[::50] for text in pair])
        (Path(folder) / "pairs.json").write_text(json.dumps(pairs))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        told = {}
        for name, launcher in (("one", []), ("two", torchrun)):
            command = [sys.executable, *launcher, "-m", "benchmarks.scaling", "worker", folder, str(time.time())]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            told[name] = json.loads(done.stdout.splitlines()[-1])
    if told["one"].pop("logp") != told["two"].pop("logp"):
        raise AssertionError("two workers' log-likelihoods are not one worker's")
    work = told["one"].pop("work")
    told["two"].pop("work")
    what = f"30M float32 Llama, {len(pairs):,} requests over two contexts"
    kept = {"machine": machine(), "what": what, "pull_s": told["two"]["pull_s"], "work": work, **told}
    MEASURED.write_text(json.dumps(kept, indent=1) + "\n")


def worker(folder: Path, began: float) -> None:
    """Score the pairs in this process or, under torchrun, with the other ranks; rank 0 prints what it took."""
    executor = Torchrun() if "RANK" in os.environ else InProcess()
    pull_s = 0.0
    if isinstance(executor, Torchrun):
        start = time.perf_counter()
        for _ in range(200):
            executor._take(-1, 1)
        pull_s = (time.perf_counter() - start) / 200
    model = iff.load(folder / "model")
    requests = encoding.encode_pairs(
        model.tokenizer, [tuple(pair) for pair in json.loads((folder / "pairs.json").read_text())]
    )
    work = work_of(model)
    cuts = shards.cut(requests, work)
    jobs = shards.jobs_of(requests, cuts, work, {"model": model.fingerprint()})
    startup_s, start = time.time() - began, time.perf_counter()
    kept = folder / f"shards-{getattr(executor, 'size', 1)}"
    with run_journaled(executor, lambda: shards.Scorer(model), jobs, kept) as results:
        if results is None:
            return
        rows = []
        for job, found in zip(jobs, results, strict=True):
            spent = found["ledger"]["phases"]
            row = {"name": job.name, "flops": job.flops, "group": job.group, "start_flops": job.start_flops}
            row |= {f"{phase}_s": spent[phase]["wall_s"] if phase in spent else 0.0 for phase in ("prefill", "query")}
            rows.append(row)
        logp = [result.logp for result in shards.in_order(cuts, results)]
    told = {"startup_s": startup_s, "seconds": time.perf_counter() - start, "command_s": time.time() - began}
    shape = {name: getattr(work, name) for name in work.__dataclass_fields__}
    print(json.dumps(told | {"pull_s": pull_s, "shards": rows, "logp": logp, "work": shape}))


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["worker"]:
        torch.set_num_threads(1)
        worker(Path(sys.argv[2]), float(sys.argv[3]))
    elif sys.argv[1:2] == ["measure"]:
        measure()
    else:
        CHART.write_text(chart(json.loads(MEASURED.read_text())))
        sys.argv[1:] = ["scaling"]
        readme.main()


if __name__ == "__main__":
    main()
