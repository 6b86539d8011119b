"""target_logprob against log_softmax of all the logits, in float64 and in the inputs' dtype."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from close import assert_close, furthest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icl_ft_fast import _C
from icl_ft_fast.ops import cpu, reference, target_logprob, target_logprob_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"bias": True, "softcap": 3.0, "scale": 0.25}
ORDERS = 3
ISAS = {"portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4}  # csrc/icl.h


@pytest.fixture(params=["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name, isa in ISAS.items() if isa <= _C.best_isa()])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "_ISA", ISAS[request.param])
    return request.param


def strided(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[-1], 2 * len(x)).T[::2].copy_(x).detach() if x.dim() == 2 else x.repeat(2)[: len(x)]


def unaligned(x: Tensor) -> Tensor:
    return x.new_zeros(x.numel() + 1)[1:].view_as(x).copy_(x)


def shaped(logits: Tensor, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0) -> Tensor:
    logits = (logits if bias is None else logits + bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def one_by_one(hidden: Tensor, weight: Tensor) -> Tensor:
    """Products without a matrix product, whose order of summation the op might share."""
    return (hidden[:, None] * weight).sum(-1)


def check(
    R: int,
    M: int,
    V: int,
    E: int,
    dtype: torch.dtype,
    device: str = "cpu",
    index_dtype: torch.dtype = torch.int32,
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    bias: bool = False,
    gradients: bool = True,
    **options: float,
) -> None:
    """logp, lse and every gradient, of both outputs at once, within the error budget, and the arg-max flags.

    What plain PyTorch is off by is taken from several orders of its sums: in a single one, the few numbers of a small
    case may all be right by luck.
    """
    generator = torch.Generator().manual_seed(R + 1000 * M + 1000000 * V)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [normal(R, E), normal(V, E) * (2 * E**-0.5), *([normal(V)] if bias else [])]
    row = torch.randint(max(1, R), (M,), generator=generator)
    target = torch.randint(V, (M,), generator=generator)
    doubles = [x.double() for x in inputs]
    logits = shaped(one_by_one(*doubles[:2]), *doubles[2:], **options)
    best, certain = logits.argmax(-1), decided(logits, dtype)
    target[::2] = best[row[::2]]
    grad_logp, grad_lse = normal(M), normal(R)

    def run(head: Callable[..., Any], dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor | None]:
        leaves = [layout(x.to(device, dtype)).requires_grad_() for x in inputs]
        logp, is_argmax, lse = head(*leaves)
        cotangents = [grad_logp.to(device, logp.dtype), grad_lse.to(device, lse.dtype)]
        grads = torch.autograd.grad([logp, lse], leaves, cotangents) if gradients else ()
        return [x.detach().cpu() for x in (logp, lse, *grads)], is_argmax

    def op(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        index = (x.to(device, index_dtype) for x in (row, target))
        return target_logprob(hidden, weight, *index, bias=bias, **options)

    def plain(hidden: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, None, Tensor]:
        logits = shaped(hidden @ weight.T, *bias, **options)
        return logits.log_softmax(-1)[row, target], None, logits.logsumexp(-1)

    def shuffled(hidden: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, None, Tensor]:
        order = torch.randperm(E, generator=generator)
        return plain(hidden[:, order], weight[:, order], *bias)

    def simple(hidden: Tensor, weight: Tensor, *bias: Tensor) -> tuple[Tensor, None, Tensor]:
        logits = shaped(one_by_one(hidden, weight), *bias, **options)
        lse = logits.exp().sum(-1).log()
        return logits[row, target] - lse[row], None, lse

    results, is_argmax = run(op, dtype, device)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in results] == [accumulated, accumulated, *[dtype] * (len(results) - 2)]
    names = ["logp", "lse", "grad_hidden", "grad_weight", "grad_bias"]
    exact = run(simple, torch.float64, "cpu")[0]
    same = [run(head, dtype, "cpu")[0] for head in (plain, *[shuffled] * ORDERS)]
    for name, kernel, exact64, *same_dtype in zip(names, results, exact, *same, strict=False):
        assert_close(kernel, furthest(same_dtype, exact64), exact64, name)
    assert is_argmax is not None
    assert is_argmax.dtype == torch.bool
    assert torch.equal(is_argmax.cpu()[certain[row]], (best[row] == target)[certain[row]])


def decided(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows whose two best logits differ by more than the op's rounding, so that the arg-max is beyond doubt."""
    if logits.shape[1] < 2:
        return torch.ones(len(logits), dtype=torch.bool)
    first, second = logits.topk(2).values.unbind(-1)
    return first - second > 100 * torch.finfo(reference.accumulator(dtype)).eps * logits.abs().amax(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "M", "V", "E"), [(1, 1, 1, 1), (63, 130, 65, 64), (64, 63, 1000, 40), (65, 1, 63, 80)])
