"""Scoring and training with and without another process beside it, for each way in which OpenMP's threads may wait.

libgomp reads its variables once, when torch loads it, so that every figure comes from a process of its own. The process
beside it multiplies matrices with as many threads as there are cores, and waits as libgomp does by default. Every
setting must come to the same log-likelihoods or losses before anything is reported.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.smollm2 import smollm2
from benchmarks.timing import Row
from icl_ft_fast.runtime.threads import SPIN_BESIDE, SPIN_VARIABLE, WAIT_VARIABLES

COMMAND = "as in a command"  # by share_cores()
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    COMMAND: {},
    f"spin {SPIN_BESIDE}": {SPIN_VARIABLE: SPIN_BESIDE},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
ROUNDS = 9
SHARING = """from icl_ft_fast.runtime.threads import share_cores
share_cores()
import runpy
runpy.run_module("benchmarks.contention", run_name="__main__")"""
BESIDE = "import os, torch\nn = os.cpu_count()\ntorch.set_num_threads(n)\na = torch.randn(512, 512)\nwhile True: a @ a"


def models() -> dict[str, str]:
    """Names and what load() is given: the shipped model, and SmolLM2 where its package is installed."""
    file = smollm2()
    return {"shipped": "shipped"} | ({} if file is None else {"SmolLM2": str(file)})


def run(quick: bool, work: str | None = None) -> list[Row]:
    """Milliseconds of a call or a step, and how many times the quiet default's they are.

    Args:
        quick: a tenth of the context, three calls, and only the first two settings.
        work: score or train; None for both.
    """
    rows = []
    for name, model in models().items():
        for task in (work,) if work else ("score", "train"):
            made: dict[tuple[str, str], list[float]] = {}
            for where in ("quiet", "beside"):
                for setting in list(SETTINGS)[: 2 if quick else None]:
                    made[where, setting] = _measured(task, model, setting, quick, beside=where == "beside")
            results = [values.pop(0) for values in made.values()]
            assert all(math.isclose(result, results[0], rel_tol=1e-4) for result in results), f"they differ: {results}"
            least = float(np.median(made["quiet", "default"]))
            for (where, setting), ms in made.items():
                middle, low, high = np.percentile(ms, [50, 20, 80]).tolist()
                case = f"{name}, {task}, {'quiet' if where == 'quiet' else f'beside {os.cpu_count()} more threads'}"
                rows.append(Row("contention", case, setting, middle, low, high, middle / least, "x quiet"))
    return rows


def _measured(work: str, model: str, setting: str, quick: bool, *, beside: bool) -> list[float]:
    """What the work came to, then milliseconds of each call."""
    clean = {name: value for name, value in os.environ.items() if name not in (*WAIT_VARIABLES, "OMP_NUM_THREADS")}
    other = subprocess.Popen([sys.executable, "-c", BESIDE], env=clean) if beside else None
    try:
        program = ["-c", SHARING] if setting == COMMAND else ["-m", "benchmarks.contention"]
        command = [sys.executable, *program, work, model, "3" if quick else str(ROUNDS)]
        done = subprocess.run(command, env=clean | SETTINGS[setting], check=True, capture_output=True, text=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]


def _work(work: str, name: str, rounds: int) -> list[float]:
    """One process's part; see _measured()."""
    import torch

    from icl_ft_fast.engine.likelihood import loglikelihood
    from icl_ft_fast.engine.loading import load
    from icl_ft_fast.finetuning.run import finetune
    from icl_ft_fast.finetuning.settings import FinetuneSettings, RunOptions
    from icl_ft_fast.tasks.reversals import simple_reversals

    torch.set_num_threads(os.cpu_count() or 1)
    model = load(name)
    texts = [document.text for document in simple_reversals(0, num_facts=40, num_articles=4).documents]
    if work == "score":
        context = " ".join(texts[: 16 if rounds < ROUNDS else None])
        pairs = [(f"{context} {text[:12]}", text[12:] or " ") for text in texts[:20]]
        result, ms = 0.0, []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            result = math.fsum(one.logp for one in loglikelihood(model, pairs))
            ms.append(1000 * (time.perf_counter() - start))
        return [result, *ms[1:]]
    with tempfile.TemporaryDirectory() as folder:
        steps = FinetuneSettings(steps=rounds + 1, batch_size=8, warmup_steps=0)
        finetune(model, texts, steps, seed=0, options=RunOptions(output_dir=Path(folder)))
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [lines[-1]["loss"], *(1000 * line["seconds"] for line in lines[1:])]


if __name__ == "__main__":
    print(json.dumps(_work(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
