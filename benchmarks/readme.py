"""Write what is generated in the documents, between its markers: `python -m benchmarks.readme [BLOCK ...]`.

`demo` and `verdict` run the demo; the others make tables of the newest rows under benchmarks/results/.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

Newest = dict[tuple[str, str, str], dict[str, str]]  # (suite, case, variant) -> row


def _command(*arguments: str, folder: str) -> str:
    """What a command prints in a folder, on a terminal of 76 columns, which the site has room for."""
    environment = {**os.environ, "COLUMNS": "76", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "icl_ft_fast.cli", *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    ).stdout.strip()


@cache
def _demo() -> tuple[str, str]:
    """What the demo prints, run once in a new folder, and its report for 1,000 queries a day."""
    with tempfile.TemporaryDirectory() as folder:
        printed = _command("demo", folder=folder)
        return printed, _command("report", "out/demo", "--queries-per-day", "1000", folder=folder)


def demo() -> str:
    """The demo's first table, as a user gets it; its tables of differences and calibration are left out."""
    table, _, _ = _demo()[0].partition("\n\ndifference, p")
    return f"```text\n{table.strip()}\n```"


def verdict() -> str:
    """The verdict and its table, which end the report."""
    return "```text\n" + "\n\n".join(_demo()[1].split("\n\n")[-2:]).strip("\n") + "\n```"


def _tables(table: Callable[[Newest], str]) -> str:
    """A table for each device that has rows of its suites."""
    parts = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        newest: Newest = {}
        for row in rows:  # in the order of the newest
            key = (row["suite"], row["case"], row["variant"])
            newest.pop(key, None)
            newest[key] = row
        last = rows[-1]
        if made := table(newest):
            parts += [f"{last['device']}, torch {last['torch']}, {last['date']}:", made]
    return "\n\n".join(parts)


def _score_table(newest: Newest) -> str:
    """Seconds, and how many times ours, by case; a peer's number in brackets is the sample it was measured on."""
    measured: dict[str, dict[str, tuple[float, str]]] = {}  # case -> variant less its sample -> seconds, sample
    names: dict[str, None] = {}  # ours, then the others in the order of the newest
    for (suite, case, variant), row in newest.items():
        if suite == "score" and variant != "encode, plan":
            name, _, sample = variant.partition(" (")
            measured.setdefault(case, {})[name] = float(row["ms"]) / 1e3, sample.rstrip(")")
            names.pop(name, None)
            names[name] = None
    if not measured:
        return ""
    names = {"icl_ft_fast": None} | names
    samples = {name: dict.fromkeys(of[name][1] for of in measured.values() if name in of) for name in names}
    titles = [f"{name} ({' or '.join(found)})" if any(found) else name for name, found in samples.items()]
    lines = ["| seconds (times ours) | " + " | ".join(titles) + " |", "|---" * (len(names) + 1) + "|"]
    for case, of in measured.items():
        cells = []
        for name in names:
            seconds, _ = of.get(name, (0.0, ""))
            ratio = seconds / of["icl_ft_fast"][0]
            times = "" if name == "icl_ft_fast" else f" ({ratio:.2f}x)" if ratio < 3 else f" ({ratio:.0f}x)"
            cells.append(f"{_seconds(seconds)}{times}" if name in of else "")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}"


def _ops_table(newest: Newest) -> str:
    """Speed of each op as a multiple of its rival's."""
    ratios: dict[tuple[str, str, str], dict[str, str]] = {}
    for suite, case, variant in newest:
        if variant != suite or suite not in ("trie_attention", "target_logprob"):
            continue
        name, threads = re.fullmatch(r"(.*), (\d+) threads", case).groups()
        rival = next(v for v in ("torch SDPA", "matmul", "log_softmax") if (suite, case, v) in newest)
        ours, theirs = (float(newest[suite, case, v]["ms"]) for v in (suite, rival))
        ratios.setdefault((suite, name, rival), {})[threads] = f"{theirs / ours:.2f}"
    if not ratios:
        return ""
    threads = sorted({t for by_threads in ratios.values() for t in by_threads})
    head = [f"times as fast, {t} thread{'s' if t != '1' else ''}" for t in threads]
    lines = ["| op | than | " + " | ".join(head) + " |", "|---" * (len(head) + 2) + "|"]
    for (suite, name, rival), by_threads in ratios.items():
        cells = " | ".join(by_threads.get(t, "") for t in threads)
        lines.append(f"| {suite}: {name} | {rival} | {cells} |")
    return "\n".join(lines)


def _others_table(newest: Newest) -> str:
    """Generation, the server and training as they were measured: `serve`'s ms are what a client waits."""
    lines = []
    for (suite, case, variant), row in newest.items():
        if suite in ("generate", "serve", "finetune"):
            peak = f"{int(row['peak_bytes']) / 1e6:,.0f}" if row["peak_bytes"] else ""
            rate = float(row["rate"])
            told = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2g}" if rate < 1 else f"{rate:.1f}"
            lines.append(f"| {suite}: {case} | {variant} | {float(row['ms']):,.0f} | {told} {row['unit']} | {peak} |")
    return "\n".join(["| what | by | ms | rate | peak MB |", "|---|---|---|---|---|", *lines]) if lines else ""


BLOCKS: dict[str, tuple[Path, Callable[[], str]]] = {
    "demo": (README, demo),
    "verdict": (README, verdict),
    "score": (README, lambda: _tables(_score_table)),
    "ops": (RESULTS / "README.md", lambda: _tables(_ops_table)),
    "others": (RESULTS / "README.md", lambda: _tables(_others_table)),
    "scaling": (ROOT / "docs" / "executors.md", lambda: str(import_module("benchmarks.scaling").table())),
}


def replace_block(path: Path, name: str, made: str) -> None:
    """Put a text between a page's markers of a name."""
    block = f"<!-- {name} -->\n{made}\n<!-- /{name} -->"
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
    text, count = pattern.subn(lambda _: block, path.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(f"{path}: expected one <!-- {name} --> block, found {count}")
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Replace the blocks named on the command line, or all."""
    for name in sys.argv[1:] or BLOCKS:
        path, make = BLOCKS[name]
        replace_block(path, name, make())
        print(f"{path.relative_to(ROOT)}: {name} updated")


if __name__ == "__main__":
    main()
