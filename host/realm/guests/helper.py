"""Work that takes too long for the worker's own thread: a queue, and one thread beside it.

Work in here is a plain callable that touches neither a guest's memory nor any state of its run; what
it gives is taken in by the thread that owns the runtime. Within a tenant work is done in the order of
its coming; the tenants take turns, so that one tenant's long texts delay another's by one at most.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

Work = Callable[[], Any]


@dataclass(slots=True, eq=False)
class Ticket:
    """One piece of work. ``error`` is what it raised, else ``value`` what it gave."""

    tenant: str
    work: Work | None
    value: Any = None
    error: BaseException | None = None

    def do(self) -> None:
        """Do it, unless it was cancelled meanwhile."""
        work, self.work = self.work, None
        if work is None:
            return
        try:
            self.value = work()
        except BaseException as error:
            # Raised again, or made an error code, where the guest's call is answered.
            self.error = error


class Helper(Protocol):
    """Does work for a runtime."""

    @property
    def immediate(self) -> bool:
        """Whether the work is done by :meth:`collect` itself, so that nobody will wake the owner."""

    def submit(self, tenant: str, work: Work) -> Ticket: ...

    def cancel(self, ticket: Ticket) -> None:
        """Its result is not wanted any more. Work that has begun goes on to its end."""

    def collect(self) -> list[Ticket]:
        """What has been done since the last call."""

    def close(self) -> None: ...


class Queue:
    """First come, first served within a tenant; the tenants take turns."""

    def __init__(self) -> None:
        self._tenants: OrderedDict[str, deque[Ticket]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._tenants.values()))

    def __bool__(self) -> bool:
        return bool(self._tenants)

    def put(self, ticket: Ticket) -> None:
        self._tenants.setdefault(ticket.tenant, deque()).append(ticket)

    def take(self) -> Ticket | None:
        if not self._tenants:
            return None
        tenant, tickets = self._tenants.popitem(last=False)
        ticket = tickets.popleft()
        if tickets:
            self._tenants[tenant] = tickets
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """False if it is not waiting any more."""
        tickets = self._tenants.get(ticket.tenant)
        if tickets is None or ticket not in tickets:
            return False
        tickets.remove(ticket)
        if not tickets:
            del self._tenants[ticket.tenant]
        return True


class InlineHelper:
    """Does the work when its results are asked for: for one guest without a server, and for tests."""

    immediate = True

    def __init__(self) -> None:
        self._queue = Queue()

    def submit(self, tenant: str, work: Work) -> Ticket:
        ticket = Ticket(tenant, work)
        self._queue.put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self._queue.remove(ticket)

    def collect(self) -> list[Ticket]:
        done = []
        while (ticket := self._queue.take()) is not None:
            ticket.do()
            done.append(ticket)
        return done

    def close(self) -> None:
        self._queue = Queue()


class HelperThread:
    """Does the work in a thread of its own; :meth:`fileno` is readable when something is done."""

    immediate = False

    def __init__(self) -> None:
        self._queue = Queue()
        self._done: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._working = self._held = False
        self._finished = 0
        # How much work it may finish before the owner has its turn, or None.
        self._until: int | None = None
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._serve, name="realm-helper", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._read

    def submit(self, tenant: str, work: Work) -> Ticket:
        ticket = Ticket(tenant, work)
        with self._changed:
            self._queue.put(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.work = None
            self._queue.remove(ticket)

    def hold(self, *, wait: bool = False) -> bool:
        """Keep it from beginning work, until :meth:`let_go`; False if it has some, at work or waiting.

        With ``wait`` one piece of its work is awaited and it is held in any case. So it goes on, however
        often it is held.
        """
        with self._changed:
            if self._working or self._queue:
                if not wait:
                    return False
                self._until = self._finished + 1
                while self._finished < self._until and not self._closed:
                    self._changed.wait()
            self._held, self._until = True, None
        return True

    def let_go(self) -> None:
        """It may begin work again. Idempotent."""
        with self._changed:
            self._held = False
            if self._queue:
                self._changed.notify_all()

    def collect(self) -> list[Ticket]:
        if not self._done:
            return []
        # The pipe first: what is done after this writes to it again.
        with suppress(BlockingIOError):
            while os.read(self._read, 4096):
                pass
        done = []
        while self._done:
            done.append(self._done.popleft())
        return done

    def close(self) -> None:
        """End the thread once its present work is done; what waits is dropped. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._queue = Queue()
            self._changed.notify()
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while (ticket := self._next()) is None and not self._closed:
                    self._changed.wait()
                self._working = ticket is not None
            if ticket is None:
                return
            ticket.do()
            self._done.append(ticket)
            with self._changed:
                self._working = False
                self._finished += 1
                self._changed.notify_all()
            # A full pipe is readable already.
            with suppress(BlockingIOError):
                os.write(self._write, b"!")

    def _next(self) -> Ticket | None:
        """Work that may begin now."""
        if self._held or (self._until is not None and self._finished >= self._until):
            return None
        return self._queue.take()
