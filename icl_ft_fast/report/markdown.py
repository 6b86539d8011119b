"""Several studies as Markdown: accuracies, their differences and the verdicts, for pages that are read as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.verdict import verdict_of, why_none
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.paired import Paired


def markdown(studies: Sequence[Derived], queries: float | None = None, points: float = 2.0) -> str:
    """The tables of accuracies and of differences, and a verdict for each study where a number of queries is given.

    Args:
        studies: the studies.
        queries: how many, over all days of the service.
        points: accuracy that may be lost, in percentage points.
    """
    parts = [accuracy_table(studies)]
    parts += [table] if (table := gap_table(studies, points)) else []
    for study in studies if queries is not None else ():
        verdict = verdict_of(study, queries or 0.0, points)
        parts.append(f"**{study.name}**: {why_none(study) if verdict is None else verdict.text}")
    return "\n\n".join(parts) + "\n"


def gap_table(studies: Sequence[Derived], points: float = 2.0) -> str:
    """A row for each split of each study: the tested pairs' differences with interval at 95%, p and word; "" for none.

    The words are those of Paired.word() at a tolerance of `points`; p is Holm-adjusted within the study.
    """
    tests = {(study.name, t.split, t.first, t.second): t for study in studies for t in study.paired}
    pairs = list(dict.fromkeys(key[2:] for key in tests))
    titles = [" - ".join(recorded_arm(arm).title for arm in pair) for pair in pairs]
    rows = [["task: split", *titles], ["---"] * (1 + len(titles))]
    for name, split in dict.fromkeys(key[:2] for key in tests):
        cells = (_gap_cell(tests.get((name, split, *pair)), points) for pair in pairs)
        rows.append([f"{name}: {split}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if tests else ""


def _gap_cell(test: Paired | None, points: float) -> str:
    if test is None:
        return "-"
    p = "p < 0.001" if test.p < 0.001 else f"p {test.p:.3f}"
    return f"{test.difference:+.2f} ({test.low:+.2f} to {test.high:+.2f}), {p}: {test.word(points)}"


def accuracy_table(studies: Sequence[Derived]) -> str:
    """A row for each split of each study: chance and each arm's accuracy, seeds pooled, with its interval at 95%.

    The last column has the seconds of all phases of all runs, answering included, in the study's first row. Notes on
    how they were measured follow the table.
    """
    arms = list(dict.fromkeys(arm for study in studies for arm in study.arms))
    titles = ["task: split (answers)", "chance", *(recorded_arm(arm).title for arm in arms), "seconds"]
    rows = [titles, ["---"] * len(titles)]
    for study in studies:
        phases = [phase for run in study.results.runs for phase in run.counts["phases"].values()]
        seconds = f"{math.fsum(phase['wall_s'] for phase in phases):,.0f}"
        for split in study.splits:
            found = [study.accuracy(arm, split) for arm in arms]
            total = max(accuracy.total for accuracy in found if accuracy is not None)
            chance = study.chance(split)
            guessed = "-" if chance is None else f"{chance:.2f}"
            cells = (_cell(study, arm, split) for arm in arms)
            rows.append([f"{study.name}: {split} ({total})", guessed, *cells, seconds])
            seconds = ""
    notes = dict.fromkeys(f"\n{note}" for study in studies for note in study.notes)
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *notes])


def _cell(study: Derived, arm: str, split: str) -> str:
    accuracy, interval = study.accuracy(arm, split), study.interval(arm, split)
    if accuracy is None or interval is None:
        return "-"
    return f"{accuracy.value:.2f} ({interval[0]:.2f}-{interval[1]:.2f})"
