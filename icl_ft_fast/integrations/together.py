"""Requests that concurrent tasks make one by one, answered together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio

Asked = TypeVar("Asked")
WAIT_S = 0.01  # for tasks that start together to have asked


@dataclass(eq=False)
class _Waiting(Generic[Asked]):
    asked: Asked
    answer: Any = None
    is_answered: bool = False


class Together(Generic[Asked]):
    """Calls `answer` with all that was asked while it was busy; one call at a time, in a thread.

    An error reaches one of those who asked, and the others ask again: what is wrong with one request must be found
    before it asks.
    """

    def __init__(self, answer: Callable[[list[Asked]], list[Any]]) -> None:
        self._answer = answer
        self._waiting: list[_Waiting[Asked]] = []
        self._lock = anyio.Lock()

    async def ask(self, asked: Asked) -> Any:
        """The answer to `asked`."""
        mine = _Waiting(asked)
        self._waiting.append(mine)
        try:
            async with self._lock:
                if not mine.is_answered:
                    await anyio.sleep(WAIT_S)
                    batch = [each for each in self._waiting if not each.is_answered]
                    answers = await anyio.to_thread.run_sync(self._answer, [each.asked for each in batch])
                    for each, answer in zip(batch, answers, strict=True):
                        each.answer, each.is_answered = answer, True
        finally:
            self._waiting.remove(mine)
        return mine.answer
