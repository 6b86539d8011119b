"""The contract of trie_attention: arguments and checks, shapes of results, plans, gradients.

The function checks its arguments and hands them to the torch.library op of the same name, which torch dispatches on the
tensors' device (ops/dispatch.py). The autograd.Function sits outside the op, and the backward is an op too.
"""

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icl_ft_fast.ops import checks
from icl_ft_fast.ops.checks import FLOATS, check_invariant, check_softcap, check_tensors
from icl_ft_fast.ops.reference import accumulator


@dataclass(frozen=True, eq=False)
class TreeIndex:
    """Where queries and keys stand in the trie: query i sees key j if j <= row_q[i] < end_k[j].

    Args:
        row_q: the cache row of each query, int32 [T]: arange(s, s + T) for a chunk that follows s retained ancestors,
            the reserved rows in a decode step.
        end_k: first cache row after each key's subtree, int32 [S]; 0 in a row not filled yet, which nobody sees.
        depth_q: position of each query in its sequence in tokens, int32 [T]; read only with a window.
        depth_k: position of each key in its sequence in tokens, int32 [S]; read only if window or batch_invariant.
        num_shared: so many first keys, a path from the root, are seen by every query but for a window (see
            shared_keys); 0 if that is not known. Known on the host, it lets a GPU serve them by a dense kernel.
        max_depth: the greatest of depth_q; read only with num_shared and a window.
    """

    row_q: Tensor
    end_k: Tensor
    depth_q: Tensor
    depth_k: Tensor
    num_shared: int = 0
    max_depth: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four in the order of the ops' schemas."""
        return self.row_q, self.end_k, self.depth_q, self.depth_k

    def shared(self, window: int) -> tuple[int, int]:
        """The keys, from the first to before the last, that every query sees; window 0 for none."""
        first = max(0, self.max_depth - window + 1) if window else 0
        return (first, self.num_shared) if first < self.num_shared else (0, 0)


def shared_keys(end_k: Tensor, num_cached: int) -> int:
    """How many of the first keys every query of a chunk sees: its open ancestors that no row of it has left.

    Args:
        end_k: as in TreeIndex, of a chunk whose rows follow `num_cached` retained ancestors; on the host.
        num_cached: the rows before the chunk's.
    """
    return int((end_k[:num_cached] >= len(end_k)).sum())


@dataclass(frozen=True, eq=False)
class AttentionOptions:
    """What one layer's attention does beside softmax(q @ k.T) @ v.

    Args:
        scale: factor of the scores, None for D**-0.5.
        window: a query sees the last `window` tokens of its path, its own included; 1 to 2**31 - 1, None for all.
        softcap: bound of the scores' absolute values, above 0, applied after scale; None for none.
        sinks: a score for each head that takes part in the softmax unscaled and uncapped, floating point [H].
        batch_invariant: whether a query's bits must depend on nothing but the query and the keys, values and depths of
            its path, in path order: not on where in the cache they lie, nor on what lies between them (which must be
            finite), nor on the other queries.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    batch_invariant: bool = False


_DEFAULTS = AttentionOptions()


@overload
def trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: TreeIndex,
    options: AttentionOptions = _DEFAULTS,
    *,
    plans: dict[Any, Any] | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: TreeIndex,
    options: AttentionOptions = _DEFAULTS,
    *,
    plans: dict[Any, Any] | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: TreeIndex,
    options: AttentionOptions = _DEFAULTS,
    *,
    plans: dict[Any, Any] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of rows of a trie to the rows on their path, which lie on a stack of keys and values in pre-order.

        j, row = torch.arange(S), row_q[:, None]
        visible = (j <= row) & (row < end_k)
        if window: visible &= depth_q[:, None] - depth_k < window
        scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(H // G, 1)) * scale
        if softcap: scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -inf)
        lse = torch.cat([scores, sinks], -1).logsumexp(-1)  # sinks, if any: one more score a head, that has no value
        out = torch.einsum("hts,shd->thd", torch.exp(scores - lse[..., None]), v.repeat_interleave(H // G, 1))

    Args:
        q: queries, [T, H, D], float16, bfloat16, float32 or float64; any strides, here and below.
        k: keys, [S, G, D], the dtype of q. H is a multiple of G; query head h reads key/value head h // (H // G).
        v: values, [S, G, Dv], the dtype of q.
        tree: which queries see which keys.
        options: scale, window, soft-cap, sinks, and whether bits must not depend on the batch.
        plans: a dictionary, empty at first, that calls with the very same tensors in `tree` share: a GPU's kernels
            store in it which tiles they meet, so that a network's layers work that out once. None: every call does.
        return_lse: whether to return lse too.

    Returns:
        out: [T, H, Dv] in the dtype of q; 0 where a query sees no key.
        lse, if asked for: natural log of each softmax's denominator, sinks included, [T, H], float32 (float64 for
        float64); -inf, or the sink, where a query sees no key.

    Raises:
        TypeError: a tensor's dtype is not the one expected.
        ValueError: a shape, device or option is not the one expected.
        NotImplementedError: there is no implementation for the tensors' device, or no invariant one for their dtype.

    Numerics: worked out in float32 (float64 for float64) from the inputs as stored, autocast or not; deterministic;
    never waits for the device. Once differentiable in q, k, v and sinks, through out and lse; the backward recomputes
    the scores from lse and the rounded out. FLOPs, forward: at most 2 * T * S * H * (D + Dv), 2.5 times that backward.
    On a GPU, Triton serves all but float64, head sizes to 256; softmax weights and gradients of scores are rounded to
    16 bits before they meet 16-bit factors, and float32 products are made of six of bfloat16 on NVIDIA's.
    On the CPU, C++ serves float32 and bfloat16. There a query's bits, those of its gradient too, depend on its own q,
    on k, v and where on the stack it stands, not on the queries beside it; no bit depends on the number of threads; and
    where the processor multiplies bfloat16 itself, softmax weights and gradients of scores are rounded to it before
    they meet another factor, weights not if batch_invariant. The backward holds a float for each element of the
    gradients of q, k and v.
    """
    op, index = "trie_attention", (torch.int32,)
    if not isinstance(tree, TreeIndex):
        raise TypeError(f"{op}: tree expected a TreeIndex, got {type(tree).__name__}")
    if not isinstance(options, AttentionOptions):
        raise TypeError(f"{op}: options expected AttentionOptions, got {type(options).__name__}")
    scale, window, sinks = options.scale, options.window, options.sinks
    sizes = check_tensors(
        op,
        q=(q, "T H D", FLOATS),
        k=(k, "S G D", ()),
        v=(v, "S G Dv", ()),
        row_q=(tree.row_q, "T", index),
        end_k=(tree.end_k, "S", index),
        depth_q=(tree.depth_q, "T", index),
        depth_k=(tree.depth_k, "S", index),
        **({} if sinks is None else {"sinks": (sinks, "H", FLOATS)}),
    )
    if not sizes["G"] or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: q expected a multiple of the {sizes['G']} heads of k, got {sizes['H']} heads")
    if window is not None and not 0 < window < 2**31:
        raise ValueError(f"{op}: window expected None or 1 to 2**31 - 1, got {window}")
    if scale is None:
        scale = max(1, sizes["D"]) ** -0.5
    over = tree.tensors()
    if plans is not None and any(a is not b for a, b in zip(plans.setdefault("over", over), over, strict=True)):
        raise ValueError(f"{op}: plans expected to be shared by calls with the very same tensors in tree")
    if options.batch_invariant:
        check_invariant(op, q)
    sinks = None if sinks is None else sinks.to(accumulator(q.dtype))
    flat = (sinks, scale, window or 0, check_softcap(op, options.softcap), options.batch_invariant)
    # Where no gradient can be recorded, an autograd.Function would take as long as a decoding step's few rows.
    records = torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    attend = _TrieAttention.apply if records else _attend
    out, lse = attend(q, k, v, *over, *flat, tree.shared(window or 0), plans)
    return (out, lse) if return_lse else out


