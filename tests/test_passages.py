"""study/passages.py, slotted.py and the arms made of them: composed out of public functions, and refused early."""

from dataclasses import replace

import numpy as np
import pytest

from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.compaction import compact
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.prompting import prompt_context
from icl_ft_fast.engine.slots import key_of, slots_context
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import arms, compare
from icl_ft_fast.study import runs as study_runs
from icl_ft_fast.study.arm import CONTEXT_TOKENS, Arm, Asking, ContextText, Workspace
from icl_ft_fast.study.compare import StudyOptions
from icl_ft_fast.study.evaluate import accuracies, answers, select_documents
from icl_ft_fast.study.retrieval import Bm25, RetrievalError, StaticEmbeddings, retrieve
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.study.slotted import SLOTS
from icl_ft_fast.tasks.chunks import split_documents
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question, Task

TRAINING = FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2)
SETTINGS = StudySettings(seeds=(3,), icl_per_topic=1, finetune=TRAINING)
TASK = simple_reversals(3, num_facts=2, num_articles=2)


def runs_of(model, *names, task=TASK, settings=SETTINGS, store=None, journal=None):
    workspace, settings = Workspace(journal or ResultJournal(None), store=store), replace(settings, arms=names)
    planned = study_runs.plan(model, lambda _: task, settings, workspace.journal)
    return study_runs.make_runs(model, planned, settings, workspace)


def asked_behind(model, contexts, task=TASK):
    """Accuracies of the task's questions, each behind a context of its own."""
    pairs = zip(task.questions, contexts, strict=True)
    return accuracies(answers(model, [replace(q, prompt=context + q.prompt) for q, context in pairs]))


def test_rag_reads_what_is_retrieved(llama):
    passages = split_documents(TASK.documents)
    prompts = [question.prompt for question in TASK.questions]
    found = retrieve(Bm25([passage.text for passage in passages]), prompts, 2, len(passages))
    contexts = [prompt_context(llama, [Document("", passages[i].text) for i in sorted(its)]) for its in found]
    (run,) = runs_of(llama, "rag@2")
    assert run.accuracy == asked_behind(llama, contexts)
    assert (run.notes["passages"], run.notes["hit_rate"]) == (4, 1.0)
    lengths = [len(ids) for ids in encoding.encode(llama.tokenizer, [context.rstrip() for context in contexts])]
    assert run.notes[CONTEXT_TOKENS] == round(sum(lengths) / len(lengths))
    assert run.counts["phases"].keys() == {"index", "retrieve", "tokenise", "query"}
    assert run.setup_s == run.counts["phases"]["index"]["wall_s"]  # what a question pays is no setup


def test_passages_that_questions_share_are_kept_in_a_store(llama, tmp_path):
    store = ContextStore(str(tmp_path / "store"), llama, 10**9)
    plain, journal = runs_of(llama, "rag@2")[0], ResultJournal(tmp_path / "journal.jsonl")
    (first,) = runs_of(llama, "rag@2", store=store, journal=journal)
    (again,) = runs_of(llama, "rag@2", store=store)
    for run in (first, again):
        assert run.accuracy == plain.accuracy
        assert run.notes["questions_behind_kept"] == len(TASK.questions)  # two questions a fact, the same passages
        assert run.notes["kept_contexts"] == 2
        for answer, other in zip(run.answers, plain.answers, strict=True):
            assert answer.question_id == other.question_id
            assert answer.probability == pytest.approx(other.probability, abs=1e-5)
    assert len(store.ids()) == 2
    assert first.counts["phases"]["prefill"]["forwarded_tokens"] > 0
    assert again.counts["phases"].get("prefill", {}).get("forwarded_tokens", 0) == 0
    assert again.counts["cached_tokens"] > first.counts["cached_tokens"]
    # A run that was killed finds the store as it was when it was begun.
    key = next(key for key, value in journal.values.items() if value == [])
    killed = ResultJournal(None)
    killed.add({key: []})
    assert (
        runs_of(llama, "rag@2", store=store, journal=killed)[0].counts["cached_tokens"] == first.counts["cached_tokens"]
    )


