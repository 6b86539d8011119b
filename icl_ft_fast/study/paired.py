"""Arms compared on the same questions: differences in accuracy with intervals, p-values and a word for each."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from icl_ft_fast.study import statistics
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.clusters import Cluster
from icl_ft_fast.study.evaluate import Answer
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.settings import FAMILIES


@dataclass(frozen=True)
class Paired:
    """Two arms on the same questions.

    Attributes:
        first, second: the arms.
        split: the split; None for all questions.
        difference: accuracy of the first minus that of the second.
        low, high: the difference's interval at 95%, over clusters of questions and, from four seeds on, over seeds.
        p: two-sided mid-p-value of the sign-flip test over clusters, Holm-adjusted for the family's tests. From four
            seeds on, where an arm trains, the larger of it and that of Student's test over seeds.
        clusters: number of clusters.
        is_about_weights: whether an arm trains and there are too few seeds to speak of other training runs.
    """

    first: str
    second: str
    split: str | None
    difference: float
    low: float
    high: float
    p: float
    clusters: int
    is_about_weights: bool = False

    def word(self, tolerance: float) -> str:
        """Whether the first arm loses at most so many percentage points: "as good", "worse" or "not shown"."""
        if self.low >= -tolerance / 100 - 1e-12:
            return "as good"
        return "worse" if self.high < -tolerance / 100 else "not shown"


def mix_of(splits: Sequence[str], weights: Mapping[str, float] | None) -> list[float]:
    """What each answer counts, from the splits of the answers: alike, or so that each split has its weight."""
    counts = Counter(splits)
    return [1.0 if weights is None else weights.get(split, 0.0) / counts[split] for split in splits]


def family_of(arms: Sequence[str], family: str = "trained") -> list[tuple[str, str]]:
    """The pairs of arms that are tested together.

    "trained": every trained arm against in-context learning, and against plain fine-tuning; where there is none such,
    or under "all", every two arms.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected {' or '.join(FAMILIES)}, got {family!r}")
    known = {name: recorded_arm(name) for name in arms}
    trained = [name for name, arm in known.items() if arm.trains]
    readers = [name for name, arm in known.items() if not arm.trains and arm.reads_context][:1]
    plain = [name for name in trained if (t := known[name].training) and t.augment is None and not t.has_teacher][:1]
    pairs = [(a, b) for b in readers + plain for a in trained if a != b]
    return pairs if family == "trained" and pairs else list(itertools.combinations(arms, 2))


def paired_tests(
    runs: Sequence[Run], clusters: Mapping[tuple[int, str], Cluster], family: str = "trained"
) -> list[Paired]:
    """The family's pairs in every split, on the questions and seeds that both arms have."""
    splits = dict.fromkeys(answer.split for run in runs for answer in run.answers)
    pairs = family_of(list(dict.fromkeys(run.arm for run in runs)), family)
    tests = [test for a, b in pairs for split in splits if (test := pair(runs, clusters, a, b, split)) is not None]
    adjusted = statistics.holm([test.p for test in tests])
    return [replace(test, p=p) for test, p in zip(tests, adjusted, strict=True)]


def pair(
    runs: Sequence[Run],
    clusters: Mapping[tuple[int, str], Cluster],
    first: str,
    second: str,
    split: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> Paired | None:
    """Two arms on the questions and seeds that both have, in a split or in all; None where they have none.

    With `weights` of splits, the difference and its interval are those of that mix; the p-value is not.
    """
    mine, theirs = _answers(runs, first), _answers(runs, second)
    keys = [key for key in mine if key in theirs and split in (None, mine[key].split)]
    if not any(mix_of([mine[key].split for key in keys], weights)):
        return None
    differences = [mine[key].is_correct - theirs[key].is_correct for key in keys]
    names = [clusters[seed, mine[seed, question].topic] for seed, question in keys]
    seeds = [seed for seed, _ in keys]
    trains = any(recorded_arm(arm).trains for arm in (first, second))
    by_cluster: dict[Cluster, int] = {}
    by_seed: dict[int, list[int]] = {}
    for name, seed, difference in zip(names, seeds, differences, strict=True):
        by_cluster[name] = by_cluster.get(name, 0) + difference
        by_seed.setdefault(seed, []).append(difference)
    p = statistics.sign_flip_test(list(by_cluster.values()), mid=True)
    has_seeds = len(by_seed) >= statistics.SEEDS_AS_UNIT
    if trains and has_seeds:
        p = max(p, statistics.t_test([sum(some) / len(some) for some in by_seed.values()]))
    counts = mix_of([mine[key].split for key in keys], weights)
    low, high = statistics.gap_interval(differences, names, seeds if trains else None, counts)
    mean = sum(map(operator.mul, counts, differences)) / sum(counts)
    return Paired(first, second, split, mean, low, high, p, len(by_cluster), trains and not has_seeds)


def _answers(runs: Sequence[Run], arm: str) -> dict[tuple[int, str], Answer]:
    """An arm's answers by seed and question."""
    return {(run.seed, answer.question_id): answer for run in runs if run.arm == arm for answer in run.answers}
