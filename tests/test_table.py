"""The study as tables in the terminal: what they say, within 80 columns."""

import io
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from icl_ft_fast.finetuning.settings import FinetuneSettings
from icl_ft_fast.report import table
from icl_ft_fast.report.derived import Derived
from icl_ft_fast.runtime.durable import ResultJournal
from icl_ft_fast.study import arms, sweep
from icl_ft_fast.study import runs as study_runs
from icl_ft_fast.study.amortise import break_even
from icl_ft_fast.study.arm import Workspace
from icl_ft_fast.study.evaluate import (
    Accuracy,
    Answer,
    accuracies,
)
from icl_ft_fast.study.records import Run
from icl_ft_fast.study.results import Results
from icl_ft_fast.study.settings import ARM_NAMES, StudySettings
from icl_ft_fast.study.statistics import accuracy_interval, gap_interval
from icl_ft_fast.tasks.reversals import simple_reversals

TRAINING = FinetuneSettings(steps=2, batch_size=2, learning_rate=1e-2)

ARMS = tuple(name for name in ARM_NAMES if "+" not in name)  # without those that are put together


ARM_TITLES = {arm.name: arm.title for arm in arms.ARMS}


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


TRAINED = {arm.name for arm in arms.ARMS if arm.trains}


COSTS = sweep.Sweep(
    500,
    (
        sweep.Point(0, 1, (), (0.1, 0.1)),
        sweep.Point(0, 64, (), (0.02, 0.02)),
        sweep.Point(500, 1, (7.1, 7.1), (0.5, 0.5), save_s=(0.9,), load_s=(0.1,)),
        sweep.Point(500, 64, (7.1, 7.1), (0.03, 0.03), save_s=(0.9,), load_s=(0.1,)),
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


def tables_of_what_pays(runs):
    """How many there are: three ways that read documents for each query stand in one."""
    study, rivals = derived(runs), {run.arm for run in runs if arms.arm_named(run.arm).is_rival}
    return math.ceil(len({way for arm in rivals for way in study.ways_of(arm)}) / 3)


def test_the_table_names_every_arm_within_80_columns(runs):
    assert tuple(ARM_TITLES) == ARM_NAMES
    costed = [replace(run, notes={}) for run in runs]  # behind the 500 tokens of COSTS
    for some_runs in (costed, [run_of(arm, reversal=(3, 4), trained=(1, 4)) for arm in ARMS]):
        text = printed(some_runs)
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        for name in ("reversal", "trained", "train s", "tokens", "break-even"):
            assert name in text
        pays = len(re.findall(r"^break-even ", text, re.MULTILINE))
        assert pays == tables_of_what_pays(some_runs) > 0
        for run in some_runs:
            assert len(cells(text, run.arm)) == 1 + pays * (run.arm in TRAINED), run.arm  # accuracy, and what pays


def test_arms_that_are_put_together_take_two_lines():
    text = printed([run_of(name, reversal=(3, 4), trained=(1, 4)) for name in ARM_NAMES])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert len(re.findall(r"^fine-tuned \+ +[\d.]+.*\nRAG k=4 +[\d.]+", text, re.MULTILINE)) >= 2


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
    assert upper == [
        *(f"{math.floor(n):,}" for n in (1000 / 7.5, (1000 - 7.1) / 0.4, (1000 - 8.1) / 0.4)),
        "-",
    ]  # no answers
    upper.pop()
    assert lower == [word for n in upper for word in (n, "to", n)]  # equal measurements: the interval is a point
    once = replace(COSTS, points=(replace(COSTS.points[0], query_s=(0.1,)), *COSTS.points[1:]))
    told = printed([icl, tuned], costs=once)
    assert cells(told, "ft")[1][1] == ["no", "interval"] * 3
    assert "Queries behind 0 tokens were measured once: break-even numbers have no interval." in " ".join(told.split())
    for alone, arm in ((icl, "icl"), (tuned, "ft")):
        assert len(cells(printed([alone]), arm)) == 1
    together = derived([icl, tuned], batch=64).break_evens["seconds"]
    assert together["fine-tuned", "ICL"].queries == 64 * 129  # the 130th reading: 1000 < 7.1 * 130 + ...


def test_break_even_is_told_from_break_even_at_equal_accuracy():
    right = {"icl": 900, "ft": 899, "augmented-ft": 880, "distilled": 700}
    runs = [run_with(arm, [("x", f"t{i}", i < n, None) for i in range(1000)]) for arm, n in right.items()]
    study = derived(runs)
    words = {way: study.against_icl(way, 2.0) for way in ("fine-tuned", "augmented", "distilled")}
    assert words == {"fine-tuned": "as good", "augmented": "not shown", "distilled": "worse"}
    assert study.against_icl("augmented", 4.0) == "as good"
    console = Console(file=io.StringIO(), width=80)
    table.print_study(study, console)
    shown = [" ".join(cells(console.file.getvalue(), arm)[1][0][-2:]) for arm in ("ft", "augmented-ft", "distilled")]
    assert [text.lstrip("0123456789, ") for text in shown] == ["as good", "not shown", "worse"]
    rows = [row for row in study.summary()["break_even"] if row["resource"] == "seconds"]
    assert [row["against_icl"] for row in rows] == ["as good"] * 3 + ["not shown"] * 3 + ["worse"] * 3
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
        assert len(cells(text, arm)) == 4 + tables_of_what_pays(many) * (arm in TRAINED)
        assert "1,234,000,000" in cells(text, arm)[3][0]
        assert "0.333" in cells(text, arm)[1][0]
    for name in ("[bold]", "[/wrong]", *(f"split{i}" for i in range(9))):
        assert f" {name} " in text, name
    assert all(name in printed(many, 400) for name in names)
    runs = [run_of(arm, scale=1e9, long_name=(1, 2), x=(1, 3)) for arm in ARMS]
    few = printed(runs)
    assert max(map(len, few.splitlines())) <= 80
    assert "…" not in few
    assert all(len(cells(few, arm)) == 1 + tables_of_what_pays(runs) * (arm in TRAINED) for arm in ARMS)


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


def test_the_table_shows_chance_clusters_forms_pairs_and_calibration():
    rows = [("x", f"t{i // 2}", i < 18, form) for i, form in enumerate("ab" * 10)]
    worse = [(split, topic, i < 4, form) for i, (split, topic, _, form) in enumerate(rows)]
    text = printed([run_with("icl", rows), run_with("ft", worse)])
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"^chance +0\.500 ", text, re.MULTILINE)
    (main, forms) = cells(text, "icl")
    assert main[0][0] == "0.900"
    low, high = accuracy_interval([r for _, _, r, _ in rows], [t for _, t, _, _ in rows])
    assert main[1][0] == f"{low:.2f}-{high:.2f}"
    assert forms[0] == ["0.900", "0.900"]
    assert re.search(r"^fine-tuned - ICL +-0\.70 \.008 *$", text, re.MULTILINE)  # 7 of 10 topics: half of 2 / 2^7
    low, high = gap_interval([(i < 4) - (i < 18) for i in range(20)], [topic for _, topic, _, _ in rows])
    assert re.search(rf"^ +{low:.2f} to {high:.2f} *$", text, re.MULTILINE)
    assert -1 < low < -0.7 < high < 0
    assert re.search(r"^ECE +0\.150 +0\.550 *$", text, re.MULTILINE)
    assert re.search(r"^Brier +0\.225 +0\.925 *$", text, re.MULTILINE)


def test_many_splits_and_forms_stay_within_80_columns():
    rows = [(f"a long split {s}", f"t{i}", i < 3, f) for s in range(7) for i in range(4) for f in ("AAA1", "EIO2")]
    text = printed([run_with(arm, rows) for arm in ARMS])
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for s in range(7):
        assert re.search(rf"\b{s}\b", text)
    assert text.count("distilled - fine-tuned") == 2  # tables of four and of three splits
