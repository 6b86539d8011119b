"""engine/compaction.py and engine/slots.py: fewer keys and values that stand for a context's, found by their key."""

import json

import pytest
import torch

from icl_ft_fast import compact as compact_documents
from icl_ft_fast.cli import main
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.compaction import OPEN, CompactionError, _matched, _read, compact
from icl_ft_fast.engine.contexts import ContextError, ContextStore, load_context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood, prefill
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.score import score
from icl_ft_fast.engine.slots import key_of, slots_context
from icl_ft_fast.tasks.task import Document, Question

TEXT = "the cat sat on a mat and the dog ran to the cat in the sun"
AFTER = [" the dog sat", " a cat ran in the sun"]
QUESTIONS = [Question("q", " where the cat", (" sat.", " ran far away.")), Question("r", " a", (" dog", " cat"))]


def encoded(model):
    (token,) = encoding.encode(model.tokenizer, [TEXT])
    return token, encoding.encode(model.tokenizer, AFTER, bos=False)


def asked_behind(model, context, token):
    """Log-likelihoods of two continuations behind a context."""
    _, (first, second) = encoded(model)
    return [result.logp for result in loglikelihood(model, [(token, first), (token, second)], start=context)]


def test_as_many_slots_as_tokens_are_the_context(llama):
    token, followers = encoded(llama)
    made = compact(llama, token, len(token), followers)
    assert set(made.error.values()) == {0.0}
    _, key = key_of(llama, "all", len(token))
    assert len(key) == len(token) != key
    found = asked_behind(llama, slots_context(llama, made.layers, made.hidden, key), key)
    assert found == pytest.approx(asked_behind(llama, prefill(llama, token), token), abs=1e-4)


def test_more_slots_err_less(llama):
    token, followers = encoded(llama)
    mean = []
    for num_slots in (2, 6, 12):
        made = compact(llama, token, num_slots, followers)
        assert {k.shape[0] for k, _ in made.layers.values()} == {num_slots}
        mean.append(sum(made.error.values()))
    assert mean[0] > mean[1] > mean[2] > 0


def test_slots_are_placed_before_what_follows(llama):
    """A text says the same wherever it begins, so keys for the positions before t are read there."""
    token, followers = encoded(llama)
    (here, hidden), (there, shifted) = (_read(llama, token, first, followers, Ledger()) for first in (0, -7))
    assert hidden.allclose(shifted, atol=1e-5)
    for layer, (keys, values) in here.keys_values.items():
        keys_there, values_there = there.keys_values[layer]
        assert values.allclose(values_there, atol=1e-5)
        assert not keys.allclose(keys_there, atol=1e-2)
        for q, q_there, k, k_there in zip(
            here.queries_of(layer, 2), there.queries_of(layer, 2), keys.unbind(1), keys_there.unbind(1), strict=True
        ):
            assert (q @ k.double().T).allclose(q_there @ k_there.double().T, atol=1e-4)


def test_a_key_that_comes_twice_is_told_once():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = torch.cat([normal(200, 7), torch.ones(200, 1)], 1), normal(10, 8), normal(10, 4)
    twice_k, twice_v = k.repeat(2, 1), v.repeat(2, 1)
    # Of two equal keys either may be chosen: a little apart, the first of each is.
    twice_k[10:, :7] -= 1e-9
    twice_k[:10, 7] += 1e-6
    keys, values, error = _matched(q, twice_k, twice_v, 10, 0.5)
    assert error < 2e-2
    whole, few = (0.5 * q @ twice_k.T), (0.5 * q @ keys.T)
    assert (few.logsumexp(-1) - whole.logsumexp(-1)).abs().max() < 0.1
    assert (few.softmax(-1) @ values - whole.softmax(-1) @ twice_v).abs().max() < 0.05