def test_the_oracle_reads_the_question_s_own_documents(llama):
    (run,) = runs_of(llama, "oracle")
    own = {q.id: [d for d in TASK.documents if d.topic == q.topic] for q in TASK.questions}
    contexts = [prompt_context(llama, select_documents(own[q.id], 3, per_topic=1)) for q in TASK.questions]
    assert run.accuracy == asked_behind(llama, contexts)


def test_a_trained_arm_is_trained_once_for_all_ways_of_asking(llama, monkeypatch):
    trained = []
    monkeypatch.setattr("icl_ft_fast.study.arm.finetune", lambda *a, **k: trained.append(1) or finetune(*a, **k))
    plain, behind, with_rag = runs_of(llama, "ft", "ft+icl", "ft+rag@1")
    assert trained == [1]
    assert plain.counts["phases"]["train"] == behind.counts["phases"]["train"] == with_rag.counts["phases"]["train"]
    assert behind.setup_s == plain.setup_s < with_rag.setup_s  # the index
    tuned = finetune(llama, [document.text for document in TASK.documents], TRAINING, seed=3).model
    context = prompt_context(llama, select_documents(TASK.documents, 3, per_topic=1))
    assert behind.accuracy == asked_behind(tuned, [context] * len(TASK.questions))
    assert runs_of(llama, "ft+icl")[0].answers == behind.answers


def test_compaction_stands_for_the_context(llama, tmp_path):
    documents = select_documents(TASK.documents, 3, per_topic=1)
    text = prompt_context(llama, documents)
    (token,) = encoding.encode(llama.tokenizer, [text.rstrip()])
    followers = encoding.encode(llama.tokenizer, [f" {document.text}" for document in documents], bos=False)
    made = compact(llama, token, round(len(token) / 2), followers)
    key, ids = key_of(llama, "a name", round(len(token) / 2))
    store = ContextStore(tmp_path, llama, 10**9)
    store.add(slots_context(llama, made.layers, made.hidden, ids))
    expected = accuracies(answers(llama, TASK.questions, context=f"{key} ", store=store))
    (run,) = runs_of(llama, "compacted@2")
    assert run.accuracy == expected
    assert run.notes[SLOTS] == len(ids)
    assert run.setup_s == run.counts["phases"]["compact"]["wall_s"]
    assert run.counts["cached_tokens"] == len(ids)
    kept = ContextStore(tmp_path / "kept", llama, 10**9)
    assert runs_of(llama, "compacted@2", store=kept)[0].answers == run.answers
    assert len(list(kept.folder.glob("*.safetensors"))) == 1


def test_names_are_put_together():
    arm = arms.arm_named("augmented-ft+rag@8")
    assert (arm.name, arm.title) == ("augmented-ft+rag@8", "augmented + RAG k=8")
    assert arm.training is arms.arm_named("augmented-ft").training
    assert arms.expand_arms(["rag", "base"]) == ("rag@1", "rag@4", "rag@8", "base")
    assert arms.expand_arms(["compacted"], sizes={"compacted": (3,)}) == ("compacted@3",)
    asked = ["ft", "augmented-ft@9", "icl", "ft+rag@4"]  # the weights of ft are trained once
    assert arms.expand_arms(asked) == ("ft", "ft+rag@4", "augmented-ft@9", "icl")
    assert arms.recorded_arm("rag@3").title == "RAG k=3"
    for name in ("rag@", "rag@0", "rag@x", "base@2", "icl+rag", "ft+oracle", "ft+", "+rag", "rag+ft", "ft+rag+icl"):
        with pytest.raises(ValueError, match="arms: "):
            arms.arm_named(name)


