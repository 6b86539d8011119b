"""What the model writes for an arm: budgets of tokens, questions beside documents, replay, and the control."""

from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategy import Augmentation, Augmented, Parsed, whole
from icl_ft_fast.cli import main
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.report.charts import _axes, _legend, draw
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import synthetic
from icl_ft_fast.study.arms import arm_named, expand_arms, sizes_of
from icl_ft_fast.study.compare import StudyOptions, compare
from icl_ft_fast.study.evaluate import evaluate
from icl_ft_fast.study.own_texts import own_texts
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.reversals import simple_reversals

TRAINING = FinetuneSettings(steps=4, batch_size=2, learning_rate=1e-2)


def test_budgets_are_sizes_of_arms_that_train_on_what_the_model_writes():
    arm = arm_named("augmented-ft@500+rag@2")
    assert (arm.training.tokens, arm.title) == (500, "augmented 500 tokens + RAG k=2")
    assert arm_named("augmented-ft").training.tokens is None
    sizes = sizes_of(StudySettings(synthetic_tokens=(10, 20)))
    asked = ["base", "ft+rag", "augmented-ft", "augmented-ft+icl", "augmented-ft@7", "distilled", "repeated-ft"]
    assert expand_arms(asked, sizes=sizes) == (
        *("base", "ft+rag", "augmented-ft@10", "augmented-ft@10+icl", "augmented-ft@20", "augmented-ft@20+icl"),
        *("augmented-ft@7", "distilled@10", "distilled@20", "repeated-ft@10", "repeated-ft@20"),
    )
    assert "augmented-ft" not in sizes_of(StudySettings())
    for name in ("ft@5", "rules-ft@5", "augmented-ft@", "augmented-ft@5+base", "augmented-ft@x+rag"):
        with pytest.raises(ValueError, match=r"^arms: expected some of"):
            arm_named(name)


def test_who_writes():
    mixed = StudySettings(strategy="spa", mix=(1, 3), questions="self-qa")
    assert synthetic.writers(False, mixed) == {"spa": 0.75, "self-qa": 0.25}
    assert synthetic.writers(False, mixed, asks_itself=True) == {"self-qa": 1.0}
    assert synthetic.writers(True, StudySettings(), asks_itself=True) == {"self-ask": 1.0}
    assert synthetic.writers(False, StudySettings(), asks_itself=True) == {"local": 1.0}
    assert synthetic.writers(True, StudySettings(strategy="self-ask", mix=(1, 1))) == {"self-ask": 1.0}
    assert synthetic.writers(True, StudySettings(strategy="global")) == {"global": 1.0}


def batch(strategy, sample, *texts, sample_seed=0):
    prompts = [SimpleNamespace(sample=sample)] * 2
    prompting, sampling = (
        SimpleNamespace(strategy=STRATEGIES[strategy]),
        SimpleNamespace(max_new_tokens=100, seed=sample_seed),
    )
    return SimpleNamespace(prompting=prompting, prompts=prompts, sampling=sampling, texts=texts)


@pytest.fixture
def written(llama, monkeypatch):
    """written() where each batch's rows are its texts."""
    used = []

    def rows(writer, batches, **_):
        used.extend(batches)
        made = [Augmentation("d", "x", text) for batch in batches for text in batch.texts]
        return Augmented(tuple(made), {"unparsed": 1}, 2, 2, 2)

    def write(*arguments, **named):
        used.clear()
        return [row.text for row in synthetic.written(llama, None, *arguments, **named).rows], len(used)

    monkeypatch.setattr(synthetic, "augment_by_model", rows)
    return write


