"""The comparison: arms composed of the verbs they stand for, what results.json holds, break-even, intervals, tables."""

import copy
import io
import json
import math
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from icl_ft_fast.augmentation.batches import augment_by_rule
from icl_ft_fast.engine import encoding
from icl_ft_fast.engine.contexts import ContextStore
from icl_ft_fast.engine.likelihood import prefill
from icl_ft_fast.engine.loading import load
from icl_ft_fast.engine.machine import fingerprint
from icl_ft_fast.engine.prompting import ProtocolError, icl_context, prompt_context
from icl_ft_fast.engine.score import score
from icl_ft_fast.finetuning.run import finetune
from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.report import table
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import arms, compare, sweep
from icl_ft_fast.study import runs as study_runs
from icl_ft_fast.study.amortise import break_even
from icl_ft_fast.study.evaluate import (
    Accuracy,
    Answer,
    accuracies,
    answers,
    choice_scores,
    evaluate,
    fit_documents,
    select_documents,
)
from icl_ft_fast.study.paired import Paired, paired_tests
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import Results, Setting, as_json, read_results, unmeasured, write_results
from icl_ft_fast.study.settings import ARM_NAMES, NORMALIZATIONS, StudySettings
from icl_ft_fast.study.statistics import cluster_bootstrap
from icl_ft_fast.tasks.reversals import simple_reversals
from icl_ft_fast.tasks.task import Document, Question

TRAINING = FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2)
ARMS = ARM_NAMES
ARM_TITLES = {arm.name: arm.title for arm in arms.ARMS}
SETTINGS = StudySettings(arms=("icl", "rules-ft"), seeds=(0, 7), icl_per_topic=1, finetune=TRAINING)


def task_of_seed(seed):
    """Two facts, two articles each."""
    return simple_reversals(seed, num_facts=2, num_articles=2)


def test_names_of_arms():
    assert tuple(arm.name for arm in arms.ARMS) == ARM_NAMES


def runs_of(model, task_of_seed, settings, journal=None, store=None, on_run=None):
    """The runs of a study without its costs."""
    workspace = arms.Workspace(journal or ResultJournal(None), store=store)
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
        assert run.notes == {"context_documents": 2}
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


def test_the_distilled_arm_learns_from_what_icl_reads(llama, monkeypatch):
    # the tiny model has no room for the prompt that asks for augmentations
    def by_rule(*_, ledger, **__):
        with ledger.phase("filter"):
            return augment_by_rule(task.documents)

    monkeypatch.setattr(arms, "augment_by_model", by_rule)
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
        "template": "base",
        "strategy": "local",
        "samples": 1,
        "finetune": json.loads(json.dumps(vars(TRAINING))),
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


def run_of(arm, seed=0, scale=1.0, **accuracy):
    seconds = (
        {"filter": 12.3 * scale, "train": 98.7 * scale, "query": 1.0} if arm not in ("base", "icl") else {"query": 1.0}
    )
    return Run(
        arm=arm,
        seed=seed,
        accuracy={name: Accuracy(*counts) for name, counts in accuracy.items()},
        answers=(),
        setup_s=111.0 * scale * (len(seconds) > 1),
        query_s=0.002 * scale,
        query_request_tokens=1234 * scale,
        query_forwarded_tokens=12.5,
        counts={"phases": {name: {"wall_s": value} for name, value in seconds.items()}},
        notes={},
    )


TRAINED = set(ARMS) - {"base", "icl"}
COSTS = sweep.Sweep(
    500,
    (
        sweep.Point(0, 1, (), (0.1,)),
        sweep.Point(0, 64, (), (0.02,)),
        sweep.Point(500, 1, (7.1,), (0.5,), save_s=(0.9,), load_s=(0.1,)),
        sweep.Point(500, 64, (7.1,), (0.03,), save_s=(0.9,), load_s=(0.1,)),
    ),
)


def derived(runs, costs=COSTS, **settings):
    """What the tables are made from."""
    results = Results(4, "model", 1, "task", {}, {}, costs, tuple(runs))
    return Derived(results, "study", **settings)


def printed(runs, width=80, **settings):
    console = Console(file=io.StringIO(), width=width)
    table.print_study(derived(runs, **settings), console)
    return console.file.getvalue()


