"""The shipped model: its corpus, its tokenizer, its resumable recipe and, where it is, the model itself."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from icl_ft_fast.augment import LOCAL_EXAMPLES, LOCAL_HEADER
from icl_ft_fast.evaluate import evaluate, icl_context, select_documents
from icl_ft_fast.model import load
from icl_ft_fast.shipped import corpus, train
from icl_ft_fast.shipped.tokenizer import END_OF_TEXT, PADDING, build_tokenizer, english_words
from icl_ft_fast.tasks import words
from icl_ft_fast.tasks.comparisons import INVERSE, Comparison, find
from icl_ft_fast.tasks.reversals import simple_reversals

MODEL = Path(corpus.__file__).parent / "model"
SPACE = {opening + close for opening in words.OPENINGS for close in words.CLOSES}
DIRECTIONS = {comparative.split()[0] for comparative in INVERSE}


@pytest.fixture(scope="module")
def shipped_tokenizer():
    return build_tokenizer()


def documents(count=400, free_tokens=1000):
    """Seeded documents of all kinds, as segments."""
    rng = random.Random("documents")
    return [corpus.document(rng, 40, free_tokens, copying=0.1) for _ in range(count)]


def test_the_corpus_never_writes_a_held_out_word():
    found = set()
    for segments in documents():
        found |= set(re.findall(r"\w+", "".join(text for text, _ in segments))) & SPACE
    nonsense = found - set(english_words())
    assert len(nonsense) > 5000
    assert not [word for word in nonsense if words.is_held_out(word)]
    assert found.isdisjoint(words.NOT_NONSENSE - set(english_words()))


def test_the_corpus_has_every_kind_of_document():
    texts = ["".join(text for text, _ in segments) for segments in documents()]
    kinds = {
        "context": sum(text.startswith("Documents:\n- ") for text in texts),
        "augmentation": sum(text.startswith("Statement: ") for text in texts),
        "augmentation behind its instruction": sum(text.startswith(LOCAL_HEADER + LOCAL_EXAMPLES) for text in texts),
        "names alone": sum(text.startswith(" Note:") for text in texts),
    }
    assert min(kinds.values()) > 10, kinds
    assert 0 < len(texts) - sum(kinds.values()) < 40  # articles alone


def told_by(comparison):
    """What says the same: the sentence, its reversal and their rephrasings."""
    return {text for c in (comparison, comparison.reversed) for text in (c.statement, c.rephrased)}


def test_what_follows_the_facts_follows_from_them():
    checked = 0
    for segments in documents(100):
        text = "".join(text for text, _ in segments)
        if text.startswith("Documents:\n"):
            given_part, _, claims = text.partition("\n\nGiven these documents:")
            facts = find(given_part)
            assert given_part + "\n\nGiven these documents: " == icl_context(
                [corpus.Document("", line[2:]) for line in given_part.splitlines()[1:]]
            )
            claims = re.findall(r"[^ .][^.]*\.", claims)
            owners = [[fact for fact in facts if claim in told_by(fact)] for claim in claims]
            assert all(len(owner) == 1 for owner in owners)
            assert len({fact for (fact,) in owners}) == len(claims) >= 0.4 * len(facts) - 1
            checked += len(claims)
        elif "Statement: " in text:
            for block in text.removeprefix(LOCAL_HEADER + LOCAL_EXAMPLES).removesuffix("\n\n").split("\n\n"):
                statement, reverse, rephrased = block.split("\n")
                (fact,) = find(statement)
                assert reverse == f"Reversed: {fact.reversed.statement}"
                assert rephrased == f"Rephrased: {fact.rephrased}"
                checked += 1
    assert checked > 1000


def test_segments_of_a_statement_put_the_weight_on_its_direction():
    for comparative in INVERSE:
        fact = Comparison("femp", comparative, "glon")
        for segments, text in (
            (corpus.statement_segments(fact, 0.5), fact.statement),
            (corpus.rephrased_segments(fact, 0.5), fact.rephrased),
        ):
            assert "".join(segment for segment, _ in segments) == f" {text}"
            (direction,) = (segment for segment, weight in segments if weight == corpus.DIRECTION)
            assert direction.split()[0] == comparative.split()[0]
            assert [weight for _, weight in segments].count(0.5) == 1


def test_loss_weights_line_up_with_the_tokens(shipped_tokenizer):
    stage = train.Stage(share=1.0, row_tokens=512, rows=8, max_facts=20, copying=0.0)
    rows = [train.batch(shipped_tokenizer, stage, 0, step) for step in range(4)]
    assert {tuple(t.shape) for row in rows for t in row} == {(8, 513)}
    ids, weights = (torch.cat(parts) for parts in zip(*rows, strict=True))
    assert weights.unique().tolist() == pytest.approx([corpus.UNPREDICTABLE, corpus.GIVEN, corpus.DIRECTION])
    directions = [shipped_tokenizer.decode([i]) for i in ids[weights == corpus.DIRECTION].tolist()]
    assert len(directions) > 100
    features = {word for comparative in INVERSE for word in comparative.split()}
    assert set(directions) <= features
    assert set(directions) >= DIRECTIONS
    assert weights[ids == shipped_tokenizer.bos_token_id].unique().tolist() == pytest.approx([corpus.UNPREDICTABLE])


def test_each_token_has_the_weight_of_the_segment_it_ends_in(shipped_tokenizer, monkeypatch):
    rng = random.Random(1)
    segments = [(text, float(n)) for n, (text, _) in enumerate(corpus.context_document(rng, 5, 400))]
    segments += [("é", 901.0), ("\n\n", 902.0), ("x", 903.0), (" zota", 904.0)]
    monkeypatch.setattr(corpus, "document", lambda *_: segments)
    ids, weights = train.batch(shipped_tokenizer, train.Stage(share=1.0, row_tokens=1024, rows=2, max_facts=5), 0, 0)
    text = "".join(part for part, _ in segments)
    length = len(shipped_tokenizer(text)["input_ids"])
    assert length < 500  # the document stands in the first row more than once
    owner = [weight for part, weight in segments for _ in part.encode()]
    for start in (0, length):
        assert ids[0, start] == shipped_tokenizer.bos_token_id
        assert weights[0, start] == segments[0][1]
        place = -1  # of the space put before the text
        for token, weight in zip(
            ids[0, start + 1 : start + length].tolist(), weights[0, start + 1 : start + length].tolist(), strict=True
        ):
            piece = shipped_tokenizer.convert_ids_to_tokens(token)
            place += len(piece)  # a character of a byte-level piece is a byte
            assert weight == owner[place - 1], (piece, place)
        assert place == len(text.encode())


def test_rows_depend_on_seed_and_step_alone(shipped_tokenizer):
    stage = train.Stage(share=1.0, row_tokens=128, rows=4, max_facts=3)
    rows = [train.batch(shipped_tokenizer, stage, *key)[0] for key in ((0, 5), (0, 6), (0, 5), (1, 5))]
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[3])


def test_a_nonsense_word_is_two_tokens(shipped_tokenizer):
    drawn = sorted(SPACE - words.NOT_NONSENSE)
    for texts in (drawn, [f" {word}" for word in drawn], [f"- {word}" for word in drawn]):
        skip = 3 if texts[0][0] == "-" else 1
        for word, ids in zip(drawn, shipped_tokenizer(texts)["input_ids"], strict=True):
            pieces = shipped_tokenizer.convert_ids_to_tokens(ids)[skip:]
            assert len(pieces) == 2, (word, pieces)
            assert "".join(pieces) == f"Ġ{word}"
            if words.is_held_out(word):
                assert pieces[0][1:] in words.OPENINGS
                assert pieces[1] in words.CLOSES


def test_an_english_word_is_one_token(shipped_tokenizer):
    for word in english_words():
        assert len(shipped_tokenizer(word)["input_ids"]) == 2, word
    assert len(shipped_tokenizer) < 1000


# Two things the tokenizer does not keep, by design: one space before the text, which it adds where there is none and
# takes off again, and the text of a special token, which becomes that token.
ENCODED = st.text().filter(lambda text: END_OF_TEXT not in text and PADDING not in text)


@settings(deadline=None, max_examples=300)
@given(text=ENCODED)
@example(text="")
@example(text=" femp")
@example(text="  femp  are\n\n- more .\t dangerous 's n't , than\r\nglon\x00.")
@example(text="naïve 日本語 😀 \u2028\x85\ufeff e\u0301")
def test_any_text_round_trips(text, shipped_tokenizer):
    ids = shipped_tokenizer(text)["input_ids"]
    assert ids[0] == shipped_tokenizer.bos_token_id
    assert shipped_tokenizer.bos_token_id not in ids[1:]
    assert shipped_tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix(" ")
    assert shipped_tokenizer.decode(ids[1:]) == text.removeprefix(" ")


def test_special_tokens(shipped_tokenizer):
    assert (shipped_tokenizer.bos_token_id, shipped_tokenizer.eos_token_id, shipped_tokenizer.pad_token_id) == (0, 0, 1)
    config = train.config(len(shipped_tokenizer))
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 1)
    assert config.max_position_embeddings >= max(stage.row_tokens for stage in train.CURRICULUM)
    assert [stage.share for stage in train.CURRICULUM] == sorted(stage.share for stage in train.CURRICULUM)
    assert train.CURRICULUM[-1].share == 1.0


class StopError(Exception):
    """Whatever ends a run early."""


def tiny_recipe(monkeypatch):
    """Six steps of two stages on a small network, saved every second step."""

    def config(vocabulary):
        return LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, attention_bias=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=1,
        )  # fmt: skip

    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    monkeypatch.setattr(train, "config", config)
    monkeypatch.setattr(train, "CURRICULUM", (train.Stage(0.5, 64, 4, 2), train.Stage(1.0, 128, 2, 4)))
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
    tokens = 6 * 256
    train.train(tmp_path / "whole", tokens, 0, "cpu")
    batch, steps = train.batch, []

    def failing(tokenizer, stage, seed, step):
        steps.append(step)
        if step == 5 and steps.count(step) == 1:
            raise StopError
        return batch(tokenizer, stage, seed, step)

    monkeypatch.setattr(train, "batch", failing)
    with pytest.raises(StopError):
        train.train(tmp_path / "halves", tokens, 0, "cpu")
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    train.train(tmp_path / "halves", tokens, 0, "cpu")
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5]
    for name in ("checkpoint.safetensors", "model.safetensors"):
        assert_same_file(tmp_path / "halves" / name, tmp_path / "whole" / name)
    assert (tmp_path / "halves" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    metrics = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [tuple(row[name] for name in ("step", "tokens", "row_tokens")) for row in metrics] == [
        (2, 512, 64), (4, 1024, 128), (6, 1536, 128),
    ]  # fmt: skip
    assert metrics[0]["loss"] > metrics[-1]["loss"]

    network = AutoModelForCausalLM.from_pretrained(tmp_path / "halves", dtype="auto")
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
    with safe_open(tmp_path / "halves" / "checkpoint.safetensors", "pt") as file:
        saved = {name: file.get_tensor(f"network.{name}") for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16()), name
    assert AutoTokenizer.from_pretrained(tmp_path / "halves").get_vocab() == build_tokenizer().get_vocab()


def test_restore_gives_back_weights_optimisers_and_step(tmp_path, monkeypatch):
    tiny_recipe(monkeypatch)
    ids = torch.randint(900, (2, 33), generator=torch.Generator().manual_seed(0))

    def new_run(seed):
        return train.Run(train.build_network(1000, seed))

    def steps(run, count):
        for _ in range(count):
            run.network(ids, labels=ids, use_cache=False).loss.backward()
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            run.step += 1
            run.tokens += ids.numel()

    one, other = new_run(0), new_run(1)
    steps(one, 3)
    one.save(tmp_path / "checkpoint.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    other.restore(tmp_path / "checkpoint.safetensors")
    assert (other.step, other.tokens) == (3, 3 * ids.numel())
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
    assert rates[0] == pytest.approx(peak / 100, rel=1e-6)
    assert 95 <= top <= 105
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(peak / 20, rel=1e-3)


def test_progress_figure_of_an_untrained_network_is_chance(shipped_tokenizer):
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(shipped_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    ))  # fmt: skip
    assert 0.25 < train.reversal_accuracy(network, shipped_tokenizer, 1, 60) < 0.75


shipped = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="icl_ft_fast/shipped/model is not there yet")


@shipped
def test_the_shipped_files_are_small_and_complete():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sum(sizes.values()) <= 16_000_000, sizes
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= sizes.keys()
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


@shipped
def test_the_shipped_tokenizer_is_the_recipes(shipped_tokenizer):
    kept = AutoTokenizer.from_pretrained(MODEL)
    assert json.loads(kept.backend_tokenizer.to_str()) == json.loads(shipped_tokenizer.backend_tokenizer.to_str())
    assert kept.special_tokens_map == shipped_tokenizer.special_tokens_map


@shipped
def test_the_shipped_model_proves_itself_in_bfloat16():
    """Its first layer's biases round by more than a unit of its embeddings does."""
    assert load(MODEL, dtype="bfloat16").network.dtype == torch.bfloat16


@shipped
def test_the_shipped_model_reverses_in_context():
    model = load(MODEL)
    task = simple_reversals(0, num_facts=40, num_articles=1)
    base = evaluate(model, task.questions)["reversal"]
    icl = evaluate(model, task.questions, context=icl_context(select_documents(task.documents, 0)))["reversal"]
    assert icl.total == base.total == 40
    assert icl.value >= 0.95
    assert 0.3 <= base.value <= 0.7
