"""Which operation of the registry is next: nobody's thousand operations delay another's one.

Urgent ones (log-ins) go first. Else each tenant has a queue of its own, and each queue has its turn. An
operation on the whole registry, of no tenant, comes after all that were queued before it.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """Filled by any thread, emptied by one. A tenant's operations keep their order."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._urgent: deque[T] = deque()
        self._queues: dict[str | None, deque[tuple[int, T]]] = {}
        self._turns: deque[str | None] = deque()
        self._count = 0
        self._closed = False

    def put(self, operation: T, tenant: str | None, *, urgent: bool = False) -> None:
        """Queue an operation of a tenant, or (None) one on the whole registry."""
        with self._changed:
            self._count += 1
            if urgent:
                self._urgent.append(operation)
            elif (queue := self._queues.get(tenant)) is not None:
                queue.append((self._count, operation))
            else:
                self._queues[tenant] = deque([(self._count, operation)])
                self._turns.append(tenant)
            self._changed.notify()

    def close(self) -> None:
        """What is queued is still given out; then :meth:`take` waits no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, *, wait: bool) -> T | None:
        """The next operation. None: there is none now, or (if it may wait) there will be none."""
        with self._changed:
            while not self._urgent and not self._turns:
                if self._closed or not wait:
                    return None
                self._changed.wait()
            if self._urgent:
                return self._urgent.popleft()
            tenant = self._turns.popleft()
            if tenant is None and self._is_early():
                self._turns.append(None)
                tenant = self._turns.popleft()
            queue = self._queues[tenant]
            _, operation = queue.popleft()
            if queue:
                self._turns.append(tenant)
            else:
                del self._queues[tenant]
            return operation

    def _is_early(self) -> bool:
        """An operation that was queued before the next one on the whole registry still waits."""
        number = self._queues[None][0][0]
        return any(queue[0][0] < number for queue in self._queues.values())
