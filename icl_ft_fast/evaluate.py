"""Accuracy of a model on a task's questions, with or without the documents in context."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from icl_ft_fast.cost import Ledger
from icl_ft_fast.model import Model
from icl_ft_fast.score import Score, score
from icl_ft_fast.tasks.task import Document, Question

ICL_TEMPLATE = "Documents:\n{documents}\n\nGiven these documents: {prompt}"


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
        z, n, p = 1.959964, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def accuracies(questions: Sequence[Question], scores: Sequence[Score]) -> dict[str, Accuracy]:
    """Accuracy by split of the questions that have an answer; scores in the questions' order."""
    counts: dict[str, list[int]] = {}
    for question, result in zip(questions, scores, strict=True):
        if result.is_correct is not None:
            split = counts.setdefault(question.split, [0, 0])
            split[0] += result.is_correct
            split[1] += 1
    return {split: Accuracy(*count) for split, count in counts.items()}


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


def icl_context(documents: Sequence[Document]) -> str:
    """What stands before each prompt when the documents are given in context."""
    return ICL_TEMPLATE.format(documents="\n".join(f"- {document.text}" for document in documents), prompt="")


def evaluate(
    model: Model,
    questions: Sequence[Question],
    *,
    context: str = "",
    ledger: Ledger | None = None,
    progress: bool = False,
) -> dict[str, Accuracy]:
    """Score the questions after `context` and count the correct ones by split."""
    return accuracies(questions, score(model, questions, context=context, ledger=ledger, progress=progress))
