"""The plan before the run: what is counted is what the run then counts, and what it took stands beside it."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from icl_ft_fast.augmentation.prompts import Prompting
from icl_ft_fast.augmentation.strategies import STRATEGIES
from icl_ft_fast.augmentation.strategy import Parsed, whole
from icl_ft_fast.cli import main
from icl_ft_fast.engine.compaction import compacting_flops
from icl_ft_fast.engine.flops import work_of
from icl_ft_fast.engine.generate import RUNNING
from icl_ft_fast.engine.ledger import Ledger
from icl_ft_fast.finetuning.settings import FinetuneSettings, PrefixSettings
from icl_ft_fast.report.plan import PLAN, PlanError, kept_to, print_forecast, read_plan, write_plan
from icl_ft_fast.study import forecast as planning
from icl_ft_fast.study.calibration import FIRST_TOKENS, WARM_TOKENS, Calibration
from icl_ft_fast.study.compare import StudyOptions, compare
from icl_ft_fast.study.decode_rate import Decoding, DecodingClock
from icl_ft_fast.study.forecast import ArmForecast, Forecast, forecast, taken_s
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.generated import GENERATORS
from icl_ft_fast.tasks.reversals import simple_reversals

TRAINING = FinetuneSettings(steps=30, batch_size=2, learning_rate=1e-3)
BUDGET_S = 0.5
PREFIX = PrefixSettings(conversations=6, steps=4, batch_size=2, conversation_tokens=4)
ARMS = (
    "base",
    "icl",
    "rag@1",
    "compacted@8",
    "prefix@4",
    "ft",
    "ft+icl",
    "augmented-ft",
    "augmented-ft@600",
    "repeated-ft",
)


class Machine:
    """A machine on which time is the FLOPs that ledgers book, so many a second, and nothing else."""

    def __init__(self, patch, flops_s):
        self.seconds, self.tokens, self.passes = 0.0, 0, set()
        self._ran, self._flops_s = Ledger.ran, flops_s
        patch.setattr(Ledger, "ran", lambda *given, **named: self.ran(*given, **named))
        patch.setattr(planning, "Calibration", partial(Calibration, clock=lambda: self.seconds))

    def ran(self, ledger, work, depth_T, cached_rows, head_tokens, *, passes=1):
        self._ran(ledger, work, depth_T, cached_rows, head_tokens, passes=passes)
        self.seconds += passes * work.flops(depth_T, head_tokens) / self._flops_s
        self.tokens += passes * len(depth_T)
        self.passes.add(passes)


@pytest.fixture
def machine(monkeypatch):
    return partial(Machine, monkeypatch)


@pytest.fixture(scope="module")
def planned(llama):
    """A study's plan, its runs by arm, and the machine after planning."""
    patch = pytest.MonkeyPatch()
    kept = lambda source, reply: Parsed([("row", f"{source} {reply}".strip())], 0, 0)  # noqa: E731
    plain = {"units": whole, "follow": lambda unit, reply: (), "follow_ups": 0, "is_lines": False}
    strategy = replace(STRATEGIES["self-ask"], max_new_tokens=6, read=kept, **plain)
    patch.setattr(Prompting, "of", lambda *_, **__: Prompting(strategy, "{{ document }}", "short"))
    task = simple_reversals(3, num_facts=2, num_articles=1)
    settings = StudySettings(arms=ARMS, seeds=(3,), strategy="self-ask", finetune=TRAINING, replay=0.2, prefix=PREFIX)
    machine = Machine(patch, 1e9)
    plan = forecast(llama, task, settings, calibration_s=BUDGET_S)
    tokens, seconds = machine.tokens, machine.seconds
    results = compare(llama, task, settings, options=StudyOptions(measure_s=0))
    patch.undo()
    return plan, {run.arm: run for run in results.runs}, (tokens, seconds, machine.passes)


