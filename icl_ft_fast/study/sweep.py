"""What a query costs, measured: context lengths x queries scored together, several times each, in turn.

One forward for each request is what a user without any cache pays: the prefill and then the query. A user who keeps the
context pays the query only. Both are read off the same forwards, so neither is a difference of two times.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import load_context, save_context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import TokenRequest, loglikelihood, prefill
from icl_ft_fast.engine.meters import Meter
from icl_ft_fast.engine.model import Model
from icl_ft_fast.tasks.task import Question

BATCHES = (1, 8, 64)
LENGTHS = tuple(512 * 2**k for k in range(7))  # 0.5k to 32k tokens
ROUNDS = 9


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


@dataclass(frozen=True)
class Sweep:
    """Points by context length and batch, and which length is that of the ICL arm's own context (0 if it has none)."""

    context_tokens: int = 0
    points: tuple[Point, ...] = ()


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
    progress: bool = False,
) -> Sweep:
    """Measure prefills and queries of the task's own questions.

    Args:
        model: from load().
        questions: asked in turn.
        context: the text before each question in the ICL arm; its own length is measured too, and other lengths are
            cut from its repetitions.
        lengths: of contexts, in tokens, beside 0 and the context's own; those that leave no room for a question are
            left out.
        needed: lengths of other arms' contexts, which are always measured.
        batches: queries scored together; more than there are questions are left out.
        rounds: measurements of each point, after one that warms up.
        seconds: longer contexts that would go beyond it are left out, and no round
            after the third is begun beyond it.
        progress: show a bar of measurements.

    Returns:
        The points, by length and batch.

    Raises:
        ScoreError: as loglikelihood() does.
    """
    own = encoding.encode(model.tokenizer, [context.rstrip()])[0] if context else []
    start = encoding.prefix_token_id(model.tokenizer)
    words = own or [start, *(t for q in questions for t in encoding.encode(model.tokenizer, [q.prompt], bos=False)[0])]
    pairs = [(question.prompt, choice) for question in questions for choice in question.choices]
    encoded = iter(encoding.encode_pairs(model.tokenizer, pairs))
    asked = [[next(encoded) for _ in question.choices] for question in questions]
    longest = max(len(before) + len(after) for choices in asked for before, after in choices)
    room = model.max_positions - longest
    always = {0, len(own), *needed}
    grid = [*sorted(always), *(n for n in sorted({*lengths} - always) if n <= room)]
    sizes = sorted({min(batch, len(asked)) for batch in batches})
    meter, fingerprint, begun = Meter(model.device), model.fingerprint(), time.perf_counter()
    measured: dict[tuple[int, int], list[Ledger]] = {}
    files: dict[int, list[Ledger]] = {}

    def elapsed() -> float:
        return time.perf_counter() - begun

    def measure(length: int, i: int) -> None:
        tokens = (words * (length // len(words) + 1))[:length]
        for batch in sizes:
            ledger, picked = Ledger(meter=meter), [asked[(i * batch + b) % len(asked)] for b in range(batch)]
            loglikelihood(model, _behind(tokens, picked), shared_tokens=length, ledger=ledger)
            measured.setdefault((length, batch), []).append(ledger)
            bar.update()
        files.setdefault(length, []).append(ledger := Ledger(meter=meter))
        path = Path(folder) / f"{length}.safetensors"
        if length and not path.exists():
            save_context(path, model, prefill(model, tokens), fingerprint=fingerprint)
        if length:
            with ledger.phase("context"):
                loaded = load_context(path, model, fingerprint=fingerprint)
                loaded.open(model.new_cache(length + longest))
            with ledger.phase("save"):
                save_context(path, model, loaded, fingerprint=fingerprint)

    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(desc="measuring", unit="run", disable=not progress) as bar,
    ):
        for length in grid:  # the warm-up also finds how far the time reaches
            if length not in always and elapsed() * rounds > seconds:
                break
            measure(length, 0)
        bar.reset(total=len(measured) * (rounds + 1))
        bar.update(len(measured))
        for i in range(1, rounds + 1):
            if i > 3 and elapsed() > seconds:
                break
            for length in files:
                measure(length, i)
    points = [_point(*key, ledgers[1:], files[key[0]][1:]) for key, ledgers in measured.items()]
    return Sweep(len(own), tuple(sorted(points, key=lambda p: (p.context_tokens, p.batch))))


def _behind(context: list[int], questions: Sequence[Sequence[TokenRequest]]) -> list[TokenRequest]:
    """The questions' requests behind a context."""
    return [([*context, *before], after) for choices in questions for before, after in choices]


def _point(length: int, batch: int, ledgers: list[Ledger], files: list[Ledger]) -> Point:
    prefills = [ledger.phases["prefill"] for ledger in ledgers if "prefill" in ledger.phases]
    queries = [ledger.phases["query"] for ledger in ledgers]
    energy = [_median([p.joules for p in phases if p.joules is not None]) for phases in (prefills, queries)]
    return Point(
        context_tokens=length,
        batch=batch,
        prefill_s=tuple(phase.wall_s for phase in prefills),
        query_s=tuple(phase.wall_s / batch for phase in queries),
        prefill_flops=_median([phase.flops for phase in prefills]) or 0.0,
        query_flops=(_median([phase.flops for phase in queries]) or 0.0) / batch,
        prefill_joules=energy[0],
        query_joules=None if energy[1] is None else energy[1] / batch,
        save_s=tuple(file.seconds["save"] for file in files if length),
        load_s=tuple(file.seconds["context"] for file in files if length),
    )


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else None
