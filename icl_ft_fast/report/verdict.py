"""The verdict: what is not known first, then the cheapest accurate way, how sure that is, and what would change it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.sensitivity import CheapestWays, at_machine_prices, chosen_by
from icl_ft_fast.runtime.printable import amount
from icl_ft_fast.study.amortise import Decision, Line, Way, decide
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.billing import DAY_S, Bill
from icl_ft_fast.study.paired import pair

DRAWS = 2000
GROUPS = 2000  # of clusters that are drawn together, where there are more: as many groups tell the same spread
MOST_SWITCHES = 6  # that a paragraph names
MOST_CHANGES = 1000.0  # a month, up to which the choice is followed


@dataclass(frozen=True)
class Verdict:
    """A decision with its certainty.

    Attributes:
        decision: the cheapest accurate way, by the measured accuracies and costs.
        resource, unit: what costs are told in.
        unknown: what the data does not show, in sentences; empty where nothing is open.
        shares: how often each way is chosen when facts, timings and setups are drawn again, the most frequent first.
        served: what the decision counts beside queries, in sentences: changes, a mix, a price of wrong answers.
        by_changes: (changes a month, way) from which on it is the chosen one, at the same number of queries.
        by_price: (times, way) from which on it is the chosen one, if machines cost so many times as much and hosted
            models what they do; empty without both.
        regret: what the choice costs more than the best one of each resample, on average; None without a price of wrong
            answers, since only then one number says which is the best.
    """

    decision: Decision
    resource: str
    unit: str
    unknown: tuple[str, ...]
    shares: dict[str, float]
    served: tuple[str, ...] = ()
    by_changes: tuple[tuple[float, str], ...] = ()
    regret: float | None = None
    by_price: tuple[tuple[float, str], ...] = ()

    @property
    def certainty(self) -> str:
        """How sure the choice is, and what comes second, in a sentence."""
        chosen = self.decision.chosen.name
        others = [(name, share) for name, share in self.shares.items() if name != chosen]
        text = f"{chosen} is chosen in {self.shares.get(chosen, 0.0):.0%} of resamples of facts, timings and setups"
        text += f"; {others[0][0]} in {others[0][1]:.0%}." if others else "."
        if self.regret is not None:
            text += (
                f" It costs {amount(self.regret)} {self.unit} more, on average, than the best choice of each resample."
            )
        return text

    @property
    def text(self) -> str:
        """The whole verdict in a paragraph, what is not known first."""
        return " ".join([*self.unknown, self.told, *self.served, self.certainty])

    @property
    def told(self) -> str:
        """The choice, and what would change it."""
        text = decision_text(self.decision, self.unit)
        if len(self.by_changes) > 1:
            ranges = ", ".join(f"{name} (from {rate:.3g})" for rate, name in self.by_changes)
            text += f" By changes of the documents a month it would be {ranges}."
        if len(self.by_price) > 1:
            ranges = ", ".join(f"{name} (from {by:.2g} times)" for by, name in self.by_price)
            text += f" By the price of machines it would be {ranges}."
        return text


def verdict_of(study: Derived, queries: float, points: float) -> Verdict | None:
    """The verdict on so many queries, by money under a price file, else by seconds; None where it cannot be given.

    Where wrong answers have a price, all ways are compared by it, and `points` play no part. Where no way is clearly
    above chance, none is chosen.
    """
    if study.not_above_chance:
        return None
    resource, unit = study.decided_by
    asked = study.decision_ways(resource)
    if not (ways := [way for way in asked if not math.isinf(way.line.cost(queries))]):
        return None
    counted = points if study.service.cost_of_wrong is None else math.inf
    decision = decide(ways, queries, counted)
    unknown = tuple(_not_told_apart(study, decision, points))
    shares, regret = _resampled(study, resource, ways, decision)
    return Verdict(
        decision,
        resource,
        unit,
        unknown,
        shares,
        (
            *_changes(study, queries),
            *_mix(study),
            *_wrong(study, decision),
            *_capacity(study, decision, [way.name for way in asked if way not in ways]),
            *_hosted(study),
            *_latency(study, decision),
            *_harmful(study),
        ),
        _by_changes(study, queries, points),
        regret if study.service.cost_of_wrong is not None else None,
        _by_price(study, queries, points),
    )


def _changes(study: Derived, queries: float) -> list[str]:
    """A sentence on documents that change."""
    if not (rate := study.service.changes_per_month):
        return []
    versions = study.service.versions
    return [
        f"The documents change {rate:g} times a month: {versions:,.1f} versions in {study.service.days:g} days, each "
        f"asked about {queries / versions:,.0f} queries, are set up, trained and read anew."
    ]


def _by_changes(study: Derived, queries: float, points: float) -> tuple[tuple[float, str], ...]:
    """The chosen way by the rate of changes, from none to MOST_CHANGES a month; found by search."""
    choices = CheapestWays.of(study, points)

    def chosen(rate: float) -> str:
        return choices.at(queries, rate)[0].name if choices.at(queries, rate) else "none"

    return chosen_by(chosen, [0.0, *np.geomspace(0.01, MOST_CHANGES, 15).tolist()])


def _by_price(study: Derived, queries: float, points: float) -> tuple[tuple[float, str], ...]:
    """The chosen way by the price of machines beside hosted models, in times of what it is; () without both."""
    if study.prices is None or not (study.prices.hosted and study.prices.all_machines):
        return ()

    def chosen(by: float) -> str:
        found = CheapestWays.of(at_machine_prices(study, by), points).at(queries)
        return found[0].name if found else "none"

    return chosen_by(chosen, np.geomspace(0.01, 100.0, 9).tolist())


def _mix(study: Derived) -> list[str]:
    """Sentences on the mix of queries: whether it, or a look at single splits, turns the order of arms."""
    arms = [arm for arm in study.arms if not recorded_arm(arm).asking.is_control]
    plain = replace(study, service=replace(study.service, weights=None))

    def best(value: Callable[[str], float | None]) -> str:
        found = {arm: v for arm in arms if (v := value(arm)) is not None}
        return recorded_arm(max(found, key=found.__getitem__)).title if found else ""

    pooled = best(lambda arm: plain.mixed_accuracy(arm, study.common_seeds))
    if (weights := study.service.weights) is not None:
        mixed = best(lambda arm: study.mixed_accuracy(arm, study.common_seeds))
        told = ", ".join(f"{split} {weight:.0%}" for split, weight in weights.items() if weight)
        turned = f" Over all questions alike it would be {pooled}: the mix decides." if pooled != mixed else ""
        return [f"By the mix of queries ({told}) the most accurate arm is {mixed}.{turned}"]
    leads = {split: best(partial(_value, study, split)) for split in study.splits}
    others = {split: name for split, name in leads.items() if name != pooled and _leads(study, name, pooled, split)}
    if not others:
        return []
    told = ", ".join(f"{name} on {split}" for split, name in others.items())
    return [f"Over all questions {pooled} is the most accurate, but {told}: --weights says which questions count."]


def _value(study: Derived, split: str, arm: str) -> float | None:
    found = study.accuracy(arm, split)
    return None if found is None else found.value


def _leads(study: Derived, name: str, other: str, split: str) -> bool:
    """Whether the data shows that an arm is more accurate than another on a split."""
    titles = {recorded_arm(arm).title: arm for arm in study.arms}
    gap = pair(study.results.runs, study.clusters, titles[name], titles[other], split)
    return gap is not None and gap.low > 0


def _capacity(study: Derived, decision: Decision, out: list[str]) -> list[str]:
    """Sentences on machines: how many the choice needs, and what cannot be served."""
    n, days, told = decision.queries, study.service.days, []
    chosen = decision.chosen.line
    if isinstance(chosen, Bill):
        needed = float(chosen.machines(n))
    elif isinstance(chosen, Line) and study.prices is None:
        needed = math.ceil((chosen.cost(n) - chosen.setup) / (days * DAY_S))
    else:
        needed = 0.0
    if needed > 1:
        told.append(f"{decision.chosen.name} takes {needed:,.0f} machines at once for so many queries a day.")
    if out:
        told.append(f"The machines that can be had cannot serve {', '.join(out)}.")
    return told


def _latency(study: Derived, decision: Decision) -> list[str]:
    """A sentence on how long a query takes, where that is asked for."""
    service, found = study.service, study.latency(decision.chosen.name)
    if service.concurrency == 1 and service.max_latency_s is None:
        return []
    if found is None:
        return [f"How long {decision.chosen.name} takes to answer is not known here."]
    limit, out, at_once = service.max_latency_s, [], str(study.measured_concurrency)
    if study.measured_concurrency != service.concurrency:
        at_once += f" (measured; {service.concurrency} were asked for)"
    if limit is not None:
        names = study.priced(study.decided_by[0])
        out = [name for name in names if not study.is_fast(name)]
    text = (
        f"With {at_once} at once, a query of {decision.chosen.name} takes {amount(1e3 * found[0])} ms "
        f"(median) and {amount(1e3 * found[1])} ms (95th percentile)."
    )
    if out:
        text += f" Slower than --max-latency, or not known: {', '.join(out)}."
    return [text]


def _harmful(study: Derived) -> list[str]:
    """A sentence on arms that lose more elsewhere than they may."""
    arms = [recorded_arm(arm) for arm in study.arms if not study.is_harmless(arm)]
    out = ", ".join(arm.title for arm in arms if not arm.asking.is_control)
    return [f"Left out, as --max-harm is less than they lose or that was not measured: {out}."] if out else []


def _hosted(study: Derived) -> list[str]:
    """What to know of hosted models' figures."""
    if study.prices is None or not study.prices.hosted:
        return []
    text = "Hosted models are taken to be as accurate as this one, and to count tokens as it does."
    if not study.service.answer_tokens:
        text += " Their output is not counted: give --answer-tokens."
    elif study.prices.all_machines and not any(point.decode_s for point in study.results.sweep.points):
        text += " Machines are left out: decoding was not measured; run `compare` with --answer-tokens."
    return [text]


