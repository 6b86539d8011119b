"""A task of one's own: documents gathered from files, and what to look at before trusting its questions.

Files are read a line at a time (text and Markdown files whole), so memory grows with the number of documents' ids and
with the questions, never with the documents' text.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from icl_ft_fast.tasks.task import Document, Question, TaskError, document_of, read_jsonl, read_lines

SUFFIXES = (".jsonl", ".csv", ".txt", ".md")
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def iter_documents(paths: Sequence[str | Path], *, encoding: str = "utf-8") -> Iterator[Document]:
    """The documents of files and of all such files below folders, in the order given, folders sorted.

    Args:
        paths: .jsonl (objects with "text" and perhaps "id" and "topic"), .csv (a heading with the same names), .txt and
            .md (a document each); or folders.
        encoding: of every file.

    Yields:
        Documents; an id that a row lacks is its file's name and line, and a text file's is its name, below the folder
        that was given.

    Raises:
        TaskError: a file that cannot be read or used, an id used twice, or no document at all; names file, line and
            field.
    """
    seen: set[str] = set()
    for where, document in (found for path in paths for found in _of_path(Path(path), encoding)):
        if document.id in seen:
            raise TaskError(f"{where}: id: {document.id!r} was used before")
        seen.add(document.id)
        yield document
    if not seen:
        raise TaskError(f"{', '.join(map(str, paths))}: no documents: expected {', '.join(SUFFIXES)} files with some")


def _of_path(path: Path, encoding: str) -> Iterator[tuple[str, Document]]:
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()):
            yield from _of_file(file, str(file.relative_to(path)), encoding)
    else:
        yield from _of_file(path, path.name, encoding)


def _of_file(path: Path, name: str, encoding: str) -> Iterator[tuple[str, Document]]:
    if path.suffix not in SUFFIXES:
        raise TaskError(f"{path}: expected a folder or a file that ends in {', '.join(SUFFIXES)}")
    _check_mark(path, encoding)
    if path.suffix in (".txt", ".md"):
        text = "".join(line for _, line in read_lines(path, encoding))
        yield str(path), document_of(str(path), {"id": name, "text": text})
        return
    rows = read_jsonl(path, encoding) if path.suffix == ".jsonl" else _csv_rows(path, encoding)
    for where, row in rows:
        yield where, document_of(where, {"id": f"{name}{where.removeprefix(str(path))}"} | row)


def _check_mark(path: Path, encoding: str) -> None:
    """Refuse a file whose byte-order mark names another encoding."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror}") from error
    for mark, name in _MARKS.items():
        if start.startswith(mark) and codecs.lookup(encoding).name not in (name, name.replace("utf-16", "utf-32")):
            raise TaskError(f"{path}: begins with the mark of {name}, not of {encoding}; give --encoding {name}")


def _csv_rows(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader((line for _, line in read_lines(path, encoding)), strict=True)
    try:
        heading = next(reader, [])
        if "text" not in heading:
            raise TaskError(f"{path}:1: text: missing from the heading {','.join(heading)[:60]!r}")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(heading):
                raise TaskError(f"{where}: column {min(len(row), len(heading)) + 1}: expected {len(heading)} columns, "
                                f"got {len(row)}")  # fmt: skip
            if row:
                yield where, {name: cell for name, cell in zip(heading, row, strict=True) if cell or name == "text"}
    except csv.Error as error:
        raise TaskError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


@dataclass(frozen=True)
class Check:
    """What to look at in a task.

    Attributes:
        same_documents: ids of documents with the text (but for case, space and punctuation) of an earlier one.
        same_questions: ids of questions with the prompt and choices of an earlier one.
        leaked: by split, ids of questions whose prompt and answer stand in the documents.
        answered: by split, questions with a known answer.
        longest_is_right: share of the answered questions that picking the longest choice gets right (ties shared).
        chance: what picking at random gets right.
        positions: by number of choices, how often each position is the answer's.
    """

    same_documents: tuple[str, ...]
    same_questions: tuple[str, ...]
    leaked: dict[str, tuple[str, ...]]
    answered: dict[str, int]
    longest_is_right: float
    chance: float
    positions: dict[int, tuple[int, ...]]


def check(
    documents: Iterable[Document], questions: Sequence[Question], *, ngram: int = 8, threshold: float = 0.8
) -> Check:
    """Look for duplicates, leaked answers, and choices that give themselves away.

    Args:
        documents: read once, in turn.
        questions: all of them.
        ngram: words; a prompt with its answer counts as leaked if at least `threshold` of its runs of so many words
            (of all its words, if it has fewer) stand in documents: n-gram containment (Broder 1997).
        threshold: above 0, at most 1.
    """
    answered = [question for question in questions if question.answer is not None]
    grams = {q.id: _ngrams(_words(q.prompt + q.choices[q.answer or 0]), ngram) for q in answered}
    wanted = {gram for mine in grams.values() for gram in mine}
    lengths = sorted({len(gram) for gram in wanted})
    found: set[tuple[str, ...]] = set()
    texts: set[bytes] = set()
    same_documents = []
    for document in documents:
        words = _words(document.text)
        digest = blake2b(" ".join(words).encode(), digest_size=16).digest()
        if digest in texts:
            same_documents.append(document.id)
        texts.add(digest)
        found |= {gram for length in lengths for gram in _ngrams(words, length)} & wanted
    leaked = {split: tuple(
        q.id for q in answered
        if q.split == split and grams[q.id] and len(grams[q.id] & found) >= threshold * len(grams[q.id])
    ) for split in dict.fromkeys(q.split for q in answered)}  # fmt: skip
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    for question in questions:
        first.setdefault((question.prompt, tuple(sorted(question.choices))), question.id)
    right = []
    for question in answered:
        most = max(map(len, question.choices))
        longest = [c for c, choice in enumerate(question.choices) if len(choice) == most]
        right.append(sum(c in question.correct for c in longest) / len(longest))
    places: dict[int, list[int]] = {}
    for question in answered:
        places.setdefault(len(question.choices), [0] * len(question.choices))[question.answer or 0] += 1
    return Check(
        same_documents=tuple(same_documents),
        same_questions=tuple(q.id for q in questions if q.id not in set(first.values())),
        leaked=leaked,
        answered=dict(Counter(q.split for q in answered)),
        longest_is_right=sum(right) / max(1, len(right)),
        chance=sum(len(q.correct) / len(q.choices) for q in answered) / max(1, len(answered)),
        positions={number: tuple(counts) for number, counts in sorted(places.items())},
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _ngrams(words: list[str], length: int) -> set[tuple[str, ...]]:
    """Runs of `length` words, or all the words if they are fewer; none of no words."""
    if not words:
        return set()
    length = min(length, len(words))
    return {tuple(words[first : first + length]) for first in range(len(words) - length + 1)}
