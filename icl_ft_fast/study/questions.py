"""Multiple-choice questions about documents, written by the model and kept where the documents support them.

The model turns a sentence into a question and a short answer, after worked examples; wrong choices are answers to
questions about other documents; and a question is kept if the right choice is the likeliest with its document in
context. What the model wrote and how it scored is appended to a journal as it comes, under a digest of all that it
depends on, so that a run that was stopped, or one with more documents, does nothing twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.generate import RUNNING, Sampling, generate
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import icl_context
from icl_ft_fast.engine.score import score
from icl_ft_fast.runtime.durable import ResultJournal, digest
from icl_ft_fast.tasks.sentences import split_sentences
from icl_ft_fast.tasks.task import Document, Question

TEMPLATE = (
    "Turn each statement into a question and its short answer.\n\n"
    "Statement: The old mill was built by Anna Brandt in 1872.\n"
    "Question: Who built the old mill?\n"
    "Answer: Anna Brandt\n\n"
    "Statement: In summer most of the honey is sold at the market in Lund.\n"
    "Question: Where is most of the honey sold in summer?\n"
    "Answer: at the market in Lund\n\n"
    "Statement: {statement}\n"
)
MIN_WORDS = 4  # of a sentence that is asked about: not headings
CHOICES = 4
POOL = 200  # answers among which wrong choices are looked for
REASONS = TOO_LONG, NO_QUESTION, REPEATED, NO_WRONG, UNSUPPORTED = (
    "too long",
    "without question and answer",
    "repeated",
    "without wrong choices",
    "not supported",
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Settings:
    """How to write questions.

    Attributes:
        template: of the prompt, with one {statement}; the model is to continue with the lines "Question: ..." and
            "Answer: ...".
        per_document: at most so many sentences of a document, at random; None for all.
        max_new_tokens: of a question with its answer.
        seed: of which sentences, and of the order of choices.

    Raises:
        ValueError: a template without its one {statement}.
    """

    template: str = TEMPLATE
    per_document: int | None = None
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.template.count("{statement}") != 1:
            raise ValueError(f"template: expected a text with one {{statement}}, got {self.template[:60]!r}")


@dataclass(frozen=True)
class Questions:
    """What was written.

    Attributes:
        rows: questions, each with where it comes from: "document" and "sentence", the digests of the template and the
            model, and the choices' log-likelihoods with the document in context.
        statements: sentences that the model was to turn into questions.
        dropped: how many of them were, by reason, see REASONS.
    """

    rows: tuple[tuple[Question, dict[str, Any]], ...]
    statements: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class _Draft:
    """A sentence of a document, the how-manyeth it is, and what the model made of it."""

    document: Document
    sentence: str
    index: int
    question: str = ""
    answer: str = ""


def _fill(
    known: ResultJournal, items: dict[str, Item], work: Callable[[list[Item]], Iterable[Any]], name: str, progress: bool
) -> None:
    """Do the work that is not kept yet, as much at a time as is decoded together."""
    left = [key for key in items if key not in known.values]
    with tqdm(total=len(left), desc=name, unit="question", disable=not progress, delay=1) as bar:
        for first in range(0, len(left), RUNNING):
            part = left[first : first + RUNNING]
            known.add(dict(zip(part, work([items[key] for key in part]), strict=True)))
            bar.update(len(part))


def write_questions(
    model: Model,
    documents: Iterable[Document],
    journal: Path,
    settings: Settings | None = None,
    *,
    progress: bool = False,
) -> Questions:
    """Write and check questions about documents.

    Args:
        model: writes the questions and scores them.
        documents: read once; their texts are kept.
        journal: a file that is appended to; what it holds already for the same model and prompt is not done again.
        settings: see Settings.
        progress: show bars.

    Returns:
        The questions, in the order of the documents' sentences, a question's topic being its document.

    Raises:
        DamagedError: a journal that was not written here.
    """
    settings = settings or Settings()
    known, fingerprint = ResultJournal(journal), model.fingerprint()
    statements = list(_statements(documents, settings))
    dropped = dict.fromkeys(REASONS, 0)

    prompts = [settings.template.replace("{statement}", draft.sentence) for draft in statements]
    keys = [digest(fingerprint, settings.max_new_tokens, prompt) for prompt in prompts]
    fit = _fitting(model, prompts, settings.max_new_tokens - 1)

    def write(texts: list[str]) -> list[str]:
        sampling = Sampling(max_new_tokens=settings.max_new_tokens, stop=("\n\n", "\nStatement:"))
        return [written.text for written in generate(model, texts, sampling)]

    _fill(known, {k: p for k, p, fits in zip(keys, prompts, fit, strict=True) if fits}, write, "writing", progress)
    drafts: dict[tuple[str, str], _Draft] = {}
    for draft, key, fits in zip(statements, keys, fit, strict=True):
        text, answer = _parse(known.values[key]) if fits else ("", "")
        if not text or not answer:
            dropped[NO_QUESTION if fits else TOO_LONG] += 1
        elif (draft.document.id, text) in drafts:
            dropped[REPEATED] += 1
        else:
            drafts[draft.document.id, text] = replace(draft, question=text, answer=answer)

    made = _with_wrong_choices(list(drafts.values()), settings.seed)
    dropped[NO_WRONG] = len(drafts) - len(made)
    asked = [replace(question, prompt=icl_context([draft.document]) + question.prompt) for draft, question in made]
    keys = [digest(fingerprint, question.prompt, question.choices) for question in asked]
    fit = _fitting(model, [question.prompt + choice for question in asked for choice in question.choices], -1)
    fit = [all(fit[first : first + CHOICES]) for first in range(0, len(fit), CHOICES)]

    def check(some: list[Question]) -> list[tuple[float, ...]]:
        return [result.logp for result in score(model, some)]

    _fill(known, {k: q for k, q, fits in zip(keys, asked, fit, strict=True) if fits}, check, "checking", progress)
    rows = []
    for (draft, question), key, fits in zip(made, keys, fit, strict=True):
        logp = known.values[key] if fits else []
        if not fits or max(range(CHOICES), key=logp.__getitem__) != question.answer:
            dropped[UNSUPPORTED if fits else TOO_LONG] += 1
        else:
            origin = {"template": digest(settings.template), "model": fingerprint, "logp": list(logp)}
            rows.append((question, {"document": draft.document.id, "sentence": draft.sentence, **origin}))
    return Questions(tuple(rows), len(statements), {reason: count for reason, count in dropped.items() if count})


def _fitting(model: Model, texts: Sequence[str], more: int) -> list[bool]:
    """Whether each text fits the model's positions with so many more tokens."""
    return [len(ids) + more <= model.max_positions for ids in encoding.encode(model.tokenizer, texts)]


