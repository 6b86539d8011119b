"""A task of one's own: documents and questions gathered from JSON, CSV, text and Markdown files.

Documents are read a line at a time (text, Markdown and JSON arrays whole), in memory that does not grow with their
number. All that is wrong with the files is told at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icl_ft_fast.tasks.files import Problems, TaskError, read_text
from icl_ft_fast.tasks.seen import Seen
from icl_ft_fast.tasks.tables import SUFFIXES as ROWS
from icl_ft_fast.tasks.tables import Format, Row, plain, read_rows
from icl_ft_fast.tasks.task import Document, Question, document_of, encodable, question_of

TEXTS = (".txt", ".md")
SUFFIXES = (*ROWS, *TEXTS)
# What others call a field, plain(), ours first; the first that a file has is taken.
DOCUMENT_NAMES: dict[str, tuple[str, ...]] = {
    "text": ("text", "document", "content", "context", "body", "passage", "paragraph", "page_content", "article"),
    "id": ("id", "_id", "doc_id", "document_id", "docid", "uid", "key"),
    "topic": ("topic", "category", "subject"),
}
QUESTION_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "stem", "question_text", "question_stem", "input", "q", "ctx")
    + ("sentence", "goal"),
    "choices": ("choices", "options", "candidates", "answers", "endings", "mc_options"),
    "answer": ("answer", "label", "correct_answer", "correct", "correct_choice", "correct_option", "right_answer")
    + ("answer_index", "answer_idx", "answerkey", "answer_key", "gold", "target", "solution", "key"),
    "id": ("id", "_id", "question_id", "qid", "uid"),
    "split": ("split",),
    "topic": ("topic", "category", "subject"),
    "form": ("form",),
    "also_correct": ("also_correct",),
    "document": ("document", "document_id", "doc_id", "source_id"),
}
_CHOICE = re.compile(r"(choice|option|answer|opt|distractor|sol|ending|)_?(?:(\d{1,2})|[a-z])")
_LETTER = re.compile(r"(?:(?:option|choice|answer)\s*)?\(?([A-Za-z])[).:]?", re.IGNORECASE)
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " "})
ONE_IN = 0.01  # an answer of 0 is missed if its absence by chance is rarer


def iter_documents(paths: Sequence[str | Path], form: Format | None = None) -> Iterator[Document]:
    """The documents of files and of all such files below folders, in the order given, folders sorted.

    Args:
        paths: .jsonl, .json, .csv or .tsv (rows with "text" and perhaps "id" and "topic", or other names of
            DOCUMENT_NAMES), .txt and .md (a document each); or folders.
        form: of every file.

    Yields:
        Documents; an id that a row lacks is its file's name and line, and a text file's is its name, below the folder
        that was given.

    Raises:
        TaskError: at the end, with all files that cannot be read, rows that cannot be used and ids used twice; or no
            document at all. It names file, line, column and field.
    """
    form, problems, empty = form or Format(), Problems(), True
    with contextlib.closing(Seen()) as ids:
        for path in map(Path, paths):
            for where, document in _of_path(path, form, problems):
                if not ids.add(document.id):
                    problems.add(f"{where}: id: {document.id!r} was used before")
                    continue
                empty = False
                yield document
    problems.check()
    if empty:
        raise TaskError(f"{', '.join(map(str, paths))}: no documents: expected {', '.join(SUFFIXES)} files with some")


def _of_path(path: Path, form: Format, problems: Problems) -> Iterator[tuple[str, Document]]:
    if not path.is_dir():
        yield from _of_file(path, path.name, form, problems)
        return
    for file in sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()):
        if not file.resolve().is_relative_to(path.resolve()):
            problems.add(f"{file}: a link out of {path}; name what it leads to, or copy it")
            continue
        yield from _of_file(file, file.relative_to(path).as_posix(), form, problems)


def _of_file(path: Path, name: str, form: Format, problems: Problems) -> Iterator[tuple[str, Document]]:
    """Documents, each with the place of its id."""
    if path.suffix.lower() not in SUFFIXES:
        problems.add(f"{path}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")
        return
    if path.suffix.lower() in TEXTS:
        try:
            yield str(path), Document(name, encodable(str(path), "text", read_text(path, form.encoding_of(path))))
        except TaskError as error:
            problems.add(error)
        return
    fields = _Fields(path, form, DOCUMENT_NAMES)
    for row in read_rows(path, form, problems, lambda columns: fields.need("text", columns)):
        try:
            found = {ours: value for ours, value in fields.of(row).items() if value or ours == "text"}
            found |= {"topic": str(found["topic"])} if type(found.get("topic")) is int else {}
            if isinstance(found.get("text"), str):
                found["text"] = found["text"].replace("\r\n", "\n").replace("\r", "\n")
            default = {"id": f"{name}{row.where.removeprefix(str(path))}"}
            yield row.at(fields.theirs("id")), document_of(row.at(fields.theirs("text")), default | found)
        except TaskError as error:
            problems.add(error)
    fields.tell()


class _Fields:
    """Which of a file's fields is which of ours; of a table all rows agree, of JSON each has its own."""

    def __init__(self, path: Path, form: Format, names: Mapping[str, tuple[str, ...]]) -> None:
        unknown = [ours for ours in form.columns if ours not in DOCUMENT_NAMES.keys() | QUESTION_NAMES.keys()]
        if unknown:
            raise TaskError(f"columns: {unknown[0]!r} is no field; expected some of {', '.join(names)}")
        self.path, self.form = path, form
        self.names = {
            ours: (plain(form.columns[ours]),) if ours in form.columns else theirs for ours, theirs in names.items()
        }
        self.used: dict[str, str] = {}
        self.spelt: dict[str, str] = {}
        self.ignored: dict[str, None] = {}

    def of(self, row: Row) -> dict[str, Any]:
        """The row's values by our names; empty cells of a table and nulls are absent."""
        found = {}
        self.spelt |= row.names
        for ours, theirs in self.names.items():
            name = next((name for name in theirs if name in row.cells), None)
            if name is not None:
                self.used[ours] = name
                found[ours] = row.cells[name]
        taken = set(self.used.values())
        self.ignored |= dict.fromkeys(name for name in row.cells if name not in taken)
        return found

    def theirs(self, ours: str) -> str:
        """The file's name of a field."""
        return self.used.get(ours, ours)

    def need(self, ours: str, columns: Mapping[str, str]) -> None:
        """Raise TaskError if a table, with these columns by plain name, lacks a field."""
        if not set(self.names[ours]) & columns.keys():
            raise TaskError(
                f"{self.path}:1: {ours}: missing from the heading {','.join(columns.values())[:60]!r}; "
                f"--columns {ours}=NAME names its column, and a file without a heading needs one"
            )

    def need_question(self, columns: Mapping[str, str]) -> None:
        """Raise TaskError if a table lacks prompts or choices."""
        self.need("prompt", columns)
        taken = {name for ours, theirs in self.names.items() for name in theirs if ours != "choices"}
        if not set(self.names["choices"]) & columns.keys() and not any(
            _CHOICE.fullmatch(name) for name in columns.keys() - taken
        ):
            raise TaskError(f"{self.path}:1: choice1: missing from the heading {','.join(columns.values())[:60]!r}")

    def tell(self, more: Mapping[str, str] | None = None) -> None:
        """Say which fields were taken under another name, and which were not taken."""
        spelt = {ours: self.spelt.get(name, name) for ours, name in self.used.items()}
        other = {ours: theirs for ours, theirs in spelt.items() if theirs != ours}
        other |= more or {}
        if other:
            mapped = ", ".join(f"{ours} = {theirs}" for ours, theirs in other.items())
            self.form.tell(f"{self.path}: {mapped}")
        if other and self.ignored:
            self.form.tell(f"{self.path}: not used: {', '.join(self.spelt.get(name, name) for name in self.ignored)}")


