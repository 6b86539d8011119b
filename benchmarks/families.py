"""`python -m benchmarks.families` (make models): what becomes of every causal family of the installed transformers.

Each family is built tiny and random from one generic config and the few fields of its own that OWN lists, with a window
of 40 where its config has one, and scored at 30, 160 and 600 tokens: equal to its own forward to 1e-4, or refused by
name. Anything else is an error, and the command's exit code 1. The table is written to docs/models.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import UNSERVED, from_network
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

# What a family needs beside the generic config, or instead of it; NONE leaves a field of the generic one out.
NONE = object()
MLA: dict[str, Any] = {  # latent attention, with experts in groups
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SPARSE = MLA | {"index_topk": 40, "index_head_dim": 16, "index_n_heads": 2, "head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
ENCODER = {"pad_token_id": 1, "is_decoder": True, "max_position_embeddings": 660}
DECODER = {  # of an encoder and a decoder
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "pad_token_id": 1,
    "num_key_value_heads": NONE,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "image_size": 28,
    "patch_size": 14,
    "crop_size": 28,
}
VISUAL: dict[str, Any] = {"text_config": GENERIC, "vision_config": VISION}
SHARED = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
GEMMA_N = SHARED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "laurel_rank": 8}
GEMMA_4 = GEMMA_N | {"pad_token_id": 0, "head_dim": 8, "global_head_dim": 16, "num_experts": NONE}
DRAFT = {"num_hidden_layers": 2, "head_dim": 8, "num_experts": NONE}
BYTES = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
OWN: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": SPARSE,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        **{f"{part}_config": BYTES | {"num_hidden_layers": 2} for part in ("patcher", "global")},
        **{
            f"{part}_config": BYTES | {"hidden_size_global": 32, "num_hidden_layers": 2}
            for part in ("encoder", "decoder")
        },
    },
    "codegen": {"rotary_dim": 8, "n_embd": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
    },
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": SPARSE,
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": GENERIC | SPARSE,
        "vision_config": VISION | {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": VISION | {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": SPARSE,
    "emu3": {
        "text_config": GENERIC | {"pad_token_id": 2},
        "vq_config": {"base_channels": 32, "hidden_size": 32, "codebook_size": 64},
        "vocabulary_map": {"<image>": 5},
    },
    "gemma3": VISUAL,
    "gemma3n_text": GEMMA_N,
    "gemma4": {
        "text_config": GENERIC | GEMMA_4,
        "vision_config": VISION | {"head_dim": 8, "position_embedding_size": 64},
    },
    "gemma4_assistant": {
        "backbone_hidden_size": 32,
        "text_config": GENERIC | DRAFT | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gemma4_text": GEMMA_4,
    "gemma4_unified": {
        "text_config": GENERIC | SHARED | {"pad_token_id": 0, "head_dim": 8, "global_head_dim": 16},
        "vision_config": {"patch_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
        "audio_config": {"audio_embed_dim": 32},
    },
    "gemma4_unified_assistant": {"backbone_hidden_size": 32, "text_config": GENERIC | DRAFT},
    "git": {"vision_config": VISION},
    "glm4_moe_lite": MLA,
    "glm_moe_dsa": SPARSE,
    "got_ocr2": VISUAL,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 40},
    "gptj": {"rotary_dim": 8, "n_embd": 64},
    "granitemoehybrid": MAMBA | {"layer_types": ["attention", "attention"]},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"moe_topk": 2, "head_dim": 8},
    "iquestcoder": {"head_dim": 8, "use_sliding_window": NONE},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 1},
    "llama4": VISUAL,
    "longcat_flash": MLA
    | {"num_layers": 2, "ffn_hidden_size": 64, "moe_topk": 2, "zero_expert_num": 2, "head_dim": 8, "qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minicpm3": MLA | {"head_dim": 8},
    "ministral": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mllama": {"text_config": GENERIC | {"pad_token_id": 2, "cross_attention_layers": [1]}, "vision_config": VISION},
    "modernbert-decoder": {"pad_token_id": 2, "local_attention": 40},
    "moss_transcribe_diarize": {"text_config": GENERIC, "audio_config": VISION},
    "phi4_multimodal": {
        "vision_config": VISION,
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_blocks": 1,
            "num_attention_heads": 4,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
        "pad_token_id": 2,
    },
    "plbart": DECODER,
    "prophetnet": {
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "pad_token_id": 2,
        "is_decoder": True,
        **dict.fromkeys(("num_hidden_layers", "num_attention_heads"), NONE),
    },
    "qwen3_5": VISUAL,
    "qwen3_5_moe": VISUAL,
    "qwen4_exp": VISUAL,
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "attention_head_size": 8,
        "pad_token_id": 2,
        "num_hidden_layers": NONE,
    },
    "whisper": DECODER | {"d_model": 32, "max_target_positions": 640},
    "xlm": {"causal": True, "pad_token_id": 2},
    "xlnet": {"max_position_embeddings": NONE, "d_inner": 64, "d_head": 8},
    "xmod": ENCODER | {"default_language": "en_XX"},
    "youtu": MLA,
    "zamba": {"attention_head_dim": 16, "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1, "head_dim": 8, "router_hidden_size": 16},
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), ENCODER
    ),
}


def families() -> list[str]:
    """Every model type with a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are given, in configs of parts too; a copy, since configs change what they take."""
    kept = {name: value for name, value in fields.items() if value is not NONE}
    return {name: _given(value) if isinstance(value, dict) else copy.copy(value) for name, value in kept.items()}


def build(family: str) -> Any:
    """A tiny random network of a family, in float32."""
    import transformers

    config = transformers.CONFIG_MAPPING[family](**_given(GENERIC | OWN.get(family, {})))
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
    logp = network(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(first, len(ids)))


def outcome(family: str) -> tuple[str, str]:
    """("equal" | "refused" | "not built" | "WRONG", why)."""
    ids = torch.randint(2, 300, (max(LENGTHS),), generator=torch.Generator().manual_seed(1)).tolist()
    expected, failed = {}, ""
    try:
        network = build(family)
    except Exception as error:  # a config that does not fit raises anything
        return "not built", _named(error)
    try:
        network.set_attn_implementation("eager")
        expected = {n: plain(network, ids[:n], n - 9) for n in LENGTHS}
    except Exception as error:
        failed = _named(error)
    try:
        model = from_network(network, None, family)
    except ModelError as error:
        if not failed or family in UNSERVED:
            return "refused", str(error).partition("cannot be served: ")[2]
    if failed:
        return "not built", f"its own forward fails: {failed}"
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


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


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
        "from one generic config and a few fields of its own, with a window of 40 tokens where its config has one, and "
        "scored at 30, 160 and 600 tokens. A family is served when every log-probability is that of its own forward "
        "to 1e-4. `load()` proves each checkpoint, whatever this page says "
        "([add-a-model-family.md](add-a-model-family.md)).\n",
        f"**Served: {len(of['equal'])}.** {', '.join(row[0] for row in of['equal'])}.\n",
        *([f"Served up to a length:\n\n{limited}"] if limited else []),
        f"**Refused: {len(of['refused'])}**, with what `load()` says:\n",
        "| family | why |\n|---|---|\n" + "\n".join(f"| {row[0]} | {row[2]} |" for row in of["refused"]) + "\n",
        f"**Not built: {len(of['not built'])}**, so not known; `load()` looks at each checkpoint all the same:\n",
        "| family | why |\n|---|---|\n" + "\n".join(f"| {row[0]} | {row[2]} |" for row in of["not built"]),
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