def test_what_can_be_counted_is_what_the_run_counts(planned):
    plan, runs, _ = planned
    assert [arm.arm for arm in plan.arms] == [*ARMS]
    arms = {arm.arm: arm for arm in plan.arms}
    for name in ("base", "icl", "rag@1"):
        counts = runs[name].counts
        assert arms[name].read_tokens == pytest.approx(counts["forwarded_tokens"], rel=0.02), name
        assert arms[name].flops == pytest.approx(counts["flops"], rel=0.05), name
        assert (arms[name].written_tokens, arms[name].trained_tokens) == (0, 0)
    for name in ("ft", "ft+icl", "augmented-ft", "augmented-ft@600", "repeated-ft"):
        counts = runs[name].counts
        assert arms[name].trained_tokens == pytest.approx(counts["trained_tokens"], rel=0.35), name
        assert arms[name].flops == pytest.approx(counts["flops"], rel=0.35), name
    assert arms["augmented-ft"].written_tokens == pytest.approx(runs["augmented-ft"].counts["decoded_tokens"], rel=0.5)
    assert arms["augmented-ft@600"].written_tokens > 2 * arms["augmented-ft"].written_tokens
    assert arms["compacted@8"].is_planned
    counts = runs["prefix@4"].counts
    for name, counted in (("written", "decoded"), ("trained", "trained")):
        assert getattr(arms["prefix@4"], f"{name}_tokens") == pytest.approx(counts[f"{counted}_tokens"], rel=0.35)
    assert arms["prefix@4"].flops == pytest.approx(counts["flops"], rel=0.35)
    assert arms["prefix@4"].setup_s > 0
    assert all(arm.disk_bytes > 0 for arm in plan.arms)


def test_a_calibration_ends_in_its_time_and_says_what_it_could_not_try(planned, llama, machine):
    plan, runs, (tokens, seconds, passes) = planned
    assert passes == {1, 2, 3}  # documents are read, a prefix is trained, weights are
    assert plan.calibration_s == pytest.approx(seconds)
    assert seconds <= BUDGET_S
    assert tokens < sum(run.counts["forwarded_tokens"] + run.counts["trained_tokens"] for run in runs.values()) / 2
    assert plan.guessed == ("products in float64",)  # which no ledger books
    slow = machine(1e6)  # where a token takes a tenth of a second
    arms = ("base", "icl", "prefix@4", "ft", "augmented-ft")
    task = simple_reversals(3, num_facts=2, num_articles=1)
    settings = StudySettings(arms=arms, seeds=(3,), finetune=TRAINING, prefix=PREFIX)
    late = forecast(llama, task, settings, calibration_s=1.0)
    assert slow.tokens == WARM_TOKENS + FIRST_TOKENS
    told = "answers", "a question by itself", "conversations", "a prefix's training", "training", "replies of local"
    assert late.guessed == told
    planned_s, late_s = ({arm.arm: arm.seconds for arm in each.arms} for each in (plan, late))
    for arm in arms[:-1]:  # FLOPs are all that this machine knows, and a thousandth of them a second
        assert late_s[arm] == pytest.approx(1e3 * planned_s[arm], rel=0.4), arm


def test_seconds_have_parts_and_what_arms_share_is_counted_once(planned):
    plan, _, _ = planned
    arms = {arm.arm: arm for arm in plan.arms}
    assert all(arm.seconds >= arm.setup_s for arm in plan.arms)
    assert arms["base"].setup_s == arms["icl"].setup_s == 0
    assert arms["ft+icl"].setup_s == arms["ft"].setup_s > 0
    assert plan.seconds < math.fsum(arm.seconds for arm in plan.arms) - arms["ft"].setup_s / 2
    assert plan.rival == "icl"
    assert {arm.arm for arm in plan.arms if arm.break_even is not None} <= {"ft", "augmented-ft", "augmented-ft@600"}


def test_decoding_is_as_long_as_the_longest_until_places_are_refilled():
    found = Decoding((50, 10, 30, 30), (False,) * 4, 1.0, step_s=0.1, token_s=0.002)
    assert found.reply(100) == (30, 50)
    assert found.seconds(RUNNING, 100) == pytest.approx(50 * 0.1 + RUNNING * 30 * 0.002)
    assert found.seconds(10 * RUNNING, 100) == pytest.approx(300 * 0.1 + 10 * RUNNING * 30 * 0.002)


