"""Something that takes time to find out, and need not be news: asked for again only after a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """What ``read`` gave at most ``seconds`` ago. It runs in a thread, once at a time."""

    def __init__(self, read: Callable[[], T], seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._seconds = seconds
        self._clock = clock
        self._task: asyncio.Task[T] | None = None
        self._until = 0.0

    async def get(self) -> T:
        """Raises what ``read`` raised; a failure is kept as long as a result."""
        now = self._clock()
        if self._task is None or (self._task.done() and now >= self._until):
            self._until = now + self._seconds
            self._task = asyncio.create_task(asyncio.to_thread(self._read))
            # Looked at here, so that a failure whose callers have all left is not reported as forgotten.
            self._task.add_done_callback(lambda done: None if done.cancelled() else done.exception())
        # One caller that leaves must not take the result from the others.
        return await asyncio.shield(self._task)
