"""What each tenant has in use at the gateway, against its limits. No I/O.

A place is taken before the thing that it stands for exists and given back when that is gone, by the
same owner: connections by the server, uploads by the connection's uploads, runs, the bytes that wait
with them and the bytes of their output that is kept (``collected``) by the run manager.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from realm.buckets import Bucket
from realm.errors import RealmError
from realm.limits import TenantLimits, effective, over_limit

MINUTE = 60.0
RETRY_SECONDS = 1.0
"""When a place may be free again; nobody knows better."""
MESSAGE_BYTES = 64
"""What something that waits counts for beside its bytes, so that many empty ones are bounded, too."""


class TenantUse:
    """One tenant's limits and counters."""

    __slots__ = (
        "_clock",
        "_requests",
        "_tokens_until",
        "_tokens_used",
        "collected",
        "connections",
        "limits",
        "running",
        "tenant",
        "uploads",
        "waiting",
        "waiting_bytes",
    )

    def __init__(self, tenant: str, limits: TenantLimits, clock: Callable[[], float]) -> None:
        self.tenant = tenant
        self.limits = limits
        self.connections = 0
        self.uploads = 0
        self.running = 0
        self.waiting = 0
        self.waiting_bytes = 0
        self.collected = 0
        self._tokens_until = 0.0
        self._tokens_used = 0
        self._clock = clock
        most = limits.requests_per_minute
        self._requests = Bucket(most / MINUTE, most, clock())

    def change(self, limits: TenantLimits) -> None:
        """New limits count for what is taken from now on."""
        if limits.tokens_per_minute != self.limits.tokens_per_minute:
            self._tokens_until = 0.0
        self.limits = limits
        most = limits.requests_per_minute
        self._requests.change(most / MINUTE, most, self._clock())

    def request(self) -> None:
        """Count a call. Raises RealmError ``rate_limited`` (``requests_per_minute``)."""
        now = self._clock()
        if self._requests.take(1, now):
            return
        limit = self.limits.requests_per_minute
        wait = min(self._requests.wait(1, now), MINUTE)
        used = int(self._requests.used(now))
        raise over_limit("requests_per_minute", limit, used, "too many calls", retry_after=round(max(wait, 0.001), 3))

    def connect(self) -> None:
        """Take a connection's place. Raises RealmError ``rate_limited`` (``connections``)."""
        limit = self.limits.connections
        if self.connections >= limit:
            raise over_limit("connections", limit, self.connections, "too many connections", retry_after=RETRY_SECONDS)
        self.connections += 1

    def disconnect(self) -> None:
        self.connections -= 1

    def begin_upload(self) -> None:
        """Take an upload's place. Raises RealmError ``rate_limited`` (``uploads``)."""
        limit = self.limits.uploads
        if self.uploads >= limit:
            raise over_limit(
                "uploads", limit, self.uploads, "commit or abort an upload first", retry_after=RETRY_SECONDS
            )
        self.uploads += 1

    def end_upload(self) -> None:
        self.uploads -= 1

    def wait(self, size: int, most: int, *, spare: int = 0) -> None:
        """Take a waiting run's place, with ``size`` bytes of input; all of a tenant's may have ``most``.

        ``spare`` places are there beside those for waiting.

        Raises:
            RealmError: ``rate_limited`` (``waiting_guests``), or ``busy`` for the bytes.
        """
        limit = self.limits.waiting_guests
        if self.waiting >= limit + spare:
            raise over_limit(
                "waiting_guests", limit, self.waiting, "too many runs wait for a place", retry_after=RETRY_SECONDS
            )
        self.hold(size, most)
        self.waiting += 1

    def hold(self, size: int, most: int) -> None:
        """Count bytes that a waiting run keeps here. Raises RealmError ``busy``."""
        size += MESSAGE_BYTES
        if self.waiting_bytes + size > most:
            raise RealmError(
                "busy",
                f"the input of this tenant's waiting runs has {self.waiting_bytes:,} of {most:,} bytes",
                details={"limit": most, "used": self.waiting_bytes},
                retry_after=RETRY_SECONDS,
            )
        self.waiting_bytes += size

    def end_wait(self, held: int) -> None:
        """Give a waiting run's place back; ``held`` is what it held, :data:`MESSAGE_BYTES` each time included."""
        self.waiting -= 1
        self.waiting_bytes -= held

    def tokens_refused(self, used: int, seconds: float) -> None:
        """The engine has refused this tenant's tokens: refuse its runs for as long (a minute at most)."""
        self._tokens_until = self._clock() + min(max(seconds, 0.0), MINUTE)
        self._tokens_used = used

    def check_tokens(self) -> None:
        """Raises RealmError ``rate_limited`` (``tokens_per_minute``) while the engine would refuse."""
        if not self._tokens_until:
            return
        left = self._tokens_until - self._clock()
        if left <= 0:
            self._tokens_until = 0.0
            return
        limit = self.limits.tokens_per_minute
        used = max(self._tokens_used, limit)
        raise over_limit("tokens_per_minute", limit, used, "too many tokens", retry_after=round(max(left, 0.001), 3))

    def requests_used(self) -> int:
        """Calls that count against ``requests_per_minute`` now."""
        return round(self._requests.used(self._clock()))

    @property
    def idle(self) -> bool:
        """Whether nothing is in use."""
        return not (self.connections or self.uploads or self.running or self.waiting)


