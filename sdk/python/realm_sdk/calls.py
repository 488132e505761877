"""One call in progress: the messages that have arrived for it and nobody has taken yet.

Why the buffer of a call is not a small blocking queue: one socket carries all calls, so a reader that
waited for the consumer of one call would stop every other call of the connection. The socket is therefore
always read. What bounds a buffer is the server: a run may emit at most its output limit (16 MiB by default).
For a server with larger limits there is :data:`MAX_BUFFERED`: a call whose consumer is that far behind is
cancelled with ``slow_consumer``, and only that call.
"""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from realm_sdk.errors import RealmError, WaitTimeout
from realm_sdk.protocol import Done

MAX_BUFFERED = 32 << 20
"""Most bytes of messages that wait for one call's consumer."""


class Call:
    """Filled by the connection's reader, emptied by the caller."""

    def __init__(self, ident: int, function: str) -> None:
        self.ident = ident
        self.function = function
        self._items: deque[msgspec.Raw] = deque()
        self._buffered = 0
        self._end: Done | RealmError | None = None
        self._arrived = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the call's last message has arrived."""
        return self._end is not None

    def add(self, item: msgspec.Raw) -> bool:
        """Store a streamed message; False when the consumer is too far behind."""
        if self._end is not None:
            return True
        self._buffered += len(memoryview(item))
        if self._buffered > MAX_BUFFERED:
            return False
        self._items.append(item)
        self._arrived.set()
        return True

    def finish(self, end: Done | RealmError) -> None:
        """Store the last message. A second one changes nothing."""
        if self._end is None:
            self._end = end
            self._arrived.set()

    async def next(self, wait: float | None) -> msgspec.Raw | Done:
        """Take the next message, waiting at most ``wait`` seconds.

        Raises:
            RealmError: the call failed, the connection was lost, or ``wait_timeout``.
        """
        await self._ready(wait)
        if self._items:
            item = self._items.popleft()
            self._buffered -= len(memoryview(item))
            return item
        return self._last()

    async def peek(self, wait: float | None) -> msgspec.Raw | Done:
        """Like :meth:`next`, but the message stays."""
        await self._ready(wait)
        return self._items[0] if self._items else self._last()

    async def _ready(self, wait: float | None) -> None:
        if self._items or self._end is not None:
            return
        try:
            async with asyncio.timeout(wait):
                while not self._items and self._end is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise WaitTimeout("wait_timeout", f"{self.function}: no message for {wait:g} seconds") from None

    def _last(self) -> Done:
        assert self._end is not None
        if isinstance(self._end, RealmError):
            raise self._end
        return self._end
