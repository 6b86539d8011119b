"""Every family against its own plain forward; what load() refuses and why."""

import copy
import json
import os
import random
import re
import shutil
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from close import assert_close
from conftest import VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from icl_ft_fast.engine import loading, trie
from icl_ft_fast.engine import model as model_module
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.forward import footprint_of, hidden_states
from icl_ft_fast.engine.kv_cache import KVCache
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import from_network, load
from icl_ft_fast.engine.model import Model, ModelError

MOE = {"num_experts_per_tok": 2}
# Windows of 8 are shorter than the requests, and every kind of layer appears; caps are low enough to bite.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {},
    "gemma": {},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"sliding_window": 8},
    "phi": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "granite": {
        "logits_scaling": 3.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
    },
    "cohere": {"logit_scale": 0.25},
    "starcoder2": {"sliding_window": 8},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "smollm3": {},
    "olmoe": {"num_experts": 4, **MOE},
    "mixtral": {"num_local_experts": 4, "sliding_window": 8, **MOE},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, **MOE},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8, **MOE},
    "glm4": {},
    "exaone4": {"sliding_window": 8},
    "ernie4_5": {},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 4,
        **MOE,
    },
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 64},
    "lfm2": {},
}
# A family inside a larger one: what concerns the text model is one level down in its config.
NESTED = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
        | {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        | {"max_position_embeddings": 256}
        | FAMILIES["gemma3_text"],
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        | {"image_size": 32, "patch_size": 16},
    }
}
REFUSED = ["bloom", "mpt", "mamba", "qwen3_next", "falcon_h1", "stablelm", "nemotron", "gptj"]
ROPE_SCALING = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def greedy_tokens(network, context, number):
    ids = list(context)
    for _ in range(number):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(context) :]


