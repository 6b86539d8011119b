"""`python -m benchmarks gpu --out DIR`: bring-up of a GPU in one command, ending within `--minutes`.

Each part runs in a process of its own with a time limit, and what it measures is in DIR's CSV at once: a part that
fails or hangs takes nothing from the others. DIR/gpu.md, written anew after each, says what was reached, what was not,
and why. Ours is timed and told first, so that no rival can take it along. A result that is wrong is a note, and the
rivals are still measured. `--stage 1`, 2 and 3 are the parts in three short runs, each useful alone. FLOPs count what a
row may see and what ours forwards, whoever does the work.
"""

import argparse
import functools
import importlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

import icl_ft_fast as iff
from benchmarks import score
from benchmarks.timing import Row, append_csv, machine, measure, peak_bytes
from benchmarks.trie_attention import check_budget
from icl_ft_fast import ops
from icl_ft_fast.engine import generate, trie
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.engine.model import ATTENTION, Model
from icl_ft_fast.finetuning import batches, lora, network
from icl_ft_fast.finetuning.data import EncodedExample
from icl_ft_fast.finetuning.optimizer import Optimizer
from icl_ft_fast.finetuning.settings import FinetuneSettings, LoraSettings
from icl_ft_fast.ops import reference

OURS, HEADS, KV_HEADS = "icl_ft_fast", 32, 8
PER_MS = {"TFLOP/s": 1e-9, "GB/s": 1e-6, "tokens/s": 1e3}  # of one unit of work a millisecond
CHUNK_TOKENS = 4096  # rows forwarded at a time; the package's own default is also measured
SWEEP = {True: (16, 64), False: (512, 2048, 8192, 16_384)}
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 131_072,
}
TOY = LLAMA_8B | {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.25}
GATE = {True: ["-m", "gpu", "tests/test_gpu.py"], False: ["tests/test_statistics.py"]}
TESTS = {
    True: ["-m", "gpu", "tests/test_triton_rectangle.py", "tests/test_triton.py", "-k", "not offsets"],
    False: ["tests/test_statistics.py"],
}
SENSORS = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")  # of nvidia-smi, once a second
BESIDE = ("host_ms", "compile_s", *SENSORS)  # columns of the CSV beside those of a Row
Variants = dict[str, Callable[[], Any] | str]  # a string says why there is nothing to call
Index = tuple[Tensor, Tensor, Tensor, Tensor]  # row_q, end_k, depth_q, depth_k


@dataclass(frozen=True)
class Note:
    """A variant that was not measured, or a part that failed, and why."""

    case: str
    variant: str
    reason: str


@dataclass(frozen=True)
class Bench:
    """Where a part runs and what it reports to; `ceilings` are the machine's highest rates, by unit."""

    device: torch.device
    small: bool
    out: Path
    ceilings: dict[str, float]
    tell: Callable[..., None]  # of a Row or a Note, and by name what the CSV has beside
    wrong: list[str] = field(default_factory=list)  # cases whose results are, or that ours cannot run

    @property
    def cuda(self) -> bool:
        """Whether this is the real thing."""
        return self.device.type == "cuda"

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        """Standard normal bfloat16."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device, dtype=torch.bfloat16)

    def measure(
        self,
        case: str,
        variants: Variants,
        work: float,
        unit: str,
        *,
        sample: dict[str, float] | None = None,
        rounds: int = 7,
        seconds: float = 0.4,
        peak: bool = False,
    ) -> dict[str, Row]:
        """Time the variants that run, tell each row, return them; `sample`: the share of the work that one does."""
        found = {}
        for variant, call in sorted(variants.items(), key=lambda item: not item[0].startswith(OURS)):
            if isinstance(call, str):
                self.tell(Note(case, variant, call))
                continue
            try:
                began = time.perf_counter()
                call()
                self.synchronize()
                first_s = time.perf_counter() - began
                (t,) = measure(
                    {variant: call},
                    device=self.device,
                    min_rounds=1 if self.small else rounds,
                    seconds=0.0 if self.small else seconds,
                    warm_up=False,
                ).values()
                most = peak_bytes(call, self.device) if peak else None
            except Exception as error:
                self.tell(Note(case, variant, _first_lines(error)))
                if variant.startswith(OURS):
                    self.wrong.append(case)
                continue
            share = (sample or {}).get(variant, 1.0)
            ms = [x / share for x in (t.ms, t.p20_ms, t.p80_ms)]
            rate = work / ms[0] * PER_MS[unit]
            found[variant] = Row("gpu", case, variant, *ms, rate, unit, self.percent(rate, unit), most)
            self.tell(found[variant], host_ms=t.host_ms, compile_s=max(0.0, first_s - t.ms / 1e3))
        return found

    def check(self, case: str, call: Callable[..., object], *arguments: Any) -> None:
        """Call a check of ours, which raises AssertionError; that is told, and the part goes on."""
        try:
            call(*arguments)
        except AssertionError as error:
            self.wrong.append(case)
            self.tell(Note(case, OURS, f"WRONG: {_first_lines(error)}"))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def percent(self, rate: float, unit: str) -> float | None:
        """Of the ceiling in that unit, where there is one."""
        return 100 * rate / self.ceilings[unit] if unit in self.ceilings else None


def _first_lines(error: BaseException) -> str:
    return f"{type(error).__name__}: {' / '.join(str(error).strip().splitlines()[:3])[:300]}"


def _needs(package: str, call: Callable[[], Any], bench: Bench) -> Callable[[], Any] | str:
    """The call, or why it cannot be made."""
    if not bench.cuda:
        return "needs CUDA"
    try:
        found = importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # nor what it is in
        found = False
    return call if found else f"{package} is not importable here"


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


ENGINES = {"flash-attn-4": "flash_attn.cute", "flash-attn": "flash_attn", "cuDNN": "torch", "FA3": "fa3_fwd_interface"}


def _engine(name: str, q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Dense attention by an engine that a rectangle can be given to, or by the yardstick FA3."""
    if name == "FA3":
        from fa3_fwd_interface import flash_attn_func

        return flash_attn_func(q[None], k[None], v[None], softmax_scale=q.shape[-1] ** -0.5, return_attn_probs=True)
    from icl_ft_fast.ops.triton import rectangle as served

    return served.rectangle(name, q, k, v, q.shape[-1] ** -0.5, 0.0)


