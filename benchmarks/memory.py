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

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Row, status_bytes
from icl_ft_fast.engine import trie
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.engine.memory import Memory, Need

SMALL = {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4}
WIDE = SMALL | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 4}
NARROW = SMALL | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 64}
QUESTION, CHOICES, CHOICE = 12, 4, 3  # tokens of a question, choices, tokens of each
WITHIN = 1.15  # of the plan


@dataclass(frozen=True)
class Case:
    """A tree of questions over one context, and what may be taken for it."""

    context: int
    questions: int
    shape: dict[str, Any]
    limit_mb: int | None = None  # beyond what the process holds before
    kv_dtype: str | None = None
    chunk_tokens: int = 512

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
    small = [Case(4_000, 250, WIDE), Case(4_000, 250, WIDE, 90), Case(4_000, 250, WIDE, kv_dtype="int8")]
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
    got = _child({"requests": 10_000 if quick else 1_000_000})
    name = f"{got['requests']:,} requests of {got['tokens']:,} tokens, {got['nodes']:,} distinct"
    for variant in ("build", "plan"):
        rate = got["nodes"] / got[f"{variant}_ms"]
        rows.append(
            Row("memory", name, variant, *[got[f"{variant}_ms"]] * 3, rate, "k nodes/s", None, got["peak_bytes"])
        )
    return rows


def measure(case: Case) -> dict[str, Any]:
    """What a process that scores the case planned and took at most, bytes beside what it held before; its results."""
    return _child(asdict(case))


def _child(arguments: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    got: dict[str, Any] = json.loads(done.stdout)
    return got


def _score(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**case.shape, max_position_embeddings=2**20)).eval()
    model = from_network(network, None, "random", self_check=False)
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
    logging.getLogger("icl_ft_fast.engine.memory").addHandler(handler)
    logging.getLogger("icl_ft_fast.engine.memory").setLevel(logging.INFO)
    limit = None if case.limit_mb is None else status_bytes("VmRSS") + case.limit_mb * 10**6
    model = replace(model, memory=Memory(limit, case.kv_dtype))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back
    begun = time.perf_counter()
    results = loglikelihood(model, requests, chunk_tokens=case.chunk_tokens)
    ms = (time.perf_counter() - begun) * 1e3
    (need,) = needs
    return {
        "planned_bytes": need.total_bytes - need.held_bytes,
        "peak_bytes": status_bytes("VmHWM") - need.held_bytes,
        "ms": ms,
        "rows": need.rows,
        "capacity": need.capacity,
        "offloaded_bytes": need.offloaded_bytes,
        "held_bytes": need.held_bytes,
        "kv_bytes": need.kv_bytes,
        "activation_bytes": need.activation_bytes,
        "logp": [result.logp for result in results[:: max(1, len(results) // 1000)]],
    }


def _plan(requests: int) -> dict[str, Any]:
    """Merge requests in random order: four choices a question, over contexts of 3,980 tokens that share documents."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 32_000, 2_000).tolist() for _ in range(10)]
    contexts = [documents[c % 10] + rng.integers(2, 32_000, 1_980).tolist() for c in range(min(1_000, requests // 4))]
    pairs = []
    for context in contexts:
        for question in rng.integers(2, 32_000, (requests // len(contexts) // 4, 44)).tolist():
            pairs += [(context, question[:12] + question[12 + 8 * k : 20 + 8 * k]) for k in range(4)]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    Path("/proc/self/clear_refs").write_text("5")
    held, begun = status_bytes("VmRSS"), time.perf_counter()
    tree = trie.build_from_lists(pairs)
    built = time.perf_counter()
    plan = trie.plan(tree, 512)
    done = time.perf_counter()
    return {
        "requests": len(pairs),
        "tokens": tree.request_tokens // len(pairs),
        "nodes": len(tree.node_token),
        "chunks": len(plan.chunks),
        "build_ms": (built - begun) * 1e3,
        "plan_ms": (done - built) * 1e3,
        "peak_bytes": status_bytes("VmHWM") - held,
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(_plan(**given) if "requests" in given else _score(Case(**given))))
