"""A study's plan as a table, on the disk, and beside what the study then took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.runtime.printable import duration
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.costs import computed_s, waited
from icl_ft_fast.study.forecast import Forecast, taken_s
from icl_ft_fast.study.records import Run

PLAN = "plan.json"  # in a study's folder


class PlanError(UserError):
    """A plan that cannot be read; the message names the file."""


def print_forecast(plan: Forecast, console: Console) -> None:
    """Print what each arm is expected to take."""
    seeds = max((arm.seeds for arm in plan.arms), default=1)
    can_pay = any(recorded_arm(arm.arm).training is not None for arm in plan.arms)
    rival = f" than {recorded_arm(plan.rival).title}" if plan.rival and can_pay else ""
    caption = (
        f"For each of {seeds} seed(s): tokens, FLOPs and seconds until the arm's questions are answered; the most "
        "bytes on the disk at once."
    )
    caption += f" Cheaper from: queries from which on the arm costs less{rival}." if rival else ""
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    columns = ("plan", "read", "write", "train", "FLOPs", "seconds", "disk", *(("cheaper from",) if rival else ()))
    for column in columns:
        table.add_column(column, justify="left" if column == "plan" else "right", overflow="fold")
    for arm in plan.arms:
        title = recorded_arm(arm.arm).title
        if not arm.is_planned:
            table.add_row(title, *["?"] * 6, *["-"] * bool(rival))
            continue
        cells = [_short(arm.read_tokens), _short(arm.written_tokens), _short(arm.trained_tokens), _short(arm.flops)]
        cells += [f"{arm.seconds:,.1f}", f"{_short(arm.disk_bytes)}B"]
        even = "-" if arm.break_even is None else f"{arm.break_even:,.0f}"
        table.add_row(title, *cells, *([even] if rival else []))
    console.print(table)
    console.print(
        f"\n{duration(plan.seconds)} for all arms and seeds, what they share counted once; measuring queries comes on "
        f"top (--measure-seconds). Planned in {duration(plan.planning_s)}; "
        f"{duration(plan.calibration_s)} of that tried the model on this machine.",
        highlight=False,
    )
    if plan.beside:
        console.print(plan.beside, highlight=False)
    if plan.guessed:
        console.print(
            f"Not tried, for want of time, and taken from FLOPs at the rate of reading: {', '.join(plan.guessed)}.",
            highlight=False,
        )
    if not all(arm.is_planned for arm in plan.arms):
        console.print("?: this arm has no plan; it may take long.", highlight=False)


def write_plan(folder: Path, plan: Forecast, arguments: str) -> None:
    """Leave a plan in a study's folder, for the run of the same arguments."""
    with replacing(folder / PLAN) as partial:
        partial.write_text(json.dumps({"arguments": arguments} | asdict(plan), indent=1) + "\n", encoding="utf-8")


def read_plan(folder: Path, arguments: str) -> Forecast | None:
    """The plan in a study's folder; None if there is none of these arguments.

    Raises:
        PlanError: a file that is no plan.
        OSError: it cannot be read.
    """
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.pop("arguments") != arguments:
            return None
        plan: Forecast = TypeAdapter(Forecast).validate_python(found)
    except (ValueError, ValidationError, AttributeError, KeyError) as error:
        raise PlanError(f"{path}: not a plan: remove it, or plan again with --dry-run") from error
    return plan


def kept_to(plan: Forecast, runs: Sequence[Run]) -> list[str]:
    """Seconds of each planned arm as planned and as taken, and whether either waited for other processes; in lines."""
    lines, planned = [], []
    for arm in plan.arms:
        its = [run for run in runs if run.arm == arm.arm]
        if arm.is_planned and its:
            mean = sum(map(taken_s, its)) / len(its)
            factor = f" ({mean / arm.seconds:.2f} times the plan)" if arm.seconds else ""
            lines.append(f"{recorded_arm(arm.arm).title}: planned {arm.seconds:,.1f} s, took {mean:,.1f} s{factor}")
            planned += its
    seconds, processor_s = computed_s(planned)
    if lines and plan.beside:
        lines.append(plan.beside)
    if lines and plan.processor_s is not None and waited(seconds, processor_s):
        lines.append(
            f"Other processes took the cores while the arms ran: they had {processor_s:,.1f} s of processor time in "
            f"{seconds:,.1f} s. On a quiet machine they take fewer seconds."
        )
    return lines


def _short(count: float) -> str:
    """A count with three digits and a unit: 12, 3.4k, 5.6M, 7.8T."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if count < 999.5 or unit == "P":
            return f"{count:.0f}" if not unit else f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError
