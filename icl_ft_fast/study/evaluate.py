"""Answers of a model to a task's questions, with or without the documents in context, and how many are right.

The paper says of its protocol that choices are scored by likelihood and not shown; everything beyond that is an
argument here: what likelihoods are divided by, the prompt around documents and question, which documents and in what
order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import ProtocolError, prompt_context
from icl_ft_fast.engine.score import Score, score
from icl_ft_fast.study import statistics
from icl_ft_fast.study.settings import NORMALIZATIONS
from icl_ft_fast.tasks.task import Document, Question, Task

# A choice's score is its log-likelihood as it is, per token, character or UTF-8 byte, or minus its log-likelihood
# after nothing at all (pointwise mutual information with the prompt and the documents).


@dataclass(frozen=True)
class Accuracy:
    """Correct answers of a split, with the Wilson score interval at 95%."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """Fraction correct."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927) score interval at 95%; counts questions as independent."""
        return statistics.wilson(self.correct, self.total)


@dataclass(frozen=True)
class Answer:
    """What a model said to a question whose answer is known.

    Attributes:
        question_id, split, form: the question's.
        topic: the question's, or its id where it has none: what statistics count as one witness.
        predicted: index of the choice with the best score (the first of equals).
        probability: of each choice, the softmax of the choices' scores.
        correct: indices of the correct choices.
        predicted_by: the same as `predicted`, under each of NORMALIZATIONS.
    """

    question_id: str
    split: str
    form: str | None
    topic: str
    predicted: int
    probability: tuple[float, ...]
    correct: tuple[int, ...]
    predicted_by: dict[str, int] = field(default_factory=dict)

    @property
    def confidence(self) -> float:
        """Probability of the predicted choice; of all correct choices together where it is one of several."""
        if self.is_correct:
            return math.fsum(self.probability[choice] for choice in self.correct)
        return self.probability[self.predicted]

    @property
    def is_correct(self) -> bool:
        """Whether the predicted choice is correct."""
        return self.predicted in self.correct

    @property
    def chance(self) -> float:
        """Probability that a blind guess is correct."""
        return len(self.correct) / len(self.probability)


def choice_scores(
    question: Question, result: Score, normalization: str = "sum", unconditional: Score | None = None
) -> list[float]:
    """A score for each choice; `unconditional`, the choices scored after nothing, is needed for "pmi" only.

    Raises:
        ProtocolError: an unknown normalization.
    """
    if normalization == "pmi" and unconditional is not None:
        return [a - b for a, b in zip(result.logp, unconditional.logp, strict=True)]
    lengths = {
        "sum": [1] * len(result.logp),
        "token": list(result.num_tokens),
        "character": [len(choice) for choice in question.choices],
        "byte": [len(choice.encode()) for choice in question.choices],
    }
    if normalization not in lengths:
        raise ProtocolError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    return [logp / length for logp, length in zip(result.logp, lengths[normalization], strict=True)]


def answers(
    model: Model,
    questions: Sequence[Question],
    *,
    context: str = "",
    normalization: str = "sum",
    store: ContextStore | None = None,
    ledger: Ledger | None = None,
    progress: bool = False,
) -> list[Answer]:
    """Score the questions after `context`, from the store if there is one; those without a known answer are left out.

    One pass serves every normalization: what "pmi" needs beside it, the choices after nothing, is in the ledger only
    where `normalization` is that.

    Raises:
        ProtocolError: an unknown normalization.
        ScoreError: as score() does.
    """
    if normalization not in NORMALIZATIONS:
        raise ProtocolError(f"normalization: expected one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    results = score(model, questions, context=context, store=store, ledger=ledger, progress=progress)
    apart = ledger if normalization == "pmi" else None
    alone = score(model, [replace(question, prompt="") for question in questions], ledger=apart, progress=progress)
    given = []
    for question, result, unconditional in zip(questions, results, alone, strict=True):
        if question.answer is None:
            continue
        scores = {name: choice_scores(question, result, name, unconditional) for name in NORMALIZATIONS}
        best = {name: max(range(len(its)), key=its.__getitem__) for name, its in scores.items()}
        answer = Answer(
            question_id=question.id,
            split=question.split,
            form=question.form,
            topic=question.topic or question.id,
            predicted=best[normalization],
            probability=_softmax(scores[normalization]),
            correct=question.correct,
            predicted_by=best,
        )
        given.append(answer)
    return given


def _softmax(scores: Sequence[float]) -> tuple[float, ...]:
    top = max(scores)
    weights = [math.exp(value - top) for value in scores]
    return tuple(weight / math.fsum(weights) for weight in weights)


def accuracies(given: Sequence[Answer]) -> dict[str, Accuracy]:
    """Accuracy by split."""
    splits: dict[str, list[bool]] = {}
    for answer in given:
        splits.setdefault(answer.split, []).append(answer.is_correct)
    return {split: Accuracy(sum(right), len(right)) for split, right in splits.items()}


def select_documents(
    documents: Sequence[Document], seed: int, *, per_topic: int | None = None, subsample: int = 1
) -> list[Document]:
    """The documents that go into the context, in a seeded order.

    Args:
        documents: all of them.
        seed: of the order and of the choice.
        per_topic: keep this many documents of each topic; None keeps all. Documents without a topic are all kept.
        subsample: then keep one in `subsample` at random (the paper uses 8 on its larger sets).
    """
    shuffled = random.Random(f"context/{seed}").sample(list(documents), len(documents))
    if per_topic is not None:
        taken: dict[str, int] = {}
        kept = []
        for document in shuffled:
            if document.topic is None or taken.get(document.topic, 0) < per_topic:
                kept.append(document)
                if document.topic is not None:
                    taken[document.topic] = taken.get(document.topic, 0) + 1
        shuffled = kept
    return shuffled[: max(1, round(len(shuffled) / subsample))]


def fit_documents(model: Model, documents: Sequence[Document], tokens: int, template: str = "base") -> list[Document]:
    """Those of the documents, first come first served, whose context (see prompt_context) has at most so many tokens.

    Lengths are added up document by document, so a few tokens may stay free.

    Raises:
        ProtocolError: a document that fits cannot be found.
    """
    lengths = [len(ids) for ids in encoding.encode(model.tokenizer, [f"- {d.text}\n" for d in documents], bos=False)]
    around = len(encoding.encode(model.tokenizer, [prompt_context(model, [Document("", "")], template)])[0])
    room, kept = tokens - around, []
    for document, length in zip(documents, lengths, strict=True):
        if length <= room:
            kept.append(document)
            room -= length
    while kept and len(encoding.encode(model.tokenizer, [prompt_context(model, kept, template)])[0]) > tokens:
        kept.pop()
    if not kept:
        raise ProtocolError(
            f"icl_tokens: no document fits {tokens} tokens: the template takes {around}, the shortest {min(lengths)}"
        )
    return kept


def evaluate(
    model: Model,
    questions: Task | Sequence[Question],
    *,
    context: str | Sequence[Document] = "",
    normalization: str = "sum",
    ledger: Ledger | None = None,
    progress: bool = False,
) -> dict[str, Accuracy]:
    """Accuracy by split: the fraction of questions whose best choice is correct, with its interval.

    Args:
        model: from load().
        questions: a task, or questions of one; those without a known answer are left out.
        context: documents, or the text of any context, in front of every question.
        normalization: what a choice's log-likelihood is divided by, see NORMALIZATIONS.
        ledger: counts the work.
        progress: show a bar.

    Raises:
        ProtocolError: an unknown normalization.
        ScoreError: a question that does not fit the model's positions behind the context.

    Examples:
        >>> question = iff.Question("q", "femp are", (" wider than glon.", " less wide than glon."), answer=0)
        >>> documents = [iff.Document("d", "femp are wider than glon.")]
        >>> iff.evaluate(iff.load("shipped"), [question], context=documents)
        {'test': Accuracy(correct=1, total=1)}
    """
    asked = questions.questions if isinstance(questions, Task) else questions
    text = context if isinstance(context, str) else prompt_context(model, context)
    given = answers(model, asked, context=text, normalization=normalization, ledger=ledger, progress=progress)
    return accuracies(given)
