"""target_logprob and its gradients in Triton; what they must return is said in icl_ft_fast.ops.

A program takes a block of rows through a share of the vocabulary, tile by tile, with an online log-sum-exp; logits
never leave it. The few logits of targets are made again beside it. The backward holds gradients of logits for as many
columns as a byte budget allows, rounded to the dtype of the factors they meet next. Sums are in float32, in an order
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
_GRAD_BYTES = 256 << 20  # gradients of logits held at a time
_ORDER_TARGETS = 64  # that are compared with as many others at a time
_FINISH_ROWS, _FINISH_STEP = 16, 512  # rows and targets of a program, and elements of E that are multiplied at a time
_GROUP_ROWS = 16  # row blocks whose programs are started together, so that the L2 cache holds their rows

# Of sizes that differ from chunk to chunk only costs compilations what the JIT would look at: whether they are 1 or
# multiples of 16. E and strides say how wide loads may be, and stay.
_jit = triton.jit(do_not_specialize=["R", "M", "tiles", "row_blocks", "shares", "first_tile", "width"])


@triton.jit
def _placed(row, target, m, M, R, V):
    """The rows of targets m; R, which sorts last, of those that are out of range."""
    r = tl.load(row + m, mask=m < M, other=R)
    t = tl.load(target + m, mask=m < M, other=-1)
    return tl.where((r >= 0) & (r < R) & (t >= 0) & (t < V), r, R)


@_jit
def _order(row, target, order, first_target, M, R, V, BLOCK: tl.constexpr):
    """The targets in range by row: those of row r are order[first_target[r]:first_target[r + 1]], in ascending order.

    Each is compared with all: for as many as there are rows that is nothing beside the head itself, and no atomics.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = _placed(row, target, i, M, R, V)
    place = tl.zeros([BLOCK], tl.int32)
    first = tl.zeros([BLOCK], tl.int32)
    for start in range(0, M, BLOCK):
        m = start + tl.arange(0, BLOCK)
        r = _placed(row, target, m, M, R, V)
        before = (r[None, :] < own[:, None]) | ((r[None, :] == own[:, None]) & (m[None, :] < i[:, None]))
        place += tl.sum(before.to(tl.int32), 1)
        first += tl.sum((r[None, :] < i[:, None]).to(tl.int32), 1)
    tl.store(order + place, i, mask=(i < M) & (own < R))
    tl.store(first_target + i, first, mask=i <= R)


