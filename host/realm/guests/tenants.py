"""Whose guest runs next: fair between tenants, and within each tenant's fuel rate.

Guests that may run wait in one of four places:

* ``WOKEN``: the engine or the helper answered them. Most need a few microseconds to call again.
* ``LONG``: woken ones that needed more than a slice; they may have a few more before the others.
* ``READY``: started, or answered by the store, the client or a time-out.
* ``SPINNING``: they only compute.

In each place the tenants take turns, and within a tenant the guests do. What a tenant's guests burn
is paid from its :class:`~realm.buckets.Bucket`; while that is in debt its guests stay where they are,
woken ones too, and are not looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from realm.buckets import Bucket
from realm.guests.fiber_types import FUEL_SLICE
from realm.guests.run import GuestRun
from realm.limits import TenantLimits

WOKEN, LONG, READY, SPINNING = range(4)
BURST_SECONDS = 0.5
"""How much of its rate a tenant may burn at once."""
RELEASE_SECONDS = 0.005
"""How much of its rate it must have again before it goes on; else it would stop after each slice."""
LONGEST_HOLD = 60.0
"""After this time in seconds it is looked at again, whatever its rate."""
KEEP_SECONDS = 10.0
"""A tenant without runs is forgotten after this time, once its bucket is full again."""
DEFAULT_RATE = float(TenantLimits().fuel_per_second)


class Tenant:
    """One tenant in this worker.

    Attributes:
        runs: its runs that have not ended.
        inbox_bytes: what the inboxes of all its runs hold.
        queues: its guests that may run, one queue a place.
        throttled_at: since when its guests are held back, or None. release_at: until when.
    """

    __slots__ = ("bucket", "idle_since", "inbox_bytes", "name", "queues", "release_at", "runs", "throttled_at")

    def __init__(self, name: str, rate: float, now: float) -> None:
        self.name = name
        self.runs = 0
        self.inbox_bytes = 0
        self.bucket = Bucket(rate, rate * BURST_SECONDS, now)
        self.queues: tuple[deque[GuestRun], ...] = (deque(), deque(), deque(), deque())
        self.throttled_at: float | None = None
        self.release_at = 0.0
        self.idle_since = now


def _let_go(run: GuestRun, now: float) -> None:
    """The guest is held back no longer: count for how long it was."""
    if run.held_since is not None:
        run.usage.throttled_seconds += max(0.0, now - run.held_since)
        run.held_since = None


class Rotation:
    """The tenants that have guests in one place and may run; the first is next."""

    __slots__ = ("place", "tenants")

    def __init__(self, place: int) -> None:
        self.place = place
        self.tenants: deque[Tenant] = deque()

    def __bool__(self) -> bool:
        return bool(self.tenants)

    def push(self, run: GuestRun) -> None:
        """Put a guest at its tenant's end."""
        run.place = self.place
        tenant = run.tenant
        queue = tenant.queues[self.place]
        if tenant.throttled_at is not None:
            run.held_since = run.runtime.clock()
        elif not queue:
            self.tenants.append(tenant)
        queue.append(run)

    def pop(self) -> GuestRun:
        """The next guest of the next tenant, whose turn is then over."""
        tenant = self.tenants.popleft()
        queue = tenant.queues[self.place]
        run = queue.popleft()
        run.place = -1
        if queue:
            self.tenants.append(tenant)
        return run