def cells(text, arm):
    """The words of an arm's upper and lower lines, in each table that has it."""
    lines, title = text.splitlines(), ARM_TITLES[arm]
    return [
        (line.removeprefix(title).split(), below.split())
        for line, below in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith(f"{title} ") and not line.startswith(f"{title} - ")
    ]


def test_the_table_names_every_arm_within_80_columns(runs):
    assert tuple(ARM_TITLES) == ARMS
    for some_runs in (runs, [run_of(arm, reversal=(3, 4), trained=(1, 4)) for arm in ARMS]):
        text = printed(some_runs)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for name in ("reversal", "trained", "train s", "tokens", "break-even"):
            assert name in text
        for run in some_runs:
            assert len(cells(text, run.arm)) == 1 + (run.arm in TRAINED), run.arm  # accuracy, and what pays


def test_the_table_pools_seeds_and_averages_costs():
    text = printed(
        [run_of("icl", 0, x=(30, 40)), run_of("icl", 1, x=(10, 40), y=(1, 1)), run_of("ft", 0, 3.0, x=(40, 40))]
    )
    assert text.splitlines()[0].startswith("2 seed(s)")
    assert cells(text, "icl") == [
        (["0.500", "1.000", "-", "1,234", "500.0"], ["0.39-0.61", "0.21-1.00", "-", "7.1", "30.0"])
    ]
    assert cells(text, "ft")[0] == (["1.000", "-", "36.9", "3,702", "100.0"], ["0.91-1.00", "296.1", "-", "20.0"])


def test_the_table_counts_queries_to_break_even():
    icl, tuned = run_of("icl", x=(1, 1)), replace(run_of("ft", x=(1, 1)), setup_s=1000.0)
    _, (upper, lower) = cells(printed([icl, tuned]), "ft")
    # against 7.1 + 0.5 a query; 7.1 and then 0.5; and 7.1 + 0.9 + 0.1 and then 0.5
    assert upper == [*(f"{n:,.0f}" for n in (1000 / 7.5, (1000 - 7.1) / 0.4, (1000 - 8.1) / 0.4)), "yes"]
    upper.pop()
    assert lower == [word for n in upper for word in (n, "to", n)]  # one measurement of each: the interval is a point
    for alone, arm in ((icl, "icl"), (tuned, "ft")):
        assert len(cells(printed([alone]), arm)) == 1
    together = derived([icl, tuned], batch=64).break_evens["seconds"]
    assert together["fine-tuned", "ICL"].queries == pytest.approx(1000 / (7.1 / 64 + 0.01))


def test_break_even_is_told_from_break_even_at_equal_accuracy():
    runs = [run_of("icl", x=(90, 100)), run_of("ft", x=(88, 100)), run_of("distilled", x=(87, 100))]
    study = derived(runs)
    assert [study.matches_icl(way, 2.0) for way in ("fine-tuned", "distilled")] == [True, False]
    assert study.matches_icl("distilled", 3.0)
    console = Console(file=io.StringIO(), width=80)
    table.print_study(study, console)
    matches = [cells(console.file.getvalue(), arm)[1][0][-2:] for arm in ("ft", "distilled")]
    assert (matches[0][-1], matches[1]) == ("yes", ["less", "accurate"])
    assert [row["matches_icl"] for row in study.summary()["break_even"] if row["resource"] == "seconds"] == (
        [True] * 3 + [False] * 3
    )
    for way in ("fine-tuned", "distilled"):
        for batch, evens in study.sensitivity_to_batch(way, (1, math.inf)):
            ways = study.ways("seconds", batch=batch)
            rivals = [ways["ICL"].line, ways["ICL cached"].line]  # read for each batch, and never again
            assert evens == [break_even(ways[way].line, rival) for rival in rivals]


def test_all_arms_and_five_splits_stay_apart_within_80_columns():
    text = printed([run_of(arm, **{f"split{i}": (i, 5) for i in range(5)}) for arm in ARMS])
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if line.lstrip().startswith(("split0", "1 seed(s)", "break-even"))]
    assert len(heads) >= 3
    assert all(not lines[i - 1].strip() for i in heads[1:])