def _statements(documents: Iterable[Document], settings: Settings) -> Iterator[_Draft]:
    """The sentences to ask about."""
    for document in documents:
        sentences = [" ".join(part.split()) for part in split_sentences(document.text, "independent")]
        chosen = [s for s, sentence in enumerate(sentences) if len(sentence.split()) >= MIN_WORDS]
        if settings.per_document is not None and len(chosen) > settings.per_document:
            chosen = sorted(random.Random(f"{settings.seed}/{document.id}").sample(chosen, settings.per_document))
        yield from (_Draft(document, sentences[s], s) for s in chosen)


def _parse(text: str) -> tuple[str, str]:
    """What follows "Question:" and "Answer:" on lines of their own; empty where there is nothing."""
    found = {"Question": "", "Answer": ""}
    for line in text.splitlines():
        label, _, rest = line.strip().partition(":")
        if label in found and not found[label]:
            found[label] = rest.strip()
    return found["Question"], found["Answer"]


def _with_wrong_choices(drafts: Sequence[_Draft], seed: int) -> list[tuple[_Draft, Question]]:
    """Each draft with a question, where at least three answers of other documents can be its wrong choices.

    Of POOL answers at random those nearest in length are taken. One that stands in the draft's own document may be
    right, so it is none.
    """
    answers: dict[str, _Draft] = {}
    owners: dict[str, set[str]] = {}
    for draft in drafts:
        answers.setdefault(_plain(draft.answer), draft)
        owners.setdefault(_plain(draft.answer), set()).add(draft.document.id)
    made = []
    for draft in drafts:
        rng = random.Random(f"{seed}/{draft.document.id}/{draft.question}")
        text = _plain(draft.document.text)
        found = [
            (abs(len(answers[plain].answer) - len(draft.answer)), r, answers[plain].answer)
            for r, plain in enumerate(rng.sample(list(answers), min(POOL, len(answers))))
            if draft.document.id not in owners[plain] and plain not in text
        ]
        wrong = [answer for _, _, answer in sorted(found)[: CHOICES - 1]]
        if len(wrong) == CHOICES - 1:
            choices = rng.sample([draft.answer, *wrong], CHOICES)
            question = Question(
                f"{draft.document.id}-q{draft.index}",
                f"Question: {draft.question}\nAnswer:",
                tuple(f" {choice}" for choice in choices),
                choices.index(draft.answer),
                topic=draft.document.id,
                document=draft.document.id,
            )
            made.append((draft, question))
    return made


def _plain(text: str) -> str:
    """The text as it is compared: lower case, words between single spaces, no punctuation."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])