class Schedule:
    """All tenants of a worker and their guests that may run."""

    def __init__(self) -> None:
        self.places = tuple(Rotation(place) for place in (WOKEN, LONG, READY, SPINNING))
        self.woken, self.long, self.ready, self.spinning = self.places
        self._tenants: dict[str, Tenant] = {}
        self._throttled: dict[str, Tenant] = {}
        self._forget_at = 0.0

    # --- tenants ----------------------------------------------------------------------------------

    def enter(self, name: str, now: float) -> Tenant:
        """A run of the tenant begins."""
        tenant = self._tenant(name, DEFAULT_RATE, now)
        tenant.runs += 1
        return tenant

    def leave(self, run: GuestRun, now: float) -> None:
        """The run has ended: it waits nowhere any more."""
        tenant = run.tenant
        self.remove(run)
        _let_go(run, now)
        tenant.runs -= 1
        tenant.idle_since = now

    def share(self, name: str, rate: float, now: float) -> None:
        """From now on the tenant may burn ``rate`` units of fuel a second here."""
        tenant = self._tenant(name, rate, now)
        if tenant.bucket.rate != rate:
            tenant.bucket.change(rate, rate * BURST_SECONDS, now)
            if tenant.throttled_at is not None:
                self._hold_until(tenant, now)

    def forget(self, now: float) -> None:
        """Drop the tenants that have had no run for a while and owe nothing."""
        for name, tenant in list(self._tenants.items()):
            idle = not tenant.runs and now - tenant.idle_since >= KEEP_SECONDS
            if idle and tenant.bucket.used(now) <= 0:
                self._throttled.pop(name, None)
                del self._tenants[name]

    def _tenant(self, name: str, rate: float, now: float) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            if now >= self._forget_at:
                self._forget_at = now + KEEP_SECONDS
                self.forget(now)
            tenant = self._tenants[name] = Tenant(name, rate, now)
        return tenant

    @property
    def tenants(self) -> Iterator[Tenant]:
        yield from self._tenants.values()

    # --- queues -----------------------------------------------------------------------------------

    def push(self, run: GuestRun, place: int) -> None:
        """A guest may run, unless it waits for that already."""
        if run.place < 0:
            self.places[place].push(run)

    def remove(self, run: GuestRun) -> None:
        if run.place < 0:
            return
        rotation, tenant = self.places[run.place], run.tenant
        queue = tenant.queues[run.place]
        queue.remove(run)
        run.place = -1
        if not queue and tenant.throttled_at is None:
            rotation.tenants.remove(tenant)

    @property
    def runnable(self) -> bool:
        """Some guest may run now."""
        return bool(self.woken.tenants or self.long.tenants or self.ready.tenants or self.spinning.tenants)

    # --- fuel -------------------------------------------------------------------------------------

    def may_run(self, tenant: Tenant, now: float) -> bool:
        """Whether the tenant's fuel allows its guests to run; if not, they are put aside for a while."""
        if tenant.bucket.level(now) > 0:
            return True
        tenant.throttled_at = now
        self._throttled[tenant.name] = tenant
        self._hold_until(tenant, now)
        for rotation in self.places:
            queue = tenant.queues[rotation.place]
            if queue:
                rotation.tenants.remove(tenant)
            for run in queue:
                run.held_since = now
        return False

    def _hold_until(self, tenant: Tenant, now: float) -> None:
        bucket = tenant.bucket
        # Half a burst at most, so that a rate of less than a slice is reached at all.
        wanted = max(1.0, min(bucket.burst / 2, max(FUEL_SLICE, bucket.rate * RELEASE_SECONDS)))
        tenant.release_at = now + min(bucket.wait(wanted, now), LONGEST_HOLD)

    def release(self, now: float) -> None:
        """Let those run on whose time has come."""
        if not self._throttled:
            return
        for tenant in [t for t in self._throttled.values() if t.release_at <= now]:
            del self._throttled[tenant.name]
            tenant.throttled_at = None
            for rotation in self.places:
                queue = tenant.queues[rotation.place]
                if queue:
                    rotation.tenants.append(tenant)
                for run in queue:
                    _let_go(run, now)

    @property
    def next_release(self) -> float | None:
        """When the first held-back guest may go on; None if none waits."""
        if not self._throttled:
            return None
        return min((t.release_at for t in self._throttled.values() if any(t.queues)), default=None)

    # --- for tests --------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless every queue and every tenant is where it belongs."""
        for tenant in self._tenants.values():
            for rotation in self.places:
                queue = tenant.queues[rotation.place]
                assert all(run.place == rotation.place and run.tenant is tenant for run in queue)
                wanted = int(bool(queue) and tenant.throttled_at is None)
                assert rotation.tenants.count(tenant) == wanted, "a tenant is not in its place"
            assert tenant.runs or not any(tenant.queues), "a guest waits whose run has ended"
            assert (tenant.throttled_at is not None) == (tenant.name in self._throttled)
        for rotation in self.places:
            assert all(self._tenants.get(tenant.name) is tenant for tenant in rotation.tenants)
