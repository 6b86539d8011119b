"""A finished study in a script or a notebook: its numbers, tables, charts, and a pandas frame of its answers."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from icl_ft_fast.report import table
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.rows import answer_rows
from icl_ft_fast.report.tracking import track
from icl_ft_fast.report.verdict import Verdict, verdict_of
from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.study.evaluate import Accuracy
from icl_ft_fast.study.results import Results


@dataclass(frozen=True)
class Study:
    """A finished study: prints its tables, shows its charts in a notebook, and has its numbers in `derived`.

    Examples:
        >>> question = iff.Question("q", "femp are", (" wider than glon.", " less wide than glon."), answer=0)
        >>> task, options = iff.Task((), (question,)), iff.StudyOptions(measure_s=0)
        >>> results = iff.compare(iff.load("shipped"), task, arms=["base"], seeds=[0], options=options)
        >>> iff.Study.of(results).accuracy("base").total
        1
    """

    derived: Derived

    @classmethod
    def read(cls, path: str | Path, **settings: Any) -> Study:
        """The study of a results.json, or of the folder that holds one; settings and errors are Derived's."""
        return cls(Derived.read(path, **settings))

    @classmethod
    def of(cls, results: Results, name: str = "study", **settings: Any) -> Study:
        """The study of what compare() returns; settings are Derived's."""
        return cls(Derived(results, name, **settings))

    def accuracy(self, arm: str, split: str | None = None) -> Accuracy | None:
        """An arm's accuracy over all seeds, and over all splits if none is given; None without answers."""
        return self.derived.accuracy(arm, split)

    def print(self, queries: float | None = None, *, tolerance: float = 2.0) -> None:
        """Print the tables of `icl-ft-fast compare`.

        Args:
            queries: end with a decision for so many.
            tolerance: accuracy that may be lost against the best arm, in percentage points.
        """
        console = Console()
        table.print_study(self.derived, console, tolerance)
        if queries is not None:
            table.print_decision_at(self.derived, queries, tolerance, console)

    def verdict(self, queries: float, *, tolerance: float = 2.0) -> Verdict | None:
        """The decision on so many queries with its certainty; None where it cannot be given.

        Args:
            queries: how many, over all days of the service.
            tolerance: accuracy that may be lost against the best arm, in percentage points.
        """
        return verdict_of(self.derived, queries, tolerance)

    def to_pandas(self) -> Any:
        """A pandas frame with a row for every answer, see answer_rows(); needs pandas."""
        return _frame(answer_rows(self.derived))

    def costs(self) -> Any:
        """A pandas frame with a row for each resource and way of answering: setup, reading, query, cache lifetime."""
        return _frame(
            {"study": self.derived.name, "resource": resource, "unit": unit, "way": way} | asdict(samples.line)
            for resource, unit in self.derived.resources.items()
            for way, samples in self.derived.ways(resource).items()
        )

    def curves(self) -> Any:
        """A pandas frame with a row for each training step of each run: its loss in nats a token."""
        return _frame(
            {"study": self.derived.name, "arm": run.arm, "seed": run.seed, "step": step, "loss": loss}
            for run in self.derived.results.runs
            for step, loss in enumerate(run.losses, 1)
        )

    def track(self, name: str, *, project: str = "icl_ft_fast") -> int:
        """Log every run with its curves and a table of answers to Trackio or Weights & Biases; see tracking.track()."""
        return track([self.derived], name, project=project)

    def export(self, folder: Path, queries: float | None = None, *, overwrite: bool = False) -> list[Path]:
        """Write each chart as .svg and .png, each file whole or not at all; needs matplotlib.

        Args:
            folder: made when missing.
            queries: marked in the charts.
            overwrite: replace files that are there.

        Raises:
            FileExistsError: a file is there already and is not to be overwritten.
        """
        from icl_ft_fast.report import charts

        name, made = re.sub(r"[^\w.-]+", "_", self.derived.name), dict[Path, bytes]()
        for chart in charts.draw(self.derived, queries):
            made[folder / f"{name}-{chart.name}.svg"] = charts.svg(chart).encode()
            made[folder / f"{name}-{chart.name}.png"] = charts.png(chart)
        for path in made:
            if path.exists() and not overwrite:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        for path, data in made.items():
            with replacing(path) as partial:
                partial.write_bytes(data)
        return list(made)

    def _repr_html_(self) -> str:
        from icl_ft_fast.report.page import fragment

        return fragment(self.derived)


def _frame(rows: Iterable[dict[str, Any]]) -> Any:
    import pandas

    return pandas.DataFrame(list(rows))