def test_all_arms_are_those_that_can_take_the_task():
    names = arms.expand_arms(["all"], TASK)
    assert {"rag@4", "oracle", "rules-ft", "compacted@8", "ft+rag"} <= set(names)
    assert "rag@8" not in names  # of four passages
    plain = Task((Document("d", "It rains."),), (Question("q", "x", (" a", " b"), 0),))
    assert {"oracle", "rules-ft", "rag@4"}.isdisjoint(arms.expand_arms(["all"], plain))


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("rag@5", TASK, "arms: rag@5: expected 1 to the 4 passages of the documents"),
        ("rag", Task((Document("d", "?!"),), TASK.questions), "documents: no passage has a word"),
        ("oracle", Task(TASK.documents[:2], TASK.questions), "oracle: question 'fact1-reversal' names no document"),
        (
            "oracle",
            Task(TASK.documents, (replace(TASK.questions[0], document="lost"),)),
            "oracle: question 'fact0-reversal': field document: no document has the id 'lost'; ids are such as '",
        ),
    ],
)
def test_a_task_that_an_arm_cannot_take_is_refused_before_the_model_is_loaded(name, task, message):
    with pytest.raises(RetrievalError, match=message):
        compare.compare(lambda: pytest.fail("the model was loaded"), task, arms=["base", name], seeds=[0])


class Counting:
    """Embeds a text as its length and the number of its spaces, and counts the calls."""

    fingerprint, calls = "counting", 0

    def embed(self, texts):
        Counting.calls += 1
        return np.array([[len(text), 1 + text.count(" ")] for text in texts], float)


def test_an_endpoint_is_asked_once_for_the_task_s_questions(llama, monkeypatch, tmp_path):
    monkeypatch.setattr("icl_ft_fast.study.passages.embedder_of", lambda *_: Counting())
    settings = replace(SETTINGS, retriever="dense")
    journal = ResultJournal(tmp_path / "journal.jsonl")
    (run,) = runs_of(llama, "rag@2", settings=settings, journal=journal)
    assert (run.notes["retriever"], Counting.calls) == ("dense", 2)  # passages, questions
    assert any(isinstance(value, list) for value in journal.values.values())
    with pytest.raises(RetrievalError, match="retriever: expected bm25 or dense"):
        runs_of(llama, "rag@2", settings=replace(SETTINGS, retriever="x"))


def test_costs_are_measured_behind_each_arm_s_own_context(llama, monkeypatch):
    def first(model, task, seed, settings):
        return ContextText(task.documents[:1], prompt_context(model, task.documents[:1], settings.template))

    added = Arm("first", "first", Asking(arms.ways_behind_context, context=first))
    monkeypatch.setitem(arms._BY_NAME, "first", added)
    options = compare.StudyOptions(measure_s=0.01)
    names = ["first", "icl", "rag@1", "oracle", "compacted@2", "ft"]
    results = compare.compare(llama, TASK, SETTINGS, arms=names, options=options)
    study = Derived(results, "x")
    lengths = {point.context_tokens for point in results.sweep.points}
    assert {run.notes[CONTEXT_TOKENS] for run in results.runs if CONTEXT_TOKENS in run.notes} <= lengths
    assert {run.notes[SLOTS] for run in results.runs if SLOTS in run.notes} <= lengths
    read = {way: samples.line.reading for way, samples in study.ways("FLOPs").items()}
    by_length = {point.context_tokens: point.prefill_flops for point in results.sweep.points}
    for run in results.runs[:2]:
        assert read[arms.arm_named(run.arm).title] == by_length[run.notes[CONTEXT_TOKENS]] > 0
    assert read["first"] < read["ICL"]
    ways = study.ways("seconds")
    assert {"ICL", "RAG k=1", "oracle", "compact 2x", "fine-tuned"} <= ways.keys()
    assert ways["RAG k=1"].cache_lifetime == 1  # each query reads its own
    assert ways["compact 2x"].setup[0] > 0
    assert {way for _, way in study.break_evens["seconds"]} >= {"ICL", "RAG k=1", "compact 2x"}
    assert "oracle" not in {way for _, way in study.break_evens["seconds"]}
    assert "oracle" not in {way.name for way in study.decision_ways("seconds")}


def test_folders_of_a_study_may_be_strings(tmp_path):
    options = StudyOptions(store=str(tmp_path / "store"), kept=str(tmp_path))
    assert (options.store, options.kept) == (tmp_path / "store", tmp_path)
    assert StaticEmbeddings(str(tmp_path)) == StaticEmbeddings(tmp_path)