@dataclass(frozen=True)
class _QuestionRow:
    """A row of a question file before it is known from what its answers count."""

    row: Row
    fields: dict[str, Any]
    choices: list[str]
    answer: int | None
    is_number: bool
    also: tuple[int, ...] = ()  # other right choices that the answer names


def read_questions(path: Path, form: Format | None = None, first_answer: int | None = None) -> tuple[Question, ...]:
    """The questions of a .jsonl, .json, .csv or .tsv file, in its order.

    A table's choices are columns "choice1", "choice2", ... (or "option a", "A", ...); a question with fewer choices
    leaves the last ones empty. An answer is a number, a letter or the text of a choice. An id that a row lacks is its
    file's name and line.

    Args:
        path: of the file.
        form: of the file.
        first_answer: the number of the first choice, 0 or 1; None if it is 0 unless the numbers say otherwise.

    Raises:
        TaskError: all that cannot be read or used, or numbers that seem to count from 1; names file, line, column and
            field.
    """
    form, problems = form or Format(), Problems()
    if path.suffix.lower() not in ROWS:
        raise TaskError(f"{path}: expected a file of questions that ends in {', '.join(ROWS)}")
    fields, drafts, columns = _Fields(path, form, QUESTION_NAMES), list[_QuestionRow](), dict[str, str]()
    for row in read_rows(path, form, problems, fields.need_question):
        try:
            drafts.append(_question_row(row, fields, columns))
        except TaskError as error:
            problems.add(error)
    offset = _offset(path, drafts, first_answer, problems)
    questions: dict[str, Question] = {}
    for draft in drafts:
        try:
            question = _question(draft, offset, path)
        except TaskError as error:
            problems.add(error)
            continue
        if question.id in questions:
            place = draft.row.at(fields.theirs("id"))
            problems.add(f"{place}: id: {question.id!r} was used before in this file")
        questions[question.id] = question
    problems.check()
    if not questions:
        raise TaskError(f"{path}: empty: expected at least one question")
    fields.tell({"choices": ", ".join(columns.values())} if columns and not _are_ours(columns) else None)
    return tuple(questions.values())


