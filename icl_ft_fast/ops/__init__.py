"""The ops: their contracts, schemas, fakes and gradients, and which module serves which device.

A facade checks its arguments and hands them to the torch.library op of the same name, which torch dispatches on the
tensors' device; the autograd.Function sits outside the op, and a backward is an op too. Imports the implementations
and knows nothing of models, tries or caches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

import icl_ft_fast._C as _C
from icl_ft_fast.ops import reference
from icl_ft_fast.ops.reference import accumulator

_DEVICES = ("cpu", "cuda")
_PLANNED = ("cuda",)  # where attention's kernels walk over lists of tiles
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NATIVE = (torch.float32, torch.bfloat16)  # what the C++ knows: the dtypes that networks run in on a CPU
_INTS = (torch.int32, torch.int64)
_ISA = 0  # the instruction set native code takes, by its number in csrc/icl.h; 0 is the best the processor has


def _check(op: str, **arguments: tuple[Tensor, str, tuple[torch.dtype, ...]]) -> dict[str, int]:
    """The size of each letter; raises unless sizes agree, dtypes fit (none: the first's) and one device serves all."""
    sizes: dict[str, int] = {}
    first: Tensor | None = None
    for name, (tensor, letters, dtypes) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} expected a tensor, got {type(tensor).__name__}")
        if first is None:
            first = tensor
            if tensor.device.type not in (*_DEVICES, "meta"):
                raise NotImplementedError(
                    f"{op}: {name} expected on a device of type {', '.join(_DEVICES)}, got {tensor.device}"
                )
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} expected on {first.device} like the other tensors, got {tensor.device}")
        if tensor.dtype not in (allowed := dtypes or (first.dtype,)):
            raise TypeError(f"{op}: {name} expected {' or '.join(map(str, allowed))}, got {tensor.dtype}")
        shape = dict(zip(letters.split(), tensor.shape, strict=False))
        if tensor.dim() != len(letters.split()) or any(sizes.get(letter, n) != n for letter, n in shape.items()):
            known = ", ".join(f"{letter} = {sizes[letter]}" for letter in letters.split() if letter in sizes)
            expected = f"[{', '.join(letters.split())}]{' with ' if known else ''}{known}"
            raise ValueError(f"{op}: {name} expected shape {expected}, got {list(tensor.shape)}")
        sizes.update(shape)
    return sizes


def _check_softcap(op: str, softcap: float | None) -> float:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap expected None or a number above 0, got {softcap}")
    return softcap or 0.0


def _check_invariant(op: str, tensor: Tensor) -> None:
    if tensor.device.type == "cuda" or tensor.dtype not in _NATIVE:
        raise NotImplementedError(
            f"{op}: batch_invariant expected False for {tensor.dtype} on {tensor.device}: only the CPU's C++, which "
            "serves float32 and bfloat16, keeps a row's bits apart from what is beside it"
        )


