"""What a study can show before it is run: the gap that its questions and seeds resolve, and how many more it needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from icl_ft_fast.study.statistics import SEEDS_AS_UNIT, t_quantile
from icl_ft_fast.tasks.task import Task

AGREEMENT = 0.5  # of answers about one topic, as a correlation: unknown before the run
DIFFERENT = 0.2  # of questions that two arms answer differently, one way or the other
POWER_QUANTILE = 0.8416  # of the normal distribution: shown in 80% of studies


@dataclass(frozen=True)
class Power:
    """What a study's questions and seeds can show.

    Attributes:
        answers: of an arm, over all seeds.
        topics: clusters that they come in.
        seeds: how many.
        effective: independent answers that would tell as much, where answers about a topic agree by AGREEMENT.
        gap_points: difference of two arms' accuracies, in percentage points, that is shown in 80% of such studies.
        tolerance: percentage points within which an arm is to be shown to be as good as another.
        needed: answers of an arm, in topics of the same size, for that in 80% of studies of arms that are equal.
    """

    answers: int
    topics: int
    seeds: int
    effective: float
    gap_points: float
    tolerance: float
    needed: float

    @property
    def text(self) -> str:
        """What to expect, in a paragraph."""
        text = (
            f"{self.answers:,} answers an arm about {self.topics:,} topics, {self.seeds} seed(s): they tell as much "
            f"as about {self.effective:,.0f} independent ones, if answers about a topic correlate by {AGREEMENT:g}. If "
            f"two arms answer {DIFFERENT:.0%} of questions differently, a gap of {self.gap_points:.0f} points is shown "
            'in 4 of 5 such studies; smaller ones mostly stay "not shown".'
        )
        if not self.tolerance:
            text += " That an arm is as good within 0 points cannot be shown by any number of questions."
        elif self.needed <= self.answers:
            text += f" That is enough to show that an equal arm is as good within {self.tolerance:g} points."
        else:
            text += (
                f" To show that an equal arm is as good within {self.tolerance:g} points takes about "
                f"{_rounded(self.needed):,.0f} answers, {_rounded(self.needed - self.answers):,.0f} more: "
                "more topics, or more seeds that ask other questions."
            )
        if self.seeds < SEEDS_AS_UNIT:
            text += (
                f" With fewer than {SEEDS_AS_UNIT} seeds, what is shown of trained arms is about these weights: "
                f"{SEEDS_AS_UNIT - self.seeds} more seed(s) would speak of other training runs."
            )
        return text


def power_of(task_of_seed: Callable[[int], Task], seeds: Sequence[int], tolerance: float) -> Power | None:
    """What the questions with known answers can show; None without any.

    Args:
        task_of_seed: the task for a seed.
        seeds: of the study.
        tolerance: percentage points, as `--tolerance`.
    """
    asked: dict[str, dict[int, list[object]]] = {}
    for seed in seeds:
        for question in task_of_seed(seed).questions:
            if question.answer is not None:
                topic = asked.setdefault(question.topic or question.id, {})
                topic.setdefault(seed, []).append((question.id, question.prompt, question.choices))
    sizes: Counter[object] = Counter()
    for name, by_seed in asked.items():
        is_same = all(some == next(iter(by_seed.values())) for some in by_seed.values())
        for seed, questions in by_seed.items():
            sizes[name if is_same else (name, seed)] += len(questions)
    if not sizes:
        return None
    answers, topics = sizes.total(), len(sizes)
    in_one = sum(n * n for n in sizes.values()) / answers  # answers about the topic of a random answer
    effect = 1 + (in_one - 1) * AGREEMENT
    effective = max(float(min(topics, answers)), answers / effect)
    return Power(
        answers,
        topics,
        len(seeds),
        effective,
        100 * _shown_gap(effective, math.inf if topics == answers else topics - 1),
        tolerance,
        _needed(tolerance / 100, topics / answers) * effect if tolerance else math.inf,
    )


def _shown_gap(effective: float, df: float) -> float:
    """The gap g of g = quantiles * sqrt((different - g^2) / n): that gap_interval() puts above 0 in 80% of studies."""
    quantiles = _quantile(df) + POWER_QUANTILE
    low, high = 0.0, 1.0
    for _ in range(50):
        g = (low + high) / 2
        half = quantiles * math.sqrt((max(DIFFERENT, g) - g * g) / effective)
        low, high = (g, high) if g < half else (low, g)
    return high


def _needed(gap: float, topics_each: float) -> float:
    """Independent answers whose interval lies above minus a gap in 80% of studies of equal arms."""
    low, high = 1.0, 1e12
    for _ in range(100):
        n = math.sqrt(low * high)
        quantiles = _quantile(math.inf if topics_each == 1 else n * topics_each - 1) + POWER_QUANTILE
        low, high = (n, high) if quantiles * math.sqrt(DIFFERENT / n) > gap else (low, n)
    return high


def _quantile(df: float) -> float:
    """Student's, with the degrees of freedom that topics give; the normal one where each has one question."""
    return t_quantile(max(1, round(min(df, 1e6))))


def _rounded(n: float) -> float:
    """Two significant digits."""
    return float(f"{n:.1e}")
