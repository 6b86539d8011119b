"""Batches of requests that concurrent tasks make one by one."""

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


class Batcher(Generic[Asked]):
    """Calls `answer` with every request that arrived while it was busy; one call at a time, in a thread.

    An error is raised in one of the callers, and the others try again: validate a request before it is passed here.
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
