"""The operator's view of a tenant: every limit with its value, where that comes from, and what is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from realm.errors import RealmError
from realm.limits import LIMITS, effective
from realm.messages import TenantStats

if TYPE_CHECKING:
    from realm.gateway.gateway import Gateway


async def show_limits(gateway: Gateway, tenant: str | None) -> dict[str, Any]:
    """All limits of a tenant; of None, what counts for tenants without values of their own.

    Raises:
        RealmError: ``tenant_not_found``.
    """
    quotas = gateway.quotas
    used: Mapping[str, int] = {}
    shown: dict[str, Any] = {"name": tenant}
    if tenant is not None:
        record = await gateway.registry.run(lambda database: database.find_tenant(tenant), tenant=tenant)
        shown |= {"created": record.created, "keys": record.keys}
        used = await _used(gateway, tenant)
    limits = quotas.limits(tenant)
    shown["limits"] = [
        {
            "name": limit.name,
            "value": getattr(limits, limit.name),
            "unit": limit.unit,
            "from": quotas.source(tenant, limit.name),
            "used": used.get(limit.name),
            "doc": limit.doc,
        }
        for limit in LIMITS.values()
    ]
    return shown


async def set_limits(gateway: Gateway, tenant: str | None, changes: Mapping[str, int | None]) -> None:
    """Set a tenant's own values, or (None) the default of all; they count from now on.

    Raises:
        RealmError: ``invalid_params`` or ``tenant_not_found``; then nothing has changed.
    """
    # A name to be returned to the default must exist, too.
    effective({name: value for name, value in changes.items() if value is not None})
    effective({name: LIMITS[name].default if name in LIMITS else 0 for name in changes})
    await gateway.change_limits(tenant, changes)


async def _used(gateway: Gateway, tenant: str) -> dict[str, int]:
    use = gateway.quotas.of(tenant)
    stored = await gateway.registry.run(lambda database: database.stored(tenant), tenant=tenant)
    used = {
        "running_guests": use.running,
        "waiting_guests": use.waiting,
        "connections": use.connections,
        "uploads": use.uploads,
        "requests_per_minute": use.requests_used(),
        "stored_modules": stored.modules,
        "stored_bytes": stored.module_bytes,
        "store_bytes": stored.store_bytes,
        "stored_adapters": stored.adapters,
        "stored_adapter_bytes": stored.adapter_bytes,
        "pinned_adapters": stored.pinned,
    }
    try:
        if gateway.engine is None:
            return used
        stats = (await gateway.engine.stats()).tenants.get(tenant, TenantStats())
    except RealmError:
        # While the engine restarts, what it would know is left out.
        return used
    return used | {
        "kv_pages": stats.pages,
        "saved_sequences": stats.saved,
        "tokens_per_minute": stats.minute_tokens,
    }