def _wrong(study: Derived, decision: Decision) -> list[str]:
    """A sentence on the price of wrong answers."""
    if (price := study.service.cost_of_wrong) is None:
        return []
    n, chosen, (_, unit) = decision.queries, decision.chosen, study.decided_by
    computing, wrong = chosen.line.cost(n), chosen.wrong * n
    return [
        f"A wrong answer costs {amount(price)} {unit}, so accuracy has its price and no tolerance is used: of "
        f"{amount(computing + wrong)} {unit}, {amount(wrong)} are for wrong answers."
    ]


def why_none(study: Derived) -> str:
    """Why there is no verdict."""
    if not any(run.answers for run in study.results.runs):
        return "No decision: no question of this task has a known answer."
    if study.not_above_chance:
        return f"No decision. {study.not_above_chance}"
    if ways := study.decision_ways(study.decided_by[0]):
        return f"No decision: no machine of the price file can serve so many queries, in any of {len(ways)} ways."
    points = study.results.sweep.points
    if points and study.service.answer_tokens and not any(point.decode_s for point in points):
        return "No decision: decoding was not measured; run `compare` with --answer-tokens."
    if study.service.max_latency_s is not None and study.resources:
        return "No decision: no way answers 95% of queries within --max-latency."
    if study.prices is not None and not study.prices.all_machines and study.resources:
        return "No decision: no way of this study can be had on the price file's hosted models."
    if not any(map(study.is_harmless, study.arms)):
        return "No decision: every arm loses more than --max-harm, or its harm was not measured (--general)."
    return "No decision: the results have no measured query costs; run `compare` to its end."


