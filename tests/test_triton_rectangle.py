"""The keys that every query sees, served apart by a dense engine and joined by log-sum-exp; engines are faked."""

import sys
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import test_trie_attention
import torch
from close import assert_close
from forests import Forest, forest, forests
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icl_ft_fast.engine.memory import live_bytes
from icl_ft_fast.ops import TreeIndex, reference, served_by, shared_keys

pytest.importorskip("triton")
from test_triton import device  # noqa: F401  # the fixture that puts the interpreted kernels in the CPU's place
from triton.backends.compiler import GPUTarget

from icl_ft_fast.ops.triton import rectangle, target_logprob, trie_attention
from icl_ft_fast.ops.triton.gpu import described

DEPTHS = [0] * 150 + [0, 0, 1, 0, 2, 0, 3] * 20  # pops: a context, then questions that branch


def shared_tree(trie: Forest, where: str) -> TreeIndex:
    """What is known of a chunk: the ancestors that all of its rows see, and the greatest depth."""
    tree = TreeIndex(*test_trie_attention.index_tensors(trie, where))
    num_cached = len(trie.end_k) - len(trie.row_q)
    return replace(tree, num_shared=shared_keys(tree.end_k, num_cached), max_depth=max(trie.depth_q, default=0))


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """An engine that serves whatever is shared, by the definition; the shapes that it met."""
    met: list[tuple[int, ...]] = []

    def serve(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        met.append((*q.shape[:1], *k.shape[:1]))
        return reference.rectangle(q, k, v, scale, softcap)

    monkeypatch.setitem(rectangle.ENGINES, "oracle", serve)
    monkeypatch.setattr(rectangle, "chosen", lambda q, v, softcap, shared: "oracle" if shared[1] > shared[0] else None)
    monkeypatch.setattr(test_trie_attention, "tree_index", shared_tree)
    return met


@settings(max_examples=100, deadline=None)
@given(trie=forests(contexts=(0, 9, 47)), window=st.none() | st.integers(1, 60))
def test_what_is_shared_is_what_every_query_sees(trie: Forest, window: int | None) -> None:
    if trie.row_q != list(range(len(trie.end_k) - len(trie.row_q), len(trie.end_k))):
        return  # no chunk behind its ancestors
    tree = shared_tree(trie, "cpu")
    first, last = tree.shared(window or 0)
    visible = test_trie_attention.visibility(trie, window)
    assert visible[:, first:last].all()
    if trie.row_q and window is None and 0 not in trie.end_k:
        num_cached = len(trie.end_k) - len(trie.row_q)
        assert last == visible[:, :num_cached].all(0).long().cumprod(0).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window": 100}, {"softcap": 2.0, "scale": 0.3}, {"sinks": True}, {"scale": -0.4}], ids=str
)
def test_the_rectangle_and_the_tree_are_joined(options: dict[str, Any], dtype, device, oracle) -> None:  # noqa: F811
    trie = forest(DEPTHS, start=150, stop=len(DEPTHS))
    test_trie_attention.check(trie, dtype, device, (2, 1), (40, 40), **options)
    assert oracle
    queries, keys = oracle[0]
    assert queries == len(trie.row_q)
    assert 0 < keys <= 150


