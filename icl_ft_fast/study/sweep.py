"""What a query costs, measured: context lengths x queries scored together, several times each, in turn.

One forward for each request is what a user without any cache pays: the prefill and then the query. A user who keeps the
context pays the query only. A round reads each context once, and the queries of every batch size stand behind that
reading, so neither is a difference of two times.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import load_context, save_context
from icl_ft_fast.engine.generate import Sampling, iter_generations
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import TokenRequest, loglikelihood, prefill
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model
from icl_ft_fast.runtime.progress import Activity
from icl_ft_fast.tasks.task import Question

BATCHES = (1, 8, 64)
LENGTHS = tuple(512 * 2**k for k in range(7))  # 0.5k to 32k tokens
ROUNDS = 9
DECODED = 16  # tokens of an answer, at most: each takes as long as the one before


@dataclass(frozen=True)
class Point:
    """Repeated measurements of one context length and one number of queries scored together.

    Attributes:
        context_tokens: tokens before every query.
        batch: queries scored together.
        prefill_s: seconds of reading the context, a measurement each; empty without context.
        query_s: seconds a query after that.
        prefill_flops, query_flops: from shapes.
        prefill_joules, query_joules: medians; None where energy cannot be read.
        save_s, load_s: seconds of save_context(), and of load_context() from the system's cache with the copy into a
            cache that the first run makes.
        decode_s: seconds of one more token of an answer, a query; empty where answers were not decoded.
    """

    context_tokens: int
    batch: int
    prefill_s: tuple[float, ...]
    query_s: tuple[float, ...]
    prefill_flops: float = 0.0
    query_flops: float = 0.0
    prefill_joules: float | None = None
    query_joules: float | None = None
    save_s: tuple[float, ...] = ()
    load_s: tuple[float, ...] = ()
    decode_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """Points by context length and batch.

    Attributes:
        context_tokens: of the longest context that an arm puts before all its questions; 0 if there is none.
        points: the measurements.
        measured_s: seconds that all of them took; 0 where they were not timed.
    """

    context_tokens: int = 0
    points: tuple[Point, ...] = ()
    measured_s: float = 0.0


def sweep(
    model: Model,
    questions: Sequence[Question],
    context: str = "",
    *,
    lengths: Sequence[int] = LENGTHS,
    needed: Sequence[int] = (),
    batches: Sequence[int] = BATCHES,
    rounds: int = ROUNDS,
    seconds: float = 30.0,
    decoded: int = 0,
    progress: bool = False,
) -> Sweep:
    """Measure prefills and queries of the task's own questions.

    Args:
        model: from load().
        questions: asked in turn.
        context: the text before each question in the arm whose text is the longest; its own length is measured too, and
            other lengths are cut from its repetitions.
        lengths: of contexts, in tokens, beside 0 and the context's own; those that leave no room for a question are
            left out.
        needed: lengths of other arms' contexts, which are always measured.
        batches: queries scored together; more than there are questions are left out, and so are those that would take
            a third of the time.
        rounds: measurements of each point, after one that warms up.
        seconds: nothing is begun that, by what it took before, would end later; but 0, the context's own length and
            those needed are measured once in any case. What could not be repeated has one measurement, the warm-up.
        decoded: tokens of an answer that each query decodes behind its prompt, at most DECODED, to be timed; 0 decodes
            nothing.
        progress: show a bar of measurements.

    Returns:
        The points, by length and batch.

    Raises:
        ScoreError: as loglikelihood() does.
    """
    begun = time.perf_counter()
    own = encoding.encode(model.tokenizer, [context.rstrip()])[0] if context else []
    start = encoding.prefix_token_id(model.tokenizer)
    words = own or [start, *(t for q in questions for t in encoding.encode(model.tokenizer, [q.prompt], bos=False)[0])]
    pairs = [(question.prompt, choice) for question in questions for choice in question.choices]
    encoded = iter(encoding.encode_pairs(model.tokenizer, pairs))
    asked = [[next(encoded) for _ in question.choices] for question in questions]
    longest = max(len(before) + len(after) for choices in asked for before, after in choices)
    always = {0, len(own), *needed}
    grid = [*sorted(always), *(n for n in sorted({*lengths} - always) if n <= model.max_positions - longest - decoded)]

    def left_s() -> float:
        return seconds - (time.perf_counter() - begun)

    with tempfile.TemporaryDirectory() as folder, Activity("measuring", unit="run", shown=progress) as bar:
        measuring = _Measuring(model, asked, words, longest, Path(folder), bar, decoded=min(decoded, DECODED))
        one_s = measuring.seconds_of_a_query()
        sizes = sorted({min(batch, len(asked)) for batch in batches})
        measuring.sizes = [n for n in sizes if n == sizes[0] or n * one_s * len(always) < left_s() / 3]
        places: list[_Place] = []
        for length in grid:  # the warm-up also finds how far the time reaches
            if length not in always and (seconds - left_s()) * rounds > seconds:
                break
            places.append(measuring.place(length))
        bar.restart(len(places) * len(measuring.sizes) * rounds)
        for i in range(1, rounds + 1):
            fitting = [place for place in places if place.took_s < left_s()]
            for place in fitting:
                if place.took_s < left_s():
                    measuring.measure(place, i)
            if not fitting:
                break
    points = [point for place in places for point in place.points()]
    points.sort(key=lambda point: (point.context_tokens, point.batch))
    return Sweep(len(own), tuple(points), time.perf_counter() - begun)


@dataclass
class _Place:
    """A context length and what was measured there.

    Attributes:
        context_tokens: the length.
        readings, files: a ledger for each round.
        queries: by batch size, a ledger for each round.
        save_s: seconds of writing the file, once.
        took_s: seconds of the last round.
        decoded_s: by batch size, seconds of a token and query for each round that decoded some.
    """

    context_tokens: int
    readings: list[Ledger] = field(default_factory=list)
    queries: dict[int, list[Ledger]] = field(default_factory=dict)
    files: list[Ledger] = field(default_factory=list)
    save_s: tuple[float, ...] = ()
    took_s: float = 0.0
    decoded_s: dict[int, list[float]] = field(default_factory=dict)

    def points(self) -> list[Point]:
        """The measurements without those that warmed up, unless there are no others."""
        length, readings = self.context_tokens, [ledger.phases["prefill"] for ledger in _repeated(self.readings)]
        found = []
        for batch, ledgers in self.queries.items():
            queries = [ledger.phases["query"] for ledger in _repeated(ledgers)]
            joules = _median([p.joules for p in queries if p.joules is not None])
            point = Point(
                context_tokens=length,
                batch=batch,
                prefill_s=tuple(phase.wall_s for phase in readings),
                query_s=tuple(phase.wall_s / batch for phase in queries),
                prefill_flops=_median([phase.flops for phase in readings]) or 0.0,
                query_flops=(_median([phase.flops for phase in queries]) or 0.0) / batch,
                prefill_joules=_median([p.joules for p in readings if p.joules is not None]),
                query_joules=None if joules is None else joules / batch,
                save_s=self.save_s,
                load_s=tuple(file.seconds["context"] for file in _repeated(self.files)),
                decode_s=tuple(self.decoded_s.get(batch, ())),
            )
            found.append(point)
        return found


@dataclass
class _Measuring:
    """What every measurement needs: model, questions as token ids, the words of contexts, and a folder for files."""

    model: Model
    asked: Sequence[Sequence[TokenRequest]]
    words: list[int]
    longest: int
    folder: Path
    bar: Activity
    sizes: Sequence[int] = ()
    decoded: int = 0

    def __post_init__(self) -> None:
        self._meter, self._fingerprint = Meter(self.model.device), self.model.fingerprint()

    def seconds_of_a_query(self) -> float:
        """One query without a context, after one that warms up."""
        for _ in range(2):
            begun = time.perf_counter()
            loglikelihood(self.model, _behind([], self.asked[:1]))
        return time.perf_counter() - begun

    def place(self, length: int) -> _Place:
        """A place with its first measurement."""
        self.measure(place := _Place(length), 0)
        return place

    def measure(self, place: _Place, i: int) -> None:
        """Read the context once, ask behind it in batches of every size, and read its file, written the first time."""
        model, length, begun = self.model, place.context_tokens, time.perf_counter()
        tokens, context = (self.words * (length // len(self.words) + 1))[:length], None
        if length:
            place.readings.append(ledger := Ledger(meter=self._meter))
            context = prefill(model, tokens, ledger=ledger)
        for batch in self.sizes:
            picked = [self.asked[(i * batch + b) % len(self.asked)] for b in range(batch)]
            place.queries.setdefault(batch, []).append(ledger := Ledger(meter=self._meter))
            loglikelihood(model, _behind(tokens, picked), start=context, ledger=ledger)
            if self.decoded and (decode_s := self._decode_s(tokens, picked)) is not None:
                place.decoded_s.setdefault(batch, []).append(decode_s)
            self.bar.update()
        if context is not None:
            path = self.folder / f"{length}.safetensors"
            if not place.save_s:
                saving = time.perf_counter()
                save_context(path, model, context, fingerprint=self._fingerprint)
                place.save_s = (time.perf_counter() - saving,)
            place.files.append(ledger := Ledger(meter=self._meter))
            with ledger.phase("context"):
                loaded = load_context(path, model, fingerprint=self._fingerprint)
                loaded.open(model.new_cache(length + self.longest))
        place.took_s = time.perf_counter() - begun

    def _decode_s(self, context: list[int], picked: Sequence[Sequence[TokenRequest]]) -> float | None:
        """Seconds of one more token of one answer, all decoded together; None where all end with their first token."""
        told: list[tuple[int, float]] = []
        prompts = [[*context, *choices[0][0]] or self.words[:1] for choices in picked]
        sampling = Sampling(max_new_tokens=self.decoded)
        for _ in iter_generations(
            self.model, prompts, sampling, on_token=lambda p, *_: told.append((p, time.perf_counter()))
        ):
            pass
        first: dict[int, float] = {}
        for p, at in told:
            first.setdefault(p, at)
        more = len(told) - len(first)
        return (told[-1][1] - max(first.values())) / more if more > 0 else None


def _repeated(ledgers: list[Ledger]) -> list[Ledger]:
    """All but the first, which warmed up; that one where there is no other."""
    return ledgers[1:] or ledgers


def _behind(context: list[int], questions: Sequence[Sequence[TokenRequest]]) -> list[TokenRequest]:
    """The questions' requests behind a context."""
    return [([*context, *before], after) for choices in questions for before, after in choices]


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else None
