"""trie_attention and its gradients in Triton; what they must return is said in icl_ft_fast.ops.

The heads that share a key/value head are folded into a query tile: its row m is row m // group of the trie and head
m % group of the key/value head, so that few rows fill a tile. For each tile of queries (for the gradients of k and v:
of keys) `_plan` lists the tiles it must meet, and that list is all a kernel walks over: first those it sees whole,
without a mask, then those it sees in part. Sums are in float32, in an order
fixed by the shapes, without atomics. Knows torch and triton and nothing else.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from icl_ft_fast.ops.triton import rectangle
from icl_ft_fast.ops.triton.gpu import Gpu, accumulator, gpu

_LOG2E = tl.constexpr(1.4426950408889634)
_INT_MIN, _INT_MAX = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
_PLAN_TILES = 32  # tiles a plan looks at together
_MERGE_ROWS = 16
_BOTH = 128  # head sizes to which one program has registers for a tile's gradients of k and of v
_STEP = 16  # elements of a head at a time where each float32 is three bfloat16
_SHARE_TILES = 4  # key tiles that are worth a share of their own


@triton.jit
def _extremes(x, first, last, BLOCK: tl.constexpr):
    """Least and largest of x[first:last], for each of a vector of ranges of at most BLOCK."""
    i = first[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = i < last[:, None]
    values = tl.load(x + i, mask=inside, other=0)
    return tl.min(tl.where(inside, values, _INT_MAX), 1), tl.max(tl.where(inside, values, _INT_MIN), 1)


# Of these only costs compilations what the JIT would look at: whether sizes are 1 or multiples of 16, and how the index
# tensors are aligned, which differs from chunk to chunk.
_jit = triton.jit(
    do_not_specialize=["T", "S", "many", "window", "rows", "shares", "hidden_first", "hidden_last"],
    do_not_specialize_on_alignment=["row_q", "end_k", "depth_q", "depth_k", "plan"],
)


@_jit
def _plan(
    row_q,
    end_k,
    depth_q,
    depth_k,
    plan,
    T,
    S,
    many,
    window,
    hidden_first,
    hidden_last,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HIDDEN: tl.constexpr,
    BY_KEY: tl.constexpr,
    TILES: tl.constexpr,
):
    """Row i of plan [tiles, many + 2] lists the tiles that tile i of the queries meets (BY_KEY: tile i of the keys).

    Those of which every query sees every key stand at its front, those of which some may from column many - 1 down;
    the last two columns say how many of each. HIDDEN: without keys [hidden_first, hidden_last), which the rectangle
    engine serves.
    """
    own = tl.program_id(0)
    plan += own.to(tl.int64) * (many + 2)
    num_whole = 0
    num_partial = 0
    for start in range(0, many, TILES):
        other = start + tl.arange(0, TILES)
        q_tile = other if BY_KEY else own + tl.arange(0, 1)
        k_first = (own + tl.arange(0, 1) if BY_KEY else other) * BLOCK_N
        k_last = tl.minimum(k_first + BLOCK_N, S)
        t_first = q_tile * BLOCK_M // GROUP
        t_last = tl.minimum(((q_tile + 1) * BLOCK_M + GROUP - 1) // GROUP, T)
        row_low, row_high = _extremes(row_q, t_first, t_last, BLOCK_M)
        end_low, end_high = _extremes(end_k, k_first, k_last, BLOCK_N)
        seen = (k_first <= row_high) & (end_high > row_low) & (other < many)
        whole = seen & (k_first + BLOCK_N - 1 <= row_low) & (end_low > row_high)
        if WINDOW:
            q_low, q_high = _extremes(depth_q, t_first, t_last, BLOCK_M)
            k_low, k_high = _extremes(depth_k, k_first, k_last, BLOCK_N)
            seen &= q_low - k_high < window
            whole &= q_high - k_low < window
        if HIDDEN:
            seen &= (k_first < hidden_first) | (k_last > hidden_last)
            whole &= seen & ((k_last <= hidden_first) | (k_first >= hidden_last))
        partial = seen & (whole == 0)
        tl.store(plan + num_whole + tl.cumsum(whole.to(tl.int32)) - 1, other, mask=whole)
        tl.store(plan + many - num_partial - tl.cumsum(partial.to(tl.int32)), other, mask=partial)
        num_whole += tl.sum(whole.to(tl.int32))
        num_partial += tl.sum(partial.to(tl.int32))
    tl.store(plan + many, num_whole)
    tl.store(plan + many + 1, num_partial)


@triton.jit
def _folded(tile, g, T, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The trie's row and the head of each row of a query tile, int64, and which exist. T * GROUP is below 2^31."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = (m // GROUP).to(tl.int64)  # divided in 32 bits: 64 take a routine of some hundred instructions
    return t, g * GROUP + m % GROUP, t < T


@triton.jit
def _rows(x, offset, inside, SIZE, BLOCK: tl.constexpr):
    """[rows, BLOCK]: SIZE elements from each offset on, 0 beyond them and where not inside."""
    d = tl.arange(0, BLOCK)[None, :]
    return tl.load(x + offset[:, None] + d, mask=inside[:, None] & (d < SIZE), other=0.0)


@triton.jit
def _store_rows(x, offset, inside, values, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)[None, :]
    tl.store(x + offset[:, None] + d, values.to(x.dtype.element_ty), mask=inside[:, None] & (d < SIZE))


@triton.jit
def _products(
    a_block,
    b_block,
    a,
    a_offset,
    a_inside,
    b,
    b_offset,
    b_inside,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """a_block @ b_block.T; where a_block is None, both are read here, STEP elements of their lines at a time."""
    if a_block is not None:
        return tl.dot(a_block, tl.trans(b_block), input_precision=PRECISION, out_dtype=dtype)
    total = tl.zeros([a_offset.shape[0], b_offset.shape[0]], dtype)
    for d in range(0, SIZE, STEP):
        a_step = _rows(a, a_offset + d, a_inside, SIZE - d, STEP)
        b_step = _rows(b, b_offset + d, b_inside, SIZE - d, STEP)
        total = tl.dot(a_step, tl.trans(b_step), total, input_precision=PRECISION, out_dtype=dtype)
    return total


@triton.jit
def _capped(products, cap, SOFTCAP: tl.constexpr):
    """What `unit` times is a score: the product of a query and a key or, with a soft-cap, tanh(product * cap)."""
    return libdevice.tanh(products * cap) if SOFTCAP else products


@triton.jit
def _scores(products, unit, cap, SOFTCAP: tl.constexpr, BASE2: tl.constexpr):
    """Scores; with BASE2 in units of `unit`, which then goes into the power as one multiply-add.

    Without BASE2, for float32, the difference of scores is taken in their own units: the weight of a lone key is then 1
    to the bit. For 16-bit factors, which round weights by far more, that does not matter.
    """
    scores = _capped(products, cap, SOFTCAP)
    return scores if BASE2 else scores * unit


@triton.jit
def _power(scores, top, unit, BASE2: tl.constexpr):
    """The exponential of a difference of scores as _scores has them."""
    return tl.exp2(scores * (unit * _LOG2E) - top * (unit * _LOG2E)) if BASE2 else tl.exp(scores - top)


@triton.jit
def _visible(row, depth, n, end_k, depth_k, S, window, WINDOW: tl.constexpr, BY_KEY: tl.constexpr):
    """Which queries see which keys: [queries, keys] (BY_KEY: [keys, queries])."""
    Q: tl.constexpr = 0 if BY_KEY else 1
    K: tl.constexpr = 1 if BY_KEY else 0
    row, end = tl.expand_dims(row, Q), tl.expand_dims(tl.load(end_k + n, mask=n < S, other=0), K)
    visible = (tl.expand_dims(n, K) <= row) & (row < end)
    if WINDOW:
        visible &= tl.expand_dims(depth, Q) - tl.expand_dims(tl.load(depth_k + n, mask=n < S, other=0), K) < window
    return visible


@_jit
def _forward(
    q,
    k,
    v,
    row_q,
    end_k,
    depth_q,
    depth_k,
    sinks,
    plan,
    start_out,
    start_lse,
    out,
    parts,
    lse,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    T,
    S,
    H,
    many,
    unit,
    cap,
    window,
    hidden_first,
    hidden_last,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BASE2: tl.constexpr,
    SINKS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """One tile of queries, one key/value head, one share of the tiles of keys; lse [shares, T, H].

    Values go to out [T, H, DV] or, if there are several shares, to parts [shares, T, H, DV].
    HIDDEN: without keys [hidden_first, hidden_last), whose log-sum-exp and values are start_lse and start_out.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later rows tend to see more: longest first
    g = tl.program_id(1).to(tl.int64)
    share = tl.program_id(2)
    t, h, inside = _folded(tile, g, T, GROUP, BLOCK_M)
    row = tl.load(row_q + t, mask=inside, other=-1)
    depth = tl.load(depth_q + t, mask=inside, other=0) if WINDOW else row
    q_at = t * q_stride_t + h * q_stride_h
    q_block = _rows(q, q_at, inside, D, BLOCK_D) if STEP >= BLOCK_D else None
    dtype: tl.constexpr = lse.dtype.element_ty
    top = tl.full([BLOCK_M], float("-inf"), dtype)  # as _scores has it
    total = tl.zeros([BLOCK_M], dtype)
    values = tl.zeros([BLOCK_M, BLOCK_DV], dtype)
    if SINKS:
        sink = tl.load(sinks + h, mask=inside & (share == 0), other=float("-inf"))
        top = sink / unit if BASE2 else sink
        total = tl.where(sink > float("-inf"), 1.0, 0.0).to(dtype)
    if HIDDEN:
        start = tl.load(start_lse + t * H + h, mask=inside & (share == 0), other=float("-inf"))
        start = start / unit if BASE2 else start
        new_top = tl.maximum(top, start)
        finite = tl.where(new_top > float("-inf"), new_top, 0.0)
        weight = _power(start, finite, unit, BASE2)
        total = total * _power(top, finite, unit, BASE2) + weight
        values = weight[:, None] * _rows(start_out, (t * H + h) * DV, inside & (share == 0), DV, BLOCK_DV)
        values = values.to(dtype)
        top = new_top
    plan += tile.to(tl.int64) * (many + 2)
    num_whole = tl.load(plan + many)
    num_tiles = num_whole + tl.load(plan + many + 1)
    first = share * tl.cdiv(num_tiles, tl.num_programs(2))
    last = tl.minimum(first + tl.cdiv(num_tiles, tl.num_programs(2)), num_tiles)
    for MASKED in tl.static_range(2):
        tiles = plan + (many - num_tiles if MASKED else 0)
        begin = tl.maximum(first, num_whole) if MASKED else first
        end = last if MASKED else tl.minimum(last, num_whole)
        # The next tile's place is loaded a round ahead. Loaded in its own round, it would be the youngest of the copies
        # that the loop has under way, and keys and values would be waited for as soon as they are asked for.
        place = tl.load(tiles + begin, mask=begin < end, other=0)
        for i in range(begin, end):
            n = place * BLOCK_N + tl.arange(0, BLOCK_N)
            place = tl.load(tiles + i + 1, mask=i + 1 < end, other=0)
            k_at = n.to(tl.int64) * k_stride_s + g * k_stride_g
            k_block = _rows(k, k_at, n < S, D, BLOCK_D) if STEP >= BLOCK_D else None
            products = _products(q_block, k_block, q, q_at, inside, k, k_at, n < S, D, STEP, PRECISION, dtype)
            scores = _scores(products, unit, cap, SOFTCAP, BASE2)
            if MASKED:
                visible = _visible(row, depth, n, end_k, depth_k, S, window, WINDOW, False)
                if HIDDEN:
                    visible &= ((n < hidden_first) | (n >= hidden_last))[None, :]
                scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            finite = new_top  # -inf - -inf would be nan in rows that see nothing yet
            if MASKED:
                finite = tl.where(new_top > float("-inf"), new_top, 0.0)
            weights = _power(scores, finite[:, None], unit, BASE2)
            shrink = _power(top, finite, unit, BASE2)
            total = total * shrink + tl.sum(weights, 1)
            v_block = _rows(v, n.to(tl.int64) * v_stride_s + g * v_stride_g, n < S, DV, BLOCK_DV)
            values *= shrink[:, None]
            values = tl.dot(weights.to(v_block.dtype), v_block, values, input_precision=PRECISION, out_dtype=dtype)
            top = new_top
    divisor = tl.where(total > 0, total, 1.0)
    at = (share.to(tl.int64) * T + t) * H + h
    values /= divisor[:, None]
    if tl.num_programs(2) == 1:  # asked here, not by the launcher, so that there is one kernel to compile
        _store_rows(out, at * DV, inside, values, DV, BLOCK_DV)
    else:
        _store_rows(parts, at * DV, inside, values, DV, BLOCK_DV)
    row_lse = (top * unit if BASE2 else top) + tl.log(divisor)
    tl.store(lse + at, tl.where(total > 0, row_lse, float("-inf")), mask=inside)