def decision_text(decision: Decision, unit: str) -> str:
    """The cheapest way among the accurate ones, and what would change the answer."""
    n, chosen, best = decision.queries, decision.chosen, decision.best

    def named(way: Way) -> str:
        return f"{way.name} (accuracy {way.accuracy:.3f}, {amount(way.total(n))} {unit})"

    among = "" if math.isinf(decision.points) else f" within {decision.points:g} points of the best accuracy"
    text = f"For {n:,.0f} queries the cheapest way{among} is "
    text += f"{named(chosen)}."
    if chosen.accuracy < best.accuracy:
        text += f" The most accurate is {named(best)}."
    if len(decision.switches) > 1:
        shown = decision.switches[:MOST_SWITCHES]
        ranges = ", ".join(f"{way.name} (from {m:,.0f})" for m, way in shown)
        last, way = decision.switches[-1]
        more = len(decision.switches) - len(shown)
        ranges += f", and {more:,} more changes up to {way.name} (from {last:,.0f})" if more else ""
        text += f" By number of queries it would be {ranges}."
    else:
        text += " No other number of queries changes that."
    return text + "".join(
        f" Accepting {gap:.1f} points less would allow {named(way)}." for gap, way in decision.tolerances
    )


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


def _resampled(
    study: Derived, resource: str, ways: list[Way], decision: Decision, seed: int = 0
) -> tuple[dict[str, float], float]:
    """How often each way is chosen when facts, timings and setups are drawn again, and the choice's mean regret."""
    queries, price = decision.queries, study.service.cost_of_wrong or 0.0
    accuracies, samples = _resampled_accuracies(study, seed), study.decision_costs(resource)
    accuracy = np.stack([accuracies[study.arm_of(way.name)] for way in ways])
    cost = np.stack([samples[way.name].resampled_costs(queries, DRAWS, seed) for way in ways])
    cost = cost + price * queries * (1 - accuracy)
    is_accurate = accuracy >= accuracy.max(0) - decision.points / 100 - 1e-12
    chosen = np.where(is_accurate, cost, np.inf).argmin(0)
    counts = Counter(ways[int(i)].name for i in chosen)
    mine = [way.name for way in ways].index(decision.chosen.name)
    shares = {name: count / DRAWS for name, count in counts.most_common()}
    return shares, float((cost[mine] - cost.min(0)).mean())


