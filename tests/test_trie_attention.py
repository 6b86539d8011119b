"""trie_attention against a path-by-path attention in float64, itself against torch's own attention."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from close import assert_close, furthest
from forests import Forest, forest, forests
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from icl_ft_fast import _C
from icl_ft_fast.ops import AttentionOptions, TreeIndex, cpu, reference, trie_attention

ORDERS = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = {"scale": 0.3, "window": 3, "softcap": 2.0, "sinks": True}


# What this machine's CPU has, and the version that runs on any.
ISAS = {
    name: isa
    for name, isa in {"portable": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}.items()  # csrc/icl.h
    if isa <= _C.best_isa()
}


def force(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ISA", ISAS[isa])


@pytest.fixture(params=[f"cpu-{isa}" for isa in ISAS])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    device, _, isa = request.param.partition("-")
    force(isa, monkeypatch)
    return device


def index_tensors(trie: Forest, device: str) -> list[Tensor]:
    fields = (trie.row_q, trie.end_k, trie.depth_q, trie.depth_k)
    return [torch.tensor(field, dtype=torch.int32, device=device) for field in fields]


def tree_index(trie: Forest, device: str) -> TreeIndex:
    return TreeIndex(*index_tensors(trie, device))


def visibility(trie: Forest, window: int | None) -> Tensor:
    visible = torch.tensor(trie.visible, dtype=torch.bool).reshape(len(trie.row_q), len(trie.end_k))
    if window is not None:
        visible &= torch.tensor(trie.depth_q).reshape(-1, 1) - torch.tensor(trie.depth_k) < window
    return visible


def by_path(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, visible: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Each query alone with the keys it sees: no mask."""
    groups = q.shape[1] // k.shape[1]
    nothing = q[:0].sum(-1)
    outs, lses = [nothing[..., None].expand(-1, -1, v.shape[2])], [nothing]
    for query, row in zip(q, visible, strict=True):
        keys, values = (x[row].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("hd,shd->sh", query, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        lse = (scores if sinks is None else torch.cat([scores, sinks[None]])).logsumexp(0)
        outs.append(torch.einsum("sh,shd->hd", (scores - lse).exp(), values)[None])
        lses.append(lse[None])
    return torch.cat(outs), torch.cat(lses)


def masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    forward: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What one would write in PyTorch: a dense mask; the softmax's gradient by way of (grad_out * out).sum(-1).

    That is how every attention that keeps no scores does it. Autograd's own softmax rounds less, and holds all scores.
    `forward`, an lse [T, H] and an order of Dv, is another pass over the same numbers: a backward that adds scores anew
    does not sum them as its forward did, nor (grad_out * out) as grad_out @ v.T.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    blind = ~visible.any(-1, keepdim=True) & torch.tensor(sinks is None)
    scores = scores.masked_fill(~visible & ~blind, -torch.inf)
    column = q.new_full((q.shape[1],), -torch.inf) if sinks is None else sinks
    scores = torch.cat([scores, column[:, None, None].expand(-1, len(q), 1)], -1)
    lse = scores.logsumexp(-1)
    forward_lse, order = (lse.detach().T, torch.arange(v.shape[-1])) if forward is None else forward
    out = ((scores - forward_lse.T[..., None]).exp() * ~blind)[..., :-1] @ v
    out = out - (out.detach()[..., order] * (lse - lse.detach())[..., None])[..., order.argsort()]
    return out.transpose(0, 1), lse.masked_fill(blind.T, -torch.inf).T


def check(
    trie: Forest,
    dtype: torch.dtype,
    device: str = "cpu",
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (8, 8),
    layout: Callable[[Tensor], Tensor] = Tensor.clone,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    batch_invariant: bool = False,
) -> None:
    """out, lse and every gradient, of both outputs at once, within the error budget.

    What plain PyTorch is off by is taken from several orders of its sums: in a single one, the few numbers of a small
    case may all be right by luck.
    """
    T, S, (H, G), (D, Dv) = len(trie.row_q), len(trie.end_k), heads, sizes
    generator = torch.Generator().manual_seed(T + 1000 * S)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = [normal(T, H, D), normal(S, G, D), normal(S, G, Dv), *([normal(H)] if sinks else [])]
    grad_out, grad_lse = normal(T, H, Dv), normal(T, H)
    visible = visibility(trie, window)
    blind = ~visible.any(-1)
    if not sinks:
        grad_lse[blind] = 0  # the gradient of -inf

    def run(attention: Callable[..., Any], dtype: torch.dtype, device: str) -> list[Tensor]:
        leaves = [layout(x.to(device, dtype)).requires_grad_() for x in inputs]
        results = attention(*leaves)
        cotangents = [g.to(device, y.dtype) for g, y in zip((grad_out, grad_lse), results, strict=True)]
        grads = torch.autograd.grad(results, leaves, cotangents, allow_unused=True, materialize_grads=True)
        return [x.detach().cpu() for x in (*results, *grads)]

    def op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = AttentionOptions(scale, window, softcap, sinks, batch_invariant)
        return trie_attention(q, k, v, tree_index(trie, device), options, return_lse=True)

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        factor = D**-0.5 if scale is None else scale
        return lambda q, k, v, sinks=None: function(q, k, v, sinks, visible, factor, softcap)

    def shuffled(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """masked() with the components, and with them the terms of its sums, in another order."""
        order, order_v = (torch.randperm(size, generator=generator) for size in (D, Dv))
        out, lse = masked(q[..., order], k[..., order], v[..., order_v], *options)
        return out[..., order_v.argsort()], lse

    def recomputed(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """masked(), whose backward sums the scores anew in another order than its forward."""
        order, order_v = (torch.randperm(size, generator=generator) for size in (D, Dv))
        with torch.no_grad():
            lse = masked(q[..., order], k[..., order], v, *options)[1]
        return masked(q, k, v, *options, forward=(lse.masked_fill(lse.isneginf(), 0), order_v))

    results, exact = run(op, dtype, device), run(plain(by_path), torch.float64, "cpu")
    same = [run(plain(function), dtype, "cpu") for function in (masked, *[shuffled] * ORDERS)]
    # Only a gradient knows the difference: what the forward returns is normalised by its own sums.
    same += [[*same[0][:2], *run(plain(recomputed), dtype, "cpu")[2:]] for _ in range(ORDERS)]
    assert [x.dtype for x in results[:2]] == [dtype, torch.float64 if dtype == torch.float64 else torch.float32]
    names = ["out", "lse", "grad_q", "grad_k", "grad_v", "grad_sinks"]
    for kernel, exact64, name, *same_dtype in zip(results, exact, names, *same, strict=False):
        assert_close(kernel, furthest(same_dtype, exact64), exact64, name)


def bushy(rows: int) -> Forest:
    return forest(random.Random(rows).choices([0, 0, 0, 1, 2, 5, 99], k=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 300])
def test_odd_sizes(rows: int, dtype: torch.dtype, device: str) -> None:
    check(bushy(rows), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(7, 1), (40, 8), (64, 96), (80, 80), (128, 192), (256, 128)], ids=str)
def test_head_sizes(sizes: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    check(bushy(65), dtype, device, heads, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", [*EVERYTHING, "all"])
def test_options(option: str, dtype: torch.dtype, device: str) -> None:
    options = EVERYTHING if option == "all" else {option: EVERYTHING[option]}
    check(bushy(65), dtype, device, (8, 2), (40, 64), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_worked_out_in_float32(dtype: torch.dtype, device: str) -> None:
    trie, generator = bushy(65), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 65, 4, 64, generator=generator).to(dtype).unbind()
    out, lse = trie_attention(*(x.to(device) for x in (q, k, v)), tree_index(trie, device), return_lse=True)
    options = (None, visibility(trie, None), 0.125, None)
    same_out, same_lse = masked(q.float(), k.float(), v.float(), *options)
    exact_out, exact_lse = by_path(q.double(), k.double(), v.double(), *options)
    assert_close(lse.cpu(), same_lse, exact_lse, "lse")
    assert_close(out.cpu(), same_out.to(dtype), exact_out, "out")


@pytest.mark.parametrize("option", ["none", "all"])
def test_many_blocks_give_what_one_gives(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_SCORES", 1000)
    check(bushy(65), torch.float32, **(EVERYTHING if option == "all" else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["strided", "unaligned"])
def test_any_strides(layout: str, dtype: torch.dtype, device: str) -> None:
    check(bushy(64), dtype, device, layout={"strided": strided, "unaligned": unaligned}[layout])


def strided(x: Tensor) -> Tensor:
    """The same values, head first in memory and with gaps."""
    buffer = x.new_zeros(x.shape[1], x.shape[0] + 3, 2 * x.shape[2])
    view = buffer.transpose(0, 1)[3:, :, ::2]
    return view.copy_(x).detach()


def unaligned(x: Tensor) -> Tensor:
    """The same values, one element off where the allocator would have put them."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x).detach()


@settings(max_examples=100, deadline=None)
@given(
    isa=st.sampled_from(list(ISAS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    trie=forests(contexts=(0, 0, 47, 96, 200)),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 1), (6, 2)]),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.just(2.0),
    scale=st.none() | st.just(3.0),
    sinks=st.booleans(),
    batch_invariant=st.booleans(),
)
def test_any_forest(
    isa: str,
    dtype: torch.dtype,
    trie: Forest,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scale: float | None,
    sinks: bool,
    batch_invariant: bool,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        force(isa, patch)
        check(
            trie,
            dtype,
            heads=heads,
            window=window,
            softcap=softcap,
            scale=scale,
            sinks=sinks,
            batch_invariant=batch_invariant,
        )


@settings(max_examples=100, deadline=None)
@given(
    isa=st.sampled_from(list(ISAS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    trie=forests(contexts=(0, 47, 96, 200)),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]),
    window=st.none() | st.sampled_from([1, 6, 100]),
    softcap=st.none() | st.just(2.0),
    scale=st.sampled_from([0.3, 3.0, -1.0]),
    sinks=st.booleans(),
)
def test_an_invariant_query_has_the_bits_of_its_path_alone(
    isa: str,
    dtype: torch.dtype,
    trie: Forest,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
    scale: float,
    sinks: bool,
) -> None:
    """Each query with the keys of its path only, side by side on a stack of their own: the same bits.

    Scales are such that scores rise above the first one by far, and by little.
    """
    T, S, (H, G) = len(trie.row_q), len(trie.end_k), heads
    generator = torch.Generator().manual_seed(T + 1000 * S)
    q = torch.randn(T, H, 24, generator=generator).to(dtype)
    k, v = torch.randn(2, S, G, 24, generator=generator).to(dtype).unbind()
    sink = torch.randn(H, generator=generator) if sinks else None
    options = AttentionOptions(scale, window, softcap, sink, batch_invariant=True)
    tree = tree_index(trie, "cpu")
    with pytest.MonkeyPatch.context() as patch:
        force(isa, patch)
        out, lse = trie_attention(q, k, v, tree, options, return_lse=True)
        for i in range(0, T, 7):
            path = torch.tensor(trie.visible[i]).nonzero()[:, 0]
            index = (
                torch.tensor([len(path)]),
                torch.full((len(path),), len(path) + 1),
                tree.depth_q[i : i + 1],
                tree.depth_k[path],
            )
            alone_tree = TreeIndex(*(x.int() for x in index))
            alone = trie_attention(q[i : i + 1], k[path], v[path], alone_tree, options, return_lse=True)
            assert torch.equal(alone[0][0], out[i])
            assert torch.equal(alone[1][0], lse[i])


def test_what_cannot_be_invariant_is_refused() -> None:
    invariant = AttentionOptions(batch_invariant=True)
    tree = TreeIndex(*[torch.zeros(1, dtype=torch.int32)] * 4)
    for dtype in (torch.float64, torch.float16):
        q = torch.zeros(1, 1, 8, dtype=dtype)
        with pytest.raises(
            NotImplementedError, match=rf"^trie_attention: batch_invariant expected False for {dtype} on cpu"
        ):
            trie_attention(q, q, q, tree, invariant)
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 1, 8, device="cuda")
        tree = TreeIndex(*[torch.empty(1, dtype=torch.int32, device="cuda")] * 4)
        with pytest.raises(
            NotImplementedError, match=r"^trie_attention: batch_invariant expected False for torch.float32 on cu"
        ):
            trie_attention(q, q, q, tree, invariant)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_any_scale(scale: float, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(bushy(65), dtype, device, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_a_query_has_the_same_bits_in_any_company(window: int | None, dtype: torch.dtype, device: str) -> None:
    """Run again, on one thread, or with other queries beside it: nothing about a row changes but where it stands."""
    trie, generator = bushy(300), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 300, 4, 80, generator=generator).to(device, dtype).unbind()
    tree, options = tree_index(trie, device), AttentionOptions(window=window, softcap=window and 5.0)

    def results(rows: Tensor) -> tuple[Tensor, Tensor]:
        some = replace(tree, row_q=tree.row_q[rows], depth_q=tree.depth_q[rows])
        return trie_attention(q[rows], k, v, some, options, return_lse=True)

    out, lse = results(torch.arange(300))
    threads = torch.get_num_threads()
    for rows in (torch.arange(300), torch.arange(299, -1, -7), torch.tensor([150])):
        for torch_threads in (threads, 1):
            torch.set_num_threads(torch_threads)
            try:
                again = results(rows)
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(again[0], out[rows])
            assert torch.equal(again[1], lse[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 30])
def test_gradients_have_the_same_bits_on_any_number_of_threads(
    window: int | None, dtype: torch.dtype, device: str
) -> None:
    trie, generator = bushy(300), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(300, heads, 40, generator=generator).to(device, dtype) for heads in (4, 2, 2))
    leaves, threads, results = [x.requires_grad_() for x in (q, k, v)], torch.get_num_threads(), []
    for num_threads in (threads, threads, 1, 2, 5):  # each cuts the work in its own way
        torch.set_num_threads(num_threads)
        try:
            out = trie_attention(*leaves, tree_index(trie, device), AttentionOptions(window=window))
            results.append(torch.autograd.grad(out.square().sum(), leaves))
        finally:
            torch.set_num_threads(threads)
    for grads in results[1:]:
        assert all(map(torch.equal, grads, results[0]))


def test_an_instruction_set_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ISA", _C.best_isa() + 1)
    with pytest.raises(ValueError, match=r"^isa: expected 0 to "):
        check(bushy(3), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_is_causal_attention(dtype: torch.dtype, device: str) -> None:
    assert_equals_causal_attention([64], dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chains_side_by_side_are_packing(dtype: torch.dtype, device: str) -> None:
    assert_equals_causal_attention([1, 30, 65, 2], dtype, device)


def assert_equals_causal_attention(lengths: list[int], dtype: torch.dtype, device: str) -> None:
    q, k, v = torch.randn(3, sum(lengths), 4, 40, generator=torch.Generator().manual_seed(0), dtype=dtype).unbind()
    chains = forest([99 if i == 0 else 0 for length in lengths for i in range(length)])
    out = trie_attention(*(x.to(device) for x in (q, k, v)), tree_index(chains, device)).cpu()

    def per_chain(dtype: torch.dtype) -> Tensor:
        parts = zip(*(x.to(dtype).transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([scaled_dot_product_attention(*part, is_causal=True) for part in parts], 1).transpose(0, 1)

    assert_close(out, per_chain(dtype), per_chain(torch.float64))


def test_a_decode_step_queries_reserved_rows() -> None:
    """Two prompts of 2 and 3 tokens that reserved 2 rows each, of which the first is being filled now."""
    step = forest([0, 0, 0, 0, 99, 0, 0, 0, 0], queries=[2, 7], unfilled=[3, 8])
    assert (step.row_q, step.end_k) == ([2, 7], [4, 4, 4, 0, 9, 9, 9, 9, 0])
    assert [sum(row) for row in step.visible] == [3, 4]
    check(step, torch.float32)


@pytest.mark.parametrize("sink", [None, 0.5])
def test_a_query_that_sees_nothing_is_zero(sink: float | None, device: str) -> None:
    q, k = (torch.ones(n, 2, 8, device=device, requires_grad=True) for n in (2, 3))
    tree = tree_index(Forest([0, 2], [0, 0, 3], [0, 0], [0, 1, 0], []), device)
    sinks = None if sink is None else torch.full((2,), sink, device=device, requires_grad=True)
    out, lse = trie_attention(q, k, k, tree, AttentionOptions(sinks=sinks), return_lse=True)
    assert not out[0].any()
    assert lse[0].tolist() == [-torch.inf if sink is None else sink] * 2
    leaves = [q, k] if sinks is None else [q, k, sinks]
    grads = torch.autograd.grad(out.sum() + lse[1].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][0].any()


def test_an_empty_stack(device: str) -> None:
    q, k = (torch.ones(n, 2, 8, device=device, requires_grad=True) for n in (2, 0))
    tree = tree_index(Forest([0, 1], [], [0, 1], [], []), device)
    out, lse = trie_attention(q, k, k, tree, return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (q, k)))


def float64_inputs() -> tuple[list[Tensor], list[Tensor], Tensor]:
    trie = forest([0, 0, 1, 0, 2, 0, 99, 0], 3, unfilled=[4])
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(trie.row_q), 4, 3), (len(trie.end_k), 2, 3), (len(trie.end_k), 2, 5), (4,)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    return leaves[:3], index_tensors(trie, "cpu"), leaves[3]


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 1.5}, {"window": 3, "softcap": 2.0, "scale": 0.4}])
def test_gradients(options: dict[str, Any]) -> None:
    qkv, index, sinks = float64_inputs()

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return trie_attention(q, k, v, TreeIndex(*index), AttentionOptions(sinks=sinks, **options), return_lse=True)

    assert torch.autograd.gradcheck(attend, (*qkv, sinks))


def test_second_gradients_are_refused() -> None:
    qkv, index, _ = float64_inputs()
    (grad,) = torch.autograd.grad(trie_attention(*qkv, TreeIndex(*index)).square().sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_ops_are_registered_soundly() -> None:
    qkv, index, sinks = float64_inputs()
    q, k, v, sinks = (x.detach() for x in (*qkv, sinks))
    out, lse = torch.ops.icl_ft_fast.trie_attention(q, k, v, *index, sinks, 0.5, 3, 2.0)
    for given_sinks in (None, sinks):
        torch.library.opcheck(torch.ops.icl_ft_fast.trie_attention, (q, k, v, *index, given_sinks, 0.5, 3, 2.0))
    arguments = (torch.ones_like(out), lse, q, k, v, out, lse, *index, sinks, 0.5, 3, 2.0)
    torch.library.opcheck(torch.ops.icl_ft_fast.trie_attention_backward, arguments)


def test_autocast_changes_nothing() -> None:
    qkv, index, _ = float64_inputs()
    q, k, v = (x.detach().float().requires_grad_() for x in qkv)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = trie_attention(q, k, v, TreeIndex(*index))
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    assert all(map(torch.equal, *results))


def test_nothing_is_recorded_without_need() -> None:
    qkv, index, _ = float64_inputs()
    with torch.no_grad():
        assert not trie_attention(*qkv, TreeIndex(*index)).requires_grad
    assert trie_attention(*qkv, TreeIndex(*index)).requires_grad


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("q", None, TypeError),
        ("q", torch.zeros(5, 4, 3, dtype=torch.int32), TypeError),
        ("q", torch.zeros(5, 4), ValueError),
        ("q", torch.zeros(5, 3, 3), ValueError),
        ("k", torch.zeros(7, 2, 3, dtype=torch.float16), TypeError),
        ("k", torch.zeros(7, 2, 4), ValueError),
        ("v", torch.zeros(6, 2, 5), ValueError),
        ("v", torch.zeros(7, 1, 5), ValueError),
        ("row_q", torch.zeros(5, dtype=torch.int64), TypeError),
        ("row_q", torch.zeros(7, dtype=torch.int32), ValueError),
        ("end_k", torch.zeros(5, dtype=torch.int32), ValueError),
        ("end_k", torch.zeros(7, dtype=torch.int32, device="meta"), ValueError),
        ("depth_q", torch.zeros(7, dtype=torch.int32), ValueError),
        ("depth_k", torch.zeros(5, dtype=torch.int32), ValueError),
        ("sinks", torch.zeros(2), ValueError),
        ("sinks", torch.zeros(4, dtype=torch.int32), TypeError),
        ("window", 0, ValueError),
        ("softcap", 0.0, ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    index = {name: torch.zeros(n, dtype=torch.int32) for name, n in zip(("row_q", "depth_q"), (5, 5), strict=True)}
    index |= {name: torch.zeros(7, dtype=torch.int32) for name in ("end_k", "depth_k")}
    good = {"q": torch.zeros(5, 4, 3), "k": torch.zeros(7, 2, 3), "v": torch.zeros(7, 2, 5)}

    def attend(**given: Any) -> Tensor:
        tree = TreeIndex(**{name: given.pop(name) for name in index})
        qkv = [given.pop(name) for name in good]
        return trie_attention(*qkv, tree, AttentionOptions(**given))

    attend(**good, **index)
    with pytest.raises(error, match=f"^trie_attention: {name} expected .*, got"):
        attend(**{**good, **index, name: value})


def test_what_is_no_tree_and_no_options_is_named() -> None:
    q, index = torch.zeros(1, 1, 8), [torch.zeros(1, dtype=torch.int32)] * 4
    with pytest.raises(TypeError, match="tree expected a TreeIndex, got list"):
        trie_attention(q, q, q, index)
    with pytest.raises(TypeError, match="options expected AttentionOptions, got dict"):
        trie_attention(q, q, q, TreeIndex(*index), {"window": 3})


def test_a_device_without_an_implementation_is_refused() -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(5, 4, 8, device="xpu")
        tree = TreeIndex(*[torch.empty(5, dtype=torch.int32, device="xpu")] * 4)
        with pytest.raises(NotImplementedError, match=r"q expected on a device of type cpu.*, got xpu"):
            trie_attention(q, q, q, tree)
