"""What compiled code shows of a kernel's loops: waits for copies, instructions, divisions. It reads text."""

import re
from collections.abc import Iterator
from typing import NamedTuple

DOT = re.compile(r"\b(ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot|amdg?gpu\.\w*dot\w*)\b")


class Loop(NamedTuple):
    """An innermost loop of Triton's IR that multiplies matrices.

    waits: for each wait on asynchronous copies, how many younger ones may still be on their way; 0 means that the loop
        waits for the copies which it has just issued.
    divisions: divisions and remainders of 64-bit integers.
    """

    waits: tuple[int, ...]
    divisions: int


def product_loops(ttgir: str) -> list[Loop]:
    """The innermost loops with a matrix product, in order."""
    found: list[Loop] = []
    open_blocks: list[list[str] | None] = []  # the lines of each open loop; None for other blocks
    for line in ttgir.splitlines():
        for lines in open_blocks:
            if lines is not None:
                lines.append(line)
        opened = line.count("{") - line.count("}")
        if "scf.for" in line or "scf.while" in line:
            open_blocks.append([])
        elif opened > 0:
            open_blocks.extend([None] * opened)
        elif opened < 0:
            for _ in range(-opened):
                lines = open_blocks.pop()
                if lines and _is_innermost(lines):
                    found.append(_loop(lines))
    return found


def _is_innermost(lines: list[str]) -> bool:
    inner = [list(x) for x in _inner_loops(lines)]
    return any(map(DOT.search, lines)) and not any(DOT.search(line) for loop in inner for line in loop)


def _inner_loops(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each loop inside a loop's lines."""
    for i, line in enumerate(lines):
        if "scf.for" not in line and "scf.while" not in line:
            continue
        depth, body = 1, []
        for inner in lines[i + 1 :]:
            depth += inner.count("{") - inner.count("}")
            if depth <= 0:
                break
            body.append(inner)
        yield body


def _loop(lines: list[str]) -> Loop:
    waits = [int(m[1]) for line in lines if (m := re.search(r"async_wait.*\{num = (\d+)", line))]
    divisions = sum(bool(re.search(r"arith\.(div|rem)[su]i .*i64", line)) for line in lines)
    return Loop(tuple(waits), divisions)


class SassLoop(NamedTuple):
    """An innermost loop of machine code that multiplies matrices: instructions that a warp issues in a round."""

    instructions: int
    calls: int


def sass_loops(sass: str, matrix: str = "HGMMA") -> list[SassLoop]:
    """The innermost loops with a matrix instruction, in order of address."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    loops = []
    for address, text in code:
        if (m := re.search(r"\bBRA(?:\.\w+)* (?:\S+, )?(?:`\()?0x([0-9a-f]+)", text)) and int(m[1], 16) < address:
            loops.append((int(m[1], 16), address))
    bodies = {}
    for first, last in loops:
        body = [text for address, text in code if first <= address <= last]
        if any(re.search(rf"\b{matrix}\b", text) for text in body):
            bodies[first, last] = body
    inner = [x for x in bodies if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in bodies)]
    return [SassLoop(len(bodies[x]), sum("CALL" in text for text in bodies[x])) for x in sorted(inner)]
