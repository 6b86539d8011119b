"""target_logprob and its gradients in Triton; what they must return is said in icl_ft_fast.ops.

A program takes a block of rows through a share of the vocabulary, tile by tile, with an online log-sum-exp; logits
never leave it. Targets are sorted by the tile they fall in, so each is picked out of the very logit that its row's
log-sum-exp has in it. The backward holds gradients of logits for as many columns as a byte budget allows, rounded to
the dtype of the factors they meet next. Sums are in float32, in an order
fixed by the shapes, without atomics. Knows torch and triton and nothing else.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from icl_ft_fast.ops.triton.gpu import Gpu, accumulator, gpu

_LOWEST = tl.constexpr(-3.4e38)  # finite: -inf - -inf would be nan where a bias rules a whole tile out
_PROGRAMS = 512  # row blocks times shares of the vocabulary: several for each multiprocessor of a large GPU
_GRAD_BYTES = 256 << 20  # gradients of logits held at a time
_SUM_TARGETS = 64


@triton.jit
def _product_tile(
    a,
    b,
    m,
    n,
    M,
    N,
    K,
    a_stride_m,
    a_stride_k,
    b_stride_n,
    b_stride_k,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows m and columns n, int64 vectors, of a @ b.T; 0 outside."""
    total = tl.zeros([m.shape[0], n.shape[0]], dtype)
    for step in range(tl.cdiv(K, BLOCK_K)):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
        a_block = tl.load(
            a + m[:, None] * a_stride_m + k[None, :] * a_stride_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
        )
        b_block = tl.load(
            b + n[:, None] * b_stride_n + k[None, :] * b_stride_k, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0
        )
        total = tl.dot(a_block, tl.trans(b_block), total, input_precision=PRECISION, out_dtype=dtype)
    return total


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    r,
    c,
    R,
    V,
    E,
    hidden_stride_r,
    hidden_stride_e,
    weight_stride_v,
    weight_stride_e,
    bias_stride,
    scale,
    softcap,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    dtype: tl.constexpr,
):
    """The logits of rows r and columns c."""
    logits = _product_tile(
        hidden,
        weight,
        r,
        c,
        R,
        V,
        E,
        hidden_stride_r,
        hidden_stride_e,
        weight_stride_v,
        weight_stride_e,
        BLOCK_E,
        PRECISION,
        dtype,
    )
    if bias is not None:
        logits += tl.load(bias + c * bias_stride, mask=c < V, other=0.0)[None, :]
    logits *= scale
    if SOFTCAP:
        logits = libdevice.tanh(logits / softcap) * softcap
    return logits


