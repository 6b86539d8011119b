"""A study in a notebook: it shows itself, becomes a pandas frame, writes its charts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_ft_fast.report import charts
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.page import fragment
from icl_ft_fast.study.results import Results


@dataclass(frozen=True)
class Study:
    """A finished study in a notebook: it shows its charts, and `derived` has its numbers.

    Example:
        >>> study = Study.read("out/run1")
        >>> print(study.derived.accuracy("icl").value)
        >>> study.export(Path("charts"))
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

    def to_pandas(self) -> Any:
        """A pandas frame with a row for every answer; needs pandas."""
        import pandas

        return pandas.DataFrame(
            {
                "study": self.derived.name,
                "arm": run.arm,
                "seed": run.seed,
                "split": a.split,
                "form": a.form,
                "question_id": a.question_id,
                "topic": a.topic,
                "predicted": a.predicted,
                "is_correct": a.is_correct,
                "confidence": a.confidence,
                "chance": a.chance,
            }
            for run in self.derived.results.runs
            for a in run.answers
        )

    def export(self, folder: Path, queries: float | None = None, *, overwrite: bool = False) -> list[Path]:
        """Write each chart as .svg and .png; `queries` is marked in them.

        Raises:
            FileExistsError: a file is there already and is not to be overwritten.
        """
        folder.mkdir(parents=True, exist_ok=True)
        name, written = re.sub(r"[^\w.-]+", "_", self.derived.name), []
        for chart in charts.draw(self.derived, queries):
            for ending, data in (("svg", charts.svg(chart).encode()), ("png", charts.png(chart))):
                written.append(folder / f"{name}-{chart.name}.{ending}")
                with written[-1].open("wb" if overwrite else "xb") as file:
                    file.write(data)
        return written

    def _repr_html_(self) -> str:
        return fragment(self.derived)
