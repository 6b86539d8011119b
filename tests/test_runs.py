"""Runs of a study: arms composed of the verbs they stand for, and what is found in the journal."""

import json
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from icl_ft_fast.augmentation.batches import augment_by_rule
from icl_ft_fast.engine import encoding, machine
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.machine import fingerprint
from icl_ft_fast.engine.model import Model
from icl_ft_fast.engine.prompting import ProtocolError, icl_context, prompt_context
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneError, FinetuneSettings, PrefixSettings
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import arms, compare, sweep, synthetic
from icl_ft_fast.study import runs as study_runs
from icl_ft_fast.study.arm import Workspace
from icl_ft_fast.study.evaluate import (
    evaluate,
    select_documents,
)
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import Results, Setting, as_json, read_results, unmeasured, write_results
from icl_ft_fast.study.settings import ARM_NAMES, StudySettings
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document

TRAINING = FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2, warmup_steps=1)


SETTINGS = StudySettings(arms=("icl", "rules-ft"), seeds=(0, 7), icl_per_topic=1, finetune=TRAINING)


def task_of_seed(seed):
    """Two facts, two articles each."""
    return simple_reversals(seed, num_facts=2, num_articles=2)


def test_names_of_arms():
    assert tuple(arm.name for arm in arms.ARMS) == ARM_NAMES


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


def test_every_arm_runs_under_every_seed(runs):
    assert [(run.seed, run.arm) for run in runs] == [(0, "icl"), (0, "rules-ft"), (7, "icl"), (7, "rules-ft")]
    for run in runs:
        assert {split: accuracy.total for split, accuracy in run.accuracy.items()} == {"reversal": 2, "trained": 2}
        assert run.query_s > 0


def test_the_icl_arm_is_the_documents_in_context(llama, runs):
    for run in (run for run in runs if run.arm == "icl"):
        task = task_of_seed(run.seed)
        context = icl_context(select_documents(task.documents, run.seed, per_topic=1))
        assert run.accuracy == evaluate(llama, task.questions, context=context)
        tokens = len(encoding.encode(llama.tokenizer, [context.rstrip()])[0])
        assert run.notes == {"context_documents": 2, "query_context_tokens": tokens}
        assert run.counts["phases"].keys() == {"tokenise", "prefill", "query"}
        assert run.setup_s == 0
        assert run.counts["trained_tokens"] == 0

        pairs = [(context + question.prompt, choice) for question in task.questions for choice in question.choices]
        requests = [before + after for before, after in encoding.encode_pairs(llama.tokenizer, pairs)]
        assert run.query_request_tokens == sum(map(len, requests)) / 4
        assert run.counts["request_tokens"] == sum(map(len, requests))
        rows = {tuple(request[:n]) for request in requests for n in range(1, len(request))}
        shared = encoding.encode(llama.tokenizer, [context.rstrip()])[0]
        assert run.counts["forwarded_tokens"] == len(rows)
        assert (
            abs(run.query_forwarded_tokens * 4 - (len(rows) - len(shared))) <= 1
        )  # the prefill forwards a token after the context


def test_the_tuned_arms_are_finetune_and_evaluate(llama, runs):
    for run in (run for run in runs if run.arm == "rules-ft"):
        task = task_of_seed(run.seed)
        written = augment_by_rule(task.documents)
        texts = [document.text for document in task.documents] + [row.text for row in written.rows]
        tuned = finetune(llama, texts, TRAINING, seed=run.seed)
        assert run.accuracy == evaluate(tuned.model, task.questions)
        assert run.notes == {
            "augmentations": len(written.rows),
            "augmentation_prompts": written.prompts,
            "augmentation_productive": written.productive,
            "dropped_unparsed": 0,
            "dropped_repeats": 0,
            "final_loss": tuned.losses[-1],
        }
        assert run.counts["trained_tokens"] > 0
        phases = run.counts["phases"]
        assert phases.keys() == {"filter", "train", "tokenise", "query"}
        assert run.setup_s == pytest.approx(phases["filter"]["wall_s"] + phases["train"]["wall_s"])
        assert run.losses == tuned.losses
        assert [sample.text for sample in run.samples] == [row.text for row in written.rows]
        assert {sample.source for sample in run.samples} <= {document.text for document in task.documents}
        assert run.query_forwarded_tokens * 4 == run.counts["forwarded_tokens"]