def test_the_sweep_saves_and_loads_the_context_itself(llama, monkeypatch):
    task, loaded = task_of_seed(0), []
    context = prompt_context(llama, task.documents[:2])
    load = sweep.load_context

    def noted(path, model, **more):
        loaded.append(load(path, model, **more))
        return loaded[-1]

    monkeypatch.setattr(sweep, "load_context", noted)
    found = sweep.sweep(llama, task.questions, context, lengths=(), batches=(1,), rounds=2)
    (own,) = encoding.encode(llama.tokenizer, [context.rstrip()])
    assert [(p.context_tokens, len(p.save_s), len(p.load_s)) for p in found.points] == [(0, 0, 0), (len(own), 2, 2)]
    assert [c.token.tolist() for c in loaded] == [own] * 3  # the warm-up too
    expected = prefill(llama, own)
    assert torch.equal(loaded[-1].hidden, expected.hidden)
    rows, layers = len(own), expected.cache.layers(len(own))
    for layer, (keys, values) in loaded[-1].cache.layers(rows).items():
        assert torch.equal(keys, layers[layer][0])
        assert torch.equal(values, layers[layer][1])
    assert loaded[-1].cache.capacity > rows  # opened as the first run opens it


def test_without_measured_costs_there_is_no_break_even():
    text = printed([run_of("icl", x=(1, 1)), run_of("ft", x=(1, 1))], costs=sweep.Sweep())
    assert "break-even" not in text
    assert cells(text, "ft") == [(["1.000", "12.3", "1,234", "-"], ["0.21-1.00", "98.7", "-", "-"])]


def test_nothing_is_cut_or_read_as_markup():
    names = {"[bold]": (1, 2), "[/wrong]": (1, 2), "a_very_long_name_of_a_split_" * 2: (1, 2), "s p a c e s": (0, 2)}
    names |= {f"split{i}": (i, 9) for i in range(9)}
    many = [run_of(arm, scale=1e6, **names) for arm in ARMS]
    text = printed(many)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for arm in ARMS:
        # thirteen splits in threes of tables, then costs, then what pays
        assert len(cells(text, arm)) == 4 + (arm in TRAINED)
        assert "1,234,000,000" in cells(text, arm)[3][0]
        assert "0.333" in cells(text, arm)[1][0]
    for name in ("[bold]", "[/wrong]", *(f"split{i}" for i in range(9))):
        assert f" {name} " in text, name
    assert all(name in printed(many, 400) for name in names)
    few = printed([run_of(arm, scale=1e9, long_name=(1, 2), x=(1, 3)) for arm in ARMS])
    assert max(map(len, few.splitlines())) <= 80
    assert "…" not in few
    assert all(len(cells(few, arm)) == 1 + (arm in TRAINED) for arm in ARMS)


def test_a_task_without_answers_has_a_table_of_costs(llama):
    task = task_of_seed(0)
    unanswered = replace(task, questions=tuple(replace(question, answer=None) for question in task.questions))
    (run,) = runs_of(llama, lambda _: unanswered, replace(SETTINGS, arms=("base",), seeds=(0,)))
    assert run.accuracy == {}
    assert "base" in printed([run])


def answered(split, topic, right, form=None, choices=2):
    """An answer with probability 0.75 on the predicted choice."""
    probability = (0.75, *[0.25 / (choices - 1)] * (choices - 1))
    return Answer(f"{split} {topic} {form}", split, form, topic, 0, probability, (0,) if right else (1,))


def run_with(arm, rows, seed=0):
    """A run of answers given as (split, topic, whether right, form)."""
    answers = tuple(answered(*row) for row in rows)
    return replace(run_of(arm, seed), answers=answers, accuracy=accuracies(answers))


