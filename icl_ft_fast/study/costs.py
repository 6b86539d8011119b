"""What an arm costs in a resource: its setups, and the queries that the sweep measured. Knows no arm by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from icl_ft_fast.study.prices import Prices
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.sweep import Point, Sweep

ANSWERING = (
    "tokenise",
    "retrieve",
    "context",
    "prefill",
    "query",
)  # phases of asking; all others are paid once, before
WAITING = ("index", "retrieve", "context")  # phases in which a server or a disk may be waited for
BESIDE = 1.25  # times its processor seconds, from which on work on a CPU is said to have waited for other processes
MOMENT = 0.5  # seconds: less says nothing of a study


def waited(seconds: float, processor_s: float) -> bool:
    """Whether work on a CPU took longer than it had a core, by more than a quarter and more than a moment."""
    return seconds > max(BESIDE * processor_s, processor_s + MOMENT)


def computed_s(runs: Sequence[Run]) -> tuple[float, float]:
    """Seconds of the phases in which runs computed, and of all their threads' processor time in these.

    Of several threads, the second tells only when they waited for most of the time.
    """
    phases = [phase for run in runs for name, phase in run.counts["phases"].items() if name not in WAITING]
    told = [phase for phase in phases if phase.get("device_s") is not None]
    return math.fsum(phase["wall_s"] for phase in told), math.fsum(phase["device_s"] for phase in told)


def nearest_point(sweep: Sweep, context_tokens: int, batch: int) -> Point | None:
    """The measurement behind so many tokens whose batch size is nearest; None if there is none."""
    points = [point for point in sweep.points if point.context_tokens == context_tokens]
    return min(points, key=lambda point: abs(point.batch - batch), default=None)


@dataclass(frozen=True)
class ArmCosts:
    """What an arm costs in one resource, as far as it was measured.

    Attributes:
        resource: "seconds", "FLOPs", "joules", "money" or "energy", which is the money that electricity takes.
        runs: of the arm, one a seed.
        sweep: what queries cost.
        batch: queries scored together; the nearest measured number is taken.
        cache_lifetime: queries that share a reading of a context that stays in the cache.
        prices: the user's; needed for money.
        answer_tokens: decoded for each query; their seconds count, not their FLOPs and joules, which are not measured.
    """

    resource: str
    runs: tuple[Run, ...]
    sweep: Sweep
    batch: int = 1
    cache_lifetime: float = math.inf
    prices: Prices | None = None
    answer_tokens: int = 0

    @property
    def setup(self) -> tuple[float, ...] | None:
        """What each run paid before its first query, empty where none paid; None where a phase does not tell."""
        found = [self._setup(run) for run in self.runs]
        if None in found:
            return None
        return tuple(cost for cost in found if cost is not None) if any(found) else ()

    def point(self, context_tokens: int) -> Point | None:
        """The measurement of queries behind so many tokens."""
        return nearest_point(self.sweep, context_tokens, self.batch)

    def note(self, name: str) -> int:
        """A count that the first run noted, the one whose task was measured; 0 where it did not."""
        return int(self.runs[0].notes.get(name, 0)) if self.runs else 0

    def query_phase_s(self, phase: str) -> float:
        """Mean seconds a query of a phase of asking."""
        seconds = [run.counts["phases"].get(phase, {}).get("wall_s", 0.0) for run in self.runs]
        answers = sum(len(run.answers) for run in self.runs)
        return math.fsum(seconds) / max(1, answers)

    def query(self, point: Point) -> tuple[float, ...] | None:
        """What a query costs after its context was read, a measurement each; None where it was not measured."""
        single = {"FLOPs": point.query_flops or None, "joules": point.query_joules}
        if self.resource in single:
            return None if (value := single[self.resource]) is None else (value,)
        if self.answer_tokens and not point.decode_s:
            return None
        decode_s = self.answer_tokens * median(point.decode_s) if self.answer_tokens else 0.0
        return self.of_seconds([s + decode_s for s in point.query_s], point.query_joules) or None

    def reading(self, point: Point) -> tuple[float, ...]:
        """What reading the context costs, a measurement each."""
        single = {"FLOPs": point.prefill_flops, "joules": point.prefill_joules}
        if self.resource in single:
            return (single[self.resource] or 0.0,)
        return self.of_seconds(point.prefill_s, point.prefill_joules)

    def of_seconds(self, seconds: Sequence[float], joules: float | None = None) -> tuple[float, ...]:
        """Seconds in the resource. Moving bytes to and from a file computes nothing, so it has no FLOPs or joules."""
        if self.resource in ("money", "energy") and self.prices is not None:
            price = self.prices.money if self.resource == "money" else self.prices.electricity
            return tuple(price(s, joules) for s in seconds)
        return tuple(s if self.resource == "seconds" else 0.0 for s in seconds)

    def _setup(self, run: Run) -> float | None:
        phases: list[Mapping[str, Any]] = [p for name, p in run.counts["phases"].items() if name not in ANSWERING]
        joules = [phase.get("joules") for phase in phases]
        if self.resource == "FLOPs":
            return None if any("flops" not in phase for phase in phases) else float(sum(p["flops"] for p in phases))
        read = None if None in joules else math.fsum(value for value in joules if value is not None)
        return read if self.resource == "joules" else self.of_seconds([run.setup_s], read)[0]
