"""The comparison as one table for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_ft_fast.compare import Run, break_even
from icl_ft_fast.evaluate import Accuracy

ARM_TITLES = {
    "base": "base",
    "icl": "ICL",
    "ft": "fine-tuned",
    "augmented-ft": "augmented fine-tuned",
    "rules-ft": "rule-augmented (control)",
}


def print_table(runs: Sequence[Run], console: Console) -> None:
    """Print accuracy by split, cost per query and break-even points, seeds pooled."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    splits = list(dict.fromkeys(split for run in runs for split in run.accuracy))
    seeds = len({run.seed for run in runs})
    accuracy = _table(f"Accuracy [95% Wilson interval], seeds: {seeds}", *splits)
    cost = _table(
        "Cost, means over seeds, wall seconds on this machine",
        "augment\ns", "train\ns", "prefill\ns", "tokens\n/query", "rows\n/query", "ms\n/query",
    )  # fmt: skip
    for arm in arms:
        mine = [run for run in runs if run.arm == arm]
        accuracy.add_row(ARM_TITLES[arm], *(_cell(_pooled(mine, split)) for split in splits))
        phases = (
            _mean(run.counts["seconds"].get(phase, 0.0) for run in mine) for phase in ("augment", "train", "prefill")
        )
        cost.add_row(
            ARM_TITLES[arm],
            *(f"{seconds:.1f}" if seconds else "-" for seconds in phases),
            f"{_mean(run.query_tokens for run in mine):.0f}",
            f"{_mean(run.query_rows for run in mine):.1f}",
            f"{1e3 * _mean(run.query_s for run in mine):.2f}",
        )
    for table in (accuracy, cost):
        console.print(table)
        console.print()
    icl = [run for run in runs if run.arm == "icl"]
    tuned = [arm for arm in arms if arm.endswith("ft")]
    if icl and tuned:
        console.print(_break_even_table(runs, icl, tuned))


def _table(title: str, *columns: str) -> Table:
    """A table of arms whose cells wrap in a narrow terminal and are never cut."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("arm", overflow="fold")
    for column in columns:
        table.add_column(escape(column), justify="right", overflow="fold")
    return table


def _break_even_table(runs: Sequence[Run], icl: Sequence[Run], tuned: Sequence[str]) -> Table:
    """From how many queries each fine-tuned arm is cheaper than in-context learning."""
    uncached_s, cached_s = _mean(r.uncached_query_s for r in icl), _mean(r.query_s for r in icl)
    table = _table(
        "Cheaper than in-context learning from this many queries on",
        f"context read at each query ({1e3 * uncached_s:.1f} ms)",
        f"context cached ({1e3 * cached_s:.2f} ms)",
    )
    for arm in tuned:
        mine = [run for run in runs if run.arm == arm]
        setup_s, query_s = _mean(r.setup_s for r in mine), _mean(r.query_s for r in mine)
        alone_s = _mean(r.uncached_query_s for r in mine)
        table.add_row(
            ARM_TITLES[arm],
            _count(break_even(setup_s, alone_s, 0.0, uncached_s)),
            _count(break_even(setup_s, query_s, _mean(r.setup_s for r in icl), cached_s)),
        )
    return table


def _pooled(runs: Sequence[Run], split: str) -> Accuracy | None:
    counts = [run.accuracy[split] for run in runs if split in run.accuracy]
    return Accuracy(sum(a.correct for a in counts), sum(a.total for a in counts)) if counts else None


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    low, high = accuracy.interval
    return f"{accuracy.value:.3f} [{low:.2f}, {high:.2f}]"


def _count(queries: float | None) -> str:
    return "never" if queries is None else f"{queries:,.0f}"


def _mean(values: object) -> float:
    return statistics.fmean(values)  # type: ignore[arg-type]