def test_arms_are_paired_on_the_same_questions():
    icl = [("x", f"t{i}", i < 9, None) for i in range(10)] + [("y", "t0", True, None)]
    tuned = [("x", f"t{i}", i < 1, None) for i in range(10)] + [("z", "t0", True, None)]
    tests = paired_tests([run_with("icl", icl), run_with("ft", tuned), run_with("base", [("w", "t", True, None)])])
    # Eight topics differ, all one way: 2 / 2^8; the only test there is.
    assert tests == [Paired("icl", "ft", "x", pytest.approx(0.8), pytest.approx(2 / 256))]
    twice = [run_with(arm, rows, seed) for seed in (0, 1) for arm, rows in (("icl", icl), ("ft", tuned))]
    (test,) = paired_tests(twice)  # a second seed's answers to the same topics are no new witnesses
    assert (test.difference, test.p) == (pytest.approx(0.8), pytest.approx(2 / 256))
    three = [run_with(arm, icl if arm == "icl" else tuned) for arm in ("icl", "ft", "base")]
    ps = {(test.first, test.second, test.split): test.p for test in paired_tests(three)}
    assert len(ps) == 4  # ft and base also share z
    assert ps["icl", "ft", "x"] == ps["icl", "base", "x"] == pytest.approx(4 * 2 / 256)
    assert ps["ft", "base", "x"] == ps["ft", "base", "z"] == 1.0


def test_the_table_shows_chance_clusters_forms_pairs_and_calibration():
    rows = [("x", f"t{i // 2}", i < 18, form) for i, form in enumerate("ab" * 10)]
    worse = [(split, topic, i < 4, form) for i, (split, topic, _, form) in enumerate(rows)]
    text = printed([run_with("icl", rows), run_with("ft", worse)])
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^chance +0\.500 ", text, re.MULTILINE)
    (main, forms) = cells(text, "icl")
    assert main[0][0] == "0.900"
    assert main[1][0] == "0.70-0.97"  # Wilson's
    low, high = cluster_bootstrap([r for _, _, r, _ in rows], [t for _, t, _, _ in rows])
    assert f"{low:.2f}-{high:.2f}" in text
    assert forms[0] == ["0.900", "0.900"]
    assert re.search(r"^ICL - fine-tuned +\+0\.70 \.016 *$", text, re.MULTILINE)  # 7 of 10 topics: 2 / 2^7
    assert re.search(r"^ECE +0\.150 +0\.550 *$", text, re.MULTILINE)
    assert re.search(r"^Brier +0\.225 +0\.925 *$", text, re.MULTILINE)


def test_many_splits_and_forms_stay_within_80_columns():
    rows = [(f"a long split {s}", f"t{i}", i < 3, f) for s in range(7) for i in range(4) for f in ("AAA1", "EIO2")]
    text = printed([run_with(arm, rows) for arm in ARMS])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for s in range(7):
        assert re.search(rf"\b{s}\b", text)
    assert text.count("augmented - by rule") == 2  # tables of four and of three splits


def test_rules_need_something_that_they_know(llama):
    task = replace(task_of_seed(0), documents=(Document("d", "who knows why"),))
    with pytest.raises(ProtocolError, match=r"^arms: rules-ft: no document states a comparison"):
        runs_of(llama, lambda _: task, SETTINGS)


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


def test_an_unknown_normalization(llama):
    for unknown in ("length", "pmi"):
        with pytest.raises(ProtocolError, match=rf"^normalization: expected one of sum, .*, got '{unknown}'$"):
            choice_scores(LENGTHS, score(llama, [LENGTHS])[0], unknown)


def test_templates(llama):
    documents = [Document("a", "x {prompt} {documents}"), Document("b", "y")]
    assert prompt_context(llama, documents) == icl_context(documents)
    assert prompt_context(llama, []) == prompt_context(llama, [], "Read {documents} and {prompt}") == ""
    assert prompt_context(llama, documents[1:], "Read\n{documents}\nand {prompt}") == "Read\n- y\nand "
    with pytest.raises(ProtocolError, match=r"^template: .* has no chat template; use base or a text of your own$"):
        prompt_context(llama, documents, "chat")
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chatty = replace(llama, tokenizer=tokenizer)
    before, after = "<user>", "</><assistant>"
    assert prompt_context(chatty, [], "chat") == f"{before}Complete the statement.{after}"
    assert prompt_context(chatty, documents[1:], "chat") == (
        f"{before}Documents:\n- y\n\nGiven these documents, complete the statement.{after}"
    )


@pytest.mark.parametrize(
    "text", ["", "{prompt}", "{documents}", "{documents}{prompt}.", "{documents}" * 2 + "{prompt}"]
)
def test_bad_templates(text, llama):
    with pytest.raises(ProtocolError, match=r"^template: expected base, chat or a text with one \{documents\} that"):
        prompt_context(llama, [], text)