def requests_for(network, context_tokens=20):
    rng = random.Random(0)

    def draw(number):
        return [rng.randrange(2, 300) for _ in range(number)]

    shared = draw(context_tokens)
    made = []
    for _ in range(4):  # questions about one document, one of them right after it
        question = shared + draw(len(made) % 4)
        made += [(question, draw(rng.randint(1, 6))) for _ in range(3)]
    made += [(shared, [token]) for token in draw(3)]  # one token each
    longest = draw(5)
    made += [(shared, longest[:n]) for n in (1, 2, 5)]  # each a prefix of the next
    made += [made[0], made[0]]
    whole = shared + longest
    made += [
        (whole[:at], whole[at:]) for at in (1, context_tokens // 2, len(whole) - 1)
    ]  # the same tokens, cut elsewhere
    right = greedy_tokens(network, shared, 4)
    made += [(shared, right), (shared, right[:3]), (shared, [*right[:3], (right[3] + 1) % 300])]
    made += [([7], [8]), ([7], [8, 9])]  # shares nothing
    return made


def assert_equal_to_plain(model, network, plain, requests, chunk_tokens):
    results = loglikelihood(model, requests, chunk_tokens=chunk_tokens)
    assert len(results) == len(requests)
    for r, ((context, continuation), got) in enumerate(zip(requests, results, strict=True)):
        logp, is_greedy = plain(network, context, continuation)
        error = abs(got.logp - logp.sum().item())
        assert error <= min(1e-4, 1e-5 * len(continuation)), f"request {r}: {got.logp}, alone {logp.sum().item()}"
        assert got.is_greedy == is_greedy, f"request {r}: greedy {got.is_greedy}, alone {is_greedy}"
    assert {result.is_greedy for result in results} == {False, True}


@pytest.mark.parametrize("family", [*FAMILIES, *NESTED])
def test_a_family_scores_as_one_plain_forward_a_request_does(family, tiny_network, plain):
    options = FAMILIES.get(family) or NESTED.get(family, {})
    network, model = tiny_network(family, **options), from_network(tiny_network(family, **options), None, family)
    requests = requests_for(network)
    for chunk_tokens in (16, 512):
        assert_equal_to_plain(model, network, plain, requests, chunk_tokens)


@pytest.mark.parametrize("scaling", ROPE_SCALING)
def test_rotary_scaling_does_not_depend_on_what_else_is_in_a_chunk(scaling, tiny_network, plain):
    options = {"rope_scaling": ROPE_SCALING[scaling], "num_hidden_layers": 2}
    network, model = tiny_network("llama", **options), from_network(tiny_network("llama", **options), None, scaling)
    assert_equal_to_plain(model, network, plain, requests_for(network, context_tokens=90), 16)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def served(request, tiny_network):
    """A network and a model of the same weights."""
    options = FAMILIES[request.param]
    return tiny_network(request.param, **options), from_network(tiny_network(request.param, **options), None, "served")


@pytest.mark.parametrize("chunk_tokens", [16, 17, 31, 33, 64, 100_000])
def test_any_chunk_budget_gives_what_plain_forwards_give(served, chunk_tokens, plain):
    network, model = served
    assert_equal_to_plain(model, network, plain, requests_for(network), chunk_tokens)


PART = st.lists(st.sampled_from([0, 5, 299]), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None)
@given(requests=st.lists(st.tuples(PART, PART), min_size=1, max_size=8), chunk_tokens=st.integers(1, 12))
def test_any_requests_in_chunks_of_any_size_give_what_plain_forwards_give(served, plain, requests, chunk_tokens):
    network, model = served
    for (context, continuation), got in zip(
        requests, loglikelihood(model, requests, chunk_tokens=chunk_tokens), strict=True
    ):
        logp, is_greedy = plain(network, context, continuation)
        assert got.logp == pytest.approx(logp.sum().item(), rel=0, abs=1e-5 * len(continuation))
        assert got.is_greedy == is_greedy


def test_a_forest_at_once_gives_the_hidden_states_of_its_chunks(served):
    network, model = served
    tree = trie.build_from_lists(requests_for(network))
    plan = trie.plan(tree, 16)
    cache = KVCache(plan.capacity)
    with torch.no_grad():
        chunks = torch.cat([hidden for _, hidden in hidden_states(model, plan, cache)])
        torch.testing.assert_close(model.forward_tree(tree), chunks, rtol=0, atol=1e-5)


HEADS = {
    "cohere": {"scale": 0.25},
    "granite": {"scale": 1 / 3},
    "gemma2": {"softcap": 3.0},
    "gemma3": {},
    "phi": {"bias": True},
    "llama": {},
}


@pytest.mark.parametrize("family", HEADS)
def test_the_head_is_the_networks_own(family, tiny_network):
    options = FAMILIES.get(family) or NESTED.get(family, {})
    network, model = tiny_network(family, **options), from_network(tiny_network(family, **options), None, family)
    expected = {"scale": 1.0, "softcap": None, "bias": False} | HEADS[family]
    head = model.head
    assert head.scale == pytest.approx(expected["scale"])
    assert (head.softcap, head.bias is not None) == (expected["softcap"], expected["bias"])
    ids = torch.arange(2, 22)
    with torch.no_grad():
        hidden = network.base_model(ids[None], use_cache=False).last_hidden_state[0]
        exact = network(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        logp, is_argmax = model.target_logprob(
            hidden, torch.arange(20).repeat_interleave(300), torch.arange(300).repeat(20)
        )
    torch.testing.assert_close(logp.reshape(20, 300).double(), exact, rtol=0, atol=1e-5)
    assert torch.equal(is_argmax.reshape(20, 300), exact == exact.max(-1, keepdim=True).values)


def checkpoint_of(folder, family, **options):
    """A directory that says it holds this family; its weights are never reached."""
    AutoConfig.for_model(family, **options).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("family", REFUSED)
def test_loading_a_family_that_cannot_be_served_says_so(family, tmp_path):
    with pytest.raises(ModelError, match=f"^{family}: this family cannot be served: "):
        load(checkpoint_of(tmp_path, family))


# What the self-check must find without the list, and families it alone knows.
UNLISTED = {
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 256},
    "stablelm": {},
    "nemotron": {},
    "gptj": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    "mamba": {"state_size": 4},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64},
    "hyperclovax": {"logits_scaling": 3.0},  # its head multiplies where granite's divides
    "gemma3": {**NESTED["gemma3"], "text_config": NESTED["gemma3"]["text_config"] | {"final_logit_softcapping": 3.0}},
}


