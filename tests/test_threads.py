"""How OpenMP's threads wait: commands let them sleep while others want the cores, the library never does."""

import os
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest

from icl_ft_fast import cli
from icl_ft_fast.runtime import executors, threads
from icl_ft_fast.runtime.threads import WAIT_VARIABLES, Use, cores_of_others, share_cores, used, waiting


@pytest.fixture
def clean(monkeypatch):
    for name in WAIT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def started(clean):
    """Threads that were to be started."""
    made = []
    clean.setattr(threads, "_start_once", cache(threads._start_once.__wrapped__))
    clean.setattr(threads.threading, "Thread", lambda **named: SimpleNamespace(start=lambda: made.append(named)))
    return made


def test_commands_watch_who_uses_the_cores(started, capsys):
    for _ in range(2):
        assert cli.main(["status", "nowhere"]) == 2
    assert [named["target"] for named in started] == [threads._watch]
    assert started[0]["daemon"]
    assert waiting().startswith("asleep while others want the cores")


def test_so_do_ray_s_actors(started):
    executors._Actor(lambda: abs)
    assert [named["target"] for named in started] == [threads._watch]


@pytest.mark.parametrize("name", WAIT_VARIABLES)
def test_what_the_user_chose_stays(name, started, clean):
    clean.setenv(name, "passive")
    share_cores()
    assert not started
    assert waiting() == f"{name}=passive"


def test_a_system_that_does_not_say_is_not_watched(started, clean, tmp_path):
    clean.setattr(threads, "STAT", tmp_path / "none")
    share_cores()
    assert not started
    assert waiting().startswith("libgomp's default, which spins")


def test_it_is_read_of_this_process_s_cores_without_what_is_idle_or_stolen(clean, tmp_path):
    fields = "1 2 4 1000 1000 8 16 1000 1000 1000"  # user nice system idle iowait irq softirq steal guest guest_nice
    text = "".join(f"{name} {fields}\n" for name in ("cpu", "cpu0", "cpu1", "cpu2")) + "intr 5\n"
    (tmp_path / "stat").write_text(text)
    clean.setattr(threads, "STAT", tmp_path / "stat")
    clean.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    clean.setattr(os, "sysconf", lambda _: 100)
    found = used()
    assert found is not None
    assert found.all == pytest.approx(2 * 0.31)


def test_what_others_use_is_what_is_not_its_own():
    before, after = Use(now=10.0, all=5.0, own=1.0), Use(now=12.0, all=8.5, own=2.0)
    assert cores_of_others(before, after) == 1.25
    assert cores_of_others(before, Use(now=12.0, all=6.0, own=2.5)) == 0.0  # ticks are coarse


WATCHED = """
import os, sys
from types import SimpleNamespace
from icl_ft_fast.runtime import threads
num_threads, *others = map(float, sys.argv[1:])
looks, told = [threads.Use(0.0, 0.0, 0.0)], []
for cores in others:
    looks.append(threads.Use(looks[-1].now + 1, looks[-1].all + cores, 0.0))
looks.append(None)  # ends the watch
threads.used, threads.time.sleep, os.sched_getaffinity = lambda: looks.pop(0), lambda _: None, lambda _: {0, 1}
sys.modules["icl_ft_fast._C"] = SimpleNamespace(sleep_at_barriers=told.append)
sys.modules["torch"] = SimpleNamespace(get_num_threads=lambda: num_threads)
threads._watch()
print("".join("spin sleep".split()[asleep][1] for asleep in told))
"""


@pytest.mark.parametrize(
    ("num_threads", "others", "expected"),
    [(2, "0.4 0.6 0 0 0 0 0 0.4", "plllllpp"), (1, "0.9 1.4 1.6", "ppl")],  # of one thread a core is left for others
)
def test_threads_sleep_from_when_cores_are_missing_until_they_have_not_been_for_a_while(num_threads, others, expected):
    """In a process of its own: in this one a watch may run already."""
    command = [sys.executable, "-c", WATCHED, str(num_threads), *others.split()]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == expected


# Between regions, the second thread waits for 30 ms a time; what that costs is processor time.
WAITED = """
import time, torch
from icl_ft_fast import _C
torch.set_num_threads(2)
x = torch.ones(1 << 20)
for sleep in (False, True, True, False):
    _C.sleep_at_barriers(sleep)
    time.sleep(0.1)
    start = time.process_time()
    for _ in range(20):
        x.add_(1)
        time.sleep(0.03)
    print(time.process_time() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's OpenMP")
def test_threads_sleep_at_once_and_spin_again():
    clean = {name: value for name, value in os.environ.items() if name not in (*WAIT_VARIABLES, "OMP_NUM_THREADS")}
    out = subprocess.run([sys.executable, "-c", WAITED], env=clean, check=True, capture_output=True, text=True).stdout
    spinning, asleep, still, again = map(float, out.split())
    assert max(asleep, still) < 0.6 * min(spinning, again), out
