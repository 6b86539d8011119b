"""Peak resident memory against the plan, each case in a process of its own; and the planning of a million requests.

Random Llamas score tries of 10,000 to 1,000,000 tokens, a context of 100,000, and one case under each way to take less.
"""

import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Row, status_bytes
from icl_ft_fast.memory import Memory, Need
from icl_ft_fast.model import from_network
from icl_ft_fast.score import loglikelihood

SMALL = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
WIDE = SMALL | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
NARROW = SMALL | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 64}
QUESTION, CHOICES, CHOICE = 12, 4, 3  # tokens of a question, choices, tokens of each
WITHIN = 1.15  # of the plan


@dataclass(frozen=True)
class Case:
    """A forest of questions over one context, and what may be taken for it."""

    context: int
    questions: int
    shape: dict[str, Any]
    limit_mb: int | None = None  # beyond what the process holds before
    kv_dtype: str | None = None
    chunk_rows: int = 512

    @property
    def tokens(self) -> int:
        """Nodes of the trie."""
        return self.context + self.questions * (QUESTION + CHOICES * CHOICE)

    @property
    def name(self) -> str:
        """What tables call it."""
        size = f"{self.tokens:,} tokens, {self.context:,} in context"
        how = [f"{self.limit_mb} MB" if self.limit_mb else "", self.kv_dtype or ""]
        return ", ".join([size, *filter(None, how)])


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    small = [Case(4_000, 250, WIDE), Case(4_000, 250, WIDE, 70), Case(4_000, 250, WIDE, kv_dtype="int8")]
    large = [Case(2_000, 4_083, SMALL), Case(2_000, 41_583, SMALL), Case(100_000, 10, NARROW)]
    return small if quick else [*small, Case(4_000, 250, WIDE, kv_dtype="bfloat16"), *large]


def run(quick: bool) -> list[Row]:
    """Score every case; one that takes more than WITHIN its plan is an error."""
    rows = []
    for case in cases(quick):
        got = measure(case)
        if got["peak_bytes"] > WITHIN * got["planned_bytes"]:
            raise AssertionError(f"{case.name}: {got}")
        rate = case.tokens / got["ms"]
        for variant, size in (("planned", "planned_bytes"), ("resident", "peak_bytes")):
            percent = 100 * got[size] / got["planned_bytes"]
            rows.append(Row("memory", case.name, variant, *[got["ms"]] * 3, rate, "k tokens/s", percent, got[size]))
    return rows


def measure(case: Case) -> dict[str, Any]:
    """What a process that scores the case planned and took at most, bytes beside what it held before; its results."""
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr}")
    got: dict[str, Any] = json.loads(done.stdout)
    return got


def _score(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**case.shape, max_position_embeddings=2**20)).eval()
    model = from_network(network, None, "random", self_check=False)
    held = status_bytes("VmRSS")
    limit = None if case.limit_mb is None else held + case.limit_mb * 10**6
    model = replace(model, memory=Memory(limit, case.kv_dtype))
    generator = torch.Generator().manual_seed(0)

    def draw(number: int) -> list[int]:
        drawn: list[int] = torch.randint(2, 2000, (number,), generator=generator).tolist()
        return drawn

    context, requests = draw(case.context), []
    for _ in range(case.questions):
        question = draw(QUESTION)
        requests += [(context, question + draw(CHOICE)) for _ in range(CHOICES)]
    needs: list[Need] = []
    handler = logging.Handler()
    handler.emit = lambda record: needs.append(record.args[0])  # type: ignore[method-assign, index]
    logging.getLogger("icl_ft_fast.memory").addHandler(handler)
    logging.getLogger("icl_ft_fast.memory").setLevel(logging.INFO)
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back
    begun = time.perf_counter()
    results = loglikelihood(model, requests, chunk_rows=case.chunk_rows)
    ms = (time.perf_counter() - begun) * 1e3
    (need,) = needs
    return {
        "planned_bytes": need.total_bytes - need.held_bytes,
        "peak_bytes": status_bytes("VmHWM") - need.held_bytes,
        "ms": ms,
        "rows": need.rows,
        "capacity": need.capacity,
        "spilled_bytes": need.spilled_bytes,
        "held_bytes": need.held_bytes,
        "kv_bytes": need.kv_bytes,
        "activation_bytes": need.activation_bytes,
        "logp": [result.logp for result in results[:: max(1, len(results) // 1000)]],
    }


if __name__ == "__main__":
    print(json.dumps(_score(Case(**json.loads(sys.argv[1])))))