def test_the_plain_arms(llama):
    before = {name: parameter.clone() for name, parameter in llama.network.named_parameters()}
    settings = replace(SETTINGS, arms=("base", "ft"), seeds=(3,))
    task = task_of_seed(3)
    base, tuned = runs_of(llama, lambda _: task, settings)
    assert base.accuracy == evaluate(llama, task.questions)
    assert (base.setup_s, base.notes, base.counts["phases"].keys()) == (0.0, {}, {"tokenise", "query"})
    expected = finetune(llama, [document.text for document in task.documents], TRAINING, seed=3)
    assert tuned.notes == {"final_loss": expected.losses[-1]}
    for name, parameter in llama.network.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_what_takes_long_has_a_name(llama, monkeypatch):
    told = []
    monkeypatch.setattr(study_runs, "Activity", lambda what, shown: nullcontext(told.append((what, shown))))
    runs_of(llama, task_of_seed, replace(SETTINGS, arms=("base",), seeds=(3,)))
    assert told == [("base, seed 3", False), ("measuring harm", False)]


def test_the_distilled_arm_learns_from_what_icl_reads(llama, monkeypatch):
    # the tiny model has no room for the prompt that asks for augmentations
    def by_rule(*_, ledger, **__):
        with ledger.phase("filter"):
            return augment_by_rule(task.documents)

    monkeypatch.setattr(synthetic, "augment_by_model", by_rule)
    settings = replace(SETTINGS, arms=("icl", "augmented-ft", "distilled"), seeds=(3,))
    task = task_of_seed(3)
    _, augmented, distilled = runs_of(llama, lambda _: task, settings)
    rows = augment_by_rule(task.documents).rows
    texts = [document.text for document in task.documents] + [row.text for row in rows]
    context = prompt_context(llama, select_documents(task.documents, 3, per_topic=1))
    tuned = finetune(llama, texts, TRAINING, seed=3, teacher_context=context)
    assert distilled.accuracy == evaluate(tuned.model, task.questions)
    assert distilled.notes["final_loss"] == tuned.losses[-1]
    assert distilled.notes.keys() == augmented.notes.keys()
    assert distilled.counts["phases"].keys() == {"filter", "teach", "train", "tokenise", "query"}
    paid = [p["wall_s"] for name, p in distilled.counts["phases"].items() if name in ("filter", "teach", "train")]
    assert distilled.setup_s == pytest.approx(sum(paid))  # the teacher's reading is paid once


def test_only_what_is_not_kept_is_run(llama, llama_directory, tmp_path, monkeypatch):
    settings, path = replace(SETTINGS, arms=("base", "icl"), seeds=(3,)), tmp_path / "kept.jsonl"
    first = runs_of(llama, task_of_seed, settings, journal=ResultJournal(path))
    costs = compare.measure(llama, task_of_seed(3), settings, seconds=0.01, journal=ResultJournal(path))
    make_run, done = study_runs.make_run, []

    def making(model, planned, *arguments, **named):
        done.append(planned.arm)
        return make_run(model, planned, *arguments, **named)

    monkeypatch.setattr(study_runs, "make_run", making)
    assert runs_of(llama, task_of_seed, settings, journal=ResultJournal(path)) == first
    assert compare.measure(llama, task_of_seed(3), settings, seconds=0.01, journal=ResultJournal(path)) == costs
    assert done == []
    more = replace(settings, arms=("ft", "icl", "base"))
    assert runs_of(llama, task_of_seed, more, journal=ResultJournal(path))[1:] == first[::-1]
    assert done == ["ft"]
    task = task_of_seed(3)
    another = replace(task, questions=(*task.questions[:-1], replace(task.questions[-1], prompt="other")))
    others = [
        (llama, task_of_seed, replace(settings, seeds=(4,))),
        (llama, task_of_seed, replace(settings, normalization="byte")),
        (llama, lambda _: another, settings),
        (load(llama_directory, dtype="bfloat16"), task_of_seed, settings),
    ]
    for other in others:
        done.clear()
        runs_of(*other, journal=ResultJournal(path))
        assert done == ["base", "icl"]


