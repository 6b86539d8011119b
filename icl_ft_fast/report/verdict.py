"""The verdict: what is not known first, then the cheapest accurate way, how sure that is, and what would change it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.study.amortise import Decision, Way, decide
from icl_ft_fast.study.arms import recorded_arm

DRAWS = 2000


@dataclass(frozen=True)
class Verdict:
    """A decision with its certainty.

    Attributes:
        decision: the cheapest accurate way, by the measured accuracies and costs.
        resource, unit: what costs are told in.
        unknown: what the data does not show, in sentences; empty where nothing is open.
        shares: how often each way is chosen when facts, timings and setups are drawn again, the most frequent first.
    """

    decision: Decision
    resource: str
    unit: str
    unknown: tuple[str, ...]
    shares: dict[str, float]

    @property
    def certainty(self) -> str:
        """How sure the choice is, and what comes second, in a sentence."""
        chosen = self.decision.chosen.name
        others = [(name, share) for name, share in self.shares.items() if name != chosen]
        text = f"{chosen} is chosen in {self.shares.get(chosen, 0.0):.0%} of resamples of facts, timings and setups"
        return text + (f"; {others[0][0]} in {others[0][1]:.0%}." if others else ".")

    @property
    def text(self) -> str:
        """The whole verdict in a paragraph, what is not known first."""
        return " ".join([*self.unknown, self.told, self.certainty])

    @property
    def told(self) -> str:
        """The choice, and what would change it."""
        return decision_text(self.decision, self.unit)


def verdict_of(study: Derived, queries: float, points: float) -> Verdict | None:
    """The verdict on so many queries, by money under a price file, else by seconds; None where it cannot be given."""
    resource = "seconds" if study.prices is None else "money"
    if not (ways := study.decision_ways(resource)):
        return None
    decision = decide(ways, queries, points)
    unknown = (*_not_above_chance(study), *_not_told_apart(study, decision, points))
    shares = _shares(study, resource, ways, queries, points)
    return Verdict(decision, resource, study.resources[resource], unknown, shares)


def why_none(study: Derived) -> str:
    """Why there is no verdict."""
    if not any(run.answers for run in study.results.runs):
        return "No decision: no question of this task has a known answer."
    if not any(map(study.is_harmless, study.arms)):
        return "No decision: every arm loses more than --max-harm, or its harm was not measured (--general)."
    return "No decision: the results have no measured query costs; run `compare` to its end."


def decision_text(decision: Decision, unit: str) -> str:
    """The cheapest way among the accurate ones, and what would change the answer."""
    n, chosen, best = decision.queries, decision.chosen, decision.best

    def named(way: Way) -> str:
        return f"{way.name} (accuracy {way.accuracy:.3f}, {way.line.cost(n):,.4g} {unit})"

    text = f"For {n:,.0f} queries the cheapest way within {decision.points:g} points of the best accuracy is "
    text += f"{named(chosen)}."
    if chosen.accuracy < best.accuracy:
        text += f" The most accurate is {named(best)}."
    if len(decision.switches) > 1:
        ranges = ", ".join(f"{way.name} (from {m:,.0f})" for m, way in decision.switches)
        text += f" By number of queries it would be {ranges}."
    else:
        text += " No other number of queries changes that."
    return text + "".join(
        f" Accepting {gap:.1f} points less would allow {named(way)}." for gap, way in decision.tolerances
    )


def _not_above_chance(study: Derived) -> list[str]:
    """A sentence where no arm's interval over all questions lies above chance."""
    chance, lows = study.chance(None), {}
    for arm in study.arms:
        if (interval := study.interval(arm)) is not None:
            lows[arm] = interval[0]
    if chance is None or not lows or max(lows.values()) > chance:
        return []
    return [f"No way is clearly above chance ({chance:.3f}): fix the model, the prompt or the questions first."]


