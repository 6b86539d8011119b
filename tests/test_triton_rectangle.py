"""The keys that every query sees, served apart by a dense engine and joined by log-sum-exp; engines are faked."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import test_trie_attention
import torch
from forests import Forest, forest, forests
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icl_ft_fast.ops import TreeIndex, reference, shared_keys

pytest.importorskip("triton")
from test_triton import device  # noqa: F401  # the fixture that puts the interpreted kernels in the CPU's place
from triton.backends.compiler import GPUTarget

from icl_ft_fast.ops.triton import rectangle, trie_attention
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
    test_trie_attention.check(trie, dtype, device, (4, 2), (40, 40), **options)
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
    q, v, wide = (torch.empty(512, 4, size, dtype=torch.bfloat16, device="meta") for size in (128, 128, 256))
    assert rectangle.chosen(q, v, 0.0, (0, 4096)) is None  # no GPU
    monkeypatch.setattr(rectangle, "engine", lambda *_: "cuDNN")
    assert rectangle.chosen(q, v, 0.0, (10, 1034)) == "cuDNN"
    assert rectangle.chosen(q, v, 0.0, (10, 1033)) is None
    assert rectangle.chosen(q, v, 2.0, (0, 4096)) is None
    assert rectangle.chosen(wide, wide, 0.0, (0, 4096)) is None
    assert rectangle.chosen(q, wide, 0.0, (0, 4096)) is None
    monkeypatch.setattr(rectangle, "engine", lambda *_: "flash-attn")
    assert rectangle.chosen(wide, wide, 2.0, (0, 4096)) == "flash-attn"


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
