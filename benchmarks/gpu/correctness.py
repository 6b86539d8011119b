"""Parts of the bring-up that run tests: is anything worth timing?"""

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.bench import Bench
from benchmarks.timing import Row

GATE = {True: ["-m", "gpu", "tests/test_gpu.py"], False: ["tests/test_statistics.py"]}
TESTS = {
    True: ["-m", "gpu", "tests/test_triton_rectangle.py", "tests/test_triton.py", "-k", "not offsets"],
    False: ["tests/test_statistics.py"],
}


def gate(bench: Bench) -> None:
    """The tests of whole models: is anything worth timing?"""
    _pytest(bench, "gate", GATE[bench.cuda])


def tests(bench: Bench) -> None:
    """`pytest -m gpu`, in several processes where pytest-xdist is there: most of the time is Triton compiling."""
    _pytest(bench, "tests", TESTS[bench.cuda])


def _pytest(bench: Bench, name: str, arguments: list[str]) -> None:
    spread = ["-n", "12"] if bench.cuda and importlib.util.find_spec("xdist") else []
    log, start = bench.out / f"{name}.log", time.perf_counter()
    options = ["-v", "--tb=short", "-W", "default", f"--junitxml={bench.out / name}.xml"]
    with log.open("w") as file:  # -W default: what another version deprecates is no fault of a kernel
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *spread, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    ms, last = 1e3 * (time.perf_counter() - start), log.read_text().rstrip().rpartition("\n")[2]
    passed = re.search(r"(\d+) passed", last)
    bench.tell(Row("gpu", name, "pytest", ms, ms, ms, float(passed[1]) if passed else 0.0, "passed"))
    if done.returncode:
        raise AssertionError(f"{last.strip('= ')}; see {log.name}")
