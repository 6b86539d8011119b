"""`python -m benchmarks.families` (make models): what becomes of every causal family of the installed transformers.

Each family is built tiny and random from one generic config, with a window of 40 where its config has one, and scored
at 30, 160 and 600 tokens: equal to its own forward to 1e-4, or refused by name. Anything else is an error, and the
command's exit code 1. The table is written to docs/models.md.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network
from icl_ft_fast.engine.model import ModelError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LENGTHS = (30, 160, 600)
WITHIN = 1e-4  # of the log-probability of nine tokens, relative to its size
GENERIC: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 640,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "sliding_window": 40,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
LARGE = 20_000_000  # weights: a family whose config does not shrink is left out


def families() -> list[str]:
    """Every model type with a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(family: str) -> Any:
    """A tiny random network of a family, in float32."""
    import transformers

    config = transformers.CONFIG_MAPPING[family](**GENERIC)
    with torch.device("meta"):
        size = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGE:
        raise ValueError(f"{size:,} weights")
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    return network


@torch.inference_mode()
def plain(network: Any, ids: list[int], first: int) -> float:
    """Log-probability of ids[first:] after the ids before by one forward of the network's own."""
    network.set_attn_implementation("eager")
    logp = network(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(first, len(ids)))


def outcome(family: str) -> tuple[str, str]:
    """("equal" | "refused" | "not built" | "WRONG", why)."""
    try:
        network = build(family)
        ids = torch.randint(2, 300, (max(LENGTHS),), generator=torch.Generator().manual_seed(1)).tolist()
        expected = {n: plain(network, ids[:n], n - 9) for n in LENGTHS}
    except Exception as error:  # a config that the generic one does not fit raises anything
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        model = from_network(network, None, family)
    except ModelError as error:
        return "refused", str(error).partition("cannot be served: ")[2]
    reached = [n for n in LENGTHS if n <= model.max_positions]
    for n in reached:
        try:
            got = loglikelihood(model, [(ids[: n - 9], ids[n - 9 : n])])[0].logp
        except Exception as error:
            return "WRONG", f"{n} tokens: {type(error).__name__}: {error}"
        if not abs(got - expected[n]) <= WITHIN * max(1.0, abs(expected[n])):
            return "WRONG", f"{n} tokens: {got:.4f}, its own forward {expected[n]:.4f}"
    limit = "" if reached == list(LENGTHS) else f"up to {model.max_positions} tokens"
    return "equal", limit


def rows() -> Iterator[tuple[str, str, str]]:
    """(family, outcome, why) of every family."""
    for family in families():
        result, why = outcome(family)
        print(f"{family}: {result} {why}", file=sys.stderr, flush=True)
        yield family, result, why


def page(found: list[tuple[str, str, str]]) -> str:
    """docs/models.md."""
    import transformers

    of = {kind: [row for row in found if row[1] == kind] for kind in ("equal", "refused", "not built", "WRONG")}
    limited = "".join(f"- {family}: {why}\n" for family, _, why in of["equal"] if why)
    lines = [
        "# Model families\n",
        f"Written by `make models` with transformers {transformers.__version__}. Each family is built tiny and random "
        "from one generic config, with a window of 40 tokens where its config has one, and scored at 30, 160 and 600 "
        "tokens. A family is served when every log-probability is that of its own forward to 1e-4. `load()` proves "
        "each checkpoint, whatever this page says ([add-a-model-family.md](add-a-model-family.md)).\n",
        f"**Served: {len(of['equal'])}.** {', '.join(row[0] for row in of['equal'])}.\n",
        *([f"Served up to a length:\n\n{limited}"] if limited else []),
        f"**Refused: {len(of['refused'])}**, with what `load()` says:\n",
        "| family | why |\n|---|---|\n" + "\n".join(f"| {row[0]} | {row[2]} |" for row in of["refused"]) + "\n",
        f"**Not built from the generic config: {len(of['not built'])}**, so not known: "
        f"{', '.join(row[0] for row in of['not built'])}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page; exit with 1 where a family is served and wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description="Try every causal family.")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/models.md)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    found = list(rows())
    options.out.write_text(re.sub(r" +\n", "\n", page(found)), encoding="utf-8")
    wrong = [row for row in found if row[1] == "WRONG"]
    sys.exit("\n".join(f"{family}: {why}" for family, _, why in wrong) or 0)


if __name__ == "__main__":
    main()