def _attention(bench: Bench, case: str, index: Index, size: int, pairs: int, *, is_causal: bool) -> None:
    ours, shared = _checked(bench, case, index, size)
    own = [shared[0], *(x.repeat_interleave(HEADS // KV_HEADS, 1) for x in shared[1:])]  # before the clock starts
    variants: Variants = {OURS: functools.partial(ours, plans={})}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for heads, qkv in (("", shared), (", heads repeated", own)):
            call = functools.partial(_sdpa, backend, qkv, is_causal)
            served = bench.cuda or backend == SDPBackend.FLASH_ATTENTION
            variants[f"SDPA {backend.name}{heads}"] = call if served else "needs CUDA"
    rows = [x[0].transpose(0, 1) for x in shared]
    for name, package in ENGINES.items() if not is_causal else ():
        variants[f"engine {name}"] = _needs(package, functools.partial(_engine, name, *rows), bench)
    bench.measure(case, variants, 4 * pairs * HEADS * size, "TFLOP/s")


def tiles(bench: Bench) -> None:
    """The tiles of the attention's and of the head's forward that the compiler takes without a spill."""
    few, many = (32, 128) if bench.small else (2048, 32_768)
    name = f"tiles d128: {few:,} x {many:,}"
    ours, _ = _checked(bench, name, _beside(bench, few, many), 128)
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
        context, *prompts = _ids(bench, 0, [many, *[25] * (few // 25 + 1)])
        tree = trie.build_from_lists([(context + prompt, []) for prompt in prompts], whole=True)
        chunk = trie.plan(tree, few, known=many, cut=many).chunks[1]
        end_k, depth_k = (x.to(bench.device) for x in (chunk.end_k, chunk.depth_k))
        row_q = torch.arange(many, many + len(chunk.token), dtype=torch.int32, device=bench.device)
        index = (row_q, end_k, depth_k[many:].contiguous(), depth_k)
        name = f"join: {len(row_q):,} rows over {many:,}, d 128"
        ours, _ = _checked(bench, name, index, 128)
        hinted = ops.TreeIndex(*index, ops.shared_keys(chunk.end_k, many), int(chunk.depth_k.max()))
        given = functools.partial(ours.func, *ours.args[:3], hinted)  # type: ignore[attr-defined]
        served = ops.served_by(bench.device, torch.bfloat16)
        variants: Variants = {f"{OURS}, {served}": functools.partial(given, plans={})}
        variants[f"{OURS}, the tree kernel alone"] = functools.partial(ours, plans={})
        alone = variants[f"{OURS}, the tree kernel alone"]
        bench.check(name, _check_near, name, given(), alone())  # type: ignore[operator]
        pairs = int((chunk.depth_k[many:].long() + 1).sum())
        bench.measure(name, variants, 4 * pairs * HEADS * 128, "TFLOP/s")


def _checked(bench: Bench, case: str, index: Index, size: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """trie_attention of random q, k and v, some rows held against float64; and the three for torch, heads first."""
    row_q, end_k, depth_q, depth_k = index
    lengths, heads = (len(row_q), len(end_k), len(end_k)), (HEADS, KV_HEADS, KV_HEADS)
    qkv = [bench.random(*shape, size, seed=i) for i, shape in enumerate(zip(lengths, heads, strict=True))]
    ours = functools.partial(ops.trie_attention, *qkv, ops.TreeIndex(*index))
    some = torch.linspace(0, len(row_q) - 1, 32, device=bench.device).long()
    q, k, v = (x.double() for x in (qkv[0][some], *qkv[1:]))
    exact, _ = reference.trie_attention(q, k, v, row_q[some], end_k, depth_q[some], depth_k, None, size**-0.5, 0, 0.0)
    bench.check(case, check_budget, case, ours()[some], exact.bfloat16(), exact)
    return ours, [x.transpose(0, 1)[None] for x in qkv]


def _sdpa(backend: SDPBackend, qkv: list[Tensor], is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, is_causal=is_causal, enable_gqa=qkv[1].shape[1] != HEADS)


def squad_trie(bench: Bench) -> None:
    """220 questions x 4 choices x 5 tokens over 7k tokens: FlexAttention, and each request by itself."""
    context, questions = (32, 3) if bench.small else (7000, 220)
    shared, *own = _ids(bench, 0, [context, *[40] * questions])
    requests = [(shared + ids[:20], ids[20 + c : 25 + c]) for ids in own for c in (0, 5, 10, 15)]
    tree, length, some = trie.build_from_lists(requests), context + 24, min(8, 4 * questions)
    end, depth = tree.end.to(bench.device), tree.depth.to(bench.device)
    index = (torch.arange(len(end), dtype=torch.int32, device=bench.device), end, depth, depth)
    case = f"SQuAD trie: {questions} x 4 x 5 over {context:,}, d 128"
    ours, qkv = _checked(bench, case, index, 128)
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
        "per request, SDPA flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION, alone, True),
        "per request, flash-attn varlen": _needs("flash_attn", varlen, bench),
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
        bench.check(f"head of {rows:,}", _check_logp_exact, rows, found, exact)
        variants: Variants = {
            OURS: functools.partial(ops.target_logprob, hidden, weight, row, target),
            "bare product": functools.partial(F.linear, hidden, weight),
            "all logits": lambda h=hidden, t=target: F.cross_entropy(F.linear(h, weight).float(), t, reduction="none"),
        }
        work, unit = (weight.nbytes, "GB/s") if rows == few else (2 * rows * E * V, "TFLOP/s")
        bench.measure(f"head of {rows:,}: E {E:,}, V {V:,}", variants, work, unit, peak=True)


def _check_logp_exact(rows: int, found: Tensor, exact: Tensor) -> None:
    off = (found - exact).abs().max().item()
    if not off <= 1e-4:  # sums of E float32 products, of the very bfloat16 factors
        raise AssertionError(f"target_logprob of {rows} rows: off by {off:.1e}")


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
    bench.check(name, _check_near, name, grads[0][some], share @ weight.detach().float() / rows)
    for grad, plain in zip(grads, gradients(losses["all logits"]), strict=True):
        bench.check(name, _check_near, name, grad, plain)
    packages = {"liger-kernel": "liger_kernel", "cut-cross-entropy, exact": "cut_cross_entropy"}
    variants: Variants = {}
    for name, loss in losses.items():
        call = functools.partial(gradients, loss)
        variants[name] = _needs(packages[name], call, bench) if name in packages else call
    case = f"head's training step: {rows:,} rows, E {E:,}, V {V:,}"
    bench.measure(case, variants, 6 * rows * E * V, "TFLOP/s", rounds=3, peak=True)


def _check_near(name: str, ours: Tensor, theirs: Tensor) -> None:
    off = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not off <= 2e-2:  # bfloat16 factors and results
        raise AssertionError(f"{name}: off by {off:.1e} of their size")


def gate(bench: Bench) -> None:
    """The tests of whole models: is anything worth timing?"""
    _pytest(bench, "gate", GATE[bench.cuda])


def tests(bench: Bench) -> None:
    """`pytest -m gpu`, in several processes where pytest-xdist is there: most of the time is Triton compiling."""
    _pytest(bench, "tests", TESTS[bench.cuda])


def _pytest(bench: Bench, name: str, arguments: list[str]) -> None:
    spread = ["-n", "12"] if bench.cuda and importlib.util.find_spec("xdist") else []
    log, start = bench.out / f"{name}.log", time.perf_counter()
    options = ["-v", "--tb=short", "-W", "default", f"--junitxml={bench.out / name}.xml"]
    with log.open("w") as file:  # -W default: what another version deprecates is no fault of a kernel
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *spread, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[1],
            check=False,
        )
    ms, last = 1e3 * (time.perf_counter() - start), log.read_text().rstrip().rpartition("\n")[2]
    passed = re.search(r"(\d+) passed", last)
    bench.tell(Row("gpu", name, "pytest", ms, ms, ms, float(passed[1]) if passed else 0.0, "passed"))
    if done.returncode:
        raise AssertionError(f"{last.strip('= ')}; see {log.name}")


def _model(bench: Bench) -> Model:
    """A random Llama of the 8B's shape whose texts never end."""
    torch.manual_seed(0)
    config = LlamaConfig(**(TOY if bench.small else LLAMA_8B), bos_token_id=0, eos_token_id=1)
    with torch.device(bench.device):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    network.generation_config.eos_token_id = None
    tokenizer = SimpleNamespace(eos_token_id=None, decode=lambda ids: "")
    return from_network(network, tokenizer, "random 8B", self_check=False)


def _ids(bench: Bench, seed: int, lengths: list[int]) -> list[list[int]]:
    """Random token ids of these lengths."""
    most = (TOY if bench.small else LLAMA_8B)["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, most, (length,), generator=generator).tolist() for length in lengths]


def _case(bench: Bench, context: list[int], prompts: list[list[int]], tokens: int) -> score.Case:
    """Four choices of so many tokens after each prompt over a context."""
    choices = [_ids(bench, 1000 + p, [tokens] * 4) for p in range(len(prompts))]
    heads = [context + prompt for prompt in prompts]
    requests = [(head, choice) for head, its in zip(heads, choices, strict=True) for choice in its]
    return score.Case(_model(bench), "", [], requests, context, prompts, choices)


def _logp(case: score.Case, rows: int | None = CHUNK_TOKENS, ledger: iff.Ledger | None = None) -> list[float]:
    return [r.logp for r in iff.loglikelihood(case.model, case.requests, chunk_tokens=rows, ledger=ledger)]


def _check_logp(name: str, ours: list[float], theirs: list[float]) -> None:
    """Random weights spread log-probabilities by about one; two networks may differ by a tenth of that."""
    a, b = torch.tensor(ours[: len(theirs)]), torch.tensor(theirs)
    if not (a - b).std() <= 0.1 * b.std():
        raise AssertionError(f"{name}: log-likelihoods differ by {(a - b).std():.2f} of a spread of {b.std():.2f}")


@contextmanager
def _plain(model: Model) -> Iterator[Any]:
    """The network as transformers runs it."""
    model.network.set_attn_implementation("sdpa")
    try:
        yield model.network
    finally:
        model.network.set_attn_implementation(ATTENTION)


def mmlu(bench: Bench) -> None:
    """Questions of 60 to 140 tokens behind 5 shots, 4 choices of a token: lm-eval does a forward a question."""
    subjects, shots, each, batch_sizes = (2, 40, 4, (2, 4)) if bench.small else (10, 700, 100, (16, 64))
    heads = _ids(bench, 0, [shots] * subjects)
    own = _ids(bench, 1, [60 + 7919 * i % 81 for i in range(subjects * each)])
    case = _case(bench, [], [heads[i // each] + question for i, question in enumerate(own)], 1)
    sample, ledger = case.prompts[: max(batch_sizes)], iff.Ledger()
    ours = _logp(case, ledger=ledger)

    @torch.inference_mode()
    def forwards(size: int) -> list[float]:
        logp: dict[int, list[float]] = {}
        longest_first = sorted(range(len(sample)), key=lambda i: -len(sample[i]))
        with _plain(case.model) as network:
            for part in (longest_first[i : i + size] for i in range(0, len(sample), size)):
                width = len(sample[part[0]])  # padded on the right, which nobody sees
                ids = torch.tensor([sample[i] + [0] * (width - len(sample[i])) for i in part], device=bench.device)
                logits = network(ids, use_cache=False).logits.log_softmax(-1)
                for of, i in zip(logits, part, strict=True):
                    logp[i] = of[len(sample[i]) - 1, [token for (token,) in case.choices[i]]].tolist()
        return [x for i in range(len(sample)) for x in logp[i]]

    bench.check("MMLU-like", _check_logp, "MMLU-like", ours, forwards(batch_sizes[0]))
    rivals = {f"hf as lm-eval, batch {size}": functools.partial(forwards, size) for size in batch_sizes}
    variants: Variants = {
        OURS: functools.partial(_logp, case),
        f"{OURS}, the default": functools.partial(_logp, case, None),
        **{f"{OURS}, chunks of {rows:,}": functools.partial(_logp, case, rows) for rows in SWEEP[bench.small]},
        "floor": score.floor(case, CHUNK_TOKENS),
        f"floor, chunks of {SWEEP[bench.small][0]:,}": score.floor(case, SWEEP[bench.small][0]),
        **rivals,
    }
    name = f"MMLU-like: {subjects} x {each:,} questions x 4 behind {shots} tokens"
    share = dict.fromkeys(rivals, len(sample) / len(case.prompts))
    bench.measure(name, variants, ledger.flops, "TFLOP/s", sample=share, rounds=1, seconds=0)
    _profile(bench, case)


def _profile(bench: Bench, case: score.Case) -> None:
    """What a run of few chunks spends its time on, in profile.txt; how much of it the device is idle; its waits."""
    some = replace(case, requests=case.requests[: len(case.requests) // 4])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiled:
        began = time.perf_counter()
        _logp(some, None)
        bench.synchronize()
        ms = (time.perf_counter() - began) * 1e3
    by = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
    events = profiled.key_averages()
    (bench.out / "profile.txt").write_text(events.table(sort_by=by, row_limit=15, max_name_column_width=80))
    busy_ms = sum(getattr(event, by) for event in events) / 1e3
    case_name = "profile: a quarter of the MMLU-like requests"
    bench.tell(Row("gpu", case_name, OURS, ms, ms, ms, max(0.0, 100 * (1 - busy_ms / ms)), "% idle"))
    if bench.cuda:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            _logp(some, None)
            torch.cuda.set_sync_debug_mode("default")
        bench.tell(Row("gpu", case_name, f"{OURS}, waits for copies", ms, ms, ms, float(len(waits)), "waits"))


def long_context(bench: Bench) -> None:
    """1,000 questions x 4 choices of 5 tokens over 32k tokens, and the loop that expands the context's cache."""
    length, questions, sample = (64, 4, 2) if bench.small else (32_768, 1000, 8)
    context, *prompts = _ids(bench, 0, [length, *[20] * questions])
    case, ledger = _case(bench, context, prompts, 5), iff.Ledger()
    ours = _logp(case, ledger=ledger)
    variants: Variants = {OURS: functools.partial(_logp, case), "floor": score.floor(case, CHUNK_TOKENS)}
    name = f"long context: {questions:,} questions x 4 over {length:,} tokens"
    found = bench.measure(name, variants, ledger.flops, "TFLOP/s", rounds=2, seconds=0)
    peer = score.kv_loop(case, sample, chunk_tokens=CHUNK_TOKENS)
    bench.check(name, _check_logp, name, ours, [x for its in peer.logp for x in its])
    ms = 1e3 * (peer.once + statistics.median(peer.seconds) * questions)
    rate = ledger.flops / ms * PER_MS["TFLOP/s"]
    made = found.get(OURS) or Row("gpu", name, OURS, ms, ms, ms, rate, "TFLOP/s")
    bench.tell(replace(made, variant="KV loop", ms=ms, p20_ms=ms, p80_ms=ms, rate=rate, peak_percent=None))


def decode(bench: Bench) -> None:
    """256 prompts over 8k tokens, greedily; what a run takes beyond its first token is its steps."""
    length, prompts, new, sample = (48, 6, 3, 2) if bench.small else (8192, 256, 33, 8)
    context, *tails = _ids(bench, 0, [length, *[20] * prompts])
    model, given = _model(bench), [context + tail for tail in tails]

    def ours(running: int, tokens: int) -> list[tuple[int, ...]]:
        with mock.patch.object(generate, "RUNNING", running):
            return [g.ids for g in generate.generate(model, given, generate.Sampling(tokens))]

    @torch.inference_mode()
    def theirs(tokens: int) -> list[tuple[int, ...]]:
        ids, limits = torch.tensor(given[:sample], device=bench.device), {"max_new_tokens": tokens, "pad_token_id": 0}
        with _plain(model) as network:
            out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        return [tuple(row[ids.shape[1] :].tolist()) for row in out]

    alike = [a == b for a, b in zip(ours(prompts, 1), theirs(1), strict=False)]
    bench.check("decode", _check_alike, alike)
    name, share = f"{prompts} prompts over {length:,} tokens", {"transformers": sample / prompts}
    ms: list[dict[str, Row]] = []
    for tokens, case in ((1, f"first token: {name}"), (new, f"decode: {new} tokens, {name}")):
        variants: Variants = {OURS: functools.partial(ours, prompts, tokens)}
        variants |= {f"{OURS}, default": functools.partial(ours, generate.RUNNING, tokens)} if tokens > 1 else {}
        variants["transformers"] = functools.partial(theirs, tokens)
        ms.append(bench.measure(case, variants, prompts * tokens, "tokens/s", sample=share, rounds=2, seconds=0))
    weights = sum(p.nbytes for p in model.network.parameters())
    steps = (new - 1) * len(given)
    for by, together in ((OURS, prompts), ("transformers", sample)):
        if not all(by in rows for rows in ms):
            continue
        step_ms = max(1e-3, ms[1][by].ms - ms[0][by].ms) * together / steps
        rate = weights / step_ms * PER_MS["GB/s"]
        bench.tell(
            Row(
                "gpu",
                f"step: of {name}",
                f"{by}, {together} at a time",
                step_ms,
                step_ms,
                step_ms,
                rate,
                "GB/s",
                bench.percent(rate, "GB/s"),
            )
        )


def _check_alike(alike: list[bool]) -> None:
    if sum(alike) < len(alike) / 2:  # between two tokens as likely as each other bfloat16 decides
        raise AssertionError(f"decode: {sum(alike)} of {len(alike)} first tokens are those of transformers")


def lora_step(bench: Bench) -> None:
    """A LoRA step on 8 texts of 1,024 tokens: packed rows, and for transformers the batch that they are."""
    texts, length = (2, 16) if bench.small else (8, 1024)
    model, settings = _model(bench), FinetuneSettings(lora=LoraSettings(), gradient_checkpointing=True)
    is_target = [False] + [True] * (length - 1)
    examples = [EncodedExample(ids, is_target, i) for i, ids in enumerate(_ids(bench, 0, [length] * texts))]
    adapted = lora.inject(model.network, settings.lora, 0)
    optimizer, objective = Optimizer(model.network, settings), network.Objective(model, None)
    losses: dict[str, float] = {}

    def ours() -> Tensor:
        return objective(batches.pack(examples), range(texts)) / (texts * (length - 1))

    def theirs() -> Tensor:
        ids = torch.tensor([example.ids for example in examples], device=bench.device)
        loss: Tensor = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def step(name: str, objective: Callable[[], Tensor]) -> None:
        with nullcontext() if name == OURS else _plain(model):  # in the backward layers are run again
            loss = objective()
            loss.backward()
        optimizer.gather()
        optimizer.clip(1.0)
        optimizer.step(0.0)  # so that both see the same weights at every step
        losses[name] = loss.item()

    calls = {OURS: ours, "transformers, SDPA": theirs}
    variants: Variants = {name: functools.partial(step, name, call) for name, call in calls.items()}
    with network.recomputing(model.network, settings.gradient_checkpointing):  # both keep a layer's input only
        name = f"LoRA step: {texts} x {length:,} tokens"
        bench.measure(name, variants, texts * length, "tokens/s", rounds=3, seconds=0, peak=True)
    bench.check(name, _check_losses, losses)


def _check_losses(losses: dict[str, float]) -> None:
    if len(losses) == 2 and not abs(losses[OURS] - losses["transformers, SDPA"]) <= 1e-2 * losses[OURS]:
        raise AssertionError(f"LoRA step: losses {losses}")


# In order of value, each with its limit in seconds.
PARTS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "ceilings": (ceilings, 60),
    "gate": (gate, 90),
    "rectangle": (rectangle, 60),
    "attention": (attention, 80),
    "tiles": (tiles, 50),
    "join": (join, 60),
    "head": (head, 60),
    "mmlu": (mmlu, 120),
    "squad_trie": (squad_trie, 90),
    "tests": (tests, 180),
    "head_training": (head_training, 80),
    "long_context": (long_context, 120),
    "lora_step": (lora_step, 70),
    "decode": (decode, 100),
}
# Short runs, one after the other, with their seconds: is it right, and how fast is the kernel that matters most; the
# kernels and the chunks; whole workloads.
STAGES: dict[int, tuple[int, tuple[str, ...]]] = {
    1: (150, ("gate", "rectangle", "tests")),
    2: (240, ("attention", "tiles", "join", "head", "mmlu", "squad_trie")),
    3: (200, ("long_context", "decode", "lora_step", "head_training")),
}
Rows = dict[str, Row]  # of a case, by variant


def _times(rows: Rows, *names: str) -> float:
    """How many times as fast ours is as the fastest whose name begins so."""
    return min(row.ms for variant, row in rows.items() if variant.startswith(names)) / rows[OURS].ms


def _first(rows: Rows, name: str) -> Row:
    """The row of the first variant whose name begins so."""
    return rows[next((variant for variant in rows if variant.startswith(name)), name)]


def _leaner(rows: Rows, *names: str) -> bool:
    """Whether ours takes no more memory than each of those."""
    return all((rows[OURS].peak_bytes or 0) <= (rows[name].peak_bytes or 0) for name in names)


# By the beginning of a case: what is to be reached, and whether it was; a rival that is missing is a KeyError.
CUT = ("liger-kernel", "cut-cross-entropy, exact")
BARS: dict[str, tuple[str, Callable[[Rows], bool]]] = {
    "rectangle d128": ("450 TFLOP/s; anchor 600", lambda r: r[OURS].rate >= 450),
    "rectangle d64": ("350 TFLOP/s; anchor 470", lambda r: r[OURS].rate >= 350),
    "chain": ("the fastest SDPA", lambda r: _times(r, "SDPA") >= 1),
    "SQuAD": ("5x Flex, 10x a request", lambda r: _times(r, "Flex") >= 5 and _times(r, "per request") >= 10),
    "head of 128": ("4,000 GB/s", lambda r: r[OURS].rate >= 4000),
    "head of": ("600 TFLOP/s, 64 MB", lambda r: r[OURS].rate >= 600 and (r[OURS].peak_bytes or 0) <= 64e6),
    "head's": ("both cuts, leaner", lambda r: all(_times(r, x) > 1 for x in CUT) and _leaner(r, *CUT)),
    "MMLU-like": ("8x hf, 60% of matmul", lambda r: _times(r, "hf") >= 8 and (r[OURS].peak_percent or 0) >= 60),
    "long context": ("2x the loop, 1.3x floor", lambda r: _times(r, "KV") >= 2 and _times(r, "floor") >= 1 / 1.3),
    "decode": ("3x transformers", lambda r: _times(r, "transformers") >= 3),
    "join": (
        "the tree kernel alone",
        lambda r: _first(r, f"{OURS}, Triton").ms <= r[f"{OURS}, the tree kernel alone"].ms,
    ),
    "step": ("50% of copy", lambda r: max(x.peak_percent or 0 for v, x in r.items() if v.startswith(OURS)) >= 50),
    "LoRA": ("1.3x, leaner", lambda r: _times(r, "tr") >= 1.3 and _leaner(r, "transformers, SDPA")),
}


def _judged(case: str, rows: Rows, small: bool) -> tuple[str, str]:
    """A case's bar and whether ours reached it."""
    text, reached = next((bar for start, bar in BARS.items() if case.startswith(start)), ("", None))
    if reached is None or small:
        return text, "toy sizes" if reached else ""
    try:
        return text, "reached" if reached(rows) else "MISSED"
    except (KeyError, ValueError):  # min() of no rival
        return text, "a rival is missing"


def report(told: list[Row | Note], on: dict[str, Any], small: bool) -> str:
    """A table of everything measured, what was not and why, and lines for LOG.md."""
    cases: dict[str, Rows] = {}
    for row in told:
        if isinstance(row, Row):
            cases.setdefault(row.case, {})[row.variant] = row
    what = ", ".join(f"{key} {on[key]}" for key in ("python", "torch", "triton", "transformers") if key in on)
    lines = [f"# {on.get('device', 'no device')}, {on.get('date', '')}", "", what, ""]
    lines += ["| case | variant | ms | rate | of ceiling | peak MB | bar | |", "|---|---|--:|--:|--:|--:|---|---|"]
    log = []
    for case, rows in cases.items():
        text, verdict = _judged(case, rows, small)
        for variant, row in rows.items():
            percent = "" if row.peak_percent is None else f"{row.peak_percent:.0f}%"
            peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:,.0f}"
            figures = f"{row.ms:,.3f} | {row.rate:,.1f} {row.unit} | {percent} | {peak}"
            judged = f"{text} | {verdict}" if variant == next(iter(rows)) else "|"
            lines.append(f"| {case} | {variant} | {figures} | {judged} |")
        each = (f"{variant} {row.ms:,.3g} ms ({row.rate:,.4g} {row.unit})" for variant, row in rows.items())
        log.append(f"- **{case}**: {'; '.join(each)}." + (f" Bar: {text}: {verdict}." if text else ""))
    notes = [f"- {x.case}: {x.variant}: {x.reason}" for x in told if isinstance(x, Note)]
    return "\n".join([*lines, "", "## Not measured, or failed", "", *notes, "", "## For LOG.md", "", *log, ""])


def _short(figures: dict[str, float | None]) -> dict[str, Any]:
    return {name: "" if x is None else float(f"{x:.4g}") for name, x in figures.items()}


def sensed(path: Path) -> dict[str, str]:
    """The last full line that nvidia-smi has written, by sensor; nothing where it writes none."""
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
    values = [value.strip() for value in lines[-1].split(",")] if len(lines) > 1 else []
    return dict(zip(SENSORS, values, strict=True)) if len(values) == len(SENSORS) else {}


@contextmanager
def _sensing(out: Path, device: str) -> Iterator[None]:
    """Have nvidia-smi write clocks, power, temperature and throttle reasons once a second, where it can."""
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        yield
        return
    with (out / "clocks.csv").open("w") as file:
        query = ["nvidia-smi", f"--query-gpu={','.join(SENSORS)}", "--format=csv,nounits", "-l", "1"]
        running = subprocess.Popen(query, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            running.terminate()
            running.wait()


def _work(connection: Connection) -> None:
    """A process that has imported everything and waits to be told its part; it ends by None, or by why it failed."""
    os.setsid()  # so that what it starts can be ended with it
    part, device, small, out, known = connection.recv()
    try:
        on = machine(device)
        connection.send(on)

        def tell(message: Row | Note, **beside: float | None) -> None:
            if isinstance(message, Row):
                append_csv(out, [message], on | dict.fromkeys(BESIDE, "") | sensed(out / "clocks.csv") | _short(beside))
            connection.send(message)

        bench = Bench(torch.device(device), small, out, known, tell)
        PARTS[part][0](bench)
        connection.send(f"wrong: {', '.join(dict.fromkeys(bench.wrong))}" if bench.wrong else None)
    except BaseException as error:
        traceback.print_exc()
        connection.send(_first_lines(error))


def _listen(connection: Connection, limit: float) -> Iterator[Any]:
    """What a part says, to the end or its end; then, as a string, what went wrong."""
    end = time.monotonic() + limit
    try:
        while connection.poll(max(0.0, end - time.monotonic())):
            if (message := connection.recv()) is None:
                return
            yield message
            if isinstance(message, str):
                return
        yield f"cut off after {limit:.0f} s"
    except EOFError:
        yield "its process died"


def main(arguments: list[str], began: float) -> int:
    """Run the parts in order; returns 1 if any failed. `began`: time.monotonic() when the command did."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="Bring-up of a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the CSV, gpu.md and pytest.log")
    parser.add_argument(
        "--stage", type=int, choices=STAGES, help="one of three short runs, in order; instead of --parts"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s; ceilings always come first")
    parser.add_argument("--device", default="cuda", help="cpu shows, with --small, that every part runs")
    parser.add_argument("--small", action="store_true", help="toy sizes, timed once")
    parser.add_argument("--minutes", type=float, help="no part goes on beyond (default: 9, or the stage's)")
    args = parser.parse_args(arguments)
    seconds, chosen = STAGES[args.stage] if args.stage else (540, args.parts.split(","))
    parts = list(dict.fromkeys(["ceilings", *chosen]))
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: unknown {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with _sensing(args.out, args.device):
        failed = _run(args, parts, began + (60 * args.minutes if args.minutes is not None else seconds))
    print((args.out / "gpu.md").read_text())
    return int(failed > 0)


def _run(args: argparse.Namespace, parts: list[str], end: float) -> int:
    """Run the parts until `end`, of time.monotonic(); how many failed."""
    failed = 0
    told: list[Row | Note] = []
    on: dict[str, Any] = {}
    known: dict[str, float] = {}
    spawn = multiprocessing.get_context("spawn")
    waiting: list[tuple[Any, Connection]] = []

    def prepare() -> None:
        """Let the next part's process import while the one before it works."""
        mine, theirs = spawn.Pipe()
        process = spawn.Process(target=_work, args=(theirs,), daemon=False)
        process.start()
        theirs.close()
        waiting.append((process, mine))

    prepare()
    for i, part in enumerate(parts):
        process, connection = waiting.pop()
        if i + 1 < len(parts):
            prepare()
        start, limit = time.monotonic(), min(PARTS[part][1], end - time.monotonic())
        print(f"== {part}, {max(0.0, limit):.0f} s at most", flush=True)
        connection.send((part, args.device, args.small, args.out, known))
        for message in _listen(connection, limit) if limit > 0 else ["no time was left"]:
            if isinstance(message, dict):
                on = message
                continue
            if isinstance(message, str):
                failed += 1
                message = Note(part, "FAILED", message)
            elif part == "ceilings":
                known[message.unit] = message.rate
            told.append(message)
            said = f"{message.ms:,.3f} ms" if isinstance(message, Row) else message.reason
            print(f"   {message.case}: {message.variant}: {said}", flush=True)
        with suppress(ProcessLookupError):  # while it imports it leads no group yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        print(f"   {part}: {time.monotonic() - start:.0f} s", flush=True)
        (args.out / "gpu.md").write_text(report(told, on, args.small))
    return failed
