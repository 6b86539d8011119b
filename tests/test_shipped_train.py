"""The recipe of the shipped model: batches, interrupted runs, several processes."""

import itertools
import json
from functools import partial

import pytest
import torch
from forked import forked
from safetensors import safe_open
from safetensors.torch import load_file
from test_shipped import COURSES, DIRECTIONS, text_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from icl_ft_fast.finetuning import distributed
from icl_ft_fast.shipped import corpus, lessons, train
from icl_ft_fast.shipped.tokenizer import build_tokenizer
from icl_ft_fast.tasks.comparisons import INVERSE


@pytest.fixture(scope="module")
def shipped_tokenizer():
    return build_tokenizer()


def test_loss_weights_line_up_with_the_tokens(shipped_tokenizer):
    stage = train.Stage(1, 2048, COURSES, copying=0.0, augmenting=0.2)
    batches = [train.batch(shipped_tokenizer, stage, 0, step) for step in range(30)]
    assert {tuple(t.shape) for given in batches for t in vars(given).values()} == {(2048,)}
    target, weight = (torch.cat([getattr(given, name) for given in batches]) for name in ("target", "weight"))
    known = [0.0, lessons.UNPREDICTABLE, lessons.LITTLE, lessons.GIVEN, lessons.DECISIVE]
    assert weight.unique().tolist() == pytest.approx(known)
    decisive = [shipped_tokenizer.decode([i]) for i in target[weight == lessons.DECISIVE].tolist()]
    assert len(decisive) > 100
    features = {word for comparative in INVERSE for word in comparative.split()}
    quantifiers = {"All", "Some", "No"}
    assert set(decisive) <= features | quantifiers
    assert set(decisive) >= DIRECTIONS | quantifiers


def test_each_branch_is_the_document_and_has_the_weights_of_its_segments(shipped_tokenizer, monkeypatch):
    trunk = [(" Facts:", 1.0), (" naïve\n\n", 2.0), ("x zota", 3.0)]
    branches = [[(" femp are", 4.0), (" older.", 5.0)], [(" glon", 6.0), (" mi.", 7.0)]]
    monkeypatch.setattr(corpus, "document", lambda *_: (trunk, branches))
    given = train.batch(shipped_tokenizer, train.Stage(1, 150, COURSES), 0, 0)
    pieces = shipped_tokenizer.convert_ids_to_tokens(given.token.tolist())
    found = []
    for row in range(100):  # the last document may have been cut
        if given.depth[row + 1] == given.depth[row] + 1:
            continue
        path = [j for j in range(row + 1) if row < given.end[j]]
        assert given.depth[path].tolist() == list(range(len(path)))
        assert given.weight[row] == 0  # nothing follows
        text = shipped_tokenizer.decode(given.token[path], skip_special_tokens=True)
        branch = branches["glon" in text]
        assert text == text_of(trunk + branch)[1:]
        owner = [weight for part, weight in trunk + branch for _ in part.encode()]
        place, boundary = 0, len(shipped_tokenizer(text_of(trunk))["input_ids"])
        for before, j in itertools.pairwise(path):
            place += len(pieces[j])  # a character of a byte-level piece is a byte
            if given.depth[j] != boundary:  # where it branches no one token follows
                assert given.weight[before] == owner[place - 1]
                assert given.target[before] == given.token[j]
        found.append(branch)
    assert len(found) > 6


def test_batches_depend_on_seed_and_number_alone(shipped_tokenizer):
    stage = train.Stage(1, 128, COURSES)
    tokens = [train.batch(shipped_tokenizer, stage, *key).token for key in ((0, 5), (0, 6), (0, 5), (1, 5))]
    assert torch.equal(tokens[0], tokens[2])
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[3])


TOKENS = 1280


class StopError(Exception):
    """Whatever ends a run early."""


def tiny_recipe(monkeypatch):
    """Seven steps of two stages on a small network, saved every second step."""

    def config(vocabulary):
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            attention_bias=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
        )

    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    monkeypatch.setattr(train, "config", config)
    stages = (train.Stage(640, 256, COURSES, recalling=0.2), train.Stage(1280, 64, COURSES, batches=2))
    monkeypatch.setattr(train, "CURRICULUM", stages)
    monkeypatch.setattr(train, "SAVE_EVERY", 2)


