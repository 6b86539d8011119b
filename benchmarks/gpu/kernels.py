"""Parts of the bring-up that time both ops, alone and beside what others would use for the same."""

import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.gpu.bench import HEADS, KV_HEADS, OURS, Bench, Index, Variants, random_ids
from benchmarks.gpu.references import ENGINES, check_logp_exact, check_near, checked, engine, needs, sdpa
from icl_ft_fast import ops
from icl_ft_fast.engine import trie


def ceilings(bench: Bench) -> None:
    """What the machine does at best: every other row's share is of these."""
    size, count = (128, 2**12) if bench.small else (8192, 2**30)
    a, b, source = bench.random(size, size), bench.random(size, size, seed=1), bench.random(count)
    target, moved = torch.empty_like(source), 2 * source.nbytes
    bench.measure(f"bf16 matmul: {size:,}^3", {"torch": lambda: a @ b}, 2 * size**3, "TFLOP/s")
    bench.measure(f"device copy: {moved:,} bytes", {"torch": lambda: target.copy_(source)}, moved, "GB/s")


def rectangle(bench: Bench) -> None:
    """2,048 descendants over 32k shared keys, beside each of torch's SDPA backends and the dense engines."""
    _rectangle(bench, 128)


def attention(bench: Bench) -> None:
    """The rectangle at head size 64, and chains, beside each of torch's SDPA backends."""
    _rectangle(bench, 64)
    for rows in (64, 128) if bench.small else (8192, 32_768):
        row = torch.arange(rows, dtype=torch.int32, device=bench.device)
        index = (row, torch.full_like(row, rows), row, row)
        _attention(bench, f"chain: of {rows:,}, d 128", index, 128, rows * (rows + 1) // 2, is_causal=True)


def _rectangle(bench: Bench, size: int) -> None:
    few, many = (32, 128) if bench.small else (2048, 32_768)
    index = _beside(bench, few, many)
    _attention(bench, f"rectangle d{size}: {few:,} x {many:,}", index, size, few * many, is_causal=False)


def _beside(bench: Bench, few: int, many: int) -> Index:
    """Rows that see the same keys and not each other."""
    keys = torch.arange(many, dtype=torch.int32, device=bench.device)
    row = torch.arange(many, many + few, dtype=torch.int32, device=bench.device)
    return row, torch.full_like(keys, many + few), torch.full_like(row, many), keys


def _attention(bench: Bench, case: str, index: Index, size: int, pairs: int, *, is_causal: bool) -> None:
    ours, shared = checked(bench, case, index, size)
    own = [shared[0], *(x.repeat_interleave(HEADS // KV_HEADS, 1) for x in shared[1:])]  # before the clock starts
    variants: Variants = {OURS: functools.partial(ours, plans={})}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for heads, qkv in (("", shared), (", heads repeated", own)):
            call = functools.partial(sdpa, backend, qkv, is_causal)
            served = bench.cuda or backend == SDPBackend.FLASH_ATTENTION
            variants[f"SDPA {backend.name}{heads}"] = call if served else "needs CUDA"
    rows = [x[0].transpose(0, 1) for x in shared]
    for name, package in ENGINES.items() if not is_causal else ():
        variants[f"engine {name}"] = needs(package, functools.partial(engine, name, *rows), bench)
    bench.measure(case, variants, 4 * pairs * HEADS * size, "TFLOP/s")


def tiles(bench: Bench) -> None:
    """The tiles of the attention's and of the head's forward that the compiler takes without a spill."""
    few, many = (32, 128) if bench.small else (2048, 32_768)
    name = f"tiles d128: {few:,} x {many:,}"
    ours, _ = checked(bench, name, _beside(bench, few, many), 128)
    variants: Variants = {}
    for tile in ((128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3)):
        call = functools.partial(ours, plans={})
        variants[f"{OURS}, {tile[0]} x {tile[1]}, {tile[3]} stages"] = _tiled(bench, call, "trie_attention", tile)
    bench.measure(name, variants, 4 * few * many * HEADS * 128, "TFLOP/s")
    rows, E, V = (96, 64, 1000) if bench.small else (8192, 4096, 128_256)
    hidden, weight = bench.random(rows, E, seed=1), bench.random(V, E) * E**-0.5
    row = torch.arange(rows, dtype=torch.int32, device=bench.device)
    head = functools.partial(ops.target_logprob, hidden, weight, row, row)
    variants = {
        f"{OURS}, 128 x {columns}": _tiled(bench, head, "target_logprob", (columns, 64)) for columns in (128, 256)
    }
    bench.measure(f"tiles of the head: {rows:,} rows", variants, 2 * rows * E * V, "TFLOP/s")


def _tiled(bench: Bench, call: Callable[[], Any], op: str, tile: tuple[int, ...]) -> Callable[[], Any]:
    """The call with other blocks for 16-bit types on sm_90; on the CPU the same call."""
    if not bench.cuda:
        return call
    blocks = importlib.import_module(f"icl_ft_fast.ops.triton.{op}")._BLOCKS
    key = ("forward", 2) if op == "trie_attention" else "wgmma"
    changed = blocks[key] | {128 if op == "trie_attention" else "logits": tile}

    def call_tiled() -> Any:
        with mock.patch.dict(blocks, {key: changed}):
            return call()

    return call_tiled


def join(bench: Bench) -> None:
    """A chunk of questions over shared keys: those given to the dense engine, or all by the tree kernel."""
    few, lengths = (48, (64, 128)) if bench.small else (4096, (1024, 4096, 7168, 32_768))
    for many in lengths:
        context, *prompts = random_ids(bench, 0, [many, *[25] * (few // 25 + 1)])
        tree = trie.build_from_lists([(context + prompt, []) for prompt in prompts], whole=True)
        chunk = trie.plan(tree, few, known=many, cut=many).chunks[1]
        end_k, depth_k = (x.to(bench.device) for x in (chunk.end_k, chunk.depth_k))
        row_q = torch.arange(many, many + len(chunk.token), dtype=torch.int32, device=bench.device)
        index = (row_q, end_k, depth_k[many:].contiguous(), depth_k)
        name = f"join: {len(row_q):,} rows over {many:,}, d 128"
        ours, _ = checked(bench, name, index, 128)
        hinted = ops.TreeIndex(*index, ops.shared_keys(chunk.end_k, many), int(chunk.depth_k.max()))
        given = functools.partial(ours.func, *ours.args[:3], hinted)  # type: ignore[attr-defined]
        served = ops.served_by(bench.device, torch.bfloat16)
        variants: Variants = {f"{OURS}, {served}": functools.partial(given, plans={})}
        variants[f"{OURS}, the tree kernel alone"] = functools.partial(ours, plans={})
        alone = variants[f"{OURS}, the tree kernel alone"]
        bench.check(name, check_near, name, given(), alone())  # type: ignore[operator]
        pairs = int((chunk.depth_k[many:].long() + 1).sum())
        bench.measure(name, variants, 4 * pairs * HEADS * 128, "TFLOP/s")


def squad_trie(bench: Bench) -> None:
    """220 questions x 4 choices x 5 tokens over 7k tokens: FlexAttention, and each request by itself."""
    context, questions = (32, 3) if bench.small else (7000, 220)
    shared, *own = random_ids(bench, 0, [context, *[40] * questions])
    requests = [(shared + ids[:20], ids[20 + c : 25 + c]) for ids in own for c in (0, 5, 10, 15)]
    tree, length, some = trie.build_from_lists(requests), context + 24, min(8, 4 * questions)
    end, depth = tree.end.to(bench.device), tree.depth.to(bench.device)
    index = (torch.arange(len(end), dtype=torch.int32, device=bench.device), end, depth, depth)
    case = f"SQuAD trie: {questions} x 4 x 5 over {context:,}, d 128"
    ours, qkv = checked(bench, case, index, 128)
    rule, n = (lambda b, h, i, j: (j <= i) & (i < end[j])), len(end)
    mask = create_block_mask(rule, None, None, n, n, device=bench.device)
    flex = torch.compile(flex_attention, dynamic=False) if bench.cuda else flex_attention
    alone = [bench.random(some, heads, length, 128, seed=i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]

    def varlen() -> Any:
        from flash_attn import flash_attn_varlen_func

        starts = torch.arange(some + 1, dtype=torch.int32, device=bench.device) * length
        packed = (x.transpose(1, 2).flatten(0, 1) for x in alone)
        return flash_attn_varlen_func(*packed, starts, starts, length, length, causal=True)

    variants: Variants = {
        OURS: functools.partial(ours, plans={}),
        f"{OURS}, planned each time": ours,
        "FlexAttention": functools.partial(flex, *qkv, block_mask=mask, enable_gqa=True),
        "per request, SDPA flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION, alone, True),
        "per request, flash-attn varlen": needs("flash_attn", varlen, bench),
    }
    pairs = int((depth.long() + 1).sum())
    share = {name: some / len(requests) for name in variants if name.startswith("per request")}
    bench.measure(case, variants, 4 * pairs * HEADS * 128, "TFLOP/s", sample=share)


def head(bench: Bench) -> None:
    """target_logprob at 8,192, 1,024 and 128 rows, beside the bare product and cross-entropy of all logits."""
    E, V = (64, 1000) if bench.small else (4096, 128_256)
    weight = bench.random(V, E) * E**-0.5
    few = 8 if bench.small else 128  # whose time goes into reading the weight
    for rows in (96, 32, few) if bench.small else (8192, 1024, few):
        hidden = bench.random(rows, E, seed=1)
        row = torch.arange(rows, dtype=torch.int32, device=bench.device)
        target = (row * 7919 % V).long()
        some = slice(0, rows, max(1, rows // 16))
        exact = (hidden[some].double() @ weight.double().T).log_softmax(-1).gather(1, target[some, None])[:, 0]
        found = ops.target_logprob(hidden, weight, row, target)[0][some]
        bench.check(f"head of {rows:,}", check_logp_exact, rows, found, exact)
        variants: Variants = {
            OURS: functools.partial(ops.target_logprob, hidden, weight, row, target),
            "bare product": functools.partial(F.linear, hidden, weight),
            "all logits": lambda h=hidden, t=target: F.cross_entropy(F.linear(h, weight).float(), t, reduction="none"),
        }
        work, unit = (weight.nbytes, "GB/s") if rows == few else (2 * rows * E * V, "TFLOP/s")
        bench.measure(f"head of {rows:,}: E {E:,}, V {V:,}", variants, work, unit, peak=True)


def head_training(bench: Bench) -> None:
    """The head's loss with gradients of hidden states and weight, beside liger-kernel and cut-cross-entropy."""
    rows, E, V = (32, 64, 1000) if bench.small else (8192, 4096, 128_256)
    hidden = bench.random(rows, E).requires_grad_()
    weight = (bench.random(V, E, seed=1) * E**-0.5).requires_grad_()
    row = torch.arange(rows, dtype=torch.int32, device=bench.device)
    target = (row * 7919 % V).long()

    def gradients(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), (hidden, weight))

    def liger() -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss: Tensor = LigerFusedLinearCrossEntropyLoss()(weight, hidden, target)
        return loss

    def cut() -> Tensor:  # by default it leaves out what is small, which on random data is all
        from cut_cross_entropy import linear_cross_entropy

        loss: Tensor = linear_cross_entropy(hidden, weight, target, filter_eps=None)
        return loss

    losses = {
        OURS: lambda: -ops.target_logprob(hidden, weight, row, target)[0].mean(),
        "all logits": lambda: F.cross_entropy(F.linear(hidden, weight).float(), target),
        "liger-kernel": liger,
        "cut-cross-entropy, exact": cut,
    }
    grads = gradients(losses[OURS])
    some = slice(0, rows, max(1, rows // 16))
    share = (hidden.detach()[some].float() @ weight.detach().float().T).softmax(-1)
    share[torch.arange(len(share)), target[some]] -= 1
    name = "head's gradients"
    bench.check(name, check_near, name, grads[0][some], share @ weight.detach().float() / rows)
    for grad, plain in zip(grads, gradients(losses["all logits"]), strict=True):
        bench.check(name, check_near, name, grad, plain)
    packages = {"liger-kernel": "liger_kernel", "cut-cross-entropy, exact": "cut_cross_entropy"}
    variants: Variants = {}
    for name, loss in losses.items():
        call = functools.partial(gradients, loss)
        variants[name] = needs(packages[name], call, bench) if name in packages else call
    case = f"head's training step: {rows:,} rows, E {E:,}, V {V:,}"
    bench.measure(case, variants, 6 * rows * E * V, "TFLOP/s", rounds=3, peak=True)