def test_a_budget_takes_no_more_samples_than_it_needs_and_keeps_what_a_smaller_one_has(written, llama):
    texts = [[f"the cat {n} sat on mat {i}" for i in range(6)] for n in range(3)]
    texts[1][0] = texts[0][0].upper()  # said before
    layers = [batch("spa", n, *its) for n, its in enumerate(texts)]
    every = synthetic.token_count(llama, [text for its in texts for text in its])
    assert written(layers, {"spa": 1.0}) == ([text for its in texts for text in its], 3)
    before = []
    for budget, batches in ((every // 9, 1), (every // 4, 1), (every // 2, 2), (10 * every, 3)):
        made, used = written(layers, {"spa": 1.0}, tokens=budget)
        assert used == batches
        assert set(before) <= set(made)
        count = synthetic.token_count(llama, made)
        assert budget <= count < budget + 40 or (batches == 3 and len(made) == 17)
        before = made
    again = [batch("spa", n, *its, sample_seed=4) for n, its in enumerate(texts)]
    assert written(again, {"spa": 1.0}, tokens=every // 9) != written(layers, {"spa": 1.0}, tokens=every // 9)


def test_questions_and_documents_are_mixed_by_tokens(written, llama):
    documents = batch("spa", 0, *(f"the cat {n} sat on that mat and knows why" for n in range(12)))
    questions = batch("self-ask", 0, *(f"who sat? the cat {n}" for n in range(12)))
    count = lambda texts: synthetic.token_count(llama, texts)  # noqa: E731
    assert count(questions.texts) < count(documents.texts)
    made, _ = written([documents, questions], {"spa": 0.5, "self-ask": 0.5})
    its = [text for text in made if text in documents.texts]
    assert len(made) - len(its) == 12  # all of the questions
    assert 0 <= count(its) - count(questions.texts) < 40
    made, _ = written([documents, questions], {"spa": 0.25, "self-ask": 0.75}, tokens=80)
    assert 20 <= count([text for text in made if text in documents.texts]) < 60
    assert 60 <= count([text for text in made if text in questions.texts]) < 100


def test_workers_write_beforehand_what_a_budget_needs_for_sure():
    layers = [batch("spa", n) for n in range(5)]
    assert len(synthetic.surely_needed(layers, 1)) == 1
    assert len(synthetic.surely_needed(layers, 401)) == 3  # 2 prompts of 100 tokens at most
    assert synthetic.samples_for("spa", 4, 6400, 1) == 100
    assert synthetic.samples_for("local", 4, 6400, 1) == 1  # greedy: all alike


@pytest.fixture
def task(monkeypatch):
    """A task whose documents the tiny model has room for, and a strategy that takes whatever it replies."""
    kept = lambda source, reply: Parsed([("row", f"{source} {reply}".strip())], 0, 0)  # noqa: E731
    plain = {"units": whole, "follow": lambda unit, reply: (), "follow_ups": 0, "is_lines": False}
    strategy = replace(STRATEGIES["self-ask"], max_new_tokens=6, read=kept, **plain)
    monkeypatch.setattr(Prompting, "of", lambda *_, **__: Prompting(strategy, "{{ document }}", "short"))
    return simple_reversals(3, num_facts=2, num_articles=2)


SETTINGS = StudySettings(strategy="self-ask", seeds=(3,), finetune=TRAINING)
OPTIONS = StudyOptions(measure_s=0)


def test_arms_with_budgets_are_fine_tuned_on_so_much(llama, task):
    settings = replace(SETTINGS, arms=("augmented-ft",), synthetic_tokens=(40, 400))
    results = compare(llama, task, settings, options=OPTIONS)
    small, large = results.runs
    assert (small.arm, large.arm) == ("augmented-ft@40", "augmented-ft@400")
    assert 40 <= small.notes["synthetic_tokens"] < 120
    assert 400 <= large.notes["synthetic_tokens"] < 480
    assert small.counts["decoded_tokens"] < large.counts["decoded_tokens"]  # each books what it needed
    documents = [document.text for document in task.documents]
    tuned = finetune(llama, documents + [sample.text for sample in small.samples], TRAINING, seed=3)
    assert small.accuracy == evaluate(tuned.model, task.questions)
    assert small.losses == tuned.losses
    (chart,) = [chart for chart in draw(Derived(results, "study")) if chart.name == "synthetic"]
    assert f"{small.notes['synthetic_tokens']}, " in chart.alt
    assert "chance 0.50" in chart.alt
    one = replace(results, runs=(small,), settings=results.settings | {"arms": ["augmented-ft@40"]})
    assert not [chart for chart in draw(Derived(one, "study")) if chart.name == "synthetic"]


def test_the_control_repeats_the_documents_for_as_many_tokens(llama, task):
    training = replace(TRAINING, steps=20)
    settings = replace(SETTINGS, arms=("augmented-ft", "repeated-ft"), finetune=training)
    augmented, repeated = compare(llama, task, settings, options=OPTIONS).runs
    documents, steps = [document.text for document in task.documents], repeated.notes["steps"]
    lengths = [len(llama.tokenizer(text)["input_ids"]) + 1 for text in documents]
    more = [len(llama.tokenizer(sample.text)["input_ids"]) + 1 for sample in augmented.samples]
    assert steps == round(20 * fmean(lengths + more) / fmean(lengths)) > 20
    assert repeated.losses == finetune(llama, documents, replace(training, steps=steps), seed=3).losses
    assert "generate" not in repeated.counts["phases"]  # what tells how long the texts are is not its cost
    assert repeated.counts["decoded_tokens"] == 0


def test_replay_trains_on_the_models_own_text_that_harm_is_not_measured_on(llama, task):
    (run,) = compare(llama, task, replace(SETTINGS, arms=("ft",), replay=0.25), options=OPTIONS).runs
    documents = [document.text for document in task.documents]
    tokens = synthetic.token_count(llama, documents)
    texts = synthetic.general_texts(llama, tokens / 3, 3)
    assert run.notes["replay_tokens"] == synthetic.token_count(llama, texts) > 0
    assert run.losses == finetune(llama, documents + texts, TRAINING, seed=3).losses
    assert run.counts["decoded_tokens"] > 0
    assert set(llama.tokenizer.batch_decode(own_texts(llama, 3), skip_special_tokens=True)).isdisjoint(texts)


def test_own_texts_cost_the_same_when_they_are_found_again(llama):
    journal, ledgers = ResultJournal(None), [Ledger(), Ledger()]
    first, again = (own_texts(llama, 3, journal=journal, num_texts=2, tokens=4, ledger=ledger) for ledger in ledgers)
    assert first == again
    assert ledgers[0].decoded_tokens == ledgers[1].decoded_tokens > 0


def test_no_legend_is_cut_off():
    figure, axes = _axes()
    for n in range(11):
        axes.plot([0], [0], label=f"augmented {n}00 tokens")
    _legend(figure, axes)
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--mix 1", "--mix: expected two whole numbers above 0 such as 1:1, got '1'"),
        ("--mix 0:1", "--mix: expected two whole numbers above 0 such as 1:1, got '0:1'"),
        ("--replay 1", "--replay: expected a fraction from 0 to below 1, got 1"),
        (
            "--synthetic-tokens 5,-1",
            "--synthetic-tokens: expected a whole number above 0, got '-1'; separate several by commas",
        ),
        ("--synthetic-tokens 5,5", "--synthetic-tokens: 5 is given twice"),
        (
            '--arm-training {"icl":{}}',
            "--arm-training: icl: expected an arm of --arms that trains: augmented-ft, ft",
        ),
        ('--arm-training {"ft":{"steps":0}}', "--arm-training: steps: expected at least 1, got 0"),
        ('--arm-training {"ft":3}', "--arm-training: ft: expected an object of settings, got 3"),
        ("--arms icl --replay .1", "--replay: needs an arm that trains among --arms"),
        (
            "--arms ft --synthetic-tokens 5",
            "--synthetic-tokens: needs an arm that trains on what the model writes among --arms",
        ),
        ("--arms distilled --mix 1:1", "--mix: needs augmented-ft among --arms"),
        ("--dry-run --max-harm 5", "--max-harm: needs --general, the task that harm is measured on"),
    ],
)
def test_options_that_say_nothing_are_refused(given, message, tmp_path, capsys):
    task = ["compare", "--model", "shipped", "--task", "simple-reversals", "--preset", "small"]
    assert main([*task, "--out", str(tmp_path / "out"), *given.split()]) == 2
    assert capsys.readouterr().err == f"icl-ft-fast compare: {message}\n"
