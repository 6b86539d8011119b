"""What is under way: a bar on a terminal; elsewhere a line after three seconds and every ten from then on."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from icl_ft_fast.runtime.printable import duration, printable

FIRST_S, THEN_S = 2.5, 9.5  # within 3 and 10, with what starting Python takes

_lock = threading.RLock()
_pause = threading.Event()  # never set: what waits for it sleeps, whoever replaces time.sleep
_under_way: list[Activity] = []  # outermost first
_teller: threading.Thread | None = None
_due = 0.0  # when the next line is, by time.monotonic()


class Activity:
    """One piece of work and how far it is.

    On a terminal a bar, once it has lasted a second. Elsewhere, and for work whose size is not known, one thread of the
    process prints a line of the innermost piece of work: a log is told that the process is alive, and short work
    nothing.
    """

    def __init__(
        self, what: str, *, total: int | None = None, unit: str = "", initial: int = 0, shown: bool = True
    ) -> None:
        """Describe it; it begins with the `with` block.

        Args:
            what: in one or two words, such as "scoring".
            total: units in all; None if that is not known.
            unit: the singular.
            initial: units that were done before.
            shown: False tells nothing.
        """
        self.what, self.total, self.unit, self.done, self.shown = what, total, unit, initial, shown
        self._initial, self._start, self._notes = initial, time.monotonic(), ""
        self._first: tuple[float, int] | None = None  # when the first units were done, and the units of then
        self._bar: Any = None

    def __enter__(self) -> Self:
        """Begin."""
        self._start = time.monotonic()
        if not self.shown:
            return self
        self._draw()
        with _lock:
            _tell()
            _under_way.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End."""
        if not self.shown:
            return
        with _lock:
            if self in _under_way:  # not so after tell_no_more()
                _under_way.remove(self)
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Count units done."""
        self.done += count
        self._first = self._first or (time.monotonic(), self.done)
        if self._bar is not None:
            self._bar.update(count)

    def restart(self, total: int) -> None:
        """Set how many units there are in all, when that is known at last, and count from 0."""
        if self._bar is not None:
            self._bar.close()
        self.total, self.done, self._initial, self._first = total, 0, 0, None
        self._draw()

    def note(self, **values: str) -> None:
        """Set what is told behind the count, such as a loss."""
        self._notes = "".join(f", {name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)

    def _draw(self) -> None:
        """Draw a bar if there is a terminal and the size is known; a terminal that does not say its width gets 80."""
        if self.shown and self.total is not None and (columns := _columns()) is not None:
            shape = {"delay": 1} if columns else {"delay": 1, "ncols": 80, "nrows": 24}
            self._bar = tqdm(total=self.total, desc=self.what, unit=self.unit, initial=self.done, **shape)

    def line(self) -> str:
        """What it is, how far, since when, and how long it may take."""
        seconds = time.monotonic() - self._start
        units = f"{self.unit[:-1]}ies" if self.unit.endswith("y") else f"{self.unit}s"
        if not self.total:
            counted = f"{self.done:,} {self.unit if self.done == 1 else units}, " if self.done else ""
            return f"{self.what}: {counted}{duration(seconds)}"
        told = f"{self.what}: {self.done:,} of {self.total:,} {units}, {duration(seconds)}"
        since, before = self._start, self._initial
        if self._first is not None and self.done > self._first[1]:
            since, before = self._first  # the first of many at once takes as long as all of them
        if self.done > self._initial + 1:  # one unit tells no pace: of many at once it is the first of all
            left = (time.monotonic() - since) * (self.total - self.done) / (self.done - before)
            told += f", about {duration(left)} left"
        return told + self._notes


def tell_no_more() -> None:
    """End the lines about all that is under way: what follows tells of itself, as a server's log does."""
    with _lock:
        _under_way.clear()


def _columns() -> int | None:
    """The terminal's width, 0 if it does not say; None where standard error is no terminal."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else None
    except (OSError, ValueError):
        return None


def _tell() -> None:
    """See to it that a thread prints lines; the lock is held."""
    global _due, _teller
    if not _under_way:
        _due = time.monotonic() + FIRST_S
    if _teller is None:
        _teller = threading.Thread(target=_telling, name="progress", daemon=True)
        _teller.start()


def _telling() -> None:
    """Print a line when one is due, until no work is left."""
    global _due, _teller
    while True:
        _pause.wait(0.1)
        with _lock:
            if not _under_way:
                _teller = None
                return
            innermost = _under_way[-1]
            if time.monotonic() < _due:
                continue
            _due = time.monotonic() + THEN_S
            drawn = [one._bar for one in _under_way if one._bar is not None]
            for bar in drawn:
                bar.refresh()
            if not drawn:
                print(printable(innermost.line()), file=sys.stderr, flush=True)


def _forget() -> None:
    """In a child of fork() no thread tells, and nothing that its parent does is its own."""
    global _lock, _teller
    _lock, _teller = threading.RLock(), None
    _under_way.clear()


os.register_at_fork(after_in_child=_forget)