@pytest.mark.parametrize("family", UNLISTED)
def test_the_self_check_refuses_a_family_whose_results_would_differ(family, tiny_network, monkeypatch):
    monkeypatch.setattr(loading, "UNSERVED", {})
    with pytest.raises(ModelError, match=f"^here: {family}: this family cannot be served: "):
        from_network(tiny_network(family, **UNLISTED[family]), None, "here")


def blind(rows):
    """Every earlier row is seen, whatever branch it is on."""
    return replace(rows, end_k=torch.full_like(rows.end_k, 2**30))


def in_rows(rows):
    """Distances are counted in rows, not along the path."""
    size = len(rows.end_k)
    return replace(rows, depth_q=rows.row_q, depth_k=torch.arange(size, dtype=torch.int32))


def assert_refused_with(attention, network, monkeypatch):
    try:
        with monkeypatch.context() as patch:
            patch.setattr(model_module, "_trie_attention", attention)
            with pytest.raises(ModelError, match="hidden states differ from its own forward by"):
                from_network(network, None, "here")
    finally:
        model_module.register_attention()  # transformers kept the wrong one


@pytest.mark.parametrize(("family", "wrong"), [("llama", blind), ("mistral", in_rows)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_refuses_an_attention_that_is_wrong(family, wrong, dtype, tiny_network, monkeypatch):
    right = model_module._trie_attention

    def attention(*args, icl_rows, **kwargs):
        return right(*args, icl_rows=wrong(icl_rows), **kwargs)

    network = tiny_network(family, **FAMILIES[family]).to(dtype)
    assert_refused_with(attention, network, monkeypatch)
    from_network(network, None, "here")


def test_in_bfloat16_a_tenth_of_the_scale_is_seen(tiny_network, monkeypatch):
    right = model_module._trie_attention
    network = tiny_network("llama").bfloat16()
    before = {name: (p.data_ptr(), p.clone()) for name, p in network.named_parameters()}

    def attention(*args, scaling, **kwargs):
        return right(*args, scaling=1.1 * scaling, **kwargs)

    assert_refused_with(attention, network, monkeypatch)
    from_network(network, None, "here")
    for name, p in network.named_parameters():  # which were float32 for a moment
        assert p.dtype == torch.bfloat16
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
        assert not p.is_inference()


def test_the_self_check_can_be_left_out(tiny_network):
    from_network(tiny_network("lfm2", full_attn_idxs=[1, 3]), None, "here", self_check=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_to_bfloat16_is_no_reason_to_refuse(family, tiny_network):
    for std in (0.1, 0.3):
        from_network(tiny_network(family, std=std, **FAMILIES[family]).bfloat16(), None, family)


def test_a_loaded_directory_scores_as_the_network_saved_there(llama, plain_llama, plain, tokenizer):
    assert_equal_to_plain(llama, plain_llama, plain, requests_for(plain_llama), 512)
    text = "who knows why it is near — 42"
    assert llama.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (llama.max_positions, llama.device, llama.network.training) == (256, torch.device("cpu"), False)
    assert llama.num_parameters == sum(p.numel() for p in plain_llama.parameters())


def test_bfloat16_is_within_the_error_budget(llama_directory, plain_llama, plain, tiny_network):
    model = load(llama_directory, dtype="bfloat16")
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    same_dtype = tiny_network("llama", num_hidden_layers=2).bfloat16()
    exact = tiny_network("llama", num_hidden_layers=2).bfloat16().double()
    requests = requests_for(plain_llama)
    columns = [
        [result.logp for result in loglikelihood(model, requests)],
        *([plain(network, *request)[0].sum().item() for request in requests] for network in (same_dtype, exact)),
    ]
    got, same, exact64 = (torch.tensor(column, dtype=torch.float64) for column in columns)
    assert_close(got.bfloat16(), same.bfloat16(), exact64, "log-likelihood")


def test_missing_directory(tmp_path):
    with pytest.raises(ModelError, match=r"nothing: no such directory or GGUF file"):
        load(tmp_path / "nothing")


def test_file_instead_of_a_directory(tmp_path):
    (tmp_path / "weights").write_text("")
    with pytest.raises(ModelError, match="weights: neither a directory with a checkpoint nor a GGUF file"):
        load(tmp_path / "weights")


def test_hub_name_that_is_not_on_this_machine():
    with pytest.raises(ModelError, match=r"^nobody/nothing: cannot be loaded as a causal language model: "):
        load("nobody/nothing")


def without_config(folder):
    (folder / "config.json").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')


def undecodable_config(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')


def null_config(folder):
    (folder / "config.json").write_text("null")


def no_family(folder):
    (folder / "config.json").write_text("{}")


def unknown_family(folder):
    (folder / "config.json").write_text('{"model_type": "nosuch"}')


def no_language_model(folder):
    (folder / "config.json").write_text('{"model_type": "t5"}')


def wrong_type(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')


def pointer_for_config(folder):
    (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def other_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def own_code(folder):
    (folder / "code.py").write_text("raise SystemExit('ran')")
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}')


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])


def missing_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoilt_header(folder, header=lambda header: header, length=None):
    """Another header before the same tensors, or a length of one that is not there."""
    whole = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    text = json.dumps(header(json.loads(whole[8:end]))).encode()
    length = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + whole[end:])


def oversized_header(folder):
    spoilt_header(folder, length=2**40)


def overlapping_tensors(folder):
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    spoilt_header(folder, lambda header: header | {first: header[second]})


def tensors_beyond_the_file(folder):
    name = "model.embed_tokens.weight"
    spoilt_header(folder, lambda header: header | {name: header[name] | {"shape": [2**40, 32]}})


def one_value_not_finite(value):
    def spoil(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][VOCABULARY - 1, 3] = value  # a token that the self-check does not draw
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def nested(file):
    return lambda folder: (folder / file).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def of_config(**fields):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return spoil


def a_huge_number(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": ' + "9" * 100_000 + "}")


def sharded(shard):
    """An index that sends one of the tensors elsewhere, where there is what was to be read."""

    def spoil(folder):
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        shutil.copy(folder / "model-1.safetensors", folder.parent / "outside.safetensors")
        torch.save(load_file(folder / "model-1.safetensors"), folder / "shard.bin")
        names = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
        names["model.norm.weight"] = shard if isinstance(shard, int) else shard.format(outside=folder.parent)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return spoil


def broken_index(folder):
    sharded("model-1.safetensors")(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')


def linked(file):
    def spoil(folder):
        (folder / file).rename(folder.parent / "elsewhere")
        (folder / file).symlink_to(folder.parent / "elsewhere")

    return spoil


def weights_that_are_a_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def tokenizer_s_own_code(folder):
    (folder / "code.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "code.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | own))


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")


def holding(file, content):
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(content)


def lfs_pointer(name):
    def spoil(folder):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_config, "no checkpoint here: config.json is missing"),
        (broken_config, "config.json: not valid JSON: "),
        (undecodable_config, "config.json: not valid JSON: "),
        (null_config, "config.json: expected a JSON object, got NoneType"),
        (holding("tokenizer_config.json", "[1]"), "tokenizer_config.json: expected a JSON object, got list"),
        (holding("generation_config.json", "{"), "generation_config.json: not valid JSON: "),
        (holding("generation_config.json", '{"eos_token_id": -1}'), "generation_config.json: eos_token_id: expected"),
        (holding("chat_template.jinja", b"\xff"), r"chat_template\.jinja: damaged, or not such a file: "),
        (of_config(max_position_embeddings=-5), "config.json: max_position_embeddings: expected at least 1, got -5"),
        (
            holding("config.json", json.dumps({"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4})),
            "falcon: this family cannot be served: its attention does not use transformers",
        ),
        (of_config(hidden_act="zork"), "cannot be loaded as a causal language model: KeyError: 'zork'"),
        (no_family, "cannot be loaded as a causal language model: Unrecognized model"),
        (unknown_family, "cannot be loaded as a causal language model: .*nosuch"),
        (no_language_model, "cannot be loaded as a causal language model: .*T5Config"),
        (wrong_type, "cannot be loaded as a causal language model: .*hidden_size"),
        (other_shapes, "the file has the shape .* and config.json asks for "),
        (pointer_for_config, "config.json: a Git LFS pointer, not the file itself"),
        (own_code, "cannot be loaded as a causal language model: .*custom code"),
        (pickle_only, "pytorch_model.bin: pickle weights can run code .* convert the checkpoint to safetensors"),
        (no_weights, r"no checkpoint here: no \*\.safetensors file"),
        (truncated_weights, r"model\.safetensors: damaged, or not such a file: .*header"),
        (missing_tensor, r"lacks 1 of the network's tensors, model\.layers\.1\.mlp\.up_proj\.weight first"),
        (oversized_header, r"model\.safetensors: damaged, or not such a file: .*header too large"),
        (overlapping_tensors, r"model\.safetensors: damaged, or not such a file: .*invalid offset"),
        (tensors_beyond_the_file, r"model\.safetensors: damaged, or not such a file: .*header"),
        (one_value_not_finite(float("nan")), r"model\.embed_tokens\.weight: has values that are not finite"),
        (one_value_not_finite(float("-inf")), r"model\.embed_tokens\.weight: has values that are not finite"),
        (nested("config.json"), "config.json: not valid JSON: maximum recursion depth"),
        (nested("tokenizer.json"), "tokenizer.json: not valid JSON: maximum recursion depth"),
        (nested("generation_config.json"), "generation_config.json: not valid JSON: maximum recursion depth"),
        (a_huge_number, "config.json: not valid JSON: "),
        (of_config(vocab_size=10**12), "cannot be loaded as a causal language model: "),
        (of_config(intermediate_size=10**12), "cannot be loaded as a causal language model: "),
        (of_config(num_hidden_layers=10**9), "config.json: num_hidden_layers: expected at most 4,096"),
        (of_config(num_attention_heads=0), "cannot be loaded as a causal language model: "),
        (sharded("../outside.safetensors"), r"index.json: '\.\./outside\.safetensors': expected the name of a .saf"),
        (sharded("{outside}/outside.safetensors"), r"index.json: '/.*outside\.safetensors': expected the name of a"),
        (sharded("shard.bin"), r"index.json: 'shard\.bin': expected the name of a .safetensors file of this directory"),
        (sharded(7), r"index.json: 7: expected the name of a .safetensors file of this directory"),
        (broken_index, r"index.json: not an index of shards: "),
        (linked("model.safetensors"), r"model\.safetensors: no file of this directory: a link out of it"),
        (linked("tokenizer.json"), r"tokenizer\.json: no file of this directory: a link out of it"),
        (weights_that_are_a_pipe, r"model\.safetensors: no file of this directory"),
        (tokenizer_s_own_code, "cannot be loaded as a causal language model: .*custom code"),
        (lfs_pointer("model.safetensors"), r"model\.safetensors: a Git LFS pointer, not the file itself"),
        (lfs_pointer("tokenizer.json"), r"tokenizer\.json: a Git LFS pointer, not the file itself"),
        (
            of_config(quantization_config={"quant_method": "gptq", "bits": 4}),
            r"quantised weights \(gptq\) are not served",
        ),
        (no_tokenizer, "cannot be loaded as a causal language model: .*tokenizer"),
        (broken_tokenizer, "tokenizer.json: not valid JSON: "),
    ],
)
def test_a_spoilt_checkpoint_is_refused_by_name(spoil, message, llama_directory, tmp_path):
    folder = shutil.copytree(llama_directory, tmp_path / "spoilt")
    spoil(folder)
    with pytest.raises(ModelError, match=f"spoilt.*{message}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_mark_at_the_beginning_of_a_chat_template_is_no_part_of_it(llama_directory, tmp_path):
    folder = shutil.copytree(llama_directory, tmp_path / "marked")
    holding("chat_template.jinja", "\ufeff{{ messages[0].content }}")(folder)
    assert load(folder, self_check=False).tokenizer.chat_template == "{{ messages[0].content }}"


def test_shards_and_the_hub_s_links_are_no_reason_to_refuse(llama_directory, tmp_path):
    folder = shutil.copytree(llama_directory, tmp_path / "good")
    sharded("model-1.safetensors")(folder)
    assert load(folder).num_parameters
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in llama_directory.iterdir():
        shutil.copy(file, blobs)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load(snapshot).num_parameters


def test_another_tokenizer_s_and_an_adapter_s_links_are_refused_too(llama_directory, tmp_path):
    folder = shutil.copytree(llama_directory, tmp_path / "other")
    linked("tokenizer.json")(folder)
    for place in ("tokenizer", "adapter"):
        with pytest.raises(ModelError, match=r"other/tokenizer\.json: no file of this directory"):
            load(llama_directory, **{place: folder})


def test_code_beside_a_family_that_transformers_knows_is_not_run(llama_directory, tmp_path):
    folder = shutil.copytree(llama_directory, tmp_path / "beside")
    (folder / "code.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Network"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": code}))
    assert load(folder).network.config.model_type == "llama"


@pytest.mark.parametrize("dtype", ["float16", "int8", "", torch.float32])
def test_unknown_dtype(dtype, llama_directory):
    with pytest.raises(ModelError, match=r"^dtype: one of float32, bfloat16 or auto, got "):
        load(llama_directory, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_auto_is_the_checkpoint_s(dtype, llama_directory, tmp_path, caplog):
    folder = shutil.copytree(llama_directory, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.to(dtype) for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    if dtype == torch.float16:
        with pytest.raises(
            ModelError, match=r"checkpoint: its dtype torch\.float16 is not served; give dtype as one of"
        ):
            load(folder, dtype="auto")
    else:
        assert load(folder, dtype="auto").network.dtype == dtype
    assert load(folder).network.dtype == torch.float32
    assert not caplog.messages
    network, _ = loading._read(folder, folder, None, "meta", {})  # what a GPU gets, without one
    served = torch.bfloat16 if dtype == torch.float16 else dtype
    assert {p.dtype for p in network.parameters()} == {served}
    (line,) = caplog.messages
    own = "instead of the checkpoint's float16" if dtype == torch.float16 else "the checkpoint's own dtype"
    other = "bfloat16" if dtype == torch.float32 else "float32"
    assert line == f"{folder}: on meta in {str(served)[6:]}, {own}; dtype= (--dtype) {other} for another"


def test_the_tokenizer_may_come_from_elsewhere(llama_directory, tokenizer_without_bos, tmp_path):
    tokenizer_without_bos.save_pretrained(tmp_path)
    text = "who knows why"
    assert load(llama_directory, tokenizer=tmp_path).tokenizer(text) == tokenizer_without_bos(text)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
def test_an_adapter_is_merged(llama_directory, plain, tmp_path, tiny_network):
    peft = pytest.importorskip("peft", reason="comes with the extra lm-eval")
    network = tiny_network("llama", num_hidden_layers=2)
    torch.manual_seed(0)  # of lora_A
    adapted = peft.get_peft_model(
        network, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, so that an adapter changes nothing
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what peft itself reads of transformers is nothing for a user
        base, model = load(llama_directory), load(llama_directory, adapter=tmp_path / "adapter")
    requests = requests_for(network)
    assert_equal_to_plain(model, adapted.eval(), plain, requests, 512)
    assert abs(loglikelihood(base, requests)[0].logp - loglikelihood(model, requests)[0].logp) > 1e-2
    assert base.fingerprint() != model.fingerprint()

    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"^adapter: .*: cannot be added to this network: Found missing adapter keys"):
        load(llama_directory, adapter=tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"^adapter: .*: no adapter_model.safetensors here; pickle weights are refuse"):
        load(llama_directory, adapter=tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"^adapter: nobody/nothing: cannot be added to this network: "):
        load(llama_directory, adapter="nobody/nothing")


def test_a_fingerprint_is_of_weights_and_vocabulary_not_of_the_place(llama_directory, llama, tmp_path, tokenizer):
    folder = shutil.copytree(llama_directory, tmp_path / "copy")
    mine = llama.fingerprint()
    assert load(folder).fingerprint() == mine
    assert load(folder, dtype="bfloat16").fingerprint() != mine
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert load(folder).fingerprint() != mine
    words = copy.deepcopy(tokenizer)
    words.add_tokens(["catmat"])
    assert replace(llama, tokenizer=words).fingerprint() != mine


def test_unknown_device(llama_directory):
    with pytest.raises(ModelError, match=r"cannot be loaded as a causal language model: .*device"):
        load(llama_directory, device="nowhere")


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {}, 256),
        ("llama", {"max_position_embeddings": 77}, 77),
        ("gpt2", {"max_position_embeddings": 100}, 100),
        ("llama4_text", {**FAMILIES["llama4_text"], "attention_chunk_size": 40}, 40),
        ("llama4_text", {**FAMILIES["llama4_text"], "floor_scale": 30}, 29),
        ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}, 64),
        ("gemma3", NESTED["gemma3"], 256),
    ],
)
def test_the_longest_sequence_comes_from_the_config(family, options, expected, tiny_network, plain):
    network, model = tiny_network(family, **options), from_network(tiny_network(family, **options), None, "here")
    assert model.max_positions == expected
    rng = random.Random(1)
    tokens = [rng.randrange(2, 300) for _ in range(expected + 1)]
    got = loglikelihood(model, [(tokens[:-1], tokens[-1:]), (tokens[:5], tokens[5:9])], chunk_tokens=16)[0]
    assert got.logp == pytest.approx(plain(network, tokens[:-1], tokens[-1:])[0].item(), rel=0, abs=1e-5)


def test_the_stack_holds_the_open_ancestors_and_the_chunk(llama, plain_llama):
    tree = trie.build_from_lists(requests_for(plain_llama))
    plan = trie.plan(tree, 16)
    cache = KVCache(plan.capacity)
    with torch.no_grad():
        for before, chunk in pairwise((None, *plan.chunks)):
            cache.compact(chunk.keep)
            llama.forward_chunk(chunk, cache)
            assert cache.rows == chunk.cached_rows + len(chunk.token) <= plan.capacity
            assert before is None or chunk.first_row == before.last_row


def test_weights_are_read_once_and_again_when_they_have_changed(tiny_network, tokenizer, monkeypatch):
    model, read = from_network(tiny_network("llama"), tokenizer, "here", self_check=False), []
    hashed = Model._hashed
    monkeypatch.setattr(Model, "_hashed", lambda self: read.append(self) or hashed(self))
    first = model.fingerprint()
    assert first == model.fingerprint()
    assert len(read) == 1
    weight = model.network.get_output_embeddings().weight
    with torch.no_grad():
        weight.add_(1)
    second = model.fingerprint()
    weight.data = weight.data - 1.0  # another storage, as merging an adapter makes it
    third = model.fingerprint()
    assert first != second != third
    assert len(read) == 3
    model.network.config.eos_token_id = 7
    assert model.fingerprint() != third
    assert len(read) == 4


def test_a_tokenizer_larger_than_the_network_is_told(llama_directory, tmp_path, caplog):
    folder = shutil.copytree(llama_directory, tmp_path / "more")
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens([f"<{n}>" for n in range(VOCABULARY + 2 - len(words))])
    words.save_pretrained(folder)
    load(folder)
    assert re.search(r"the tokenizer has 2 tokens that the network lacks \(300 to 301, '<\d+>' first\)", caplog.text)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_that_merging_cannot_express_is_refused(target, tiny_network, tokenizer, tmp_path):
    peft = pytest.importorskip("peft", reason="comes with the extra lm-eval")
    for tied in (True, False):
        folder = tmp_path / f"{tied}"
        network = tiny_network("llama", num_hidden_layers=1, tie_word_embeddings=tied)
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", target], task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(network, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
        if tied:
            with pytest.raises(ModelError, match=r"^adapter: .*: cannot be merged into the weights: "):
                load(folder, adapter=folder / "adapter")
        else:
            model = load(folder, adapter=folder / "adapter")
            assert all(weight.requires_grad for weight in model.network.parameters())  # so that it can be trained on


WINDOWED = {
    "qwen2_moe": {
        "use_sliding_window": True,
        "max_window_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_that_attention_does_not_hand_on_is_found_whatever_its_length(family, tiny_network):
    network = tiny_network(family, num_hidden_layers=2, sliding_window=40, **WINDOWED[family])
    with pytest.raises(ModelError, match=f"{family}: this family cannot be served: .* with sliding_window of 6 "):
        from_network(network, None, "here")
    assert network.config.sliding_window == 40  # as it was
    options = WINDOWED[family] | ({"use_sliding_window": False} if family == "qwen2_moe" else {})
    network = tiny_network(family, num_hidden_layers=2, sliding_window=None, **options)
    assert from_network(network, None, "here").network is network  # where there is none the family is served


def test_the_lengths_are_as_they_were_after_the_check(tiny_network):
    network = tiny_network("gemma2", num_hidden_layers=2, sliding_window=40)
    from_network(network, None, "here")
    assert network.config.sliding_window == 40
    assert {m.sliding_window for m in network.modules() if getattr(m, "sliding_window", None)} == {40}


def test_head_sizes_that_differ_by_layer(tiny_network):
    network = tiny_network("gemma4_text", num_hidden_layers=2, sliding_window=40, head_dim=8, global_head_dim=16)
    model = from_network(network, None, "here")
    assert work_of(model).kv_row_bytes == footprint_of(model).kv_row_bytes


def test_keys_that_are_compressed_from_a_length_on_are_refused():
    from benchmarks.families import outcome

    assert outcome("deepseek_v4")[0] == "refused"  # 28 tokens are too few for its rates of 128
    assert outcome("mistral") == ("equal", "")


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "gemma3n_text", "ministral", "granitemoehybrid"])
def test_latent_attention_shared_keys_and_layers_that_differ_are_served_at_every_length(family):
    from benchmarks.families import outcome

    assert outcome(family) == ("equal", "")


def test_families_are_refused_by_name_and_in_one_line():
    from benchmarks.families import OWN, families, outcome

    assert outcome("hy_v4") == ("refused", "its attention sees only the tokens that an index of its own picks")
    kind, why = outcome("deepseek_v4")
    assert (kind, why.count("\n")) == ("refused", 0)
    assert "its code fails here (RuntimeError: The size of tensor a" in why
    assert OWN.keys() <= set(families())