def _are_ours(columns: Mapping[str, str]) -> bool:
    return all(re.fullmatch(r"choice\d+", name) for name in columns.values())


def _question_row(row: Row, fields: _Fields, columns: dict[str, str]) -> _QuestionRow:
    found = fields.of(row)
    if row.places:
        found = {ours: value for ours, value in found.items() if value or ours == "prompt"}
    if isinstance(stem := found.get("prompt"), dict):  # {"stem": ..., "choices": [...]}
        found |= {"prompt": stem.get("stem"), "choices": stem.get("choices", found.get("choices"))}
    choices, labels = _choices(row, found, fields, columns)
    answer = found.pop("answer", None)
    if isinstance(answer, str) and answer not in choices and any(name.startswith("distractor") for name in columns):
        choices = [answer, *choices]
    at = row.at(fields.theirs("answer"))
    several = [
        _index(at, one, choices, labels) for one in (answer if isinstance(answer, list) and answer else [answer])
    ]
    (index, is_number), also = several[0], tuple(i for i, _ in several[1:] if i is not None)
    for ours in ("id", "topic", "document"):
        if type(found.get(ours)) is int:
            found[ours] = str(found[ours])
    if row.places and "also_correct" in found:
        found["also_correct"] = _numbers(row.at(fields.theirs("also_correct")), found["also_correct"], len(choices))
    return _QuestionRow(row, found, choices, index, is_number, also)


def _choices(row: Row, found: dict[str, Any], fields: _Fields, columns: dict[str, str]) -> tuple[list[str], list[str]]:
    """The choices of a list, of a cell with a JSON list or | between them, or of columns of their own; and labels.

    A label is what the file names a choice by beside its text; most files have none.
    """
    value = found.pop("choices", None)
    if isinstance(value, str) and row.places:
        value = _listed(value)
    labels: list[Any] = []
    if isinstance(value, dict) and isinstance(value.get("text"), list):  # {"text": [...], "label": ["A", ...]}
        value, labels = value["text"], value.get("label", [])
    elif isinstance(value, dict):
        value, labels = list(value.values()), list(value)
    elif isinstance(value, list) and all(isinstance(one, dict) and "text" in one for one in value):
        value, labels = [one["text"] for one in value], [one.get("label") for one in value]
    if value is not None:
        where = row.at(fields.theirs("choices"))
        if not isinstance(value, list) or not value:
            raise TaskError(f"{where}: choices: expected a list with at least one string")
        return [str(one) if type(one) in (int, float, bool) else one for one in value], [str(one) for one in labels]
    taken = set(fields.used.values())
    names = _choice_columns([name for name in row.cells if row.places or isinstance(row.cells[name], str)], taken)
    if not names:
        raise TaskError(f"{row.where}: choices: expected a list with at least one string")
    columns |= {name: row.names.get(name, name) for name in names}
    for name in names:
        fields.ignored.pop(name, None)
    while len(names) > 1 and not row.cells[names[-1]]:
        names.pop()
    for name in names:
        if not row.cells[name]:
            raise TaskError(f"{row.at(name)}: {row.names.get(name, name)}: expected a non-empty string")
    return [row.cells[name] for name in names], []


def _choice_columns(names: Sequence[str], taken: set[str]) -> list[str]:
    """The names that number or letter choices in one way, the way of the most of them."""
    ways: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        if name not in taken and (match := _CHOICE.fullmatch(name)) is not None:
            ways.setdefault((match[1], match[2] is None), []).append(name)
    return max(ways.values(), key=len, default=[])


def _listed(cell: str) -> list[Any] | str:
    try:
        value = json.loads(cell)
    except ValueError:
        value = [part.strip() for part in re.split(r"\||\n", cell)]
    return value if isinstance(value, list) else cell


