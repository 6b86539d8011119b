"""The Triton kernels under the ops' own tests: interpreted where there is no GPU, compiled where there is one."""

import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import test_target_logprob
import test_trie_attention
import torch
from forests import Forest, forest, forests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trie_attention import bushy, index_tensors

from icl_ft_fast.model import load
from icl_ft_fast.ops import trie_attention

pytest.importorskip("triton")

OPS = {
    "trie_attention": "trie_attention",
    "trie_attention_backward": "trie_attention",
    "target_logprob": "target_logprob",
    "target_logprob_backward": "target_logprob",
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HALF_AND_SINGLE = [torch.float32, torch.bfloat16]
attention, head = test_trie_attention.check, test_target_logprob.check


WHERE = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["interpreted"]


@pytest.fixture(scope="module", params=WHERE)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the kernels run; interpreted, they take the place of the CPU's."""
    if request.param == "cuda":
        yield "cuda"
        return
    import interpreter

    interpreter.install()
    library = torch.library.Library("icl_ft_fast", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the CPU's own kernel is overridden
        for name, module in OPS.items():
            kernel = getattr(import_module(f"icl_ft_fast.kernels.{module}"), name)
            library.impl(name, kernel, "CPU", allow_override=True)
    yield "cpu"
    library._destroy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 2, 63, 65, 300])
def test_attention_of_odd_sizes(rows: int, dtype: torch.dtype, device: str) -> None:
    attention(bushy(rows), dtype, device)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("sizes", "heads"),
    [((7, 1), (4, 1)), ((64, 96), (6, 2)), ((80, 80), (1, 1)), ((192, 128), (4, 4)), ((256, 256), (4, 2))],
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


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_few_queries_are_split_over_their_keys(dtype: torch.dtype, device: str, monkeypatch) -> None:
    """A decode step over a long context: the shares are merged in order, so that it repeats to the bit."""
    kernels, merges = import_module("icl_ft_fast.kernels.trie_attention"), []
    merge = kernels._merge
    monkeypatch.setattr(
        kernels, "_merge", type("", (), {"__getitem__": lambda _, grid: merges.append(grid) or merge[grid]})()
    )
    step = forest([0] * 700, queries=[640, 699], unfilled=range(650, 680))
    attention(step, dtype, device, (4, 2), (64, 64), sinks=True)
    assert merges
    q, k = torch.randn(2, 4, 64, device=device), torch.randn(700, 2, 64, device=device)
    once, again = (trie_attention(q, k, k, *index_tensors(step, device)) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("kernel", ["forward", "backward_q", "backward_kv"])
def test_a_plan_lists_little_more_than_the_tiles_that_must_be_met(kernel: str, device: str) -> None:
    kernels = import_module("icl_ft_fast.kernels.trie_attention")
    question = [10, *[0] * 9, *[0, 0, 0, 3, 0, 0, 3, 0, 0, 3, 0, 0]]  # under its context; four answers of three tokens
    trie = forest([0] * 150 + [0, *question[1:]] + [3 + 10, *question[1:]] * 11)
    q, k = (torch.empty(len(trie.end_k), n, 64, device=device, dtype=torch.float16) for n in (2, 1))
    common = kernels._common(q, k, k, *index_tensors(trie, device), scale=1.0, window=0, softcap=0.0)
    own, planned = kernels._planned(kernel, common, None)
    visible = torch.tensor(trie.visible).repeat_interleave(2, 0)
    queries, keys = (range(0, n, plan[name]) for n, name in zip(visible.shape, ("BLOCK_M", "BLOCK_N"), strict=True))
    tiles = [[visible[i : i + queries.step, j : j + keys.step] for j in keys] for i in queries]
    seen = torch.tensor([[bool(tile.any()) for tile in row] for row in tiles])
    whole = torch.tensor([[bool(tile.all()) for tile in row] for row in tiles])
    if kernel == "backward_kv":
        seen, whole = seen.T, whole.T
    order, counts = plan["order"].cpu(), plan["counts"].cpu()
    assert own == len(seen) == len(counts)
    for i, (num_whole, num_partial) in enumerate(counts.tolist()):
        front, back = order[i, :num_whole].tolist(), order[i, plan["many"] - num_partial :].tolist()
        assert whole[i, front].all()
        assert set(seen[i].nonzero()[:, 0].tolist()) <= {*front, *back}
        assert len({*front, *back}) == num_whole + num_partial
    assert counts[:, 0].sum() > 0
    assert counts.sum() <= 1.1 * seen.sum()


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
    kernels = import_module("icl_ft_fast.kernels.target_logprob")
    monkeypatch.setattr(kernels, "_GRAD_BYTES", 1)
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
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
    """Rows of q, k and hidden that start past 2^31 elements of their tensors."""
    rows = 2**31 // (8 * 64) + 65
    q = torch.randn(rows, 8, 64, device="cuda", dtype=torch.float16)
    chains = torch.arange(rows, dtype=torch.int32, device="cuda")
    end = (chains // 64 + 1) * 64
    out = trie_attention(q, q, q, chains, end, chains, chains)
    last = slice(rows // 64 * 64 - 64, rows // 64 * 64)
    index = index_tensors(forest([0] * 64), "cuda")
    assert torch.equal(out[last], trie_attention(q[last], q[last], q[last], *index))


@NEEDS_GPU
@pytest.mark.gpu
def test_a_model_is_loaded_onto_the_gpu(llama_directory: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        assert load(llama_directory, dtype=dtype, device="cuda").device.type == "cuda"  # and has proved itself there