@triton.jit
def _forward(
    hidden,
    weight,
    bias,
    row,
    target,
    order,
    first_target,
    tops,
    totals,
    bests,
    picked,
    hidden_stride_r,
    hidden_stride_e,
    weight_stride_v,
    weight_stride_e,
    bias_stride,
    R,
    V,
    E,
    tiles,
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One block of rows, one share of the tiles; tops, totals, bests [shares, R], picked [M]."""
    block = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    dtype: tl.constexpr = tops.dtype.element_ty
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    top = tl.full([BLOCK_R], _LOWEST, dtype)
    total = tl.zeros([BLOCK_R], dtype)
    best = tl.zeros([BLOCK_R], tl.int32)
    first = share * tl.cdiv(tiles, tl.num_programs(1))
    for tile in range(first, tl.minimum(first + tl.cdiv(tiles, tl.num_programs(1)), tiles)):
        c = tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
        logits = _logits(
            hidden,
            weight,
            bias,
            r,
            c,
            R,
            V,
            E,
            hidden_stride_r,
            hidden_stride_e,
            weight_stride_v,
            weight_stride_e,
            bias_stride,
            scale,
            softcap,
            BLOCK_E,
            PRECISION,
            SOFTCAP,
            dtype,
        )
        logits = tl.where((c < V)[None, :], logits, float("-inf"))
        tile_top, tile_best = tl.max(logits, 1, return_indices=True)
        best = tl.where(tile_top > top, tile * BLOCK_V + tile_best, best)
        new_top = tl.maximum(top, tile_top)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
        top = new_top
        for i in range(tl.load(first_target + block * tiles + tile), tl.load(first_target + block * tiles + tile + 1)):
            m = tl.load(order + i)
            hit = (r == tl.load(row + m))[:, None] & (c == tl.load(target + m))[None, :]
            tl.store(picked + m, tl.sum(tl.where(hit, logits, 0.0)))
    at = share.to(tl.int64) * R + r
    tl.store(tops + at, top, mask=r < R)
    tl.store(totals + at, total, mask=r < R)
    tl.store(bests + at, best, mask=r < R)


@triton.jit
def _row_sums(values, row, order, first_target, sums, R, tiles, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of each row's targets' values, in the order of the targets' tiles."""
    block = tl.program_id(0).to(tl.int64)
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_R], sums.dtype.element_ty)
    stop = tl.load(first_target + (block + 1) * tiles)
    for start in range(tl.load(first_target + block * tiles), stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = tl.load(order + i, mask=i < stop, other=0)
        hit = tl.load(row + m, mask=i < stop, other=-1)[:, None] == r[None, :]
        total += tl.sum(tl.where(hit, tl.load(values + m, mask=i < stop, other=0.0)[:, None], 0.0), 0)
    tl.store(sums + r, total, mask=r < R)


@triton.jit
def _grad_logits(
    hidden,
    weight,
    bias,
    row,
    target,
    order,
    first_target,
    lse,
    share,
    grad_logp,
    grad,
    hidden_stride_r,
    hidden_stride_e,
    weight_stride_v,
    weight_stride_e,
    bias_stride,
    R,
    V,
    E,
    tiles,
    first_tile,
    width,
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """A tile of the gradients of hidden @ weight.T, into grad [R, width], whose first column is that of first_tile."""
    block = tl.program_id(0).to(tl.int64)
    tile = first_tile + tl.program_id(1)
    dtype: tl.constexpr = lse.dtype.element_ty
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tile * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    logits = _logits(
        hidden,
        weight,
        bias,
        r,
        c,
        R,
        V,
        E,
        hidden_stride_r,
        hidden_stride_e,
        weight_stride_v,
        weight_stride_e,
        bias_stride,
        scale,
        softcap,
        BLOCK_E,
        PRECISION,
        SOFTCAP,
        dtype,
    )
    inside = (r < R)[:, None] & (c < V)[None, :]
    row_lse = tl.load(lse + r, mask=r < R, other=0.0)
    values = tl.exp(logits - row_lse[:, None])
    values *= tl.load(share + r, mask=r < R, other=0.0)[:, None]
    for i in range(tl.load(first_target + block * tiles + tile), tl.load(first_target + block * tiles + tile + 1)):
        m = tl.load(order + i)
        hit = (r == tl.load(row + m))[:, None] & (c == tl.load(target + m))[None, :]
        values += tl.where(hit, tl.load(grad_logp + m), 0.0)
    if SOFTCAP:
        values *= 1 - (logits / softcap) * (logits / softcap)
    column = c - first_tile * BLOCK_V
    at = r[:, None] * width + column[None, :]
    tl.store(grad + at, (values * scale).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    a,
    b,
    out,
    M,
    N,
    K,
    a_stride_m,
    a_stride_k,
    b_stride_n,
    b_stride_k,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Sets out [M, N] to a @ b.T, or with ADD adds it."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _product_tile(
        a,
        b,
        m,
        n,
        M,
        N,
        K,
        a_stride_m,
        a_stride_k,
        b_stride_n,
        b_stride_k,
        BLOCK_K,
        PRECISION,
        dtype,
    )
    at = out + m[:, None] * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if ADD:
        total += tl.load(at, mask=inside, other=0.0)
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


class HeadBlocks(NamedTuple):
    """What a kernel is compiled for: rows and columns of a tile, elements of E at a time, how the GPU runs it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Columns of a tile and elements of E in 16 bits, by matrix unit: the most that registers hold.
_BLOCKS = {"wgmma": (128, 64), "tcgen05": (128, 32), "mma": (64, 64), "mfma": (128, 64)}


def blocks(itemsize: int, rows: int, found: Gpu) -> HeadBlocks:
    """The blocks on a GPU."""
    columns, depth = _BLOCKS[found.matrix] if itemsize == 2 else (64, 32)
    block_rows = 128 if itemsize == 2 and rows > 64 else 64
    stage_bytes = (block_rows + columns) * depth * itemsize
    stages = max(1, min(4, (found.shared_bytes - 4096) // stage_bytes))
    return HeadBlocks(block_rows, columns, depth, block_rows // 16, stages)


def num_shares(row_blocks: int, tiles: int) -> int:
    """Into how many parts the vocabulary of a forward is split."""
    return max(1, min(_PROGRAMS // row_blocks, tiles))


def _steps(R: int, V: int, itemsize: int, block: HeadBlocks) -> Iterator[slice]:
    """The columns whose gradients of logits are held together."""
    step = block.columns * max(1, _GRAD_BYTES // (R * block.columns * itemsize))
    return (slice(first, min(first + step, V)) for first in range(0, V, step))


class _HeadProblem:
    """What the kernels of one call share: the head's arguments by name, blocks, and targets sorted by tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        row: Tensor,
        target: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        (R, E), V = hidden.shape, len(weight)
        found = gpu(hidden.device)
        self.precision, self.blocks = found.precision, blocks(hidden.itemsize, R, found)
        self.row_blocks, self.tiles = triton.cdiv(R, self.blocks.rows), triton.cdiv(V, self.blocks.columns)
        inside = (row >= 0) & (row < R) & (target >= 0) & (target < V)
        place = row.long() // self.blocks.rows * self.tiles + target // self.blocks.columns
        places = self.row_blocks * self.tiles
        place, order = torch.where(inside, place, places).sort(stable=True)
        first_target = torch.searchsorted(place, torch.arange(places + 1, device=row.device))
        self.targets = {"row": row.contiguous(), "order": order, "first_target": first_target}
        self.sizes = {"R": R, "tiles": self.tiles, "BLOCK_R": self.blocks.rows}
        self.run = {"num_warps": self.blocks.num_warps, "num_stages": self.blocks.num_stages}
        self.arguments: dict[str, Any] = {
            **self.targets,
            **self.sizes,
            **self.run,
            "hidden": hidden,
            "weight": weight,
            "bias": bias,
            "target": target.contiguous(),
            "hidden_stride_r": hidden.stride(0),
            "hidden_stride_e": hidden.stride(1),
            "weight_stride_v": weight.stride(0),
            "weight_stride_e": weight.stride(1),
            "bias_stride": 0 if bias is None else bias.stride(0),
            "V": V,
            "E": E,
            "scale": scale,
            "softcap": softcap or 1.0,
            "BLOCK_V": self.blocks.columns,
            "BLOCK_E": self.blocks.depth,
            "PRECISION": self.precision,
            "SOFTCAP": softcap > 0,
        }


def target_logprob(
    hidden: Tensor,
    weight: Tensor,
    row: Tensor,
    target: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.target_logprob: logp [M], is_argmax [M], lse [R]."""
    R, dtype = len(hidden), accumulator(hidden.dtype)
    picked = hidden.new_full(row.shape, torch.nan, dtype=dtype)
    if not R:
        return picked, torch.empty_like(picked, dtype=torch.bool), picked.new_empty(0)
    with torch.cuda.device_of(hidden):
        head = _HeadProblem(hidden, weight, row, target, bias, scale, softcap)
        shares = num_shares(head.row_blocks, head.tiles)
        tops, totals = picked.new_empty(2, shares, R)
        bests = torch.empty_like(tops, dtype=torch.int32)
        _forward[(head.row_blocks, shares)](**head.arguments, tops=tops, totals=totals, bests=bests, picked=picked)
    lse = (tops + totals.log()).logsumexp(0)
    best = bests.gather(0, tops.argmax(0, keepdim=True))[0]  # of equal maxima the first, in each step
    row = row.clamp(0, R - 1)
    return picked - lse[row], (best[row] == target) & ~picked.isnan(), lse


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
    """Gradients of hidden, weight and bias; the last two are empty unless need_weight (and there is a bias)."""
    (R, E), V = hidden.shape, len(weight)
    grad_hidden = lse.new_zeros(R, E)
    grad_weight = weight.new_zeros((V, E) if need_weight else 0)
    grad_bias = weight.new_zeros(V if need_weight and bias is not None else 0)
    if not R:
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias
    with torch.cuda.device_of(hidden):
        head = _HeadProblem(hidden, weight, row, target, bias, scale, softcap)
        grad_logp, sums = grad_logp.contiguous(), torch.empty_like(lse)
        _row_sums[(head.row_blocks,)](values=grad_logp, **head.targets, sums=sums, **head.sizes, BLOCK=_SUM_TARGETS)
        share = grad_lse - sums
        block_columns = head.blocks.columns
        for columns in _steps(R, V, hidden.itemsize, head.blocks):
            weight_block = weight[columns]
            tiles = triton.cdiv(len(weight_block), block_columns)
            grad = hidden.new_empty(R, len(weight_block))
            _grad_logits[(head.row_blocks, tiles)](
                **head.arguments,
                lse=lse,
                share=share,
                grad_logp=grad_logp,
                grad=grad,
                first_tile=columns.start // block_columns,
                width=len(weight_block),
            )
            _multiply(grad, weight_block.T, grad_hidden, head, add=True)
            if need_weight:
                _multiply(grad.T, hidden.T, grad_weight[columns], head, add=False)
            if len(grad_bias):
                grad_bias[columns] = grad.sum(0, dtype=lse.dtype).to(weight.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _multiply(a: Tensor, b: Tensor, out: Tensor, head: _HeadProblem, *, add: bool) -> None:
    """Sets a contiguous out to a @ b.T, or adds it."""
    (M, K), N, block = a.shape, len(b), head.blocks
    _product[(triton.cdiv(M, block.rows), triton.cdiv(N, block.columns))](
        a,
        b,
        out,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        ADD=add,
        PRECISION=head.precision,
        dtype=tl.float64 if out.dtype == torch.float64 else tl.float32,
        BLOCK_M=block.rows,
        BLOCK_N=block.columns,
        BLOCK_K=block.depth,
        **head.run,
    )
