"""The table of what was measured: each case with its bar, and lines for LOG.md."""

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.bench import OURS, Note, Rows
from benchmarks.timing import Row

CUT = ("liger-kernel", "cut-cross-entropy, exact")
# By the beginning of a case: what is to be reached, and whether it was; a rival that is missing is a KeyError.
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


def _times(rows: Rows, *names: str) -> float:
    """How many times as fast ours is as the fastest whose name begins so."""
    return min(row.ms for variant, row in rows.items() if variant.startswith(names)) / rows[OURS].ms


def _first(rows: Rows, name: str) -> Row:
    """The row of the first variant whose name begins so."""
    return rows[next((variant for variant in rows if variant.startswith(name)), name)]


def _leaner(rows: Rows, *names: str) -> bool:
    """Whether ours takes no more memory than each of those."""
    return all((rows[OURS].peak_bytes or 0) <= (rows[name].peak_bytes or 0) for name in names)


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
