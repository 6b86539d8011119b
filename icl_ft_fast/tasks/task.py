"""A task: documents and multiple-choice questions about them, read from and written to JSON lines.

documents.jsonl has {"id", "text"} and perhaps "topic"; questions.jsonl has {"id", "prompt", "choices"} and perhaps
"answer" (the index of the correct choice), "split" ("test" unless given), "topic", "form", "also_correct" and
"document"; other fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from icl_ft_fast.tasks.files import Problems, TaskError, read_jsonl, write_jsonl


@dataclass(frozen=True)
class Document:
    """A text to learn from.

    Attributes:
        id: unique in its task.
        text: what is read or trained on.
        topic: documents of one topic say the same; in-context learning may be given only some of them.
    """

    id: str
    text: str
    topic: str | None = None


@dataclass(frozen=True)
class Question:
    """A prompt and its possible continuations, which begin right after it (mind the space).

    Attributes:
        id: unique in its task.
        prompt: what precedes every choice; may be empty.
        choices: at least one, none empty.
        answer: index of the correct choice, None if unknown.
        split: the kind of generalisation that the question tests.
        topic: questions of one topic rest on the same facts, so statistics count them as one witness.
        form: a finer kind within the split, such as a syllogism's figure.
        also_correct: indices of further choices that are as true as the answer ("no X are Y", "no Y are X").
        document: id of the document that answers it, None if unknown.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int | None = None
    split: str = "test"
    topic: str | None = None
    form: str | None = None
    also_correct: tuple[int, ...] = ()
    document: str | None = None

    @property
    def correct(self) -> tuple[int, ...]:
        """Indices of all correct choices, the answer first, then what equals one; empty where the answer is unknown."""
        if self.answer is None:
            return ()
        stated = (self.answer, *self.also_correct)
        texts = {self.choices[c] for c in stated}
        return stated + tuple(c for c, text in enumerate(self.choices) if text in texts and c not in stated)


@dataclass(frozen=True)
class Task:
    """Documents and the questions about them."""

    documents: tuple[Document, ...]
    questions: tuple[Question, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the questions' splits, in order of first appearance."""
        return tuple(dict.fromkeys(question.split for question in self.questions))

    @staticmethod
    def read(folder: str | Path) -> Task:
        """Read `folder`/documents.jsonl and `folder`/questions.jsonl; raises TaskError."""
        folder = Path(folder)
        return Task(read_documents(folder / "documents.jsonl"), read_questions(folder / "questions.jsonl"))

    def write(self, folder: str | Path) -> None:
        """Write both files into `folder`, which is made; each replaces its predecessor atomically."""
        folder = Path(folder)
        write_jsonl(folder / "documents.jsonl", (asdict(document) for document in self.documents))
        write_jsonl(folder / "questions.jsonl", (asdict(question) for question in self.questions))


def read_documents(path: str | Path) -> tuple[Document, ...]:
    """The documents of a JSON-lines file; raises TaskError."""
    return _read(Path(path), document_of)


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """The questions of a JSON-lines file; raises TaskError."""
    return _read(Path(path), question_of)


Row = TypeVar("Row", Document, Question)


def _read(path: Path, parse: Callable[[str, dict[str, Any]], Row]) -> tuple[Row, ...]:
    rows: dict[str, Row] = {}
    problems = Problems()
    for where, raw in read_jsonl(path, problems):
        try:
            row = parse(where, raw)
        except TaskError as error:
            problems.add(error)
            continue
        if row.id in rows:
            problems.add(f"{where}: id: {row.id!r} was used before in this file")
        rows[row.id] = row
    problems.check()
    if not rows:
        raise TaskError(f"{path}: empty: expected at least one JSON object")
    return tuple(rows.values())


def id_field(where: str, row: dict[str, Any]) -> str:
    """The row's id, which may be a whole number; raises TaskError."""
    value = row.get("id")
    return str(value) if type(value) is int else text_field(where, row, "id")


def text_field(where: str, row: dict[str, Any], field: str) -> str:
    """The string in a row's field; raises TaskError."""
    if field not in row:
        raise TaskError(f"{where}: {field}: missing")
    if not isinstance(row[field], str):
        raise TaskError(f"{where}: {field}: expected a string, got {json.dumps(row[field])[:60]}")
    return encodable(where, field, row[field])


def optional_field(where: str, row: dict[str, Any], field: str) -> str | None:
    """The string in a row's field, None where it is absent or null; raises TaskError."""
    return None if row.get(field) is None else text_field(where, row, field)


def encodable(where: str, field: str, text: str) -> str:
    """The text; raises TaskError where an escape left half a character, which neither files nor tokenizers take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(f"{where}: {field}: half a surrogate pair (character {error.start + 1})") from error
    return text


def document_of(where: str, row: dict[str, Any]) -> Document:
    """A row as a document; raises TaskError."""
    return Document(id_field(where, row), text_field(where, row, "text"), optional_field(where, row, "topic"))


def question_of(where: str, row: dict[str, Any]) -> Question:
    """A row as a question; raises TaskError."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices:
        raise TaskError(f"{where}: choices: expected a list with at least one string")
    for c, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise TaskError(f"{where}: choices[{c}]: expected a non-empty string, got {json.dumps(choice)[:60]}")
        encodable(where, f"choices[{c}]", choice)
    answer = row.get("answer")
    if answer is not None and (type(answer) is not int or not 0 <= answer < len(choices)):
        raise TaskError(f"{where}: answer: expected 0 to {len(choices) - 1}, got {json.dumps(answer)[:60]}")
    also = row.get("also_correct", [])
    indices = isinstance(also, list) and all(type(c) is int and 0 <= c < len(choices) for c in also)
    if not indices or len({answer, *also}) <= len(also) or (also and answer is None):
        raise TaskError(
            f"{where}: also_correct: expected distinct indices of choices beside an answer, got {json.dumps(also)[:60]}"
        )
    if answer is not None:  # of equal choices the first is the answer: it is the one that is predicted
        answer = choices.index(choices[answer])
        also = [c for c in also if c != answer]
    return Question(
        id_field(where, row),
        text_field(where, row, "prompt"),
        tuple(choices),
        answer,
        text_field(where, row, "split") if "split" in row else "test",
        optional_field(where, row, "topic"),
        optional_field(where, row, "form"),
        tuple(also),
        optional_field(where, row, "document"),
    )
