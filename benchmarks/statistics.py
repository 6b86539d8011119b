"""Do intervals cover what they say, and do tests reject as seldom as they say? By simulation, in a minute or two.

Answers of a cluster share a latent normal variable with the given correlation; training runs add luck to an arm's
accuracy. The suite fails where a table leaves its bounds.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.timing import Row
from icl_ft_fast.study import statistics
from icl_ft_fast.study.amortise import Samples, break_even_interval

Z = {0.5: 0.0, 0.6: 0.2533, 0.8: 0.8416, 0.95: 1.6449, 0.99: 2.3263}  # the normal distribution's quantiles


def run(quick: bool) -> list[Row]:
    """Print coverage and level tables, and refuse them where they leave their bounds."""
    rng, draws = np.random.default_rng(0), 300 if quick else 1500
    slack = 3.5 * (0.05 * 0.95 / draws) ** 0.5
    print("\ncoverage of accuracy_interval(), nominal 95%: clusters x answers each, correlation")
    for clusters, (each, rho), p in itertools.product((5, 10, 20, 40), ((1, 0.0), (4, 0.0), (4, 0.5), (4, 0.99)), Z):
        names = np.repeat(np.arange(clusters), each).tolist()
        hits = [
            _covers(statistics.accuracy_interval(right, names), p)
            for right in _answers(rng, clusters, each, rho, p, draws)
        ]
        _report(f"{clusters} x {each}, {rho}, accuracy {p}", np.mean(hits), 0.93 if clusters >= 10 else 0.90, slack)
    print("\nthe same of a mix: 20 clusters x 4 answers, the first of which counts three times")
    for rho, p in itertools.product((0.0, 0.5), (0.6, 0.8, 0.95)):
        names, weights = np.repeat(np.arange(20), 4).tolist(), [3.0, 1.0, 1.0, 1.0] * 20
        rows = list(_answers(rng, 20, 4, rho, p, draws))
        hits = [_covers(statistics.accuracy_interval(right, names, weights=weights), p) for right in rows]
        _report(f"{rho}, accuracy {p}", np.mean(hits), 0.93, slack)
        others = _answers(rng, 20, 4, rho, p, draws)
        gaps = (_minus(a, b) for a, b in zip(rows, others, strict=True))
        hits = [_covers(statistics.gap_interval(gap, names, weights=weights), 0.0) for gap in gaps]
        _report(f"{rho}, gap of two at {p}", np.mean(hits), 0.93, slack)
    print("\ncoverage of gap_interval(), nominal 95%: clusters x answers each, correlation, accuracies")
    for clusters, (each, rho) in itertools.product((5, 10, 20, 40), ((1, 0.0), (4, 0.5), (4, 0.99))):
        names = np.repeat(np.arange(clusters), each).tolist()
        for first, second in ((0.8, 0.8), (0.8, 0.6), (0.95, 0.8), (0.99, 0.95)):
            pairs = zip(*(_answers(rng, clusters, each, rho, p, draws) for p in (first, second)), strict=True)
            hits = [_covers(statistics.gap_interval(_minus(a, b), names), first - second) for a, b in pairs]
            _report(f"{clusters} x {each}, {rho}, {first} - {second}", np.mean(hits), 0.93, slack)
    print("\nlevel of the mid-p sign-flip test at 5%: clusters x answers each, correlation, accuracy")
    for clusters, (each, rho), p in itertools.product(
        (5, 10, 20, 40), ((1, 0.0), (4, 0.5), (4, 0.99)), (0.5, 0.8, 0.95)
    ):
        pairs = zip(*(_answers(rng, clusters, each, rho, p, draws) for _ in range(2)), strict=True)
        sums = (np.reshape(_minus(a, b), (clusters, each)).sum(1).tolist() for a, b in pairs)
        level = np.mean([statistics.sign_flip_test(s, mid=True) < 0.05 for s in sums])
        _report(f"{clusters} x {each}, {rho}, {p}", level, None, slack, most=0.055)
    print(
        "\nluck of training runs, sd 5 points, 40 facts x 4 questions: level of the test over facts and seeds, coverage"
    )
    for seeds in (4, 8):
        level, covered = _with_luck(rng, seeds, draws)
        _report(f"{seeds} seeds, level", level, None, slack, most=0.055)
        _report(f"{seeds} seeds, coverage of the gap", covered, 0.93, slack)
    print("\ncoverage of break_even_interval(), nominal 95%: seeds whose setups vary by 10%, readings without error")
    for seeds in (2, 3, 4, 8):
        _report(f"{seeds} seeds", _break_evens_covered(rng, seeds, max(100, draws // 5)), 0.93, 2 * slack)
    return []


def _break_evens_covered(rng: Any, seeds: int, draws: int) -> float:
    """How often the interval has the break-even of the mean setup: 1,000 s against a reading of 3 s a query."""
    rival = Samples((), (3.0,), (1.0,), 1.0)
    tuned = (Samples(tuple(1000 + 100 * rng.standard_normal(seeds)), (), (1.0,)) for _ in range(draws))
    found = (break_even_interval(one, rival, draws=500, seed=i) for i, one in enumerate(tuned))
    return float(np.mean([even.low <= 333 <= even.high for even in found]))


def _with_luck(rng: Any, seeds: int, draws: int) -> tuple[float, float]:
    """Level and coverage of the comparison of two equal methods whose runs differ by luck."""
    rejected = covered = 0
    facts, each = 40, 4
    clusters = [fact for _ in range(seeds) for fact in range(facts) for _ in range(each)]
    of_seed = [seed for seed in range(seeds) for _ in range(facts * each)]
    for _ in range(draws):
        difficulty = rng.standard_normal((1, facts, 1)) * 0.7
        arms = []
        for _ in range(2):
            luck = rng.standard_normal((seeds, 1, 1)) * 0.05 / 0.28  # 5 points of accuracy at .8
            noise = rng.standard_normal((seeds, facts, each)) * 0.7
            arms.append(difficulty + noise < Z[0.8] + luck)
        d = arms[0].astype(int) - arms[1].astype(int)
        p = max(
            statistics.sign_flip_test(d.sum((0, 2)).tolist(), mid=True),
            statistics.t_test(d.mean((1, 2)).tolist()),
        )
        rejected += p < 0.05
        covered += _covers(statistics.gap_interval(d.ravel().tolist(), clusters, of_seed), 0.0)
    return rejected / draws, covered / draws


def _answers(rng: Any, clusters: int, each: int, rho: float, p: float, draws: int) -> Iterator[list[bool]]:
    """Right or wrong, `draws` times: `each` answers in each cluster, correlated."""
    for _ in range(draws):
        shared, own = rng.standard_normal((clusters, 1)), rng.standard_normal((clusters, each))
        yield (rho**0.5 * shared + (1 - rho) ** 0.5 * own < Z[p]).ravel().tolist()


def _minus(first: list[bool], second: list[bool]) -> list[int]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _covers(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] - 1e-12 <= truth <= interval[1] + 1e-12


def _report(what: str, value: float, least: float | None, slack: float, *, most: float = 1.0) -> None:
    """Print a line of a table; fail where the value is out of bounds by more than the simulation's own error."""
    print(f"  {what:40} {value:.3f}")
    assert (least or 0.0) - slack <= value <= most + slack, f"{what}: {value:.3f}, expected {least} to {most}"
