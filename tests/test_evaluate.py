"""Answers and accuracies, their intervals, and the documents of a context."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.engine.prompting import ProtocolError, icl_context, prompt_context
from icl_ft_fast.engine.score import score
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import runs as study_runs
from icl_ft_fast.study.arm import Workspace
from icl_ft_fast.study.evaluate import (
    Accuracy,
    Answer,
    accuracies,
    answers,
    choice_scores,
    fit_documents,
    select_documents,
)
from icl_ft_fast.study.settings import NORMALIZATIONS, StudySettings
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question

TRAINING = FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2)


SETTINGS = StudySettings(arms=("icl", "rules-ft"), seeds=(0, 7), icl_per_topic=1, finetune=TRAINING)


def task_of_seed(seed):
    """Two facts, two articles each."""
    return simple_reversals(seed, num_facts=2, num_articles=2)


def runs_of(model, task_of_seed, settings, journal=None, store=None, on_run=None):
    """The runs of a study without its costs."""
    workspace = Workspace(journal or ResultJournal(None), store=store)
    planned = study_runs.plan(model, task_of_seed, settings, workspace.journal, has_store=store is not None)
    return study_runs.make_runs(model, planned, settings, workspace, on_run=on_run)


@pytest.fixture(scope="module")
def runs(llama):
    """Two arms under two seeds, and what on_run was told."""
    told = []
    result = runs_of(llama, task_of_seed, SETTINGS, on_run=told.append)
    assert told == result
    return result


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_that_were_published(correct, total, low, high):
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=5e-5)
    assert Accuracy(total - correct, total).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_interval_solves_its_equation(counts):
    accuracy = Accuracy(*counts)
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.value + 1e-12
    assert accuracy.value - 1e-12 <= high <= 1
    for bound in (low, high):  # the score test's statistic at either end is the 95% point
        z = 1.959964
        assert counts[1] * (accuracy.value - bound) ** 2 == pytest.approx(
            z * z * bound * (1 - bound), rel=1e-6, abs=1e-9
        )


def test_accuracies_by_split():
    rows = [("a", 0, 0), ("b", 1, 0), ("a", 1, 0), ("b", 1, 1)]
    given = [Answer(str(i), split, None, "", p, (0.5, 0.5), (answer,)) for i, (split, answer, p) in enumerate(rows)]
    assert accuracies(given) == {"a": Accuracy(1, 2), "b": Accuracy(1, 2)}
    assert accuracies([]) == {}


@pytest.mark.parametrize("tokens", [70, 90, 135, 1000])
def test_documents_that_fit_a_context(tokens, llama):
    documents = [Document(str(d), "the cat sat " * count) for d, count in enumerate((9, 1, 200, 4, 2, 30))]
    kept = fit_documents(llama, documents, tokens)

    def length(some):
        return len(encoding.encode(llama.tokenizer, [prompt_context(llama, some)])[0])

    assert length(kept) <= tokens
    assert kept == [document for document in documents if document in kept]
    for d, document in enumerate(documents):  # each one came too late, or is itself too long, but for what joins them
        before = [other for other in documents[:d] if other in kept]
        assert document in kept or length([*before, document]) > tokens - 4
    assert len(kept) == {70: 1, 90: 3, 135: 4, 1000: 6}[tokens]
    with pytest.raises(
        ProtocolError, match=r"^icl_tokens: no document fits 3 tokens: the template takes \d+, the shortest \d+$"
    ):
        fit_documents(llama, documents, 3)


def test_documents_for_the_context():
    documents = [Document(f"{topic}{i}", "", topic or None) for topic in ("a", "b", "") for i in range(6)]
    everything = select_documents(documents, 0)
    assert sorted(everything, key=documents.index) == documents
    assert everything != documents
    assert everything == select_documents(documents, 0) != select_documents(documents, 1)
    topics = [document.topic for document in select_documents(documents, 0, per_topic=2)]
    assert {topic: topics.count(topic) for topic in topics} == {"a": 2, "b": 2, None: 6}
    assert select_documents(documents, 0, subsample=3) == everything[:6]
    assert select_documents(documents, 0, per_topic=2, subsample=4)[0] in documents
    assert len(select_documents(documents, 0, per_topic=2, subsample=5)) == 2
    assert len(select_documents(documents, 0, subsample=7)) == 3
    assert len(select_documents(documents, 0, subsample=100)) == 1
    assert icl_context(documents[:0]) == "Documents:\n\n\nGiven these documents: "
    assert icl_context([Document("", "{x}"), Document("", "y")]) == "Documents:\n- {x}\n- y\n\nGiven these documents: "


def test_answers_are_kept_with_their_questions(llama, runs):
    (run, *_) = runs
    task = task_of_seed(run.seed)
    context = icl_context(select_documents(task.documents, run.seed, per_topic=1))
    for answer, question, result in zip(
        run.answers, task.questions, score(llama, task.questions, context=context), strict=True
    ):
        assert (answer.question_id, answer.split, answer.topic) == (question.id, question.split, question.topic)
        assert answer.correct == (question.answer,)
        assert answer.predicted == result.predicted
        assert answer.is_correct == result.is_correct
        assert answer.chance == 0.5
        expected = torch.tensor(result.logp, dtype=torch.float64).softmax(0)
        assert answer.probability == pytest.approx(expected.tolist())


LENGTHS = Question("q", "who", (" knows über", " why", " cat"), 1, also_correct=(2,))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_choices_are_normalised(normalization, llama):
    result, alone = (score(llama, [replace(LENGTHS, prompt=prompt)])[0] for prompt in ("who", ""))
    expected = {
        "sum": result.logp,
        "token": [logp / n for logp, n in zip(result.logp, result.num_tokens, strict=True)],
        "character": [result.logp[0] / 11, result.logp[1] / 4, result.logp[2] / 4],
        "byte": [result.logp[0] / 12, result.logp[1] / 4, result.logp[2] / 4],
        "pmi": [a - b for a, b in zip(result.logp, alone.logp, strict=True)],
    }[normalization]
    assert result.is_correct == (result.predicted in (1, 2))
    (answer,) = answers(llama, [LENGTHS, replace(LENGTHS, id="r", answer=None)][:1], normalization=normalization)
    assert answer.probability == pytest.approx(torch.tensor(expected, dtype=torch.float64).softmax(0).tolist())
    assert answer.predicted == max(range(3), key=lambda c: expected[c])
    assert (answer.correct, answer.topic) == ((1, 2), "q")
    assert answer.is_correct == (answer.predicted in (1, 2))
    assert answer.chance == pytest.approx(2 / 3)
    assert answers(llama, [replace(LENGTHS, answer=None, also_correct=())], normalization=normalization) == []


def test_one_pass_serves_every_normalization(llama):
    questions, ledger = task_of_seed(0).questions, Ledger()
    told = answers(llama, questions, ledger=ledger)
    scored = Ledger()
    score(llama, questions, ledger=scored)
    assert ledger.request_tokens == scored.request_tokens  # what "pmi" needs beside is nobody's cost
    for name in NORMALIZATIONS:
        asked = answers(llama, questions, normalization=name)
        assert [answer.predicted for answer in asked] == [answer.predicted_by[name] for answer in told]


def test_an_unknown_normalization(llama):
    for unknown in ("length", "pmi"):
        with pytest.raises(ProtocolError, match=rf"^normalization: expected one of sum, .*, got '{unknown}'$"):
            choice_scores(LENGTHS, score(llama, [LENGTHS])[0], unknown)
