"""Replies timed while they are written: what a step of decoding takes by its rows, and how long replies get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from icl_ft_fast.engine.generate import RUNNING

STAYING = 4  # from half of the time on, one reply of this many is written to its end: narrow steps, and long replies


@dataclass(frozen=True)
class Decoding:
    """What writing some replies took.

    Attributes:
        lengths: tokens of each.
        is_open: for each, whether it would have gone on.
        reading_s: seconds until each had its first token; None where none was written.
        step_s: seconds of a step, whatever it writes.
        token_s: seconds of each token beside that.
    """

    lengths: tuple[int, ...]
    is_open: tuple[bool, ...]
    reading_s: float | None
    step_s: float
    token_s: float

    def reply(self, limit: int) -> tuple[float, float]:
        """(mean, longest) tokens of replies of at most `limit`.

        What was cut counts as long as it was seen (Kaplan and Meier 1958); beyond what any was seen, replies end as
        often at every token as they did before.
        """
        empty = sum(length == 0 and not o for length, o in zip(self.lengths, self.is_open, strict=True))
        mean, going = 0.0, 1 - empty / max(1, len(self.lengths))  # the share of replies that are longer
        longest = min(max(self.lengths, default=0), limit)
        for n in range(1, longest + 1):
            mean += going
            ended = sum(length == n and not o for length, o in zip(self.lengths, self.is_open, strict=True))
            going *= 1 - ended / sum(length >= n for length in self.lengths)
        if going <= 0 or longest == limit:
            return mean, float(longest)
        rate = sum(not o for o in self.is_open) / max(1, sum(self.lengths))
        kept = (1 - rate) ** (limit - longest)
        return mean + going * ((1 - kept) / rate if rate else limit - longest), float(limit)

    def seconds(self, num_replies: float, limit: int) -> float:
        """Seconds of writing so many replies, of at most `limit` tokens, once what stands before them was read."""
        mean, longest = self.reply(limit)
        steps = max(longest, num_replies * mean / RUNNING)  # whoever ends is replaced at once
        return steps * self.step_s + num_replies * mean * self.token_s


class DecodingClock:
    """What generation calls with each token: notes when each step ended, and ends the replies once the time is over.

    Args:
        clock: seconds.
        seconds: that reading and writing may take.
    """

    def __init__(self, clock: Callable[[], float], seconds: float) -> None:
        self._clock, self._begun = clock, clock()
        self._until, self._half = self._begun + seconds, float("inf")
        self._last, self._in_step = self._begun, set[int]()
        self._steps = list[tuple[int, float]]()  # tokens, and when the last of them was there

    def __call__(self, reply: int, token: object) -> bool:
        """Whether this reply is to go on."""
        if reply in self._in_step:
            self._end_step()
            if len(self._steps) == 1:
                self._half = (self._last + self._until) / 2
        self._in_step.add(reply)
        self._last = self._clock()
        return self._last < self._until and (self._last < self._half or reply % STAYING == 0)

    def decoding(self, lengths: Sequence[int], is_open: Sequence[bool], row_s: float) -> Decoding:
        """What it took; `row_s` are seconds of a row of a step, for what the steps do not tell."""
        if self._in_step:
            self._end_step()
        ends = [end for _, end in self._steps]
        taken = [
            (rows, end - before) for (rows, end), before in zip(self._steps[1:], ends, strict=False)
        ]  # the first step reads
        step_s, token_s = _fitted(taken, row_s)
        return Decoding(tuple(lengths), tuple(is_open), ends[0] - self._begun if ends else None, step_s, token_s)

    def _end_step(self) -> None:
        self._steps.append((len(self._in_step), self._last))
        self._in_step.clear()


def _fitted(steps: Sequence[tuple[int, float]], row_s: float) -> tuple[float, float]:
    """(seconds of a step, seconds of each of its rows), by the widest steps and the narrowest."""
    if not steps:
        return 0.0, row_s
    most = max(rows for rows, _ in steps)
    wide, narrow = ([s for s in steps if (s[0] > most / 2) is is_wide] for is_wide in (True, False))
    (rows, wide_s) = fmean(r for r, _ in wide), median(s for _, s in wide)
    if narrow:
        few, narrow_s = fmean(r for r, _ in narrow), median(s for _, s in narrow)
        row_s = max(0.0, (wide_s - narrow_s) / (rows - few))
    row_s = min(row_s, wide_s / rows)
    return wide_s - row_s * rows, row_s
