"""How much of the gateway's time reading may take: shares of each turn of the loop. No I/O.

All tenants' tokens go through the same loop. One read of a socket may hold ten thousand frames, and a
tenant may have hundreds of sockets; handled at once they would hold everybody's tokens up. So a turn
handles a bounded number, tenant by tenant and connection by connection, and the rest waits for the
next turn, after what workers have sent meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

from realm.settings import GatewayLimits

log = logging.getLogger("realm.gateway")

TURN_UNITS = 256
"""Frames, or slices of unread bytes, handled in one turn of the loop: some 3 ms of the smallest calls."""
READ_UNITS = 32
"""Of these, for one connection at a time."""
TURN_SECONDS = 0.003
"""What one turn may take, whatever its units cost: at most one of them goes on beyond that."""


class Reader(Protocol):
    """A connection with something to handle."""

    @property
    def tenant(self) -> str:
        """Whose share it is; empty while nobody knows."""

    def read(self, units: int, late: Callable[[], bool]) -> tuple[int, bool]:
        """Handle at most as many units, and no further one when ``late()``.

        Gives the units used and whether more is there to be handled now.
        """

    def abort(self) -> None:
        """Cut the connection."""


class Turns:
    """Round robin over tenants, and over the connections of each.

    A turn ends when its units are used up, or its time (``clock``, in seconds): units are counted because
    that is the same on every machine, and time because some units cost a thousand times what others do.
    """

    def __init__(
        self, call_soon: Callable[[Callable[[], None]], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._call_soon = call_soon
        self._clock = clock
        self._waiting: OrderedDict[str, deque[Reader]] = OrderedDict()
        self._queued: set[Reader] = set()
        self._left = TURN_UNITS
        self._seconds = TURN_SECONDS
        self._scheduled = False

    def ask(self, reader: Reader) -> None:
        """There is something to handle: at once, if this turn has time and nobody waits."""
        if reader in self._queued:
            return
        self._enqueue(reader)
        if len(self._queued) == 1 and self._has_time:
            self._serve()
        self._schedule()

    def __len__(self) -> int:
        """Readers that wait."""
        return len(self._queued)

    @property
    def _has_time(self) -> bool:
        return self._left > 0 and self._seconds > 0

    def _enqueue(self, reader: Reader) -> None:
        self._queued.add(reader)
        self._waiting.setdefault(reader.tenant, deque()).append(reader)

    def _serve(self) -> None:
        tenant, readers = self._waiting.popitem(last=False)
        reader = readers.popleft()
        self._queued.discard(reader)
        if readers:
            # To the end: the other tenants come first.
            self._waiting[tenant] = readers
        began = self._clock()
        until = began + self._seconds
        try:
            used, more = reader.read(min(READ_UNITS, self._left), lambda: self._clock() >= until)
        except Exception:
            # A fault of ours with one client must not stop the others' turns.
            log.exception("reading from a client failed; cutting it")
            reader.abort()
            used, more = READ_UNITS, False
        # Reading nothing costs, too; and time must run out even if all readers say that they used none.
        self._left -= max(1, used)
        self._seconds -= self._clock() - began
        if more and reader not in self._queued:
            self._enqueue(reader)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self._turn)

    def _turn(self) -> None:
        self._scheduled = False
        self._left, self._seconds = TURN_UNITS, TURN_SECONDS
        while self._queued and self._has_time:
            self._serve()
        if self._queued:
            self._schedule()


class Refusals:
    """Tenants that go on calling though they are told to wait."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._recent: dict[str, tuple[float, int]] = {}

    def refused(self, tenant: str, now: float) -> float:
        """A call was refused for its rate; gives the seconds for which its connection is not read."""
        began, count = self._recent.get(tenant, (now, 0))
        if now - began >= 1.0:
            began, count = now, 0
        self._recent[tenant] = began, count + 1
        return self._limits.refusal_pause if count >= self._limits.refusals else 0.0

    def forget(self, now: float) -> None:
        """Drop what has no effect any more; called now and then."""
        for tenant in [tenant for tenant, (began, _) in self._recent.items() if now - began >= 1.0]:
            del self._recent[tenant]
