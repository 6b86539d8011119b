"""The work of `icl-ft-fast status`, `pause` and `resume`; loads no torch, which would take seconds beside a study."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from icl_ft_fast.runtime.printable import duration, printable
from icl_ft_fast.study.progress import Status, set_paused, status_of


def run_status(options: argparse.Namespace) -> None:
    """`icl-ft-fast status`."""
    while True:
        status = status_of(options.folder)
        print(json.dumps(asdict(status)) if options.json else printable(told(status)), flush=True)
        if not options.watch or status.state in ("finished", "stopped"):
            return
        time.sleep(options.every)


def told(status: Status) -> str:
    """The status in lines; arms have the names that --arms takes."""
    left = "" if status.seconds_left is None else f", about {duration(status.seconds_left)} left"
    what = "measuring what a query takes" if status.state == "measuring" else status.state
    is_open = status.state in ("running", "paused", "stopped")
    lines = [f"{what}: {status.done} of {status.planned} runs done{left if is_open else ''}"]
    lines += [
        f"  running {arm}, seed {seed}, for {duration(seconds)}" + (f", {step:,} of {steps:,} steps" if steps else "")
        for arm, seed, seconds, step, steps in status.running
    ]
    lines += [
        f"  {arm}: {correct} of {total} correct ({correct / total:.2f})"
        for arm, (correct, total) in status.accuracy.items()
        if total
    ]
    return "\n".join([*lines, *([f"  last error: {status.error}"] if status.error else [])])


def run_pause(options: argparse.Namespace) -> None:
    """`icl-ft-fast pause`."""
    set_paused(options.folder, True)
    print(f"Paused once its present runs have ended; icl-ft-fast resume {options.folder} lets it go on")


def run_resume(options: argparse.Namespace) -> None:
    """`icl-ft-fast resume`."""
    set_paused(options.folder, False)
    print("Goes on")
