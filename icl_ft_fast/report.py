"""The comparison as one table for the terminal, legible at 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_ft_fast.compare import Run, break_even, paired_tests
from icl_ft_fast.evaluate import Accuracy, Answer
from icl_ft_fast.statistics import brier, cluster_bootstrap, expected_calibration_error

ARM_TITLES = {
    "base": "base",
    "icl": "ICL",
    "ft": "fine-tuned",
    "augmented-ft": "augmented",
    "rules-ft": "by rule",
    "distilled": "distilled",
}

CAPTION = (
    "Under an accuracy: Wilson's interval, then the bootstrap's over facts and seeds. Once: seconds of augmentation "
    "and training; reading the documents into the context. ms a query: alone, its context read for it; together, all "
    "questions at once after one reading. Pays from: queries that repay an arm's one-off seconds against ICL reading "
    "its context at each query, and keeping it cached."
)
PAIRED_CAPTION = (
    "Accuracy of the first less that of the second on the same questions; exact sign-flip test over facts, "
    "Holm-adjusted for all these tests."
)

Item = TypeVar("Item")

SPLITS_BESIDE_COSTS, SPLITS_ALONE, SPLITS_PAIRED = 2, 6, 4  # columns that fit


def print_table(runs: Sequence[Run], console: Console) -> None:
    """Print accuracies, costs, break-even counts, accuracies by form, paired tests and calibration; seeds pooled."""
    arms = list(dict.fromkeys(run.arm for run in runs))
    splits = list(dict.fromkeys(split for run in runs for split in run.accuracy))
    if len(splits) > SPLITS_BESIDE_COSTS:
        for part in _parts(splits, SPLITS_ALONE):
            table = _accuracy_table(runs, part)
            for arm in arms:
                table.add_row(ARM_TITLES[arm], *_accuracy_cells(_of(runs, arm), part))
            console.print(table)
        splits = []
    icl = _of(runs, "icl")
    costs = ("augm. s\ntrain s", "\nread s", "tokens\n/query", "ms alone\ntogether", "pays from\nif cached")
    table = _accuracy_table(runs, splits, costs, CAPTION)
    for arm in arms:
        mine = _of(runs, arm)
        augment_s, train_s, read_s = (
            _seconds_cell(_mean(run.counts["seconds"].get(phase, 0.0) for run in mine))
            for phase in ("augment", "train", "prefill")
        )
        table.add_row(
            ARM_TITLES[arm],
            *_accuracy_cells(mine, splits),
            f"{augment_s}\n{train_s}",
            f"\n{read_s}",
            f"{_mean(run.query_tokens for run in mine):,.0f}",
            f"{1e3 * _mean(run.uncached_query_s for run in mine):.1f}\n{1e3 * _mean(run.query_s for run in mine):.2f}",
            _break_even_cell(mine, icl),
        )
    console.print(table)
    if any(left_out := [run.notes.get("left_out_documents", 0) for run in icl]):
        read = _mean(run.notes["context_documents"] for run in icl)
        console.print(f"ICL read {read:,.0f} documents; {_mean(left_out):,.0f} more did not fit its --icl-tokens.")
    for table in itertools.chain(_form_tables(runs, arms), _paired_tables(runs), _calibration_table(runs, arms)):
        console.print()
        console.print(table)


def _parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _of(runs: Sequence[Run], arm: str) -> list[Run]:
    return [run for run in runs if run.arm == arm]


def _new_table(first: str, columns: Iterable[str], caption: str | None = None) -> Table:
    """A table with a column for names; a cell that is too wide wraps and is never cut."""
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, min_width=max(map(len, ARM_TITLES.values())), no_wrap=True)
    for column in columns:
        table.add_column(escape(column), justify="right", overflow="fold")
    return table


def _accuracy_table(
    runs: Sequence[Run], splits: Sequence[str], more: Sequence[str] = (), caption: str | None = None
) -> Table:
    """Columns for the splits and `more`; its first row is what blind guesses would have."""
    title = f"{len({run.seed for run in runs})} seed(s)\npooled"
    table = _new_table(title, [*(f"{split}\n95%" for split in splits), *more], caption)
    if splits and all(run.answers for run in runs):
        chances = ([a.chance for run in runs for a in run.answers if a.split == split] for split in splits)
        table.add_row("chance", *(f"{_mean(chance):.3f}" for chance in chances))
    return table


def _accuracy_cells(runs: Sequence[Run], splits: Sequence[str]) -> list[str]:
    """Fraction correct, Wilson's interval and, where the answers are kept, that of topics and seeds."""
    cells = []
    for split in splits:
        cell = _accuracy_cell(_pooled(runs, split))
        if found := [(run.seed, answer) for run in runs for answer in run.answers if answer.split == split]:
            seeds, answers = zip(*found, strict=True)
            low, high = cluster_bootstrap([a.is_correct for a in answers], [a.topic for a in answers], seeds)
            cell += f"\n{low:.2f}-{high:.2f}"
        cells.append(cell)
    return cells


def _form_tables(runs: Sequence[Run], arms: Sequence[str]) -> Iterator[Table]:
    """Fractions correct by form, for splits with more than one."""
    counts: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for run in runs:
        for answer in run.answers:
            if answer.form is not None:
                by_arm = counts.setdefault((answer.split, answer.form), {})
                by_arm.setdefault(run.arm, []).append(answer.is_correct)
    splits = [split for split, _ in counts]
    several = [key for key in counts if splits.count(key[0]) > 1]
    for part in _parts(several, SPLITS_ALONE):
        table = _new_table("by form", (f"{split}\n{form}" for split, form in part))
        for arm in arms:
            cells = (counts[key].get(arm) for key in part)
            table.add_row(ARM_TITLES[arm], *("-" if cell is None else f"{_mean(cell):.3f}" for cell in cells))
        yield table


def _paired_tables(runs: Sequence[Run]) -> Iterator[Table]:
    """Differences in accuracy between arms, with their p-values."""
    tests = {(test.first, test.second, test.split): test for test in paired_tests(runs)}
    pairs = dict.fromkeys(key[:2] for key in tests)
    for part in _parts(list(dict.fromkeys(split for *_, split in tests)), SPLITS_PAIRED):
        table = _new_table("difference, p", part, PAIRED_CAPTION)
        for first, second in pairs:
            found = (tests.get((first, second, split)) for split in part)
            cells = ("-" if t is None else f"{t.difference:+.2f} {_p(t.p)}" for t in found)
            table.add_row(f"{ARM_TITLES[first]} - {ARM_TITLES[second]}", *cells)
        yield table


def _calibration_table(runs: Sequence[Run], arms: Sequence[str]) -> Iterator[Table]:
    """How far the choices' probabilities are from how often they are right, over all splits."""
    answers: dict[str, list[Answer]] = {arm: [a for run in _of(runs, arm) for a in run.answers] for arm in arms}
    if not all(answers.values()):
        return
    table = _new_table("calibration", (ARM_TITLES[arm] for arm in arms))
    errors: dict[str, Callable[[list[Answer]], float]] = {
        "ECE": lambda mine: expected_calibration_error([a.confidence for a in mine], [a.is_correct for a in mine]),
        "Brier": lambda mine: _mean(brier(a.probability, a.correct) for a in mine),
    }
    for name, error in errors.items():
        table.add_row(name, *(f"{error(mine):.3f}" for mine in answers.values()))
    yield table


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")


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
    return fmean(values)
