"""Every op in plain PyTorch: the definition of what a kernel must return and the oracle it is tested against.

Letters, here and everywhere: T rows of the trie, S rows of the KV stack, N questions, C choices, L layers, H query
heads, G key/value heads, D head size (Dv of the values), E model width, V vocabulary, R rows that need the output head,
M targets. A function has its op's name and its schema's arguments: window 0 and softcap 0.0 mean "none". Arguments are
taken as valid: icl_ft_fast.ops checks them. Everything is worked out in float32 (float64 for float64 inputs) from the
inputs as they are stored, in blocks, so that memory stays bounded. Knows torch and nothing else.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Result = TypeVar("Result")

_SCORES = 2 << 20  # attention scores held at a time: 8 MB in float32, and never less than a query row
_LOGIT_ROWS, _LOGIT_COLUMNS = 512, 4096  # logits held at a time: 8 MB in float32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op on `dtype` is worked out."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _literal(op: Callable[Concatenate[Tensor, P], Result]) -> Callable[Concatenate[Tensor, P], Result]:
    """`op` without autograd (gradients are ops too) and without autocast, which would round its matrix products."""

    @wraps(op)
    def call(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return op(first, *args, **kwargs)

    return call


def _exp(x: Tensor) -> Tensor:
    """exp, in place: torch's exp_ takes 10 to 30 times longer where it underflows or meets -inf, exp2_ never does."""
    return x.mul_(1 / math.log(2)).exp2_()


