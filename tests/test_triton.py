"""The Triton kernels under the ops' own tests: interpreted where there is no GPU, compiled where there is one.

Interpreted, what they compute and load is counted too, and held against their cost models.
"""

import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import test_target_logprob
import test_trie_attention
import torch
from forests import Forest, forest, forests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trie_attention import bushy, index_tensors, tree_index

from benchmarks.trie_attention import questions
from icl_ft_fast.ops import AttentionOptions, TreeIndex, checks, target_logprob, trie_attention

pytest.importorskip("triton")
import interpreter
from triton.backends.compiler import GPUTarget

from benchmarks.kernel_costs import attention_costs, head_costs, met_tiles
from icl_ft_fast.ops.triton.gpu import described

OPS = {
    "trie_attention": "trie_attention",
    "trie_attention_plan": "trie_attention",
    "trie_attention_backward": "trie_attention",
    "target_logprob": "target_logprob",
    "target_logprob_backward": "target_logprob",
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SERVED = [torch.float32, torch.bfloat16, torch.float16]
attention, head = test_trie_attention.check, test_target_logprob.check


WHERE = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["interpreted"]


@pytest.fixture(scope="module", params=WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run; interpreted, they take the place of the CPU's."""
    if request.param == "cuda":
        yield "cuda"
        return
    interpreter.install()
    library = torch.library.Library("icl_ft_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the CPU's own kernel is overridden
        for name, module in OPS.items():
            kernel = getattr(import_module(f"icl_ft_fast.ops.triton.{module}"), name)
            library.impl(name, kernel, "CPU", allow_override=True)
    planned, checks.PLANNED = checks.PLANNED, ("cpu",)
    yield "cpu"
    checks.PLANNED = planned
    library._destroy()


@pytest.fixture
def interpreted(device: str) -> None:
    if device == "cuda":
        pytest.skip("counts are the interpreter's")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 2, 63, 65, 300])
def test_attention_of_odd_sizes(rows: int, dtype: torch.dtype, device: str) -> None:
    attention(bushy(rows), dtype, device)


@pytest.mark.parametrize("dtype", SERVED, ids=str)
@pytest.mark.parametrize(
    ("sizes", "heads"),
    [
        ((7, 1), (4, 1)),
        ((64, 96), (6, 2)),
        ((80, 80), (1, 1)),
        ((128, 128), (2, 2)),
        ((192, 128), (2, 2)),
        ((256, 256), (2, 1)),
    ],
    ids=str,
)
def test_attention_heads(sizes: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    attention(bushy(65), dtype, device, heads, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", [*test_trie_attention.EVERYTHING, "all"])
def test_attention_options(option: str, dtype: torch.dtype, device: str) -> None:
    everything = test_trie_attention.EVERYTHING
    options = everything if option == "all" else {option: everything[option]}
    attention(bushy(65), dtype, device, (8, 2), (40, 64), **options)


@pytest.mark.parametrize(
    ("target", "matrix"),
    [
        (GPUTarget("cuda", 103, 32), "tcgen05"),
        (GPUTarget("cuda", 121, 32), "mma"),
        (GPUTarget("hip", "gfx942", 64), "mfma"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("interpreted")
def test_blocks_of_other_gpus(target: GPUTarget, matrix: str, dtype: torch.dtype, monkeypatch) -> None:
    """Elsewhere what is interpreted has an H100's blocks."""
    found = described(target, 101_376, 100)
    assert found.matrix == matrix
    for module in ("trie_attention", "target_logprob"):
        monkeypatch.setattr(import_module(f"icl_ft_fast.ops.triton.{module}"), "gpu", lambda device: found)
    attention(bushy(40), dtype, heads=(4, 2), sizes=(128, 64))
    head(66, 9, 150, 40, dtype)


@pytest.mark.parametrize("layout", [test_trie_attention.strided, test_trie_attention.unaligned])
def test_attention_of_any_strides(layout, device: str) -> None:
    attention(bushy(64), torch.bfloat16, device, layout=layout)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_attention_of_any_scale(scale: float, device: str) -> None:
    attention(bushy(65), torch.float32, device, scale=scale)


@pytest.mark.parametrize("sink", [None, 0.5])
def test_a_query_that_sees_nothing(sink: float | None, device: str) -> None:
    test_trie_attention.test_a_query_that_sees_nothing_is_zero(sink, device)
    test_trie_attention.test_an_empty_stack(device)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    trie=forests(contexts=(0, 47, 200)),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]),
    window=st.none() | st.integers(1, 6),
    sinks=st.booleans(),
)
def test_attention_of_any_forest(
    trie: Forest, heads: tuple[int, int], window: int | None, sinks: bool, device: str
) -> None:
    attention(trie, torch.bfloat16, device, heads=heads, window=window, sinks=sinks)


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_few_queries_are_split_over_their_keys(dtype: torch.dtype, device: str, monkeypatch) -> None:
    """A decode step over a long context: the shares are merged in order, so that it repeats to the bit."""
    kernels, merges = import_module("icl_ft_fast.ops.triton.trie_attention"), []
    merge = kernels._merge
    monkeypatch.setattr(
        kernels, "_merge", type("", (), {"__getitem__": lambda _, grid: merges.append(grid) or merge[grid]})()
    )
    step = forest([0] * 700, queries=[640, 699], unfilled=range(650, 680))
    attention(step, dtype, device, (4, 2), (64, 64), sinks=True)
    assert merges
    q, k = torch.randn(2, 4, 64, device=device), torch.randn(700, 2, 64, device=device)
    once, again = (trie_attention(q, k, k, tree_index(step, device)) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
def test_a_plan_lists_little_more_than_the_tiles_that_must_be_met(kernel: str, device: str) -> None:
    kernels = import_module("icl_ft_fast.ops.triton.trie_attention")
    question = [10, *[0] * 9, *[0, 0, 0, 3, 0, 0, 3, 0, 0, 3, 0, 0]]  # under its context; four answers of three tokens
    trie = forest([0] * 150 + [0, *question[1:]] + [3 + 10, *question[1:]] * 11)
    q, k = (torch.empty(len(trie.end_k), n, 64, device=device, dtype=torch.float16) for n in (2, 1))
    common = kernels._common(q, k, k, *index_tensors(trie, device), scale=1.0, window=0, softcap=0.0)
    own, planned = kernels._planned(kernel, common, None)
    met, whole = met_tiles(common, planned["BLOCK_M"], planned["BLOCK_N"])
    visible = torch.tensor(trie.visible).repeat_interleave(2, 0)
    seen = tiles_with(visible, *met.shape, planned)
    assert (whole <= ~tiles_with(~visible, *met.shape, planned)).all()
    assert (seen <= met).all()
    assert whole.any()
    assert met.sum() <= 1.1 * seen.sum()
    if kernel == "backward_kv":
        met, whole = met.T, whole.T
    plan, many = planned["plan"].tolist(), planned["many"]
    assert own == len(plan) == len(met)
    for row, of_met, of_whole in zip(plan, met, whole, strict=True):
        *listed, num_whole, num_partial = row
        assert listed[:num_whole] == of_whole.nonzero()[:, 0].tolist()
        assert listed[many - num_partial :][::-1] == (of_met & ~of_whole).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "M", "V", "E"), [(1, 1, 1, 1), (63, 130, 65, 64), (64, 63, 1000, 40), (130, 9, 63, 80)])
def test_head_of_odd_sizes(R: int, M: int, V: int, E: int, dtype: torch.dtype, device: str) -> None:
    head(R, M, V, E, dtype, device)


@pytest.mark.parametrize(("R", "M"), [(0, 0), (3, 0)])
def test_head_with_nothing_to_score(R: int, M: int, device: str) -> None:
    head(R, M, 7, 8, torch.float32, device, bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", [*test_target_logprob.EVERYTHING, "all"])
def test_head_options(option: str, dtype: torch.dtype, device: str) -> None:
    everything = test_target_logprob.EVERYTHING
    head(33, 65, 300, 24, dtype, device, **(everything if option == "all" else {option: everything[option]}))


def test_head_of_any_strides_in_many_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = import_module("icl_ft_fast.ops.triton.target_logprob")
    monkeypatch.setattr(kernels, "_GRAD_BYTES", 1)
    monkeypatch.setattr(kernels, "num_shares", lambda *_: 2)
    head(70, 65, 300, 40, torch.bfloat16, device, torch.int64, test_target_logprob.strided, bias=True)


@pytest.mark.parametrize("name", ["test_tokens_the_bias_rules_out", "test_what_is_out_of_range_is_nan"])
def test_head_of_odd_values(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test = getattr(test_target_logprob, name)
    test(device, monkeypatch) if "bias" in name else test(device)


def test_of_equal_maxima_the_first_is_the_argmax(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_target_logprob.test_of_equal_maxima_the_first_is_the_argmax(torch.float32, device, monkeypatch)


@NEEDS_GPU
@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """Rows of q, k and v that start past 2^31 elements of their tensors."""
    rows = 2**31 // (8 * 64) + 65
    q = torch.randn(rows, 8, 64, device="cuda", dtype=torch.float16)
    chains = torch.arange(rows, dtype=torch.int32, device="cuda")
    end = (chains // 64 + 1) * 64
    out = trie_attention(q, q, q, TreeIndex(chains, end, chains, chains))
    last = slice(rows // 64 * 64 - 64, rows // 64 * 64)
    tree = tree_index(forest([0] * 64), "cuda")
    assert torch.equal(out[last], trie_attention(q[last], q[last], q[last], tree))


@NEEDS_GPU
@pytest.mark.gpu
def test_head_offsets_beyond_two_to_the_31() -> None:
    """A weight whose last rows, and gradients of logits that, start past 2^31 elements."""
    V, E = 2**31 // 512 + 200, 512
    weight = torch.zeros(V, E, device="cuda", dtype=torch.float16)
    weight[-70:] = torch.randn(70, E, device="cuda")
    hidden = torch.randn(64, E, device="cuda", dtype=torch.float16, requires_grad=True)
    row, target = torch.arange(64, device="cuda"), V - 1 - torch.arange(64, device="cuda")
    logp, _, lse = target_logprob(hidden, weight, row, target)
    (grad,) = torch.autograd.grad(logp.sum(), hidden)
    logits = hidden.detach().double() @ weight[-70:].double().T
    exact = torch.cat([logits, logits.new_tensor(V - 70.0).log().expand(64, 1)], 1).logsumexp(1)
    assert torch.allclose(lse.double(), exact, rtol=1e-5)
    assert torch.allclose(logp.double(), logits[row, 69 - row] - exact, rtol=1e-4)
    probabilities = (logits - exact[:, None]).exp()
    exact_grad = weight[-70:].double()[69 - row] - probabilities @ weight[-70:].double()
    assert torch.allclose(grad.double(), exact_grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "heads", "size", "options"),
    [
        (torch.float16, (4, 2), 64, {}),
        (torch.float32, (3, 1), 40, {"sinks": True}),
        (torch.bfloat16, (2, 2), 80, {"window": 20}),
        (torch.bfloat16, (4, 2), 256, {}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("interpreted")
def test_attention_costs_what_the_interpreter_counts(
    dtype: torch.dtype, heads: tuple[int, int], size: int, options: dict[str, Any]
) -> None:
    for trie in (forest([0] * 90 + [0, 0, 1, 2, 0, 7] * 12), forest([0] * 400, queries=[300, 399])):
        q, k = (
            torch.randn(n, h, size).to(dtype).requires_grad_()
            for n, h in zip((len(trie.row_q), len(trie.end_k)), heads, strict=True)
        )
        index, window = index_tensors(trie, "cpu"), options.get("window")
        sinks = torch.zeros(heads[0]) if "sinks" in options else None
        for backward in (False, True):
            if not backward:
                with interpreter.counted() as counts:
                    out = trie_attention(q, k, k, TreeIndex(*index), AttentionOptions(window=window, sinks=sinks))
            else:
                with interpreter.counted() as counts:
                    out.sum().backward()
            costs = attention_costs(q, k, k, *index, window or 0, sinks=sinks is not None, backward=backward)
            assert {name: list(cost[:3]) for name, cost in costs.items()} == counts
            for name, cost in costs.items():
                assert (cost.whole + cost.partial > 0) == (name not in ("_plan", "_merge"))


@pytest.mark.parametrize(("R", "M", "V", "E"), [(3, 5, 70, 40), (70, 130, 300, 100), (130, 9, 500, 64)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.usefixtures("interpreted")
def test_head_costs_what_the_interpreter_counts(R: int, M: int, V: int, E: int, bias: bool, monkeypatch) -> None:
    kernels = import_module("icl_ft_fast.ops.triton.target_logprob")
    monkeypatch.setattr(kernels, "_GRAD_BYTES", R * 256 * 2)
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (torch.randn(n, E).to(dtype).requires_grad_() for n in (R, V))
        row, target = torch.randint(R, (M,)), torch.randint(V, (M,))
        with interpreter.counted() as counts:
            logp = target_logprob(hidden, weight, row, target, bias=torch.zeros(V, dtype=dtype) if bias else None)[0]
        costs = head_costs(hidden, weight, M, bias=bias)
        assert {name: list(cost[:3]) for name, cost in costs.items()} == counts
        with interpreter.counted() as counts:
            logp.sum().backward()
        costs = head_costs(hidden, weight, M, bias=bias, backward=True)
        assert {name: list(cost[:3]) for name, cost in costs.items()} == counts


@pytest.mark.parametrize(("size", "group"), [(64, 4), (128, 4), (128, 1), (256, 2)])
@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
def test_tiles_met_on_the_benchmarks_trie_are_few_more_than_must_be(kernel: str, size: int, group: int) -> None:
    """220 questions of 4 choices of 5 tokens over 4,000, in chunks of 512 rows: at most 1.1 times the ideal set."""
    kernels = import_module("icl_ft_fast.ops.triton.trie_attention")
    num_met = num_ideal = 0
    for index in questions(220, 1):
        row_q, end_k = index[:2]
        q, k = torch.empty(len(row_q), group, size, dtype=torch.float16), torch.empty(len(end_k), 1, size).half()
        common = kernels._common(q, k, k, *index, 1.0, 0, 0.0)
        block = kernels._chosen(kernel, common)[1]
        met, whole = met_tiles(common, block["BLOCK_M"], block["BLOCK_N"])
        visible = (torch.arange(len(end_k)) <= row_q[:, None]) & (row_q[:, None] < end_k)
        ideal = tiles_with(visible.repeat_interleave(group, 0), *met.shape, block)
        assert (met >= ideal).all()
        assert (whole <= ideal).all()
        num_met, num_ideal = num_met + int(met.sum()), num_ideal + int(ideal.sum())
    assert 0 < num_ideal <= num_met <= 1.1 * num_ideal


def tiles_with(visible: torch.Tensor, rows: int, columns: int, block: dict[str, int]) -> torch.Tensor:
    """Which tiles hold a visible pair."""
    (T, S), M, N = visible.shape, block["BLOCK_M"], block["BLOCK_N"]
    padded = torch.nn.functional.pad(visible, (0, columns * N - S, 0, rows * M - T))
    return padded.view(rows, M, columns, N).any(3).any(1)


def test_layers_share_a_plan(device: str, monkeypatch) -> None:
    """The plan of each kernel is made by the first call that shares it; results keep their bits."""
    kernels, made = import_module("icl_ft_fast.ops.triton.trie_attention"), []
    planned = kernels._planned
    monkeypatch.setattr(kernels, "_planned", lambda *args: made.append(args[2] is None) or planned(*args))
    tree = tree_index(bushy(100), device)
    q, k = (torch.randn(100, n, 16, device=device, requires_grad=True) for n in (4, 2))

    def run(plans: dict[Any, Any] | None, window: int | None) -> list[torch.Tensor]:
        out = trie_attention(q, k, k, tree, AttentionOptions(window=window), plans=plans)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k))]

    plans: dict[Any, Any] = {}
    for window in (None, 9, None, 9):
        results = run(plans, window), run(None, window)
        assert all(map(torch.equal, *results))
    # A kernel plans for itself in each of the 4 calls without plans, and before the first of each window with them.
    assert sum(made) == 3 * (4 + 2)
    with pytest.raises(ValueError, match="plans expected to be shared by calls with the very same"):
        trie_attention(q, k, k, tree_index(bushy(100), device), plans=plans)


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0, "scale": 0.4}], ids=str)
def test_attention_gradients(options: dict[str, Any], device: str) -> None:
    qkv, index, sinks = test_trie_attention.float64_inputs()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tree = TreeIndex(*(x.to(device) for x in index))
        return trie_attention(q, k, v, tree, AttentionOptions(sinks=sinks, **options), return_lse=True)

    leaves = [x.detach().to(device).requires_grad_() for x in (*qkv, sinks)]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "scale": 3.0}], ids=str)
def test_head_gradients(options: dict[str, float], device: str) -> None:
    *tensors, row, target = test_target_logprob.float64_inputs()

    def score(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp, _, lse = target_logprob(hidden, weight, row.to(device), target.to(device), bias=bias, **options)
        return logp, lse

    leaves = [x.detach().to(device).requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(score, leaves, fast_mode=True)


@pytest.mark.usefixtures("interpreted")
def test_ops_are_registered_soundly() -> None:
    test_trie_attention.test_ops_are_registered_soundly()
    test_target_logprob.test_ops_are_registered_soundly(with_bias=True)
    qkv, index, _ = test_trie_attention.float64_inputs()
    arguments = (*(x.detach() for x in qkv), *index, 2, "backward_kv")
    torch.library.opcheck(torch.ops.icl_ft_fast.trie_attention_plan, arguments)


def far_apart(x: torch.Tensor) -> torch.Tensor:
    """The same values, rows 2^30 elements apart: address space that is asked for and never touched."""
    if x.dtype == torch.float64:  # the oracle's
        return x.clone()
    rows, *shape = x.shape
    strides = torch.empty(shape).stride()
    buffer = torch.empty((rows - 1) * 2**30 + x[0].numel(), dtype=x.dtype, device=x.device)
    return buffer.as_strided(x.shape, (2**30, *strides)).copy_(x).detach()


@pytest.mark.usefixtures("interpreted")
def test_offsets_beyond_two_to_the_31_interpreted() -> None:
    attention(forest([0, 0, 1]), torch.bfloat16, heads=(1, 1), layout=far_apart)
    head(3, 6, 3, 16, torch.bfloat16, layout=far_apart)
