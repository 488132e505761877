"""All tenants of an engine by name, and the limits that the gateway sets for them.

The gateway says what a tenant may take (:class:`realm.messages.TenantQuota`); whom it has not named,
and everybody before it has spoken, gets the default. The clock is the caller's.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice

from realm.engine.kv_cache import root_key
from realm.engine.sequence import Tenant
from realm.limits import TenantLimits
from realm.messages import TenantQuota, TenantStats

MAX_TENANTS = 16_384
"""Tenants known at a time. Beyond it one that holds nothing is forgotten, so invented names fill nothing."""

MAX_NAME = 256
"""Longest name of a tenant or of a saved sequence, in characters."""


class Tenants:
    """All tenants, found by name."""

    def __init__(self, model: str, *, secret: bytes | None = None) -> None:
        """``secret`` salts the tenants' keys; new for each engine unless a test gives it."""
        self._model = model
        self._secret = secret or secrets.token_bytes(32)
        self._tenants: dict[str, Tenant] = {}
        limits = TenantLimits()
        self._default = TenantQuota("", limits.kv_pages, limits.tokens_per_minute, limits.saved_sequences)
        self._quotas: dict[str, TenantQuota] = {}
        self.forgotten = TenantStats()

    def __iter__(self) -> Iterator[Tenant]:
        return iter(self._tenants.values())

    def of(self, name: str) -> Tenant | None:
        """The tenant's account; None for a name that is too long or when too many are in use."""
        tenant = self._tenants.get(name)
        if tenant is None and len(name) <= MAX_NAME and self._make_room():
            salt = hashlib.blake2b(name.encode(), key=self._secret, digest_size=32).digest()
            quota = self._quotas.get(name, self._default)
            tenant = self._tenants[name] = Tenant(name, root_key(salt, self._model, ""), quota)
        return tenant

    def find(self, name: str) -> Tenant | None:
        """The account of a tenant that is known already."""
        return self._tenants.get(name)

    def _make_room(self) -> bool:
        if len(self._tenants) < MAX_TENANTS:
            return True
        # The first ones are the oldest; those in use go to the end, so the next search begins elsewhere.
        for name, tenant in list(islice(self._tenants.items(), 64)):
            del self._tenants[name]
            if tenant.unused:
                self.forgotten.prefill_tokens += tenant.stats.prefill_tokens
                self.forgotten.decode_tokens += tenant.stats.decode_tokens
                self.forgotten.cached_tokens += tenant.stats.cached_tokens
                self.forgotten.ahead_tokens += tenant.stats.ahead_tokens
                self.forgotten.wasted_tokens += tenant.stats.wasted_tokens
                return True
            self._tenants[name] = tenant
        return False

    def set_quota(self, quota: TenantQuota, now: float) -> Iterable[Tenant]:
        """Set what a tenant (or, with the name "", everybody not named) may take; returns whom it concerns."""
        if not quota.tenant:
            self._default = quota
            concerned = [tenant for tenant in self if tenant.name not in self._quotas]
        else:
            self._quotas[quota.tenant] = quota
            known = self._tenants.get(quota.tenant)
            concerned = [] if known is None else [known]
        for tenant in concerned:
            tenant.change(quota, now)
        return concerned

    def drop_full_buckets(self, now: float) -> None:
        """Forget the buckets of tenants that have used nothing in the last minute."""
        for tenant in self:
            bucket = tenant.bucket
            if bucket is not None and bucket.level(now) >= bucket.burst:
                tenant.bucket = None

    def stats(self, now: float) -> dict[str, TenantStats]:
        """Each tenant's counters, with what it holds now."""
        self.drop_full_buckets(now)
        for tenant in self:
            stats = tenant.stats
            stats.pages, stats.sequences, stats.saved = tenant.used, tenant.open, len(tenant.saved)
            stats.minute_tokens = 0 if tenant.bucket is None else math.ceil(tenant.bucket.used(now))
        return {tenant.name: tenant.stats for tenant in self}
