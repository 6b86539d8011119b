"""The ledger: what a run has computed, phase by phase: counts, FLOPs, seconds, bytes and joules."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from icl_ft_fast.engine.flops import Work
from icl_ft_fast.engine.meters import Meter, Reading


@dataclass
class Counts:
    """Tokens, by what was done with them.

    Attributes:
        request_tokens: tokens of all requests as given, what a scorer without sharing would forward.
        forwarded_tokens: tokens that went through the network: distinct prefixes with a continuation, generated ones.
        head_tokens: tokens whose hidden state went through the output head.
        cached_tokens: tokens read from a context instead of being forwarded.
        scored_tokens: distinct (prefix, token) pairs whose log-probability was taken.
        decoded_tokens: tokens generated.
        trained_tokens: tokens forwarded and differentiated while training.
    """

    request_tokens: int = 0
    forwarded_tokens: int = 0
    cached_tokens: int = 0
    head_tokens: int = 0
    scored_tokens: int = 0
    decoded_tokens: int = 0
    trained_tokens: int = 0


COUNTS = tuple(f.name for f in fields(Counts))
# How each figure of a phase comes about; one that is None could not be had on this machine.
HOW = dict.fromkeys((*COUNTS, "wall_s", "device_s", "joules", "kv_bytes"), "measured") | dict.fromkeys(
    ("flops", "moved_bytes", "activation_bytes"), "estimated"
)


@dataclass
class Phase(Counts):
    """What was done in a phase; what a phase within it did is not counted again.

    Attributes:
        flops: executed in matrix products and attention, from shapes (see flops.Work).
        moved_bytes: the least that memory had to move: weights and visible keys and values, once a forward.
        wall_s: seconds that passed.
        device_s: seconds of the device: of its stream on a GPU, of all processors together on a CPU.
        joules: of the device, where it can be read.
        kv_bytes: allocated for keys and values, all caches of the phase together.
        activation_bytes: the most that memory rose, less keys and values.
    """

    flops: int = 0
    moved_bytes: int = 0
    kv_bytes: int = 0
    wall_s: float = 0.0
    device_s: float | None = None
    joules: float | None = None
    activation_bytes: int | None = None

    def how(self) -> dict[str, str]:
        """For each figure whether it is "measured", "estimated" or "unavailable"."""
        return {name: "unavailable" if getattr(self, name) is None else how for name, how in HOW.items()}


@dataclass
class Ledger(Counts):
    """Counts that the request paths add to and callers read; all start at zero.

    Attributes:
        flops, moved_bytes, kv_bytes: as in Phase.
        served_by: what served attention, see ops.served_by(); where several did, their names, joined by " and ".
        phases: the same by phase, with seconds; what happens outside every phase is in the totals only.
        meter: reads the device's time, energy and memory; without one a phase has wall seconds only.
    """

    flops: int = field(default=0, compare=False)
    moved_bytes: int = field(default=0, compare=False)
    kv_bytes: int = field(default=0, compare=False)
    served_by: str = field(default="", compare=False)
    phases: dict[str, Phase] = field(default_factory=dict, compare=False)
    meter: Meter | None = field(default=None, compare=False)
    _open: str | None = field(default=None, repr=False, compare=False)
    _since: tuple[dict[str, int], Reading] | None = field(default=None, repr=False, compare=False)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time by phase."""
        return {name: phase.wall_s for name, phase in self.phases.items()}

    @contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        """Book what the block does under `name`, or under no phase; a phase inside another interrupts it."""
        outer = self._open
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def ran(self, work: Work, depth_T: Tensor, cached_rows: int, head_tokens: int, *, passes: int = 1) -> None:
        """Add the FLOPs and bytes of one forward; 3 passes are a forward and a backward.

        Args:
            work: of the network.
            depth_T: depths of the forwarded rows, int32 or int64 [T].
            cached_rows: rows of keys and values that were visible to some of them.
            head_tokens: tokens whose hidden state went through the output head.
            passes: matrix products of this forward's size.
        """
        self.flops += passes * work.flops(depth_T, head_tokens)
        self.moved_bytes += passes * (work.weight_bytes + (cached_rows + len(depth_T)) * work.kv_row_bytes)

    def note_served_by(self, names: str) -> None:
        """Add what served attention, once each."""
        known = [name for name in (*self.served_by.split(" and "), *names.split(" and ")) if name]
        self.served_by = " and ".join(dict.fromkeys(known))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: totals, and each phase with how its figures came about."""
        totals = {name: getattr(self, name) for name in (*COUNTS, "flops", "moved_bytes", "kv_bytes")}
        phases = {name: asdict(phase) | {"how": phase.how()} for name, phase in self.phases.items()}
        return totals | {"served_by": self.served_by, "phases": phases}

    def include(self, other: Mapping[str, Any]) -> None:
        """Add the as_dict() of another ledger, of another process perhaps; outside of every phase."""
        self.note_served_by(other.get("served_by", ""))  # a checkpoint may be older than this
        for name in (*COUNTS, "flops", "moved_bytes", "kv_bytes"):
            setattr(self, name, getattr(self, name) + other[name])
        for name, its in other["phases"].items():
            phase = self.phases.setdefault(name, Phase())
            for f in fields(Phase):
                mine, theirs = getattr(phase, f.name), its[f.name]
                both = max(mine or 0, theirs or 0) if f.name == "activation_bytes" else (mine or 0) + (theirs or 0)
                setattr(phase, f.name, both if mine is not None or theirs is not None else None)

    def _switch(self, name: str | None) -> None:
        """Close the open phase's account and open another's."""
        if self._open is not None and self._since is not None:
            before, start = self._since
            phase = self.phases.setdefault(self._open, Phase())
            for count, value in before.items():
                setattr(phase, count, getattr(phase, count) + getattr(self, count) - value)
            end = self._read()
            phase.wall_s += end.wall_s - start.wall_s
            phase.device_s = _sum(phase.device_s, end.device_s, start.device_s)
            phase.joules = _sum(phase.joules, end.joules, start.joules)
            if end.peak_bytes is not None and start.bytes is not None:
                rise = max(0, end.peak_bytes - start.bytes - (self.kv_bytes - before["kv_bytes"]))
                phase.activation_bytes = max(rise, phase.activation_bytes or 0)
        self._open = name
        if name is not None:
            counts = {f.name: getattr(self, f.name) for f in fields(Phase) if f.type == "int"}
            self._since = counts, self._read()

    def _read(self) -> Reading:
        return Reading(time.perf_counter()) if self.meter is None else self.meter.read()


def _sum(total: float | None, end: float | None, start: float | None) -> float | None:
    return total if end is None or start is None else (total or 0.0) + end - start
