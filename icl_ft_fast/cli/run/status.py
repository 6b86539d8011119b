"""The work of `icl-ft-fast status`, `pause` and `resume`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from icl_ft_fast.runtime.printable import printable
from icl_ft_fast.study.arms import recorded_arm
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
    """The status in lines."""
    left = "" if status.seconds_left is None else f", about {_duration(status.seconds_left)} left"
    lines = [f"{status.state}: {status.done} of {status.planned} runs done{left if status.state != 'finished' else ''}"]
    lines += [
        f"  running {recorded_arm(arm).title}, seed {seed}, for {_duration(seconds)}"
        for arm, seed, seconds in status.running
    ]
    lines += [
        f"  {recorded_arm(arm).title}: {correct} of {total} correct ({correct / total:.2f})"
        for arm, (correct, total) in status.accuracy.items()
        if total
    ]
    return "\n".join([*lines, *([f"  last error: {status.error}"] if status.error else [])])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def run_pause(options: argparse.Namespace) -> None:
    """`icl-ft-fast pause`."""
    set_paused(options.folder, True)
    print(f"Paused once its present runs have ended; icl-ft-fast resume {options.folder} lets it go on")


def run_resume(options: argparse.Namespace) -> None:
    """`icl-ft-fast resume`."""
    set_paused(options.folder, False)
    print("Goes on")
