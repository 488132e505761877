"""The guests' key-value store: between what workers ask and the registry."""

from __future__ import annotations

import asyncio
from typing import Any

from realm.errors import RealmError
from realm.gateway.invoking import internal_error
from realm.gateway.quotas import Quotas
from realm.gateway.run import Worker
from realm.guests.abi import ErrorCode
from realm.messages import LimitMet
from realm.registry.thread import Registry
from realm.run_messages import StoreGet, StoreReply, StoreSet


class GuestStore:
    """Answers each request with one :class:`StoreReply`. ``value_bytes`` bounds one value."""

    def __init__(self, registry: Registry, quotas: Quotas, value_bytes: int) -> None:
        self._registry = registry
        self._quotas = quotas
        self._value_bytes = value_bytes

    def request(self, worker: Worker, tenant: str, request: StoreGet | StoreSet) -> None:
        """Look up or keep a value of a tenant, and tell the worker."""
        call, key = request.call, request.key
        future: asyncio.Future[Any]
        if isinstance(request, StoreGet):
            future = self._registry.run(lambda database: database.store_get(tenant, key), tenant=tenant)
        else:
            value = request.value
            if len(value) > self._value_bytes:
                message = f"a value of {len(value)} bytes is over {self._value_bytes}"
                worker.send(StoreReply(call, ErrorCode.LIMIT, message=message))
                return
            limit = self._quotas.of(tenant).limits.store_bytes
            future = self._registry.run(
                lambda database: database.store_set(tenant, key, value, limit=limit), tenant=tenant
            )

        def answer(done: asyncio.Future[Any]) -> None:
            if done.cancelled():
                return
            if (error := done.exception()) is not None:
                worker.send(_refusal(call, error))
            elif isinstance(request, StoreSet):
                worker.send(StoreReply(call, 0))
            else:
                found = done.result()
                worker.send(StoreReply(call, 0 if found is not None else ErrorCode.NOT_FOUND, found))

        future.add_done_callback(answer)


def _refusal(call: int, error: BaseException) -> StoreReply:
    if not isinstance(error, RealmError) or error.code != "limit_exceeded":
        correlation = internal_error("the guests' store", error).details["correlation"]
        message = f"the host failed; its log has the cause under {correlation}"
        return StoreReply(call, ErrorCode.INTERNAL, message=message)
    details = error.details
    met = LimitMet(details["name"], details["limit"], details["used"])
    return StoreReply(call, ErrorCode.LIMIT, message=error.message, limit=met)
