"""What invariant scores cost: the questions of suite `score` on its smallest model, as usual and to the bit."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import icl_ft_fast as iff
from benchmarks.score import DTYPES, SIZES, TOLERANCE, Case, article, save_model
from benchmarks.timing import Row, measure
from icl_ft_fast.engine.loading import from_network


def run(quick: bool, data: Path | None = None) -> list[Row]:
    """Time both for each dtype; a question must have the same bits alone, and both the same scores but for rounding."""
    context, questions = article(data, 10 if quick else None)
    name = next(iter(SIZES))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model", SIZES[name], [context, *(q.prompt for q in questions)])
        for dtype in DTYPES:
            model = iff.load(Path(folder) / "model", dtype=dtype)
            batch_invariant = from_network(model.network, model.tokenizer, model.name, batch_invariant=True)
            _check(batch_invariant, Case.of(model, context, questions), dtype)
            variants: dict[str, Callable[[], object]] = {
                "as usual": lambda model=model: iff.score(model, questions, context=context),  # type: ignore[misc]
                "batch_invariant": lambda model=batch_invariant: iff.score(model, questions, context=context),  # type: ignore[misc]
            }
            case = f"{name} {dtype}, {len(questions)} questions, {torch.get_num_threads()} threads"
            for variant, timing in measure(variants, min_rounds=3, max_rounds=9, seconds=12).items():
                rate = len(questions) / timing.ms * 1e3
                rows.append(
                    Row("batch_invariant", case, variant, timing.ms, timing.p20_ms, timing.p80_ms, rate, "questions/s")
                )
    return rows


def _check(batch_invariant: iff.Model, case: Case, dtype: str) -> None:
    requests = case.requests[:: -(-len(case.requests) // 8)]
    alone, together = (iff.loglikelihood(batch_invariant, some) for some in (requests[-1:], requests))
    if alone != together[-1:]:
        raise AssertionError(f"{dtype}: {alone[0]} alone, {together[-1]} beside others")
    for one, other in zip(together, iff.loglikelihood(case.model, requests), strict=True):
        if not abs(one.logp - other.logp) <= TOLERANCE[dtype] * abs(other.logp):
            raise AssertionError(f"{dtype}: {one.logp} invariant, {other.logp} as usual")
