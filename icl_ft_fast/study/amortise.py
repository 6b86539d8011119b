"""Amortisation: what n queries cost in each way of answering them, and from how many on one way is the cheaper.

Pure arithmetic over measured costs; docs/cost.md derives it. Any resource will do: seconds, FLOPs, joules, money.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """The cost of n whole queries: setup + reading * max(1, ceil(n / cache_lifetime)) + query * n.

    Attributes:
        setup: paid once: augmentation and training, or saving a prefix cache.
        reading: paid for the context, from text or from disk, once every `cache_lifetime` queries.
        query: paid for one query after that.
        cache_lifetime: whole queries that share a reading, from 1 (no cache) to infinity (a cache that is never lost);
            a fraction of a query is dropped.
    """

    setup: float
    reading: float
    query: float
    cache_lifetime: float = math.inf

    def cost(self, n: float) -> float:
        """The cost of n queries."""
        return self.setup + self.reading * max(1, math.ceil(n / self.lifetime)) + self.query * n

    def costs(self, n: NDArray[np.float64]) -> NDArray[np.float64]:
        """The costs of several numbers of queries."""
        return self.setup + self.reading * np.maximum(1.0, np.ceil(n / self.lifetime)) + self.query * n

    @property
    def lifetime(self) -> float:
        """The cache lifetime in whole queries."""
        return self.cache_lifetime if math.isinf(self.cache_lifetime) else max(1.0, math.floor(self.cache_lifetime))

    @property
    def slope(self) -> float:
        """The cost of one more query, after many."""
        return self.query + self.reading / self.lifetime


LOOKED_AT = 20_000  # readings of the context around the break-even that are gone through one by one


def turns(line: Line, rival: Line) -> tuple[bool, list[int], bool]:
    """Where a line costs less than its rival, over all whole numbers of queries from 1 on.

    Each reading that falls due is a step, so the order of two lines may turn several times. All of them lie where the
    lines without steps differ by less than a reading.

    Returns:
        Whether the line costs less at 1 query; the numbers at which that turns, in order; and whether the turns go on
        for ever, where both lines have the same slope. Where more than LOOKED_AT readings lie in question, readings
        count pro rata.
    """
    steps = [each for each in (line, rival) if each.reading and 1 < each.lifetime < math.inf]
    slope = line.slope - rival.slope
    start = sum(
        sign * (each.setup + each.reading * (math.isinf(each.lifetime))) for sign, each in ((1, line), (-1, rival))
    )
    up = line.reading if line in steps else 0.0
    down = rival.reading if rival in steps else 0.0
    is_cheaper = line.cost(1) < rival.cost(1)
    if not steps:
        return is_cheaper, _turns_of_straight_lines(line, rival, is_cheaper), False
    if abs(slope) <= 1e-15 * (abs(line.slope) + abs(rival.slope)):
        if start + up < 0 or start - down >= 0:
            return is_cheaper, [], False
        first, last, repeats = 1.0, 1.0 + math.lcm(*(int(each.lifetime) for each in steps)), True
    else:
        ends = sorted(((-start - up) / slope, (-start + down) / slope))
        first, last, repeats = max(1.0, math.floor(ends[0]) - 1), math.ceil(ends[1]) + 1.0, False
    if last <= 1:
        return is_cheaper, [], False
    if sum((last - first) / each.lifetime for each in steps) > LOOKED_AT:
        middle = math.floor((-start - (up - down) / 2) / slope) + 1 if slope else 1
        return is_cheaper, [middle] * (middle > 1), False
    found = _turns_between(line, rival, first, last, [each.lifetime for each in steps])
    return is_cheaper, found, repeats and bool(found)


def _turns_of_straight_lines(line: Line, rival: Line, is_cheaper: bool) -> list[int]:
    """The one whole number at which the order of lines without steps turns, if there is one."""
    slope, ahead = line.slope - rival.slope, line.cost(1) - rival.cost(1)
    if not slope or (slope < 0) == is_cheaper:
        return []
    near = 1 + math.floor(min(-ahead / slope, 1e300))
    for n in range(max(2, near - 1), near + 3):
        if (line.cost(n) < rival.cost(n)) != is_cheaper:
            return [n]
    return [near + 3]  # so far away that the costs' last digits decide


def _turns_between(line: Line, rival: Line, first: float, last: float, lifetimes: Sequence[float]) -> list[int]:
    """The whole numbers in (first, last] at which the order turns; between readings the difference is linear."""
    after = [np.arange(math.floor((first - 1) / n) + 1, math.ceil(last / n)) * n + 1 for n in lifetimes]
    left = np.unique(np.concatenate([[first], *after]))
    left = left[left <= last]
    right = np.append(left[1:] - 1, last)

    def ahead(n: NDArray[np.float64]) -> NDArray[np.float64]:
        return line.costs(n) - rival.costs(n)

    at_left, at_right = ahead(left), ahead(right)
    found = [int(n) for n, was, now in zip(left[1:], at_right[:-1] < 0, at_left[1:] < 0, strict=True) if was != now]
    for i in np.nonzero((at_left < 0) != (at_right < 0))[0]:
        n = left[i] + (right[i] - left[i]) * at_left[i] / (at_left[i] - at_right[i])
        near = np.clip(np.floor(n) + np.arange(-1, 3), left[i], right[i])
        found.append(int(near[(ahead(near) < 0) == (at_right[i] < 0)][0]))
    return sorted(found)


def break_even(line: Line, rival: Line) -> float | None:
    """The last whole number of queries at which a line costs no less than its rival; 0 if there is none, None for ever.

    What starts cheaper and ends dearer has no such number either.
    """
    is_cheaper, found, is_endless = turns(line, rival)
    if is_endless or is_cheaper == bool(len(found) % 2):
        return None
    return float(found[-1] - 1) if found else 0.0


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

    def repeated(self, times: float) -> Samples:
        """The cost of queries over so many versions of the documents, each of which is set up and read anew."""
        if times == 1:
            return self
        return replace(self.scaled(setup=times, reading=times), cache_lifetime=times * self.cache_lifetime)

    def scaled(self, setup: float = 1.0, reading: float = 1.0, query: float = 1.0) -> Samples:
        """The costs multiplied by so much each."""
        setups, readings, queries = (
            tuple(by * cost for cost in costs)
            for costs, by in ((self.setup, setup), (self.reading, reading), (self.query, query))
        )
        return Samples(setups, readings, queries, self.cache_lifetime)

    def resampled(self, rng: np.random.Generator, draws: int) -> Lines:
        """Lines of as many readings and queries drawn with replacement, and of setups by Student's t.

        The mean of k setups drawn with replacement varies too little where k is small; with k - 1 degrees of freedom it
        does not. One setup says nothing of others, and stays.
        """
        setups = _mean_by_t(rng, self.setup, draws)
        readings, queries = (_resample(rng, values, draws, np.median) for values in (self.reading, self.query))
        return Lines(setups, readings, queries, self.cache_lifetime)

    def drawn(self, draws: int, seed: int) -> dict[str, NDArray[np.float64]]:
        """[draws] each of "setup", "reading" and "query", of as many measurements drawn with replacement.

        Ways that share a measurement, such as the queries of ICL with and without a cache, share its draws.
        """

        def one(values: Sequence[float], statistic: Callable[..., NDArray[np.float64]]) -> NDArray[np.float64]:
            rng = np.random.default_rng([seed, hash(tuple(values)) % 2**32])
            return _resample(rng, values, draws, statistic)

        return {
            "setup": _mean_by_t(np.random.default_rng([seed, hash(self.setup) % 2**32]), self.setup, draws),
            "reading": one(self.reading, np.median),
            "query": one(self.query, np.median),
        }

    def resampled_costs(self, n: float, draws: int, seed: int) -> NDArray[np.float64]:
        """[draws] costs of n queries, see drawn()."""
        of = self.drawn(draws, seed)
        return of["setup"] + of["reading"] * max(1.0, math.ceil(n / self.line.lifetime)) + of["query"] * n


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 0.0


def _mean_by_t(rng: np.random.Generator, values: Sequence[float], draws: int) -> NDArray[np.float64]:
    """[draws] means of as many values as there are, where they are normal with a spread that was estimated."""
    if len(values) < 2:
        return np.full(draws, values[0] if values else 0.0)
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return np.maximum(0.0, np.mean(values) + spread * rng.standard_t(len(values) - 1, size=draws))


def _resample(
    rng: np.random.Generator, values: Sequence[float], draws: int, statistic: Callable[..., NDArray[np.float64]]
) -> NDArray[np.float64]:
    if not values:
        return np.zeros(draws)
    return np.asarray(statistic(np.asarray(values)[rng.integers(len(values), size=(draws, len(values)))], axis=1))


@dataclass(frozen=True)
class Lines:
    """Many lines with one cache lifetime: [draws] setups, readings and queries."""

    setup: NDArray[np.float64]
    reading: NDArray[np.float64]
    query: NDArray[np.float64]
    cache_lifetime: float

    def __getitem__(self, i: int) -> Line:
        return Line(float(self.setup[i]), float(self.reading[i]), float(self.query[i]), self.cache_lifetime)

    def plain(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
        """What is paid once, a query, and in steps, and their width; a reading for every query or for all is none."""
        width = self[0].lifetime
        if math.isinf(width):
            return self.setup + self.reading, self.query, np.zeros_like(self.query), width
        if width == 1:
            return self.setup, self.query + self.reading, np.zeros_like(self.query), math.inf
        return self.setup, self.query, self.reading, width


def break_evens(lines: Lines, rivals: Lines) -> NDArray[np.float64]:
    """break_even() of each line and its rival; infinity for never."""
    (once, each, up, width), (other_once, other_each, down, other_width) = lines.plain(), rivals.plain()
    a, b = once - other_once, each - other_each
    if math.isfinite(width) and math.isfinite(other_width):
        pairs = (break_even(lines[i], rivals[i]) for i in range(len(a)))
        return np.array([_or_never(found) for found in pairs])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if math.isinf(width) and math.isinf(other_width):
            found, slope = np.floor(a / -b), b
        else:
            step, n = (up, width) if math.isfinite(width) else (-down, other_width)
            slope = b + step / n
            gain = -(b * n + step)  # from one reading to the next
            ends = np.floor(a / gain) * n  # the difference is largest before a reading falls due
            k = np.floor((a - b * n + b) / gain)  # or just after one
            starts = np.where(k >= 1, np.minimum(np.floor((a + step * k) / -b), k * n), 0.0)
            found = np.where(b >= 0, ends, starts)
        never = (slope > 0) | ((slope == 0) & (a >= 0))
    return np.where(never, math.inf, np.where(found >= 1, found, 0.0))


@dataclass(frozen=True)
class BreakEven:
    """A break-even number with its bootstrap interval at 95%; infinity stands for never.

    Attributes:
        queries: the number, by the measurements as they are.
        low, high: the interval.
        never: fraction of resamples without a number: beyond 0.025 the interval's upper end is infinity.
        below: number of queries below which the line costs less, where it starts cheaper and ends dearer.
        has_interval: whether what it rests on was measured more than once; otherwise low and high mean nothing.
    """

    queries: float
    low: float
    high: float
    never: float
    below: float | None = None
    has_interval: bool = True

    @property
    def is_resolved(self) -> bool:
        """Whether the measurements tell if there is such a number."""
        return not 0.025 < self.never < 0.975


def break_even_interval(samples: Samples, rival: Samples, *, draws: int = 1000, seed: int = 0) -> BreakEven:
    """The break-even number of two ways, and where it would lie had other repetitions been measured.

    An interval around setups of one seed knows nothing of other seeds.
    """
    rng = np.random.default_rng(seed)
    found = break_evens(samples.resampled(rng, draws), rival.resampled(rng, draws))
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


class Costs(Protocol):
    """What so many queries cost, all in all."""

    def cost(self, n: float) -> float:
        """The cost of n queries."""
        ...


@dataclass(frozen=True)
class Way:
    """A way of answering as the decision sees it.

    Attributes:
        name: in tables.
        accuracy: fraction of right answers.
        line: what queries cost.
        wrong: what the wrong answers cost, a query; 0 where they have no price.
    """

    name: str
    accuracy: float
    line: Costs
    wrong: float = 0.0

    def total(self, n: float) -> float:
        """The cost of n queries with that of their wrong answers."""
        return self.line.cost(n) + self.wrong * n


@dataclass(frozen=True)
class Decision:
    """The cheapest way at n queries among the accurate ones, and what would change the answer.

    Attributes:
        queries: n.
        points: how far below the best accuracy, in percentage points, still counts as accurate; infinity where
            wrong answers have a price.
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