def test_replies_that_were_cut_count_as_far_as_they_were_seen():
    assert Decoding((2, 4, 1), (False, False, True), 1.0, 0.1, 0.0).reply(9) == (3, 4)
    assert Decoding((4, 4), (True, True), 1.0, 0.1, 0.0).reply(16) == (16, 16)
    assert Decoding((0, 4), (False, False), 1.0, 0.1, 0.0).reply(9) == (2, 4)
    assert Decoding((), (), None, 0.0, 0.1).reply(16) == (16, 16)
    mean, longest = Decoding((1,) * 5 + (5,) * 5, (False,) * 5 + (True,) * 5, 1.0, 0.1, 0.0).reply(10**6)
    assert (mean, longest) == (pytest.approx(3 + 0.5 * 30 / 5), 10**6)  # one in six tokens is a last one


def test_a_step_has_a_part_for_the_step_and_one_for_each_of_its_rows():
    def clocked(steps):
        now = iter([0.0, *(t for end, rows in steps for t in [end] * rows)])
        clock = DecodingClock(lambda: float(next(now)), 100)
        for _, rows in steps:
            assert all(clock(reply, None) for reply in range(rows))
        return clock

    wide, few = clocked(((5, 8), (6, 8), (7, 8))), clocked(((3, 2), (3.4, 2), (3.8, 2), (9, 1)))
    found = few.decoding([3] * 2, [False] * 2, row_s=9.0, wider=wide.width())
    assert (found.reading_s, found.step_s, found.token_s) == pytest.approx((3.0, 0.2, 0.1))
    alone = wide.decoding([3] * 8, [False] * 8, row_s=0.1)
    assert (alone.reading_s, alone.step_s, alone.token_s) == pytest.approx((5.0, 0.2, 0.1))
    unseen = clocked(((5, 8),)).decoding([1] * 8, [True] * 8, row_s=0.1)
    assert (unseen.step_s, unseen.token_s) == (0.0, 0.1)


def test_replies_end_with_the_time():
    times = iter([0, 1, 1, 9, 10])
    clock = DecodingClock(lambda: float(next(times)), 10)
    assert [clock(reply, None) for reply in (0, 1, 0, 1)] == [True, True, True, False]


def test_reading_is_extrapolated_by_flops(llama, machine):
    machine(1e6)
    calibration = planning.Calibration(llama, 1.0)
    short, long = list(range(2, 102)), list(range(2, 202))
    path = work_of(llama).path_flops(200)
    assert calibration.read_s(short) == pytest.approx(path[100] / 1e6)
    assert calibration.read_s(long) == pytest.approx(path[200] / 1e6)
    assert calibration.read_s([]) == 0.0


