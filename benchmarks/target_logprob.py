"""The fused output head beside the bare matrix product and log_softmax, and its gradients beside torch's."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import Row, measure, peak_bytes
from icl_ft_fast.ops import target_logprob

CASES = [  # rows, width, vocabulary, dtype
    (512, 512, 32_000, torch.bfloat16),
    (512, 2048, 32_000, torch.bfloat16),
    (512, 512, 128_000, torch.bfloat16),
    (512, 2048, 128_000, torch.bfloat16),
    (512, 512, 32_000, torch.float32),
    (1, 1024, 32_000, torch.bfloat16),
    (4, 1024, 32_000, torch.bfloat16),
    (16, 1024, 32_000, torch.bfloat16),
]
TRAINING = [(80, 512, 8_000, torch.float32), (512, 512, 32_000, torch.float32), (512, 512, 32_000, torch.bfloat16)]
CHECKED_ROWS = 8


def run(quick: bool) -> list[Row]:
    """Check and time every case on one thread and on all; "of peak" is the share of the bare product's speed."""
    rows, threads = [], torch.get_num_threads()
    for R, E, V, dtype in CASES[::4] if quick else CASES:
        generator = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, E, generator=generator).to(dtype) for n in (R, V))
        weight *= E**-0.5
        row, target = torch.arange(R, dtype=torch.int32), torch.randint(V, (R,), generator=generator).int()
        _check(hidden, weight, row, target)
        logits = torch.empty(R, V, dtype=dtype)
        variants: dict[str, Callable[[], object]] = {
            "target_logprob": lambda: target_logprob(hidden, weight, row, target),  # noqa: B023
            "matmul": lambda: torch.mm(hidden, weight.T, out=logits),  # noqa: B023
            "log_softmax": lambda: torch.mm(hidden, weight.T).log_softmax(-1)[row, target],  # noqa: B023
        }
        if R <= 16:
            variants["linear"] = lambda: F.linear(hidden, weight)  # noqa: B023
        for num_threads in sorted({1, threads}):
            torch.set_num_threads(num_threads)
            case = f"{str(dtype).removeprefix('torch.')}, {R} x {E} x {V:,}, {num_threads} threads"
            timings = measure(variants, seconds=0.2 if quick else 1.0)
            for name, timing in timings.items():
                size = weight.nbytes if R <= 16 else 2 * R * E * V
                rate, unit = size / timing.ms / 1e6, "GB/s" if R <= 16 else "GFLOP/s"
                percent = 100 * timings["matmul"].ms / timing.ms
                peak = peak_bytes(variants[name])
                times = (timing.ms, timing.p20_ms, timing.p80_ms)
                rows.append(Row("target_logprob", case, name, *times, rate, unit, percent, peak))
        torch.set_num_threads(threads)
    return rows + [row for case in (TRAINING[:1] if quick else TRAINING) for row in training(*case, quick)]


def training(R: int, E: int, V: int, dtype: torch.dtype, quick: bool) -> list[Row]:
    """Forward and gradients of the mean log-probability; the rate counts the three products that torch makes."""
    generator, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    hidden, weight = (torch.randn(n, E, generator=generator).to(dtype) for n in (R, V))
    weight *= E**-0.5
    row, target = torch.arange(R, dtype=torch.int32), torch.randint(V, (R,), generator=generator).int()

    def gradients(head: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        return torch.autograd.grad(head(*leaves).mean(), leaves)

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return target_logprob(hidden, weight, row, target)[0]

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.T).log_softmax(-1)[row, target]

    for made, plain, exact in zip(gradients(ours), gradients(theirs), gradients(theirs, torch.float64), strict=True):
        error, torch_error = ((x.double() - exact).abs().max().item() for x in (made, plain))
        if not error <= 2 * (torch_error + torch.finfo(dtype).eps * exact.abs().max().item()):
            raise AssertionError(f"gradients of {R} x {E} x {V} are off by {error:.2e}, torch's by {torch_error:.2e}")
    rows: list[Row] = []
    variants = {"target_logprob": lambda: gradients(ours), "log_softmax": lambda: gradients(theirs)}
    for num_threads in sorted({1, threads}):
        torch.set_num_threads(num_threads)
        name = str(dtype).removeprefix("torch.")
        case = f"{name}, forward and backward, {R} x {E} x {V:,}, {num_threads} threads"
        for variant, t in measure(variants, seconds=0.2 if quick else 1.0).items():
            rate, peak = 6 * R * E * V / t.ms / 1e6, peak_bytes(variants[variant])
            rows.append(Row("target_logprob", case, variant, t.ms, t.p20_ms, t.p80_ms, rate, "GFLOP/s", None, peak))
    torch.set_num_threads(threads)
    return rows


def _check(hidden: Tensor, weight: Tensor, row: Tensor, target: Tensor) -> None:
    """The first rows' results against float64, as exact as float32 products and sums are twice over."""
    first = slice(CHECKED_ROWS)
    logp, is_argmax, lse = target_logprob(hidden, weight, row, target)
    exact, plain = (hidden[first].to(d) @ weight.to(d).T for d in (torch.float64, torch.float32))
    best = exact.topk(2).values
    for name, ours, of in (
        ("lse", lse[first], lambda x: x.logsumexp(-1)),
        ("logp", logp[first], lambda x: x.log_softmax(-1)[row[first], target[first]]),
    ):
        error, allowed = (ours - of(exact)).abs().max(), (of(plain) - of(exact)).abs().max()
        allowed = 2 * (allowed + torch.finfo(torch.float32).eps * of(exact).abs().max())
        if not error <= allowed:
            raise AssertionError(f"{name} is off by {error:.2e}, more than {allowed:.2e}")
    certain = best[:, 0] - best[:, 1] > 1e-4
    if not torch.equal(is_argmax[first][certain], (exact.argmax(-1) == target[first])[certain]):
        raise AssertionError("is_argmax is wrong")
