"""What ways of answering cost on the machines and hosted models of a price file, for a time and a number of queries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from icl_ft_fast.study.amortise import Costs, Line, Samples
from icl_ft_fast.study.arm import CONTEXT_TOKENS, Arm
from icl_ft_fast.study.costs import ArmCosts
from icl_ft_fast.study.prices import Hosted, Machine, Prices
from icl_ft_fast.study.service import Service

DAY_S = 86_400.0


class Priced(Protocol):
    """What a way costs as a decision asks for it: Samples, or a bill of them."""

    @property
    def line(self) -> Costs:
        """The cost by all measurements."""
        ...

    def repeated(self, times: float) -> Priced:
        """The cost over so many versions of the documents."""
        ...

    def scaled(self, setup: float = 1.0, reading: float = 1.0, query: float = 1.0) -> Priced:
        """The costs multiplied by so much each."""
        ...

    def resampled_costs(self, n: float, draws: int, seed: int) -> NDArray[np.float64]:
        """[draws] costs of n queries, of measurements drawn with replacement."""
        ...


@dataclass(frozen=True)
class Bill:
    """A machine's bill for n queries: every setup, the serving, and electricity.

    Attributes:
        seconds: busy, by what they are for: "setup", "reading", "query"; numbers, or an array of draws each.
        energy: the same in money.
        cache_lifetime: whole queries that share a reading.
        machine: how it is billed.
        days: how long queries come.
        versions: of the documents, each of which has a setup.
    """

    seconds: Mapping[str, Any]
    energy: Mapping[str, Any]
    cache_lifetime: float
    machine: Machine
    days: float
    versions: float = 1.0

    def cost(self, n: float) -> float:
        """The cost of n queries; infinity where more machines are needed than can be had."""
        return float(self.costs(n))

    def costs(self, n: float) -> Any:
        """The same for every draw."""
        machine = self.machine
        setup, serving = self.seconds["setup"], self._of(self.seconds, n)
        least = 60 * machine.minimum_minutes
        billed = np.where(setup > 0, np.maximum(setup, self.versions * least), 0.0)
        needed = self.machines(n)
        held = needed * self.days * DAY_S
        billed = billed + (held if machine.held else np.maximum(serving / machine.utilisation, least))
        total = billed / 3600 * machine.per_hour + self.energy["setup"] + self._of(self.energy, n)
        return np.where(needed > (machine.count or math.inf), math.inf, total)

    def machines(self, n: float) -> Any:
        """How many machines serve n queries in the time that there is, at their utilisation."""
        return np.maximum(1.0, np.ceil(self._of(self.seconds, n) / (self.machine.utilisation * self.days * DAY_S)))

    def _of(self, what: Mapping[str, Any], n: float) -> Any:
        """Readings and queries, without the setup."""
        lifetime = self.cache_lifetime if math.isinf(self.cache_lifetime) else max(1.0, math.floor(self.cache_lifetime))
        return what["reading"] * max(1, math.ceil(n / lifetime)) + what["query"] * n


@dataclass(frozen=True)
class BilledSamples:
    """Measured seconds and the money of their energy, on a machine.

    Attributes:
        seconds, energy: alike but for the unit.
        machine, days, versions: see Bill.
    """

    seconds: Samples
    energy: Samples
    machine: Machine
    days: float
    versions: float = 1.0

    @property
    def line(self) -> Bill:
        """The bill by all measurements."""
        return self._bill(_parts(self.seconds.line), _parts(self.energy.line))

    def repeated(self, times: float) -> BilledSamples:
        """Over so many versions of the documents."""
        return replace(self, seconds=self.seconds.repeated(times), energy=self.energy.repeated(times), versions=times)

    def scaled(self, setup: float = 1.0, reading: float = 1.0, query: float = 1.0) -> BilledSamples:
        """Seconds and energy multiplied by so much each."""
        seconds, energy = (samples.scaled(setup, reading, query) for samples in (self.seconds, self.energy))
        return replace(self, seconds=seconds, energy=energy)

    def resampled_costs(self, n: float, draws: int, seed: int) -> NDArray[np.float64]:
        """[draws] costs of n queries."""
        bill = self._bill(self.seconds.drawn(draws, seed), self.energy.drawn(draws, seed))
        found: NDArray[np.float64] = np.broadcast_to(bill.costs(n), (draws,))
        return found

    def _bill(self, seconds: Mapping[str, Any], energy: Mapping[str, Any]) -> Bill:
        return Bill(seconds, energy, self.seconds.cache_lifetime, self.machine, self.days, self.versions)


def _parts(line: Line) -> dict[str, float]:
    return {"setup": line.setup, "reading": line.reading, "query": line.query}


def on_machine(
    ways: Mapping[str, Samples], seconds: Mapping[str, Samples], machine: Machine, days: float
) -> dict[str, Priced]:
    """Ways on a machine.

    Args:
        ways: what their energy costs.
        seconds: what they take.
        machine: what bills them.
        days: how long queries come.
    """
    return {name: BilledSamples(busy, ways[name], machine, days) for name, busy in seconds.items()}


def on_hosted(arm: Arm, costs: ArmCosts, hosted: Hosted, service: Service) -> dict[str, Samples]:
    """Ways of an arm on a hosted model, by the tokens that the study counted; none where it cannot be had there.

    A query's input is one request: the context, the prompt and one choice; its output is `service.answer_tokens`.
    """
    answers = [answer for run in costs.runs for answer in run.answers]
    training = arm.training
    trains = training is not None
    cannot_train = training is not None and (hosted.training is None or training.has_teacher)
    if not answers or arm.asking.has_slots or cannot_train:
        return {}
    choices = fmean(len(answer.probability) for answer in answers)
    request = fmean(run.query_request_tokens for run in costs.runs) / choices
    off = (1 - hosted.batch_discount) / 1e6
    tuned_input = hosted.input if hosted.tuned_input is None or not trains else hosted.tuned_input
    tuned_output = hosted.output if hosted.tuned_output is None or not trains else hosted.tuned_output
    output = service.answer_tokens * tuned_output * off
    setup = tuple(_setup(run.counts["phases"], hosted) for run in costs.runs) if trains else ()
    plain = {arm.title: Samples(setup, (), (request * tuned_input * off + output,), 1.0)}
    if not arm.reads_context or hosted.cached_input is None or costs.cache_lifetime <= 1:
        return plain
    context = min(float(costs.note(CONTEXT_TOKENS) or costs.sweep.context_tokens), request)
    write = context * (hosted.input if hosted.cache_write is None else hosted.cache_write) / 1e6
    kept = context / 1e6 * hosted.cache_storage_per_hour * 24 * service.days / service.versions
    query = ((request - context) * tuned_input + context * hosted.cached_input) * off + output
    cached = Samples(tuple(own + kept for own in setup or (0.0,)), (write,), (query,), costs.cache_lifetime)
    return plain | {f"{arm.title} cached": cached}


def _setup(phases: Mapping[str, Mapping[str, float]], hosted: Hosted) -> float:
    """Training on as many tokens as the study trained on, and the augmentations' input and output."""
    trained = sum(phase.get("trained_tokens", 0) for phase in phases.values())
    written = phases.get("generate", {})
    augmented = written.get("request_tokens", 0) * hosted.input + written.get("decoded_tokens", 0) * hosted.output
    return (trained * (hosted.training or 0.0) + augmented) / 1e6


def uncounted_electricity(prices: Prices, costs: ArmCosts) -> bool:
    """Whether electricity has a price but neither joules nor watts to be counted by."""
    read = any(point.query_joules is not None for point in costs.sweep.points)
    return bool(prices.electricity_per_kwh and prices.all_machines and prices.watts is None and not read)
