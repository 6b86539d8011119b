"""What the Triton kernels do, from shapes and the trie alone: FLOPs, bytes loaded and stored, tiles met.

A test holds these figures against what Triton's interpreter counts; `python -m benchmarks.kernels --costs` prints them.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from icl_ft_fast.engine import trie
from icl_ft_fast.ops import shared_keys
from icl_ft_fast.ops.triton import rectangle, target_logprob, trie_attention
from icl_ft_fast.ops.triton.gpu import accumulator, gpu


class Shared(NamedTuple):
    """Of a run's attention, what rectangles are: pairs of a query and a key that it sees, over all chunks.

    pairs, in_rectangles, served: all, those whose key every query of the chunk sees, and of these the ones that an
    engine gains something by.
    chunks, shapes: how many there are, and distinct rectangles among them.
    """

    pairs: int
    in_rectangles: int
    served: int
    chunks: int
    shapes: int


def shared_pairs(tree: trie.Trie, rows: int, engine: str, heads: int, size: int) -> Shared:
    """What rectangles are of a tree, forwarded so many rows at a time, cut behind what all requests share."""
    common = int((tree.end == len(tree.token)).int().cumprod(0).sum())
    found = []
    for chunk in trie.plan(tree, rows, cut=common).chunks:
        num_rows, keys = len(chunk.token), shared_keys(chunk.end_k, chunk.cached_rows)
        is_served = keys > 0 and rectangle.gain_s(engine, num_rows, keys, heads, size, 2) > 0
        found.append((num_rows, keys, num_rows * keys * is_served))
    pairs = int((tree.depth.long() + 1).sum())
    shapes = {(num_rows, keys) for num_rows, keys, served in found if served}
    return Shared(pairs, sum(t * p for t, p, _ in found), sum(served for *_, served in found), len(found), len(shapes))


class Cost(NamedTuple):
    """What all programs of one launch do, from shapes and the trie alone.

    flops: of matrix products, the padding of tiles included.
    read_bytes, written_bytes: of loads and stores, each as often as a program makes it; caches may serve some.
    whole, partial, skipped: tiles met without a mask, with one, and not at all, over the key/value heads.
    """

    flops: int
    read_bytes: int
    written_bytes: int
    whole: int = 0
    partial: int = 0
    skipped: int = 0


def met_tiles(common: dict[str, Any], queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """What `_plan` lists: the tiles that are met, and those of them seen whole, bool [query tiles, key tiles]."""
    T, S, group = (common[name] for name in ("T", "S", "GROUP"))
    rows = [(m // group, min(-(-(m + queries) // group), T)) for m in range(0, T * group, queries)]
    columns = [(n, min(n + keys, S)) for n in range(0, S, keys)]

    def extremes(name: str, ranges: list[tuple[int, int]]) -> Tensor:
        values = common[name].cpu()
        return torch.stack([torch.stack(values[i:j].aminmax()) for i, j in ranges], 1)  # least and largest

    (row_low, row_high), (end_low, end_high) = extremes("row_q", rows), extremes("end_k", columns)
    first = torch.arange(0, S, keys)
    met = (first <= row_high[:, None]) & (end_high > row_low[:, None])
    whole = met & (first + keys - 1 <= row_low[:, None]) & (end_low > row_high[:, None])
    if common["WINDOW"]:
        (q_low, q_high), (k_low, k_high) = extremes("depth_q", rows), extremes("depth_k", columns)
        met &= q_low[:, None] - k_high < common["window"]
        whole &= met & (q_high[:, None] - k_low < common["window"])
    return met, whole


def attention_costs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_q: Tensor,
    end_k: Tensor,
    depth_q: Tensor,
    depth_k: Tensor,
    window: int = 0,
    *,
    sinks: bool = False,
    backward: bool = False,
) -> dict[str, Cost]:
    """What the launches of the forward, or of the backward, and of its plans cost, by kernel; T and S above 0."""
    common = trie_attention._common(q, k, v, row_q, end_k, depth_q, depth_k, 1.0, window, 0.0)
    T, S, H, group, D, DV, BLOCK_D, BLOCK_DV = (
        common[name] for name in ("T", "S", "H", "GROUP", "D", "DV", "BLOCK_D", "BLOCK_DV")
    )
    G, item, total = H // group, q.itemsize, accumulator(q.dtype).itemsize
    index = 8 if window else 4  # bytes that say where a query or a key stands
    found = {}
    for kernel in ("backward_q", "backward_kv") if backward else ("forward",):
        own, chosen = trie_attention._chosen(kernel, common)
        many, queries, keys, step = (chosen[name] for name in ("many", "BLOCK_M", "BLOCK_N", "STEP"))
        again, again_v = step < BLOCK_D, step < BLOCK_DV  # whether lines are read in steps, anew for every tile met
        deep, deep_v = min(BLOCK_D, -(-D // step) * step), min(BLOCK_DV, -(-DV // step) * step)
        met, whole = met_tiles(common, queries, keys)
        rows = (T * group - torch.arange(0, T * group, queries)).clamp(max=queries)  # of each tile
        columns = (S - torch.arange(0, S, keys)).clamp(max=keys)
        num_met, num_whole = int(met.sum()), int(whole.sum())
        met_rows, met_keys = int((met.sum(1) * rows).sum()), int((met.sum(0) * columns).sum())
        masked_keys = int(((met & ~whole).sum(0) * columns).sum())
        tiles = (G * num_whole, G * (num_met - num_whole), G * (met.numel() - num_met))
        shares = trie_attention.num_shares(own * G, many, trie_attention.gpu(q.device)) if kernel == "forward" else 1
        planned = shares * own * 8 + num_met * 4 + masked_keys * index  # what the plan and the masks take
        area = 2 * queries * keys * num_met
        qkv = (D + DV) * item
        if kernel == "forward":
            read = planned + met_keys * qkv + (met_rows if again else shares * T * group) * D * item
            read += shares * T * group * index + (T * group * total if sinks else 0)
            out = shares * T * group * (DV * (item if shares == 1 else total) + total)
            found["_forward"] = Cost(area * (deep + BLOCK_DV) * G, G * read, G * out, *tiles)
            if shares > 1:
                found["_merge"] = Cost(0, shares * T * H * (DV + 2) * total, T * H * (DV * item + total))
        elif kernel == "backward_q":
            read = planned + met_keys * (qkv + again * D * item) + T * group * (index + 2 * total)
            read += ((met_rows if again else T * group) * D + (met_rows if again_v else T * group) * DV) * item
            written = T * group * D * item
            found["_backward_q"] = Cost(area * (deep + deep_v + BLOCK_D) * G, G * read, G * written, *tiles)
        else:
            flops = read = written = 0
            for wanted in trie_attention._wanted(common, step):
                of_k, of_v = wanted["GRAD_K"], wanted["GRAD_V"]
                flops += area * (deep + of_k * (deep_v + BLOCK_D) + of_v * BLOCK_DV)
                read += planned + ((met_keys if again else S) * D + of_k * (met_keys if again_v else S) * DV) * item
                read += met_rows * (index + (1 + of_k) * total + qkv + (again and of_k) * D * item)
                written += S * (of_k * D + of_v * DV) * item
            found["_backward_kv"] = Cost(flops * G, G * read, G * written, *tiles)
        t_ranges = sum(min(-(-(m + queries) // group), T) - m // group for m in range(0, T * group, queries))
        steps = triton.cdiv(many, trie_attention._PLAN_TILES)
        once, often = (S, t_ranges) if kernel == "backward_kv" else (t_ranges, S)
        plan = Cost(0, index * (steps * once + own * often), 4 * (num_met + 2 * own))
        found["_plan"] = Cost(*map(sum, zip(found.get("_plan", Cost(0, 0, 0)), plan, strict=True)))
    return found


def head_costs(
    hidden: Tensor,
    weight: Tensor,
    num_targets: int,
    *,
    bias: bool = False,
    backward: bool = False,
    need_weight: bool = True,
) -> dict[str, Cost]:
    """What the launches of the forward, or of the backward, cost, by kernel; a target for each of the first rows."""
    (R, E), V, item, total = hidden.shape, len(weight), hidden.itemsize, accumulator(hidden.dtype).itemsize
    M, found = num_targets, gpu(hidden.device)
    block, narrow = (target_logprob.blocks(item, R, found, holding=what) for what in ("logits", "gradients"))
    if not backward:
        row_blocks, tiles = triton.cdiv(R, block.rows), triton.cdiv(V, block.columns)
        shares = target_logprob.num_shares(row_blocks, tiles, found)
        read = tiles * R * E * item + row_blocks * V * (E + bias) * item
        parts = shares * (3 * total + 4)  # the greatest logits are read twice
        finish = (R + M) * parts + M * 12 + M * (2 * E + bias) * item
        return {
            "_forward": Cost(_flops(R, V, E, block), read, shares * R * (2 * total + 4)),
            "_finish": Cost(0, finish, R * total + M * (total + 1)),
        }
    programs = triton.cdiv(max(M, R + 1), target_logprob._ORDER_TARGETS)
    row_blocks, tiles = triton.cdiv(R, narrow.rows), triton.cdiv(V, narrow.columns)
    read = tiles * R * E * item + row_blocks * V * (E + bias) * item
    of_row = 2 * total + 8  # lse, its gradient, where its targets begin and end
    grad_read = read + tiles * R * of_row + tiles * M * (2 * (4 + total) + 2 * 4)
    flops = read = written = 0
    for columns in target_logprob._steps(R, V, item, narrow):
        width = columns.stop - columns.start
        flops += _flops(R, E, width, block) + need_weight * _flops(width, E, R, block)
        read += _product_read(R, E, width, block, item) + R * E * total
        read += need_weight * _product_read(width, E, R, block, item)
        written += R * E * total + need_weight * width * E * item
    return {
        "_order": Cost(0, 8 * M * (1 + programs), 4 * (M + R + 1)),
        "_grad_logits": Cost(_flops(R, V, E, narrow), grad_read, R * V * item),
        "_product": Cost(flops, read, written),
    }


def _flops(M: int, N: int, K: int, block: target_logprob.HeadBlocks) -> int:
    """Of an [M, K] by [K, N] product in whole blocks."""
    sizes = zip((M, N, K), (block.rows, block.columns, block.depth), strict=True)
    return 2 * math.prod(-(-size // step) * step for size, step in sizes)


def _product_read(M: int, N: int, K: int, block: target_logprob.HeadBlocks, itemsize: int) -> int:
    """Bytes of factors that its programs load."""
    return (-(-N // block.columns) * M + -(-M // block.rows) * N) * K * itemsize
