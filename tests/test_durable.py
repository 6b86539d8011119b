"""Locks, whole files and journals: among processes, after kills, on a full disk, against damage; whole commands."""

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icl_ft_fast.cli import main
from icl_ft_fast.runtime.durable import (
    DamagedError,
    Journal,
    LockedError,
    ResultJournal,
    follow_umask,
    locked,
    replacing,
)

ROWS = [{"n": n, "text": "ü\n\r\u2028" * n, "value": 0.1 * n, "list": [None, True, {"a": n}]} for n in range(5)]


pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # children here compute nothing


def start(child):
    """Run child() in a forked process that ends without any cleaning up; returns its id."""
    pid = os.fork()
    if not pid:
        try:
            child()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def end(pid):
    """Wait for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_second_holder_is_refused_and_told_by_whom(tmp_path):
    path = tmp_path / "new" / ".lock"

    def second():
        message = f"^{path}: locked by process {os.getppid()} on {socket.gethostname()}; let it end, or choose another"
        with pytest.raises(LockedError, match=message), locked(path):
            pass

    with locked(path):
        assert end(start(second)) == 0
        with pytest.raises(LockedError, match=f"^{path}: locked by process {os.getpid()} on "), locked(path):
            pass
    assert not path.exists()
    with locked(path):
        pass


def test_a_killed_holder_holds_nothing(tmp_path):
    path = tmp_path / ".lock"

    def hold():
        with locked(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert end(start(hold)) == -signal.SIGKILL
    assert path.exists()
    with locked(path):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_sharers_share_and_keep_others_out(tmp_path):
    path = tmp_path / ".lock"
    with locked(path, shared=True), locked(path, shared=True), pytest.raises(LockedError), locked(path):
        pass
    with locked(path), pytest.raises(LockedError), locked(path, shared=True):
        pass


def test_those_who_wait_come_one_after_the_other(tmp_path):
    """Each adds one to a number that it reads; a lost update, or a removed lock file that still locks, would show."""
    path, number = tmp_path / ".lock", tmp_path / "number"
    number.write_text("0")

    def add():
        for _ in range(50):
            with locked(path, wait=True):
                found = int(number.read_text())
                os.sched_yield()
                number.write_text(str(found + 1))

    assert [end(pid) for pid in [start(add) for _ in range(3)]] == [0, 0, 0]
    assert number.read_text() == "150"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    for text in ("one", "two"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert partial.parent == tmp_path
        assert path.read_text() == text
    with pytest.raises(IsADirectoryError), replacing(path) as partial:
        (partial.write_text("half"), tmp_path.read_text())
    assert path.read_text() == "two"

    def die():
        with replacing(path) as partial:
            partial.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert end(start(die)) == -signal.SIGKILL
    assert path.read_text() == "two"
    with pytest.raises(OSError, match="No space") as caught, replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(path)
    fresh = tmp_path / "new" / "folder" / "file"
    with pytest.raises(OSError, match="No space"), replacing(fresh):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == ["file"]
    with replacing(fresh) as partial:
        partial.write_text("made")
    assert fresh.read_text() == "made"


def test_a_journal_is_what_was_written(tmp_path):
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path)
    assert not path.exists()
    journal.append(*ROWS[:2])
    journal.append(ROWS[2])
    assert Journal(path).rows == journal.rows == ROWS[:3]
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == ROWS[:3]


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).append(*ROWS[:3])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path)
        assert journal.rows == ROWS[: whole[:length].count(b"\n")]
        assert path.read_bytes() == whole[:length]  # reading changes nothing
        if length % 10 == 0:
            journal.append(ROWS[3])
            assert Journal(path).rows == journal.rows


def test_every_flipped_bit_of_a_journal_is_named_or_changes_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path).append(*ROWS[:3])
    whole, named = path.read_bytes(), 0
    for place in random.Random(0).sample(range(8 * len(whole)), 400):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        rows, line = [], 1 + whole[: place // 8].count(b"\n")
        try:
            rows = Journal(path).rows
        except DamagedError as error:
            named += str(error).startswith(f"{path}:{line}: damaged, or not written by icl-ft-fast; move the file away")
        assert rows == ROWS[: len(rows)]  # a digit of an escape in the other case, or the last line without its end
    assert named > 350
    path.write_text('{"key": 1}\n')
    with pytest.raises(DamagedError, match=r"journal\.jsonl:1: damaged"):
        Journal(path)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append(ROWS[0])

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space") as caught:
            journal.append(ROWS[1])
    assert caught.value.filename == str(path)
    assert Journal(path).rows == journal.rows == ROWS[:1]
    journal.append(ROWS[2])
    assert Journal(path).rows == [ROWS[0], ROWS[2]]


def test_a_value_is_made_once(tmp_path):
    for path in (None, tmp_path / "kept.jsonl"):
        kept = ResultJournal(path)
        assert kept.once("a", lambda: {"x": [1.5]}) == {"x": [1.5]}
        assert kept.once("a", lambda: pytest.fail("made twice")) == {"x": [1.5]}
        kept.add({"b": 2, "c": None})
    assert ResultJournal(path).values == {"a": {"x": [1.5]}, "b": 2, "c": None}
    Journal(path).append({"key": "d"})
    with pytest.raises(DamagedError, match=r"kept\.jsonl: keeps something else; move the file away"):
        ResultJournal(path)


@pytest.fixture
def task(tmp_path):
    """A folder with a task."""
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "documents.jsonl").write_text('{"id": "d", "text": "the cat are taller than the mat."}\n')
    (folder / "questions.jsonl").write_text('{"id": "q", "prompt": "the", "choices": [" cat", " mat"], "answer": 0}\n')
    return folder


@pytest.mark.parametrize("command", ["compare", "augment", "finetune"])
def test_the_second_run_on_one_folder_is_refused(command, task, tmp_path, llama_directory, capsys):
    out = tmp_path / "out"
    arguments = {
        "compare": ["--model", llama_directory, "--task", task, "--out", out],
        "augment": ["--strategy", "rules", "--task", task, "--out", out],
        "finetune": [
            "--model_name_or_path",
            llama_directory,
            "--train_file",
            task / "documents.jsonl",
            "--output_dir",
            out,
        ],
    }[command]
    with locked(out / ".lock"):
        assert main([command, *map(str, arguments)]) == 2
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        message = f"{out / '.lock'}: locked by {holder}; let it end, or choose another output"
        assert capsys.readouterr().err == f"icl-ft-fast {command}: {message}\n"
        assert os.listdir(out) == [".lock"]


def test_a_damaged_file_of_a_comparison_is_named(task, tmp_path, capsys):
    (tmp_path / "journal.jsonl").write_text('{"check": "0", "row": {"key": "a", "value": 1}}\n')
    assert main(["compare", "--model", "none", "--task", str(task), "--out", str(tmp_path)]) == 2
    where = f"icl-ft-fast compare: {tmp_path / 'journal.jsonl'}:1: damaged"
    assert capsys.readouterr().err.startswith(f"{where}, or not written by icl-ft-fast; move the file away")


IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def crashes(llama_directory, tmp_path_factory):
    """What crash.py says of 40 kills, and of disks where file systems may be mounted."""
    tried = [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    can_mount = shutil.which("unshare") and not subprocess.run(tried, capture_output=True, check=False).returncode
    folder = tmp_path_factory.mktemp("crash") / "new"
    command = [sys.executable, Path(__file__).parent / "crash.py", llama_directory, folder, "--kills", "40"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*IN_A_NAMESPACE, *command, "--disk"] if can_mount else command
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_commands_killed_at_forty_moments_end_as_if_they_had_not_been(crashes):
    assert {command: report["kills"] for command, report in crashes.items()} == dict.fromkeys(
        ("compare", "finetune", "augment", "score"), 10
    )
    assert all(report["moments"] > 40 and report["ended"] > 1 for report in crashes.values())


def test_commands_on_full_and_read_only_disks(crashes):
    if "filled" not in crashes["compare"]:
        pytest.skip("needs unprivileged user namespaces, to mount file systems")
    assert sum(report["filled"] for report in crashes.values()) >= 4


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(umask, tmp_path):
    """Whatever wrote them: safetensors gives its files to one user alone."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a") as partial:
            save_file({"a": torch.zeros(1)}, partial)
            assert partial.stat().st_mode & 0o777 == 0o600
        follow_umask(tmp_path / "a")
    finally:
        assert os.umask(before) == umask
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_lock_file_of_another_user_is_locked_all_the_same(tmp_path, monkeypatch):
    path, real = tmp_path / ".lock", Path.open
    path.write_text("process 1 on elsewhere\n")

    def refused(self, mode="r", **options):
        if self == path and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, mode, **options)

    monkeypatch.setattr(Path, "open", refused)
    with (
        locked(path, shared=True),
        locked(path, shared=True),
        pytest.raises(LockedError, match="process 1 on"),
        locked(path),
    ):
        pass
    with locked(path), pytest.raises(LockedError), locked(path, shared=True):
        pass


def test_a_folder_that_was_made_for_nothing_goes(tmp_path):
    (tmp_path / "there").mkdir()
    for path in ("new/out/.lock", "there/.lock"):
        with pytest.raises(KeyError), locked(tmp_path / path):
            raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]

    def fails():
        (tmp_path / "new" / "kept").mkdir()  # beside it
        raise KeyError

    with pytest.raises(KeyError), locked(tmp_path / "new" / "out" / ".lock"):
        fails()
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["kept"]


def test_what_a_link_leads_to_is_replaced_and_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with replacing(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is none: root could put a file in its place
    with pytest.raises(OSError, match="is no file that could be replaced"), replacing(tmp_path / "pipe") as partial:
        partial.write_text("new")
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]
