"""What the protocol's functions of adapters do; see :mod:`realm.gateway.functions`.

The tenant is always the one of the connection's key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from realm.gateway import protocol as p
from realm.gateway.calls import Call
from realm.limits import over_limit
from realm.registry.records import AdapterRecord

if TYPE_CHECKING:
    from realm.gateway.functions import Caller, Handler
    from realm.gateway.gateway import Gateway


class AdapterCalls:
    """Handlers of the functions ``adapters.*``."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.handlers: dict[str, Handler] = {
            "adapters.begin": self.begin,
            "adapters.commit": self.commit,
            "adapters.abort": self.abort,
            "adapters.list": self.list,
            "adapters.show": self.show,
            "adapters.pin": self.pin,
            "adapters.share": self.share,
            "adapters.remove": self.remove,
        }

    async def begin(self, caller: Caller, call: Call, params: p.BeginAdapterParams) -> dict[str, Any]:
        gateway, tenant = self._gateway, caller.principal.tenant
        sha256, size, config = params.sha256, params.size, bytes(params.config)
        gateway.check_model(params.model)
        await gateway.adapters.check_config(tenant, config)
        most = gateway.quotas.of(tenant).limits.adapter_bytes
        if size > most:
            text = f"an adapter of {size:,} bytes is too large"
            raise over_limit("adapter_bytes", most, size, text, code="adapter_too_large")
        known = await gateway.adapters.check_stored(tenant, params.name, sha256, size)
        # A wrong size beside a known hash is let through to the upload, where it fails like any other.
        upload = caller.uploads.begin(params.name, size, sha256, stored=known == size, kind="adapter", config=config)
        return {"upload": upload.number, "received": upload.received, "exists": upload.stored}

    async def commit(self, caller: Caller, call: Call, params: p.UploadParams) -> dict[str, Any]:
        tenant = caller.principal.tenant
        upload, file = caller.uploads.take(params.upload, "adapter")
        try:
            record = await self._gateway.adapters.commit(tenant, upload, file)
        finally:
            caller.uploads.end(params.upload)
        # The engine has taken the news in when it has answered: a run that follows finds the adapter.
        return await self._described(tenant, record)

    def abort(self, caller: Caller, call: Call, params: p.UploadParams) -> dict[str, Any]:
        caller.uploads.abort(params.upload, "adapter")
        return {}

    async def list(self, caller: Caller, call: Call, params: p.NoParams) -> dict[str, Any]:
        adapters, tenant = self._gateway.adapters, caller.principal.tenant
        return {"adapters": await adapters.describe(tenant, adapters.book.visible(tenant))}

    async def show(self, caller: Caller, call: Call, params: p.AdapterParams) -> dict[str, Any]:
        tenant = caller.principal.tenant
        return await self._described(tenant, self._gateway.adapters.book.find(tenant, params.name))

    async def pin(self, caller: Caller, call: Call, params: p.PinParams) -> dict[str, Any]:
        tenant = caller.principal.tenant
        return await self._described(tenant, await self._gateway.adapters.pin(tenant, params.name, params.pinned))

    async def share(self, caller: Caller, call: Call, params: p.ShareParams) -> dict[str, Any]:
        tenant = caller.principal.tenant
        return await self._described(tenant, await self._gateway.adapters.share(tenant, params.name, params.shared))

    async def remove(self, caller: Caller, call: Call, params: p.AdapterParams) -> dict[str, Any]:
        await self._gateway.adapters.remove(caller.principal.tenant, params.name)
        return {}

    async def _described(self, tenant: str, record: AdapterRecord) -> dict[str, Any]:
        (data,) = await self._gateway.adapters.describe(tenant, [record])
        return data
