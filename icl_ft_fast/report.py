"""The comparison as one table for the terminal, legible at 80 columns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_ft_fast.compare import Run, break_even
from icl_ft_fast.evaluate import Accuracy

ARM_TITLES = {
    "base": "base",
    "icl": "ICL",
    "ft": "fine-tuned",
    "augmented-ft": "augmented",
    "rules-ft": "by rule",
}

CAPTION = (
    "Two lines a cell, as the heading says. Once: seconds of augmentation and training; reading the documents into the "
    "context. ms a query: alone, its context read for it; together, all questions at once after one reading. Pays from:"
    " queries that repay an arm's one-off seconds against ICL reading its context at each query, and keeping it cached."
)

SPLITS_BESIDE_COSTS, SPLITS_ALONE = 2, 6  # columns of accuracies that fit


def print_table(runs: Sequence[Run], console: Console) -> None:
    """Print accuracy by split, one-off costs, costs per query and break-even counts; seeds pooled."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    splits = list(dict.fromkeys(split for run in runs for split in run.accuracy))
    icl = [run for run in runs if run.arm == "icl"]
    if len(splits) > SPLITS_BESIDE_COSTS:
        for first in range(0, len(splits), SPLITS_ALONE):
            part = splits[first : first + SPLITS_ALONE]
            table = _table(runs, part)
            for arm in arms:
                mine = [run for run in runs if run.arm == arm]
                table.add_row(ARM_TITLES[arm], *(_accuracy_cell(_pooled(mine, split)) for split in part))
            console.print(table)
        splits = []
    table = _table(runs, splits, CAPTION)
    for title in ("augm. s\ntrain s", "\nread s", "tokens\n/query", "ms alone\ntogether", "pays from\nif cached"):
        table.add_column(title, justify="right", overflow="fold")
    for arm in arms:
        mine = [run for run in runs if run.arm == arm]
        augment_s, train_s, read_s = (
            _seconds_cell(_mean(run.counts["seconds"].get(phase, 0.0) for run in mine))
            for phase in ("augment", "train", "prefill")
        )
        table.add_row(
            ARM_TITLES[arm],
            *(_accuracy_cell(_pooled(mine, split)) for split in splits),
            f"{augment_s}\n{train_s}",
            f"\n{read_s}",
            f"{_mean(run.query_tokens for run in mine):,.0f}",
            f"{1e3 * _mean(run.uncached_query_s for run in mine):.1f}\n{1e3 * _mean(run.query_s for run in mine):.2f}",
            _break_even_cell(mine, icl),
        )
    console.print(table)


def _table(runs: Sequence[Run], splits: Sequence[str], caption: str | None = None) -> Table:
    """A table with columns for the arms and the splits; a cell that is too wide wraps and is never cut."""
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"{len({run.seed for run in runs})} seed(s)\npooled", min_width=max(map(len, ARM_TITLES.values())))
    for split in splits:
        table.add_column(f"{escape(split)}\n95%", justify="right", overflow="fold")
    return table


def _break_even_cell(runs: Sequence[Run], icl: Sequence[Run]) -> str:
    """From how many queries a trained arm is cheaper than ICL that reads each time, and than ICL that caches."""
    if not icl or not runs[0].arm.endswith("ft"):
        return "-\n-"
    setup_s = _mean(run.setup_s for run in runs)
    alone_s, icl_alone_s = (_mean(run.uncached_query_s for run in arm) for arm in (runs, icl))
    together_s, icl_together_s = (_mean(run.query_s for run in arm) for arm in (runs, icl))
    reading = break_even(setup_s, alone_s, 0.0, icl_alone_s)
    cached = break_even(setup_s, together_s, _mean(run.setup_s for run in icl), icl_together_s)
    return f"{_count(reading)}\n{_count(cached)}"


def _pooled(runs: Sequence[Run], split: str) -> Accuracy | None:
    counts = [run.accuracy[split] for run in runs if split in run.accuracy]
    return Accuracy(sum(a.correct for a in counts), sum(a.total for a in counts)) if counts else None


def _accuracy_cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    low, high = accuracy.interval
    return f"{accuracy.value:.3f}\n{low:.2f}-{high:.2f}"


def _seconds_cell(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds else "-"


def _count(queries: float | None) -> str:
    return "never" if queries is None else f"{queries:,.0f}"


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)
