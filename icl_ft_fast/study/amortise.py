"""Amortisation: what n queries cost in each way of answering them, and from how many on one way is the cheaper.

Pure arithmetic over measured costs; docs/cost.md derives it. Any resource will do: seconds, FLOPs, joules, money.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """The cost of n >= 0 queries: setup + reading * max(1, n / cache_lifetime) + query * n.

    Attributes:
        setup: paid once: augmentation and training, or saving a prefix cache.
        reading: paid for the context, from text or from disk, once every `cache_lifetime` queries.
        query: paid for one query after that.
        cache_lifetime: queries that share a reading, from 1 (no cache) to infinity (a cache that is never lost).
    """

    setup: float
    reading: float
    query: float
    cache_lifetime: float = math.inf

    def cost(self, n: float) -> float:
        """The cost of n queries."""
        return self.setup + self.reading * max(1.0, n / self.cache_lifetime) + self.query * n

    @property
    def slope(self) -> float:
        """The cost of one more query, after many."""
        return self.query + self.reading / self.cache_lifetime


def break_even(line: Line, rival: Line) -> float | None:
    """The number of queries from which on a line costs less than its rival; 0 if always, None if never.

    What starts cheaper and ends dearer has no such number either.
    """

    def ahead(n: float) -> float:
        return line.cost(n) - rival.cost(n)

    # The difference is linear between the numbers where a second reading falls due: go through them from the right.
    knots = sorted({0.0, *(n for n in (line.cache_lifetime, rival.cache_lifetime) if n < math.inf)})
    slope, last = line.slope - rival.slope, knots[-1]
    if slope > 0 or (slope == 0 and ahead(last) >= 0):
        return None
    if ahead(last) >= 0:
        return last - ahead(last) / slope
    for left, right in zip(knots[-2::-1], knots[:0:-1], strict=True):
        if ahead(left) >= 0:
            return left + (right - left) * ahead(left) / (ahead(left) - ahead(right))
    return 0.0


@dataclass(frozen=True)
class Samples:
    """Repeated measurements that a line is made of; an empty one is a cost of 0.

    Setups are one a seed and averaged; readings and queries are repetitions of the same work on a machine that others
    disturb, so their median is taken.
    """

    setup: tuple[float, ...] = ()
    reading: tuple[float, ...] = ()
    query: tuple[float, ...] = ()
    cache_lifetime: float = math.inf

    @property
    def line(self) -> Line:
        """The line of all measurements."""
        setup = math.fsum(self.setup) / len(self.setup) if self.setup else 0.0
        return Line(setup, _median(self.reading), _median(self.query), self.cache_lifetime)

    def resampled(self, rng: np.random.Generator, draws: int) -> list[Line]:
        """Lines of as many measurements drawn with replacement."""
        setups = _resample(rng, self.setup, draws, np.mean)
        readings, queries = (_resample(rng, values, draws, np.median) for values in (self.reading, self.query))
        return [Line(*costs, self.cache_lifetime) for costs in zip(setups, readings, queries, strict=True)]

    def resampled_costs(self, n: float, draws: int, seed: int) -> NDArray[np.float64]:
        """[draws] costs of n queries, of as many measurements drawn with replacement.

        Ways that share a measurement, such as the queries of ICL with and without a cache, share its draws.
        """

        def drawn(values: Sequence[float], statistic: Callable[..., NDArray[np.float64]]) -> NDArray[np.float64]:
            rng = np.random.default_rng([seed, hash(tuple(values)) % 2**32])
            return np.array(_resample(rng, values, draws, statistic))

        setup, reading, query = drawn(self.setup, np.mean), drawn(self.reading, np.median), drawn(self.query, np.median)
        return setup + reading * max(1.0, n / self.cache_lifetime) + query * n


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 0.0


def _resample(
    rng: np.random.Generator, values: Sequence[float], draws: int, statistic: Callable[..., NDArray[np.float64]]
) -> list[float]:
    if not values:
        return [0.0] * draws
    drawn = np.asarray(values)[rng.integers(len(values), size=(draws, len(values)))]
    return [float(value) for value in statistic(drawn, axis=1)]


@dataclass(frozen=True)
class BreakEven:
    """A break-even number with its bootstrap interval at 95%; infinity stands for never.

    Attributes:
        queries: the number, by the measurements as they are.
        low, high: the interval.
        never: fraction of resamples without a number: beyond 0.025 the interval's upper end is infinity.
        below: number of queries below which the line costs less, where it starts cheaper and ends dearer.
    """

    queries: float
    low: float
    high: float
    never: float
    below: float | None = None

    @property
    def is_resolved(self) -> bool:
        """Whether the measurements tell if there is such a number."""
        return not 0.025 < self.never < 0.975


def break_even_interval(samples: Samples, rival: Samples, *, draws: int = 1000, seed: int = 0) -> BreakEven:
    """The break-even number of two ways, and where it would lie had other repetitions been measured.

    An interval around setups of one seed knows nothing of other seeds.
    """
    rng = np.random.default_rng(seed)
    lines = zip(samples.resampled(rng, draws), rival.resampled(rng, draws), strict=True)
    found = np.array([_or_never(break_even(line, other)) for line, other in lines])
    low, high = np.quantile(found, [0.025, 0.975], method="inverted_cdf")
    mine, theirs = samples.line, rival.line
    number, below = break_even(mine, theirs), None
    if number is None and mine.cost(1) < theirs.cost(1):
        below = break_even(theirs, mine)
    return BreakEven(_or_never(number), float(low), float(high), float(np.isinf(found).mean()), below)


def _or_never(queries: float | None) -> float:
    return math.inf if queries is None else queries


@dataclass(frozen=True)
class Fit:
    """A cost against context length c, coefficients[0] + coefficients[1] * c + ..., and its relative residuals."""

    coefficients: tuple[float, ...]
    residuals: tuple[float, ...]

    def __call__(self, context_tokens: float) -> float:
        """The fitted cost, at least 0."""
        return max(0.0, float(np.polynomial.polynomial.polyval(context_tokens, self.coefficients)))


def fit(context_tokens: Sequence[float], costs: Sequence[float], degree: int) -> Fit:
    """Least squares of relative errors; the degree is lowered so that a length is left to show residuals."""
    lengths = len(set(context_tokens))
    degree = min(degree, max(lengths - 2, min(1, lengths - 1)))
    c, y = np.asarray(context_tokens, float), np.asarray(costs, float)
    scale = max(1.0, float(c.max(initial=0.0)))
    powers = np.vander(c / scale, degree + 1, increasing=True)
    solved, *_ = np.linalg.lstsq(powers / y[:, None], np.ones(len(y)), rcond=None)
    coefficients = tuple(float(a) / scale**k for k, a in enumerate(solved))
    return Fit(coefficients, tuple(float(r) for r in (powers @ solved) / y - 1))


@dataclass(frozen=True)
class Way:
    """A way of answering as the decision sees it: its name, its fraction of right answers and its line."""

    name: str
    accuracy: float
    line: Line


@dataclass(frozen=True)
class Decision:
    """The cheapest way at n queries among the accurate ones, and what would change the answer.

    Attributes:
        queries: n.
        points: how far below the best accuracy, in percentage points, still counts as accurate.
        best: the most accurate way.
        chosen: the cheapest of the accurate.
        ways: all, cheapest first.
        switches: (queries, way) where another accurate way becomes the cheapest, from 1 query on.
        tolerances: (points, way) from which a cheaper but less accurate way would be chosen.
    """

    queries: float
    points: float
    best: Way
    chosen: Way
    ways: tuple[Way, ...]
    switches: tuple[tuple[float, Way], ...]
    tolerances: tuple[tuple[float, Way], ...]

    def is_accurate(self, way: Way) -> bool:
        """Whether a way is within `points` of the best."""
        return self.best.accuracy - way.accuracy <= self.points / 100 + 1e-12


def crossings(line: Line, rival: Line) -> list[float]:
    """Every number of queries, from 0 on, at which two lines cost the same and one becomes the cheaper."""
    knots = sorted({0.0, *(n for n in (line.cache_lifetime, rival.cache_lifetime) if n < math.inf)})
    ends = [*knots[1:], max(1.0, 2 * knots[-1])]
    found = []
    for left, right in zip(knots, ends, strict=True):
        before, after = (line.cost(n) - rival.cost(n) for n in (left, right))
        slope = (after - before) / (right - left)
        at = left - before / slope if slope else math.nan
        if left <= at and (at < right or left == knots[-1]):
            found.append(at)
    return found


def decide(ways: Sequence[Way], queries: float, points: float) -> Decision:
    """Choose the cheapest way for so many queries among those within `points` of the best accuracy.

    Of several that are the most accurate, the cheapest counts as the best.
    """
    order = tuple(sorted(ways, key=lambda way: way.line.cost(queries)))
    best = max(order, key=lambda way: way.accuracy)  # the first of equals
    decision = Decision(queries, points, best, best, order, (), ())
    accurate = [way for way in order if decision.is_accurate(way)]
    found = {n for i, a in enumerate(accurate) for b in accurate[:i] for n in crossings(a.line, b.line)}
    switches: list[tuple[float, Way]] = []
    for n in sorted({1.0, *(n for n in found if n > 1)}):
        cheapest = min(accurate, key=lambda way: way.line.cost(n * (1 + 1e-6)))
        if not switches or cheapest is not switches[-1][1]:
            switches.append((n, cheapest))
    cheaper = order[: order.index(accurate[0])]
    tolerances: list[tuple[float, Way]] = []
    for way in sorted(cheaper, key=lambda way: -way.accuracy):
        if not tolerances or way.line.cost(queries) < tolerances[-1][1].line.cost(queries):
            tolerances.append((100 * (best.accuracy - way.accuracy), way))
    return Decision(queries, points, best, accurate[0], order, tuple(switches), tuple(tolerances))
