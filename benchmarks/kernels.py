"""`python -m benchmarks.kernels`: compiles, without a GPU, every Triton kernel as its launcher would call it.

Prints registers, shared memory, bytes of stack, matrix instructions, 16-byte loads and the instructions of the
shortest loop with a product, for each target. Fails on any spill, on more registers or shared memory than the target
has, and on a kernel of matrix products that loads nothing 16 bytes at a time or does not multiply on the matrix units:
in 16 bits by wgmma alone on sm_90 and by tcgen05 alone on sm_100; in float32 by wgmma alone on sm_90 to head sizes of
128, by mma.sync beyond, as LOG.md explains.

In 16 bits on sm_90 it fails also

- on a loop with a matrix product that waits for the copies it has just issued, or divides 64-bit integers,
- on more than MOST_INSTRUCTIONS a tile in the attention's forward at head size 128,
- if a load and two scoring runs compile more than MOST_COMPILATIONS kernels.

The launchers themselves choose what is compiled: they run on empty tensors with the launch replaced, so there is no
second list.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.kernel_code import product_loops, sass_loops
from benchmarks.kernel_costs import Cost, attention_costs, head_costs, shared_pairs
from benchmarks.kernel_jit import compilations
from benchmarks.trie_attention import questions
from icl_ft_fast.engine import trie
from icl_ft_fast.ops.triton import rectangle, target_logprob, trie_attention
from icl_ft_fast.ops.triton.gpu import described

# Target, the bytes of shared memory that a program may have there, and multiprocessors.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912, 108),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448, 132),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448, 148),
    "sm_120": (GPUTarget("cuda", 120, 32), 101_376, 188),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536, 304),
}
SHAPE = ("BLOCK_M", "BLOCK_N", "BLOCK_R", "BLOCK_V")
MOST_INSTRUCTIONS = 420  # that a warp issues for a tile of 128 queries and 64 keys seen whole, head size 128
MOST_COMPILATIONS = 6
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One kernel as a launcher would start it: arguments by name, how it is compiled, and what for."""

    case: str
    op: str
    kernel: str
    target: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]


class Built(NamedTuple):
    """What the compiler made of a launch."""

    registers: int
    shared_bytes: int
    offloaded_bytes: int
    matrix: int  # instructions of the matrix units: of sm_90 wgmma, of sm_100 tcgen05
    older_matrix: int  # of these two the others, mma.sync
    wide_loads: int  # of 16 bytes, from global memory
    waits_at_once: bool = False  # whether a loop with a product waits for the copies it has just issued
    divisions: int = 0  # of 64-bit integers in loops with a product
    instructions: int = 0  # of the shortest such loop


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the ops that between them choose every block shape, with and without what else is compiled in."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for size in (64, 80, 96, 128, 192, 256):
            yield f"{name} {size}", partial(_attend, dtype, size, 512)
        yield f"{name} 64, all sizes 1", partial(_attend, dtype, 64, 1, heads=(1, 1), keys=1)  # triton folds these in
        yield f"{name}, all sizes 1", partial(_score, dtype, 1, vocabulary=1)
        for size in (64, 128, 256):
            yield f"{name} {size}, few rows", partial(_attend, dtype, size, 4)
            yield f"{name} {size}, options", partial(_attend, dtype, size, 512, options=True)
        yield f"{name}", partial(_score, dtype, 512)
        yield f"{name}, few rows", partial(_score, dtype, 4)
        yield f"{name}, options", partial(_score, dtype, 512, options=True)


def _attend(
    dtype: torch.dtype,
    size: int,
    rows: int,
    *,
    heads: tuple[int, int] = (8, 2),
    keys: int = 4096,
    options: bool = False,
) -> None:
    q, k = torch.empty(rows, heads[0], size, dtype=dtype), torch.empty(keys, heads[1], size, dtype=dtype)
    index = [torch.empty(n, dtype=torch.int32) for n in (rows, keys, rows, keys)]
    sinks, lse = torch.empty(heads[0]) if options else None, torch.empty(rows, heads[0])
    settings = (sinks, 0.1, 2048 if options else 0, 30.0 if options else 0.0)
    trie_attention.trie_attention(q, k, k, *index, *settings)
    if rows != 4:
        trie_attention.trie_attention_backward(q, lse, q, k, k, q, lse, *index, *settings)


