"""augmentation/self_study.py, finetuning/prefix.py and the arm made of them."""

import copy
import json
import math
from dataclasses import replace

import pytest
import tokenizer_kinds
import torch
from transformers import DynamicCache

from icl_ft_fast.augmentation import self_study
from icl_ft_fast.augmentation.self_study import (
    ConversationSettings,
    SelfStudyError,
    conversation_batches,
    document_parts,
    rare_words,
    turn_tokens,
    write_conversations,
)
from icl_ft_fast.augmentation.strategy import SMALL_TEMPERATURE
from icl_ft_fast.cli import main
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore, load_context
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.likelihood import loglikelihood
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.prompting import documents_turn, prompt_context
from icl_ft_fast.engine.score import score
from icl_ft_fast.engine.slots import text_of
from icl_ft_fast.finetuning import run as finetune_run
from icl_ft_fast.finetuning.prefix import CONTEXT_FILE, SlotsRun, read_best, train_prefix, train_slots
from icl_ft_fast.finetuning.settings import FinetuneError, PrefixSettings, RunOptions
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.runtime.templates import render_chat
from icl_ft_fast.study import runs as study_runs
from icl_ft_fast.study.arm import Workspace
from icl_ft_fast.study.evaluate import accuracies, answers, select_documents
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.study.slotted import SLOTS
from icl_ft_fast.tasks.files import write_jsonl
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question

DOCUMENTS = (Document("a", "the cat sat on that mat."), Document("b", "who knows why the cat sat?"))
TURNS = ConversationSettings(tokens=8)
FEW = PrefixSettings(conversations=6, conversation_tokens=8, steps=4, batch_size=3, top=5)
QUESTIONS = [Question("q", " where the cat", (" sat.", " ran far away.")), Question("r", "a", (" dog", " cat"))]


def written(model, count=6, **how):
    batches = conversation_batches(model, DOCUMENTS, count, TURNS, **how)
    return write_conversations(model, batches)


def read(model, template="base"):
    text = prompt_context(model, DOCUMENTS, template)
    (token,) = encoding.encode(model.tokenizer, [text.rstrip()])
    return text, token


def keys_and_values(past):
    return [(layer.keys, layer.values) for layer in past.layers]


