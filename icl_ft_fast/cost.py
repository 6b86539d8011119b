"""The ledger: what a run has computed, counted from shapes, and the seconds each phase took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass
class Ledger:
    """Counts that the request paths add to and callers read; all start at zero.

    Attributes:
        request_tokens: tokens of all requests as given, what a scorer without sharing would forward.
        forwarded_rows: rows that went through the network (trie nodes with a child, generated tokens).
        reused_rows: rows taken from a kept context instead.
        head_rows: rows that went through the output head.
        scored_tokens: distinct (prefix, token) pairs whose log-probability was taken.
        decoded_tokens: tokens generated.
        trained_tokens: rows forwarded and differentiated while training.
        seconds: wall time by phase.
    """

    request_tokens: int = 0
    forwarded_rows: int = 0
    reused_rows: int = 0
    head_rows: int = 0
    scored_tokens: int = 0
    decoded_tokens: int = 0
    trained_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def as_dict(self) -> dict[str, int | dict[str, float]]:
        """Plain values for JSON."""
        return asdict(self)