def _blocks(size: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover range(size)."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _hidden(row_q: Tensor, end_k: Tensor, depth_q: Tensor, depth_k: Tensor, window: int) -> Tensor:
    """Which keys (columns) a query (row) must not see, bool [T, S]."""
    row = row_q[:, None]
    hidden = (torch.arange(len(end_k), dtype=torch.int32, device=row.device) > row) | (row >= end_k)
    return hidden | (depth_q[:, None] - depth_k >= window) if window else hidden


def _scores(q: Tensor, k: Tensor, softcap: float) -> Tensor:
    """Attention scores of scaled queries, before the mask."""
    scores = q @ k.T
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _weights(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - top), in place, their sum with the sink's and top; scores [..., H, S], -inf where hidden.

    The sum is 0 where nothing is seen, else at least 1.
    """
    top = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top.clamp_(min=torch.finfo(scores.dtype).min)  # -inf - -inf would be nan in rows that see nothing
    weights = _exp(scores.sub_(top[..., None]))
    total = weights.sum(-1)
    if sinks is not None:
        total += (sinks - top).exp()
    return weights, total, top


@_literal
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
) -> tuple[Tensor, Tensor]:
    """ops.trie_attention: out [T, H, Dv], lse [T, H]. A row that sees no key has out 0 and lse -inf (or its sink)."""
    (T, H, _), (S, G, Dv), dtype = q.shape, v.shape, accumulator(q.dtype)
    out, lse = q.new_empty(T, H, Dv), q.new_empty(T, H, dtype=dtype)
    k, v = k.to(dtype), v.to(dtype)
    for rows in _blocks(T, max(1, _SCORES * G // max(1, S * H))):
        hidden = _hidden(row_q[rows], end_k, depth_q[rows], depth_k, window)[:, None]
        for g in range(G):
            heads = slice(g * H // G, (g + 1) * H // G)
            q_block = q[rows, heads].to(dtype) * scale
            scores = _scores(q_block.flatten(0, 1), k[:, g], softcap).view(*q_block.shape[:2], S)
            scores.masked_fill_(hidden, -torch.inf)
            weights, total, top = _weights(scores, None if sinks is None else sinks[heads])
            values = (weights.flatten(0, 1) @ v[:, g]).view(*total.shape, Dv)
            out[rows, heads] = (values / total.clamp(min=1)[..., None]).to(q.dtype)
            lse[rows, heads] = top + total.log()
    return out, lse


@_literal
def rectangle(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to every key: out [T, H, Dv], natural lse [T, H]; what a dense engine must return."""
    row, end = (torch.zeros(n, dtype=torch.int32, device=q.device) for n in (len(q), len(k)))
    return trie_attention(q, k, v, row + len(k), end + len(k) + 1, row, end, None, scale, 0, softcap)


@_literal
def trie_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_q: Tensor,
    end_k: Tensor,
    depth_q: Tensor,
    depth_k: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and delta = (grad_out * out).sum(-1), [T, H], in the dtype of lse.

    probability = exp(score - lse) and grad_score = probability * (grad_out @ v.T - delta + grad_lse). Probabilities are
    normalised anew: against the lse of a forward that rounds scores otherwise they would not sum to 1.
    """
    (T, H, D), (S, G, Dv), dtype = q.shape, v.shape, lse.dtype
    grad_q, grad_k, grad_v = q.new_empty(T, H, D), lse.new_zeros(G, S, D), lse.new_zeros(G, S, Dv)
    k, v, delta = k.to(dtype), v.to(dtype), (grad_out.to(dtype) * out).sum(-1)
    for rows in _blocks(T, max(1, _SCORES * G // max(1, S * H))):
        hidden = _hidden(row_q[rows], end_k, depth_q[rows], depth_k, window)[:, None]
        for g in range(G):
            heads = slice(g * H // G, (g + 1) * H // G)
            q_block = (q[rows, heads].to(dtype) * scale).flatten(0, 1)
            grad_block = grad_out[rows, heads].to(dtype).flatten(0, 1)
            scores = _scores(q_block, k[:, g], softcap)
            seen = scores.view(len(hidden), H // G, S).masked_fill(hidden, -torch.inf)
            weights, total, _ = _weights(seen, None if sinks is None else sinks[heads])
            p = weights.div_(total.clamp(min=1)[..., None]).flatten(0, 1)
            grad_v[g].addmm_(p.T, grad_block)
            grad_scores = (grad_block @ v[:, g].T).sub_((delta - grad_lse)[rows, heads].reshape(-1, 1)).mul_(p)
            if softcap:
                grad_scores *= 1 - (scores / softcap).square_()
            grad_k[g].addmm_(grad_scores.T, q_block)
            grad_q[rows, heads] = (grad_scores @ k[:, g]).mul_(scale).view(len(hidden), H // G, D).to(q.dtype)
    grad_k, grad_v = grad_k.transpose(0, 1).to(q.dtype), grad_v.transpose(0, 1).to(q.dtype)
    return grad_q, grad_k.contiguous(), grad_v.contiguous(), delta


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Logits: (hidden @ weight.T + bias) * scale, then softcap * tanh(logits / softcap)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits += bias
    if scale != 1:
        logits *= scale
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _within(row: Tensor, target: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a block of logits, bool [M], and where in it, flattened (0 for the others)."""
    inside = (row >= rows.start) & (row < rows.stop) & (target >= columns.start) & (target < columns.stop)
    index = (row - rows.start) * (columns.stop - columns.start) + target - columns.start
    return inside, torch.where(inside, index, 0)


@_literal
def target_logprob(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.target_logprob: logp [M], is_argmax [M], lse [R]. A row or target out of range has logp nan."""
    R, V, M, dtype = len(hidden), len(weight), len(row), accumulator(hidden.dtype)
    hidden, row, target = hidden.to(dtype), row.long(), target.long()
    picked = hidden.new_full((M,), torch.nan)
    top, total = hidden.new_full((R,), torch.finfo(dtype).min), hidden.new_zeros(R)
    argmax = torch.zeros_like(total, dtype=torch.int64)
    for columns in _blocks(V, _LOGIT_COLUMNS):
        weight_block, bias_block = weight[columns].to(dtype), None if bias is None else bias[columns].to(dtype)
        for rows in _blocks(R, _LOGIT_ROWS):
            logits = _logits(hidden[rows], weight_block, bias_block, scale, softcap)
            inside, index = _within(row, target, rows, columns)
            picked = torch.where(inside, logits.view(-1)[index], picked)
            block_top, block_argmax = logits.max(-1)
            argmax[rows] = torch.where(block_top > top[rows], block_argmax + columns.start, argmax[rows])
            new_top = torch.maximum(top[rows], block_top)
            total[rows] *= (top[rows] - new_top).exp()
            total[rows] += _exp(logits.sub_(new_top[:, None])).sum(-1)
            top[rows] = new_top
    lse, row = top + total.log(), row.clamp(0, max(0, R - 1))
    return picked - lse[row], (argmax[row] == target) & ~picked.isnan(), lse


@_literal
def target_logprob_backward(
    grad_logp: Tensor,
    grad_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; the last two are empty unless need_weight (and there is a bias).

    grad_logits = exp(logits - lse) * (grad_lse - sum of the row's grad_logp), plus grad_logp at its row and target.
    """
    R, V, dtype, out_dtype = len(hidden), len(weight), lse.dtype, hidden.dtype
    hidden, row, target = hidden.to(dtype), row.long(), target.long()
    share = grad_lse - torch.zeros_like(lse).index_add_(0, row, grad_logp)
    grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    grad_bias = weight.new_empty(V if need_weight and bias is not None else 0)
    for columns in _blocks(V, _LOGIT_COLUMNS):
        weight_block, bias_block = weight[columns].to(dtype), None if bias is None else bias[columns].to(dtype)
        weight_sum, bias_sum = torch.zeros_like(weight_block), lse.new_zeros(len(weight_block))
        for rows in _blocks(R, _LOGIT_ROWS):
            logits = _logits(hidden[rows], weight_block, bias_block, scale, softcap)
            grad = _exp(logits - lse[rows, None]).mul_(share[rows, None])
            inside, index = _within(row, target, rows, columns)
            grad.view(-1).index_add_(0, index, torch.where(inside, grad_logp, 0))
            if softcap:
                grad *= 1 - (logits / softcap).square_()
            if scale != 1:
                grad *= scale
            grad_hidden[rows].addmm_(grad, weight_block)
            if need_weight:
                weight_sum.addmm_(grad.T, hidden[rows])
            if len(grad_bias):
                bias_sum += grad.sum(0)
        if need_weight:
            grad_weight[columns] = weight_sum
        if len(grad_bias):
            grad_bias[columns] = bias_sum
    return grad_hidden.to(out_dtype), grad_weight, grad_bias


@_literal
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
    """Log-probabilities [M], and the gradient [R, E] of (target_weight * logp).sum() in hidden, in their dtype."""
    exact = hidden.to(accumulator(hidden.dtype))
    logp, _, lse = target_logprob(hidden, weight, row, target, bias, scale, softcap)
    given = (target_weight, torch.zeros_like(lse), exact, weight, row, target, bias, lse, scale, softcap, False)
    return logp, target_logprob_backward(*given)[0]