@pytest.mark.parametrize("num_slots", [1, 7])
def test_gradients_are_those_of_plain_forwards(num_slots, llama, plain_llama, monkeypatch):
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))
    (text, token), conversations = read(llama), written(llama)
    settings = replace(FEW, steps=1, batch_size=6, learning_rate=1.0, warmup_steps=0, clip_norm=math.inf)
    run = SlotsRun(token[:num_slots], [text], conversations, settings)
    made = train_slots(llama, run, options=RunOptions(), ledger=Ledger())
    network = copy.deepcopy(plain_llama).double().requires_grad_(False)
    first = network.model(torch.tensor([token[:num_slots]]), use_cache=True)
    slots = [tuple(t.clone().requires_grad_() for t in pair) for pair in keys_and_values(first.past_key_values)]
    hidden = first.last_hidden_state[0, -1].clone().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in conversations:
        ids = torch.tensor([list(one.ids)])
        whole = network(torch.cat([torch.tensor([token]), ids], 1)).logits[0, len(token) - 1 : -1].log_softmax(-1)
        best = whole.topk(5)
        past = DynamicCache()
        for layer, (k, v) in enumerate(slots):
            k, v = (torch.cat([t[:, :, :1].detach(), t[:, :, 1:]], 2) if num_slots > 1 else t for t in (k, v))
            past.update(k, v, layer)
        behind = network.model(ids, past_key_values=past, use_cache=True).last_hidden_state[0]
        logp = network.lm_head(torch.cat([hidden[None], behind[:-1]])).log_softmax(-1)
        total = total - (best.values.exp() * logp.gather(-1, best.indices)).sum()
        count += len(one.ids)
    loss = total / count
    assert made.losses[0] == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    assert (made.hidden - (hidden - hidden.grad)).abs().max() < 1e-5
    for layer, pair in enumerate(slots):
        for found, start in zip(made.layers[layer], pair, strict=True):
            expected = (start - start.grad)[0].transpose(0, 1)
            assert (found - expected).abs().max() < 1e-5
            assert start.grad.abs().max() > 1e-4  # there is something to see


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {}), ("mistral", {"sliding_window": 8}), ("gemma2", {}), ("gpt_oss", {"sliding_window": 8})],
)
def test_slots_that_are_the_context_predict_as_it_does(family, settings, tiny_network, tokenizer, tmp_path):
    """Absolute positions, sliding windows, soft-caps and sinks."""
    tiny_network(family, num_hidden_layers=2, **settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    (text, token), conversations = read(model), written(model)
    still = replace(FEW, steps=1, batch_size=6, learning_rate=1e-12)
    run = SlotsRun(token, [text], conversations, still)
    made = train_slots(model, run, options=RunOptions(), ledger=Ledger())
    places = torch.cat(
        [probability for _, probability in read_best(model, [text], conversations, 5, Ledger())]
    ).double()
    assert made.losses[0] == pytest.approx(float(-(places * places.log()).sum(1).mean()), abs=1e-5)


def test_the_loss_falls_and_the_model_stays(llama, llama_directory):
    before, grads = llama.fingerprint(), [p.requires_grad for p in llama.network.parameters()]
    ledger = Ledger()
    prefix = train_prefix(llama, DOCUMENTS, 5, replace(FEW, steps=40, batch_size=6), ledger=ledger)
    assert prefix.losses[-1] < prefix.losses[0] - 0.01
    assert load(llama_directory).fingerprint() == llama.fingerprint() == before
    assert [p.requires_grad for p in llama.network.parameters()] == grads
    assert {"generate", "teach", "train"} == ledger.phases.keys()
    teacher = ledger.phases["teach"]
    assert teacher.request_tokens > 2 * teacher.forwarded_tokens  # the documents are read once
    assert ledger.phases["train"].trained_tokens > 0


def test_a_trained_prefix_is_a_saved_context(llama, llama_directory, tmp_path):
    options = RunOptions(output_dir=tmp_path / "out")
    prefix = train_prefix(llama, DOCUMENTS, 5, FEW, options=options)
    loaded = load_context(tmp_path / "out" / CONTEXT_FILE, load(llama_directory))
    requests = [([*prefix.context.token.tolist(), 7], [8, 9])]
    expected = loglikelihood(llama, requests, start=prefix.context)
    assert loglikelihood(llama, requests, start=loaded) == expected != loglikelihood(llama, requests)
    store, ledger = ContextStore(tmp_path / "store", llama, 10**9), Ledger()
    store.add(prefix.context)
    scores = score(llama, QUESTIONS, context=f"{prefix.key} ", store=store, ledger=ledger)
    assert ledger.cached_tokens == 5
    assert scores != score(llama, QUESTIONS, context=f"{prefix.key} ")


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(llama, tmp_path, monkeypatch):
    whole, steps = train_prefix(llama, DOCUMENTS, 5, FEW), []
    step = finetune_run.train_step

    def dying(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(finetune_run, "train_step", dying)
    options = RunOptions(output_dir=tmp_path, resume=True, checkpoint_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_prefix(llama, DOCUMENTS, 5, FEW, options=options)
    again = train_prefix(llama, DOCUMENTS, 5, FEW, options=options)
    assert len(steps) == 5  # two, the one that died, two more
    assert again.losses == whole.losses
    for layer, pair in whole.context.cache.layers(5).items():
        assert all(a.equal(b) for a, b in zip(pair, again.context.cache.layers(5)[layer], strict=True))
    with pytest.raises(FinetuneError, match="cannot be resumed: learning_rate was"):
        train_prefix(llama, DOCUMENTS, 5, replace(FEW, learning_rate=1.0), options=options)


def test_the_first_slot_stays(llama):
    (text, token), conversations = read(llama), written(llama)
    first, last = (
        train_slots(
            llama, SlotsRun(token[:5], [text], conversations, settings), options=RunOptions(), ledger=Ledger()
        ).layers
        for settings in (replace(FEW, steps=1, learning_rate=1e-9), FEW)
    )
    for layer in first:
        for a, b in zip(first[layer], last[layer], strict=True):
            assert a[0].equal(b[0])
            assert (a[1:] - b[1:]).abs().max() > 1e-3


def test_a_prefix_in_bfloat16(llama_directory):
    prefix = train_prefix(load(llama_directory, dtype="bfloat16"), DOCUMENTS, 3, FEW)
    assert {k.dtype for k, _ in prefix.context.cache.layers(3).values()} == {torch.bfloat16}
    assert all(math.isfinite(loss) for loss in prefix.losses)


def test_conversations_follow_the_documents_and_the_seed(llama):
    made = written(llama, 5)
    assert made == written(llama, 5) != written(llama, 5, seed=1)
    words = rare_words(DOCUMENTS, 0)
    expected = (
        ["the cat sat on", "the cat sat on that", "the cat sat on that mat"],
        ["who", "who knows", "who knows why"],
    )
    assert [sorted(text for text, _ in some) for some in words] == list(expected)  # the cat sat in both
    (batch,) = conversation_batches(llama, DOCUMENTS, 5, TURNS)
    begun = batch.beginnings()
    assert [start.is_second for start in begun] == [False, True, True, False, False]  # the documents take turns
    assert [start.text == start.word for start in begun[1:3]] == [True, True]
    assert begun[0].text.endswith(begun[2].word)
    assert sorted(DOCUMENTS[d].text.startswith(begun[0].text) for d in (0, 1)) == [False, True]
    for one, start in zip(made, begun, strict=True):
        assert llama.tokenizer.decode(one.ids).lstrip().startswith(start.text)
    text, token = read(llama)
    ids, probability = read_best(llama, [text], made, 3, Ledger())[0]
    assert ids.shape == probability.shape == (len(made[0].ids), 3)
    found = loglikelihood(llama, [(token, [int(ids[0, 0])])])[0]
    assert found.is_greedy
    assert math.exp(found.logp) == pytest.approx(float(probability[0, 0]), rel=1e-4)


def test_documents_beyond_the_positions_are_read_in_parts(llama):
    many = [Document(str(n), f"the cat sat on that mat {n}.") for n in range(40)]
    parts = document_parts(llama, many, tokens=8)
    assert [document for part in parts for document in part] == many
    assert len(parts) > 1
    made = write_conversations(llama, conversation_batches(llama, many, 5, TURNS))
    assert len({one.part for one in made}) > 1
    (length,) = map(len, encoding.encode(llama.tokenizer, [prompt_context(llama, many[:3])]))
    assert list(map(len, document_parts(llama, many[:5], tokens=8, part_tokens=length))) == [3, 2]
    assert list(map(len, document_parts(llama, many[:2], tokens=8, part_tokens=1))) == [1, 1]
    prefix = train_prefix(llama, many, 9, FEW)
    assert len(prefix.context.token) == 9


@pytest.mark.parametrize("small", [0, 10**9])
def test_chat_models_ask_and_answer(small, tiny_network, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(self_study, "SMALL", small)
    tiny_network("llama", num_hidden_layers=1, max_position_embeddings=512).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    model.tokenizer.chat_template = tokenizer_kinds.PLAIN
    made, text = written(model, 2, template="chat"), prompt_context(model, DOCUMENTS, "chat")
    assert not any("Ask me" in model.tokenizer.decode(one.ids) for one in made)
    turn = render_chat(model.tokenizer, [documents_turn(model, DOCUMENTS)])
    assert turn == text
    (token,) = encoding.encode(model.tokenizer, [text.rstrip()])
    asked = model.tokenizer.decode([*token, *made[1].ids])
    assert asked.startswith(text)
    assert len(made[1].ids) > len(made[0].ids)
    roles = [{"role": "assistant", "content": "\ufdd0"}, {"role": "user", "content": "\ufdd0"}]
    _, between, _ = render_chat(model.tokenizer, [documents_turn(model, DOCUMENTS), *roles]).split("\ufdd0")
    (batch,) = conversation_batches(model, DOCUMENTS, 2, TURNS, template="chat")
    assert batch.temperature == (SMALL_TEMPERATURE if small else 0.7)
    word = batch.beginnings()[1].word
    assert (f"{between}What do the documents say about {word}?" in asked) == bool(small)
    assert between in asked
    around, written_here = turn_tokens(model, batch)
    ahead = len(made[1].ids) - len(made[0].ids) - around - (written_here if small else 0)
    assert 0 < ahead <= 8 * 3 * (2 if small else 3)  # what the tiny model writes may be three bytes a token
    assert written_here > 10
    assert turn_tokens(model, conversation_batches(model, DOCUMENTS, 2, template="base")[0]) == (0, 0)


def test_what_cannot_be_trained(llama):
    _, token = read(llama)
    for num_tokens in (0, len(token) + 1):
        with pytest.raises(FinetuneError, match=f"num_tokens: expected 1 to the {len(token)} tokens"):
            train_prefix(llama, DOCUMENTS, num_tokens, FEW)
    with pytest.raises(SelfStudyError, match="documents: expected at least one"):
        train_prefix(llama, [], 4, FEW)
    with pytest.raises(SelfStudyError, match=r"documents: .long. takes .* split it into several documents"):
        train_prefix(llama, [*DOCUMENTS, Document("long", "who knows why " * 99)], 4, FEW)
    with pytest.raises(FinetuneError, match=r"^temperature: expected a finite number above 0, got 0$"):
        PrefixSettings(temperature=0)
    with pytest.raises(FinetuneError, match="top: expected at least 1, got 0"):
        PrefixSettings(top=0)


TASK = simple_reversals(3, num_facts=2, num_articles=2)
SETTINGS = StudySettings(seeds=(3,), icl_per_topic=1, prefix=FEW)


def runs_of(model, *names, store=None, journal=None):
    workspace, settings = Workspace(journal or ResultJournal(None), store=store), replace(SETTINGS, arms=names)
    planned = study_runs.plan(model, lambda _: TASK, settings, workspace.journal)
    return study_runs.make_runs(model, planned, settings, workspace)


def test_the_arm_is_a_trained_prefix(llama, tmp_path):
    documents = select_documents(TASK.documents, 3, per_topic=1)
    prefix = train_prefix(llama, documents, 6, FEW, seed=3)
    store = ContextStore(tmp_path, llama, 10**9)
    store.add(prefix.context)
    expected = accuracies(answers(llama, TASK.questions, context=f"{prefix.key} ", store=store))
    journal = ResultJournal(tmp_path / "journal.jsonl")
    run, more = runs_of(llama, "prefix@6", "prefix@999", journal=journal)
    assert run.accuracy == expected
    assert run.losses == prefix.losses
    assert (run.notes[SLOTS], run.notes["conversations"]) == (6, 6)
    assert more.notes[SLOTS] == more.notes["context_tokens"] < 999  # all there are to start from
    assert run.counts["phases"]["generate"] == more.counts["phases"]["generate"]  # written once, booked by each
    assert sum("conversations" in value for value in journal.values.values()) == 1
    assert run.notes["teacher_sharing"] > 2
    phases = run.counts["phases"]
    assert run.setup_s == pytest.approx(sum(phases[name]["wall_s"] for name in ("generate", "teach", "train")))
    assert run.counts["cached_tokens"] == 6


def test_the_commands(llama_directory, tmp_path, capsys):
    documents, questions, store = tmp_path / "d.jsonl", tmp_path / "q.jsonl", tmp_path / "store"
    write_jsonl(documents, [{"id": d.id, "text": d.text} for d in DOCUMENTS])
    write_jsonl(questions, [{"id": "a", "prompt": "the cat", "choices": [" sat", " is"]}])
    model, small = ["--model", str(llama_directory)], ["--conversations", "3", "--prefix-steps", "2"]
    command = ["context", "train", *model, "--documents", str(documents), "--store", str(store), *small]
    assert main([*command, "--prefix-tokens", "3,6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["3 slots for 2" in lines[0], "6 slots for 2" in lines[1]] == [True, True]
    assert sorted(path.suffix for path in store.iterdir() if path.name != ".lock") == [".safetensors"] * 2
    shown, out = lines[1].partition(":")[0], tmp_path / "scores.jsonl"
    asked = ["score", "--quiet", *model, "--questions", str(questions), "--out", str(out), "--context", shown]
    assert main([*asked, "--store", str(store)]) == 0
    assert f"6 read from {store}" in capsys.readouterr().out
    (found,) = (path for path in store.glob("*.safetensors") if path.stem.startswith(shown))
    loaded = load(llama_directory)
    context = load_context(found, loaded)
    expected = loglikelihood(loaded, encode_behind(loaded, context, "the cat", (" sat", " is")), start=context)
    assert json.loads(out.read_text())["logp"] == pytest.approx([one.logp for one in expected], abs=1e-5)
    for more, message in (
        ([], "--context: needs --store, where it is, and takes the place of --documents"),
        (["--store", str(store), "--documents", str(documents)], "--context: needs --store"),
        (["--store", str(store), "--context", "nothing"], "--context: 'nothing' begins 0 of the ids"),
    ):
        assert main([*asked, "--overwrite", *more]) == 2
        assert message in capsys.readouterr().err
    for sizes in ("0", "3,x", "3,3"):
        assert main([*command, "--prefix-tokens", sizes]) == 2
        assert capsys.readouterr().err.startswith("icl-ft-fast context: --prefix-tokens: ")


def encode_behind(model, context, prompt, choices):
    text = f"{text_of(model, context.token)} {prompt}"
    return encoding.encode_pairs(model.tokenizer, [(text, choice) for choice in choices])
