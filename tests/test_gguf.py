"""GGUF files: scores against transformers' own forward of the same file, the cache, and files that lie."""

import json
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
pytest.importorskip("accelerate")

import gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from icl_ft_fast.cli import main
from icl_ft_fast.engine import conversion
from icl_ft_fast.engine.gguf import MOST_VALUES, GgufError, read_header
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.model import ModelError
from icl_ft_fast.study.results import Setting, as_json
from icl_ft_fast.study.settings import StudySettings

TEMPLATE = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(path, network, tokenizer, *, without=(), more=()):
    """A llama as llama.cpp would write it: Q4_1 in its MLPs, Q8_0 in its embeddings, float32 elsewhere."""
    writer, config = gguf.GGUFWriter(path, "llama"), network.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    pieces = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in ("<s>", "</s>") else 1 for piece in pieces])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    for hf_name, weights in network.state_dict().items():
        name = hf_name
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if name in without or (name == "output.weight" and config.tie_word_embeddings):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(hf_name.split(".")[-2])
        if heads:  # llama.cpp turns pairs of neighbours where transformers turns halves
            weights = weights.view(heads, 2, -1, weights.shape[1]).transpose(1, 2).reshape(weights.shape)
        kinds = {"ffn_g": "Q4_1", "ffn_u": "Q4_1", "ffn_d": "Q4_1", "token": "Q8_0"}
        kind = gguf.GGMLQuantizationType[kinds.get(name.split(".")[-2][:5], "F32")]
        writer.add_tensor(name, gguf.quantize(weights.float().numpy(), kind), raw_dtype=kind)
    for name, values in more:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory, plain_llama, tokenizer):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", plain_llama, tokenizer)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(file, cache):
    return load(file, cache=cache)


def test_scores_equal_transformers_own_forward_of_the_file(file, model, plain):
    theirs, told = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    words = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    requests = [("the cat sat on", " that mat."), ("who knows", " why — über 42"), ("", "the cat")]
    found = loglikelihood(model, requests)
    for (context, continuation), one in zip(requests, found, strict=True):
        ids, whole = words(context)["input_ids"], words(context + continuation)["input_ids"]
        expected, _ = plain(theirs, ids, whole[len(ids) :])
        assert one.logp == pytest.approx(expected.sum().item(), abs=1e-4)


def test_tokenizer_and_template_are_the_files(model, tokenizer):
    text = "the cat sat — über 42 </s>"
    assert model.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert model.tokenizer.apply_chat_template([{"content": "a"}], tokenize=False) == "<a>"
    assert (model.tokenizer.bos_token, model.tokenizer.eos_token, model.max_positions) == ("<s>", "</s>", 256)


def test_quantisation_is_named(model, llama, cache):
    assert model.quantization == "F32 42%, Q4_1 33%, Q8_0 25%"
    assert llama.quantization == ""
    told = as_json(Setting(model, "task", StudySettings()), [])
    assert told["quantization"] == model.quantization
    before = model.fingerprint()
    model.network.config.gguf = {"quantization": "Q2_K"}
    try:
        assert model.fingerprint() != before
    finally:
        model.network.config.gguf = {"quantization": "F32 42%, Q4_1 33%, Q8_0 25%"}
    (folder,) = (cache / "gguf").iterdir()
    assert not [found for found in folder.iterdir() if "/tmp" in found.read_text(errors="replace")]


def test_a_file_is_read_once(file, model, cache, monkeypatch, caplog):
    monkeypatch.setattr(conversion, "convert", None)
    assert load(file, cache=cache).fingerprint() == model.fingerprint()
    assert not caplog.records
    monkeypatch.setenv(conversion.CACHE_VARIABLE, str(cache))
    assert load(file).name == str(file)