def test_an_arm_has_training_settings_of_its_own(llama):
    """They decide its weights and its key, and no other arm's."""
    base = replace(SETTINGS, arms=("ft", "ft+icl", "rules-ft"), seeds=(0,))
    own = replace(base, arm_training={"rules-ft": {"steps": 3, "learning_rate": 1}})
    assert (own.training_of("rules-ft").steps, own.training_of("rules-ft").learning_rate) == (3, 1)
    assert own.training_of("ft+icl") == base.finetune
    sized = replace(base, arm_training={"augmented-ft": {"steps": 5, "batch_size": 3}, "augmented-ft@9": {"steps": 7}})
    made = sized.training_of("augmented-ft@9+rag@2")
    assert (made.steps, made.batch_size) == (7, 3)
    keys = [[p.key for p in study_runs.plan(llama, task_of_seed, each, ResultJournal(None))] for each in (base, own)]
    assert [a == b for a, b in zip(*keys, strict=True)] == [True, True, False]
    journal = ResultJournal(None)
    runs_of(llama, task_of_seed, replace(base, arms=("ft",)), journal)
    runs = runs_of(llama, task_of_seed, replace(own, arms=("ft", "rules-ft")), journal)
    assert [len(run.losses) for run in runs] == [2, 3]
    for bad, told in (
        ({"stepz": 3}, r"^ft: stepz: expected one of steps, batch_size"),
        ({"steps": 1.5}, r"^ft: steps: expected int, got 1.5"),
        ({"steps": True}, r"^ft: steps: expected int, got True"),
        ({"steps": 0}, r"^steps: "),
    ):
        with pytest.raises(FinetuneError, match=told):
            replace(base, arm_training={"ft": bad}).training_of("ft")


