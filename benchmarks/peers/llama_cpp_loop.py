"""llama.cpp on a Job: context and question stay in its KV cache, the choices of a question follow one another."""

import ctypes
import json
import math
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def convert(folder: Path, dtype: str) -> Path:
    """Write a transformers Llama as GGUF, without a tokenizer."""
    path = folder / f"{dtype}.gguf"
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads["attn_q"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, values in load_file(folder / "model.safetensors").items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            short = NAMES[rest.removesuffix(".weight")]
            if short in heads:  # rotary pairs are neighbours in llama.cpp, half a head apart in transformers
                by_head = values.reshape(heads[short], 2, -1, values.shape[1])
                values = by_head.swapaxes(1, 2).reshape(values.shape)
            name = f"blk.{layer}.{short}.weight"
        else:
            name = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        if dtype == "bfloat16" and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Context:
    """A llama.cpp context of one sequence."""

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 16_384, 512, 512
        options.n_threads = options.n_threads_batch = threads
        if dtype == "float32":
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32  # its default is float16
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def read(self, tokens: list[int], past: int, wanted: int) -> np.ndarray:
        """Decode tokens after the first `past`; logits of the last `wanted`, [wanted, V]."""
        memory = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_seq_rm(memory, 0, past, -1)
        logits = []
        for first in range(0, len(tokens), 512):
            part = tokens[first : first + 512]
            self.batch.n_tokens = len(part)
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, past + first + i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = first + i >= len(tokens) - wanted
            if llama_cpp.llama_decode(self.context, self.batch):
                raise RuntimeError("llama_decode failed")
            for i in range(len(part)):
                if self.batch.logits[i]:
                    row = llama_cpp.llama_get_logits_ith(self.context, i)
                    logits.append(
                        np.ctypeslib.as_array(
                            ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
                        ).copy()
                    )
        return np.array(logits)


def logp(logits: np.ndarray, token: int) -> float:
    """Log-probability of one token."""
    top = float(logits.max())
    return float(logits[token]) - top - math.log(np.exp(logits - top).sum())


def main() -> None:
    """Answer the Job named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    context = Context(convert(Path(job["model"]), job["dtype"]), job["dtype"], job["threads"])
    start = time.perf_counter()
    context.read(job["context"], 0, 0)
    once = time.perf_counter() - start
    seconds, results = [], []
    for prompt, choices in list(zip(job["prompts"], job["choices"], strict=True))[: job["sample"]]:
        start = time.perf_counter()
        (after_prompt,) = context.read(prompt, len(job["context"]), 1)
        past = len(job["context"]) + len(prompt)
        scores = []
        for choice in choices:
            rows = context.read(choice[:-1], past, len(choice) - 1) if len(choice) > 1 else []
            scores.append(sum(logp(row, token) for row, token in zip([after_prompt, *rows], choice, strict=True)))
        seconds.append(time.perf_counter() - start)
        results.append(scores)
    print(json.dumps({"once": once, "seconds": seconds, "logp": results}))


if __name__ == "__main__":
    main()
