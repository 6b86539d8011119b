"""Replies timed while they are written: what a step of decoding takes by its rows, and how long replies get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from icl_ft_fast.engine.generate import RUNNING


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
        self._until, self._last = self._begun + seconds, self._begun
        self._in_step, self._steps = set[int](), list[tuple[int, float]]()  # tokens, and when the last of them came

    def __call__(self, reply: int, token: object) -> bool:
        """Whether this reply is to go on."""
        if reply in self._in_step:
            self._end_step()
        self._in_step.add(reply)
        self._last = self._clock()
        return self._last < self._until

    def width(self) -> tuple[float, float] | None:
        """(rows, seconds) of a step, by those of the most rows; None where there was none after the one that reads."""
        self._end_step()
        ends = [end for _, end in self._steps]
        taken = [(rows, end - before) for (rows, end), before in zip(self._steps[1:], ends, strict=False)]
        most = max((rows for rows, _ in taken), default=0)
        wide = [one for one in taken if one[0] > most / 2]
        return (fmean(rows for rows, _ in wide), median(took for _, took in wide)) if wide else None

    def decoding(
        self, lengths: Sequence[int], is_open: Sequence[bool], row_s: float, wider: tuple[float, float] | None = None
    ) -> Decoding:
        """What it took.

        Args:
            lengths: tokens of the replies.
            is_open: for each, whether it would have gone on.
            row_s: seconds of a row of a step, where no steps tell.
            wider: width() of more replies at once: what a row takes depends on how many there are.
        """
        own, step_s = self.width(), 0.0
        if own is not None and wider is not None and wider[0] > own[0]:
            row_s = min(max(0.0, (wider[1] - own[1]) / (wider[0] - own[0])), wider[1] / wider[0])
            step_s = wider[1] - wider[0] * row_s
        elif (found := own or wider) is not None:
            row_s = min(row_s, found[1] / found[0])
            step_s = found[1] - found[0] * row_s
        reading_s = self._steps[0][1] - self._begun if self._steps else None
        return Decoding(tuple(lengths), tuple(is_open), reading_s, step_s, row_s)

    def _end_step(self) -> None:
        if self._in_step:
            self._steps.append((len(self._in_step), self._last))
            self._in_step.clear()
