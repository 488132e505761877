"""Runs that wait for a place: first come, first served within a tenant, in turn over the tenants. No I/O.

A tenant is *ready* while it has waiting runs and is under its ``running_guests``. Only ready tenants
are looked at when a place becomes free, so the cost of that does not grow with how many wait.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from realm.gateway.quotas import TenantUse
from realm.gateway.run import Run


class WaitingRuns:
    """The queues. :meth:`settle` must follow every change of a tenant's running runs or limits."""

    def __init__(self) -> None:
        self._queues: dict[str, OrderedDict[int, Run]] = {}
        self._ready: OrderedDict[str, None] = OrderedDict()

    def add(self, run: Run, *, first: bool = False) -> None:
        """Queue a run, behind its tenant's others or (``first``) before them."""
        queue = self._queues.setdefault(run.tenant, OrderedDict())
        queue[run.number] = run
        if first:
            queue.move_to_end(run.number, last=False)
        self.settle(run.use)

    def remove(self, run: Run) -> None:
        """Forget a run; one that does not wait here is fine."""
        queue = self._queues.get(run.tenant)
        if queue is not None and queue.pop(run.number, None) is not None and not queue:
            del self._queues[run.tenant]
            self._ready.pop(run.tenant, None)

    def settle(self, use: TenantUse) -> None:
        """Note whether a tenant may start a run now; one that becomes ready is the last to have its turn."""
        if use.tenant in self._queues and use.running < use.limits.running_guests:
            self._ready.setdefault(use.tenant)
        else:
            self._ready.pop(use.tenant, None)

    def take(self) -> Run | None:
        """The next run to start, no longer waiting. Its tenant is ready again when it is settled."""
        if not self._ready:
            return None
        tenant, _ = self._ready.popitem(last=False)
        queue = self._queues[tenant]
        _, run = queue.popitem(last=False)
        if not queue:
            del self._queues[tenant]
        return run

    def has(self, tenant: str) -> bool:
        """Whether a tenant's runs wait."""
        return tenant in self._queues

    @property
    def any_ready(self) -> bool:
        """Whether only room in a worker is missing."""
        return bool(self._ready)

    def __iter__(self) -> Iterator[Run]:
        for queue in self._queues.values():
            yield from queue.values()

    def __bool__(self) -> bool:
        return bool(self._queues)