@_jit
def _merge(parts, part_lse, out, lse, rows, shares, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr):
    """Joins the shares of the keys, in their order; parts [shares, rows, DV], part_lse [shares, rows]."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = r < rows
    top = tl.full([BLOCK], -3.4e38, lse.dtype.element_ty)  # finite: -inf - -inf would be nan in rows that see nothing
    at = r
    for _ in range(shares):
        top = tl.maximum(top, tl.load(part_lse + at, mask=inside, other=0.0))
        at += rows
    total = tl.zeros_like(top)
    values = tl.zeros([BLOCK, BLOCK_DV], top.dtype)
    at = r
    for _ in range(shares):
        weight = tl.exp(tl.load(part_lse + at, mask=inside, other=0.0) - top)
        total += weight
        values += weight[:, None] * _rows(parts, at * DV, inside, DV, BLOCK_DV)
        at += rows
    divisor = tl.where(total > 0, total, 1.0)
    _store_rows(out, r * DV, inside, values / divisor[:, None], DV, BLOCK_DV)
    tl.store(lse + r, tl.where(total > 0, top + tl.log(divisor), float("-inf")), mask=inside)


@triton.jit
def _grad_scores(
    products,
    grad_weights,
    lse,
    delta,
    row,
    depth,
    n,
    end_k,
    depth_k,
    S,
    unit,
    cap,
    window,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BASE2: tl.constexpr,
    MASKED: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """The softmax weights again and the gradient of the scaled products, [queries, keys] (BY_KEY: [keys, queries])."""
    Q: tl.constexpr = 0 if BY_KEY else 1
    capped = _capped(products, cap, SOFTCAP)
    if BASE2:
        weights = tl.exp2(capped * (unit * _LOG2E) - tl.expand_dims(lse * _LOG2E, Q))
    else:
        weights = tl.exp(capped * unit - tl.expand_dims(lse, Q))
    if MASKED:
        weights = tl.where(_visible(row, depth, n, end_k, depth_k, S, window, WINDOW, BY_KEY), weights, 0.0)
    grad = weights * (grad_weights - tl.expand_dims(delta, Q))
    if SOFTCAP:
        grad *= 1 - capped * capped
    return weights, grad


@_jit
def _backward_q(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    row_q,
    end_k,
    depth_q,
    depth_k,
    plan,
    grad_q,
    grad_stride_t,
    grad_stride_h,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    T,
    S,
    H,
    many,
    unit,
    cap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BASE2: tl.constexpr,
):
    """One tile of queries, one key/value head."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    t, h, inside = _folded(tile, g, T, GROUP, BLOCK_M)
    row = tl.load(row_q + t, mask=inside, other=-1)
    depth = tl.load(depth_q + t, mask=inside, other=0) if WINDOW else row
    row_lse = tl.load(lse + t * H + h, mask=inside, other=0.0)
    row_delta = tl.load(delta + t * H + h, mask=inside, other=0.0)
    q_at, grad_at = t * q_stride_t + h * q_stride_h, t * grad_stride_t + h * grad_stride_h
    q_block = _rows(q, q_at, inside, D, BLOCK_D) if STEP >= BLOCK_D else None
    grad_block = _rows(grad_out, grad_at, inside, DV, BLOCK_DV) if STEP >= BLOCK_DV else None
    dtype: tl.constexpr = lse.dtype.element_ty
    grad = tl.zeros([BLOCK_M, BLOCK_D], dtype)
    plan += tile.to(tl.int64) * (many + 2)
    for MASKED in tl.static_range(2):
        num = tl.load(plan + many + MASKED)
        tiles = plan + (many - num if MASKED else 0)
        place = tl.load(tiles, mask=num > 0, other=0)  # a round ahead, as in _forward
        for i in range(num):
            n = place * BLOCK_N + tl.arange(0, BLOCK_N)
            place = tl.load(tiles + i + 1, mask=i + 1 < num, other=0)
            k_at = n.to(tl.int64) * k_stride_s + g * k_stride_g
            v_at = n.to(tl.int64) * v_stride_s + g * v_stride_g
            k_block = _rows(k, k_at, n < S, D, BLOCK_D)
            products = _products(q_block, k_block, q, q_at, inside, k, k_at, n < S, D, STEP, PRECISION, dtype)
            v_block = _rows(v, v_at, n < S, DV, BLOCK_DV) if STEP >= BLOCK_DV else None
            grad_weights = _products(
                grad_block, v_block, grad_out, grad_at, inside, v, v_at, n < S, DV, STEP, PRECISION, dtype
            )
            _, grad_scores = _grad_scores(
                products,
                grad_weights,
                row_lse,
                row_delta,
                row,
                depth,
                n,
                end_k,
                depth_k,
                S,
                unit,
                cap,
                window,
                WINDOW,
                SOFTCAP,
                BASE2,
                MASKED,
                False,
            )
            grad = tl.dot(grad_scores.to(k_block.dtype), k_block, grad, input_precision=PRECISION, out_dtype=dtype)
    _store_rows(grad_q, (t * H + h) * D, inside, grad * (unit * cap if SOFTCAP else unit), D, BLOCK_D)