def _index(at: str, answer: Any, choices: Sequence[Any], labels: Sequence[str]) -> tuple[int | None, bool]:
    """(the index that an answer names, whether it is a number of the file's own counting)."""
    if answer is None or answer == "":
        return None, False
    if isinstance(answer, float) and answer.is_integer():  # pandas writes whole numbers so beside missing ones
        answer = int(answer)
    if type(answer) in (int, bool, str) and labels.count(str(answer)) == 1:
        return labels.index(str(answer)), False
    if isinstance(answer, bool) and str(answer) in choices:
        return choices.index(str(answer)), False
    if isinstance(answer, bool) or not isinstance(answer, int | str):
        shown = json.dumps(answer, default=str)[:60]
        raise TaskError(f"{at}: answer: expected a number, a letter or a choice, got {shown}")
    if isinstance(answer, int):
        is_choice = str(answer) in choices and not 0 <= answer <= len(choices)
        return (choices.index(str(answer)), False) if is_choice else (answer, True)
    texts = [choice.strip() if isinstance(choice, str) else choice for choice in choices]
    if answer.strip() in texts:
        index = choices.index(answer) if answer in choices else texts.index(answer.strip())
        letter = _LETTER.fullmatch(answer.strip())
        named = ord(letter[1].upper()) - ord("A") if letter else index
        if named != index and named < len(choices) and texts[named] != answer.strip():
            raise TaskError(
                f"{at}: answer: {answer!r} is the text of choice {index} and the letter of choice {named}; "
                "give the number, from 0"
            )
        return index, False
    if re.fullmatch(r"\s*\d{1,8}(\.0+)?\s*", answer) and answer.strip().isascii():
        return int(answer.partition(".")[0]), True
    if (letter := _LETTER.fullmatch(answer.strip())) is not None:
        index = ord(letter[1].upper()) - ord("A")
        if index < len(choices):
            return index, False
    folded = [_folded(text) if isinstance(text, str) else text for text in texts]
    if folded.count(_folded(answer)) == 1:
        return folded.index(_folded(answer)), False
    raise TaskError(f"{at}: answer: expected 0 to {len(choices) - 1}, a letter or a choice, got {answer[:60]!r}")


def _folded(text: str) -> str:
    """A text as answers are compared: lower case, straight quotes, no full stop at its end."""
    return text.translate(_QUOTES).casefold().strip().rstrip(".")


def _numbers(at: str, cell: str, count: int) -> list[int]:
    numbers = cell.split()
    if not all(n.isascii() and n.isdecimal() and len(n) < 9 and int(n) <= count for n in numbers):
        raise TaskError(f"{at}: also_correct: expected 0 to {count - 1}, got {cell[:60]!r}")
    return [int(n) for n in numbers]


def _offset(path: Path, drafts: Sequence[_QuestionRow], first_answer: int | None, problems: Problems) -> int:
    """The number of the first choice; a problem where it is not said and the numbers look like counting from 1."""
    if first_answer is not None:
        return first_answer
    numbered = [draft for draft in drafts if draft.is_number]
    if not numbered or any(draft.answer == 0 for draft in numbered):
        return 0
    beyond = any(draft.answer == len(draft.choices) for draft in numbered)
    possible = all(1 <= (draft.answer or 0) <= len(draft.choices) for draft in numbered)
    chance = math.prod(1 - 1 / max(2, len(draft.choices)) for draft in numbered)
    if possible and (beyond or chance < ONE_IN):
        problems.add(
            f"{path}: answer: none of {len(numbered)} numbers is 0: do they count from 1? "
            "--first-answer 1 says so, --first-answer 0 that they do not"
        )
        return 1  # so that nothing else is said of them
    return 0


def _question(draft: _QuestionRow, offset: int, path: Path) -> Question:
    answer = draft.answer
    if draft.is_number and answer is not None:
        answer -= offset
        if not 0 <= answer < len(draft.choices):
            low, high = offset, len(draft.choices) - 1 + offset
            where = next((place for name, place in draft.row.places.items() if name in QUESTION_NAMES["answer"]), "")
            shown = repr(str(draft.answer)) if draft.row.places else draft.answer
            raise TaskError(f"{where or draft.row.where}: answer: expected {low} to {high}, got {shown}")
    default = {"id": f"{path.name}{draft.row.where.removeprefix(str(path))}"}
    found: dict[str, Any] = {"choices": draft.choices, "answer": answer}
    if draft.also:
        found["also_correct"] = [index - offset * draft.is_number for index in draft.also]
    elif offset and isinstance(also := draft.fields.get("also_correct"), list):
        found["also_correct"] = [c - offset if type(c) is int else c for c in also]
    return question_of(draft.row.where, default | draft.fields | found)
