"""How long OpenMP's threads spin: bounded by the command line, never by the library, and only where nobody chose."""

import os
import sys

import pytest

from icl_ft_fast import cli
from icl_ft_fast.runtime import threads
from icl_ft_fast.runtime.threads import SPIN_ALONE, SPIN_BESIDE, SPIN_VARIABLE, WAIT_VARIABLES, bound_spinning, waiting


@pytest.fixture
def clean(monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored afterwards, whatever is done to it
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return monkeypatch


def test_the_command_line_bounds_it_before_torch_is_loaded(clean):
    assert "libgomp's default" in waiting()

    def first_of_all():
        bound_spinning()
        raise KeyboardInterrupt  # before a command loads anything

    clean.setattr(cli, "bound_spinning", first_of_all)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["doctor"])
    assert os.environ[SPIN_VARIABLE] in (SPIN_ALONE, SPIN_BESIDE)
    assert waiting() == f"{SPIN_VARIABLE}={os.environ[SPIN_VARIABLE]}"


@pytest.mark.parametrize(
    ("busy_ticks", "expected"), [(0, SPIN_ALONE), (4, SPIN_ALONE), (6, SPIN_BESIDE), (20, SPIN_BESIDE)]
)
def test_it_depends_on_what_other_processes_use(busy_ticks, expected, clean, tmp_path):
    """Of two cores over a tenth of a second, in ticks of 10 ms; a third core is not this process's."""
    stat, now = tmp_path / "stat", [0.0]

    def written(idle):
        stat.write_text(f"cpu 9 9 9 {idle} 7 0\ncpu0 1 2 3 {idle} 4 0\ncpu1 5 6 7 800 9 0\ncpu2 1 1 1 1 1 0\nintr 5\n")

    def sleep(seconds):
        now[0] += seconds
        written(100 + 20 - busy_ticks)

    written(100)
    clean.setattr(threads, "STAT", stat)
    clean.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    clean.setattr(os, "sysconf", lambda _: 100)
    clean.setattr(threads.time, "sleep", sleep)
    clean.setattr(threads.time, "monotonic", lambda: now[0])
    bound_spinning()
    assert os.environ[SPIN_VARIABLE] == expected


def test_a_system_that_does_not_say_is_taken_as_shared(clean, tmp_path):
    clean.setattr(threads, "STAT", tmp_path / "none")
    bound_spinning()
    assert os.environ[SPIN_VARIABLE] == SPIN_BESIDE


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_what_the_user_chose_stays(name, clean):
    clean.setenv(name, "passive")
    bound_spinning()
    assert {key: os.environ[key] for key in WAIT_VARIABLES if key in os.environ} == {name: "passive"}


def test_where_torch_is_loaded_it_would_come_too_late(clean):
    clean.setitem(sys.modules, "torch", None)
    bound_spinning()
    assert SPIN_VARIABLE not in os.environ