def test_odd_sizes(R: int, M: int, V: int, E: int, dtype: torch.dtype, device: str) -> None:
    check(R, M, V, E, dtype, device)


@pytest.mark.parametrize(("R", "M"), [(0, 0), (3, 0)])
def test_nothing_to_score(R: int, M: int, device: str) -> None:
    check(R, M, 7, 8, torch.float32, device, bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", [*EVERYTHING, "all"])
def test_options(option: str, dtype: torch.dtype, device: str) -> None:
    check(33, 65, 300, 24, dtype, device, **(EVERYTHING if option == "all" else {option: EVERYTHING[option]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_worked_out_in_float32(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (65, 300))
    row, target = torch.arange(65).repeat(2), torch.randint(300, (130,), generator=generator)
    logp, _, lse = target_logprob(*(x.to(device) for x in (hidden, weight, row, target)))
    same, exact = hidden.float() @ weight.float().T, one_by_one(hidden.double(), weight.double())
    assert_close(lse.cpu(), same.logsumexp(-1), exact.logsumexp(-1), "lse")
    assert_close(logp.cpu(), same.log_softmax(-1)[row, target], exact.log_softmax(-1)[row, target], "logp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "all"])
def test_many_blocks_give_what_one_gives(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_LOGIT_ROWS", 10)
    monkeypatch.setattr(reference, "_LOGIT_COLUMNS", 64)
    check(33, 65, 300, 24, dtype, **options)


def test_a_vocabulary_of_several_blocks(device: str) -> None:
    check(9, 200, 9001, 16, torch.float32, device, torch.int64)


def test_any_strides(device: str) -> None:
    check(64, 65, 63, 40, torch.float32, device, layout=strided)


NATIVE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@NATIVE
@pytest.mark.parametrize(
    ("R", "V", "E"), [(1, 1, 1), (1, 1000, 65), (4, 63, 63), (5, 65, 1), (16, 7, 130), (63, 1, 65), (130, 1000, 64)]
)
def test_every_instruction_set(R: int, V: int, E: int, dtype: torch.dtype, isa: str) -> None:
    check(R, 2 * R + 1, V, E, dtype)


@NATIVE
@pytest.mark.parametrize("layout", [strided, unaligned])
@pytest.mark.parametrize("R", [3, 70])
def test_every_instruction_set_takes_any_layout_and_options(
    R: int, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, isa: str
) -> None:
    check(R, 99, 300, 66, dtype, layout=layout, **EVERYTHING)


def many_blocks(dtype: torch.dtype, R: int = 530) -> tuple[Tensor, ...]:
    """More rows, columns and width than a block has, and several targets a row."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 330, generator=generator).to(dtype) for n in (R, 6600))
    weight *= 330**-0.5
    row, target = torch.arange(R).repeat(3), torch.randint(6600, (3 * R,), generator=generator)
    return hidden, weight, row.int(), target.int()


@NATIVE
@pytest.mark.parametrize("R", [2, 530])
def test_every_instruction_set_joins_blocks(R: int, dtype: torch.dtype, isa: str) -> None:
    hidden, weight, row, target = many_blocks(dtype, R)
    exact, same = hidden.double() @ weight.double().T, hidden.float() @ weight.float().T
    target[:R] = exact.argmax(-1)
    logp, is_argmax, lse = target_logprob(hidden, weight, row, target)
    index = (row.long(), target.long())
    assert_close(lse, same.logsumexp(-1), exact.logsumexp(-1), "lse")
    assert_close(logp, same.log_softmax(-1)[index], exact.log_softmax(-1)[index], "logp")
    certain = decided(exact, dtype)[index[0]]
    assert torch.equal(is_argmax[certain], (exact.argmax(-1)[index[0]] == target)[certain])


@NATIVE
def test_every_instruction_set_joins_strips(dtype: torch.dtype, isa: str) -> None:
    """Gradients where a row's logits, and weights that are packed, are more than are held at a time."""
    hidden, weight, row, target = many_blocks(dtype)
    bias, generator = torch.linspace(-1, 1, 6600).to(dtype), torch.Generator().manual_seed(1)
    cotangent = torch.randn(len(row), generator=generator) / len(row)

    def gradients(head: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        return torch.autograd.grad(head(*leaves), leaves, cotangent.to(head(*leaves).dtype))

    def op(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return target_logprob(hidden, weight, row, target, bias=bias, scale=0.5)[0]

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return shaped(hidden @ weight.T, bias, scale=0.5).log_softmax(-1)[row.long(), target.long()]

    for name, *tensors in zip(
        ("hidden", "weight", "bias"),
        gradients(op, dtype),
        gradients(plain, dtype),
        gradients(plain, torch.float64),
        strict=True,
    ):
        assert_close(*tensors, f"grad_{name}")


def check_sum(inputs: tuple[Tensor, ...], index: tuple[Tensor, Tensor], **options: Any) -> None:
    """The sum's log-probabilities and its gradient of hidden, within the error budget."""
    dtype, generator = inputs[0].dtype, torch.Generator().manual_seed(1)
    times = torch.rand(len(index[0]), generator=generator, dtype=torch.float64)
    row, target = (x.long() for x in index)

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden, weight, *bias = (x.to(dtype).requires_grad_(i == 0) for i, x in enumerate(inputs))
        logp = shaped(hidden @ weight.T, *bias, **options).log_softmax(-1)[row, target]
        return logp.detach(), torch.autograd.grad((times.to(dtype) * logp).sum(), hidden)[0]

    hidden, weight, *bias = inputs
    logp, grad = torch.ops.icl_ft_fast.target_logprob_sum(
        hidden,
        weight,
        *(x.int() for x in index),
        times.float(),
        bias[0] if bias else None,
        options.get("scale", 1.0),
        options.get("softcap", 0.0),
    )
    assert (logp.dtype, grad.dtype) == (torch.float32, torch.float32)
    for name, *tensors in zip(("logp", "grad"), (logp, grad), plain(dtype), plain(torch.float64), strict=True):
        assert_close(*tensors, name)


@NATIVE
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.25}], ids=["plain", "all"])
@pytest.mark.parametrize(("R", "V", "E"), [(1, 2, 1), (5, 65, 66), (70, 1000, 33)])
def test_the_sum_of_every_instruction_set(
    R: int, V: int, E: int, options: dict[str, float], dtype: torch.dtype, isa: str
) -> None:
    generator = torch.Generator().manual_seed(R)
    inputs = [torch.randn(shape, generator=generator) for shape in ((R, E), (V, E), (V,))]
    index = tuple(torch.randint(n, (2 * R + 1,), generator=generator) for n in (R, V))
    check_sum(tuple(strided(x.to(dtype)) for x in inputs[: 3 if options else 2]), index, **options)


@NATIVE
def test_the_sum_takes_maxima_that_rise_and_fall_from_strip_to_strip(dtype: torch.dtype, isa: str) -> None:
    hidden, weight, *index = many_blocks(dtype)
    rows = torch.linspace(-3, 3, 530)[:, None]  # logits rise with the columns in some rows, and fall in others
    hidden = torch.cat([hidden[:, :-1].float() / 30, rows], 1).to(dtype)
    weight = torch.cat([weight[:, :-1].float(), torch.linspace(-20, 20, 6600)[:, None]], 1).to(dtype)
    check_sum((hidden, weight), tuple(index))


@NATIVE
@pytest.mark.parametrize("R", [2, 530])
def test_results_repeat_to_the_bit_whatever_the_threads(R: int, dtype: torch.dtype, isa: str) -> None:
    (hidden, weight, *index), threads, results = many_blocks(dtype, R), torch.get_num_threads(), []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        outputs = target_logprob(*leaves, *index)
        results.append((*outputs, *torch.autograd.grad(outputs[0].mean() + outputs[2].sum(), leaves)))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@NATIVE
def test_a_sum_repeats_to_the_bit_whatever_the_threads(dtype: torch.dtype) -> None:
    (hidden, weight, *index), threads, results = many_blocks(dtype), torch.get_num_threads(), []
    for num_threads in (1, 2, 2):
        torch.set_num_threads(num_threads)
        times = torch.ones(len(index[0]))
        results.append(torch.ops.icl_ft_fast.target_logprob_sum(hidden, weight, *index, times, None, 1.0, 0.0))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("E", [33, 300])
def test_an_invariant_row_has_the_same_bits_in_any_company(E: int, dtype: torch.dtype, isa: str) -> None:
    generator = torch.Generator().manual_seed(E)
    hidden, weight = (torch.randn(n, E, generator=generator).to(dtype) for n in (600, 300))
    target = torch.randint(300, (600,), generator=generator)

    def results(rows: Tensor) -> tuple[Tensor, ...]:
        return target_logprob(
            hidden[rows], weight, torch.arange(len(rows)), target[rows], softcap=20, batch_invariant=True
        )

    whole = results(torch.arange(600))
    for rows in (torch.tensor([599]), torch.tensor([5, 77, 1]), torch.arange(4, 590, 11), torch.arange(599, -1, -1)):
        assert all(torch.equal(some, every[rows]) for some, every in zip(results(rows), whole, strict=True))


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("bfloat16", [True, False])
def test_memory_is_bounded(bfloat16: bool, contiguous: bool, isa: str) -> None:
    for R, E, V, num_threads in itertools.product((1, 5, 512, 10**6), (1, 512, 2048, 8192), (1, 32000, 10**6), (2, 99)):
        sizes = (R, E, V, 0)
        size = _C.target_logprob_workspace_bytes(bfloat16, sizes, contiguous, ISAS[isa], num_threads)
        assert 0 < size <= 16e6
        for of in ("backward", "sum"):
            size = _C.target_logprob_workspace_bytes(bfloat16, sizes, contiguous, ISAS[isa], num_threads, of)
            # Three floats an element, and at least a tile of logits; the sum has some of each row besides.
            assert 0 < size <= 42e6 + 12 * (R + 16) * (E + 48 + 2 * (of == "sum"))


def test_values_that_are_not_finite(isa: str) -> None:
    hidden, weight = torch.ones(6, 4), torch.ones(9, 4)
    hidden[1, 2] = torch.nan
    row = target = torch.arange(6)
    lse = target_logprob(hidden, weight, row, target)[2]
    assert lse.isnan().tolist() == [False, True, False, False, False, False]
    logp, _, lse = target_logprob(hidden, weight, row, target, bias=torch.full((9,), -torch.inf))
    assert lse.isneginf().tolist() == [True, False, True, True, True, True]
    assert logp.isnan().all()


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="isa: expected 0 to"):
        _C.target_logprob_workspace_bytes(True, (1, 1, 1, 1), True, 5, 1)


@settings(max_examples=40, deadline=None)
@given(
    R=st.integers(1, 9),
    M=st.integers(0, 20),
    V=st.integers(2, 40),
    bias=st.booleans(),
    softcap=st.none() | st.just(2.0),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
)
def test_any_targets(R: int, M: int, V: int, bias: bool, softcap: float | None, scale: float) -> None:
    check(R, M, V, 8, torch.float16, bias=bias, softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_of_equal_maxima_the_first_is_the_argmax(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.tensor([0.0, 1, 0, 1, 1, 0], dtype=dtype, device=device)[:, None]
    row, target = torch.zeros(6, dtype=torch.int32, device=device), torch.arange(6, device=device)
    for columns in (6, 3, 2):
        monkeypatch.setattr(reference, "_LOGIT_COLUMNS", columns)
        is_argmax = target_logprob(torch.ones(1, 1, dtype=dtype, device=device), weight, row, target)[1]
        assert is_argmax.tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("R", [1, 70])
def test_of_maxima_in_many_blocks_the_first_is_the_argmax(R: int, isa: str) -> None:
    weight, target = torch.zeros(9001, 1), torch.tensor([0, 700, 701, 8999, 9000])
    weight[700:] = 1
    is_argmax = target_logprob(torch.ones(R, 1), weight, torch.full((5,), R - 1), target)[1]
    assert is_argmax.tolist() == [False, True, False, False, False]


def test_tokens_the_bias_rules_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_LOGIT_COLUMNS", 2)
    bias = torch.tensor([-torch.inf, -torch.inf, 0, 0, -torch.inf, -torch.inf], device=device)
    hidden, weight = torch.zeros(1, 4, device=device), torch.zeros(6, 4, device=device)
    row, target = torch.zeros(6, dtype=torch.int32, device=device), torch.arange(6, device=device)
    logp, is_argmax, _ = target_logprob(hidden, weight, row, target, bias=bias)
    assert logp.exp().tolist() == pytest.approx([0, 0, 0.5, 0.5, 0, 0])
    assert is_argmax.tolist() == [False, False, True, False, False, False]


def test_what_is_out_of_range_is_nan(device: str) -> None:
    hidden, weight = torch.ones(2, 4, device=device), torch.ones(3, 4, device=device)
    row, target = torch.tensor([0, 0, 0, 2, -1], device=device), torch.tensor([2, 3, -100, 0, 0], device=device)
    logp, is_argmax, _ = target_logprob(hidden, weight, row, target)
    assert logp.isnan().tolist() == [False, True, True, True, True]
    assert not is_argmax[1:].any()


def float64_inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in [(4, 3), (7, 3), 7]
    ]
    row, target = torch.tensor([3, 0, 0, 3, 3]), torch.tensor([6, 1, 2, 6, 0])
    return *tensors, row.int(), target.int()


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"scale": 0.4}, {"softcap": 2.0, "scale": 3.0}])
def test_gradients(options: dict[str, float]) -> None:
    *tensors, row, target = float64_inputs()

    def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logp, _, lse = target_logprob(hidden, weight, row, target, bias=bias, **options)
        return logp, lse

    assert torch.autograd.gradcheck(head, tensors)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, bias, row, target = float64_inputs()
    target_logprob(hidden, weight, row, target, bias=bias)[0].sum().backward()
    whole, hidden.grad = hidden.grad, None
    target_logprob(hidden, weight.detach(), row, target, bias=bias.detach())[0].sum().backward()
    assert torch.equal(whole, hidden.grad)


def test_the_sum_is_that_of_the_weighted_log_probabilities() -> None:
    hidden, weight, bias, row, target = float64_inputs()
    times, options = torch.tensor([1.0, 0, 2, 0.5, 3], dtype=torch.float64), {"softcap": 2.0, "scale": 3.0}

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return target_logprob_sum(hidden, weight, row, target, times, bias=bias, **options)

    frozen = weight.detach(), bias.detach()
    assert torch.autograd.gradcheck(total, (hidden, *frozen))
    assert torch.autograd.gradcheck(total, (hidden, weight, bias))
    expected = (target_logprob(hidden, weight, row, target, bias=bias, **options)[0] * times).sum()
    for x in (total(hidden, weight, bias), total(hidden, *frozen), total(hidden.detach(), *frozen)):
        assert x.item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"^target_logprob_sum: target_weight expected no gradient"):
        target_logprob_sum(hidden, weight, row, target, times.requires_grad_())
    with pytest.raises(TypeError, match=r"^target_logprob_sum: target_weight expected .*float64, got .*float32"):
        target_logprob_sum(hidden, weight, row, target, times.detach().float())


def test_values_of_a_sum_that_are_not_finite(isa: str) -> None:
    hidden, weight, row = torch.ones(3, 4), torch.ones(9, 4), torch.arange(3).int()
    hidden[1, 2] = torch.nan
    logp, grad = torch.ops.icl_ft_fast.target_logprob_sum(hidden, weight, row, row, torch.ones(3), None, 1.0, 0.0)
    assert logp.isnan().tolist() == grad.isnan().all(1).tolist() == [False, True, False]
    bias = torch.full((9,), -torch.inf)
    logp, _ = torch.ops.icl_ft_fast.target_logprob_sum(hidden, weight, row, row, torch.ones(3), bias, 1.0, 0.0)
    assert logp.isnan().all()


def test_second_gradients_are_refused() -> None:
    hidden, weight, _, row, target = float64_inputs()
    logp = target_logprob(hidden, weight, row, target)[0]
    (grad,) = torch.autograd.grad(logp.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("with_bias", [False, True])
def test_ops_are_registered_soundly(with_bias: bool) -> None:
    hidden, weight, bias, row, target = (x.detach() for x in float64_inputs())
    arguments = (hidden, weight, row, target, bias if with_bias else None)
    torch.library.opcheck(torch.ops.icl_ft_fast.target_logprob, (*arguments, 0.5, 2.0))
    logp, _, lse = torch.ops.icl_ft_fast.target_logprob(*arguments, 0.5, 2.0)
    for need_weight in (False, True):
        backward = (logp, lse, *arguments, lse, 0.5, 2.0, need_weight)
        torch.library.opcheck(torch.ops.icl_ft_fast.target_logprob_backward, backward)
    torch.library.opcheck(torch.ops.icl_ft_fast.target_logprob_sum, (*arguments[:4], logp, arguments[4], 0.5, 2.0))


def test_autocast_changes_nothing() -> None:
    *tensors, row, target = float64_inputs()
    hidden, weight, bias = (x.detach().float().requires_grad_() for x in tensors)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp = target_logprob(hidden, weight, row, target, bias=bias)[0]
            results.append((logp, *torch.autograd.grad(logp.sum(), (hidden, weight, bias))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("hidden", [[0.0]], TypeError),
        ("hidden", torch.zeros(5, 4, dtype=torch.int64), TypeError),
        ("hidden", torch.zeros(4), ValueError),
        ("hidden", torch.zeros(0, 4), ValueError),
        ("weight", torch.zeros(7, 4, dtype=torch.bfloat16), TypeError),
        ("weight", torch.zeros(7, 3), ValueError),
        ("weight", torch.zeros(0, 4), ValueError),
        ("row", torch.zeros(3), TypeError),
        ("row", torch.zeros(3, 1, dtype=torch.int32), ValueError),
        ("target", torch.zeros(2, dtype=torch.int32), ValueError),
        ("target", torch.zeros(3, dtype=torch.int32, device="meta"), ValueError),
        ("bias", torch.zeros(4), ValueError),
        ("bias", torch.zeros(7, dtype=torch.float64), TypeError),
        ("softcap", -1.0, ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    index = {"row": torch.zeros(3, dtype=torch.int32), "target": torch.zeros(3, dtype=torch.int64)}
    good = {"hidden": torch.zeros(5, 4), "weight": torch.zeros(7, 4), **index}
    target_logprob(**good)
    with pytest.raises(error, match=f"^target_logprob: {name} expected .*, got"):
        target_logprob(**{**good, name: value})


def test_a_device_without_an_implementation_is_refused() -> None:
    with torch._subclasses.FakeTensorMode():
        hidden, row = torch.empty(5, 4, device="xpu"), torch.empty(5, dtype=torch.int32, device="xpu")
        with pytest.raises(NotImplementedError, match=r"hidden expected on a device of type cpu.*, got xpu"):
            target_logprob(hidden, hidden, row, row)
