"""Greedy decoding of 64 prompts over one context of 2,000 tokens: icl_ft_fast against transformers' generate.

A random 30M Llama. transformers decodes the prompts (of one length, so unpadded) in batches of each size in BATCHES;
its rows share no prefix, so each reads the context again. In float32 both continue with the same tokens, or nothing is
printed. Each is run once after a warm-up on two prompts; transformers on one batch, its time scaled to all prompts.
"""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import icl_ft_fast as iff
from benchmarks.score import DTYPES, SIZES, save_model
from benchmarks.timing import Row
from icl_ft_fast.engine.generate import Sampling, generate
from icl_ft_fast.engine.model import Model

PROMPTS, CONTEXT_TOKENS, NEW_TOKENS = 64, 2000, 64
BATCHES = (16, 4)


def run(quick: bool) -> list[Row]:
    """Time every dtype and batch size; `quick` takes fewer and shorter prompts."""
    shape = (8, 200, 8) if quick else (PROMPTS, CONTEXT_TOKENS, NEW_TOKENS)
    count, context_tokens, new_tokens = shape
    generator = torch.Generator().manual_seed(0)
    context, *tails = (
        torch.randint(2, 8000, (n,), generator=generator).tolist() for n in [context_tokens] + [20] * count
    )
    prompts = [[*context, *tail] for tail in tails]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), SIZES["30M"], ["a corpus of no importance"])
        for dtype in DTYPES:
            model = iff.load(folder, dtype=dtype)
            model.tokenizer.eos_token = None  # so that every continuation has its full length
            model.network.generation_config.eos_token_id = None
            network = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
            network.generation_config.eos_token_id = None
            ours = functools.partial(_ours, model, new_tokens)
            variants: dict[str, Callable[[list[list[int]]], list[list[int]]]] = {"icl_ft_fast": ours}
            for batch in BATCHES[: 1 if quick else None]:
                variants[f"transformers ({batch})"] = functools.partial(_theirs, network, new_tokens, batch)
            case = f"30M {dtype}, {count} x {new_tokens} after {context_tokens:,}, {torch.get_num_threads()} threads"
            written, sizes = {}, {"icl_ft_fast": count}
            sizes |= {f"transformers ({batch})": min(batch, count) for batch in BATCHES}
            for variant, call in variants.items():
                sample = prompts[: sizes[variant]]
                call(prompts[:2])
                start = time.perf_counter()
                written[variant] = call(sample)
                ms = (time.perf_counter() - start) * 1e3 * count / len(sample)
                rows.append(Row("generate", case, variant, ms, ms, ms, count * new_tokens / ms * 1e3, "tokens/s"))
            for variant, theirs in written.items() if dtype == "float32" else ():
                alike = sum(a == b for a, b in zip(written["icl_ft_fast"], theirs, strict=False))
                if alike < len(theirs):
                    raise AssertionError(f"{len(theirs) - alike} of {len(theirs)} differ from those of {variant}")
    return rows


def _ours(model: Model, new_tokens: int, prompts: list[list[int]]) -> list[list[int]]:
    return [list(written.ids) for written in generate(model, prompts, Sampling(new_tokens))]


@torch.inference_mode()
def _theirs(network: LlamaForCausalLM, new_tokens: int, batch: int, prompts: list[list[int]]) -> list[list[int]]:
    written: list[list[int]] = []
    for first in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[first : first + batch])  # of one length, so there is nothing to pad
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
        )
        written += out[:, ids.shape[1] :].tolist()
    return written
