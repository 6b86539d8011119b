"""Where a part of the bring-up runs, what it times and what it tells."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Row, measure, peak_bytes

OURS, HEADS, KV_HEADS = "icl_ft_fast", 32, 8
PER_MS = {"TFLOP/s": 1e-9, "GB/s": 1e-6, "tokens/s": 1e3}  # of one unit of work a millisecond
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
SENSORS = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_event_reasons.active")  # of nvidia-smi, once a second
BESIDE = ("host_ms", "compile_s", *SENSORS)  # columns of the CSV beside those of a Row
Variants = dict[str, Callable[[], Any] | str]  # a string says why there is nothing to call
Index = tuple[Tensor, Tensor, Tensor, Tensor]  # row_q, end_k, depth_q, depth_k
Rows = dict[str, Row]  # of a case, by variant


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
                self.tell(Note(case, variant, first_lines(error)))
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
            self.tell(Note(case, OURS, f"WRONG: {first_lines(error)}"))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def percent(self, rate: float, unit: str) -> float | None:
        """Of the ceiling in that unit, where there is one."""
        return 100 * rate / self.ceilings[unit] if unit in self.ceilings else None


def first_lines(error: BaseException) -> str:
    return f"{type(error).__name__}: {' / '.join(str(error).strip().splitlines()[:3])[:300]}"


def random_ids(bench: Bench, seed: int, lengths: list[int]) -> list[list[int]]:
    """Random token ids of these lengths."""
    most = (TOY if bench.small else LLAMA_8B)["vocab_size"]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, most, (length,), generator=generator).tolist() for length in lengths]
