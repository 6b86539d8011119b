"""What the reports draw: one run's accuracies, costs and break-even numbers, derived from its results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

from icl_ft_fast.study.amortise import BreakEven, Fit, Line, Samples, Way, break_even, break_even_interval, decide, fit
from icl_ft_fast.study.compare import ANSWERING, Paired, Run, paired_tests
from icl_ft_fast.study.evaluate import Accuracy, Answer
from icl_ft_fast.study.prices import Prices
from icl_ft_fast.study.results import Results, read_results
from icl_ft_fast.study.statistics import cluster_bootstrap
from icl_ft_fast.study.sweep import Point

ARM_TITLES = {
    "base": "base",
    "icl": "ICL",
    "ft": "fine-tuned",
    "augmented-ft": "augmented",
    "rules-ft": "by rule",
    "distilled": "distilled",
}
RESOURCES = {"seconds": "s", "FLOPs": "FLOP", "joules": "J"}  # and money, under a price file


@dataclass(frozen=True)
class Derived:
    """A results file with what follows from it.

    Attributes:
        results: from read_results().
        name: what it is called beside others.
        prices: of the user; without them there is no money.
        reuse: queries that share a reading of the context in the arm ICL, where a cache is kept.
        batch: queries scored together; the nearest measured number is taken.
    """

    results: Results
    name: str
    prices: Prices | None = None
    reuse: float = math.inf
    batch: int = 1

    @classmethod
    def read(cls, path: str | Path, **settings: Any) -> Derived:
        """The study of a results.json, or of the folder that holds one; `settings` are the other attributes.

        Raises:
            ResultsError, OSError: see read_results().
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        return cls(read_results(path), path.parent.name or path.stem, **settings)

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

    @property
    def beside(self) -> str:
        """What to know of figures that were measured while other runs were made; empty where none were."""
        workers = {run.workers for run in self.results.runs} - {1}
        count = "several" if None in workers else max(filter(None, workers), default=1)
        told = f"Arms were timed while {count} workers ran at once, who slow each other down on one machine and share "
        told += "its joules: setups and break-even numbers may be too high. What a query costs was measured by itself."
        return told if workers else ""

    def clustered(self, arm: str, split: str) -> tuple[float, float] | None:
        """The bootstrap's interval over facts and seeds; None where answers were not kept."""
        return self._clustered.get((arm, split))

    @cached_property
    def _clustered(self) -> dict[tuple[str, str], tuple[float, float]]:
        found: dict[tuple[str, str], list[tuple[bool, str, int]]] = {}
        for run in self.results.runs:
            for a in run.answers:
                found.setdefault((run.arm, a.split), []).append((a.is_correct, a.topic, run.seed))
        return {key: cluster_bootstrap(*zip(*answers, strict=True)) for key, answers in found.items()}

    @cached_property
    def paired(self) -> list[Paired]:
        """Every two arms in every split."""
        return paired_tests(self.results.runs)

    def chance(self, split: str) -> float | None:
        """What blind guesses would have."""
        chances = [a.chance for run in self.results.runs for a in run.answers if a.split == split]
        return fmean(chances) if chances else None

    @cached_property
    def batches(self) -> list[int]:
        """Numbers of queries scored together that were measured."""
        return sorted({point.batch for point in self.results.sweep.points})

    @property
    def own_point(self) -> Point | None:
        """What was measured behind the ICL arm's own context; None without one."""
        own = self.results.sweep.context_tokens
        return self._point(own, self.batch) if own else None

    @cached_property
    def resources(self) -> dict[str, str]:
        """What costs can be told in, with the unit."""
        known = dict(RESOURCES) | ({"money": self.prices.currency} if self.prices else {})
        return {name: unit for name, unit in known.items() if self.ways(name)}

    def ways(self, resource: str, *, batch: int | None = None, reuse: float | None = None) -> dict[str, Samples]:
        """Ways of answering by name with what they cost; none where the resource was not measured.

        ICL is three ways: its context read for each query (or batch of queries scored together), kept in the cache for
        `reuse` queries, and kept in a file that is read back as often.
        """
        batch, reuse = batch or self.batch, reuse or self.reuse
        found: dict[str, Samples] = {}
        for arm in self.arms:
            point = self._point(self.results.sweep.context_tokens if arm == "icl" else 0, batch)
            if point is None or (query := self._query(point, resource)) is None:
                return {}
            if arm != "icl":
                setups = [self._setup(run, resource) for run in self.of(arm)]
                if None in setups:
                    return {}
                found[ARM_TITLES.get(arm, arm)] = Samples(tuple(s for s in setups if s is not None), (), query)
                continue
            reading = self._reading(point, resource)
            found["ICL"] = Samples((), reading, query, float(point.batch))
            if reuse > point.batch:
                found["ICL kept"] = Samples((), reading, query, reuse)
            if point.load_s and resource != "joules":
                load, save = ([self._of_seconds(s, resource) for s in x] for x in (point.load_s, point.save_s))
                setup = Samples((), reading).line.reading + Samples((), tuple(save)).line.reading
                found["ICL from file"] = Samples((setup,), tuple(load), query, max(float(batch), reuse))
        return found

    def arm_of(self, way: str) -> str:
        """The arm that a way answers as."""
        return next((arm for arm in self.arms if way == ARM_TITLES.get(arm, arm)), "icl")

    def decision_ways(self, resource: str) -> list[Way]:
        """The ways with their accuracies over all splits; without those that have none."""
        ways = self.ways(resource).items()
        return [
            Way(name, accuracy.value, samples.line)
            for name, samples in ways
            if (accuracy := self.accuracy(self.arm_of(name))) is not None
        ]

    @cached_property
    def break_evens(self) -> dict[str, dict[tuple[str, str], BreakEven]]:
        """By resource: (trained way, way of ICL) -> from how many queries on the first is cheaper."""
        trained = [ARM_TITLES.get(arm, arm) for arm in self.arms if arm not in ("base", "icl")]
        found = {}
        for resource in self.resources:
            ways = self.ways(resource)
            rivals = [name for name in ways if self.arm_of(name) == "icl"]
            found[resource] = {(a, b): break_even_interval(ways[a], ways[b]) for a in trained for b in rivals}
        return found

    def matches_icl(self, way: str, points: float) -> bool | None:
        """Whether a way's accuracy over all splits is within so many points of ICL's, or above it; None if unknown."""
        mine, theirs = self.accuracy(self.arm_of(way)), self.accuracy("icl")
        return None if mine is None or theirs is None else theirs.value - mine.value <= points / 100 + 1e-12

    def sensitivity(self, way: str, reuses: Sequence[float]) -> list[tuple[int, list[float | None]]]:
        """For each measured context length, the break-even of a trained way in seconds with ICL, by reuse.

        Readings and queries are the fitted ones at that length, for the study's batch.
        """
        if not (fits := self.fits()):
            return []
        reading, query = fits
        trained = self.ways("seconds")[way].line
        lengths = sorted({p.context_tokens for p in self.results.sweep.points if p.context_tokens})
        rows = []
        for c in lengths:
            lines = [Line(0.0, reading(c), query(c), max(reuse, self.batch)) for reuse in reuses]
            rows.append((c, [break_even(trained, line) for line in lines]))
        return rows

    def sensitivity_to_batch(self, way: str, reuses: Sequence[float]) -> list[tuple[int, list[float | None]]]:
        """For each measured number of queries scored together, the same behind the ICL arm's own context, measured."""
        rows = []
        for batch in self.batches:
            ways = self.ways("seconds", batch=batch)
            if "ICL" not in ways:
                return []
            trained, kept = ways[way].line, ways["ICL"].line
            lines = [replace(kept, reuse=max(reuse, float(batch))) for reuse in reuses]
            rows.append((batch, [break_even(trained, line) for line in lines]))
        return rows

    def fits(self) -> tuple[Fit, Fit] | None:
        """Seconds of reading, and of a query after it, against context length ; None if too few."""
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
                    "correct": first.correct,
                    "answers": given,
                    "prompt": _shorten(text.prompt) if text else "",
                    "choices": choices,
                }
            )
        return listed, len(wrong)

    def summary(self, queries: float | None = None, points: float = 2.0) -> dict[str, Any]:
        """What the tables say, for machines: plain values, with None for never.

        `queries` asks for a decision at that volume; `points` are how far below the best, or ICL's, still matches it.
        """
        chosen = "seconds" if self.prices is None else "money"
        ways = self.decision_ways(chosen) if queries else []
        decision = decide(ways, queries, points) if queries and ways else None
        return {
            "study": self.name,
            "accuracy": {
                arm: {split: asdict(a) for split in self.splits if (a := self.accuracy(arm, split))}
                for arm in self.arms
            },
            "costs": {
                resource: {name: _finite(asdict(samples.line)) for name, samples in self.ways(resource).items()}
                for resource in self.resources
            },
            "break_even": [
                {"resource": resource, "way": way, "rival": rival, "matches_icl": self.matches_icl(way, points)}
                | _finite(asdict(found))
                for resource in self.resources
                for (way, rival), found in self.break_evens[resource].items()
            ],
            "note": self.beside,
            "decision": decision
            and _finite(
                {
                    "resource": chosen,
                    "unit": self.resources[chosen],
                    "queries": decision.queries,
                    "points": points,
                    "best": decision.best.name,
                    "chosen": decision.chosen.name,
                    "cost": decision.chosen.line.cost(decision.queries),
                }
            ),
        }

    def _nearest(self, batch: int) -> int:
        return min(self.batches, key=lambda b: abs(b - batch), default=batch)

    def _point(self, context_tokens: int, batch: int) -> Point | None:
        points = [p for p in self.results.sweep.points if p.context_tokens == context_tokens]
        return min(points, key=lambda p: abs(p.batch - batch), default=None)

    def _of_seconds(self, seconds: float, resource: str, joules: float | None = None) -> float:
        """So many seconds in the resource; moving bytes to and from a file computes nothing."""
        if resource == "money" and self.prices is not None:
            return self.prices.money(seconds, joules)
        return seconds if resource == "seconds" else 0.0

    def _query(self, point: Point, resource: str) -> tuple[float, ...] | None:
        single = {"FLOPs": point.query_flops or None, "joules": point.query_joules}
        if resource in single:
            return None if (value := single[resource]) is None else (value,)
        return tuple(self._of_seconds(s, resource, point.query_joules) for s in point.query_s) or None

    def _reading(self, point: Point, resource: str) -> tuple[float, ...]:
        single = {"FLOPs": point.prefill_flops, "joules": point.prefill_joules}
        if resource in single:
            return (single[resource] or 0.0,)
        return tuple(self._of_seconds(s, resource, point.prefill_joules) for s in point.prefill_s)

    def _setup(self, run: Run, resource: str) -> float | None:
        """What a run paid before its first query; None where a phase does not tell."""
        phases = [phase for name, phase in run.counts["phases"].items() if name not in ANSWERING]
        joules = [phase.get("joules") for phase in phases]
        if resource == "FLOPs":
            return None if any("flops" not in p for p in phases) else float(sum(p["flops"] for p in phases))
        if resource == "joules":
            return None if None in joules else math.fsum(joules)
        return self._of_seconds(run.setup_s, resource, None if None in joules else math.fsum(joules))


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """With None for infinity, which JSON does not have."""
    return {name: None if value == math.inf else value for name, value in values.items()}


SHOWN_CHOICES, SHOWN_CHARACTERS = 8, 240  # of a question in the page's table


def _shorten(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} … {text[-half:]}"