@_jit
def _backward_kv(
    grad_out,
    q,
    k,
    v,
    lse,
    delta,
    row_q,
    end_k,
    depth_q,
    depth_k,
    plan,
    grad_k,
    grad_v,
    grad_stride_t,
    grad_stride_h,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    T,
    S,
    H,
    many,
    unit,
    cap,
    window,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BASE2: tl.constexpr,
    GRAD_K: tl.constexpr,
    GRAD_V: tl.constexpr,
):
    """One tile of keys of one head; the heads that share it are summed by being folded into the queries.

    Gradients of k, of v, or of both: registers hold only one at the largest head sizes and in float32.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_at, v_at = n.to(tl.int64) * k_stride_s + g * k_stride_g, n.to(tl.int64) * v_stride_s + g * v_stride_g
    k_block = _rows(k, k_at, n < S, D, BLOCK_D) if STEP >= BLOCK_D else None
    v_block = _rows(v, v_at, n < S, DV, BLOCK_DV) if GRAD_K and STEP >= BLOCK_DV else None
    dtype: tl.constexpr = lse.dtype.element_ty
    k_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    v_sum = tl.zeros([BLOCK_N, BLOCK_DV], dtype)
    plan += tile.to(tl.int64) * (many + 2)
    for MASKED in tl.static_range(2):
        num = tl.load(plan + many + MASKED)
        tiles = plan + (many - num if MASKED else 0)
        place = tl.load(tiles, mask=num > 0, other=0)  # a round ahead, as in _forward
        for i in range(num):
            t, h, inside = _folded(place, g, T, GROUP, BLOCK_M)
            place = tl.load(tiles + i + 1, mask=i + 1 < num, other=0)
            row = tl.load(row_q + t, mask=inside, other=-1)
            depth = tl.load(depth_q + t, mask=inside, other=0) if WINDOW else row
            row_lse = tl.load(lse + t * H + h, mask=inside, other=0.0)
            row_delta = tl.load(delta + t * H + h, mask=inside, other=0.0) if GRAD_K else row_lse
            q_at, grad_at = t * q_stride_t + h * q_stride_h, t * grad_stride_t + h * grad_stride_h
            q_block = _rows(q, q_at, inside, D, BLOCK_D) if GRAD_K or STEP >= BLOCK_D else None
            grad_block = _rows(grad_out, grad_at, inside, DV, BLOCK_DV) if GRAD_V or STEP >= BLOCK_DV else None
            products = _products(k_block, q_block, k, k_at, n < S, q, q_at, inside, D, STEP, PRECISION, dtype)
            grad_weights = products
            if GRAD_K:
                grad_weights = _products(
                    v_block, grad_block, v, v_at, n < S, grad_out, grad_at, inside, DV, STEP, PRECISION, dtype
                )
            weights, grad_scores = _grad_scores(
                products,
                grad_weights,
                row_lse,
                row_delta,
                row,
                depth,
                n,
                end_k,
                depth_k,
                S,
                unit,
                cap,
                window,
                WINDOW,
                SOFTCAP,
                BASE2,
                MASKED,
                True,
            )
            if GRAD_V:
                factor = weights.to(q.dtype.element_ty)
                v_sum = tl.dot(factor, grad_block, v_sum, input_precision=PRECISION, out_dtype=dtype)
            if GRAD_K:
                factor = grad_scores.to(q.dtype.element_ty)
                k_sum = tl.dot(factor, q_block, k_sum, input_precision=PRECISION, out_dtype=dtype)
    at = n.to(tl.int64) * (H // GROUP) + g
    if GRAD_K:
        _store_rows(grad_k, at * D, n < S, k_sum * (unit * cap if SOFTCAP else unit), D, BLOCK_D)
    if GRAD_V:
        _store_rows(grad_v, at * DV, n < S, v_sum, DV, BLOCK_DV)


class AttentionBlocks(NamedTuple):
    """What a kernel is compiled for: rows of a query tile, keys of a key tile, and how the GPU runs it.

    step: how many elements of a head are in registers at a time; with all of them, what is a program's own stays there.
    """

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    step: int


# Queries, keys, warps and stages by kernel, bytes of an element and padded head size: the largest tiles tried whose
# registers do not spill under Triton 3.6 and 3.7, as `make kernels` shows; below, where they differ with matrix units
# other than wgmma. Fewer than three stages would have a loop wait for the copies it has just issued.
_BLOCKS = {
    ("forward", 2): {64: (128, 64, 4, 3), 128: (128, 64, 8, 4), 256: (128, 32, 8, 3)},
    ("forward", 4): {64: (64, 32, 4, 3), 128: (64, 32, 4, 3), 256: (16, 32, 8, 3)},
    ("backward_q", 2): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 32, 8, 3)},
    ("backward_q", 4): {64: (64, 32, 4, 3), 128: (64, 32, 4, 3), 256: (16, 16, 8, 3)},
    ("backward_kv", 2): {64: (64, 128, 8, 3), 128: (32, 128, 8, 3), 256: (32, 128, 8, 3)},
    ("backward_kv", 4): {64: (32, 64, 4, 3), 128: (32, 64, 4, 3), 256: (16, 32, 8, 3)},
}
_OTHERS = {
    ("mma", "forward", 2): {64: (128, 64, 8, 3), 128: (128, 32, 8, 3), 256: (64, 16, 8, 3)},
    ("mma", "forward", 4): {64: (64, 16, 4, 3), 128: (64, 16, 4, 3)},
    ("mma", "backward_q", 2): {64: (128, 32, 8, 3), 128: (64, 64, 8, 3), 256: (32, 16, 8, 3)},
    ("mma", "backward_q", 4): {64: (64, 16, 4, 3), 128: (32, 16, 8, 3)},
    ("mma", "backward_kv", 2): {64: (16, 128, 8, 3), 128: (64, 32, 8, 3), 256: (16, 64, 8, 3)},
    ("mma", "backward_kv", 4): {64: (16, 64, 4, 3), 128: (16, 64, 4, 3)},
    ("tcgen05", "forward", 2): {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 3)},
    ("tcgen05", "forward", 4): {64: (64, 16, 4, 3), 128: (32, 16, 4, 3)},
    ("tcgen05", "backward_q", 2): {128: (128, 32, 8, 3), 256: (64, 32, 8, 3)},
    ("tcgen05", "backward_q", 4): {64: (64, 16, 4, 3), 128: (32, 16, 4, 3)},
    ("tcgen05", "backward_kv", 2): {64: (32, 128, 8, 3), 128: (32, 64, 4, 3), 256: (16, 128, 8, 3)},
    ("tcgen05", "backward_kv", 4): {64: (16, 64, 4, 3), 128: (32, 32, 8, 3)},
    ("mfma", "forward", 2): {128: (128, 64, 8, 3), 256: (64, 64, 8, 3)},
    ("mfma", "backward_q", 2): {128: (128, 32, 8, 3), 256: (64, 16, 8, 3)},
    ("mfma", "backward_kv", 2): {64: (32, 128, 4, 3), 128: (32, 64, 8, 3), 256: (16, 128, 8, 3)},
}
_SLACK_BYTES = 2048  # of shared memory, for what is not lines of heads


def blocks(kernel: str, head_size: int, itemsize: int, found: Gpu, *, filled: bool = True) -> AttentionBlocks:
    """The blocks of `forward`, `backward_q` or `backward_kv` on a GPU.

    head_size is padded to a power of two; filled: whether heads fill it. If not, their loads take masks, and registers
    hold fewer queries in the largest kernel.
    """
    row = kernel, min(4, itemsize)
    sizes = _BLOCKS[row] | _OTHERS.get((found.matrix, *row), {})
    queries, keys, warps, stages = sizes[max(64, head_size)]
    if kernel == "backward_kv" and head_size > 128 and itemsize == 2 and not filled:
        queries = 16
    if found.matrix == "mfma":
        warps = 4  # one a SIMD, which may then have all of its registers
    if itemsize > 2 and found.precision != "ieee":
        return AttentionBlocks(queries, keys, warps, 2, _STEP)
    while True:
        own, met = (keys, queries) if kernel == "backward_kv" else (queries, keys)
        lines = stages * 2 * met + (own if kernel == "forward" else 2 * own)
        if lines * head_size * itemsize + _SLACK_BYTES <= found.shared_bytes or (queries, keys, stages) == (16, 16, 1):
            return AttentionBlocks(queries, keys, warps, stages, head_size)
        if stages > 1:
            stages -= 1
        elif keys > 16 and (keys >= queries or kernel != "backward_kv"):
            keys //= 2
        else:
            queries //= 2


def _wanted(common: dict[str, Any], step: int) -> list[dict[str, bool]]:
    """Which gradients each launch of `backward_kv` makes."""
    if max(common["BLOCK_D"], common["BLOCK_DV"]) <= min(step, _BOTH):
        return [{"GRAD_K": True, "GRAD_V": True}]
    return [{"GRAD_K": True, "GRAD_V": False}, {"GRAD_K": False, "GRAD_V": True}]


def num_shares(programs: int, key_tiles: int, found: Gpu) -> int:
    """Into how many parts the keys of a forward are split, so that the last wave of programs is nearly full.

    The fewest whose time, in waves of a whole program's work, is within a tenth of the shortest.
    """
    most = max(1, key_tiles // _SHARE_TILES)

    def waves(shares: int) -> float:
        return -(-programs * shares // found.multiprocessors) / shares

    # Beyond a wave a multiple of its programs is always at hand: no need to look at more shares than multiprocessors.
    times = [waves(shares) for shares in range(1, min(most, found.multiprocessors) + 1)]
    return next(shares for shares, time in enumerate(times, 1) if time <= 1.1 * min(times))


def temporary_bytes(
    num_queries: int,
    num_keys: int,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """The most that a forward of so many queries or fewer allocates beside its results.

    That is a plan, the parts of split keys, and what the rectangle engine returns; heads: of queries and of keys;
    sizes: of a key's and of a value's head.
    """
    (H, G), (D, DV), found = heads, sizes, gpu(device)
    size = max(16, triton.next_power_of_2(max(D, DV)))
    block = blocks("forward", size, dtype.itemsize, found, filled=D == DV == size)
    tiles, many = triton.cdiv(num_queries * (H // G), block.queries), triton.cdiv(num_keys, block.keys)
    parts = _most_parts(tiles, many, G, found) * block.queries * G * (DV + 1) * 4
    state = num_queries * H * (DV * dtype.itemsize + 4) if rectangle.engine(device, dtype) else 0
    return int(tiles * (many + 2) * 4 + parts + 2 * state)  # as the engine lays it out, and as the kernel reads it


@cache
def _most_parts(tiles: int, key_tiles: int, groups: int, found: Gpu) -> int:
    """The most query tiles times shares of split keys, over all numbers of query tiles up to `tiles`."""
    shares = {n: num_shares(n * groups, key_tiles, found) for n in range(1, min(tiles, 20 * found.multiprocessors) + 1)}
    return max((n * its for n, its in shares.items() if its > 1), default=0)


def _lines(x: Tensor) -> Tensor:
    """The same values, the last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _common(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_q: Tensor,
    end_k: Tensor,
    depth_q: Tensor,
    depth_k: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> dict[str, Any]:
    """What forward and backward kernels take, by its name."""
    (T, H, D), (S, G, DV) = q.shape, v.shape
    if max(D, DV) > 256:
        raise NotImplementedError(f"trie_attention: q and v expected head sizes up to 256 on a GPU, got {D} and {DV}")
    tensors = {"q": _lines(q), "k": _lines(k), "v": _lines(v)}
    index = {"row_q": row_q, "end_k": end_k, "depth_q": depth_q, "depth_k": depth_k}
    strides = {
        f"{x}_stride_{d}": tensors[x].stride(i)
        for x, ds in (("q", "th"), ("k", "sg"), ("v", "sg"))
        for i, d in enumerate(ds)
    }
    sizes = {"T": T, "S": S, "H": H, "GROUP": H // G, "D": D, "DV": DV}
    padded = {f"BLOCK_{x}": max(16, triton.next_power_of_2(sizes[x])) for x in ("D", "DV")}
    unit, cap = (softcap, scale / softcap) if softcap else (scale, 1.0)  # a score is unit * (product or its tanh)
    options = {"unit": unit, "cap": cap, "window": window}
    switches = {"WINDOW": window > 0, "SOFTCAP": softcap > 0, "BASE2": q.itemsize == 2}
    index = {name: x.contiguous() for name, x in index.items()}
    return {**tensors, **index, **strides, **sizes, **padded, **options, **switches}


def _chosen(kernel: str, common: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The tiles a kernel has a program for, and what it is compiled for, by name."""
    q, T, S, group = (common[name] for name in ("q", "T", "S", "GROUP"))
    found = gpu(q.device)
    size = max(common["BLOCK_D"], common["BLOCK_DV"])
    block = blocks(kernel, size, q.itemsize, found, filled=common["D"] == common["DV"] == size)
    own, many = triton.cdiv(T * group, block.queries), triton.cdiv(S, block.keys)
    if kernel == "backward_kv":
        own, many = many, own
    shape = {"many": many, "BLOCK_M": block.queries, "BLOCK_N": block.keys, "STEP": block.step}
    run = {"num_warps": block.num_warps, "num_stages": block.num_stages}
    if found.matrix in ("mma", "tcgen05"):
        run["maxnreg"] = 255  # else ptxas offloads to fit more programs on a multiprocessor
    return own, {**shape, **run, "PRECISION": found.precision}


def _planned(
    kernel: str, common: dict[str, Any], plan: Tensor | None, hidden: tuple[int, int] = (0, 0)
) -> tuple[int, dict[str, Any]]:
    """What a kernel is launched with beside the common arguments; makes the plan if there is none.

    hidden: the keys, from the first to before the last, which the rectangle engine serves.
    """
    own, chosen = _chosen(kernel, common)
    if plan is None:
        plan = torch.empty(own, chosen["many"] + 2, dtype=torch.int32, device=common["q"].device)
        names = ("row_q", "end_k", "depth_q", "depth_k", "T", "S", "GROUP", "window", "WINDOW")
        shape = {name: chosen[name] for name in ("many", "BLOCK_M", "BLOCK_N")}
        _plan[(own,)](
            **{name: common[name] for name in names},
            **shape,
            plan=plan,
            hidden_first=hidden[0],
            hidden_last=hidden[1],
            HIDDEN=hidden[1] > hidden[0],
            BY_KEY=kernel == "backward_kv",
            TILES=_PLAN_TILES,
            num_warps=8,  # with fewer, Triton 3.6 spills
        )
    return own, {**chosen, "plan": plan}


def trie_attention_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_q: Tensor,
    end_k: Tensor,
    depth_q: Tensor,
    depth_k: Tensor,
    window: int,
    kernel: str,
    softcap: float = 0.0,
    shared_first: int = 0,
    shared_last: int = 0,
) -> Tensor:
    """Which tiles each program of `forward`, `backward_q` or `backward_kv` meets; of q, k, v only shapes count."""
    shared = shared_first, shared_last
    hidden = shared if kernel == "forward" and rectangle.chosen(q, v, softcap, shared) else (0, 0)
    with torch.cuda.device_of(q):
        common = _common(q, k, v, row_q, end_k, depth_q, depth_k, 1.0, window, 0.0)
        plan: Tensor = _planned(kernel, common, None, hidden)[1]["plan"]
    return plan


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
    plan: Tensor | None = None,
    batch_invariant: bool = False,
    shared_first: int = 0,
    shared_last: int = 0,
) -> tuple[Tensor, Tensor]:
    """ops.trie_attention: out [T, H, Dv], lse [T, H]; never batch-invariant, which the contract sees to."""
    (T, H, _), (_, G, DV) = q.shape, v.shape
    out, lse = q.new_empty(T, H, DV), q.new_empty(T, H, dtype=accumulator(q.dtype))
    if not lse.numel():
        return out, lse
    if scale <= 0 and not softcap:  # the kernel takes the greatest product for the greatest score
        q, scale = q * (-1 if scale else 0), -scale or 1.0
    hidden, start_out, start_lse = (0, 0), None, None
    with torch.cuda.device_of(q):
        if engine := rectangle.chosen(q, v, softcap, (shared_first, shared_last)):
            hidden, keys = (shared_first, shared_last), slice(shared_first, shared_last)
            start_out, start_lse = rectangle.rectangle(engine, q, k[keys], v[keys], scale, softcap)
        common = _common(q, k, v, row_q, end_k, depth_q, depth_k, scale, window, softcap)
        tiles, planned = _planned("forward", common, plan, hidden)
        shares = num_shares(tiles * G, planned["many"], gpu(q.device))
        parts, part_lse = lse, lse  # not written to where there is one share
        if shares > 1:
            parts, part_lse = lse.new_empty(shares, *out.shape), lse.new_empty(shares, T, H)
        sinks = None if sinks is None else sinks.contiguous()
        _forward[(tiles, G, shares)](
            **common,
            **planned,
            sinks=sinks,
            start_out=start_out,
            start_lse=start_lse,
            out=out,
            parts=parts,
            lse=part_lse,
            hidden_first=hidden[0],
            hidden_last=hidden[1],
            SINKS=sinks is not None,
            HIDDEN=start_out is not None,
        )
        if shares > 1:
            _merge[(triton.cdiv(T * H, _MERGE_ROWS),)](
                parts, part_lse, out, lse, T * H, shares, DV=DV, BLOCK_DV=common["BLOCK_DV"], BLOCK=_MERGE_ROWS
            )
    return out, lse


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
    plan_q: Tensor | None = None,
    plan_kv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and delta = (grad_out * out).sum(-1), [T, H]; lse has the sinks in it."""
    contiguous = torch.contiguous_format
    grad_q, grad_k, grad_v = (torch.zeros_like(x, memory_format=contiguous) for x in (q, k, v))
    delta = (grad_out.to(lse.dtype) * out).sum(-1)
    if not lse.numel() or not len(k):
        return grad_q, grad_k, grad_v, delta
    with torch.cuda.device_of(q):
        common = _common(q, k, v, row_q, end_k, depth_q, depth_k, scale, window, softcap)
        grad_out = _lines(grad_out)
        common |= {"grad_out": grad_out, "grad_stride_t": grad_out.stride(0), "grad_stride_h": grad_out.stride(1)}
        common |= {"lse": lse.contiguous(), "delta": (delta - grad_lse).contiguous()}
        tiles, planned = _planned("backward_q", common, plan_q)
        _backward_q[(tiles, k.shape[1])](**common, **planned, grad_q=grad_q)
        tiles, planned = _planned("backward_kv", common, plan_kv)
        for wanted in _wanted(common, planned["STEP"]):
            _backward_kv[(tiles, k.shape[1])](**common, **planned, grad_k=grad_k, grad_v=grad_v, **wanted)
    return grad_q, grad_k, grad_v, delta
