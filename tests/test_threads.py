"""How long OpenMP's threads spin: bounded by the command line, never by the library, and only where nobody chose."""

import os
import sys

import pytest

from icl_ft_fast import cli
from icl_ft_fast.runtime.threads import SPIN_COUNT, SPIN_VARIABLE, WAIT_VARIABLES, bound_spinning, waiting


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
    assert os.environ[SPIN_VARIABLE] == SPIN_COUNT
    assert waiting() == f"{SPIN_VARIABLE}={SPIN_COUNT}"


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_what_the_user_chose_stays(name, clean):
    clean.setenv(name, "passive")
    bound_spinning()
    assert {key: os.environ[key] for key in WAIT_VARIABLES if key in os.environ} == {name: "passive"}


def test_where_torch_is_loaded_it_would_come_too_late(clean):
    clean.setitem(sys.modules, "torch", None)
    bound_spinning()
    assert SPIN_VARIABLE not in os.environ
