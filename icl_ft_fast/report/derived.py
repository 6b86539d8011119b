"""What the reports draw: one run's accuracies, costs and break-even numbers, derived from its results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from icl_ft_fast.study.amortise import BreakEven, Fit, Line, Samples, Way, break_even, break_even_interval, fit
from icl_ft_fast.study.arm import SYNTHETIC_TOKENS
from icl_ft_fast.study.arms import recorded_arm
from icl_ft_fast.study.billing import Priced, on_hosted, on_machine, uncounted_electricity
from icl_ft_fast.study.clusters import Cluster, clusters_of
from icl_ft_fast.study.compare import context_lengths
from icl_ft_fast.study.costs import ArmCosts, computed_s, nearest_point, waited
from icl_ft_fast.study.evaluate import Accuracy, Answer
from icl_ft_fast.study.harm import SHARED_WITH_GENERAL
from icl_ft_fast.study.paired import Paired, mix_of, pair, paired_tests
from icl_ft_fast.study.prices import Prices
from icl_ft_fast.study.records import Harm, Run
from icl_ft_fast.study.results import Results, read_results
from icl_ft_fast.study.service import Service
from icl_ft_fast.study.settings import NORMALIZATIONS
from icl_ft_fast.study.statistics import SEEDS_AS_UNIT, accuracy_interval
from icl_ft_fast.study.sweep import Point

WEIGHTS_NOTE = (
    f"With fewer than {SEEDS_AS_UNIT} seeds, intervals and p-values of trained arms are about these weights: another "
    "training run may differ by more."
)
FORM_NOTE = (
    "Trained arms learned the documents as plain text and were asked through the chat template. A small model may hold "
    "what it learned in that form only: --template base asks in it."
)
ENERGY_NOTE = "Electricity is not counted: this machine has no energy counter, and the price file names no watts."
ENOUGH = 0.9  # of a budget of synthetic tokens, below which an arm is told to have fewer
ON = " on "  # between a way and the machine or hosted model that it is on
RESOURCES = {"seconds": "s", "FLOPs": "FLOP", "joules": "J"}  # and money, under a price file


@dataclass(frozen=True)
class Derived:
    """A results file with what follows from it.

    Attributes:
        results: from read_results().
        name: what it is called beside others.
        prices: of the user; without them there is no money.
        cache_lifetime: queries that share a reading of a context that stays in the cache.
        batch: queries scored in one batch; the nearest measured number is taken.
        family: the pairs of arms that are tested together, see paired.family_of().
        max_harm: accuracy on the general task that a chosen way may lose, in percentage points; None for any.
        service: what the decision is for.
    """

    results: Results
    name: str
    prices: Prices | None = None
    cache_lifetime: float = math.inf
    batch: int = 1
    family: str = "trained"
    max_harm: float | None = None
    service: Service = field(default_factory=Service)

    @classmethod
    def read(cls, path: str | Path, **settings: Any) -> Derived:
        """The study of a results.json, or of the folder that holds one; `settings` are the other attributes.

        Raises:
            ResultsError, OSError: see read_results().
            ServiceError: weights for a split that the study lacks.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        study = cls(read_results(path), path.parent.name or path.stem, **settings)
        study.service.check_splits(study.splits)
        return study

    @cached_property
    def arms(self) -> list[str]:
        """In the order they were run."""
        return list(dict.fromkeys(run.arm for run in self.results.runs))

    @cached_property
    def splits(self) -> list[str]:
        """Of all runs."""
        return list(dict.fromkeys(split for run in self.results.runs for split in run.accuracy))

    def of(self, arm: str) -> list[Run]:
        """The arm's runs."""
        return [run for run in self.results.runs if run.arm == arm]

    def accuracy(self, arm: str, split: str | None = None) -> Accuracy | None:
        """Over seeds, and over splits if none is given; None without answers."""
        found = [a for run in self.of(arm) for name, a in run.accuracy.items() if split in (None, name)]
        return Accuracy(sum(a.correct for a in found), sum(a.total for a in found)) if found else None

    def accuracy_by(self, arm: str, normalization: str) -> float | None:
        """Over seeds and splits under another normalization of the same scores; None where the file does not tell."""
        answers = [a for run in self.of(arm) for a in run.answers]
        if not answers or any(normalization not in a.predicted_by for a in answers):
            return None
        return fmean(a.predicted_by[normalization] in a.correct for a in answers)

    @cached_property
    def not_above_chance(self) -> str:
        """A sentence where the interval of no arm that can be chosen lies above chance; else empty."""
        chance = self.chance(None)
        arms = [arm for arm in self.arms if self.is_harmless(arm) and not recorded_arm(arm).asking.is_control]
        lows = [interval[0] for arm in arms if (interval := self.interval(arm)) is not None]
        if chance is None or not lows or max(lows) > chance:
            return ""
        kept = "" if all(map(self.is_harmless, self.arms)) else " that keeps --max-harm"
        return f"No way{kept} is clearly above chance ({chance:.3f}): fix the model, the prompt or the questions first."

    def is_augmented(self, arm: str) -> bool:
        """Whether an arm's augmentation gave more than next to nothing, if it was to have one."""
        prompts, productive = self._augmentation(arm)
        return 10 * productive >= prompts

    def _augmentation(self, arm: str) -> tuple[int, int]:
        """Prompts of an arm's augmentation, and those that gave a row, over its seeds."""
        notes = [run.notes for run in self.of(arm)]
        prompts, productive = (
            sum(its.get(name, 0) for its in notes) for name in ("augmentation_prompts", "augmentation_productive")
        )
        return prompts, productive

    @property
    def concerns(self) -> list[str]:
        """What to know before any ranking: nothing above chance, little augmentation, training that was too short."""
        found: dict[str, dict[str, None]] = {}  # titles of the arms by what is said of them
        for arm in map(recorded_arm, self.arms):
            notes = [run.notes for run in self.of(arm.name)]
            prompts, productive = self._augmentation(arm.name)
            told, budget = list[str](), None if arm.training is None else arm.training.tokens
            if 2 * productive < prompts:
                rows = sum(its.get("augmentations", 0) for its in notes)
                told.append(
                    f"only {productive:,} of {prompts:,} prompts gave a row ({rows:,} rows): its augmentation failed "
                    "for most of them, so it says little about augmentation"
                )
            written = [its[SYNTHETIC_TOKENS] for its in notes if SYNTHETIC_TOKENS in its]
            if written and budget is not None and fmean(written) < ENOUGH * budget:
                told.append(
                    f"{fmean(written):,.0f} synthetic tokens in place of {budget:,}: replies gave no more that was new "
                    "and in form"
                )
            for concern in (*told, *(concern for its in notes for concern in its.get("training_concerns", ()))):
                found.setdefault(concern, {})[arm.title] = None
        first = [self.not_above_chance] if self.not_above_chance else []
        return first + [f"{', '.join(titles)}: {concern}." for concern, titles in found.items()]

    @property
    def beside(self) -> str:
        """What to know of figures that were measured beside other runs or processes; empty where there were none."""
        workers = {run.workers for run in self.results.runs} - {1}
        count = "several" if None in workers else max(filter(None, workers), default=1)
        told = f"Arms were timed while {count} workers ran at once. On one machine they slow each other down and share "
        told += "its energy: setups and break-even numbers may be too high. Query costs were measured alone."
        if workers or self.results.machine.get("device") != "cpu":
            return told if workers else ""
        told = "Arms were timed while other processes took the cores: see wall s and device s in the report's ledger. "
        told += "Setups, queries and break-even numbers may be too high, and not all of them equally."
        return told * waited(*computed_s(self.results.runs))

    @property
    def notes(self) -> list[str]:
        """What to know of the figures: unfinished runs, workers that ran at once, too few seeds, another form."""
        seeds = {run.seed for run in self.results.runs}
        trains = any(recorded_arm(arm).trains for arm in self.arms)
        few = trains and len(seeds) < SEEDS_AS_UNIT
        made = [training for arm in self.arms if (training := recorded_arm(arm).training) is not None]
        is_other_form = self.results.settings.get("template") == "chat" and not all(its.has_teacher for its in made)
        costs = self.costs(self.arms[0], "money", self.batch, self.cache_lifetime)
        uncounted = self.prices is not None and uncounted_electricity(self.prices, costs)
        batch = ""
        if self.batches and self._nearest(self.batch) != self.batch:
            batch = (
                f"Costs of batches of {self.batch} were not measured; shown are those of {self._nearest(self.batch)}."
            )
        once = ""
        if self.measured_once:
            lengths = ", ".join(f"{length:,}" for length in self.measured_once)
            once = f"Queries behind {lengths} tokens were measured once: break-even numbers have no interval. "
            once += "A longer --measure-seconds repeats them."
        told = (
            self.unfinished,
            self.beside,
            self.shared,
            WEIGHTS_NOTE if few else "",
            FORM_NOTE * is_other_form,
            batch,
            once,
            ENERGY_NOTE * uncounted,
        )
        return [note for note in told if note]

    @property
    def shared(self) -> str:
        """That the general task has documents or questions of the task; empty where it has none."""
        count = max(run.notes.get(SHARED_WITH_GENERAL, 0) for run in self.results.runs)
        return (
            f"The general task has {count} documents or questions of the task itself: what it measures is not harm "
            "elsewhere."
        ) * bool(count)

    @property
    def unfinished(self) -> str:
        """What is missing of the runs that the settings name; empty where all are there."""
        planned = [
            (a, s) for s in self.results.settings.get("seeds", ()) for a in self.results.settings.get("arms", ())
        ]
        there = {(run.arm, run.seed) for run in self.results.runs}
        missing = [f"{recorded_arm(arm).title} under seed {seed}" for arm, seed in planned if (arm, seed) not in there]
        if not missing:
            return ""
        names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        return (
            f"Unfinished: {len(planned) - len(missing)} of {len(planned)} runs are there (missing: {names}). Arms are "
            "compared on the seeds that both have."
        )

    @cached_property
    def clusters(self) -> dict[tuple[int, str], Cluster]:
        """(seed, topic) -> what statistics count as one witness."""
        return clusters_of(self.results.runs, self.results.questions)

    def interval(self, arm: str, split: str | None = None) -> tuple[float, float] | None:
        """The accuracy's interval at 95%, over topics and, for a trained arm with enough seeds, over seeds.

        Where a file has no answers it is Wilson's, which counts them as independent. None without accuracies.
        """
        if (arm, split) not in self._intervals:
            rows = [(a, run.seed) for run in self.of(arm) for a in run.answers if split in (None, a.split)]
            known, found = self.accuracy(arm, split), None
            if rows:
                names = [self.clusters[seed, a.topic] for a, seed in rows]
                seeds = [seed for _, seed in rows] if recorded_arm(arm).trains else None
                mix = mix_of([a.split for a, _ in rows], None if split else self.service.weights)
                found = accuracy_interval([a.is_correct for a, _ in rows], names, seeds, mix) if any(mix) else None
            self._intervals[arm, split] = found or (known.interval if known else None)
        return self._intervals[arm, split]

    @cached_property
    def _intervals(self) -> dict[tuple[str, str | None], tuple[float, float] | None]:
        return {}

    @cached_property
    def paired(self) -> list[Paired]:
        """The family's pairs of arms in every split."""
        return paired_tests(self.results.runs, self.clusters, self.family)

    def gap(self, first: str, second: str) -> Paired | None:
        """Two arms over all splits, by the service's weights if it has some; the p-value is of this test alone."""
        return pair(self.results.runs, self.clusters, first, second, weights=self.service.weights)

    def chance(self, split: str | None) -> float | None:
        """Accuracy of blind guesses, over all splits if none is given."""
        asked = [a for run in self.results.runs for a in run.answers if split in (None, a.split)]
        mix = mix_of([a.split for a in asked], None if split else self.service.weights)
        return fmean([a.chance for a in asked], mix) if any(mix) else None

    @cached_property
    def batches(self) -> list[int]:
        """Numbers of queries scored together that were measured."""
        return sorted({point.batch for point in self.results.sweep.points})

    @property
    def own_point(self) -> Point | None:
        """What was measured behind the ICL arm's own context; None without one."""
        own = self.results.sweep.context_tokens
        return nearest_point(self.results.sweep, own, self.batch) if own else None

    @cached_property
    def resources(self) -> dict[str, str]:
        """The resources that costs are measured in, with their units."""
        known = dict(RESOURCES) | ({"money": self.prices.currency} if self.prices and self.prices.all_machines else {})
        return {name: unit for name, unit in known.items() if self.ways(name)}

    def costs(self, arm: str, resource: str, batch: int, cache_lifetime: float) -> ArmCosts:
        """What an arm costs in a resource."""
        runs, tokens = tuple(self.of(arm)), self.service.answer_tokens
        return ArmCosts(resource, runs, self.results.sweep, batch, cache_lifetime, self.prices, tokens)

    def ways(
        self, resource: str, *, batch: int | None = None, cache_lifetime: float | None = None
    ) -> dict[str, Samples]:
        """Ways of answering by name with what they cost; none where the resource was not measured.

        An arm is one way or several: ICL reads its context for each batch of queries, or caches it in memory, or keeps
        it in a file.
        """
        found: dict[str, Samples] = {}
        for arm in map(recorded_arm, self.arms):
            costs = self.costs(arm.name, resource, batch or self.batch, cache_lifetime or self.cache_lifetime)
            ways = arm.asking.ways(arm.title, costs)
            if not ways:
                return {}
            found |= ways
        return found

    def ways_of(self, arm: str) -> list[str]:
        """The names of the ways that an arm answers in, the plainest first."""
        own = recorded_arm(arm)
        if arm not in self._named:
            ways = own.asking.ways(own.title, self.costs(arm, "seconds", self.batch, self.cache_lifetime))
            self._named[arm] = list(ways)
        return self._named[arm]

    @cached_property
    def _named(self) -> dict[str, list[str]]:
        return {}

    def arm_of(self, way: str) -> str:
        """The arm that answers in a way, whose name begins with the arm's title."""
        plain = f"{way.partition(ON)[0]} "
        return max(
            (arm for arm in self.arms if plain.startswith(f"{recorded_arm(arm).title} ")),
            key=lambda arm: len(recorded_arm(arm).title),
        )

    @property
    def measured_concurrency(self) -> int:
        """The measured batch that is nearest to the queries that come at once."""
        return self._nearest(self.service.concurrency)

    def latency(self, way: str) -> tuple[float, float] | None:
        """Median and 95th percentile of a query's seconds, where as many come at once as the service says.

        Queries that come at once are answered in one batch, and each waits for all of it. A reading of the context is
        waited for where it falls due for half of the batches, or for one in 20. None of hosted models.
        """
        batch = self.measured_concurrency
        name, _, where = way.partition(ON)
        found = self.ways("seconds", batch=batch).get(name)
        if found is None or (where and self.prices and where in [one.name for one in self.prices.hosted]):
            return None
        lifetime = found.line.lifetime / batch  # in batches

        def at(part: float) -> float:
            reads = found.reading and lifetime <= 1 / (1 - part)
            return batch * float(np.quantile(found.query, part)) + (
                float(np.quantile(found.reading, part)) if reads else 0
            )

        return at(0.5), at(0.95)

    def is_fast(self, way: str) -> bool:
        """Whether a way answers 95% of queries in time; one whose latency is not known is not known to."""
        if self.service.max_latency_s is None:
            return True
        return (latency := self.latency(way)) is not None and latency[1] <= self.service.max_latency_s

    def harm(self, arm: str) -> Harm | None:
        """What an arm changes elsewhere, over its seeds; None where it was not measured."""
        found = [run.harm for run in self.of(arm) if run.harm is not None]
        if not found:
            return None
        after, before = (
            Accuracy(sum(a.correct for a in its), sum(a.total for a in its))
            for its in ([h.general for h in found], [h.general_before for h in found])
        )
        return Harm(fmean(h.kl for h in found), after, before)

    def is_harmless(self, arm: str) -> bool:
        """Whether an arm loses at most `max_harm` on the general task; one that was not measured is not known to."""
        if self.max_harm is None:
            return True
        return (harm := self.harm(arm)) is not None and harm.points_lost <= self.max_harm + 1e-9

    def mixed_accuracy(self, arm: str, seeds: Collection[int] | None = None) -> float | None:
        """Accuracy over all splits, by the service's weights if it has some; None without answers of a weighed split.

        Args:
            arm: whose.
            seeds: runs that count; None for all.
        """
        runs = [run for run in self.of(arm) if seeds is None or run.seed in seeds]
        counts: dict[str, list[int]] = {}
        for run in runs:
            for split, accuracy in run.accuracy.items():
                some = counts.setdefault(split, [0, 0])
                some[0], some[1] = some[0] + accuracy.correct, some[1] + accuracy.total
        weights = self.service.weights
        if weights is None:
            total = sum(n for _, n in counts.values())
            return sum(right for right, _ in counts.values()) / total if total else None
        if any(weight and not counts.get(split, (0, 0))[1] for split, weight in weights.items()):
            return None
        return math.fsum(weight * counts[s][0] / counts[s][1] for s, weight in weights.items() if weight)

    @property
    def common_seeds(self) -> set[int] | None:
        """The seeds that all arms have; None where there are none such."""
        return set.intersection(*({run.seed for run in self.of(arm)} for arm in self.arms)) or None

    def decision_ways(self, resource: str) -> list[Way]:
        """The ways with their accuracies over all splits and the seeds that all arms have.

        Each is paid for every version of the documents. Without controls, arms that `max_harm` excludes, and augmented
        arms that were trained on next to no augmentation.
        """
        found, price = [], self.service.cost_of_wrong if resource == "money" else None
        for name, samples in self.decision_costs(resource).items():
            arm = self.arm_of(name)
            accuracy = self.mixed_accuracy(arm, self.common_seeds)
            if accuracy is None or recorded_arm(arm).asking.is_control:
                continue
            if self.is_harmless(arm) and self.is_augmented(arm) and self.is_fast(name):
                found.append(Way(name, accuracy, samples.line, (1 - accuracy) * (price or 0.0)))
        return found

    @property
    def decided_by(self) -> tuple[str, str]:
        """The resource that a decision is by, and its unit: money under a price file, else seconds."""
        return ("seconds", "s") if self.prices is None else ("money", self.prices.currency)

    def decision_costs(self, resource: str) -> dict[str, Priced]:
        """What ways cost over every version of the documents: on each machine and hosted model of the price file."""
        return {name: priced.repeated(self.service.versions) for name, priced in self.priced(resource).items()}

    def priced(self, resource: str) -> dict[str, Priced]:
        """What ways cost over one version of the documents; of several machines and models each way says on which."""
        if resource != "money" or self.prices is None:
            return dict(self.ways(resource))
        found: dict[str, Priced] = {}
        seconds, energy = self.ways("seconds"), self.ways("energy")
        for machine in self.prices.all_machines:
            ways = on_machine(energy, seconds, machine, self.service.days)
            found |= {self._on(name, machine.name): samples for name, samples in ways.items()}
        for hosted in self.prices.hosted:
            for arm in map(recorded_arm, self.arms):
                costs = self.costs(arm.name, "money", self.batch, self.cache_lifetime)
                tokens = on_hosted(arm, costs, hosted, self.service)
                found |= {self._on(name, hosted.name): samples for name, samples in tokens.items()}
        return found

    def _on(self, way: str, name: str) -> str:
        """A way's name, with the machine or model where there are several."""
        several = self.prices is not None and len(self.prices.names) > 1
        return f"{way}{ON}{name}" if several else way

    @property
    def measured_once(self) -> list[int]:
        """The context lengths of this study's arms at which the time allowed one measurement only."""
        used = {0, self.results.sweep.context_tokens, *context_lengths(self.results.runs)}
        once = {p.context_tokens for p in self.results.sweep.points if len(p.query_s) == 1}
        return sorted(used & once)

    @cached_property
    def break_evens(self) -> dict[str, dict[tuple[str, str], BreakEven]]:
        """By resource: (trained way, way that reads a context) -> from how many queries on the first is cheaper."""
        arms = [recorded_arm(arm) for arm in self.arms]
        trained = [arm.title for arm in arms if arm.trains]
        rivals = [way for arm in arms if arm.is_rival for way in self.ways_of(arm.name)]
        found = {}
        for resource in self.resources:
            ways = self.ways(resource)
            pairs = itertools.product(trained, (rival for rival in rivals if rival in ways))
            is_repeated = resource == "FLOPs" or not self.measured_once
            found[resource] = {
                (a, b): replace(break_even_interval(ways[a], ways[b]), has_interval=is_repeated) for a, b in pairs
            }
        return found

    @property
    def in_context_arm(self) -> str | None:
        """The first arm that reads a context and trains nothing, which trained arms are compared with."""
        arms = map(recorded_arm, self.arms)
        return next((arm.name for arm in arms if not arm.trains and arm.reads_context), None)

    def against_icl(self, way: str, points: float) -> str | None:
        """A way against ICL over all splits, see Paired.word(); None where that is unknown."""
        if self.in_context_arm is None:
            return None
        gap = self.gap(self.arm_of(way), self.in_context_arm)
        return None if gap is None else gap.word(points)

    def sensitivity(self, way: str, lifetimes: Sequence[float]) -> list[tuple[int, list[float | None]]]:
        """For each measured context length, the break-even of a trained way with ICL in seconds, by cache lifetime.

        Readings and queries are the fitted ones at that length, for the study's batch.
        """
        if not (fits := self.fits()):
            return []
        reading, query = fits
        trained = self.ways("seconds")[way].line
        lengths = sorted({p.context_tokens for p in self.results.sweep.points if p.context_tokens})
        rows = []
        for c in lengths:
            lines = [Line(0.0, reading(c), query(c), max(lifetime, self.batch)) for lifetime in lifetimes]
            rows.append((c, [break_even(trained, line) for line in lines]))
        return rows

    def sensitivity_to_batch(self, way: str, lifetimes: Sequence[float]) -> list[tuple[int, list[float | None]]]:
        """For each measured batch size, the same behind the ICL arm's own context, measured."""
        rows = []
        for batch in self.batches:
            ways = self.ways("seconds", batch=batch)
            if self.in_context_arm is None or not ways:
                return []
            trained, read = ways[way].line, ways[recorded_arm(self.in_context_arm).title].line
            lines = [replace(read, cache_lifetime=max(lifetime, float(batch))) for lifetime in lifetimes]
            rows.append((batch, [break_even(trained, line) for line in lines]))
        return rows

    def fits(self) -> tuple[Fit, Fit] | None:
        """Seconds of reading, and of a query after it, against context length; None if too few."""
        batch = self._nearest(self.batch)
        points = [p for p in self.results.sweep.points if p.context_tokens and p.prefill_s]
        queries = [p for p in self.results.sweep.points if p.batch == batch and p.query_s]
        medians = [[median(p.prefill_s) for p in points], [median(p.query_s) for p in queries]]
        if len({p.context_tokens for p in points}) < 2 or min(itertools.chain(*medians)) <= 0:
            return None
        reading, query = (
            fit([p.context_tokens for p in measured], seconds, degree)
            for measured, seconds, degree in zip((points, queries), medians, (2, 1), strict=True)
        )
        return reading, query

    def wrong(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Questions that some arm got wrong, those that most arms did first; at most `limit` of how many there are."""
        texts = {(seed, q.id): q for asked in self.results.questions for seed in asked.seeds for q in asked.questions}
        rows: dict[tuple[int, str], dict[str, Answer]] = {}
        for run in self.results.runs:
            for answer in run.answers:
                rows.setdefault((run.seed, answer.question_id), {})[run.arm] = answer
        wrong = {key: row for key, row in rows.items() if not all(a.is_correct for a in row.values())}
        order = sorted(wrong, key=lambda key: -sum(not a.is_correct for a in wrong[key].values()))
        listed = []
        for key in order[:limit]:
            first, text = next(iter(wrong[key].values())), texts.get(key)
            given = {
                arm: (a.predicted, a.is_correct, [round(p, 3) for p in a.probability[:SHOWN_CHOICES]])
                for arm, a in wrong[key].items()
            }
            choices = [_shorten(choice) for choice in text.choices[:SHOWN_CHOICES]] if text else []
            listed.append(
                {
                    "seed": key[0],
                    "id": key[1],
                    "split": first.split,
                    "topic": first.topic,
                    "correct": first.correct,
                    "answers": given,
                    "prompt": _shorten(text.prompt) if text else "",
                    "choices": choices,
                }
            )
        return listed, len(wrong)

    def summary(self, points: float = 2.0) -> dict[str, Any]:
        """What the tables say, for machines: plain values, with None for never.

        `points` of accuracy may be lost against ICL.
        """
        return {
            "study": self.name,
            "accuracy": {
                arm: {split: asdict(a) for split in self.splits if (a := self.accuracy(arm, split))}
                for arm in self.arms
            },
            "accuracy_by_normalization": {
                arm: {name: self.accuracy_by(arm, name) for name in NORMALIZATIONS} for arm in self.arms
            },
            "costs": {
                resource: {name: _finite(asdict(samples.line)) for name, samples in self.ways(resource).items()}
                for resource in self.resources
            },
            "break_even": [
                {"resource": resource, "way": way, "rival": rival, "against_icl": self.against_icl(way, points)}
                | _finite(asdict(found))
                for resource in self.resources
                for (way, rival), found in self.break_evens[resource].items()
            ],
            "harm": {
                arm: {"kl": harm.kl, "points_lost": harm.points_lost}
                for arm in self.arms
                if (harm := self.harm(arm)) is not None
            },
            "concerns": self.concerns,
            "notes": self.notes,
        }

    def _nearest(self, batch: int) -> int:
        return min(self.batches, key=lambda b: abs(b - batch), default=batch)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With None for infinity, which JSON does not have."""
    return {name: None if value == math.inf else value for name, value in values.items()}


SHOWN_CHOICES, SHOWN_CHARACTERS = 8, 240  # of a question in the page's table


def _shorten(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"
