"""Locks, whole files and journals: among processes, after kills, on a full disk, against damage."""

import errno
import json
import os
import random
import signal
import socket

import pytest

from icl_ft_fast.durable import DamagedError, Journal, LockedError, locked, replacing

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
    assert os.listdir(tmp_path) == ["file"]


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