def test_compaction_is_planned_by_what_it_multiplies(llama):
    times = iter(range(10**4))
    calibration = Calibration(llama, 1e12, clock=lambda: float(next(times)))  # whatever is timed takes a second
    token = [2 + n % 50 for n in range(200)]
    reading, matching = compacting_flops(llama, 200, 50, 200)
    expected = calibration.read_s(token, reading) + matching / (2 * 2048 * 1024**2)
    assert calibration.compacting_s(token, 50, [token]) == pytest.approx(expected)
    far, farther = (compacting_flops(llama, n, n // 4, n)[1] for n in (100_000, 200_000))
    assert farther / far == pytest.approx(8, rel=0.01)


def test_passages_are_read_in_the_batches_of_their_questions(llama, monkeypatch):
    monkeypatch.setattr(Calibration, "read_s", lambda self, token, flops=None: 0.0 if flops is None else 1e6)
    settings = StudySettings(arms=("icl", "rag@1"), seeds=(3,))
    task = simple_reversals(3, num_facts=2, num_articles=1)
    icl, rag = forecast(llama, task, settings, calibration_s=0.01).arms
    assert rag.seconds < 1e6 <= icl.seconds


def test_a_plan_is_kept_for_the_run_of_the_same_arguments(planned, tmp_path):
    plan, runs, _ = planned
    write_plan(tmp_path, plan, "abc")
    assert read_plan(tmp_path, "abc") == plan
    assert read_plan(tmp_path, "other") is None
    assert read_plan(tmp_path / "none", "abc") is None
    (tmp_path / PLAN).write_text("{")
    with pytest.raises(PlanError, match=r"plan.json: not a plan: remove it, or plan again with --dry-run"):
        read_plan(tmp_path, "abc")
    took = taken_s(runs["base"])
    made = Forecast((ArmForecast("base", 1, seconds=took / 2), ArmForecast("icl", 1, is_planned=False)), "", 1.0, 2.0)
    assert kept_to(made, list(runs.values())) == [
        f"base: planned {took / 2:.1f} s, took {took:.1f} s (2.00 times the plan)"
    ]


@pytest.mark.parametrize(("share", "is_told"), [(0.75, True), (0.85, False)])
def test_a_calibration_that_waited_for_cores_is_told(llama, monkeypatch, planned, tmp_path, capsys, share, is_told):
    now, plain, told = [0.0], Calibration, "Other processes took the cores while "

    def clock():  # each look takes a second, and the thread has a core for a share of it
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(planning, "Calibration", partial(plain, clock=clock, processor=lambda: share * clock()))
    task = simple_reversals(3, num_facts=2, num_articles=1)
    plan = forecast(llama, task, StudySettings(arms=("base",), seeds=(3,)), calibration_s=10.0)
    assert plan.processor_s == pytest.approx(share * plan.calibration_s)
    assert (told in plan.beside) == is_told
    print_forecast(plan, Console())
    assert (f"{told}the model was tried" in " ".join(capsys.readouterr().out.split())) == is_told
    write_plan(tmp_path, plan, "abc")
    assert json.loads((tmp_path / PLAN).read_text())["beside"] == plan.beside
    run = planned[1]["base"]
    phases = {"query": {"wall_s": 10.0, "device_s": 10 * share}, "retrieve": {"wall_s": 99.0, "device_s": 0.0}}
    run = replace(run, counts={"phases": phases})
    assert [told in line for line in kept_to(plan, [run])] == [False, True, True][: 3 if is_told else 1]


def test_the_command_plans_and_the_run_says_how_far_off_it_was(llama_directory, tmp_path, capsys, monkeypatch):
    generator, made = GENERATORS["simple-reversals"], []
    counted = replace(generator, make=lambda *given, **named: made.append(named) or generator.make(*given, **named))
    monkeypatch.setitem(GENERATORS, "simple-reversals", counted)
    asked = [
        "compare",
        "--model",
        str(llama_directory),
        "--task",
        "simple-reversals",
        "--preset",
        "small",
        "--facts",
        "2",
    ]
    asked += [
        "--arms",
        "base,ft",
        "--steps",
        "2",
        "--measure-seconds",
        "0.1",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*asked, "--dry-run"]) == 0
    assert len(made) == 1  # the task of its one seed, which checks, plan and power all look at
    told = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PLAN]
    assert "fine-tuned" in told
    assert "What it can show: " in told
    assert "a gap of " in told
    assert main(asked) == 0
    told = capsys.readouterr().out
    assert "times the plan)" in told
    assert main([*asked, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert [arm["arm"] for arm in planned["arms"]] == ["base", "ft"]
    assert planned["power"]["topics"] <= planned["power"]["answers"]
    assert planned["power"]["tolerance"] == 2.0


def test_a_plan_is_for_one_task_in_one_process(tmp_path, capsys):
    asked = ["compare", "--model", "m", "--dry-run", "--out", str(tmp_path / "out"), "--task"]
    assert main([*asked, "all"]) == 2
    assert capsys.readouterr().err == "icl-ft-fast compare: --dry-run: plans one task at a time, not --task all\n"
    assert not (tmp_path / "out").exists()
