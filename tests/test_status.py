"""What a study is at, as another process reads it, and its pause."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from icl_ft_fast import cli
from icl_ft_fast.cli.run.status import told
from icl_ft_fast.finetuning.settings import FinetuneSettings, PrefixSettings
from icl_ft_fast.runtime.durable import is_locked, locked
from icl_ft_fast.study import progress
from icl_ft_fast.study.compare import StudyOptions, compare
from icl_ft_fast.study.progress import Status, StatusError, StudyProgress, set_paused, status_of
from icl_ft_fast.study.settings import StudySettings
from icl_ft_fast.tasks.task import Document, Question, Task


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now[0]))
    return now


def test_two_processes_on_one_disk(tmp_path, clock, monkeypatch):
    with locked(tmp_path / ".lock"):
        assert status_of(tmp_path).state == "starting"
        one, two = StudyProgress(tmp_path), StudyProgress(tmp_path)
        one.begin(("base", "ft"), (0, 1))
        with one.running("base", 0) as ended:
            clock[0] += 10
            ended(3, 4)
        monkeypatch.setattr(progress.os, "getpid", lambda: 1)  # the other process, in a file of its own
        with two.running("ft", 0) as ended:
            clock[0] += 30
            ended(1, 4)
        with pytest.raises(ZeroDivisionError), two.running("base", 1):
            raise ZeroDivisionError("no luck")
        with two.running("ft", 1):
            clock[0] += 5
            found = status_of(tmp_path)
        assert found == Status(
            "running",
            4,
            2,
            (("ft", 1, 5.0, 0, 0),),
            {"base": (3, 4), "ft": (1, 4)},
            10 + 30 - 5,
            "ZeroDivisionError: no luck",
        )
        assert told(found).splitlines() == [
            "running: 2 of 4 runs done, about 35 s left",
            "  running ft, seed 1, for 5 s",
            "  base: 3 of 4 correct (0.75)",
            "  ft: 1 of 4 correct (0.25)",
            "  last error: ZeroDivisionError: no luck",
        ]
    assert not is_locked(tmp_path / ".lock")
    assert status_of(tmp_path).state == "stopped"  # killed, or failed
    assert status_of(tmp_path).running == ()


def test_what_killed_processes_left_is_not_running(tmp_path, clock, monkeypatch):
    with locked(tmp_path / ".lock"):
        first, killed, begun = StudyProgress(tmp_path), StudyProgress(tmp_path), []
        first.begin(("base", "ft"), (0,))
        with pytest.raises(ZeroDivisionError), first.running("base", 0):
            raise ZeroDivisionError("no luck")
        for pid, process in enumerate((killed, StudyProgress(tmp_path))):
            monkeypatch.setattr(progress.os, "getpid", lambda pid=pid: pid)
            begun.append(process.running("ft", 0))  # not collected: that would end it
            begun[-1].__enter__()  # another one takes it on, as Ray's actors do
            clock[0] += 7
        assert status_of(tmp_path).running == (("ft", 0, 7.0, 0, 0),)
        clock[0] += 100
        again = StudyProgress(tmp_path)
        again.begin(("base", "ft"), (0,))  # the same command, after a kill of all
        found = status_of(tmp_path)
        assert (found.state, found.running, found.error) == ("running", (), "")
        for arm in ("base", "ft"):
            with again.running(arm, 0) as ended:
                ended(1, 2)
        assert told(status_of(tmp_path)).splitlines()[0] == "measuring what a query takes: 2 of 2 runs done"


def test_the_time_left_is_that_of_runs_that_train_or_do_not(tmp_path, clock):
    with locked(tmp_path / ".lock"):
        mine = StudyProgress(tmp_path)
        mine.begin(("base", "icl", "ft", "augmented-ft"), (0,), ("ft", "augmented-ft"))
        for arm, seconds, left in (("icl", 2, None), ("ft", 60, 60 + 2), ("base", 4, 60)):
            with mine.running(arm, 0) as ended:
                clock[0] += seconds
                ended(1, 1)
            assert status_of(tmp_path).seconds_left == left
    other = tmp_path / "other"
    other.mkdir()
    with locked(other / ".lock"):
        mine = StudyProgress(other)
        mine.begin(("base", "ft"), (0, 1), ("ft",))
        with mine.running("ft", 0) as ended:  # workers take what trains first
            clock[0] += 50
            ended(1, 1)
        assert status_of(other).seconds_left == 50  # nothing is known of base


def test_a_training_says_its_steps(tmp_path, clock):
    with locked(tmp_path / ".lock"):
        mine = StudyProgress(tmp_path)
        mine.begin(("ft",), (0, 1), ("ft",))
        with mine.running("ft", 0) as ended:
            clock[0] += 10  # writes what it trains on
            for step in range(101, 202):  # resumed behind step 100
                mine.step(step, 500)
                clock[0] += 0.1
            found = status_of(tmp_path)
            told_s = 10 + (found.running[0][3] - 101) * 0.1  # steps are told every two seconds
            assert 180 < found.running[0][3] <= 201
            assert found.seconds_left == pytest.approx(2 * (told_s + (500 - found.running[0][3]) * 0.1) - 20.1)
            assert f"for 20 s, {found.running[0][3]} of 500 steps" in told(found)
            mine.step(500, 500)  # the last one is always told
            assert status_of(tmp_path).running[0][3:] == (500, 500)
            ended(1, 1)


def test_arms_that_train_say_each_step(llama, monkeypatch):
    """Weights and prefixes alike, whoever makes the run: make_run() has the progress from every executor."""
    said = []
    monkeypatch.setattr(StudyProgress, "step", lambda self, *steps: said.append((self.events[-1]["arm"], *steps)))
    settings = StudySettings(
        finetune=FinetuneSettings(steps=2, batch_size=1),
        prefix=PrefixSettings(conversations=2, conversation_tokens=4, steps=1, batch_size=1),
    )
    task = Task((Document("d", "the cat sat"),), (Question("q", "the cat", (" sat on", " by the"), answer=0),))
    compare(llama, task, settings, arms=["ft", "prefix@2"], seeds=[0], options=StudyOptions(measure_s=0))
    assert said == [("ft", 1, 2), ("ft", 2, 2), ("prefix@2", 1, 1)]


def test_a_paused_study_begins_no_run(tmp_path, monkeypatch, capsys):
    looks = []

    def look(seconds):
        looks.append(status_of(tmp_path).state)
        if len(looks) == 3:
            assert cli.main(["resume", str(tmp_path)]) == 0

    monkeypatch.setattr(progress, "time", SimpleNamespace(time=progress.time.time, sleep=look))  # threads sleep too
    with locked(tmp_path / ".lock"):
        mine = StudyProgress(tmp_path)
        mine.begin(("base",), (0,))
        assert cli.main(["pause", str(tmp_path)]) == 0
        with mine.running("base", 0) as ended:
            assert looks == ["paused"] * 3
            ended(1, 1)
    assert "icl-ft-fast resume" in capsys.readouterr().out
    with locked(tmp_path / ".lock"):
        set_paused(tmp_path, True)
    for folder in (tmp_path, tmp_path / "elsewhere"):  # killed, or never begun
        with pytest.raises(StatusError, match="no study is at work here"):
            set_paused(folder, True)
    with locked(tmp_path / ".lock"):
        StudyProgress(tmp_path).begin(("base",), (0,))
        assert status_of(tmp_path).state != "paused"


def test_a_study_tells_as_it_goes_and_leaves_its_results(llama, tmp_path, capsys):
    question = Question("q", "the cat", (" sat on", " by the"), answer=0)
    task, seen = Task((Document("d", "the cat sat on the mat"),), (question,)), []
    options = StudyOptions(measure_s=0, on_run=lambda _: seen.append(status_of(tmp_path)))
    compare(llama, task, arms=["base", "icl"], seeds=[0, 1], out=tmp_path, options=options)
    assert [(one.state, one.planned, one.done) for one in seen] == [("running", 4, n) for n in (1, 2, 3)] + [
        ("measuring", 4, 4)
    ]
    assert not (tmp_path / progress.PROGRESS).exists()
    assert cli.main(["status", str(tmp_path), "--watch", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["done"], found["accuracy"]["icl"][1]) == ("finished", 4, 2)
    assert cli.main(["status", str(tmp_path / "none")]) == 2
    assert "no study was begun here" in capsys.readouterr().err


def test_the_commands_load_no_torch(tmp_path):
    """A study holds the cores: their seconds of imports are its minutes."""
    code = f"import sys; from icl_ft_fast import cli; cli.main(['status', {str(tmp_path)!r}])"
    code += "; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ended.stdout, "no study was begun here" in ended.stderr) == ("False\n", True)
