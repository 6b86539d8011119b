"""The study as tables and a paragraph for the terminal, legible at 80 columns, in pipes and without colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from icl_ft_fast.report.derived import ON, Derived
from icl_ft_fast.report.verdict import Verdict, verdict_of, why_none
from icl_ft_fast.runtime.printable import amount
from icl_ft_fast.study.amortise import BreakEven
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.evaluate import Answer
from icl_ft_fast.study.paired import Paired
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.statistics import brier, calibrated_error, expected_calibration_error

CAPTION = (
    "Below each accuracy: 95% interval over facts (see docs/statistics.md). `augm. s` (with a teacher's reading) and "
    "`train s` are one-time costs. `read s`: reading the documents into the context. `tokens/query`: all requests of "
    "a query, each choice with its own copy of the context and the prompt. `ms/query`: after the reading, one query at "
    "a time, then in batches of the size shown."
)
BREAK_EVEN_CAPTION = (
    "Queries from which a trained arm takes fewer seconds than the arm above, which reads its context for each query "
    "unless it says `cached` (in memory) or `from file`. Below: 95% bootstrap interval over measurements and seeds. "
    "`accuracy`: against in-context learning over all questions; as good: the 95% interval of the difference is above "
    "minus"
)
PAIRED_CAPTION = (
    "Accuracy of the first arm minus accuracy of the second on the same questions, p, and the 95% interval of the "
    "difference over facts. p: mid-p sign-flip test over facts, Holm-adjusted for the tests shown."
)
HARM_CAPTION = (
    "Elsewhere. KL: of the untouched model to the arm, on texts that the untouched model writes without documents. "
    "`general`: accuracy on the general task, of the untouched model and of the arm. Arms that put documents before a "
    "question have them there in both."
)
CALIBRATION_CAPTION = "`ECE by chance`: what a perfectly calibrated model would show on so few answers."


Item = TypeVar("Item")

SPLITS_BESIDE_COSTS, SPLITS_ALONE, SPLITS_PAIRED, RIVALS = 2, 6, 4, 3  # columns that fit
TITLE_WIDTH = 10  # of an arm, as far as the first line goes


def print_study(study: Derived, console: Console, points: float = 2.0) -> None:
    """Print accuracies, costs, break-even counts, accuracies by form, paired tests and calibration; seeds pooled.

    `points` of accuracy below ICL still match it.
    """
    for concern in study.concerns:
        console.print(f"! {concern}", highlight=False, markup=False)
    splits = study.splits
    if len(splits) > SPLITS_BESIDE_COSTS:
        for some in _groups_of(splits, SPLITS_ALONE):
            table = _accuracy_table(study, some)
            for arm in study.arms:
                table.add_row(_cell(_title(arm)), *_accuracy_cells(study, arm, some))
            console.print(table)
            console.print()
        splits = []
    together = max(study.batches, default=1)
    costs = ("augm. s\ntrain s", "\nread s", "tokens\n/query", f"ms/query, 1\n{together}")
    table = _accuracy_table(study, splits, costs, CAPTION)
    alone, all_at_once = (study.ways("seconds", batch=batch) for batch in (1, together))
    for arm in study.arms:
        mine = study.of(arm)
        seconds = [{name: p["wall_s"] for name, p in run.counts["phases"].items()} for run in mine]
        train_s = fmean(phases.get("train", 0.0) for phases in seconds)
        query_ms = (f"{1e3 * w[_title(arm)].line.query:,.1f}" if w else "-" for w in (alone, all_at_once))
        reading_s = alone[_title(arm)].line.reading if alone else 0.0
        table.add_row(
            _cell(_title(arm)),
            *_accuracy_cells(study, arm, splits),
            f"{_seconds_cell(fmean(run.setup_s for run in mine) - train_s)}\n{_seconds_cell(train_s)}",
            f"\n{_seconds_cell(reading_s)}",
            f"{fmean(run.query_request_tokens for run in mine):,.0f}",
            "\n".join(query_ms),
        )
    console.print(table)
    for note in study.notes:
        console.print(note)
    runs, arms = study.results.runs, study.arms
    icl = [run.notes for run in runs if "left_out_documents" in run.notes]
    if any(left_out := [notes["left_out_documents"] for notes in icl]):
        read = fmean(notes["context_documents"] for notes in icl)
        console.print(f"ICL read {read:,.0f} documents; {fmean(left_out):,.0f} more did not fit --icl-tokens.")
    more = (
        _break_even_table(study, points),
        _form_tables(runs, arms),
        _paired_tables(study),
        _calibration_table(runs, arms),
        _harm_table(study),
    )
    for table in itertools.chain(*more):
        console.print()
        console.print(table)


def print_decision(verdict: Verdict, console: Console) -> None:
    """Print the verdict in words, then the table of ways at its number of queries."""
    decision, unit = verdict.decision, verdict.unit
    columns = ("accuracy", f"{verdict.resource}\n{unit}", f"{unit}\n/1,000", f"{unit}\n/1,000 right", "chosen in")
    table = _new_table("cheapest first", columns)
    for way in decision.ways:
        cost = way.total(decision.queries)
        each = 1e3 * cost / decision.queries
        right = amount(each / way.accuracy) if way.accuracy else "-"
        accurate = "" if decision.is_accurate(way) else "\n(less accurate)"
        name = way.name.replace(ON, f"\n{ON.lstrip()}", 1)
        share = f"{verdict.shares.get(way.name, 0.0):.0%}"
        table.add_row(escape(name + accurate), f"{way.accuracy:.3f}", amount(cost), amount(each), right, share)
    console.print(verdict.text, highlight=False, markup=False)
    console.print()
    console.print(table)


def print_decision_at(study: Derived, queries: float, points: float, console: Console) -> None:
    """Print the verdict on so many queries, or why there is none."""
    console.print()
    verdict = verdict_of(study, queries, points)
    if verdict is None:
        console.print(why_none(study))
    else:
        print_decision(verdict, console)


def _groups_of(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _new_table(first: str, columns: Iterable[str], caption: str | None = None) -> Table:
    """A table with a column for names; a cell that is too wide wraps and is never cut."""
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first, min_width=TITLE_WIDTH, no_wrap=True)
    for column in columns:
        table.add_column(escape(column), justify="right", overflow="fold")
    return table


def _accuracy_table(
    study: Derived, splits: Sequence[str], more: Sequence[str] = (), caption: str | None = None
) -> Table:
    """Columns for the splits and `more`; its first row is what blind guesses would have."""
    title = f"{len({run.seed for run in study.results.runs})} seed(s)\npooled"
    table = _new_table(title, [*(f"{split}\n95%" for split in splits), *more], caption)
    chances = [study.chance(split) for split in splits]
    if any(chance is not None for chance in chances):
        table.add_row("chance", *("-" if chance is None else f"{chance:.3f}" for chance in chances))
    return table


def _accuracy_cells(study: Derived, arm: str, splits: Sequence[str]) -> list[str]:
    """Accuracy and its interval."""
    cells = []
    for split in splits:
        accuracy, interval = study.accuracy(arm, split), study.interval(arm, split)
        if accuracy is None or interval is None:
            cells.append("-")
        else:
            cells.append(f"{accuracy.value:.3f}\n{interval[0]:.2f}-{interval[1]:.2f}")
    return cells


def _break_even_table(study: Derived, points: float) -> Iterator[Table]:
    """From how many queries each trained arm pays, against each way of ICL, and whether it is as accurate."""
    if found := study.break_evens.get("seconds"):
        for rivals in _groups_of(list(dict.fromkeys(rival for _, rival in found)), RIVALS):
            table = _new_table("break-even", [*rivals, "accuracy"], f"{BREAK_EVEN_CAPTION} {points:g} points.")
            for way in dict.fromkeys(way for way, _ in found):
                word = study.against_icl(way, points) or "-"
                table.add_row(_cell(way), *(break_even_cell(found[way, rival]) for rival in rivals), word)
            yield table


def break_even_cell(found: BreakEven) -> str:
    """The number of queries, or why there is none; below it the interval."""
    return f"{break_even_words(found)}\n{interval_words(found)}"


def interval_words(found: BreakEven) -> str:
    """The interval of a break-even number."""
    return f"{count(found.low)} to {count(found.high)}" if found.has_interval else "no interval"


def break_even_words(found: BreakEven) -> str:
    """The number of queries; "not resolved" where the measurements do not tell whether there is one."""
    if math.isinf(found.queries) and found.is_resolved and found.below is not None:
        return f"below {count(found.below)}"
    return "not resolved" if math.isinf(found.queries) and not found.is_resolved else count(found.queries)


def count(queries: float) -> str:
    """A number of queries; infinity is never."""
    return "never" if math.isinf(queries) else f"{queries:,.0f}"


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
    for some in _groups_of(several, SPLITS_ALONE):
        table = _new_table("by form", (f"{split}\n{form}" for split, form in some))
        for arm in arms:
            cells = (counts[key].get(arm) for key in some)
            table.add_row(_cell(_title(arm)), *("-" if cell is None else f"{fmean(cell):.3f}" for cell in cells))
        yield table


def _paired_tables(study: Derived) -> Iterator[Table]:
    """Differences in accuracy between arms, with their p-values."""
    tests = {(test.first, test.second, test.split or "all"): test for test in study.paired}
    pairs = dict.fromkeys(key[:2] for key in tests)
    for some in _groups_of(list(dict.fromkeys(split for *_, split in tests)), SPLITS_PAIRED):
        table = _new_table("difference, p", some, PAIRED_CAPTION)
        for first, second in pairs:
            cells = (_paired_cell(tests.get((first, second, split))) for split in some)
            one, other = _cell(_title(first)), _cell(_title(second))
            between = "\n" if "\n" in one + other else " "
            table.add_row(f"{one} -{between}{other}", *cells)
        yield table


def _paired_cell(test: Paired | None) -> str:
    """Difference and p-value; below them the interval."""
    if test is None:
        return "-"
    return f"{test.difference:+.2f} {_p(test.p)}\n{test.low:+.2f} to {test.high:+.2f}"


def _calibration_table(runs: Sequence[Run], arms: Sequence[str]) -> Iterator[Table]:
    """How far the choices' probabilities are from how often they are right, over all splits."""
    answers: dict[str, list[Answer]] = {arm: [a for run in runs if run.arm == arm for a in run.answers] for arm in arms}
    if not all(answers.values()):
        return
    errors: dict[str, Callable[[list[Answer]], float]] = {
        "ECE": lambda mine: expected_calibration_error([a.confidence for a in mine], [a.is_correct for a in mine]),
        "ECE by chance": lambda mine: calibrated_error([a.confidence for a in mine]),
        "Brier": lambda mine: fmean(brier(a.probability, a.correct) for a in mine),
    }
    for some in _groups_of(arms, SPLITS_ALONE):
        table = _new_table("calibration", (_title(arm) for arm in some), CALIBRATION_CAPTION)
        table.add_row("answers", *(f"{len(answers[arm]):,}" for arm in some))
        for name, error in errors.items():
            table.add_row(name, *(f"{error(answers[arm]):.3f}" for arm in some))
        yield table


def _harm_table(study: Derived) -> Iterator[Table]:
    """What each arm changes elsewhere, where it was measured."""
    measured = {arm: harm for arm in study.arms if (harm := study.harm(arm)) is not None}
    if not measured:
        return
    table = _new_table("harm", ("KL\nnats/token", "general\nbefore", "general\nafter", "points\nlost"), HARM_CAPTION)
    for arm, harm in measured.items():
        cells = (f"{harm.kl:.4f}", f"{harm.general_before.value:.3f}", f"{harm.general.value:.3f}")
        table.add_row(_cell(_title(arm)), *cells, f"{harm.points_lost:+.1f}")
    yield table


def _p(p: float) -> str:
    return "<.001" if p < 0.001 else f"{p:.3f}".lstrip("0")


def _title(arm: str) -> str:
    return recorded_arm(arm).title


def _cell(title: str) -> str:
    """The title of an arm that is put together, on two lines."""
    return title.replace(" + ", " +\n")


def _seconds_cell(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds else "-"
