"""Accuracies of several studies as one Markdown table, for pages that are read as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study.arms import recorded_arm


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
        seconds = f"{math.fsum(phase['wall_s'] for phase in phases):.0f}"
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