def test_a_store_finds_slots_by_their_text(llama, llama_directory, tmp_path, tiny_network, tokenizer):
    token, followers = encoded(llama)
    made = compact(llama, token, 8, followers)
    text, key = key_of(llama, "some documents", 8)
    assert encoding.encode(llama.tokenizer, [text])[0] == key
    assert key_of(llama, "others", 8)[0] != text
    context = slots_context(llama, made.layers, made.hidden, key)
    store, ledger = ContextStore(tmp_path / "store", llama, 10**9), Ledger()
    path = store.add(context, "some documents in 8 slots")
    scores = score(llama, QUESTIONS, context=text, store=store, ledger=ledger)
    assert ledger.cached_tokens == 8
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 1
    assert scores != score(llama, QUESTIONS, context=text)
    loaded = load_context(path, load(llama_directory))
    assert asked_behind(llama, loaded, key) == asked_behind(llama, context, key)
    tiny_network("llama", num_hidden_layers=2, std=0.2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ContextError, match="other weights"):
        load_context(path, load(tmp_path / "other"))


def test_documents_by_themselves_in_python_and_on_the_command_line(llama, llama_directory, tmp_path, capsys):
    documents = [Document(f"d{n}", f"the cat sat on mat {n} .") for n in range(4)]
    made = compact_documents(llama, documents, 4)
    (whole,) = encoding.encode(llama.tokenizer, [prompt_context(llama, documents, "base").rstrip()])
    assert len(made.context.token) == round(len(whole) / 4)
    store = ContextStore(tmp_path / "mine", llama, 10**9)
    store.add(made.context)
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents)
    )
    command = ["context", "compact", "--model", str(llama_directory), "--documents", str(tmp_path / "documents.jsonl")]
    command += ["--store", str(tmp_path / "theirs"), "--template", "base", "--ratio"]
    assert main([*command, "4,2"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f" {len(made.context.token)} slots for 4 documents" in first
    assert f"error of attention's output {made.error:.3f};" in first
    assert f" {round(len(whole) / 2)} slots" in second
    ledger = Ledger()
    behind = [
        score(llama, QUESTIONS, context=made.key, store=its, ledger=ledger)
        for its in (store, ContextStore(tmp_path / "theirs", llama, 10**9))
    ]
    assert behind[0] == behind[1]  # the same key, the same slots
    assert ledger.cached_tokens == 2 * len(made.context.token)
    with pytest.raises(CompactionError, match=r"^ratio: expected a number from 1 on, got 0.5$"):
        compact_documents(llama, documents, 0.5)
    assert main([*command, "0"]) == 2
    assert (
        capsys.readouterr().err
        == "icl-ft-fast context: --ratio: expected a whole number above 0, got '0'; separate several by commas\n"
    )


def test_the_ledger_has_the_phase(llama):
    token, followers = encoded(llama)
    ledger = Ledger()
    compact(llama, token, 8, followers, ledger=ledger)
    assert ledger.phases["compact"].forwarded_tokens == len(token) + sum(map(len, followers))
    assert ledger.phases["compact"].flops > 0


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "positions are absolute"),
        ("mistral", {"sliding_window": 8}, "sliding window"),
        ("gemma2", {}, "sliding window, a soft-cap or sinks"),
    ],
)
def test_a_model_that_cannot_be_compacted_is_refused(family, settings, message, tiny_network, tokenizer, tmp_path):
    tiny_network(family, **settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    token, followers = encoded(model)
    with pytest.raises(CompactionError, match=message):
        compact(model, token, 4, followers)
    score(model, QUESTIONS)  # the model is as it was


@pytest.mark.parametrize("num_slots", [0, 1000])
def test_slots_are_of_the_context(llama, num_slots):
    token, followers = encoded(llama)
    with pytest.raises(CompactionError, match=f"num_slots: expected 1 to the context's {len(token)} tokens"):
        compact(llama, token, num_slots, followers)
    with pytest.raises(CompactionError, match="followers"):
        compact(llama, token, 4, [[]])


def test_an_open_row_is_seen_by_all_that_follow():
    assert torch.iinfo(torch.int32).max == OPEN


def test_compaction_in_bfloat16(llama_directory):
    model = load(llama_directory, dtype="bfloat16")
    token, followers = encoded(model)
    made = compact(model, token, 6, followers)
    assert {k.dtype for k, _ in made.layers.values()} == {torch.bfloat16}
    _, key = key_of(model, "x", 6)
    assert all(logp < 0 for logp in asked_behind(model, slots_context(model, made.layers, made.hidden, key), key))
