"""A task of one's own: documents and questions gathered from JSON lines, CSV, text and Markdown files.

Files are read a line at a time (text and Markdown files whole), in memory that does not grow with their length.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_ft_fast.tasks.seen import Seen
from icl_ft_fast.tasks.task import (
    Document,
    Question,
    TaskError,
    document_of,
    encodable,
    question_of,
    read_jsonl,
    read_lines,
)

SUFFIXES = (".jsonl", ".csv", ".txt", ".md")
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHOICE = re.compile(r"choice\d+")


@dataclass(frozen=True)
class Format:
    """How files are written: their encoding, and what is between the cells of CSV files.

    Raises:
        ValueError: no encoding of text, or a delimiter that is not one character or that CSV needs for itself.
    """

    encoding: str = "utf-8"
    delimiter: str = ","

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding)
        except LookupError as error:
            raise ValueError(f"encoding: {error}") from error
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n\0':
            raise ValueError(f"delimiter: expected one character, no quote and no line break, got {self.delimiter!r}")


def iter_documents(paths: Sequence[str | Path], form: Format | None = None) -> Iterator[Document]:
    """The documents of files and of all such files below folders, in the order given, folders sorted.

    Args:
        paths: .jsonl (objects with "text" and perhaps "id" and "topic"), .csv (a heading with the same names), .txt and
            .md (a document each); or folders.
        form: of every file.

    Yields:
        Documents; an id that a row lacks is its file's name and line, and a text file's is its name, below the folder
        that was given.

    Raises:
        TaskError: a file that cannot be read or used, an id used twice, or no document at all; names file, line,
            column and field.
    """
    found = (document for path in paths for document in _of_path(Path(path), form or Format()))
    empty = True
    with contextlib.closing(Seen()) as ids:
        for where, document in found:
            if not ids.add(document.id):
                raise TaskError(f"{where}: id: {document.id!r} was used before")
            empty = False
            yield document
    if empty:
        raise TaskError(f"{', '.join(map(str, paths))}: no documents: expected {', '.join(SUFFIXES)} files with some")


def _of_path(path: Path, form: Format) -> Iterator[tuple[str, Document]]:
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()):
            if not file.resolve().is_relative_to(path.resolve()):
                raise TaskError(f"{file}: a link out of {path}; name what it leads to, or copy it")
            yield from _of_file(file, str(file.relative_to(path)), form)
    else:
        yield from _of_file(path, path.name, form)


def _of_file(path: Path, name: str, form: Format) -> Iterator[tuple[str, Document]]:
    """Documents, each with the place of its id."""
    if path.suffix not in SUFFIXES:
        raise TaskError(f"{path}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix in (".txt", ".md"):
        _check_mark(path, form.encoding)
        text = "".join(line for _, line in read_lines(path, form.encoding))
        yield str(path), document_of(str(path), {"id": name, "text": text})
        return
    for where, row, places in _rows(path, form, ("text",)):
        default = f"{name}{where.removeprefix(str(path))}"
        yield places.get("id", where), document_of(where, {"id": default} | row)


def read_questions(path: Path, form: Format | None = None) -> tuple[Question, ...]:
    """The questions of a .jsonl file (see task.py) or a .csv file, in its order.

    A CSV file's heading names its columns: "prompt", "choice1", "choice2", ... (a question with fewer choices leaves
    the last ones empty), and perhaps "id", "answer" (a number, 0 for the first choice), "split", "topic", "form" and
    "also_correct" (numbers with spaces between them). An id that a row lacks is its file's name and line.

    Raises:
        TaskError: a file that cannot be read or used; names file, line, column and field.
    """
    if path.suffix not in (".jsonl", ".csv"):
        raise TaskError(f"{path}: expected a file of questions that ends in .jsonl or .csv")
    questions: dict[str, Question] = {}
    for where, row, places in _rows(path, form or Format(), ("prompt", "choice1")):
        default = {"id": f"{path.name}{where.removeprefix(str(path))}"}
        question = question_of(where, default | (_uncelled(row, places) if path.suffix == ".csv" else row))
        if question.id in questions:
            raise TaskError(f"{places.get('id', where)}: id: {question.id!r} was used before in this file")
        questions[question.id] = question
    if not questions:
        raise TaskError(f"{path}: empty: expected at least one question")
    return tuple(questions.values())


def _uncelled(cells: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """A row of a CSV file of questions as one of JSON lines has it."""
    columns = [name for name in places if _CHOICE.fullmatch(name)]
    while len(columns) > 1 and columns[-1] not in cells:
        columns.pop()
    for name in columns:
        if name not in cells:
            raise TaskError(f"{places[name]}: {name}: expected a non-empty string")
    row: dict[str, Any] = {name: cell for name, cell in cells.items() if not _CHOICE.fullmatch(name)}
    row |= {"prompt": cells.get("prompt", ""), "choices": [cells[name] for name in columns]}
    for name in ("answer", "also_correct"):
        numbers = cells.get(name, "").split()
        if not all(n.isdecimal() and len(n) < 9 and int(n) < len(columns) for n in numbers) or (
            name == "answer" and len(numbers) > 1
        ):
            raise TaskError(f"{places[name]}: {name}: expected 0 to {len(columns) - 1}, got {cells[name][:60]!r}")
        row[name] = [int(n) for n in numbers]
    return row | {"answer": row["answer"][0] if row["answer"] else None}


def _rows(path: Path, form: Format, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """("file:line", row, the place of each of its cells if it is one of CSV) of each row."""
    _check_mark(path, form.encoding)
    if path.suffix == ".jsonl":
        yield from ((where, row, {}) for where, row in read_jsonl(path, form.encoding))
        return
    lines = (line for _, line in read_lines(path, form.encoding))
    reader = csv.reader(lines, strict=True, delimiter=form.delimiter)
    try:
        heading = next(reader, [])
        for name in needed:
            if name not in heading:
                raise TaskError(f"{path}:1: {name}: missing from the heading {form.delimiter.join(heading)[:60]!r}")
        for c, name in enumerate(heading):
            if name in heading[:c]:
                raise TaskError(f"{path}:1: column {c + 1}: {name[:60]!r} is there twice")
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if cells and len(cells) != len(heading):
                column = min(len(cells), len(heading)) + 1
                raise TaskError(f"{where}: column {column}: expected {len(heading)} columns, got {len(cells)}")
            places = {name: f"{where}: column {c}" for c, name in enumerate(heading, 1)}
            row = {name: encodable(places[name], name, cell) for name, cell in zip(heading, cells, strict=False)}
            if row:
                yield where, {name: cell for name, cell in row.items() if cell or name in ("text", "prompt")}, places
    except csv.Error as error:
        raise TaskError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _check_mark(path: Path, encoding: str) -> None:
    """Refuse a file that begins as one of another encoding does."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    name = codecs.lookup(encoding).name
    for mark, its in _MARKS.items():
        if start.startswith(mark):
            if name != its:
                raise TaskError(f"{path}: begins with the mark of {its}, not of {encoding}; give --encoding {its}")
            return
    if b"\0" in start and not name.startswith(("utf-16", "utf-32")):
        raise TaskError(
            f"{path}: begins with zero bytes, as utf-16 and utf-32 do; give --encoding utf-16-le or its like"
        )
