"""What would change the choice: each input varied alone, and volume against changes of the documents."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study.amortise import Way
from icl_ft_fast.study.billing import Priced

Ends: TypeAlias = tuple[float, list[Way]]
NOTHING: Mapping[str, float] = {}


@dataclass(frozen=True)
class CheapestWays:
    """The cheapest accurate way of a study, by what is varied.

    Attributes:
        study: whose ways.
        points: accuracy below the best that still counts; infinity where wrong answers have a price.
        ways: as they were measured, with the accuracies that do not vary.
        costs: of each way, for one version of the documents.
    """

    study: Derived
    points: float
    ways: tuple[Way, ...]
    costs: Mapping[str, Priced] = field(repr=False)

    @classmethod
    def of(cls, study: Derived, points: float) -> CheapestWays:
        """The choices of a study; where wrong answers have a price, `points` play no part."""
        resource, _ = study.decided_by
        counted = points if study.service.cost_of_wrong is None else math.inf
        return cls(study, counted, tuple(study.decision_ways(resource)), study.priced(resource))

    def varied(self, changes: float | None = None, scale: Mapping[str, float] = NOTHING) -> list[Way]:
        """All ways with what they cost.

        Args:
            changes: of the documents a month; None for the service's.
            scale: what "setup", "reading" and "query" costs are multiplied by.
        """
        service, found = self.study.service, []
        versions = service.versions if changes is None else service.versions_at(changes)
        for way in self.ways:
            costs = self.costs[way.name].scaled(**scale) if scale else self.costs[way.name]
            found.append(replace(way, line=costs.repeated(versions).line))
        return found

    def accurate(self, ways: Sequence[Way], queries: float) -> list[Way]:
        """The ways that can be chosen for so many queries, the cheapest first."""
        served = [way for way in ways if not math.isinf(way.line.cost(queries))]
        best = max((way.accuracy for way in served), default=0.0)
        accurate = [way for way in served if best - way.accuracy <= self.points / 100 + 1e-12]
        return sorted(accurate, key=lambda way: way.total(queries))

    def at(self, queries: float, changes: float | None = None, scale: Mapping[str, float] = NOTHING) -> list[Way]:
        """The ways that can be chosen, the cheapest first, see varied()."""
        return self.accurate(self.varied(changes, scale), queries)


def at_machine_prices(study: Derived, by: float) -> Derived:
    """The study where an hour of every machine costs so many times as much, and hosted models what they do."""
    if study.prices is None:
        return study
    machines = tuple(m.model_copy(update={"per_hour": by * m.per_hour}) for m in study.prices.all_machines)
    prices = study.prices.model_copy(update={"machine_per_hour": None, "machines": machines})
    return replace(study, prices=prices)


def chosen_by(name_at: Callable[[float], str], grid: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """(value, name) from each value on at which another name is found, by search between the values of a grid."""
    found = [(grid[0], name_at(grid[0]))]
    for left, right in itertools.pairwise(grid):
        if (after := name_at(right)) == found[-1][1]:
            continue
        while right - left > 1e-3 * right:
            middle = (left + right) / 2
            left, right = (middle, right) if name_at(middle) == found[-1][1] else (left, middle)
        found.append((right, after))
    return tuple(found)


@dataclass(frozen=True)
class Factor:
    """An input varied alone.

    Attributes:
        name: of the input, with what it is varied to.
        low, high: what the chosen arm saves against the cheapest way of the other accurate arms at either end, in
            percent of the dearer one's cost; negative where another arm is the cheapest there, 100 where no
            other is accurate.
        cheapest: names of the cheapest ways at either end.
    """

    name: str
    low: float
    high: float
    cheapest: tuple[str, str]


def tornado(study: Derived, queries: float, points: float) -> tuple[str, list[Factor]]:
    """The chosen way, and each input varied alone, what matters most first; no factors where there is no rival."""
    choices = CheapestWays.of(study, points)
    found = choices.at(queries)
    if len({study.arm_of(way.name) for way in found}) < 2:
        return found[0].name if found else "", []
    chosen, changes = found[0].name, study.service.changes_per_month
    arm = study.arm_of(chosen)

    def saved(ways: Sequence[Way], n: float) -> float:
        mine = min((way.total(n) for way in ways if study.arm_of(way.name) == arm), default=math.inf)
        other = min((way.total(n) for way in ways if study.arm_of(way.name) != arm), default=math.inf)
        if math.isinf(mine) or math.isinf(other):
            return -100.0 if math.isinf(mine) else 100.0
        return 100 * (other - mine) / max(other, mine, 1e-300)

    def factor(name: str, ends: Iterable[Ends]) -> Factor:
        (few, at_low), (many, at_high) = ends
        names = at_low[0].name if at_low else "none", at_high[0].name if at_high else "none"
        return Factor(name, saved(at_low, few), saved(at_high, many), names)

    def of(studies: Iterable[Derived]) -> Iterable[Ends]:
        return ((queries, CheapestWays.of(other, points).at(queries)) for other in studies)

    often = max(10.0, 10 * changes)
    factors = [
        factor("queries, a tenth to tenfold", ((n, choices.at(n)) for n in (queries / 10, queries * 10))),
        factor(f"changes a month, 0 to {often:g}", ((queries, choices.at(queries, c)) for c in (0.0, often))),
    ]
    for cost, name in (("setup", "setups"), ("reading", "readings of the context"), ("query", "query costs")):
        halves = ((queries, choices.at(queries, None, {cost: by})) for by in (0.5, 2.0))
        factors.append(factor(f"{name}, half to double", halves))
    if math.isfinite(study.cache_lifetime):
        lives = (replace(study, cache_lifetime=max(1.0, study.cache_lifetime * by)) for by in (0.1, 10.0))
        factors.append(factor("cache lifetime, a tenth to tenfold", of(lives)))
    if math.isfinite(choices.points):
        widths = ((queries, replace(choices, points=p).at(queries)) for p in (0.0, 2 * points))
        factors.append(factor(f"tolerance, 0 to {2 * points:g} points", widths))
    else:
        price = study.service.cost_of_wrong or 0.0
        priced = (replace(study, service=replace(study.service, cost_of_wrong=price * by)) for by in (0.1, 10.0))
        factors.append(factor("price of a wrong answer, a tenth to tenfold", of(priced)))
    if study.prices is not None and study.prices.all_machines and study.prices.hosted:
        factors.append(
            factor("price of machines, half to double", of(at_machine_prices(study, by) for by in (0.5, 2.0)))
        )
    return chosen, sorted(factors, key=lambda f: -abs(f.high - f.low))


def cheapest_map(
    study: Derived, queries: float, points: float, size: int = 25
) -> tuple[list[float], list[float], list[list[str]]]:
    """The cheapest accurate way by volume and changes of the documents.

    Returns:
        Numbers of queries, changes a month, and for each of the latter the name of the way at each of the former.
    """
    choices = CheapestWays.of(study, points)
    volumes = np.geomspace(max(1.0, queries / 1000), queries * 1000, size).tolist()
    rates = [0.0, *np.geomspace(0.1, max(100.0, 10 * study.service.changes_per_month), size - 1).tolist()]
    named = []
    for ways in map(choices.varied, rates):
        at_each = (choices.accurate(ways, n) for n in volumes)
        named.append([found[0].name if found else "none" for found in at_each])
    return volumes, rates, named
