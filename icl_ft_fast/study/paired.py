"""Arms compared on the same questions: differences in accuracy with exact p-values."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from icl_ft_fast.study import statistics
from icl_ft_fast.study.evaluate import Answer
from icl_ft_fast.study.records import Run


@dataclass(frozen=True)
class Paired:
    """Two arms on the same questions of a split.

    Attributes:
        first, second: the arms.
        split: the split.
        difference: accuracy of the first minus that of the second.
        p: exact two-sided p-value of the sign-flip test over topics, Holm-adjusted for all tests made together.
    """

    first: str
    second: str
    split: str
    difference: float
    p: float


def paired_tests(runs: Sequence[Run]) -> list[Paired]:
    """Every two arms in every split, on the questions and seeds that both have."""
    arms = dict.fromkeys(run.arm for run in runs)
    right: dict[str, dict[tuple[int, str], Answer]] = {
        arm: {(run.seed, answer.question_id): answer for run in runs if run.arm == arm for answer in run.answers}
        for arm in arms
    }
    tests = []
    for first, second in itertools.combinations(arms, 2):
        differences: dict[str, dict[str, list[int]]] = {}
        for key in right[first].keys() & right[second].keys():
            a, b = right[first][key], right[second][key]
            topics = differences.setdefault(a.split, {})
            topics.setdefault(a.topic, []).append(a.is_correct - b.is_correct)
        for split in dict.fromkeys(answer.split for answer in right[first].values()):
            if topics := differences.get(split, {}):
                each = [difference for topic in topics.values() for difference in topic]
                p = statistics.sign_flip_test([sum(topic) for topic in topics.values()])
                tests.append(Paired(first, second, split, sum(each) / len(each), p))
    adjusted = statistics.holm([test.p for test in tests])
    return [replace(test, p=p) for test, p in zip(tests, adjusted, strict=True)]