class Quotas:
    """All tenants' use. ``defaults`` and ``chosen`` are what the operator has set (limit names to values)."""

    def __init__(
        self,
        defaults: Mapping[str, int] | None = None,
        chosen: Mapping[str, Mapping[str, int]] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._defaults = dict(defaults or {})
        self._chosen = {tenant: dict(values) for tenant, values in (chosen or {}).items()}
        self._tenants: dict[str, TenantUse] = {}

    def of(self, tenant: str) -> TenantUse:
        """The tenant's entry, the same object each time."""
        use = self._tenants.get(tenant)
        if use is None:
            use = self._tenants[tenant] = TenantUse(tenant, self.limits(tenant), self._clock)
        return use

    def limits(self, tenant: str | None) -> TenantLimits:
        """The limits that count for a tenant; None is one without values of its own."""
        return effective(self._defaults, self._chosen.get(tenant, {}) if tenant is not None else {})

    def source(self, tenant: str | None, name: str) -> str:
        """Where a limit's value comes from: ``tenant``, ``default`` or ``built-in``."""
        if tenant is not None and name in self._chosen.get(tenant, {}):
            return "tenant"
        return "default" if name in self._defaults else "built-in"

    @property
    def chosen(self) -> Mapping[str, Mapping[str, int]]:
        """Tenants with values of their own."""
        return self._chosen

    @property
    def defaults(self) -> Mapping[str, int]:
        """Values set for all tenants."""
        return self._defaults

    def set_defaults(self, values: Mapping[str, int]) -> None:
        """Replace the values for all tenants. Raises RealmError ``invalid_params``; then nothing has changed."""
        effective(values)
        self._defaults = dict(values)
        for use in self._tenants.values():
            use.change(self.limits(use.tenant))

    def set_tenant(self, tenant: str, values: Mapping[str, int]) -> None:
        """Replace one tenant's own values. Raises RealmError ``invalid_params``; then nothing has changed."""
        effective(values)
        self._chosen[tenant] = dict(values)
        use = self._tenants.get(tenant)
        if use is not None:
            use.change(self.limits(tenant))

    @property
    def known(self) -> list[str]:
        """Tenants that have been asked for."""
        return list(self._tenants)

    @property
    def in_use(self) -> list[TenantUse]:
        """Tenants that have anything in use."""
        return [use for use in self._tenants.values() if not use.idle]
