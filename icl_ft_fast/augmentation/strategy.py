"""What an augmentation strategy is: what its prompts show, its sampling, and how a reply becomes rows.

Each strategy is one file in strategies/, with its prompts beside it, and a line in strategies/__init__.py. General code
asks these objects and compares no names.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from icl_ft_fast.runtime.errors import UserError
from icl_ft_fast.tasks.sentences import count_words, split_sentences, words_of
from icl_ft_fast.tasks.task import Document

FOLDER = Path(__file__).parent / "strategies"
LEAST_WORDS = 30  # of a reply that is a text of its own
SMALL_TEMPERATURE = 0.3  # of a small model, which writes nonsense at 1 (LOG.md)
SMALL_WORDS = 8  # of a text of a small model, which is a line
# Words of its examples.
COPIED = tuple("torvik brandt mill granary lumo lamp osprey reading 1872 osei cook tema cellar".split())
_LINE = re.compile(r"(\w+): (\S.*)")
_LETTERS = re.compile(r"[^\W\d_]+")
_WITHIN = re.compile(r"(?<=[\w,;] )[^\W\d_]{2,}")  # words that begin no sentence
LONGEST_OPENING = 40  # characters: two words of a script without spaces may be a paragraph


class AugmentError(UserError):
    """An augmentation that cannot be made; the message names the file, the argument or the request."""


@dataclass(frozen=True)
class Augmentation:
    """A statement written from documents.

    Attributes:
        source_id: the document it was written from.
        kind: its label in lower case ("reversed", "rephrased", ...), or the rule that made it.
        text: the statement.
        origin: where it comes from: strategy, source_ids, template, generator, sampling, seed, token counts, ...
    """

    source_id: str
    kind: str
    text: str
    origin: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Augmented:
    """Augmentations and what each step dropped.

    Attributes:
        rows: the augmentations, in the documents' order.
        dropped: by step, in the order of the steps, the lines or rows that it dropped.
        prompts: how many prompts there were; 0 without a model.
        parsed: prompts whose reply has a statement in the form, be it dropped afterwards.
        productive: prompts whose reply gave a row.
    """

    rows: tuple[Augmentation, ...]
    dropped: dict[str, int]
    prompts: int = 0
    parsed: int = 0
    productive: int = 0


class Unit(NamedTuple):
    """What one prompt is about.

    Attributes:
        suffix: ends the prompt's id after the document's: "#2" for its third sentence.
        source: the sentence or document, which the template sees as `document`.
        variables: what else the template sees.
        kind: of the row that the whole reply becomes; "" where the strategy reads rows out of the reply.
        begun: how the reply begins, if the strategy has no `begins`.
    """

    suffix: str
    source: str
    variables: Mapping[str, Any] = {}
    kind: str = ""
    begun: str = ""


class Parsed(NamedTuple):
    """The (kind, text) statements of a reply, the lines that are not in its form, and those that repeat."""

    statements: list[tuple[str, str]]
    unparsed: int
    repeats: int


def whole(document: Document) -> list[Unit]:
    """A prompt about the whole document."""
    return [Unit("", document.text)]


@dataclass(frozen=True)
class Strategy:
    """A way to write augmentations.

    A strategy of a model has the prompts NAME.base.jinja and NAME.chat.jinja in strategies/. They see `document` (the
    unit's source), `documents` (the texts shown beside it), `begun` (how the reply begins), its `label`, and the unit's
    variables.

    Attributes:
        name: on the command line and in provenance.
        sees: what a prompt shows, a phrase for the documentation.
        writes: what becomes of it, a phrase for the documentation.
        labels: of the lines of a reply that become rows.
        read: the rows of a reply, given the unit's source and the reply.
        units: what the prompts about a document are about, one after the other.
        follow: what is asked about the document after a reply, given the reply's unit and the reply; the suffixes are
            added to the reply's own.
        follow_ups: the most prompts that follow one of `units`, all later rounds together.
        shows_documents: whether each prompt shows other documents too, as many as fit.
        max_new_tokens: limit of a reply, unless asked otherwise.
        temperature: of sampling, unless asked otherwise; 0 is greedy.
        examples: words of the prompts' worked examples; a row with one that no document has was copied from them.
        begins: how replies to the chat prompt begin, each in a prompt of its own; none where they are not begun. A
            small model that cannot write three kinds of lines in one reply writes one kind behind its label.
        begun_stop: strings that end a reply that was begun.
        is_lines: whether a reply is lines, so that the last line of one that was cut off is half a line, and no row.
        words: the fewest and the most of a row, unless asked otherwise.
        least_words: of a whole text; a shorter one is none.
        prompts: what the files of its prompts begin with, in place of its name.
        small: what takes its place where a small model is asked as a chat; see Prompting.of().
        infer: the rows, for a strategy without a model; None for those of a model.
    """

    name: str
    sees: str
    writes: str
    labels: tuple[str, ...] = ()
    read: Callable[[str, str], Parsed] = lambda source, reply: Parsed([], 0, 0)
    units: Callable[[Document], Sequence[Unit]] = whole
    follow: Callable[[Unit, str], Sequence[Unit]] = lambda unit, reply: ()
    follow_ups: int = 0
    shows_documents: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    examples: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    begun_stop: tuple[str, ...] = ("\n",)
    is_lines: bool = True
    words: tuple[int, int] = (2, 200)
    least_words: int = LEAST_WORDS
    prompts: str = ""
    small: Strategy | None = None
    infer: Callable[[Sequence[Document]], Sequence[Augmentation]] | None = None

    def template(self, *, is_chat: bool = False) -> Path:
        """The file of the prompt for base or for chat models."""
        return FOLDER / f"{self.prompts or self.name}.{'chat' if is_chat else 'base'}.jinja"

    def parse(self, unit: Unit, reply: str, *, is_cut: bool = False) -> Parsed:
        """The rows of a reply about a unit; of one that was cut off, without what is half a line or half a sentence."""
        if unit.kind:
            label, colon, _ = unit.begun.partition(":")
            text = reply.removeprefix(label + colon) if colon else reply
            return whole_reply(unit, text, is_cut=is_cut, least_words=self.least_words)
        return self.read(unit.source, _without_half_line(reply) if is_cut and self.is_lines else reply)

    def follow_up(self, unit: Unit, reply: str, *, is_cut: bool = False) -> Sequence[Unit]:
        """What is asked after a reply about a unit."""
        return self.follow(unit, _without_half_line(reply) if is_cut and self.is_lines else reply)


LOOP_WORDS, LOOPS = 3, 3


def is_looping(text: str, share: float = 0.0) -> bool:
    """Whether a run of LOOP_WORDS words comes LOOPS times and has a share of the words: a model that repeats itself."""
    words = text.casefold().split()
    runs = Counter(zip(*(words[i:] for i in range(LOOP_WORDS)), strict=False))
    most = max(runs.values(), default=0)
    return most >= LOOPS and LOOP_WORDS * most >= share * len(words)


def normalized(text: str) -> str:
    """NFC, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def labelled_lines(labels: Sequence[str], premise: str | None = None) -> Callable[[str, str], Parsed]:
    """A reader of lines `Label: text`, each a statement of the label's kind.

    A line repeats if it is the source, one of its sentences, or an earlier line of the reply. Lines with the label
    `premise` count as nothing: the documents say them already.
    """

    def read(source: str, reply: str) -> Parsed:
        statements, unparsed, repeats, seen = [], 0, 0, {normalized(source)}
        told = {tuple(words_of(sentence)) for sentence in split_sentences(source, "independent")}
        for label, statement in lines_of(reply):
            if premise is not None and label == premise:
                continue
            if label not in labels:
                unparsed += 1
            elif statement in seen or tuple(words_of(statement)) in told:
                repeats += 1
            else:
                seen.add(statement)
                statements.append((label.lower(), statement))
        return Parsed(statements, unparsed, repeats)

    return read


def questions_and_answers(source: str, reply: str) -> Parsed:
    """A reader of lines `Question: text` and `Answer: text`, each pair a statement of the kind "answer".

    Empty lines between them count as nothing.
    """
    statements: list[tuple[str, str]] = []
    unparsed, repeats, seen, question = 0, 0, {normalized(source)}, None
    for label, text in lines_of("\n".join(line for line in reply.splitlines() if line.strip())):
        if label == "Question":
            unparsed += question is not None
            question = text
        elif label != "Answer" or question is None:
            unparsed += 1
        else:
            statement, question = f"{question} {text}", None
            repeats += statement in seen
            if statement not in seen:
                seen.add(statement)
                statements.append(("answer", statement))
    return Parsed(statements, unparsed + (question is not None), repeats)


def whole_reply(unit: Unit, reply: str, *, is_cut: bool = False, least_words: int = LEAST_WORDS) -> Parsed:
    """The reply as one statement, without an opening such as "Here is a summary:"; too short a one is none.

    Paragraphs stay, the spaces within them become single ones. Of a reply that was cut off the last sentence is left
    out. A reply that says nothing but sentences of its document repeats it.
    """
    lines = reply.strip().split("\n")
    if len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines = lines[1:]
    paragraphs = [text for part in "\n".join(lines).split("\n\n") if (text := normalized(part))]
    if is_cut and paragraphs:
        paragraphs[-1] = " ".join(split_sentences(paragraphs[-1], "independent")[:-1])
    text = "\n\n".join(filter(None, paragraphs))
    if count_words(text) < least_words:
        return Parsed([], 1, 0)
    told, said = ({tuple(words_of(s)) for s in split_sentences(t, "independent")} for t in (unit.source, text))
    return Parsed([], 0, 1) if any(said) and said <= told else Parsed([(unit.kind, text)], 0, 0)


def _without_half_line(reply: str) -> str:
    return reply.rpartition("\n")[0]


def subject_of(text: str) -> str:
    """The word that a text writes most often, always with a capital: twice, or else within a sentence; or ''."""
    words = _LETTERS.findall(text)
    counts = Counter(word for word in words if word[0].isupper() and word.casefold() not in words)
    word, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        return word
    return next((name for name in _WITHIN.findall(text) if name in counts), "")


def opening_of(text: str) -> str:
    """How a small model's sentence about a text goes on: with its subject, else with the two words it begins with."""
    first = " ".join(text.split()[:2]).rstrip(".,;:!?")
    return subject_of(text) or (first if len(first) <= LONGEST_OPENING else "")


def lines_of(reply: str) -> list[tuple[str, str]]:
    """The (label, normalized text) of each line of a reply; both empty where a line is not in the form."""
    matches = (_LINE.fullmatch(line.strip()) for line in reply.strip().splitlines())
    return [(match[1], normalized(match[2])) if match else ("", "") for match in matches]
