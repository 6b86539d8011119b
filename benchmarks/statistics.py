"""Do intervals cover what they say, and do tests reject as seldom as they say? By simulation, in a minute or two.

Answers of a cluster share a latent normal variable with the given correlation; training runs add luck to an arm's
accuracy. The suite fails where a table leaves its bounds. `--draws 20000` makes the tables of docs/statistics.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.timing import Row
from icl_ft_fast.study import statistics
from icl_ft_fast.study.amortise import Samples, break_even_interval

LEAST, MOST = 0.93, 0.97  # coverage from 10 clusters on
Z = {0.5: 0.0, 0.6: 0.2533, 0.8: 0.8416, 0.95: 1.6449, 0.99: 2.3263}  # the normal distribution's quantiles


def run(quick: bool, draws: int | None = None) -> list[Row]:
    """Print coverage and level tables, and refuse them where they leave their bounds."""
    rng, draws = np.random.default_rng(0), draws or (300 if quick else 1500)
    slack, failed = 3.5 * (0.05 * 0.95 / draws) ** 0.5, list[str]()
    table = Table("coverage of accuracy_interval(), nominal 95%: clusters x answers each, correlation", slack)
    kinds = ((1, 0.0), (4, 0.0), (4, 0.5), (4, 0.99), (20, 0.2))
    for clusters, (each, rho), p in itertools.product((5, 10, 20, 40), kinds, Z):
        names = np.repeat(np.arange(clusters), each).tolist()
        hits = [
            _covers(statistics.accuracy_interval(right, names), p)
            for right in _answers(rng, clusters, each, rho, p, draws)
        ]
        forced = _least_coverage(_right_of_cluster(each, rho, p), clusters)
        table.add(f"{clusters} x {each}, {rho}, accuracy {p}", hits, *_bounds(clusters), forced=forced)
    failed += table.end()
    table = Table("the same of a mix: 20 clusters x 4 answers, the first of which counts three times", slack)
    for rho, p in itertools.product((0.0, 0.5), (0.6, 0.8, 0.95)):
        names, weights = np.repeat(np.arange(20), 4).tolist(), [3.0, 1.0, 1.0, 1.0] * 20
        rows = list(_answers(rng, 20, 4, rho, p, draws))
        hits = [_covers(statistics.accuracy_interval(right, names, weights=weights), p) for right in rows]
        table.add(f"{rho}, accuracy {p}", hits, "accuracies", 0.93)
        others = _answers(rng, 20, 4, rho, p, draws)
        gaps = (_minus(a, b) for a, b in zip(rows, others, strict=True))
        hits = [_covers(statistics.gap_interval(gap, names, weights=weights), 0.0) for gap in gaps]
        table.add(f"{rho}, gap of two at {p}", hits, "differences", 0.93)
    failed += table.end()
    table = Table("coverage of gap_interval(), nominal 95%: clusters x answers each, correlation, accuracies", slack)
    for clusters, (each, rho) in itertools.product((5, 10, 20, 40), kinds):
        names = np.repeat(np.arange(clusters), each).tolist()
        for first, second in ((0.8, 0.8), (0.8, 0.6), (0.95, 0.8), (0.99, 0.95)):
            pairs = zip(*(_answers(rng, clusters, each, rho, p, draws) for p in (first, second)), strict=True)
            hits = [_covers(statistics.gap_interval(_minus(a, b), names), first - second) for a, b in pairs]
            of_cluster = np.convolve(_right_of_cluster(each, rho, first), _right_of_cluster(each, rho, second)[::-1])
            forced = _least_coverage(of_cluster, clusters)
            table.add(f"{clusters} x {each}, {rho}, {first} - {second}", hits, *_bounds(clusters), forced=forced)
    failed += table.end()
    table = Table("level of the mid-p sign-flip test at 5%: clusters x answers each, correlation, accuracy", slack)
    for clusters, (each, rho), p in itertools.product(
        (5, 10, 20, 40), ((1, 0.0), (4, 0.5), (4, 0.99), (20, 0.2)), (0.5, 0.8, 0.95)
    ):
        pairs = zip(*(_answers(rng, clusters, each, rho, p, draws) for _ in range(2)), strict=True)
        sums = (np.reshape(_minus(a, b), (clusters, each)).sum(1).tolist() for a, b in pairs)
        hits = [statistics.sign_flip_test(s, mid=True) < 0.05 for s in sums]
        table.add(f"{clusters} x {each}, {rho}, {p}", hits, _bounds(clusters)[0], most=0.055)
    failed += table.end()
    table = Table("luck of training runs, sd 5 points, 40 facts x 4 questions: the test over facts and seeds", slack)
    for seeds in (4, 8):
        rejected, covered = _with_luck(rng, seeds, draws)
        table.add(f"{seeds} seeds, level", rejected, "level", most=0.055)
        table.add(f"{seeds} seeds, coverage of the gap", covered, "coverage", 0.93)
    failed += table.end()
    varying = "seeds whose setups vary by 10%, readings without error"
    table = Table(f"coverage of break_even_interval(), nominal 95%: {varying}", 2 * slack)
    for seeds in (2, 3, 4, 8):
        table.add(f"{seeds} seeds", _break_evens_covered(rng, seeds, max(100, draws // 5)), "seeds", 0.93)
    failed += table.end()
    assert not failed, "; ".join(failed)
    return []


class Table:
    """A table of simulated coverages or levels, and what of it is out of bounds."""

    def __init__(self, title: str, slack: float) -> None:
        """Begin one; a value may leave its bounds by `slack`, the simulation's own error."""
        print(f"\n{title}")
        self.slack, self.groups, self.failed = slack, dict[str, list[tuple[float, float]]](), list[str]()

    def add(
        self, what: str, hits: list[bool], group: str, least: float = 0.0, most: float = 1.0, forced: float = 0.0
    ) -> None:
        """Print a line; `forced` is the least coverage that discrete outcomes allow."""
        value = float(np.mean(hits))
        print(f"  {what:40} {value:.3f}" + (f"  (no less than {forced:.3f})" if forced > MOST else ""), flush=True)
        if not least - self.slack <= value <= most + self.slack:
            self.failed.append(f"{what}: {value:.3f}, expected {least} to {most}")
        self.groups.setdefault(group, []).append((value, forced))

    def end(self) -> list[str]:
        """Print each group's lowest and highest value and how many lie within 93 to 97%; returns what is out."""
        for group, values in self.groups.items():
            found, told = [value for value, _ in values], ""
            if max(found) > 0.5:
                within = sum(LEAST <= value <= MOST for value in found)
                forced = sum(value > MOST and least > MOST for value, least in values)
                told = f", {within} of them within .93 to .97, {forced} above it as no outcomes allow less"
            print(f"  {group}: {min(found):.3f} to {max(found):.3f} in {len(found)} cells{told}")
        return self.failed


