"""The ops on a CPU: hands tensors to the native code of csrc/ by DLPack; the only importer of it in this room.

The native code serves float32 and bfloat16. For float64, which exists to be exact, and float16 the definition serves.
Functions take their schema's arguments; ops/dispatch.py registers them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from icl_ft_fast import _C
from icl_ft_fast.ops import reference
from icl_ft_fast.ops.checks import NATIVE
from icl_ft_fast.ops.target_logprob import (
    fake_target_logprob,
    fake_target_logprob_backward,
    fake_target_logprob_sum,
)
from icl_ft_fast.ops.trie_attention import fake_trie_attention, fake_trie_attention_backward

_OPS: Any = _C  # lists of tensors are unpacked into its arguments, which no type checker follows
BEST_ISA = _C.best_isa()  # the processor's best instruction set, by its number in csrc/icl.h
_ISA = 0  # the instruction set that native code takes, by its number in csrc/icl.h; 0 is the best the processor has


def trie_attention(
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
    *_shared: int,
) -> tuple[Tensor, Tensor]:
    """The C++ kernel, which knows the two dtypes networks run in on a CPU; the others stay with the reference."""
    index, options = (row_q, end_k, depth_q, depth_k), (scale, window, softcap)
    if q.dtype not in NATIVE:
        return reference.trie_attention(q, k, v, *index, sinks, *options)
    out, lse = fake_trie_attention(q, k, v)
    capsules = [to_dlpack(x) for x in (q, k, v, *(x.contiguous() for x in index))]
    sink = None if sinks is None else to_dlpack(sinks.contiguous())
    _OPS.trie_attention(*capsules, sink, *options, batch_invariant, _ISA, to_dlpack(out), to_dlpack(lse))
    return out, lse


def trie_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The C++ kernel for the same two dtypes."""
    if q.dtype not in NATIVE:
        return reference.trie_attention_backward(grad_out, grad_lse, q, k, v, out, lse, *rest)
    *index, _sinks, scale, window, softcap = rest  # lse has the sinks in it
    grad_q, grad_k, grad_v, delta = grads = fake_trie_attention_backward(grad_out, grad_lse, q, k, v)
    capsules = [to_dlpack(x) for x in (q, k, v, *(x.contiguous() for x in index))]
    given = [to_dlpack(x) for x in (out.contiguous(), lse.contiguous(), grad_out, grad_lse.contiguous())]
    made = [to_dlpack(x) for x in (delta, grad_q, grad_k, grad_v)]
    _OPS.trie_attention_backward(*capsules, None, scale, window, softcap, _ISA, *given, *made)
    return grads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product x @ weight.T + bias of few rows x [R, E], see ops/linear.py."""
    out = x.new_empty(len(x), len(weight))
    _OPS.linear(to_dlpack(x), to_dlpack(weight), None if bias is None else to_dlpack(bias), _ISA, to_dlpack(out))
    return out


def target_logprob(
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
    if hidden.dtype not in NATIVE:
        return reference.target_logprob(hidden, weight, row, target, bias, scale, softcap)
    results = fake_target_logprob(hidden, weight, row)
    _OPS.target_logprob(
        to_dlpack(hidden),
        to_dlpack(weight),
        None if bias is None else to_dlpack(bias),
        to_dlpack(row.contiguous()),
        to_dlpack(target.contiguous()),
        scale,
        softcap,
        batch_invariant,
        _ISA,
        torch.get_num_threads(),
        *map(to_dlpack, results),
    )
    return results


def target_logprob_backward(
    grad_logp: Tensor, grad_lse: Tensor, hidden: Tensor, weight: Tensor, row: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """C++ for the same two dtypes."""
    inputs = (grad_logp, grad_lse, hidden, weight, row, target)
    if hidden.dtype not in NATIVE:
        return reference.target_logprob_backward(*inputs, *rest)
    bias, lse, scale, softcap, need_weight = rest
    grads = fake_target_logprob_backward(*inputs, *rest)
    index = [to_dlpack(x.contiguous()) for x in (row, target)]
    given = [to_dlpack(x.contiguous()) for x in (lse, grad_logp, grad_lse)]
    made = [to_dlpack(x) if i == 0 or (need_weight and len(x)) else None for i, x in enumerate(grads)]
    _OPS.target_logprob_backward(
        to_dlpack(hidden),
        to_dlpack(weight),
        None if bias is None else to_dlpack(bias),
        *index,
        scale,
        softcap,
        _ISA,
        torch.get_num_threads(),
        *given,
        *made,
    )
    return grads


def target_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    target_weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """C++ for the same two dtypes."""
    inputs = (hidden, weight, row, target, target_weight)
    if hidden.dtype not in NATIVE:
        return reference.target_logprob_sum(*inputs, bias, scale, softcap)
    results = fake_target_logprob_sum(*inputs)
    _OPS.target_logprob_sum(
        to_dlpack(hidden),
        to_dlpack(weight),
        None if bias is None else to_dlpack(bias),
        *(to_dlpack(x.contiguous()) for x in (row, target)),
        scale,
        softcap,
        _ISA,
        torch.get_num_threads(),
        to_dlpack(target_weight.contiguous()),
        *map(to_dlpack, results),
    )
    return results