def test_a_plan_meets_no_tile_inside_the_rectangle(device, oracle) -> None:  # noqa: F811
    trie = forest(DEPTHS, start=150, stop=len(DEPTHS))
    tree = shared_tree(trie, device)
    q, k = (torch.zeros(n, h, 64, device=device) for n, h in ((len(trie.row_q), 4), (len(trie.end_k), 2)))
    shared = tree.shared(0)
    plans = [
        trie_attention.trie_attention_plan(q, k, k, *tree.tensors(), 0, "forward", 0.0, *hints)
        for hints in ((0, 0), shared)
    ]
    listed = []
    for plan in plans:
        many = plan.shape[1] - 2
        rows = [[*row[: row[-2]], *row[many - row[-1] : many]] for row in plan.tolist()]
        listed.append({tile for row in rows for tile in row})
    common = trie_attention._common(q, k, k, *tree.tensors(), 1.0, 0, 0.0)
    size = trie_attention._chosen("forward", common)[1]["BLOCK_N"]
    inside = {n for n in range(len(trie.end_k) // size) if shared[0] <= n * size and (n + 1) * size <= shared[1]}
    assert inside
    assert inside <= listed[0]
    assert listed[1] == listed[0] - inside


@pytest.mark.parametrize(
    ("arch", "dtype", "installed", "expected"),
    [
        (90, torch.bfloat16, (), "cuDNN"),
        (90, torch.bfloat16, ("flash_attn.cute",), "flash-attn-4"),
        (90, torch.float32, ("flash_attn.cute",), None),
        (100, torch.float16, ("flash_attn.cute",), "flash-attn-4"),
        (100, torch.float16, (), None),
        (80, torch.float16, ("flash_attn.flash_attn_interface",), "flash-attn"),
        (89, torch.bfloat16, (), None),
    ],
)
def test_the_engine_of_a_gpu(arch, dtype, installed, expected, monkeypatch) -> None:
    monkeypatch.setattr(rectangle, "_has", lambda module: module in installed)
    assert rectangle.engine_of(described(GPUTarget("cuda", arch, 32), 232_448, 132), dtype) == expected


def test_small_rectangles_and_what_an_engine_lacks_stay_with_the_tree(monkeypatch) -> None:
    q, v, wide = (torch.empty(512, 32, size, dtype=torch.bfloat16, device="meta") for size in (128, 128, 256))
    assert rectangle.chosen(q, v, 0.0, (0, 9000)) is None  # no GPU
    monkeypatch.setattr(rectangle, "engine", lambda *_: "cuDNN")
    gains = [rectangle.gain_s("cuDNN", 512, keys, 32, 128, 2) for keys in range(4000)]
    least = next(keys for keys, gain in enumerate(gains) if gain > 0)
    assert 1500 < least < 3000
    assert rectangle.chosen(q, v, 0.0, (10, 10 + least)) == "cuDNN"
    assert rectangle.chosen(q, v, 0.0, (10, 9 + least)) is None
    assert rectangle.chosen(q, v, 0.0, (0, 0)) is None
    assert rectangle.chosen(q, v, 2.0, (0, 9000)) is None
    assert rectangle.chosen(wide, wide, 0.0, (0, 9000)) is None
    assert rectangle.chosen(q, wide, 0.0, (0, 9000)) is None
    monkeypatch.setattr(rectangle, "engine", lambda *_: "flash-attn")
    assert rectangle.chosen(wide, wide, 2.0, (0, 9000)) == "flash-attn"
    middle = torch.empty(512, 32, 192, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(rectangle, "engine", lambda *_: "flash-attn-4")
    for arch, expected in ((90, "flash-attn-4"), (100, None)):
        found = described(GPUTarget("cuda", arch, 32), 232_448, 132)
        monkeypatch.setattr(rectangle, "gpu", lambda _, found=found: found)
        assert rectangle.chosen(middle, middle, 0.0, (0, 9000)) == expected
        assert rectangle.chosen(wide, wide, 0.0, (0, 9000)) == "flash-attn-4"


def test_engines_are_called_as_they_are_declared(monkeypatch) -> None:
    """cuDNN by torch's own shapes; the packages by modules that record what they are given."""
    q, k = (torch.empty(n, h, 128, dtype=torch.bfloat16, device="meta") for n, h in ((512, 8), (4096, 2)))
    out, lse = rectangle.rectangle("cuDNN", q, k, k, 0.1, 0.0)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (512, 8), torch.float32)
    given: list[dict[str, Any]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
        given.append(options)
        assert q.shape == (1, 512, 8, 128)
        assert k.shape == v.shape == (1, 4096, 2, 128)
        results = (torch.empty_like(q), torch.empty(1, 8, 512, device="meta"))
        return results if "return_lse" in options else (*results, None)

    package, cute = ModuleType("flash_attn"), ModuleType("flash_attn.cute")
    package.flash_attn_func = cute.flash_attn_func = attention
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", cute)
    for name in ("flash-attn", "flash-attn-4"):
        out, lse = rectangle.rectangle(name, q, k, k, 0.1, 2.0)
        assert (out.shape, lse.shape, lse.is_contiguous()) == (q.shape, (512, 8), True)
    assert given == [
        {"softmax_scale": 0.1, "softcap": 2.0, "return_attn_probs": True},
        {"softmax_scale": 0.1, "softcap": 2.0, "return_lse": True},
    ]


class _Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


def test_what_a_forward_allocates_is_told_before(monkeypatch, oracle) -> None:
    """Memory is planned with it; counted here while launches do nothing, for few and for many rows and keys."""
    for module, kernels in (
        (trie_attention, ("_plan", "_forward", "_merge")),
        (target_logprob, ("_forward", "_finish")),
    ):
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, _Nothing())
    cpu, tightest = torch.device("cpu"), 0.0

    def told(results: int, call: Any, most: int) -> float:
        taken = live_bytes(call) - results
        assert taken <= most
        return taken / most

    for T, S, H, G, size, num_shared in (
        (1, 9000, 8, 2, 64, 0),
        (70, 9000, 8, 8, 128, 0),
        (300, 40_000, 16, 2, 80, 0),
        (2000, 3000, 8, 2, 64, 1000),
        (4000, 5000, 4, 4, 64, 0),
    ):
        q, k = torch.empty(T, H, size, dtype=torch.bfloat16), torch.empty(S, G, size, dtype=torch.bfloat16)
        index = [torch.zeros(n, dtype=torch.int32) for n in (T, S, T, S)]
        monkeypatch.setattr(rectangle, "engine", lambda *_, on=num_shared: "oracle" if on else None)
        monkeypatch.setitem(
            rectangle.ENGINES, "oracle", lambda q, *_: (torch.empty_like(q), q.new_empty(q.shape[:2]).float())
        )
        options = (None, 0.1, 0, 0.0, None, False, 0, num_shared)
        call = partial(trie_attention.trie_attention, q, k, k, *index, *options)
        for most in (T, 4 * T):  # a plan holds for fewer rows too
            bound = trie_attention.temporary_bytes(most, S, (H, G), (size, size), q.dtype, cpu)
            share = told(q.nbytes + 4 * T * H, call, bound)
            tightest = max(tightest, share if most == T else 0)
    assert tightest > 0.5
    for R, V in ((1, 50_000), (64, 50_000), (500, 128_000), (8192, 32_000)):
        hidden, weight = torch.empty(R, 64, dtype=torch.bfloat16), torch.empty(V, 64, dtype=torch.bfloat16)
        row = torch.zeros(R, dtype=torch.int32)
        call = partial(target_logprob.target_logprob, hidden, weight, row, row, None, 1.0, 0.0)
        told(9 * R, call, target_logprob.temporary_bytes(2 * R, 2, cpu))


def test_what_serves_a_device_has_a_name(monkeypatch) -> None:
    gpu = torch.device("cuda")
    assert [served_by(torch.device("cpu"), x) for x in (torch.bfloat16, torch.float64)] == ["C++", "PyTorch"]
    for engine, name in ((None, "Triton"), ("cuDNN", "Triton with cuDNN")):
        monkeypatch.setattr(rectangle, "engine", lambda *_, engine=engine: engine)
        assert served_by(gpu, torch.bfloat16) == name
    assert served_by(gpu, torch.float64) == "PyTorch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 511, 4096])
@pytest.mark.parametrize(("size", "group"), [(64, 1), (128, 4), (256, 8)])
@pytest.mark.parametrize(("name", "package"), [("flash-attn-4", "flash_attn.cute"), ("flash-attn", "flash_attn")])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_an_installed_package_is_the_definition(name, package, size, group, rows, softcap) -> None:
    if not rectangle._has(package):
        pytest.skip(f"{package} is not installed")
    _check_engine(name, size, group, rows, softcap)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 511, 4096])
@pytest.mark.parametrize(("size", "group"), [(64, 1), (128, 4), (128, 8)])
def test_cudnn_is_the_definition(size, group, rows) -> None:
    if rectangle.gpu(torch.device("cuda", 0)).matrix != "wgmma":
        pytest.skip("cuDNN is an engine of sm_90 alone")
    _check_engine("cuDNN", size, group, rows, 0.0)


def _check_engine(name: str, size: int, group: int, rows: int, softcap: float) -> None:
    """Within the budget, the lse to 1e-3, and the same bits twice."""
    torch.manual_seed(0)
    shapes = (rows, 8, size), (777, 8 // group, size), (777, 8 // group, size)
    q, k, v = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    out, lse = rectangle.rectangle(name, q, k, v, size**-0.5, softcap)
    exact, exact_lse = reference.rectangle(q.double(), k.double(), v.double(), size**-0.5, softcap)
    same, _ = reference.rectangle(q, k, v, size**-0.5, softcap)
    assert_close(out, same, exact, name)
    assert (lse - exact_lse).abs().max() <= 1e-3
    again, lse_again = rectangle.rectangle(name, q, k, v, size**-0.5, softcap)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)