@dataclass(frozen=True, eq=False)
class TreeIndex:
    """Where queries and keys stand in the trie: query i sees key j if j <= row_q[i] < end_k[j].

    Args:
        row_q: the cache row of each query, int32 [T]: arange(s, s + T) for a chunk that follows s retained ancestors,
            the reserved rows in a decode step.
        end_k: first cache row after each key's subtree, int32 [S]; 0 in a row not filled yet, which nobody sees.
        depth_q: position of each query in its sequence in tokens, int32 [T]; read only with a window.
        depth_k: position of each key in its sequence in tokens, int32 [S]; read only if window or batch_invariant.
    """

    row_q: Tensor
    end_k: Tensor
    depth_q: Tensor
    depth_k: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four in the order of the ops' schemas."""
        return self.row_q, self.end_k, self.depth_q, self.depth_k


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
    sizes = _check(
        op,
        q=(q, "T H D", _FLOATS),
        k=(k, "S G D", ()),
        v=(v, "S G Dv", ()),
        row_q=(tree.row_q, "T", index),
        end_k=(tree.end_k, "S", index),
        depth_q=(tree.depth_q, "T", index),
        depth_k=(tree.depth_k, "S", index),
        **({} if sinks is None else {"sinks": (sinks, "H", _FLOATS)}),
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
        _check_invariant(op, q)
    sinks = None if sinks is None else sinks.to(accumulator(q.dtype))
    flat = (sinks, scale, window or 0, _check_softcap(op, options.softcap), options.batch_invariant)
    out, lse = _TrieAttention.apply(q, k, v, *over, *flat, plans)
    return (out, lse) if return_lse else out


def _plan(
    plans: dict[Any, Any] | None, kernel: str, q: Tensor, k: Tensor, v: Tensor, index: list[Tensor], window: int
) -> Tensor | None:
    """The plan of one kernel, made if `plans` has none yet; None where kernels have no use for one."""
    if plans is None or q.device.type not in _PLANNED or q.dtype == torch.float64:
        return None
    key = (kernel, *q.shape[1:], *v.shape[1:], q.dtype, window)
    if key not in plans:
        plans[key] = torch.ops.icl_ft_fast.trie_attention_plan(q, k, v, *index, window, kernel)
    plan: Tensor = plans[key]
    return plan


class _TrieAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *index, sinks, scale, window, softcap, batch_invariant, plans = rest
        plan = _plan(plans, "forward", q, k, v, index, window)
        out, lse = torch.ops.icl_ft_fast.trie_attention(
            q, k, v, *index, sinks, scale, window, softcap, plan, batch_invariant
        )
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
        return *grads, None, None, None, None, grad_sinks, None, None, None, None, None


def target_logprob(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    skip_below: float = 0.0,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of chosen next tokens under an output head whose logits are never held all at once.

        logits = (hidden @ weight.T + bias) * scale
        if softcap: logits = softcap * torch.tanh(logits / softcap)
        lse = logits.logsumexp(-1)
        logp = logits[row, target] - lse[row]
        is_argmax = logits.argmax(-1)[row] == target  # the first of equal maxima

    That order is transformers': scale is logit_scale in cohere and 1 / logits_scaling in granite, softcap is
    final_logit_softcapping in gemma2, bias is lm_head.bias in phi.

    Args:
        hidden: the rows that need the head, [R, E], float16, bfloat16, float32 or float64; any strides.
        weight: the head's weight, [V, E], the dtype of hidden, V at least 1.
        row: the row of hidden each target follows, 0 to R - 1, int32 or int64 [M], in any order.
        target: token ids, 0 to V - 1, int32 or int64 [M].
        bias: the head's bias, [V], the dtype of hidden; None for none.
        softcap: bound of the logits' absolute values, above 0; None for none.
        scale: factor of the logits.
        skip_below: 0 for exact gradients. Above, they are approximate: a GPU's backward leaves out tiles of rows and
            tokens that hold no target and no probability as large, and with them up to two thirds of its work. Cut
            Cross-Entropy (arXiv 2411.09009) takes 2**-12 for bfloat16, below which a probability is lost in a sum
            near 1; many such may matter together. The CPU leaves out nothing.
        batch_invariant: whether a row's bits must not depend on the number of rows.

    Returns:
        logp: natural-log probability of each target, [M], float32 (float64 for float64).
        is_argmax: whether the target is the row's most likely token, bool [M].
        lse: log of each row's sum of exponentials, [R], the dtype of logp.

    Raises:
        TypeError: a tensor's dtype is not the one expected.
        ValueError: a shape, device or option is not the one expected.
        NotImplementedError: there is no implementation for the tensors' device, or no invariant one for their dtype.

    Numerics: worked out in float32 (float64 for float64) from the inputs as stored, autocast or not; deterministic;
    never waits for the device, so values are not checked: a row or target out of range has logp nan. Once
    differentiable in hidden, weight and bias, through logp and lse; the backward recomputes the logits from lse.
    Memory beyond inputs and results: a block of logits and weights, whatever R and V. FLOPs: 2 * R * V * E forward,
    2 or 3 times that backward (without or with the weight's gradient). On a GPU, Triton serves all but float64; the
    backward holds 256 MiB of gradients of logits, rounded to the dtype of hidden, and float32 products are made
    of six of bfloat16 on NVIDIA's. On the CPU, C++ serves float32 and bfloat16, whose bits do not depend on the number
    of threads; its backward holds three floats for each element of hidden, refuses rows out of range (ValueError),
    takes probabilities below exp(-80) for 0 and, where the processor multiplies bfloat16 itself, rounds gradients of
    logits to it.
    """
    op = "target_logprob"
    sizes = _check(
        op,
        hidden=(hidden, "R E", _FLOATS),
        weight=(weight, "V E", ()),
        row=(row, "M", _INTS),
        target=(target, "M", _INTS),
        **({} if bias is None else {"bias": (bias, "V", ())}),
    )
    if not 0 <= skip_below < 1:
        raise ValueError(f"{op}: skip_below expected 0 or a probability, got {skip_below}")
    if not sizes["V"]:
        raise ValueError(f"{op}: weight expected at least one row, got {list(weight.shape)}")
    if sizes["M"] and not sizes["R"]:
        raise ValueError(f"{op}: hidden expected at least one row for {sizes['M']} targets, got {list(hidden.shape)}")
    if batch_invariant:
        _check_invariant(op, hidden)
    logp, is_argmax, lse = _TargetLogprob.apply(
        hidden, weight, row.int(), target.int(), bias, scale, _check_softcap(op, softcap), batch_invariant, skip_below
    )
    return logp, is_argmax, lse


class _TargetLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, scale, softcap, batch_invariant, skip_below = rest
        logp, is_argmax, lse = torch.ops.icl_ft_fast.target_logprob(
            hidden, weight, *tensors, scale, softcap, batch_invariant
        )
        ctx.save_for_backward(hidden, weight, *tensors, lse)
        ctx.options, ctx.skip_below = (scale, softcap), skip_below
        ctx.mark_non_differentiable(is_argmax)
        return logp, is_argmax, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        need_weight, need_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        grad_hidden, grad_weight, grad_bias = torch.ops.icl_ft_fast.target_logprob_backward(
            grad_logp, grad_lse, *ctx.saved_tensors, *ctx.options, need_weight or need_bias, ctx.skip_below
        )
        return (
            grad_hidden,
            grad_weight if need_weight else None,
            None,
            None,
            grad_bias if need_bias else None,
            None,
            None,
            None,
            None,
        )


def _fake_trie_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, H, _D = q.shape
    return q.new_empty(T, H, v.shape[-1]), q.new_empty(T, H, dtype=accumulator(q.dtype))


def _fake_trie_attention_plan(q: Tensor, *_: Any) -> Tensor:
    new_size = torch.library.get_ctx().new_dynamic_size  # only the kernel knows its tiles
    return q.new_empty(new_size(), new_size(), dtype=torch.int32)


def _fake_trie_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_lse.new_empty(grad_lse.shape)


def _fake_target_logprob(hidden: Tensor, weight: Tensor, row: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    logp = hidden.new_empty(row.shape, dtype=accumulator(hidden.dtype))
    return logp, torch.empty_like(logp, dtype=torch.bool), logp.new_empty(hidden.shape[:1])


def _fake_target_logprob_backward(
    grad_logp: Tensor, grad_lse: Tensor, hidden: Tensor, weight: Tensor, row: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    bias, _lse, _scale, _softcap, need_weight, *_ = rest
    V, E = weight.shape
    grad_weight = weight.new_empty((V, E) if need_weight else (0,))
    return hidden.new_empty(hidden.shape), grad_weight, weight.new_empty(V if need_weight and bias is not None else 0)


class _Memory:
    """A CPU tensor as numpy sees it. Tensor.numpy() would keep the storage from ever being resized, as FSDP does."""

    def __init__(self, tensor: Tensor) -> None:
        size, kind = tensor.itemsize, "f" if tensor.is_floating_point() and tensor.dtype != torch.bfloat16 else "i"
        self.tensor = tensor
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|b1" if tensor.dtype == torch.bool else f"<{kind}{size}",
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


def _array(tensor: Tensor) -> NDArray[Any]:
    """A CPU tensor's memory for native code, which checks its dtype, shape and strides; bfloat16 as bits in int16."""
    return np.asarray(_Memory(tensor))


def _cpu_target_logprob(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """C++ for float32 and bfloat16; for float64, which exists to be exact, and float16 the definition serves."""
    if hidden.dtype not in _NATIVE:
        return reference.target_logprob(hidden, weight, row, target, bias, scale, softcap)
    results = _fake_target_logprob(hidden, weight, row)
    _C.target_logprob(
        _array(hidden),
        _array(weight),
        None if bias is None else _array(bias),
        _array(row.contiguous()),
        _array(target.contiguous()),
        scale,
        softcap,
        batch_invariant,
        _ISA,
        torch.get_num_threads(),
        *map(_array, results),
    )
    return results


def _cpu_target_logprob_backward(
    grad_logp: Tensor, grad_lse: Tensor, hidden: Tensor, weight: Tensor, row: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """C++ for the same two dtypes."""
    inputs = (grad_logp, grad_lse, hidden, weight, row, target)
    if hidden.dtype not in _NATIVE:
        return reference.target_logprob_backward(*inputs, *rest)
    bias, lse, scale, softcap, need_weight, *_ = rest
    grads = _fake_target_logprob_backward(*inputs, *rest)
    index = [_array(x.contiguous()) for x in (row, target)]
    given = [_array(x.contiguous()) for x in (lse, grad_logp, grad_lse)]
    made = [_array(x) if i == 0 or (need_weight and len(x)) else None for i, x in enumerate(grads)]
    _C.target_logprob_backward(
        _array(hidden),
        _array(weight),
        None if bias is None else _array(bias),
        *index,
        scale,
        softcap,
        _ISA,
        torch.get_num_threads(),
        *given,
        *made,
    )
    return grads


def _cpu_trie_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_q: Tensor,
    end_k: Tensor,
    depth_q: Tensor,
    depth_k: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    _no_plan: None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """The C++ kernel, which knows the two dtypes networks run in on a CPU; the others stay with the reference."""
    index, options = (row_q, end_k, depth_q, depth_k), (scale, window, softcap)
    if q.dtype not in _NATIVE:
        return reference.trie_attention(q, k, v, *index, sinks, *options)
    out, lse = _fake_trie_attention(q, k, v)
    arrays = [_array(x) for x in (q, k, v, *(x.contiguous() for x in index))]
    sink_array = None if sinks is None else _array(sinks.contiguous())
    _C.trie_attention(*arrays, sink_array, *options, batch_invariant, _ISA, _array(out), _array(lse))
    return out, lse


def _cpu_trie_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The C++ kernel for the same two dtypes."""
    if q.dtype not in _NATIVE:
        return reference.trie_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *rest)
    *index, _sinks, scale, window, softcap = rest  # lse has the sinks in it
    grad_q, grad_k, grad_v, delta = grads = _fake_trie_attention_backward(grad_out, grad_lse, q, k, v)
    arrays = [_array(x) for x in (q, k, v, *(x.contiguous() for x in index))]
    given = [_array(x) for x in (out.contiguous(), lse.contiguous(), grad_out, grad_lse.contiguous())]
    made = [_array(x) for x in (delta, grad_q, grad_k, grad_v)]
    _C.trie_attention_backward(*arrays, None, scale, window, softcap, _ISA, *given, *made)
    return grads


def _triton(module: str, name: str) -> Callable[..., tuple[Tensor, ...]]:
    """The Triton kernels, loaded with the first CUDA tensor; float64, which exists to be exact, has the definition."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        exact = arguments[0].dtype == torch.float64
        served = reference if exact else import_module(f"icl_ft_fast.ops.triton.{module}")
        results: tuple[Tensor, ...] = getattr(served, name)(*arguments)
        return results

    return call


def _register(name: str, schema: str, fake: Callable[..., Any], **kernels: Callable[..., tuple[Tensor, ...]]) -> None:
    """Defines an op and registers each device's kernel, a function of the schema's arguments."""
    torch.library.define(f"icl_ft_fast::{name}", schema)
    torch.library.register_fake(f"icl_ft_fast::{name}", fake)
    for device, kernel in kernels.items():
        torch.library.impl(f"icl_ft_fast::{name}", device, kernel)


_TRIE = "Tensor row_q, Tensor end_k, Tensor depth_q, Tensor depth_k"
_register(
    "trie_attention",
    f"(Tensor q, Tensor k, Tensor v, {_TRIE}, Tensor? sinks, float scale, int window, float softcap,"
    " Tensor? plan=None, bool batch_invariant=False) -> (Tensor out, Tensor lse)",
    _fake_trie_attention,
    cpu=_cpu_trie_attention,
    cuda=_triton("trie_attention", "trie_attention"),
)
_register(
    "trie_attention_backward",
    f"(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TRIE}, Tensor? sinks,"
    " float scale, int window, float softcap, Tensor? plan_q=None, Tensor? plan_kv=None)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor delta)",
    _fake_trie_attention_backward,
    cpu=_cpu_trie_attention_backward,
    cuda=_triton("trie_attention", "trie_attention_backward"),
)
_register(
    "trie_attention_plan",
    f"(Tensor q, Tensor k, Tensor v, {_TRIE}, int window, str kernel) -> Tensor",
    _fake_trie_attention_plan,
    cuda=_triton("trie_attention", "trie_attention_plan"),
)
_register(
    "target_logprob",
    "(Tensor hidden, Tensor weight, Tensor row, Tensor target, Tensor? bias, float scale, float softcap,"
    " bool batch_invariant=False) -> (Tensor logp, Tensor is_argmax, Tensor lse)",
    _fake_target_logprob,
    cpu=_cpu_target_logprob,
    cuda=_triton("target_logprob", "target_logprob"),
)
_register(
    "target_logprob_backward",
    "(Tensor grad_logp, Tensor grad_lse, Tensor hidden, Tensor weight, Tensor row, Tensor target, Tensor? bias,"
    " Tensor lse, float scale, float softcap, bool need_weight, float skip_below=0.0)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _fake_target_logprob_backward,
    cpu=_cpu_target_logprob_backward,
    cuda=_triton("target_logprob", "target_logprob_backward"),
)