def test_two_at_once_read_it_once(file, tmp_path, monkeypatch, caplog):
    written, write = [], conversion._write
    monkeypatch.setattr(conversion, "_write", lambda *given: (written.append(given), write(*given)))
    maps, make = [], gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *given: maps.append(given) or make(*given))
    threads = [threading.Thread(target=conversion.folder_of, args=(file, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == len(maps) == 1
    assert [record.message.split(":")[-1] for record in caplog.records] == [" 0 MB, which later loads take"]
    (folder,) = (tmp_path / "gguf").iterdir()
    assert (folder / "model.safetensors").is_file()


def test_a_conversion_that_fails_leaves_nothing(file, tmp_path, monkeypatch):
    def full(file, header, folder, check):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(conversion, "_write", full)
    with pytest.raises(OSError, match="No space"):
        load(file, cache=tmp_path)
    assert not [*tmp_path.rglob("*")]


def test_too_little_space_is_told_before(file, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(ModelError, match=r"tiny.gguf: takes 0 MB in .*, where 0 are free"):
        load(file, cache=tmp_path)


def test_what_transformers_would_drop_or_make_up_is_refused(tmp_path, plain_llama, tokenizer):
    more = write_gguf(
        tmp_path / "more.gguf", plain_llama, tokenizer, more=[("rope_freqs.weight", torch.ones(4).numpy())]
    )
    with pytest.raises(ModelError, match=r"holds \d+,\d+ weights, rope_freqs.weight among them, but .* \d+,\d+"):
        load(more, cache=tmp_path)
    less = write_gguf(tmp_path / "less.gguf", plain_llama, tokenizer, without=["blk.1.ffn_up.weight"])
    with pytest.raises(ModelError, match="another model's"):
        load(less, cache=tmp_path)
    assert not [*(tmp_path / "gguf").glob("*")]


def test_convert_writes_a_folder_and_score_takes_the_file(file, cache, tmp_path, capsys):
    assert main(["convert", str(file), str(tmp_path / "folder")]) == 0
    assert "(F32 42%, Q4_1 33%, Q8_0 25%) and the tokenizer written to" in capsys.readouterr().out
    assert main(["convert", str(file), str(tmp_path / "folder")]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "q.jsonl").write_text('{"id": "q", "prompt": "the cat", "choices": [" sat", " why"], "answer": 0}\n')
    for n, source in enumerate(([str(file), "--cache", str(cache)], [str(tmp_path / "folder")])):
        out = tmp_path / f"{n}.jsonl"
        run = ["score", "--model", *source, "--questions", str(tmp_path / "q.jsonl"), "--out", str(out)]
        assert main(run) == 0
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_a_folder_that_holds_a_gguf_file_names_it(file):
    with pytest.raises(ModelError, match=r"give the GGUF file itself: .*tiny.gguf"):
        load(file.parent)
    with pytest.raises(ModelError, match=r"none.gguf: no such directory or GGUF file"):
        load("none.gguf")


def string(text):
    return struct.pack("<Q", len(text)) + text


def header(*, fields=(), tensors=(), version=3, counts=None, data=b"\0" * 64):
    """A file of fields (name, type, packed value) and tensors (name, dimensions, type, place)."""
    counts = counts or (len(tensors), len(fields))
    made = b"GGUF" + struct.pack("<IQQ", version, *counts)
    for name, kind, value in fields:
        made += string(name) + struct.pack("<I", kind) + value
    for name, dimensions, kind, place in tensors:
        made += string(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, place)
    return made + b"\0" * (-len(made) % 32) + data


ONE = (b"a.weight", (4, 2), 0, 0)
DAMAGED = {
    "empty": (b"", "neither a directory with a checkpoint nor a GGUF file"),
    "pickle": (b"\x80\x04\x95GGUF", "neither a directory with a checkpoint nor a GGUF file"),
    "magic alone": (b"GGUF", "ends within its header"),
    "version": (header(version=1), "version 1; expected version 2 or 3"),
    "big-endian": (header(version=3 << 24), "written for big-endian machines"),
    "tensors": (header(counts=(2**60, 0)), "claims 1,152,921,504,606,846,976 tensors"),
    "fields": (header(counts=(0, 2**32)), "claims 4,294,967,296 fields"),
    "cut": (header(fields=[(b"a", 4, b"\1\0\0\0")])[:30], "ends within its header"),
    "string": (header(fields=[(b"a", 8, struct.pack("<Q", 2**63))]), "ends within its header"),
    "array": (header(fields=[(b"a", 9, struct.pack("<IQ", 0, MOST_VALUES + 1))]), r"claims 16,777,217 values in field"),
    "nested": (header(fields=[(b"a", 9, struct.pack("<IQ", 9, 1))]), "values of type 9 are not known"),
    "kind": (header(fields=[(b"a", 77, b"")]), "values of type 77 are not known"),
    "name": (header(fields=[(b"\xff", 4, b"\1\0\0\0")]), "a name is not UTF-8"),
    "field twice": (header(fields=[(b"a", 4, b"\1\0\0\0")] * 2), "field 'a' is there twice"),
    "tensor twice": (header(tensors=[ONE, ONE]), "tensor 'a.weight' is there twice"),
    "type": (header(tensors=[(b"a", (32,), 99, 0)]), "type 99 is unknown or cannot be dequantised"),
    "integers": (header(tensors=[(b"a", (32,), 26, 0)]), "type 26 is unknown or cannot be dequantised"),
    "dimensions": (header(tensors=[(b"a", (1,) * 9, 0, 0)]), "expected 1 to 4 dimensions, got 9"),
    "no dimension": (header(tensors=[(b"a", (), 0, 0)]), "expected 1 to 4 dimensions, got 0"),
    "zero": (header(tensors=[(b"a", (4, 0), 0, 0)]), "a dimension is 0"),
    "huge": (header(tensors=[(b"a", (2**62, 2**62), 0, 0)]), "ends before its tensor 'a' does"),
    "beyond": (header(tensors=[(b"a", (4, 2), 0, 64)]), "ends before its tensor 'a' does"),
    "overlap": (header(tensors=[ONE, (b"b", (4,), 0, 0)]), "overlaps another one"),
    "unaligned": (header(tensors=[(b"a", (4, 2), 0, 8)]), "do not fit its type's blocks"),
    "blocks": (header(tensors=[(b"a", (33,), 3, 0)]), "do not fit its type's blocks"),
    "alignment": (header(fields=[(b"general.alignment", 4, b"\3\0\0\0")]), "expected a power of two, got 3"),
    "pieces": (header(fields=[(b"split.count", 2, b"\2\0")]), "one of several pieces"),
    "no architecture": (header(tensors=[ONE]), "cannot be read as a causal language model"),
    "escape": (header(fields=[(b"\x1b[2J", 77, b"")]), r"field '\\\\x1b\[2J': values"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_lies_ends_in_one_line(name, tmp_path, capsys):
    content, message = DAMAGED[name]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        load(tmp_path / "bad.gguf", cache=tmp_path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "bad.gguf"))


def test_a_config_that_asks_for_more_than_the_file_has_is_refused(tmp_path, tokenizer, tiny_network):
    """Before a network of that size is made."""
    network = tiny_network("llama", num_hidden_layers=1)
    network.config.vocab_size = 2**31
    with pytest.raises(ModelError, match=r"but transformers' llama has a place for \d{3},\d{3},\d{3},\d{3}"):
        load(write_gguf(tmp_path / "huge.gguf", network, tokenizer), cache=tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_bytes_are_a_header_or_a_gguf_error(file, tmp_path_factory, data):
    """A good file with some bytes of its header changed, or cut somewhere."""
    content = bytearray(file.read_bytes()[:2000] + b"\0" * 200)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, 600))
        content[at : at + 8] = data.draw(st.binary(min_size=1, max_size=8))
    path = Path(tmp_path_factory.getbasetemp()) / "any.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        assert read_header(path).num_values >= 0
    except GgufError as error:
        assert str(path) in str(error)  # noqa: PT017
