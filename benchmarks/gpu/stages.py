"""`python -m benchmarks gpu --out DIR`: bring-up of a GPU in one command, ending within `--minutes`.

Each part runs in a process of its own with a time limit, and what it measures is in DIR's CSV at once: a part that
fails or hangs takes nothing from the others. DIR/gpu.md, written anew after each, says what was reached, what was not,
and why. Ours is timed and told first, so that no rival can take it along. A result that is wrong is a note, and the
rivals are still measured. `--stage 1`, 2 and 3 are the parts in three short runs, each useful alone. FLOPs count what a
row may see and what ours forwards, whoever does the work.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import BESIDE, SENSORS, Bench, Note, first_lines
from benchmarks.gpu.correctness import gate, tests
from benchmarks.gpu.kernels import attention, ceilings, head, head_training, join, rectangle, squad_trie, tiles
from benchmarks.gpu.table import report
from benchmarks.gpu.workloads import decode, long_context, lora_step, mmlu
from benchmarks.timing import Row, append_csv, machine

# In order of value, each with its limit in seconds.
PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "ceilings": (ceilings, 60),
    "gate": (gate, 90),
    "rectangle": (rectangle, 60),
    "attention": (attention, 80),
    "tiles": (tiles, 50),
    "join": (join, 60),
    "head": (head, 60),
    "mmlu": (mmlu, 120),
    "squad_trie": (squad_trie, 90),
    "tests": (tests, 180),
    "head_training": (head_training, 80),
    "long_context": (long_context, 120),
    "lora_step": (lora_step, 70),
    "decode": (decode, 100),
}
# Short runs, one after the other, with their seconds: is it right, and how fast is the kernel that matters most; the
# kernels and the chunks; whole workloads.
STAGES: dict[int, tuple[int, tuple[str, ...]]] = {
    1: (150, ("gate", "rectangle", "tests")),
    2: (240, ("attention", "tiles", "join", "head", "mmlu", "squad_trie")),
    3: (200, ("long_context", "decode", "lora_step", "head_training")),
}


def _short(figures: dict[str, float | None]) -> dict[str, Any]:
    return {name: "" if x is None else float(f"{x:.4g}") for name, x in figures.items()}


def sensed(path: Path) -> dict[str, str]:
    """The last full line that nvidia-smi has written, by sensor; nothing where it writes none."""
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
    values = [value.strip() for value in lines[-1].split(",")] if len(lines) > 1 else []
    return dict(zip(SENSORS, values, strict=True)) if len(values) == len(SENSORS) else {}


@contextmanager
def _sensing(out: Path, device: str) -> Iterator[None]:
    """Have nvidia-smi write clocks, power, temperature and throttle reasons once a second, where it can."""
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield
        return
    with (out / "clocks.csv").open("w") as file:
        query = ["nvidia-smi", f"--query-gpu={','.join(SENSORS)}", "--format=csv,nounits", "-l", "1"]
        running = subprocess.Popen(query, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            running.terminate()
            running.wait()


def _work(connection: Connection) -> None:
    """A process that has imported everything and waits to be told its part; it ends by None, or by why it failed."""
    os.setsid()  # so that what it starts can be ended with it
    part, device, small, out, known = connection.recv()
    try:
        on = machine(device)
        connection.send(on)

        def tell(message: Row | Note, **beside: float | None) -> None:
            if isinstance(message, Row):
                append_csv(out, [message], on | dict.fromkeys(BESIDE, "") | sensed(out / "clocks.csv") | _short(beside))
            connection.send(message)

        bench = Bench(torch.device(device), small, out, known, tell)
        PARTS[part][0](bench)
        connection.send(f"wrong: {', '.join(dict.fromkeys(bench.wrong))}" if bench.wrong else None)
    except BaseException as error:
        traceback.print_exc()
        connection.send(first_lines(error))


def _listen(connection: Connection, limit: float) -> Iterator[Any]:
    """What a part says, to the end or its end; then, as a string, what went wrong."""
    end = time.monotonic() + limit
    try:
        while connection.poll(max(0.0, end - time.monotonic())):
            if (message := connection.recv()) is None:
                return
            yield message
            if isinstance(message, str):
                return
        yield f"cut off after {limit:.0f} s"
    except EOFError:
        yield "its process died"


def main(arguments: list[str], began: float) -> int:
    """Run the parts in order; returns 1 if any failed. `began`: time.monotonic() when the command did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="Bring-up of a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the CSV, gpu.md and pytest.log")
    parser.add_argument(
        "--stage", type=int, choices=STAGES, help="one of three short runs, in order; instead of --parts"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s; ceilings always come first")
    parser.add_argument("--device", default="cuda", help="cpu shows, with --small, that every part runs")
    parser.add_argument("--small", action="store_true", help="toy sizes, timed once")
    parser.add_argument("--minutes", type=float, help="no part goes on beyond (default: 9, or the stage's)")
    args = parser.parse_args(arguments)
    seconds, chosen = STAGES[args.stage] if args.stage else (540, args.parts.split(","))
    parts = list(dict.fromkeys(["ceilings", *chosen]))
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: unknown {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with _sensing(args.out, args.device):
        failed = _run(args, parts, began + (60 * args.minutes if args.minutes is not None else seconds))
    print((args.out / "gpu.md").read_text())
    return int(failed > 0)


def _run(args: argparse.Namespace, parts: list[str], end: float) -> int:
    """Run the parts until `end`, of time.monotonic(); how many failed."""
    failed = 0
    told: list[Row | Note] = []
    on: dict[str, Any] = {}
    known: dict[str, float] = {}
    spawn = multiprocessing.get_context("spawn")
    waiting: list[tuple[Any, Connection]] = []

    def prepare() -> None:
        """Let the next part's process import while the one before it works."""
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs,), daemon=False)
        process.start()
        theirs.close()
        waiting.append((process, mine))

    prepare()
    for i, part in enumerate(parts):
        process, connection = waiting.pop()
        if i + 1 < len(parts):
            prepare()
        start, limit = time.monotonic(), min(PARTS[part][1], end - time.monotonic())
        print(f"== {part}, {max(0.0, limit):.0f} s at most", flush=True)
        connection.send((part, args.device, args.small, args.out, known))
        for message in _listen(connection, limit) if limit > 0 else ["no time was left"]:
            if isinstance(message, dict):
                on = message
                continue
            if isinstance(message, str):
                failed += 1
                message = Note(part, "FAILED", message)
            elif part == "ceilings":
                known[message.unit] = message.rate
            told.append(message)
            said = f"{message.ms:,.3f} ms" if isinstance(message, Row) else message.reason
            print(f"   {message.case}: {message.variant}: {said}", flush=True)
        with suppress(ProcessLookupError):  # while it imports it leads no group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        print(f"   {part}: {time.monotonic() - start:.0f} s", flush=True)
        (args.out / "gpu.md").write_text(report(told, on, args.small))
    return failed