def _resampled_accuracies(study: Derived, seed: int) -> dict[str, NDArray[np.float64]]:
    """[draws] of each arm, over the same draws of clusters, as many as there are."""
    names: dict[Any, int] = {}
    counted: dict[tuple[str, str], Counter[tuple[int, bool]]] = {}
    for run in study.results.runs:
        for answer in run.answers:
            c = names.setdefault(study.clusters[run.seed, answer.topic], len(names)) % GROUPS
            counted.setdefault((run.arm, answer.split), Counter())[c, answer.is_correct] += 1
    n, weights = min(len(names), GROUPS), study.service.weights
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)

    def sums(counts: Counter[tuple[int, bool]], *kinds: bool) -> NDArray[np.float64]:
        """How many answers of these kinds each draw has."""
        total: NDArray[np.float64] = drawn @ np.array([sum(counts[c, k] for k in kinds) for c in range(n)], float)
        return total

    found = {}
    for arm in {arm: None for arm, _ in counted}:
        splits = {split: some for (whose, split), some in counted.items() if whose == arm}
        if weights is None:
            splits = {"": sum(splits.values(), Counter())}
        parts = {split: (sums(some, True), sums(some, True, False)) for split, some in splits.items() if some}
        share = {"": 1.0} if weights is None else weights
        found[arm] = sum(
            (share.get(split, 0.0) * right / np.maximum(total, 1e-9) for split, (right, total) in parts.items()),
            np.zeros(DRAWS),
        )
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
        "cost": verdict.decision.chosen.total(verdict.decision.queries),
        "ways": [
            {"name": way.name, "accuracy": way.accuracy, "cost": way.total(verdict.decision.queries)}
            for way in verdict.decision.ways
        ],
        "switches": [{"queries": n, "chosen": way.name} for n, way in verdict.decision.switches],
        "tolerances": [{"points": gap, "chosen": way.name} for gap, way in verdict.decision.tolerances],
        "unknown": list(verdict.unknown),
        "chosen_in": verdict.shares,
        "served": list(verdict.served),
        "by_changes": [{"changes_per_month": rate, "chosen": name} for rate, name in verdict.by_changes],
        "by_price": [{"times": by, "chosen": name} for by, name in verdict.by_price],
        "regret": verdict.regret,
    }
    return study.summary(points) | {"decision": told}
