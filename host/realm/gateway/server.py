"""The listening socket: who gets in, and what all connections together may hold."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
import time

from realm.gateway.admission import Admission
from realm.gateway.backoff import Backoff, client_address
from realm.gateway.connection import CLOSE_SECONDS, Connection
from realm.gateway.gateway import Gateway
from realm.gateway.pacing import Refusals, Turns
from realm.gateway.session import CLOSE_TRY_LATER
from realm.settings import GatewayLimits

log = logging.getLogger("realm.gateway")

_SWEEP_SECONDS = 1.0
_CLOSE_DRAIN = 1001
_BACKLOG = 1024
_ACCEPTS = 64
"""Sockets accepted in one turn of the loop."""
_ACCEPT_PAUSE = 0.5
"""Seconds without accepting when the process has no descriptor left."""
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Entrance:
    """What connections share: places, turns, and the memory of who misbehaved. ``authenticated`` is counted."""

    def __init__(self, limits: GatewayLimits, loop: asyncio.AbstractEventLoop) -> None:
        self.newcomers: Admission[Connection] = Admission(limits)
        self.backoff = Backoff(limits)
        self.turns = Turns(loop.call_soon)
        self.refusals = Refusals(limits)
        self.authenticated = 0


class ClientServer:
    """Listens for clients. ``port`` is the real one once :meth:`open` has returned."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._listener: socket.socket | None = None
        self._tls: ssl.SSLContext | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._accept_again: asyncio.TimerHandle | None = None
        self._accepting: set[asyncio.Task[None]] = set()
        self.entrance = Entrance(gateway.limits, asyncio.get_running_loop())
        self.port = 0

    async def open(self, address: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a bound TCP socket; the server owns it from now on."""
        self._tls = tls
        self._listener = address
        address.setblocking(False)
        address.listen(_BACKLOG)
        self.port = address.getsockname()[1]
        # Not asyncio's own server: that tells nobody of sockets whose TLS handshake never ends.
        self._listen()
        self._sweep()

    async def close(self, grace: float = 1.0) -> None:
        """Stop listening, close all connections with 1001 and cut those that do not answer in ``grace`` seconds."""
        for timer in (self._timer, self._accept_again):
            if timer is not None:
                timer.cancel()
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for task in list(self._accepting):
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        connections = self._gateway.connections
        for connection in list(connections):
            connection.close(_CLOSE_DRAIN, "the host is shutting down")
        if connections:
            self._gateway.no_connections.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gateway.no_connections.wait(), grace)
        for connection in list(connections):
            connection.abort()
        # One turn, so that the transports report their end.
        await asyncio.sleep(0)

    # --- accepting ------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._accept_again = None
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        listener = self._listener
        assert listener is not None
        for _ in range(_ACCEPTS):
            try:
                client, peer = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    raise
                log.error("no connection can be accepted: %s", error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                self._accept_again = loop.call_later(_ACCEPT_PAUSE, self._listen)
                return
            self._receive(client, client_address(peer))

    def _receive(self, client: socket.socket, address: str) -> None:
        newcomers, now = self.entrance.newcomers, time.monotonic()
        has_place, leaving = newcomers.room(address, now)
        if leaving is not None:
            leaving.abort()
        if not has_place:
            client.close()
            return
        client.setblocking(False)
        connection = Connection(self._gateway, self.entrance, address)
        newcomers.enter(connection, address, now)
        task = asyncio.get_running_loop().create_task(self._connect(client, connection))
        connection.accepting = task
        self._accepting.add(task)
        task.add_done_callback(lambda task: self._connected(task, client, connection))

    async def _connect(self, client: socket.socket, connection: Connection) -> None:
        tls = self._tls
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: connection,
            client,
            ssl=tls,
            ssl_handshake_timeout=self._gateway.limits.auth_seconds if tls else None,
            ssl_shutdown_timeout=CLOSE_SECONDS if tls else None,
        )

    def _connected(self, task: asyncio.Task[None], client: socket.socket, connection: Connection) -> None:
        self._accepting.discard(task)
        connection.accepting = None
        if task.cancelled():
            client.close()
            self.entrance.newcomers.leave(connection)
            return
        error = task.exception()
        if error is not None:
            # A handshake that failed or took too long: `connection_made` has not been called.
            self.entrance.newcomers.leave(connection)
            if not isinstance(error, OSError):
                log.error("a connection could not be set up", exc_info=error)

    # --- each second ----------------------------------------------------------------------------

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._gateway.connections):
            connection.sweep(now)
        self._bound_buffers()
        self.entrance.refusals.forget(asyncio.get_running_loop().time())
        self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def _bound_buffers(self) -> None:
        """Close the largest connections of tenants that make the gateway hold too much."""
        limits = self._gateway.limits
        tenants: dict[str, list[tuple[int, Connection]]] = {}
        sums: dict[str, int] = {}
        for connection in self._gateway.connections:
            size = 0 if connection.closing else connection.buffered
            if size:
                tenants.setdefault(connection.tenant, []).append((size, connection))
                sums[connection.tenant] = sums.get(connection.tenant, 0) + size
        total = sum(sums.values())
        while sums:
            tenant = max(sums, key=sums.__getitem__)
            if sums[tenant] <= limits.tenant_buffer_bytes and total <= limits.buffer_bytes:
                return
            held = tenants[tenant]
            largest = max(held, key=lambda pair: pair[0])
            held.remove(largest)
            size, connection = largest
            sums[tenant] -= size
            total -= size
            if not held:
                del sums[tenant]
            connection.close_soon(CLOSE_TRY_LATER, "this tenant's connections hold too much unread or unsent")
