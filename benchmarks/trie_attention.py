"""trie_attention beside torch's own attention: the same dense work, a trie through a materialised mask, decoding."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import Row, measure, peak_bytes
from icl_ft_fast import ops
from icl_ft_fast.engine import trie

HEADS = 8
DTYPES = (torch.bfloat16, torch.float32)


class Call(NamedTuple):
    """Arguments of trie_attention, head-first copies for torch, and a mask where torch needs one (True: visible)."""

    q: Tensor
    k: Tensor
    v: Tensor
    tree: ops.TreeIndex
    torch_qkv: tuple[Tensor, ...]
    mask: Tensor | None
    num_visible: int


def run(quick: bool) -> list[Row]:
    """Check and time every case on one thread and on all; FLOPs count what is visible; masks are made before."""
    rows, threads = [], torch.get_num_threads()
    for name, calls in cases(quick).items():
        _check(name, calls[-1])
        variants: dict[str, Callable[[], object]] = {
            "trie_attention": partial(_each, _trie_attention, calls),
            "torch SDPA": partial(_each, _torch, calls),
        }
        num_flops = sum(2 * call.num_visible * HEADS * (call.q.shape[-1] + call.v.shape[-1]) for call in calls)
        for num_threads in sorted({1, threads}):
            torch.set_num_threads(num_threads)
            case = f"{name}, {num_threads} threads"
            for variant, timing in measure(variants, seconds=0.3 if quick else 2.0).items():
                rate = num_flops / timing.ms / 1e6
                times = (timing.ms, timing.p20_ms, timing.p80_ms)
                peak = peak_bytes(variants[variant])
                rows.append(Row("trie_attention", case, variant, *times, rate, "GFLOP/s", None, peak))
        torch.set_num_threads(threads)
    return rows + [row for dtype in DTYPES for size in (32, 64) for row in _training(dtype, size, quick)]


def _training(dtype: torch.dtype, size: int, quick: bool) -> list[Row]:
    """Forward and backward of 4 causal sequences: packed rows, and for torch the batch that they are."""
    num_sequences, length, threads = 4, 128 if quick else 512, torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, num_sequences, HEADS, length, size, generator=generator).to(dtype)
    row = torch.arange(num_sequences * length, dtype=torch.int32)
    tree = ops.TreeIndex(row, (row // length + 1) * length, row % length, row % length)

    def packed(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def gradients(attention: Callable[..., Tensor], inputs: Tensor) -> tuple[Tensor, ...]:
        *leaves, cotangent = (x.clone() for x in inputs)
        qkv = [x.requires_grad_() for x in leaves]
        return torch.autograd.grad(attention(*qkv), qkv, cotangent)

    rows = torch.stack([packed(x) for x in batch])
    ours = partial(gradients, lambda q, k, v: ops.trie_attention(q, k, v, tree))
    theirs = partial(gradients, partial(scaled_dot_product_attention, is_causal=True))
    for grad, torch_grad, exact in zip(ours(rows), theirs(batch), ours(rows.double()), strict=True):
        check_budget(f"training, {dtype}, {size}", grad, packed(torch_grad), exact)
    num_flops = 7 * num_sequences * HEADS * length * (length + 1) * size
    found, name = [], str(dtype).removeprefix("torch.")
    for num_threads in sorted({1, threads}):
        torch.set_num_threads(num_threads)
        case = f"{name}, forward and backward, 4 sequences of {length}, head size {size}, {num_threads} threads"
        variants = {"trie_attention": partial(ours, rows), "torch SDPA": partial(theirs, batch)}
        for variant, t in measure(variants, seconds=0.3 if quick else 2.0).items():
            rate = num_flops / t.ms / 1e6
            found.append(Row("trie_attention", case, variant, t.ms, t.p20_ms, t.p80_ms, rate, "GFLOP/s"))
    torch.set_num_threads(threads)
    return found


def cases(quick: bool) -> dict[str, list[Call]]:
    """Calls by case; `quick` divides contexts and questions by four."""
    scale = 4 if quick else 1
    num_keys = 4096 // scale
    made = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for size in (64, 128):
            for gqa in (1, 4):
                case = f"{name}, 512 queries x {num_keys:,} keys, head size {size}, {gqa} queries a key"
                made[case] = [_call(dtype, HEADS // gqa, size, *_dense(512, num_keys), masked=False)]
        case = f"{name}, {220 // scale} questions x 4 choices over {4000 // scale:,} tokens, chunks of 512"
        made[case] = [_call(dtype, HEADS // 4, 64, *chunk, masked=True) for chunk in questions(220 // scale, scale)]
        case = f"{name}, one new token of {32 // scale} sequences over {num_keys:,} shared keys"
        made[case] = [_call(dtype, HEADS // 4, 128, *_decode(32 // scale, num_keys), masked=True)]
    return made


Index = tuple[Tensor, Tensor, Tensor, Tensor]


def _dense(num_queries: int, num_keys: int) -> Index:
    """Every query sees every key: the keys are one path that all queries hang under."""
    ends = torch.full((num_keys,), num_keys + num_queries, dtype=torch.int32)
    row = torch.arange(num_keys, num_keys + num_queries, dtype=torch.int32)
    return row, ends, torch.full_like(row, num_keys), torch.arange(num_keys, dtype=torch.int32)


def questions(num_questions: int, scale: int) -> list[Index]:
    """The chunks of a trie of questions of 20 tokens with 4 choices of 5, over one context."""
    rng = np.random.default_rng(0)
    context = np.broadcast_to(rng.integers(0, 32_000, 4000 // scale), (num_questions * 4, 4000 // scale))
    own = np.repeat(rng.integers(0, 32_000, (num_questions, 20)), 4, axis=0)
    tokens = np.hstack([context, own, rng.integers(0, 32_000, (num_questions * 4, 5))]).astype(np.int32)
    num_requests, length = tokens.shape
    offsets = np.arange(num_requests + 1, dtype=np.int64) * length
    built = trie.build(tokens.reshape(-1), offsets, np.full(num_requests, length - 5, np.int64))
    chunks = []
    for chunk in trie.plan(built, 512).chunks:
        num_rows, depth = len(chunk.token), chunk.depth_k
        row = torch.arange(chunk.cached_rows, chunk.cached_rows + num_rows, dtype=torch.int32)
        chunks.append((row, chunk.end_k, depth[chunk.cached_rows :].contiguous(), depth))
    return chunks


def _decode(num_sequences: int, num_keys: int) -> Index:
    """Sequences with 16 rows of their own, the last being filled, below a shared path."""
    own = 16
    first = torch.arange(num_keys, num_keys + num_sequences * own, own, dtype=torch.int32)
    ends = torch.cat(
        [first.new_full((num_keys,), num_keys + num_sequences * own), (first + own).repeat_interleave(own)]
    )
    row = first + own - 1
    return row, ends, torch.full_like(row, num_keys + own - 1), torch.zeros_like(ends)


def _call(
    dtype: torch.dtype,
    num_kv_heads: int,
    size: int,
    row: Tensor,
    ends: Tensor,
    depth_q: Tensor,
    depth_k: Tensor,
    *,
    masked: bool,
) -> Call:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(row), HEADS, size, generator=generator).to(dtype)
    k, v = torch.randn(2, len(ends), num_kv_heads, size, generator=generator).to(dtype).unbind()
    j = torch.arange(len(ends))
    visible = (j <= row[:, None]) & (row[:, None] < ends)
    torch_qkv = tuple(x.transpose(0, 1).contiguous()[None] for x in (q, k, v))
    tree = ops.TreeIndex(row, ends, depth_q, depth_k)
    return Call(q, k, v, tree, torch_qkv, visible if masked else None, int(visible.sum()))


def _each(attention: Callable[[Call], Tensor], calls: list[Call]) -> None:
    for call in calls:
        attention(call)


def _trie_attention(call: Call) -> Tensor:
    return ops.trie_attention(call.q, call.k, call.v, call.tree)


def _torch(call: Call) -> Tensor:
    return scaled_dot_product_attention(*call.torch_qkv, attn_mask=call.mask, enable_gqa=True)[0].transpose(0, 1)


def _check(case: str, call: Call) -> None:
    """The error budget of tests/close.py, torch's attention being the same-dtype one."""
    exact = ops.trie_attention(call.q.double(), call.k.double(), call.v.double(), call.tree)
    check_budget(case, _trie_attention(call), _torch(call), exact)


def check_budget(case: str, kernel: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """Raise unless the kernel is off by no more than twice what the other is, and rounding."""
    error, torch_error = ((x.double() - exact).abs().max().item() for x in (kernel, same_dtype))
    rounding = torch.finfo(kernel.dtype).eps * exact.abs().max().item()
    if not error <= 2 * (torch_error + rounding):
        raise AssertionError(f"{case}: off by {error:.3e}, torch by {torch_error:.3e}, rounding {rounding:.3e}")
