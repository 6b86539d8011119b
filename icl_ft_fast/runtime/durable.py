"""Files that outlive a kill: locked against a second writer, replaced whole or not at all, or grown line by line.

Knows nothing of what is in them.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from icl_ft_fast.runtime.errors import UserError

_umask_lock = threading.Lock()  # the umask can only be read by setting it


class LockedError(UserError):
    """An output that another process is writing; the message names the lock file and its holder."""


class DamagedError(UserError):
    """A file that is not what was written here; the message names it, the line and what to do."""


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make a folder, and those above it; if the block fails and leaves nothing in those that were made, they go."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            if not folder.is_dir() or any(folder.iterdir()):
                break
            folder.rmdir()
        raise


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock file during the block, against all other processes and threads.

    Args:
        path: the lock file; its folder is made when missing, see new_folder(). It holds the holder's process and host.
        shared: together with others that share it.
        wait: until it is free; otherwise whoever comes second is refused.

    Raises:
        LockedError: another holds it.
        OSError: the file cannot be made.

    flock(2): the kernel frees the lock when the holder ends, however it ends, so a file left behind locks nothing.
    Between machines it holds where the shared file system carries flock (NFS does, some others must be mounted so).
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    with new_folder(path.parent):
        yield from _holding(path, how, shared=shared)


def _holding(path: Path, how: int, *, shared: bool) -> Iterator[None]:
    """Hold a lock file, made when missing and removed at the end."""
    while True:
        with _opened_lock(path) as file:
            try:
                fcntl.flock(file, how)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise LockedError(f"{path}: locked by {holder}; let it end, or choose another output") from error
            if not _is_at(path, file.fileno()):  # its last holder removed it while this one waited
                continue
            try:
                if not shared and file.writable():
                    with _named(path):
                        file.truncate(0)
                        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                        file.flush()
                yield
            finally:
                if not shared and path.exists():  # its folder may be gone: the last thing that a run does
                    path.unlink(missing_ok=True)
            return


def is_locked(path: Path) -> bool:
    """Whether a process that is alive holds a lock file, here or on another machine, see locked()."""
    try:
        file = path.open()
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _opened_lock(path: Path) -> IO[str]:
    """The lock file, made when missing; another user's is opened to read, which suffices to lock it."""
    try:
        return path.open("a+", encoding="utf-8")
    except PermissionError:
        return path.open(encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to during the block; what is there at its end is synced and takes the place of `path`.

    Its mode follows the umask, whatever wrote it: safetensors gives its files to one user alone. A link stays one: what
    it leads to is replaced.

    Its folder is made when missing, see new_folder(). If the block fails, `path` is as it was and nothing else is left.
    One writer at a time: hold a lock.

    Raises:
        OSError: with `path` as its file name, where the block's own error had none.
    """
    if path.exists() and not path.is_file():  # root could put a file in the place of /dev/null
        raise OSError(errno.EEXIST, "is no file that could be replaced", str(path))
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".{path.name}.partial")
    with new_folder(path.parent):
        try:
            with _named(path):
                yield partial
                follow_umask(partial)
                sync(partial)
                os.replace(partial, path)
                sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def follow_umask(path: Path) -> None:
    """Give a file the mode that open() would have made it with."""
    with _umask_lock:
        mask = os.umask(0o077)
        os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """A file of JSON objects that only grows, a line each with its checksum. One writer at a time: hold a lock.

    Args:
        path: made, with its folder, by the first append().

    Attributes:
        rows: the objects, in the order they were written; a line that a kill cut short is none, and goes at the next
            append().

    Raises:
        DamagedError: a line that was not written here, or was changed.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        *lines, torn = data.split(b"\n")
        self._end = len(data) - len(torn)
        self.rows: list[dict[str, Any]] = [_row(f"{path}:{n}", line) for n, line in enumerate(lines, 1)]

    def append(self, *rows: dict[str, Any]) -> None:
        """Add objects; they are on the disk when this returns, and none of them is in the file if it raises OSError."""
        is_new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        left = "".join(json.dumps({"check": digest(row), "row": row}) + "\n" for row in rows).encode()
        with _named(self.path), self.path.open("ab", buffering=0) as file:
            file.truncate(self._end)
            try:
                while left:  # a disk that fills up takes a part first
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._end)
                raise
            self._end = file.tell()
        if is_new:
            sync(self.path.parent)
        self.rows += rows


class ResultJournal:
    """Values by key, each made once: in memory, and in a journal if there is a path.

    Args:
        path: of the journal; a key stands for all that its value depends on, so that nothing stale is ever found.

    Raises:
        DamagedError, OSError: as Journal does.
    """

    def __init__(self, path: Path | None) -> None:
        self._journal = None if path is None else Journal(path)
        rows = [] if self._journal is None else self._journal.rows
        if any(row.keys() != {"key", "value"} for row in rows):
            raise DamagedError(f"{path}: keeps something else; move the file away")
        self.values: dict[str, Any] = {row["key"]: row["value"] for row in rows}

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep values of JSON."""
        if self._journal is not None:
            self._journal.append(*({"key": key, "value": value} for key, value in values.items()))
        self.values |= values

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """The value of a key, made if there is none."""
        if key not in self.values:
            self.add({key: make()})
        return self.values[key]


def digest(*parts: object) -> str:
    """32 hex digits of JSON values, the same after they were written and read."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _row(where: str, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if found["check"] == digest(found["row"]) and isinstance(found["row"], dict):
            return dict(found["row"])
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise DamagedError(
        f"{where}: damaged, or not written by icl-ft-fast; move the file away and run the same command again"
    )


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Within the block an OSError that names no file gets this one's name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
