"""A study's answers as rows: for frames, spreadsheets and other programs. Writes .csv, .jsonl and .parquet."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.runtime.durable import replacing
from icl_ft_fast.runtime.errors import UserError

FORMATS = (".csv", ".jsonl", ".parquet")


class RowsError(UserError):
    """A file of rows that cannot be written; the message names it."""


def answer_rows(study: Derived) -> Iterator[dict[str, Any]]:
    """A row for each answer of each run, with the question where the results have it.

    `choices` and `probability` are lists, `correct` the indices of the right choices.
    """
    asked = {(seed, q.id): q for some in study.results.questions for seed in some.seeds for q in some.questions}
    for run in study.results.runs:
        for answer in run.answers:
            question = asked.get((run.seed, answer.question_id))
            yield {
                "study": study.name,
                "task": study.results.task,
                "model": study.results.model,
                "arm": run.arm,
                "seed": run.seed,
                "split": answer.split,
                "form": answer.form,
                "topic": answer.topic,
                "question_id": answer.question_id,
                "prompt": None if question is None else question.prompt,
                "choices": None if question is None else list(question.choices),
                "correct": list(answer.correct),
                "predicted": answer.predicted,
                "is_correct": answer.is_correct,
                "confidence": answer.confidence,
                "chance": answer.chance,
                "probability": list(answer.probability),
            }


def check_format(path: Path) -> None:
    """Raise RowsError on a name that ends in none of FORMATS, or a format whose package is missing."""
    if path.suffix not in FORMATS:
        raise RowsError(f"{path}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ModuleNotFoundError as error:
            raise RowsError(f"{path}: needs pyarrow: pip install pyarrow, or choose .csv or .jsonl") from error


def write_rows(studies: Sequence[Derived], path: Path) -> int:
    """Write all answers of some studies to one file, whole or not at all; returns the number of rows.

    Lists are JSON in .csv, which has no others.

    Raises:
        RowsError: see check_format().
    """
    check_format(path)
    rows = [row for study in studies for row in answer_rows(study)]
    with replacing(path) as partial:
        if path.suffix == ".jsonl":
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".csv":
            partial.write_text(_csv(rows), encoding="utf-8", newline="")
        else:
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
    return len(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]) if rows else ["study"])
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return file.getvalue()


def _cell(value: Any) -> Any:
    """A cell of a spreadsheet: lists as JSON, and no text that one would run as a formula."""
    if isinstance(value, list):
        return json.dumps(value)
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
