"""Accuracies of several studies as one Markdown table, for pages that are read as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.evaluate import Accuracy


def accuracy_table(studies: Sequence[Derived]) -> str:
    """A row for each split of each study: chance and each arm's accuracy, seeds pooled, with Wilson's interval at 95%.

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
            rows.append([f"{study.name}: {split} ({total})", guessed, *map(_cell, found), seconds])
            seconds = ""
    notes = dict.fromkeys(f"\n{study.beside}" for study in studies if study.beside)
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), *notes])


def _cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    low, high = accuracy.interval
    return f"{accuracy.value:.2f} ({low:.2f}-{high:.2f})"
