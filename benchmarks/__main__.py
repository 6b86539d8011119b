"""`python -m benchmarks [SUITE ...] [--out DIR] [--quick]`: a table, then one JSON object as the last line.

`python -m benchmarks gpu --help` is the bring-up of a GPU.
"""

import argparse
import json
import subprocess
import sys
import sysconfig
import time
from importlib import import_module
from pathlib import Path

from benchmarks.timing import Row, append_csv, machine, record

# Each is a module of this package with run(quick) -> list[Row], which checks its results before it times them.
SUITES = (
    "target_logprob",
    "trie",
    "trie_attention",
    "score",
    "batch_invariant",
    "generate",
    "serve",
    "finetune",
    "memory",
    "statistics",
    "contention",
)


def main() -> None:
    """Run the suites named on the command line, or all; `gpu`, which has a command line of its own, only if named."""
    began, root = time.monotonic(), Path(__file__).parents[1]
    if not (root / f"icl_ft_fast/_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root, check=True)
    if sys.argv[1:2] == ["gpu"]:
        sys.exit(import_module("benchmarks.gpu.stages").main(sys.argv[2:], began))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure icl_ft_fast on this machine.")
    parser.add_argument("suite", nargs="*", help=f"which suites to run, all by default: {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="append the rows to DIR/<device>.csv")
    parser.add_argument("--quick", action="store_true", help="smaller inputs and fewer rounds")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="score, invariant: documents.jsonl and questions.jsonl to use"
    )
    parser.add_argument("--draws", type=int, metavar="N", help="statistics: simulations of a cell (default: 1,500)")
    works = {"contention": ("score", "train"), "finetune": ("full", "lora", "lora-bfloat16")}
    told = "; ".join(f"{suite}: {', '.join(names)}" for suite, names in works.items())
    parser.add_argument("--work", metavar="NAME", help=f"one part of a suite, all by default ({told})")
    args = parser.parse_args()
    if unknown := sorted(set(args.suite) - set(SUITES)):
        parser.error(f"unknown suite: {', '.join(unknown)}; expected {', '.join(SUITES)}")
    if args.work and not any(args.work in works.get(suite, ()) for suite in args.suite or SUITES):
        parser.error(f"--work {args.work}: expected a part of a suite that runs ({told})")

    rows: list[Row] = []
    for suite in args.suite or SUITES:
        options = {"data": args.data} if suite in ("score", "batch_invariant") else {}
        options |= {"draws": args.draws} if suite == "statistics" else {}
        options |= {"work": args.work} if args.work in works.get(suite, ()) else {}
        measured: list[Row] = import_module(f"benchmarks.{suite}").run(args.quick, **options)
        _show(measured)
        rows += measured
    on = machine()
    if args.out:
        print(f"appended to {append_csv(args.out, rows, on)}")
    print(json.dumps({"machine": on, "rows": [record(row) for row in rows]}))


def _show(rows: list[Row]) -> None:
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            print(f"\n{row.suite}: {case}")
            print(f"  {'':19}{'ms':>13}{'p20':>13}{'p80':>13}{'rate':>10}  {'unit':18}{'of peak':>8}{'peak MB':>9}")
        percent = "" if row.peak_percent is None else f"{row.peak_percent:.0f}%"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
        times = f"{row.ms:13,.3f}{row.p20_ms:13,.3f}{row.p80_ms:13,.3f}"
        print(f"  {row.variant:19}{times}{row.rate:10,.1f}  {row.unit:18}{percent:>8}{peak:>9}")
    print()


if __name__ == "__main__":
    main()
