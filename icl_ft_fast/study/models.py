"""Models on the same questions: accuracy, flips, gap and the distance of log-likelihoods, against the first of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from icl_ft_fast.engine.score import Score
from icl_ft_fast.study.statistics import accuracy_interval, gap_interval, sign_flip_test
from icl_ft_fast.tasks.task import Question


@dataclass(frozen=True)
class ModelGap:
    """A model against the first, on the same questions.

    Attributes:
        known: questions with a known answer; the figures of right answers are over these.
        correct: answered rightly.
        low, high: interval of that accuracy at 95%, over topics.
        gained, lost: right here and wrong in the first model, and the other way round.
        changed: questions, known or not, whose predicted choice is another.
        gap, gap_low, gap_high: accuracy minus that of the first, and its interval at 95%; None without known answers.
        p: of the mid-p sign-flip test over topics.
        mean_logp_distance: mean over choices of |log-likelihood - that of the first|, in nats.
        most_logp_distance: the largest of them.
    """

    known: int
    correct: int
    low: float | None
    high: float | None
    gained: int
    lost: int
    changed: int
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    p: float | None
    mean_logp_distance: float
    most_logp_distance: float


def compare_scores(questions: Sequence[Question], first: Sequence[Score], other: Sequence[Score]) -> ModelGap:
    """Compare two models' scores of the same questions, in the same order.

    Args:
        questions: that were scored; answers about one topic count as one witness.
        first: a score a question.
        other: the same of the other model.

    Raises:
        ValueError: scores of other questions.
    """
    if [s.question_id for s in first] != [s.question_id for s in other] or len(questions) != len(first):
        raise ValueError("other: expected scores of the same questions in the same order")
    rows = [(q, bool(a.is_correct), bool(b.is_correct)) for q, a, b in zip(questions, first, other, strict=True)]
    known = [row for row in rows if row[0].answer is not None]
    distances = [abs(x - y) for a, b in zip(first, other, strict=True) for x, y in zip(a.logp, b.logp, strict=True)]
    interval: tuple[float | None, float | None] = (None, None)
    gap: tuple[float | None, float | None] = (None, None)
    mean = p = None
    if known:
        topics = [question.topic or question.id for question, *_ in known]
        differences = [b - a for _, a, b in known]
        sums: dict[str, int] = {}
        for topic, difference in zip(topics, differences, strict=True):
            sums[topic] = sums.get(topic, 0) + difference
        interval = accuracy_interval([b for *_, b in known], topics)
        gap = gap_interval(differences, topics)
        mean, p = sum(differences) / len(known), sign_flip_test(list(sums.values()), mid=True)
    return ModelGap(
        len(known),
        sum(b for *_, b in known),
        *interval,
        sum(b and not a for _, a, b in known),
        sum(a and not b for _, a, b in known),
        sum(a.predicted != b.predicted for a, b in zip(first, other, strict=True)),
        mean,
        *gap,
        p,
        math.fsum(distances) / max(1, len(distances)),
        max(distances, default=0.0),
    )
