"""A study's runs in Trackio or Weights & Biases: figures, curves and a table of answers for each arm and seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from icl_ft_fast.finetuning.trackers import tracker_of
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.rows import answer_rows
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.records import Run

TABLE_TRACKERS = ("trackio", "wandb")


def track(studies: Sequence[Derived], name: str, *, project: str = "icl_ft_fast") -> int:
    """Log every run of some studies to a tracker, as a run of the study's group; returns the number of runs.

    Each has the training's loss and accuracy by step, then the final figures, and the table `answers`, see
    answer_rows(), with lists as JSON. The tracker's own settings hold: WANDB_MODE=offline, WANDB_DIR, TRACKIO_DIR.

    Args:
        studies: the studies.
        name: "trackio" or "wandb".
        project: the tracker's project.

    Raises:
        ValueError: another name.
        FinetuneError: the tracker is not installed.
    """
    if name not in TABLE_TRACKERS:
        raise ValueError(f"name: expected {' or '.join(TABLE_TRACKERS)}, got {name!r}")
    tracker, number = tracker_of(name), 0
    for study in studies:
        rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in answer_rows(study):
            rows.setdefault((row["arm"], row["seed"]), []).append(row)
        for run in study.results.runs:
            tracked = tracker.init(
                project=project,
                name=f"{study.name}, {recorded_arm(run.arm).title}, seed {run.seed}",
                group=study.name,
                config=_config(study, run),
            )
            by_step = _by_step(run)
            for step in sorted(by_step):
                tracked.log(by_step[step], step=step)
            table = _table(tracker, rows.get((run.arm, run.seed), []))
            tracked.log(_final(run) | table, step=max(by_step, default=0) + 1)
            tracked.finish()
            number += 1
    return number


def _config(study: Derived, run: Run) -> dict[str, Any]:
    results = study.results
    about = {"arm": run.arm, "seed": run.seed, "task": results.task, "model": results.model}
    return about | {"settings": results.settings, "machine": results.machine}


def _by_step(run: Run) -> dict[int, dict[str, float]]:
    """What training logged after each step: the loss in nats a token, and accuracies."""
    found: dict[int, dict[str, float]] = {step: {"train/loss": loss} for step, loss in enumerate(run.losses, 1)}
    for point in run.curve:
        entry = {f"train/accuracy/{split}": value for split, value in point.accuracy.items()}
        found.setdefault(point.step, {}).update(entry)
    return found


def _final(run: Run) -> dict[str, float]:
    correct, total = (sum(getattr(a, part) for a in run.accuracy.values()) for part in ("correct", "total"))
    found = {"setup_s": run.setup_s, "query_s": run.query_s}
    found |= {"accuracy": correct / total} if total else {}
    found |= {f"accuracy/{split}": accuracy.value for split, accuracy in run.accuracy.items() if accuracy.total}
    if run.harm is not None:
        found |= {"harm/kl": run.harm.kl, "harm/points_lost": run.harm.points_lost}
    return found


def _table(tracker: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers as a table of the tracker's own; none where there are no answers."""
    if not rows:
        return {}
    cells = [[json.dumps(value) if isinstance(value, list) else value for value in row.values()] for row in rows]
    return {"answers": tracker.Table(columns=list(rows[0]), data=cells)}
