"""study/harm.py: KL as plain PyTorch has it, the same texts each time, and arms with their documents in place."""

import io
import json
import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from serving import TEMPLATE

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.likelihood import prefill
from icl_ft_fast.engine.loading import load
from icl_ft_fast.finetuning.settings import FinetuneSettings, PrefixSettings
from icl_ft_fast.report import table
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.report.page import render
from icl_ft_fast.report.verdict import verdict_of, why_none
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import compare
from icl_ft_fast.study.evaluate import Accuracy
from icl_ft_fast.study.harm import SHARED_WITH_GENERAL, divergence, general_questions, shared_with
from icl_ft_fast.study.own_texts import HarmError, own_texts
from icl_ft_fast.study.records import Harm
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question, Task

TASK = simple_reversals(3, num_facts=2, num_articles=1)


@pytest.fixture(scope="module")
def changed_directory(tiny_network, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    tiny_network("llama", num_hidden_layers=2, std=0.11).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def changed(changed_directory):
    return load(changed_directory)


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    folder = tmp_path_factory.mktemp("general")
    questions = [Question(f"g{i}", " the cat", (" sat.", " ran far."), i % 2) for i in range(4)]
    Task((), tuple(questions)).write(folder)
    return folder


def float64_logp(network, ids):
    with torch.no_grad():
        return network.double()(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


def plain_kl(untouched, changed, texts, opening, before):
    """The definition, one text at a time in float64."""
    total, tokens = 0.0, 0
    for text in texts:
        log_p = float64_logp(untouched, [*opening, *text])[len(opening) - 1 : -1]
        log_q = float64_logp(changed, [*before, *text])[len(before) - 1 : -1]
        total += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(text)
    return total / tokens


def test_kl_is_that_of_plain_float64(llama, changed, tiny_network):
    texts = [[5, 9, 7, 30], [5, 9, 7, 31, 40], [80]]
    networks = [tiny_network("llama", num_hidden_layers=2, std=std) for std in (0.1, 0.11)]
    opening = [encoding.prefix_token_id(llama.tokenizer)]
    expected = plain_kl(*networks, texts, opening, opening)
    assert expected > 1e-4
    assert divergence(llama, changed, texts) == pytest.approx(expected, rel=1e-3)
    assert divergence(llama, llama, texts) == 0.0


def test_kl_behind_documents(llama, tiny_network):
    texts, before = [[5, 9, 7, 30], [5, 9, 44]], [*encoding.encode(llama.tokenizer, ["the dog ran"])[0]]
    networks = [tiny_network("llama", num_hidden_layers=2) for _ in range(2)]
    expected = plain_kl(*networks, texts, [encoding.prefix_token_id(llama.tokenizer)], before)
    assert divergence(llama, llama, texts, before=[before] * 2) == pytest.approx(expected, rel=1e-3)
    start = prefill(llama, before)
    assert divergence(llama, llama, texts, before=[before] * 2, start=start) == pytest.approx(expected, rel=1e-3)


def test_a_chat_template_is_no_harm(llama, general):
    words = deepcopy(llama.tokenizer)
    words.chat_template = TEMPLATE
    settings = StudySettings(arms=("base", "icl"), seeds=(3,), general=str(general))
    results = compare.compare(
        replace(llama, tokenizer=words), TASK, settings, options=compare.StudyOptions(measure_s=0)
    )
    assert results.settings["template"] == "chat"
    base, icl = (run.harm.kl for run in results.runs)
    assert base == 0.0 < icl


def test_own_texts_are_drawn_once(llama, monkeypatch):
    journal = ResultJournal(None)
    texts = own_texts(llama, 3, journal=journal, num_texts=4, tokens=6)
    assert len({tuple(text) for text in texts}) > 1
    assert all(1 <= len(text) <= 6 for text in texts)
    assert own_texts(llama, 3, num_texts=4, tokens=6) == texts != own_texts(llama, 4, num_texts=4, tokens=6)
    monkeypatch.setattr("icl_ft_fast.study.own_texts.generate", lambda *_, **__: pytest.fail("written again"))
    assert own_texts(llama, 3, journal=journal, num_texts=4, tokens=6) == texts
    monkeypatch.setattr("icl_ft_fast.study.own_texts.generate", lambda *_, **__: [])
    with pytest.raises(HarmError, match="writes nothing"):
        own_texts(llama, 3)


def test_the_shipped_general_task():
    assert len(general_questions("shipped")) == 100
    assert general_questions("") == ()


def test_a_general_task_without_answers(tmp_path):
    Task((), (Question("q", "x", (" y",)),)).write(tmp_path)
    with pytest.raises(HarmError, match=r"questions\.jsonl: no question has an answer"):
        general_questions(str(tmp_path))


@pytest.fixture(scope="module")
def results(llama, general):
    training = FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2)
    prefix = PrefixSettings(conversations=2, conversation_tokens=4, steps=2, batch_size=2)
    settings = StudySettings(seeds=(3,), general=str(general), finetune=training, prefix=prefix)
    names = ["base", "icl", "rag@1", "compacted@2", "prefix@4", "ft", "ft+rag@1"]
    return compare.compare(llama, TASK, settings, arms=names, options=compare.StudyOptions(measure_s=0.01))


def test_every_arm_has_its_harm(results):
    harms = {run.arm: run.harm for run in results.runs}
    assert harms["base"].kl == 0.0
    assert harms["base"].general == harms["base"].general_before
    assert {harm.general_before for harm in harms.values()} == {harms["base"].general}
    assert all(harm.kl > 1e-4 for arm, harm in harms.items() if arm != "base")
    assert all(harm.general.total == 4 for harm in harms.values())


def test_harm_is_no_cost_of_an_arm(results):
    base = next(run for run in results.runs if run.arm == "base")
    assert base.counts["phases"].keys() == {"tokenise", "query"}


def test_the_table_and_the_decision_know_harm(results, monkeypatch):
    bad = Harm(0.5, Accuracy(0, 4), Accuracy(4, 4))
    runs = tuple(replace(run, harm=bad) if run.arm == "icl" else run for run in results.runs)
    study = Derived(replace(results, runs=runs), "x")
    console = Console(file=io.StringIO(), width=80, highlight=False)
    table.print_study(study, console)
    text = console.file.getvalue()
    assert "+100.0" in text
    assert "harm" in text
    assert "ICL" in {way.name for way in study.decision_ways("seconds")}
    strict = replace(study, max_harm=50.0)
    row = re.search(r">ICL <small>over --max-harm</small></th>(.*?)</tr>", render([strict]))
    assert re.findall(r"<td>(.*?)</td>", row[1]) == ["0.5000", "1.000", "0.000", "+100.0"]
    assert "ICL" not in {way.name for way in strict.decision_ways("seconds")}
    assert "base" in {way.name for way in strict.decision_ways("seconds")}
    assert study.summary()["harm"]["icl"] == {"kl": 0.5, "points_lost": 100.0}
    none = Derived(replace(results, runs=tuple(replace(run, harm=None) for run in runs)), "x", max_harm=1.0)
    assert none.decision_ways("seconds") == []
    monkeypatch.setattr(Derived, "not_above_chance", "")  # as this random model is
    assert "every arm loses more than --max-harm" in why_none(none)
    verdict = verdict_of(replace(study, max_harm=50.0), 100, 2.0)
    assert "Left out, as --max-harm is less than they lose or that was not measured: ICL." in verdict.text


def test_a_general_task_that_shares_documents_or_questions_is_told(results, tmp_path):
    task = Task((Document("d", "own"), Document("e", "theirs too")), (Question("q", "a", ("b", "c"), answer=0),))
    (tmp_path / "documents.jsonl").write_text('{"id": "x", "text": "theirs too"}\n')
    questions = [
        {"id": "r", "prompt": "a", "choices": ["b", "c"], "answer": 1},
        {"id": "s", "prompt": "z", "choices": ["b", "c"], "answer": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    assert shared_with(str(tmp_path), task) == 2
    assert shared_with("shipped", task) == shared_with("", task) == 0
    runs = tuple(replace(run, notes=run.notes | {SHARED_WITH_GENERAL: 2}) for run in results.runs)
    (note,) = set(Derived(replace(results, runs=runs), "x").notes) - set(Derived(results, "x").notes)
    assert note.startswith("The general task has 2 documents or questions of the task itself")