def assert_same_file(one, other):
    """Two safetensors files with the same tensors, to the bit, and metadata; their order in the file is free."""
    with safe_open(one, "pt") as mine, safe_open(other, "pt") as theirs:
        assert mine.metadata() == theirs.metadata()
        names = sorted(mine.keys())
        assert names == sorted(theirs.keys())
        for name in names:
            assert torch.equal(mine.get_tensor(name), theirs.get_tensor(name)), name


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    tiny_recipe(monkeypatch)
    train.train(tmp_path / "whole", TOKENS, 0, "cpu")
    batch, numbers = train.batch, []

    def failing(tokenizer, stage, seed, number):
        numbers.append(number)
        if number == 8 and numbers.count(number) == 1:
            raise StopError
        return batch(tokenizer, stage, seed, number)

    monkeypatch.setattr(train, "batch", failing)
    with pytest.raises(StopError):
        train.train(tmp_path / "halves", TOKENS, 0, "cpu")
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    train.train(tmp_path / "halves", TOKENS, 0, "cpu")
    assert numbers == [*range(9), *range(5, 11)]
    for name in ("checkpoint.safetensors", "model.safetensors"):
        assert_same_file(tmp_path / "halves" / name, tmp_path / "whole" / name)
    assert (tmp_path / "halves" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["tokens"]) for row in metrics] == [(2, 512), (4, 896), (6, 1152), (7, 1280)]
    assert metrics[0]["loss"] > metrics[-1]["loss"]

    network = AutoModelForCausalLM.from_pretrained(tmp_path / "halves", dtype="auto")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
    with safe_open(tmp_path / "halves" / "checkpoint.safetensors", "pt") as file:
        saved = {name: file.get_tensor(f"network.{name}") for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "halves").get_vocab() == build_tokenizer().get_vocab()


def work(folder):
    """What each of the two processes does."""
    tiny_recipe(pytest.MonkeyPatch())
    with distributed.joined():
        train.train(folder, TOKENS, 0, "cpu")


def test_two_processes_share_the_batches_of_a_step(tmp_path, monkeypatch):
    codes, told = forked(*[partial(work, tmp_path / "two")] * 2, as_ranks=True)
    assert codes == [0, 0], told
    tiny_recipe(monkeypatch)
    train.train(tmp_path / "one", TOKENS, 0, "cpu")
    mine, theirs = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("one", "two"))
    for name, tensor in mine.items():
        assert (tensor.float() - theirs[name].float()).abs().max() < 1e-4 * max(1, tensor.float().abs().max()), name
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("one", "two")]
    assert len(lines[0]) == len(lines[1])
    for one, two in zip(*(map(json.loads, run) for run in lines), strict=True):
        assert two["decisive"] == one["decisive"]
        assert (two["step"], two["tokens"]) == (one["step"], one["tokens"])


def test_restore_gives_back_weights_optimisers_and_step(tmp_path, monkeypatch):
    tiny_recipe(monkeypatch)
    ids = torch.randint(900, (2, 33), generator=torch.Generator().manual_seed(0))

    def new_run(seed):
        return train.TrainingRun(train.build_network(1000, seed))

    def steps(run, count):
        for _ in range(count):
            run.network(ids, labels=ids, use_cache=False).loss.backward()
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            run.step += 1
            run.batches += 2
            run.tokens += ids.numel()

    one, other = new_run(0), new_run(1)
    steps(one, 3)
    one.save(tmp_path / "checkpoint.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    other.restore(tmp_path / "checkpoint.safetensors")
    assert (other.step, other.batches, other.tokens) == (3, 6, 3 * ids.numel())
    steps(one, 2)
    steps(other, 2)
    for (name, mine), theirs in zip(one.network.named_parameters(), other.network.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_first_layer_starts_by_looking_back(shipped_tokenizer):
    network = train.build_network(len(shipped_tokenizer), 0)
    network.set_attn_implementation("eager")
    ids = torch.randint(2, len(shipped_tokenizer), (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = network(ids, output_attentions=True, use_cache=False)
    attention = output.attentions[0][0]
    for head in range(network.config.num_attention_heads):
        intended = attention[head].diagonal(-(head + 1))[40:]
        assert intended.min() > 0.5, head
    embedded = network.model.norm(network.get_input_embeddings()(ids))
    assert torch.equal(output.logits, network.lm_head(embedded))  # blocks start as the identity


def test_learning_rate_warms_up_and_falls():
    peak = train.PEAK_LEARNING_RATE
    rates = [train.learning_rate(step / 5000, step) for step in range(5000)]
    top = max(range(5000), key=rates.__getitem__)
    assert rates[0] == pytest.approx(peak / 60, rel=1e-6)
    assert top == 59
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(peak / 20, rel=0.02)