def _right_of_cluster(each: int, rho: float, p: float) -> Any:
    """The probabilities of 0 to `each` right answers in a cluster, over its latent variable by Gauss and Hermite."""
    at, weights = np.polynomial.hermite_e.hermegauss(200)
    given = np.array([(1 + math.erf(x)) / 2 for x in (Z[p] - rho**0.5 * at) / (2 * (1 - rho)) ** 0.5])
    right = [math.comb(each, k) * given**k * (1 - given) ** (each - k) for k in range(each + 1)]
    return np.array(right) @ weights / weights.sum()


def _least_coverage(of_cluster: Any, clusters: int) -> float:
    """The least coverage of a rule that goes by the sum over clusters and misses either side in at most 3.5%.

    Sums are whole numbers: where the last one of a tail takes it over 3.5%, the rule has to cover there.
    """
    total = np.ones(1)
    for _ in range(clusters):
        total = np.convolve(total, of_cluster)
    tails = (np.cumsum(side)[np.cumsum(side) <= (1 - LEAST) / 2] for side in (total, total[::-1]))
    return 1 - sum(float(tail.max(initial=0.0)) for tail in tails)


def _bounds(clusters: int) -> tuple[str, float]:
    """A table's group of cells, and the least coverage there."""
    return ("10 to 40 clusters", LEAST) if clusters >= 10 else ("5 clusters", 0.90)


def _break_evens_covered(rng: Any, seeds: int, draws: int) -> list[bool]:
    """Whether the interval has the break-even of the mean setup: 1,000 s against a reading of 3 s a query."""
    rival = Samples((), (3.0,), (1.0,), 1.0)
    tuned = (Samples(tuple(1000 + 100 * rng.standard_normal(seeds)), (), (1.0,)) for _ in range(draws))
    found = (break_even_interval(one, rival, draws=500, seed=i) for i, one in enumerate(tuned))
    return [even.low <= 333 <= even.high for even in found]


def _with_luck(rng: Any, seeds: int, draws: int) -> tuple[list[bool], list[bool]]:
    """Rejections and coverage of the comparison of two equal methods whose runs differ by luck."""
    rejected, covered, facts, each = list[bool](), list[bool](), 40, 4
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
        rejected.append(p < 0.05)
        covered.append(_covers(statistics.gap_interval(d.ravel().tolist(), clusters, of_seed), 0.0))
    return rejected, covered


def _answers(rng: Any, clusters: int, each: int, rho: float, p: float, draws: int) -> Iterator[list[bool]]:
    """Right or wrong, `draws` times: `each` answers in each cluster, correlated."""
    for _ in range(draws):
        shared, own = rng.standard_normal((clusters, 1)), rng.standard_normal((clusters, each))
        yield (rho**0.5 * shared + (1 - rho) ** 0.5 * own < Z[p]).ravel().tolist()


def _minus(first: list[bool], second: list[bool]) -> list[int]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _covers(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] - 1e-12 <= truth <= interval[1] + 1e-12