def _score(dtype: torch.dtype, rows: int, *, vocabulary: int = 32_000, options: bool = False) -> None:
    hidden, weight = torch.empty(rows, 1024, dtype=dtype), torch.empty(vocabulary, 1024, dtype=dtype)
    row, target, lse = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32), torch.zeros(rows)
    rest = (row, target, torch.empty(vocabulary, dtype=dtype) if options else None)
    settings = (0.5, 30.0 if options else 0.0)
    target_logprob.target_logprob(hidden, weight, *rest, *settings)
    if rows != 4:
        target_logprob.target_logprob_backward(torch.zeros(16), lse, hidden, weight, *rest, lse, *settings, True)


def launches(target: str) -> list[Launch]:
    """What the launchers start on a target, each distinct compilation once, in order."""
    made: dict[str, Launch] = {}
    case = ""
    found = described(*TARGETS[target])

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: values.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in values}
        static = {p.name for p in kernel.params if p.is_constexpr}
        free = {p.name for p in kernel.params if p.do_not_specialize}  # else Triton's jit folds 1 in
        unaligned = free | {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
        static |= {n for n, x in values.items() if x is None or (type(x) is int and x == 1 and n not in free)}
        dynamic = {name: x for name, x in values.items() if name not in static}
        launch = Launch(
            case,
            kernel.__module__.rpartition(".")[2],
            kernel.__name__,
            target,
            {name: triton.runtime.jit.mangle_type(x) if name in dynamic else "constexpr" for name, x in values.items()},
            {name: values[name] for name in sorted(static)},
            tuple(
                n
                for n, x in dynamic.items()
                if n not in unaligned and (isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0))
            ),
            options,
        )
        made.setdefault(repr(launch[1:]), launch)

    with (
        mock.patch.object(triton.runtime.JITFunction, "run", record),
        mock.patch.object(trie_attention, "gpu", return_value=found),
        mock.patch.object(target_logprob, "gpu", return_value=found),
    ):
        for name, call in calls():
            case = name
            call()
    return list(made.values())


def build(launch: Launch) -> Built:
    """Compile a launch and read its resources from the binary."""
    kernel = getattr({"trie_attention": trie_attention, "target_logprob": target_logprob}[launch.op], launch.kernel)
    signature = {name: launch.signature[name] for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): x for name, x in launch.constexprs.items()}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=TARGETS[launch.target][0], options=launch.options)
    if launch.target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, offloaded = (int(re.search(rf"\.{x}:\s+(\d+)", text)[1]) for x in ("vgpr_count", "vgpr_spill_count"))
        matrix, wide = (len(re.findall(x, text)) for x in ("v_mfma", "(?:global|buffer)_load_dwordx4"))
        return Built(registers, compiled.metadata.shared, 4 * offloaded, matrix, 0, wide)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", f"--dump-{what}", cubin.name], capture_output=True, text=True, check=True
            )
            for what in ("resource-usage", "sass")
        )
    registers, stack = (int(re.search(rf"{x}:(\d+)", usage.stdout)[1]) for x in ("REG", "STACK"))
    instruction = {"sm_90": "HGMMA", "sm_100": "UTC.?MMA"}.get(launch.target, "HMMA")
    matrix, hmma, wide = (
        len(re.findall(rf"\b{x}", code.stdout)) for x in (instruction, "HMMA", r"(?:LDG|LDGSTS)\.E\S*\.128\b")
    )
    older = hmma if instruction != "HMMA" else 0
    loops = product_loops(compiled.asm["ttgir"])
    waits = any(0 in loop.waits for loop in loops)
    lengths = [loop.instructions for loop in sass_loops(code.stdout, instruction)]
    facts = waits, sum(loop.divisions for loop in loops), min(lengths, default=0)
    return Built(registers, compiled.metadata.shared, stack, matrix, older, wide, *facts)