def _not_told_apart(study: Derived, decision: Decision, points: float) -> list[str]:
    """A sentence on the arms that are neither shown to be as good as the best nor shown to be worse."""
    best, open_arms, more = study.arm_of(decision.best.name), [], []
    for arm in study.arms:
        gap = None if arm == best or recorded_arm(arm).asking.is_control else study.gap(arm, best)
        if gap is None or gap.word(points) != "not shown":
            continue
        open_arms.append(recorded_arm(arm).title)
        distance = max(abs(gap.difference + points / 100), 1e-9)
        asked = sum(len(run.answers) for run in study.of(arm))
        half = (gap.high - gap.low) / 2
        more.append(asked * max(0.0, (half / distance) ** 2 - 1))
    if not open_arms:
        return []
    fewest = min(more)
    needed = "more than 100,000" if fewest > 1e5 else f"about {_rounded(fewest):,.0f}"
    names, title = ", ".join(open_arms), recorded_arm(best).title
    return [
        f"Within {points:g} points of accuracy, {title} cannot be told apart from {names}: {needed} more answers would "
        f"settle the first of them."
    ]


def _rounded(n: float) -> float:
    """Two significant digits, at least 10."""
    return max(10.0, float(f"{n:.1e}"))


def _shares(
    study: Derived, resource: str, ways: list[Way], queries: float, points: float, seed: int = 0
) -> dict[str, float]:
    """How often each way is chosen when facts, timings and setups are drawn again, with replacement."""
    accuracies, samples = _resampled_accuracies(study, seed), study.ways(resource)
    accuracy = np.stack([accuracies[study.arm_of(way.name)] for way in ways])
    cost = np.stack([samples[way.name].resampled_costs(queries, DRAWS, seed) for way in ways])
    is_accurate = accuracy >= accuracy.max(0) - points / 100 - 1e-12
    chosen = np.where(is_accurate, cost, np.inf).argmin(0)
    counts = Counter(ways[int(i)].name for i in chosen)
    return {name: count / DRAWS for name, count in counts.most_common()}


def _resampled_accuracies(study: Derived, seed: int) -> dict[str, NDArray[np.float64]]:
    """[draws] of each arm, over the same draws of clusters, as many as there are."""
    names: dict[Any, int] = {}
    right: dict[str, Counter[int]] = {}
    total: dict[str, Counter[int]] = {}
    for run in study.results.runs:
        for answer in run.answers:
            c = names.setdefault(study.clusters[run.seed, answer.topic], len(names))
            right.setdefault(run.arm, Counter())[c] += answer.is_correct
            total.setdefault(run.arm, Counter())[c] += 1
    n = len(names)
    weight = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)
    found = {}
    for arm in right:
        hits, answers = (weight @ np.array([some[arm][c] for c in range(n)], float) for some in (right, total))
        found[arm] = hits / np.maximum(answers, 1e-9)
    return found


def summary(study: Derived, queries: float | None = None, points: float = 2.0) -> dict[str, Any]:
    """What tables and verdict say, for machines: plain values, with None for never."""
    verdict = verdict_of(study, queries, points) if queries else None
    told = verdict and {
        "resource": verdict.resource,
        "unit": verdict.unit,
        "queries": verdict.decision.queries,
        "points": points,
        "best": verdict.decision.best.name,
        "chosen": verdict.decision.chosen.name,
        "cost": verdict.decision.chosen.line.cost(verdict.decision.queries),
        "ways": [
            {"name": way.name, "accuracy": way.accuracy, "cost": way.line.cost(verdict.decision.queries)}
            for way in verdict.decision.ways
        ],
        "switches": [{"queries": n, "chosen": way.name} for n, way in verdict.decision.switches],
        "tolerances": [{"points": gap, "chosen": way.name} for gap, way in verdict.decision.tolerances],
        "unknown": list(verdict.unknown),
        "chosen_in": verdict.shares,
    }
    return study.summary(points) | {"decision": told}