@triton.jit
def _product_tile(
    total,
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
    """`total` plus the product of the tiles of a and b.T that begin at row m and column n, 64-bit scalars.

    Within a tile offsets have 32 bits, which the launcher sees to: registers hold no more.
    """
    rows, columns = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1])
    a += m * a_stride_m
    b += n * b_stride_n
    a_inside, b_inside = (rows < M - m)[:, None], (columns < N - n)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    a_at = rows[:, None] * a_stride_m + k * a_stride_k
    b_at = columns[:, None] * b_stride_n + k * b_stride_k
    for step in range(tl.cdiv(K, BLOCK_K)):
        first = tl.cast(step, tl.int64) * BLOCK_K
        inside = k < K - step * BLOCK_K
        a_block = tl.load(a + first * a_stride_k + a_at, mask=a_inside & inside, other=0.0)
        b_block = tl.load(b + first * b_stride_k + b_at, mask=b_inside & inside, other=0.0)
        total = tl.dot(a_block, tl.trans(b_block), total, input_precision=PRECISION, out_dtype=dtype)
    return total


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    row,
    column,
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
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    dtype: tl.constexpr,
):
    """The tile of logits that begins at a row and a column, 64-bit scalars."""
    logits = _product_tile(
        tl.zeros([BLOCK_R, BLOCK_V], dtype),
        hidden,
        weight,
        row,
        column,
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
        c = tl.arange(0, BLOCK_V)
        bias += column * bias_stride
        logits += tl.load(bias + c * bias_stride, mask=c < V - column, other=0.0)[None, :]
    logits *= scale
    if SOFTCAP:
        logits = libdevice.tanh(logits / softcap) * softcap
    return logits


@triton.jit
def _program(row_blocks, shares, GROUP: tl.constexpr):
    """Block of rows and share of this program: GROUP blocks after each other take the same share, then the next one."""
    program = tl.program_id(0)
    group = program // (GROUP * shares)
    size = tl.minimum(GROUP, row_blocks - group * GROUP)
    within = program - group * GROUP * shares
    return (group * GROUP + within % size).to(tl.int64), within // size


@triton.jit
def _target(row_first, row_many, j, order, target):
    """Number j of the targets of each row: which it is, and its token; -1 where a row has not so many."""
    m = tl.load(order + row_first + j, mask=j < row_many, other=0)
    return m, tl.load(target + m, mask=j < row_many, other=-1)


@_jit
def _forward(
    hidden,
    weight,
    bias,
    tops,
    totals,
    bests,
    hidden_stride_r,
    hidden_stride_e,
    weight_stride_v,
    weight_stride_e,
    bias_stride,
    R,
    V,
    E,
    tiles,
    row_blocks,
    shares,
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """One block of rows, one share of the tiles; tops, totals, bests [shares, R].

    SKIPS: not for tcgen05, where Triton 3.7.1 cannot compile a branch on what it reduces of a product's rows.
    """
    block, share = _program(row_blocks, shares, GROUP)
    dtype: tl.constexpr = tops.dtype.element_ty
    top = tl.full([BLOCK_R], _LOWEST, dtype)
    total = tl.zeros([BLOCK_R], dtype)
    best = tl.zeros([BLOCK_R], tl.int32)
    first = share * tl.cdiv(tiles, shares)
    for tile in range(first, tl.minimum(first + tl.cdiv(tiles, shares), tiles)):
        first_column = tl.cast(tile, tl.int64) * BLOCK_V
        logits = _logits(
            hidden,
            weight,
            bias,
            block * BLOCK_R,
            first_column,
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
            BLOCK_R,
            BLOCK_V,
            BLOCK_E,
            PRECISION,
            SOFTCAP,
            dtype,
        )
        columns = tl.arange(0, BLOCK_V)[None, :]
        logits = tl.where(columns < V - tile * BLOCK_V, logits, float("-inf"))
        tile_top = tl.max(logits, 1)
        rises = 1
        if SKIPS:  # maxima rise ever more rarely
            rises = tl.max((tile_top > top).to(tl.int32), 0)
        if rises > 0:
            first_best = tl.min(tl.where(logits == tile_top[:, None], columns, BLOCK_V), 1)
            best = tl.where(tile_top > top, tile * BLOCK_V + first_best, best)
        new_top = tl.maximum(top, tile_top)
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top[:, None]), 1)
        top = new_top
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    at = share.to(tl.int64) * R + r
    tl.store(tops + at, top, mask=r < R)
    tl.store(totals + at, total, mask=r < R)
    tl.store(bests + at, best, mask=r < R)