def fake_trie_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised results of the forward."""
    T, H, _D = q.shape
    return q.new_empty(T, H, v.shape[-1]), q.new_empty(T, H, dtype=accumulator(q.dtype))


def fake_trie_attention_plan(q: Tensor, *_: Any) -> Tensor:
    """A plan of a size that only its kernel knows."""
    new_size = torch.library.get_ctx().new_dynamic_size
    return q.new_empty(new_size(), new_size(), dtype=torch.int32)


def fake_trie_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Uninitialised results of the backward."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_lse.new_empty(grad_lse.shape)


def _is_planned(q: Tensor) -> bool:
    """Whether the kernels of a device and dtype walk over lists of tiles."""
    return q.device.type in checks.PLANNED and q.dtype != torch.float64


def _plan(
    plans: dict[Any, Any] | None, kernel: str, q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], *options: Any
) -> Tensor | None:
    """The plan of one kernel, made if `plans` has none yet; None where kernels have no use for one."""
    if plans is None or not _is_planned(q):
        return None
    window, *rest = options
    key = (kernel, *q.shape[1:], *v.shape[1:], q.dtype, *options)
    if key not in plans:
        plans[key] = torch.ops.icl_ft_fast.trie_attention_plan(q, k, v, *index, window, kernel, *rest)
    plan: Tensor = plans[key]
    return plan


def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *index, sinks, scale, window, softcap, batch_invariant, shared, plans = rest
    plan = _plan(plans, "forward", q, k, v, index, window, softcap, *shared)
    hints = shared if _is_planned(q) else ()
    out, lse = torch.ops.icl_ft_fast.trie_attention(
        q, k, v, *index, sinks, scale, window, softcap, plan, batch_invariant, *hints
    )
    return out, lse


class _TrieAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *index, sinks, scale, window, softcap, _batch_invariant, _shared, plans = rest
        out, lse = _attend(q, k, v, *rest)
        ctx.save_for_backward(q, k, v, out, lse, sinks, *index)
        ctx.options, ctx.plans = (scale, window, softcap), plans
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks, *index = ctx.saved_tensors
        window = ctx.options[1]
        plans = [_plan(ctx.plans, kernel, q, k, v, index, window) for kernel in ("backward_q", "backward_kv")]
        *grads, delta = torch.ops.icl_ft_fast.trie_attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, *index, sinks, *ctx.options, *plans
        )
        grad_sinks = None if sinks is None else -((sinks - lse).exp() * (delta - grad_lse)).sum(0)
        return *grads, None, None, None, None, grad_sinks, None, None, None, None, None, None