def decide(ways: Sequence[Way], queries: float, points: float) -> Decision:
    """Choose the cheapest way for so many queries among those within `points` of the best accuracy.

    Of several that are the most accurate, the cheapest counts as the best.
    """
    order = tuple(sorted(ways, key=lambda way: way.total(queries)))
    best = max(order, key=lambda way: way.accuracy)  # the first of equals
    decision = Decision(queries, points, best, best, order, (), ())
    accurate = [way for way in order if decision.is_accurate(way)]
    cheaper = order[: order.index(accurate[0])]
    tolerances: list[tuple[float, Way]] = []
    for way in sorted(cheaper, key=lambda way: -way.accuracy):
        if not tolerances or way.total(queries) < tolerances[-1][1].total(queries):
            tolerances.append((100 * (best.accuracy - way.accuracy), way))
    return Decision(queries, points, best, accurate[0], order, _switches(accurate, queries), tuple(tolerances))


def _switches(ways: Sequence[Way], queries: float) -> tuple[tuple[float, Way], ...]:
    """The cheapest way from each number of queries on at which it is another."""
    lines = [replace(way.line, query=way.line.query + way.wrong) for way in ways if isinstance(way.line, Line)]
    at = {1}
    if len(lines) == len(ways):
        at |= {n for i, a in enumerate(lines) for b in lines[:i] for n in turns(a, b)[1]}
    else:
        at |= set(_found_by_search(ways, queries))
    found: list[tuple[float, Way]] = []
    for n in sorted(at):
        cheapest = min(ways, key=lambda way: way.total(n))
        if not found or cheapest is not found[-1][1]:
            found.append((n, cheapest))
    return tuple(found)


SEARCHED = 600  # numbers of queries at which ways that are billed in steps are compared


def _found_by_search(ways: Sequence[Way], queries: float) -> list[int]:
    """Where the cheapest way changes between SEARCHED numbers of queries, up to 1,000 times as many as asked."""

    def cheapest(n: int) -> int:
        return min(range(len(ways)), key=lambda i: ways[i].total(n))

    grid = sorted({round(n) for n in np.geomspace(1, max(1e6, 1e3 * queries), SEARCHED)})
    found = []
    for left, right in itertools.pairwise(grid):
        before, after = cheapest(left), cheapest(right)
        while right - left > 1 and before != after:
            middle = (left + right) // 2
            left, right = (middle, right) if cheapest(middle) == before else (left, middle)
        if before != after:
            found.append(right)
    return found