@triton.jit
def _joined(tops, totals, bests, r, inside, R, shares, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Log-sum-exp and arg-max of rows r, from those of the shares; of equal maxima the first."""
    top = tl.full([BLOCK], _LOWEST, dtype)
    best = tl.zeros([BLOCK], tl.int32)
    for share in range(shares):
        at = tl.cast(share, tl.int64) * R + r
        value = tl.load(tops + at, mask=inside, other=_LOWEST)
        best = tl.where(value > top, tl.load(bests + at, mask=inside, other=0), best)
        top = tl.maximum(top, value)
    total = tl.zeros([BLOCK], dtype)
    for share in range(shares):
        at = tl.cast(share, tl.int64) * R + r
        value = tl.load(tops + at, mask=inside, other=_LOWEST)
        total += tl.load(totals + at, mask=inside, other=0.0) * tl.exp(value - top)
    return top + tl.log(tl.where(inside, total, 1.0)), best


@_jit
def _finish(
    hidden,
    weight,
    bias,
    row,
    target,
    tops,
    totals,
    bests,
    logp,
    is_argmax,
    lse,
    hidden_stride_r,
    hidden_stride_e,
    weight_stride_v,
    weight_stride_e,
    bias_stride,
    R,
    V,
    E,
    M,
    shares,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The log-sum-exp of some rows, from the shares of the vocabulary, and the results of some targets.

    A target's logit is one product of a row and a weight, made here: picked out of the tiles of all logits it would
    cost registers there.
    """
    dtype: tl.constexpr = tops.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_lse, _ = _joined(tops, totals, bests, i, i < R, R, shares, dtype, BLOCK)
    tl.store(lse + i, row_lse, mask=i < R)
    r = _placed(row, target, i, M, R, V).to(tl.int64)
    inside = r < R
    token = tl.load(target + i, mask=inside, other=0).to(tl.int64)
    products = tl.zeros([BLOCK, STEP], dtype)
    for start in range(0, E, STEP):
        e = start + tl.arange(0, STEP)[None, :]
        mask = inside[:, None] & (e < E)
        a = tl.load(hidden + r[:, None] * hidden_stride_r + e.to(tl.int64) * hidden_stride_e, mask=mask, other=0.0)
        b = tl.load(weight + token[:, None] * weight_stride_v + e.to(tl.int64) * weight_stride_e, mask=mask, other=0.0)
        products += a.to(dtype) * b.to(dtype)
    logits = tl.sum(products, 1)
    if bias is not None:
        logits += tl.load(bias + token * bias_stride, mask=inside, other=0.0)
    logits *= scale
    if SOFTCAP:
        logits = libdevice.tanh(logits / softcap) * softcap
    row_lse, best = _joined(tops, totals, bests, r, inside, R, shares, dtype, BLOCK)
    value = logits - row_lse
    value = tl.where(value > 0, 0.0, value)  # where a token is all but certain its logit may be rounded above the sum
    tl.store(logp + i, tl.where(inside, value, float("nan")), mask=i < M)
    tl.store(is_argmax + i, inside & (best == token) & (value == value), mask=i < M)


@_jit
def _grad_logits(
    hidden,
    weight,
    bias,
    target,
    order,
    first_target,
    lse,
    grad_lse,
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
    row_blocks,
    shares,
    first_tile,
    width,
    scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """A tile of the gradients of hidden @ weight.T, into grad [R, width], whose first column is that of first_tile."""
    block, tile = _program(row_blocks, shares, GROUP)
    tile += first_tile
    dtype: tl.constexpr = lse.dtype.element_ty
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_V)[None, :]
    logits = _logits(
        hidden,
        weight,
        bias,
        block * BLOCK_R,
        tl.cast(tile, tl.int64) * BLOCK_V,
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
        BLOCK_R,
        BLOCK_V,
        BLOCK_E,
        PRECISION,
        SOFTCAP,
        dtype,
    )
    row_lse = tl.load(lse + r, mask=r < R, other=0.0)
    row_first = tl.load(first_target + r, mask=r < R, other=0)
    row_many = tl.load(first_target + r + 1, mask=r < R, other=0) - row_first
    most = tl.max(row_many, 0)
    share = tl.load(grad_lse + r, mask=r < R, other=0.0)
    for j in range(most):
        m, _ = _target(row_first, row_many, j, order, target)
        share -= tl.load(grad_logp + m, mask=j < row_many, other=0.0)
    values = tl.exp(logits - row_lse[:, None]) * share[:, None]
    for j in range(most):
        m, token = _target(row_first, row_many, j, order, target)
        added = tl.load(grad_logp + m, mask=j < row_many, other=0.0)
        values += tl.where((token - tile * BLOCK_V)[:, None] == columns, added[:, None], 0.0)
    if SOFTCAP:
        values *= 1 - (logits / softcap) * (logits / softcap)
    rows = tl.arange(0, BLOCK_R)[:, None]
    grad += block * BLOCK_R * width + (tile - first_tile) * BLOCK_V
    inside = (rows < R - block * BLOCK_R) & (columns < V - tile * BLOCK_V)
    tl.store(grad + rows * width + columns, (values * scale).to(grad.dtype.element_ty), mask=inside)


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
    row_blocks,
    shares,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Sets out [M, N] to a @ b.T, or with ADD adds it."""
    block, column = _program(row_blocks, shares, GROUP)
    m, n = block * BLOCK_M, column.to(tl.int64) * BLOCK_N
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    at = out + m * N + n + rows * N + columns
    inside = (rows < M - m) & (columns < N - n)
    total = tl.load(at, mask=inside, other=0.0).to(dtype) if ADD else tl.zeros([BLOCK_M, BLOCK_N], dtype)
    total = _product_tile(
        total, a, b, m, n, M, N, K, a_stride_m, a_stride_k, b_stride_n, b_stride_k, BLOCK_K, PRECISION, dtype
    )
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


class HeadBlocks(NamedTuple):
    """What a kernel is compiled for: rows and columns of a tile, elements of E at a time, how the GPU runs it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


# Columns of a tile and elements of E in 16 bits, by matrix unit: the most that registers hold of logits alone, beside a
# soft-cap, and beside gradients.
_BLOCKS = {
    "wgmma": {"logits": (256, 64), "softcap": (128, 64), "gradients": (128, 64)},
    "tcgen05": {"logits": (128, 32), "softcap": (128, 32), "gradients": (64, 32)},
    "mma": {"logits": (64, 64), "softcap": (64, 64), "gradients": (64, 32)},
    "mfma": {"logits": (128, 64), "softcap": (128, 64), "gradients": (128, 64)},
}


def blocks(itemsize: int, rows: int, found: Gpu, *, holding: str = "logits") -> HeadBlocks:
    """The blocks of a kernel on a GPU whose registers hold "logits", and with them a "softcap" or "gradients"."""
    columns, depth = _BLOCKS[found.matrix][holding] if itemsize == 2 else (64, 32)
    block_rows = 128 if itemsize == 2 and rows > 64 else 64
    stage_bytes = (block_rows + columns) * depth * itemsize
    stages = max(1, min(4, (found.shared_bytes - 4096) // stage_bytes))
    return HeadBlocks(block_rows, columns, depth, 8 if columns > 128 else block_rows // 16, stages)


def num_shares(row_blocks: int, tiles: int, found: Gpu) -> int:
    """Into how many parts the vocabulary of a forward is split.

    At least so many that the programs which run at a time have but _GROUP_ROWS blocks of rows, and of those the fewest
    whose time, in tiles of the program that is busy longest, is within a tenth of the shortest.
    """
    least = min(tiles, max(1, found.multiprocessors // min(row_blocks, _GROUP_ROWS)))

    def time(shares: int) -> int:
        return -(-row_blocks * shares // found.multiprocessors) * -(-tiles // shares)

    choices = range(least, min(tiles, 4 * least) + 1)
    shortest = min(map(time, choices))
    return next(shares for shares in choices if time(shares) <= 1.1 * shortest)


def temporary_bytes(num_rows: int, itemsize: int, device: torch.device) -> int:
    """The most that a forward of so many rows or fewer allocates beside its results: what each share of V found."""
    found = gpu(device)
    shared = max(found.multiprocessors * blocks(itemsize, num_rows, found).rows, num_rows) * 4
    return 12 * max(shared, 4 * num_rows * -(-found.multiprocessors // _GROUP_ROWS))


def _steps(R: int, V: int, itemsize: int, block: HeadBlocks) -> Iterator[slice]:
    """The columns whose gradients of logits are held together."""
    step = block.columns * max(1, _GRAD_BYTES // (R * block.columns * itemsize))
    return (slice(first, min(first + step, V)) for first in range(0, V, step))


def _near(x: Tensor, rows: int) -> Tensor:
    """The same values, with rows so near that 32 bits hold the offsets in a tile of so many."""
    return x if rows * x.stride(0) + x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


class _HeadProblem:
    """What the kernels of one call share: the head's arguments by name, blocks, and targets in order of their rows."""

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
        (R, E), V, M = hidden.shape, len(weight), len(row)
        self.gpu = gpu(hidden.device)
        self.blocks = blocks(hidden.itemsize, R, self.gpu, holding="softcap" if softcap > 0 else "logits")
        self.row, self.target, self.num_targets = row.contiguous(), target.contiguous(), M
        hidden, weight = _near(hidden, self.blocks.rows), _near(weight, self.blocks.columns)
        self.arguments: dict[str, Any] = {
            "hidden": hidden,
            "weight": weight,
            "bias": bias,
            "hidden_stride_r": hidden.stride(0),
            "hidden_stride_e": hidden.stride(1),
            "weight_stride_v": weight.stride(0),
            "weight_stride_e": weight.stride(1),
            "bias_stride": 0 if bias is None else bias.stride(0),
            "R": R,
            "V": V,
            "E": E,
            "scale": scale,
            "softcap": softcap or 1.0,
            "SOFTCAP": softcap > 0,
        }

    def tiles(self, block: HeadBlocks, rows: int, columns: int) -> tuple[int, dict[str, Any]]:
        """How many columns of tiles there are in so many columns, and what a kernel takes that walks over tiles."""
        run = {"num_warps": block.num_warps, "num_stages": block.num_stages, "PRECISION": self.gpu.precision}
        order = {"row_blocks": triton.cdiv(rows, block.rows), "GROUP": _GROUP_ROWS}
        return triton.cdiv(columns, block.columns), {**run, **order}

    def order(self) -> dict[str, Tensor]:
        """The targets by row, see _order."""
        R, V, M = (self.arguments["R"], self.arguments["V"], self.num_targets)
        order, first_target = self.row.new_empty(M), self.row.new_empty(R + 1)
        _order[(triton.cdiv(max(M, R + 1), _ORDER_TARGETS),)](
            self.row, self.target, order, first_target, M, R, V, BLOCK=_ORDER_TARGETS
        )
        return {"target": self.target, "order": order, "first_target": first_target}


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
    R, M, dtype = len(hidden), len(row), accumulator(hidden.dtype)
    logp, lse = hidden.new_empty(M, dtype=dtype), hidden.new_empty(R, dtype=dtype)
    is_argmax = torch.empty_like(logp, dtype=torch.bool)
    if not R:
        return logp, is_argmax, lse
    with torch.cuda.device_of(hidden):
        head = _HeadProblem(hidden, weight, row, target, bias, scale, softcap)
        tiles, tiled = head.tiles(head.blocks, R, len(weight))
        shares = num_shares(tiled["row_blocks"], tiles, head.gpu)
        found: dict[str, Any] = {"tops": lse.new_empty(shares, R), "totals": lse.new_empty(shares, R)}
        found |= {"bests": head.row.new_empty(shares, R), "shares": shares}
        shape: dict[str, Any] = dict(zip(("BLOCK_R", "BLOCK_V", "BLOCK_E"), head.blocks, strict=False))
        shape |= {"SKIPS": head.gpu.matrix != "tcgen05"}
        _forward[(tiled["row_blocks"] * shares,)](**head.arguments, **tiled, **shape, **found, tiles=tiles)
        _finish[(triton.cdiv(max(R, M), _FINISH_ROWS),)](
            **head.arguments,
            **found,
            row=head.row,
            target=head.target,
            logp=logp,
            is_argmax=is_argmax,
            lse=lse,
            M=M,
            BLOCK=_FINISH_ROWS,
            STEP=_FINISH_STEP // 2 if head.gpu.matrix == "tcgen05" else _FINISH_STEP,  # whose registers hold half
        )
    return logp, is_argmax, lse


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
        given = head.order() | {
            "lse": lse.contiguous(),
            "grad_lse": grad_lse.contiguous(),
            "grad_logp": grad_logp.contiguous(),
        }
        block = blocks(hidden.itemsize, R, head.gpu, holding="gradients")
        shape = dict(zip(("BLOCK_R", "BLOCK_V", "BLOCK_E"), block, strict=False))
        for columns in _steps(R, V, hidden.itemsize, block):
            weight_block = head.arguments["weight"][columns]
            width = len(weight_block)
            tiles, tiled = head.tiles(block, R, width)
            grad = hidden.new_empty(R, width)
            _grad_logits[(tiled["row_blocks"] * tiles,)](
                **head.arguments,
                **tiled,
                **shape,
                **given,
                grad=grad,
                shares=tiles,
                first_tile=columns.start // block.columns,
                width=width,
            )
            _multiply(grad, weight_block.T, grad_hidden, head, add=True)
            if need_weight:
                _multiply(grad.T, head.arguments["hidden"].T, grad_weight[columns], head, add=False)
            if len(grad_bias):
                grad_bias[columns] = grad.sum(0, dtype=lse.dtype).to(weight.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _multiply(a: Tensor, b: Tensor, out: Tensor, head: _HeadProblem, *, add: bool) -> None:
    """Sets a contiguous out to a @ b.T, or adds it."""
    (M, K), N, block = a.shape, len(b), head.blocks
    columns, tiled = head.tiles(block, M, N)
    _product[(tiled["row_blocks"] * columns,)](
        a,
        b,
        out,
        M,
        N,
        K,
        *a.stride(),
        *b.stride(),
        shares=columns,
        ADD=add,
        dtype=tl.float64 if out.dtype == torch.float64 else tl.float32,
        BLOCK_M=block.rows,
        BLOCK_N=block.columns,
        BLOCK_K=block.depth,
        **tiled,
    )