def test_a_dtype_that_the_processor_has_no_instructions_for_is_told(monkeypatch):
    seconds = iter([4.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(machine, "_least_s", lambda *_: next(seconds))
    told = "bfloat16: its products take 2.0 times float32's seconds on this CPU"
    assert machine.slow_dtype("cpu", torch.bfloat16) == told
    assert machine.slow_dtype("cpu", torch.bfloat16) == ""
    assert machine.slow_dtype("cpu", torch.float32) == machine.slow_dtype("cuda", torch.bfloat16) == ""


def test_what_no_seed_changes_is_done_once_for_all_seeds(llama, tmp_path, monkeypatch):
    """The questions of base and rag, and what a greedy strategy writes; not behind a store, nor of another task."""
    make_run, done = study_runs.make_run, []

    def making(model, planned, *arguments, **named):
        done.append((planned.arm, planned.seed))
        return make_run(model, planned, *arguments, **named)

    monkeypatch.setattr(study_runs, "make_run", making)
    settings = replace(SETTINGS, arms=("base", "rag@1", "icl"), seeds=(5, 6))
    task = replace(task_of_seed(0), documents=tuple(replace(d, topic="t") for d in task_of_seed(0).documents))
    task = replace(task, questions=tuple(replace(q, topic="t") for q in task.questions))
    runs = runs_of(llama, lambda _: task, settings)
    assert done == [("base", 5), ("rag@1", 5), ("icl", 5), ("icl", 6)]
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for seed in (5, 6) for arm in settings.arms]
    assert replace(runs[3], seed=5) == runs[0]
    done.clear()
    runs_of(llama, lambda _: task, settings, store=ContextStore(tmp_path / "store", llama, 10**9))
    assert ("base", 6) not in done
    assert ("rag@1", 6) in done  # it finds there what seed 5 left
    done.clear()
    runs_of(llama, task_of_seed, replace(settings, arms=("base",)))
    assert done == [("base", 5), ("base", 6)]
    augmented = replace(settings, arms=("augmented-ft",))
    first, second = study_runs.plan(llama, lambda _: task, augmented, ResultJournal(None))
    assert [batch.name for batch in first.batches] == [batch.name for batch in second.batches]


def test_the_weights_of_a_model_are_read_once_in_a_study(llama_directory, tmp_path, monkeypatch):
    model, read, hashed = load(llama_directory), [], Model._hashed
    monkeypatch.setattr(Model, "_hashed", lambda self: read.append(self.network) or hashed(self))
    settings, journal = replace(SETTINGS, arms=("base", "icl", "ft")), ResultJournal(tmp_path / "journal.jsonl")
    store = ContextStore(tmp_path / "store", model, 10**9)
    runs_of(model, task_of_seed, settings, journal=journal, store=store)
    compare.measure(model, task_of_seed(0), settings, seconds=0.01, journal=journal)
    assert model.network in read
    assert len(read) == len(set(read))


def test_a_store_saves_reading_the_context_and_changes_no_answer(llama, tmp_path):
    def run(seeds, store):
        return runs_of(llama, task_of_seed, replace(SETTINGS, arms=("icl",), seeds=seeds), store=store)

    run((0,), ContextStore(tmp_path / "a", llama, 10**9))
    (file,) = (tmp_path / "a").glob("*.safetensors")
    store = ContextStore(tmp_path / "b", llama, int(1.5 * file.stat().st_size))  # room for one
    plain, read, mapped = run((0, 7), None), run((0, 7), store), run((7,), store)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 1
    for found, expected in zip([*read, *mapped], [*plain, plain[1]], strict=True):
        assert found.accuracy == expected.accuracy
        for answer, other in zip(found.answers, expected.answers, strict=True):
            assert answer.probability == pytest.approx(other.probability, rel=0, abs=1e-5)
    assert all(found.counts["phases"].keys() == {"tokenise", "context", "prefill", "query"} for found in read)
    (found,) = mapped
    assert found.counts["phases"].keys() == {"tokenise", "context", "query"}
    assert found.counts["forwarded_tokens"] == read[1].counts["phases"]["query"]["forwarded_tokens"]
    assert found.counts["phases"]["query"]["cached_tokens"] == 0  # which the phase "context" has
    assert found.counts["forwarded_tokens"] + found.counts["cached_tokens"] == read[1].counts["forwarded_tokens"]


def test_what_a_kill_left_in_the_store_is_not_counted_as_found(llama, tmp_path):
    settings, store = replace(SETTINGS, arms=("icl",), seeds=(0,)), ContextStore(tmp_path / "store", llama, 10**9)
    whole = runs_of(llama, task_of_seed, settings, journal=ResultJournal(tmp_path / "a"), store=store)[0]
    store = ContextStore(tmp_path / "another", llama, 10**9)
    runs_of(llama, task_of_seed, settings, journal=ResultJournal(tmp_path / "b"), store=store)
    lines = (tmp_path / "b").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2  # how much the store held, then the run
    (tmp_path / "b").write_bytes(lines[0])
    resumed = runs_of(llama, task_of_seed, settings, journal=ResultJournal(tmp_path / "b"), store=store)[0]
    assert unmeasured(asdict(resumed)) == unmeasured(asdict(whole))


def test_an_unknown_arm(llama):
    with pytest.raises(ValueError, match=r"^arms: expected some of base, icl, .*, got 'lora'$"):
        runs_of(llama, task_of_seed, StudySettings(arms=("base", "lora")))


def test_results_json(llama, runs, tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, as_json(Setting(llama, "a task", SETTINGS), runs[:1]))
    costs = sweep.Sweep(3, (sweep.Point(3, 1, (0.5,), (0.25,)),))
    write_results(path, as_json(Setting(llama, "a task", SETTINGS), runs, costs=costs))
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    results = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constants)
    assert results.keys() == {field.name for field in fields(Results)} | {"checksum"}
    assert (results["schema_version"], results["task"], results["model"]) == (
        4,
        "a task",
        "/".join(Path(llama.name).parts[-2:]),
    )
    assert [asked["seeds"] for asked in results["questions"]] == [[0], [7]]
    assert [q["id"] for q in results["questions"][0]["questions"]] == [q.id for q in task_of_seed(0).questions]
    assert results["parameters"] == sum(parameter.numel() for parameter in llama.network.parameters())
    assert results["settings"] == {
        "arms": ["icl", "rules-ft"],
        "seeds": [0, 7],
        "icl_per_topic": 1,
        "icl_subsample": 1,
        "icl_tokens": None,
        "normalization": "sum",
        "template": "auto",
        "generator": "",
        "generator_url": "",
        "use_peft": None,
        "arm_training": None,
        "eval_steps": None,
        "template_date": None,
        "chat_template_kwargs": None,
        "special_tokens": "text",
        "strategy": "local",
        "samples": 1,
        "questions": "",
        "mix": None,
        "replay": 0.0,
        "synthetic_tokens": [],
        "general": "",
        "retriever": "bm25",
        "embedding_url": "",
        "embedding_model": "",
        "finetune": json.loads(json.dumps(vars(TRAINING))),
        "prefix_tokens": [16, 64],
        "prefix": vars(PrefixSettings()),
    }
    assert results["machine"].keys() == fingerprint("cpu").keys() | {"ceilings"}
    assert len(results["runs"]) == 4
    for written, run in zip(results["runs"], runs, strict=True):
        assert written.keys() == {field.name for field in fields(Run)}
        assert written["accuracy"]["reversal"] == {"correct": run.accuracy["reversal"].correct, "total": 2}
        for name in ("arm", "seed", "setup_s", "query_s", "query_request_tokens", "query_forwarded_tokens", "counts"):
            assert written[name] == getattr(run, name), name
    read = read_results(path)
    assert read.sweep == costs
    assert read.runs == tuple(replace(run, questions=()) for run in runs)


def test_rules_need_something_that_they_know(llama):
    task = replace(task_of_seed(0), documents=(Document("d", "who knows why"),))
    with pytest.raises(ProtocolError, match=r"^arms: rules-ft: no document states a comparison"):
        runs_of(llama, lambda _: task, SETTINGS)
