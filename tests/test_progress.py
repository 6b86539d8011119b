"""What is told of work under way: nothing of short work, lines in a log, bars on a terminal, nothing left behind."""

import os
import re
import subprocess
import sys
import time

import pytest

from icl_ft_fast.runtime import progress
from icl_ft_fast.runtime.progress import Activity

LATER = """
import time
from icl_ft_fast.runtime import progress
progress.FIRST_S, progress.THEN_S = 0.3, 0.6
with progress.Activity("comparing"):
    time.sleep(0.7)
    with progress.Activity("scoring", total=40, unit="question", initial=10) as work:
        work.update(15)
        work.note(loss="1.5")
        time.sleep(0.8)
"""


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "FIRST_S", 0.1)
    monkeypatch.setattr(progress, "THEN_S", 0.3)


def test_short_work_says_nothing(capsys):
    with Activity("scoring", total=3, unit="token") as work:
        work.update(3)
    assert capsys.readouterr() == ("", "")


def test_what_is_left_goes_by_the_pace_since_the_first_unit():
    with Activity("augmenting", total=101, unit="reply", shown=False) as work:
        work.update(1)
        work._start -= 90
        assert work.line().endswith("1 of 101 replies, 1 min 30 s")
        work._first = work._first[0] - 10, 1
        work.update(10)
        assert work.line().endswith("11 of 101 replies, 1 min 30 s, about 1 min 30 s left")
    with Activity("augmenting", unit="reply", shown=False) as work:
        assert work.line() == "augmenting: 0 s"
        work.update(1)
        assert work.line() == "augmenting: 1 reply, 0 s"
        work.update(2)
        assert work.line() == "augmenting: 3 replies, 0 s"


def test_a_log_gets_lines_of_the_innermost_work(soon, capsys):
    with Activity("comparing"):
        time.sleep(0.45)
        with Activity("scoring", total=40, unit="question", initial=10) as work:
            work.update(15)
            work.note(loss="1.5")
            time.sleep(0.7)
    out, err = capsys.readouterr()
    assert not out
    lines = err.splitlines()
    assert re.fullmatch(r"comparing: \d s", lines[0])
    assert re.fullmatch(r"scoring: 25 of 40 questions, \d s, about \d s left, loss 1.5", lines[-1])
    assert 2 <= len(lines) <= 6


def test_units_have_their_plural():
    assert ": 0 of 2 replies, " in Activity("x", total=2, unit="reply", shown=False).line()
    assert ": 0 of 2 steps, " in Activity("x", total=2, unit="step", shown=False).line()


def test_hidden_work_says_nothing(soon, capsys):
    with Activity("scoring", total=3, unit="token", shown=False) as work:
        work.update()
        time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_work_that_fails_is_no_longer_under_way(soon, capsys):
    with pytest.raises(ValueError, match="no"), Activity("scoring"):
        raise ValueError("no")
    time.sleep(0.4)
    assert capsys.readouterr().err == ""


def test_nothing_more_is_told_of_what_tells_of_itself(soon, capsys):
    with Activity("icl-ft-fast serve"):
        time.sleep(0.35)
        progress.tell_no_more()
        told = capsys.readouterr().err
        time.sleep(0.4)
    assert told.startswith("icl-ft-fast serve: 0 s\n")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_of_any_size_gets_a_bar(columns):
    """As under script(1), whose terminals have no width."""
    pty = pytest.importorskip("pty")
    fcntl, struct, termios = pytest.importorskip("fcntl"), __import__("struct"), __import__("termios")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    code = LATER.replace("time.sleep(0.8)", "time.sleep(1.2); work.update(5)")
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    told = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "comparing: " in told
    assert re.search(r"scoring: +75%.* 30/40", told)
    assert "loss=1.5" in told
