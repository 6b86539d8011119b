"""The contract of target_logprob: arguments and checks, shapes of results, gradients.

The function checks its arguments and hands them to the torch.library op of the same name, which torch dispatches on the
tensors' device (ops/dispatch.py). The autograd.Function sits outside the op, and the backward is an op too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icl_ft_fast.ops.checks import FLOATS, INTS, check_invariant, check_softcap, check_tensors
from icl_ft_fast.ops.reference import accumulator


def target_logprob(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
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
    _check(op, hidden, weight, row, target, bias)
    if batch_invariant:
        check_invariant(op, hidden)
    logp, is_argmax, lse = _TargetLogprob.apply(
        hidden, weight, row.int(), target.int(), bias, scale, check_softcap(op, softcap), batch_invariant
    )
    return logp, is_argmax, lse


def target_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    target_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The weighted sum of log-probabilities that a loss takes, whose gradient is made while the logits are there.

        logp, _, _ = target_logprob(hidden, weight, row, target, bias=bias, softcap=softcap, scale=scale)
        (target_weight * logp).sum()

    Args:
        hidden: the rows that need the head, [R, E]; this and the next six as target_logprob() takes them.
        weight: the head's weight, [V, E].
        row: the row of hidden each target follows, [M].
        target: token ids, [M].
        target_weight: each target's factor, [M], float32 (float64 for float64), which gets no gradient.
        bias: the head's bias, [V], or None.
        softcap: bound of the logits' absolute values, or None.
        scale: factor of the logits.

    Returns:
        The sum, a scalar of the dtype of target_weight.

    Raises:
        TypeError, ValueError, NotImplementedError: as target_logprob() does; target_weight needs a gradient.

    Numerics, memory and determinism are target_logprob()'s. FLOPs: where hidden alone needs a gradient, as behind a
    frozen head, the forward on a CPU makes it too, 4 * R * V * E, and keeps it, [R, E]; the backward only scales it.
    Otherwise, and on a GPU, those of target_logprob(), 6 * R * V * E or 8. Source: Liger Kernel (arXiv 2410.10989,
    section 3.2), whose loss keeps the head's gradients from the forward; that the maximum is followed is attention's.
    """
    op = "target_logprob_sum"
    _check(op, hidden, weight, row, target, bias)
    check_tensors(op, row=(row, "M", INTS), target_weight=(target_weight, "M", (accumulator(hidden.dtype),)))
    if target_weight.requires_grad:
        raise ValueError(f"{op}: target_weight expected no gradient, got requires_grad")
    learns = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if hidden.device.type == "cpu" and learns == [True, False, False]:
        given = (hidden, weight, row.int(), target.int(), target_weight, bias, scale, check_softcap(op, softcap))
        total: Tensor = _TargetLogprobSum.apply(*given)
        return total
    logp, _, _ = target_logprob(hidden, weight, row, target, bias=bias, softcap=softcap, scale=scale)
    return (target_weight * logp).sum()


def _check(op: str, hidden: Tensor, weight: Tensor, row: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """Raises unless shapes, dtypes and devices are those of target_logprob()."""
    sizes = check_tensors(
        op,
        hidden=(hidden, "R E", FLOATS),
        weight=(weight, "V E", ()),
        row=(row, "M", INTS),
        target=(target, "M", INTS),
        **({} if bias is None else {"bias": (bias, "V", ())}),
    )
    if not sizes["V"]:
        raise ValueError(f"{op}: weight expected at least one row, got {list(weight.shape)}")
    if sizes["M"] and not sizes["R"]:
        raise ValueError(f"{op}: hidden expected at least one row for {sizes['M']} targets, got {list(hidden.shape)}")


def fake_target_logprob(hidden: Tensor, weight: Tensor, row: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of the forward."""
    logp = hidden.new_empty(row.shape, dtype=accumulator(hidden.dtype))
    return logp, torch.empty_like(logp, dtype=torch.bool), logp.new_empty(hidden.shape[:1])


def fake_target_logprob_backward(
    grad_logp: Tensor, grad_lse: Tensor, hidden: Tensor, weight: Tensor, row: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of the backward."""
    bias, _lse, _scale, _softcap, need_weight = rest
    V, E = weight.shape
    grad_weight = weight.new_empty((V, E) if need_weight else (0,))
    return hidden.new_empty(hidden.shape), grad_weight, weight.new_empty(V if need_weight and bias is not None else 0)


def fake_target_logprob_sum(hidden: Tensor, weight: Tensor, row: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised results of the sum's op: log-probabilities and the gradient of hidden."""
    logp = hidden.new_empty(row.shape, dtype=accumulator(hidden.dtype))
    return logp, logp.new_empty(hidden.shape)


class _TargetLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, scale, softcap, batch_invariant = rest
        logp, is_argmax, lse = torch.ops.icl_ft_fast.target_logprob(
            hidden, weight, *tensors, scale, softcap, batch_invariant
        )
        ctx.save_for_backward(hidden, weight, *tensors, lse)
        ctx.options = scale, softcap
        ctx.mark_non_differentiable(is_argmax)
        return logp, is_argmax, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor, _: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        need_weight, need_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[4]
        grad_hidden, grad_weight, grad_bias = torch.ops.icl_ft_fast.target_logprob_backward(
            grad_logp, grad_lse, *ctx.saved_tensors, *ctx.options, need_weight or need_bias
        )
        grads = grad_hidden, grad_weight if need_weight else None, None, None, grad_bias if need_bias else None
        return *grads, None, None, None


class _TargetLogprobSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> Tensor:
        logp, grad_hidden = torch.ops.icl_ft_fast.target_logprob_sum(hidden, *rest)
        ctx.save_for_backward(grad_hidden)
        ctx.dtype = hidden.dtype
        total: Tensor = rest[3].dot(logp)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden * grad).to(ctx.dtype), None, None, None, None, None, None, None
