"""Rows of files with fields: JSON lines, a JSON array, and tables with `,`, `;`, tab or `|` between their cells.

A row comes with the names that its file gives its fields, in lower case, words joined by _; fields.py says which field
each name stands for.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icl_ft_fast.tasks.files import LINE, Problems, TaskError, find_encoding, parsed, read_lines, read_text

TABLES = (".csv", ".tsv")
SUFFIXES = (".jsonl", ".json", *TABLES)
DELIMITERS = ",;\t|"
_JOINTS = re.compile(r"[\s\-.]+")


def silent(note: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Format:
    """How files are written.

    Attributes:
        encoding: None to find it for each file.
        delimiter: between the cells of a table; None to find it for each file.
        columns: the files' names of fields, by our names: {"prompt": "Question"}.
        tell: called with a line of text for whatever was assumed about a file.

    Raises:
        ValueError: no encoding of text, or a delimiter that is not one character or that CSV needs for itself.
    """

    encoding: str | None = None
    delimiter: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    tell: Callable[[str], None] = silent

    def __post_init__(self) -> None:
        try:
            "".encode(self.encoding or "utf-8")
        except LookupError as error:
            raise ValueError(f"encoding: {error}") from error
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n\0'):
            raise ValueError(f"delimiter: expected one character, no quote and no line break, got {self.delimiter!r}")

    def encoding_of(self, path: Path) -> str:
        """The encoding of a file; raises TaskError."""
        return self.encoding or find_encoding(path, self.tell)


@dataclass(frozen=True)
class Row:
    """A row and where it stands.

    Attributes:
        where: file and line.
        cells: by the file's name of the field, plain().
        places: by name, where the cell stands; empty for JSON.
        names: as the file spells them, by plain name.
    """

    where: str
    cells: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def at(self, name: str) -> str:
        """Where a field stands."""
        return self.places.get(name, self.where)


def plain(name: str) -> str:
    """A field's name as it is compared: lower case, words joined by _."""
    return _JOINTS.sub("_", name.strip().casefold())


Heading = Callable[[dict[str, str]], None]


def read_rows(path: Path, form: Format, problems: Problems, check: Heading) -> Iterator[Row]:
    """The rows of a file; what is wrong with one is added to `problems`, and the others are read.

    Args:
        path: of the file.
        form: of the file.
        problems: gathers what is wrong.
        check: raises TaskError where a table's columns, spelt as in the file by plain name, do not suffice.
    """
    try:
        encoding = form.encoding_of(path)
        if path.suffix.lower() in TABLES:
            yield from _cells(path, encoding, form, problems, check)
        elif _is_array(path, encoding):
            yield from _array(path, encoding, problems)
        else:
            for where, line in read_lines(path, encoding):
                if line.strip():
                    try:
                        yield _object(where, parsed(where, line))
                    except TaskError as error:
                        problems.add(error)
    except TaskError as error:
        problems.add(error)


def _object(where: str, row: dict[str, Any]) -> Row:
    return Row(where, {plain(name): value for name, value in row.items()}, names={plain(name): name for name in row})


def _is_array(path: Path, encoding: str) -> bool:
    """Whether a file is one JSON value, not a value a line."""
    first = next((line.strip() for _, line in read_lines(path, encoding) if line.strip()), "")
    return path.suffix.lower() == ".json" or first.startswith("[")


def _array(path: Path, encoding: str, problems: Problems) -> Iterator[Row]:
    """The objects of a JSON array, or of the only array in a JSON object; of JSON lines in a .json file."""
    text = read_text(path, encoding)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON lines under another name
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    try:
                        yield _object(f"{path}:{number}", parsed(f"{path}:{number}", line))
                    except TaskError as wrong:
                        problems.add(wrong)
            return
        raise TaskError(f"{path}: not valid JSON: {error}") from error
    if isinstance(found, dict):
        arrays = [value for value in found.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        found = arrays[0] if len(arrays) == 1 else [found]
    if not isinstance(found, list):
        raise TaskError(f"{path}: expected a JSON array of objects, got {type(found).__name__}")
    for index, row in enumerate(found, 1):
        where = f"{path}:[{index}]"
        row = {"text": row} if isinstance(row, str) else row
        if isinstance(row, dict):
            yield _object(where, row)
        else:
            problems.add(f"{where}: expected a JSON object, got {type(row).__name__}")


def _cells(path: Path, encoding: str, form: Format, problems: Problems, check: Heading) -> Iterator[Row]:
    lines = (line for _, line in read_lines(path, encoding))
    first = next(lines, "")
    skipped = 0
    delimiter = form.delimiter
    if re.fullmatch(r"sep=.\n?", first):  # written by Excel for itself
        delimiter, first, skipped = delimiter or first[4], next(lines, ""), 1
    if delimiter is None:
        delimiter = _delimiter(path, first)
        if delimiter != "," and path.suffix.lower() != ".tsv":
            form.tell(f"{path}: cells are separated by {delimiter!r}")

    def given() -> Iterator[str]:
        yield first
        yield from lines

    csv.field_size_limit(LINE)  # the module's own is shorter than an article
    reader = csv.reader(given(), strict=True, delimiter=delimiter)
    try:
        spelt = next(reader, [])
        names = [plain(name) for name in spelt]
        for c, name in enumerate(names):
            if name and name in names[:c]:
                raise TaskError(f"{path}:{1 + skipped}: column {c + 1}: {spelt[c][:60]!r} is there twice")
        check(dict(zip(names, spelt, strict=True)))
        for cells in reader:
            where = f"{path}:{reader.line_num + skipped}"
            if not any(cells):
                continue
            if len(cells) > len(names) and not any(cells[len(names) :]):
                cells = cells[: len(names)]
            if len(cells) != len(names):
                column = min(len(cells), len(names)) + 1
                problems.add(f"{where}: column {column}: expected {len(names)} columns, got {len(cells)}")
                continue
            places = {name: f"{where}: column {c}" for c, name in enumerate(names, 1) if name}
            row = {name: cell for name, cell in zip(names, cells, strict=True) if name}
            yield Row(where, row, places, dict(zip(names, spelt, strict=True)))
    except csv.Error as error:
        raise TaskError(f"{path}:{reader.line_num + skipped}: not valid CSV: {error}") from error


def _delimiter(path: Path, heading: str) -> str:
    """The delimiter that makes most columns of a heading; a comma if none makes two."""
    if path.suffix.lower() == ".tsv":
        return "\t"

    def columns(delimiter: str) -> int:
        try:
            return len(next(csv.reader([heading], delimiter=delimiter), []))
        except csv.Error:
            return 0

    return max(DELIMITERS, key=columns)