def main() -> int:
    """Compile, print the table, name what is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--processes", type=int, default=2, help="that compile at the same time; 2 by default")
    parser.add_argument("--only", default="", help="a regular expression of cases and kernels")
    parser.add_argument(
        "--costs", action="store_true", help="print what the cost models say instead, and compile nothing"
    )
    args = parser.parse_args()
    if args.costs:
        print_costs()
        print_shared()
        return 0
    chosen = [x for t in args.targets for x in launches(t) if re.search(args.only, f"{x.op}{x.kernel} {x.case}")]
    print(f"{'':8}{'kernel':29}{'case':24}{'blocks':>12}{'warps':>6}{'stages':>7}", end="")
    print(f"{'registers':>10}{'shared':>9}{'spilled':>8}{'matrix':>7}{'older':>6}{'16 bytes':>9}{'loop':>6}")
    num_faulty = 0
    with ProcessPoolExecutor(args.processes) as pool:
        for launch, built in zip(chosen, pool.map(build, chosen), strict=True):
            shape = "x".join(str(x) for name, x in launch.constexprs.items() if name in SHAPE)
            warps, stages = (launch.options.get(name, "") for name in ("num_warps", "num_stages"))
            found = faults(launch, built)
            num_faulty += bool(found)
            print(
                f"{launch.target:8}{launch.op + launch.kernel:29}{launch.case:24}{shape:>12}{warps:>6}{stages:>7}",
                end="",
            )
            print(f"{built.registers:10}{built.shared_bytes:9}{built.offloaded_bytes:8}{built.matrix:7}", end="")
            print(f"{built.older_matrix:6}{built.wide_loads:9}{built.instructions:6}", end="")
            print(f"  <-- {', '.join(found)}" if found else "", flush=True)
    print(f"Triton {triton.__version__}: {len(chosen)} compiled, {num_faulty} not as they should be")
    made = compilations() if "sm_90" in args.targets and not args.only else []
    if made:
        print(
            f"{len(made)} compilations for a load and two scoring runs (at most {MOST_COMPILATIONS}): {' '.join(made)}"
        )
    return int(num_faulty > 0 or len(made) > MOST_COMPILATIONS)


def print_costs() -> None:
    """A layer's attention over the trie of the CPU's benchmark, and the head on its rows, on an H100's block shapes.

    MB: of every load and store, most of which the L2 cache serves; us: of the FLOPs at an H100's 798 TFLOP/s.
    """
    print(f"{'':32}{'kernel':14}{'GFLOP':>9}{'MB':>9}{'us':>9}{'whole':>8}{'partial':>8}{'skipped':>8}")

    def show(name: str, costs: list[Cost], kernel: str) -> None:
        flops, read, written, *tiles = map(sum, zip(*costs, strict=True))
        print(f"{name:32}{kernel:14}{flops / 1e9:9.1f}{(read + written) / 1e6:9.1f}{flops / 798e6:9.1f}", end="")
        print(*(f"{n:8}" for n in tiles), sep="")

    chunks = questions(220, 1)
    with (
        mock.patch.object(trie_attention, "gpu", return_value=described(*TARGETS["sm_90"])),
        mock.patch.object(target_logprob, "gpu", return_value=described(*TARGETS["sm_90"])),
    ):
        for heads, size in (((8, 2), 64), ((32, 8), 128)):
            for backward in (False, True):
                found: dict[str, list[Cost]] = {}
                for row_q, end_k, *depths in chunks:
                    q, k = (
                        torch.empty(len(index), n, size, dtype=torch.bfloat16)
                        for index, n in zip((row_q, end_k), heads, strict=True)
                    )
                    costs = attention_costs(q, k, k, row_q, end_k, *depths, backward=backward)
                    for kernel, cost in costs.items():
                        found.setdefault(kernel, []).append(cost)
                for kernel, cost in found.items():
                    show(f"attention, {heads[0]}/{heads[1]} heads of {size}", cost, kernel)
        hidden, weight = torch.empty(512, 4096, dtype=torch.bfloat16), torch.empty(128_000, 4096, dtype=torch.bfloat16)
        head = head_costs(hidden, weight, 512) | head_costs(hidden, weight, 512, backward=True)
        for kernel, cost in head.items():
            show("head, 512 rows, 128,000 x 4,096", [cost], kernel)


def workloads() -> Iterator[tuple[str, trie.Trie]]:
    """The trees of `python -m benchmarks gpu`: random tokens, a context, a question and its choices."""
    rng = random.Random(0)

    def ids(length: int) -> list[int]:
        return [rng.randrange(2, 128_256) for _ in range(length)]

    shots = [ids(700) for _ in range(10)]
    questions = [shots[i // 100] + ids(60 + 7919 * i % 81) for i in range(1000)]
    yield "MMLU-like: 10 x 100 behind 700", trie.build_from_lists([(q, [c]) for q in questions for c in range(4)])
    for name, length, number in (("220 x 4 x 5 over 7,000", 7000, 220), ("1,000 x 4 x 5 over 32,768", 32_768, 1000)):
        context = ids(length)
        prompts = [context + ids(20) for _ in range(number)]
        yield name, trie.build_from_lists([(prompt, ids(5)) for prompt in prompts for _ in range(4)])


def print_shared(engine: str = "cuDNN") -> None:
    """The share of visible pairs in rectangles, and of those that the engine serves, 32 heads of 128 in bfloat16."""
    print(
        f"\n{'share of visible pairs in rectangles':38}{'rows':>7}{'share':>8}{'served':>8}{'shapes':>8}{'chunks':>8}"
    )
    for name, tree in workloads():
        for rows in (512, 4096, 8192):
            found = shared_pairs(tree, rows, engine, 32, 128)
            shares = f"{found.in_rectangles / found.pairs:8.0%}{found.served / found.pairs:8.0%}"
            print(f"{name:38}{rows:7,}{shares}{found.shapes:8}{found.chunks:8}")
    print(f"\n{'least keys that ' + engine + ' is given (estimated)':38}", end="")
    for rows in (512, 1024, 2048, 4096, 8192):
        least = next(keys for keys in range(1, 10**6) if rectangle.gain_s(engine, rows, keys, 32, 128, 2) > 0)
        print(f"  {rows:,} rows: {least:,}", end="")
    print()


def faults(launch: Launch, built: Built) -> list[str]:
    """What limits a build breaks, in words."""
    threads = launch.options.get("num_warps", 4) * TARGETS[launch.target][0].warp_size
    registers = 65_536 if TARGETS[launch.target][0].backend == "cuda" else 131_072
    found = []
    if built.shared_bytes > TARGETS[launch.target][1]:
        found.append("shared memory")
    if built.registers * threads > registers:
        found.append("registers")
    if built.offloaded_bytes:
        found.append("spills")
    if not {"BLOCK_M", "BLOCK_E"} & launch.constexprs.keys() or launch.kernel == "_plan":
        return found  # a kernel without products
    largest = max(launch.constexprs.get(name, 0) for name in ("BLOCK_D", "BLOCK_DV"))
    is_float32 = "float32" in launch.case
    older = is_float32 and (launch.target != "sm_90" or largest > 128)  # mma.sync is allowed
    if not built.wide_loads:
        found.append("no load of 16 bytes")
    if not built.matrix + built.older_matrix or (built.older_matrix > 0 and not older):
        found.append("not on the matrix units")
    if launch.target == "sm_90" and not is_float32:
        if built.waits_at_once:
            found.append("waits for copies just issued")
        if built.divisions:
            found.append("64-bit divisions in a loop")
        plain = launch.op == "trie_attention" and launch.kernel == "_forward" and not launch.constexprs["SOFTCAP"]
        if plain and largest == 128 and built.instructions > MOST_INSTRUCTIONS:
            found.append("too many instructions a tile")
    return found


if __name__ == "__main__":
    sys.exit(main())
