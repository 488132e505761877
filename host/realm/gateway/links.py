"""The gateway's ends of the links to workers and engine: :mod:`realm.channel` frames on asyncio.

Messages sent in one turn of the loop leave in one write, and nothing here makes a task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

from realm.channel import FrameBuffer, frame
from realm.errors import RealmError
from realm.limits import TenantLimits
from realm.messages import (
    AdapterFile,
    AdapterGone,
    AdaptersRequest,
    AdapterState,
    AdapterStates,
    EngineReady,
    EngineStats,
    EngineToGateway,
    GatewayHello,
    StatsRequest,
    TenantQuota,
    WorkerLost,
)

log = logging.getLogger("realm.gateway")

T = TypeVar("T")
_encode = msgspec.msgpack.Encoder().encode


class Link(asyncio.Protocol, Generic[T]):
    """One link. ``receives`` is the union that the other end may send; anything else closes it."""

    def __init__(
        self,
        receives: Any,
        *,
        on_message: Callable[[Link[T], T], None],
        on_closed: Callable[[Link[T]], None],
        on_open: Callable[[Link[T]], None] | None = None,
        on_drained: Callable[[Link[T]], None] | None = None,
    ) -> None:
        """``on_drained`` is called when the other end has caught up after it was behind."""
        self._decoder = msgspec.msgpack.Decoder(receives)
        self._buffer = FrameBuffer()
        self._on_message = on_message
        self._on_closed = on_closed
        self._on_open = on_open
        self._on_drained = on_drained
        self._transport: asyncio.Transport | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._loop = asyncio.get_running_loop()

    def send(self, message: Any) -> None:
        """Queue a message; one to a closed link is dropped, because its end is reported anyway."""
        if self._transport is None:
            return
        if not self._pending:
            self._loop.call_soon(self._flush)
        data = frame(_encode(message))
        self._pending.append(data)
        self._pending_bytes += len(data)

    def unsent(self) -> int:
        """Bytes that the other end has not taken yet."""
        if self._transport is None:
            return 0
        return self._pending_bytes + self._transport.get_write_buffer_size()

    def close(self) -> None:
        """Send what is queued, then close."""
        if self._transport is not None:
            self._flush()
            self._transport.close()

    # --- asyncio --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._on_open is not None:
            self._on_open(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._buffer.feed(data)
            while self._transport is not None and (payload := self._buffer.pop()) is not None:
                self._on_message(self, self._decoder.decode(payload))
        except (ValueError, RecursionError, msgspec.MsgspecError):
            log.exception("a process of the host sent a frame that is not ours; closing its link")
            if self._transport is not None:
                self._transport.abort()

    def resume_writing(self) -> None:
        if self._on_drained is not None:
            self._on_drained(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pending.clear()
        self._pending_bytes = 0
        self._on_closed(self)

    def _flush(self) -> None:
        if self._transport is not None and self._pending:
            data = b"".join(self._pending)
            self._pending.clear()
            self._pending_bytes = 0
            self._transport.write(data)


class EngineClient:
    """The gateway's link to one engine process. ``lost`` is set when that is gone."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._link: Link[Any] | None = None
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next = 1

    async def connect(self, path: str, pid: int) -> None:
        """Connect to the engine's socket and say hello. Raises OSError while it does not listen."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(
            lambda: Link[Any](EngineToGateway, on_message=self._received, on_closed=self._closed), path
        )
        self._link = link
        link.send(GatewayHello(pid))

    async def stats(self, patience: float = 5.0) -> EngineStats:
        """The engine's counters. It answers between two steps.

        Raises:
            RealmError: ``engine_lost``.
        """
        stats = await self._ask(StatsRequest, patience)
        assert isinstance(stats, EngineStats)
        return stats

    async def adapters(self, tenant: str, patience: float = 5.0) -> dict[str, AdapterState]:
        """Where the engine has a tenant's adapters ("": the shared ones), by name.

        What was told before (:meth:`tell`) has been taken in when this answers.

        Raises:
            RealmError: ``engine_lost``.
        """
        states = await self._ask(lambda call: AdaptersRequest(call, tenant), patience)
        assert isinstance(states, AdapterStates)
        return {state.name: state for state in states.states}

    async def _ask(self, request: Callable[[int], Any], patience: float) -> EngineStats | AdapterStates:
        if self._link is None or self.lost.is_set():
            raise _engine_lost()
        call = self._next
        self._next += 1
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        self._link.send(request(call))
        try:
            return cast("EngineStats | AdapterStates", await asyncio.wait_for(future, patience))
        except TimeoutError:
            raise RealmError(
                "engine_lost", f"the engine did not answer in {patience:g} seconds", retry_after=1.0
            ) from None
        finally:
            self._calls.pop(call, None)

    def tell(self, change: AdapterFile | AdapterGone) -> None:
        """Tell the engine what an adapter's name stands for."""
        if self._link is not None:
            self._link.send(change)

    def worker_lost(self, worker: int) -> None:
        """Tell the engine to free what a dead worker owned."""
        if self._link is not None:
            self._link.send(WorkerLost(worker))

    def quota(self, tenant: str, limits: TenantLimits) -> None:
        """Tell the engine what a tenant may take; "" is everybody not named."""
        if self._link is not None:
            self._link.send(TenantQuota(tenant, limits.kv_pages, limits.tokens_per_minute, limits.saved_sequences))

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    def _received(self, link: Link[Any], message: EngineReady | EngineStats | AdapterStates) -> None:
        if isinstance(message, EngineReady):
            if not self.ready.done():
                self.ready.set_result(message)
            return
        future = self._calls.get(message.call)
        if future is not None and not future.done():
            future.set_result(message)

    def _closed(self, link: Link[Any]) -> None:
        self.lost.set()
        if not self.ready.done():
            self.ready.cancel()
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_engine_lost())


def _engine_lost() -> RealmError:
    return RealmError("engine_lost", "the engine is not up at the moment", retry_after=1.0)
