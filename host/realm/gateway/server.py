"""Sockets of clients: the websockets package's sans-I/O protocol under an asyncio shell.

The shell is ours, not the package's, for the sake of streams: frames of one turn of the loop leave
in one write, no coroutine or task is involved, and a connection that falls behind is known at once
(``pause_writing``), which is what guests' credit hangs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
import struct
import time
from collections.abc import Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import SEND_EOF
from websockets.protocol import State as SocketState
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from realm.errors import RealmError
from realm.gateway.calls import Call
from realm.gateway.functions import Caller
from realm.gateway.gateway import Gateway
from realm.gateway.protocol import PROTOCOL, encode, error_data
from realm.gateway.session import CLOSE_AUTH, Action, CheckKey, Chunk, Close, Invoke, Send, Session
from realm.gateway.uploads import Uploads
from realm.registry.database import Database
from realm.registry.records import Principal

log = logging.getLogger("realm.gateway")

# At DEBUG the package logs headers and frames: keys and prompts. So its level does not follow ours.
_wire_log = logging.getLogger("realm.gateway.wire")
_wire_log.setLevel(logging.WARNING)

_CLOSE_SECONDS = 5.0
"""How long a client may take to answer a close."""
_SWEEP_SECONDS = 1.0
_CLOSE_DRAIN = 1001


def text_frame(payload: bytes) -> bytes:
    """A whole unmasked text frame: what a server sends."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


def _select_subprotocol(protocol: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # Clients of the original protocol offer none, and ones of a later version more than ours.
    return Subprotocol(PROTOCOL) if PROTOCOL in offered else None


class Connection(asyncio.Protocol):
    """One client's socket."""

    def __init__(self, gateway: Gateway) -> None:
        limits = gateway.limits
        self._gateway = gateway
        self._loop = asyncio.get_running_loop()
        self._socket = ServerProtocol(
            select_subprotocol=_select_subprotocol, max_size=limits.frame_bytes, logger=_wire_log
        )
        self._session = Session(limits.calls)
        self._caller: Caller | None = None
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._parts: list[bytes] = []
        self._parts_opcode = Opcode.TEXT
        self._behind = False
        self._reading = True
        now = time.monotonic()
        self._auth_deadline = now + limits.auth_seconds
        self._heard = now
        self._pinged: float | None = None
        self._unsent_at_ping = 0
        self._closing_since: float | None = None

    # --- what calls use -------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        return self._behind

    def send(self, payload: bytes) -> None:
        """Queue a text frame; all that is queued in this turn of the loop leaves in one write."""
        if self._socket.state is not SocketState.OPEN:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(text_frame(payload))

    def call_finished(self, call: Call) -> None:
        self._session.finished(call.id)
        if self._caller is not None:
            self._caller.calls.pop(call.id, None)

    # --- what the gateway uses ------------------------------------------------------------------

    def revoked(self, key_id: str) -> None:
        """Close if this key opened the connection."""
        if self._caller is not None and self._caller.principal.key_id == key_id:
            self.close(CLOSE_AUTH, "the key was revoked")

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake: nothing further is read as a call, and runs end."""
        self._session.closed()
        self._end_calls()
        if self._socket.state is SocketState.OPEN:
            self._socket.send_close(code, reason)
            self._flush()
        elif self._transport is not None and self._socket.state is SocketState.CONNECTING:
            self._transport.abort()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def sweep(self, now: float) -> None:
        """Called each second: time-outs of authentication, silence and closing."""
        limits = self._gateway.limits
        if self._closing_since is not None:
            if now - self._closing_since > _CLOSE_SECONDS:
                self.abort()
            return
        if self._caller is None and now > self._auth_deadline:
            if self._socket.state is SocketState.CONNECTING:
                self.abort()
            else:
                self._act(self._session.timed_out())
            return
        if self._socket.state is not SocketState.OPEN:
            return
        assert self._transport is not None
        if self._pinged is None:
            if now - self._heard > limits.ping_seconds:
                self._pinged = now
                self._unsent_at_ping = self._transport.get_write_buffer_size()
                self._socket.send_ping(secrets.token_bytes(4))
                self._flush()
        elif now - self._pinged > limits.ping_seconds:
            unsent = self._transport.get_write_buffer_size()
            if unsent < self._unsent_at_ping:
                # A slow reader that takes something is alive, though our ping is still in the queue.
                self._pinged, self._unsent_at_ping = now, unsent
            else:
                log.info("a client has been silent for too long; cutting it")
                self.abort()

    # --- asyncio --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        # asyncio does this itself only for sockets made with an explicit protocol number. Without it a
        # second small message waits for the acknowledgement of the first: 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        limits = self._gateway.limits
        transport.set_write_buffer_limits(limits.write_high_bytes, limits.write_low_bytes)
        self._gateway.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        self._pinged = None
        self._socket.receive_data(data)
        self._events()

    def eof_received(self) -> None:
        self._socket.receive_eof()
        self._events()
        # A client that reads no more must not keep the socket for what is still unsent.
        self._closing_since = self._closing_since or time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        connections = self._gateway.connections
        connections.discard(self)
        if not connections:
            self._gateway.no_connections.set()
        self._session.closed()
        self._end_calls()
        self._out.clear()

    def pause_writing(self) -> None:
        self._behind = True

    def resume_writing(self) -> None:
        self._behind = False
        if self._caller is not None:
            self._gateway.runs.drained([call.run for call in self._caller.calls.values() if call.run is not None])
        if not self._reading and self._transport is not None:
            self._reading = True
            self._transport.resume_reading()

    # --- reading --------------------------------------------------------------------------------

    def _events(self) -> None:
        for event in self._socket.events_received():
            if isinstance(event, Request):
                self._handshake(event)
            elif isinstance(event, Frame):
                self._frame(event)
        if self._socket.state is not SocketState.OPEN and self._caller is not None:
            # The client says goodbye: its runs end now, not when the TCP connection does.
            self._session.closed()
            self._end_calls()
        self._flush()

    def _handshake(self, request: Request) -> None:
        websocket, gateway = self._socket, self._gateway
        if request.path.partition("?")[0] == "/healthz":
            websocket.send_response(_health(gateway))
            return
        if len(gateway.connections) > gateway.limits.connections:
            response = websocket.reject(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
            response.headers["Retry-After"] = "1"
        else:
            response = websocket.accept(request)
        websocket.send_response(response)
        self._flush()
        if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            self._act(self._session.opened(request.headers.get("Authorization")))

    def _frame(self, frame: Frame) -> None:
        opcode, data = frame.opcode, frame.data
        if opcode is Opcode.CONT:
            self._parts.append(bytes(data))
            if not frame.fin:
                return
            data, opcode = b"".join(self._parts), self._parts_opcode
            self._parts.clear()
        elif opcode is not Opcode.TEXT and opcode is not Opcode.BINARY:
            return
        elif not frame.fin:
            self._parts_opcode = opcode
            self._parts.append(bytes(data))
            return
        session = self._session
        self._act(session.text(bytes(data)) if opcode is Opcode.TEXT else session.binary(bytes(data)))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.send(action.payload)
                case Invoke():
                    self._invoke(action)
                case Chunk():
                    self._chunk(action)
                case CheckKey():
                    key = action.key
                    looked_up = self._gateway.registry.run(partial(Database.authenticate, key=key))
                    looked_up.add_done_callback(self._looked_up)
                case Close():
                    self.close(action.code, action.reason)

    def _looked_up(self, future: asyncio.Future[Principal | None]) -> None:
        if future.cancelled() or self._transport is None:
            return
        if future.exception() is not None:
            log.error("a key could not be looked up", exc_info=future.exception())
            self.close(1011, "the host failed; its log has the cause")
            return
        principal = future.result()
        if principal is not None:
            gateway = self._gateway
            self._caller = Caller(principal, Uploads(gateway.limits, gateway.registry.blobs.incoming))
        self._act(self._session.verified(principal))

    # --- calls ----------------------------------------------------------------------------------

    def _invoke(self, action: Invoke) -> None:
        caller = self._caller
        assert caller is not None
        call = Call(action.id, self)
        caller.calls[call.id] = call
        try:
            result = self._gateway.functions.handlers[action.function.name](caller, call, action.params)
            if asyncio.iscoroutine(result):
                call.task = self._loop.create_task(result)
                call.task.add_done_callback(lambda task: self._finish(call, action.function.name, task))
            elif result is not None:
                call.complete(result)
        except RealmError as error:
            call.fail(error)
        except Exception as error:
            call.fail(_internal(action.function.name, error))

    def _finish(self, call: Call, function: str, task: asyncio.Task[dict[str, Any] | None]) -> None:
        call.task = None
        if task.cancelled():
            # By `cancel`, or because the client is gone (then nothing is sent).
            call.cancelled({})
            return
        error = task.exception()
        if error is None:
            result = task.result()
            if result is not None:
                call.complete(result)
        elif isinstance(error, RealmError):
            call.fail(error)
        else:
            call.fail(_internal(function, error))

    def _chunk(self, chunk: Chunk) -> None:
        caller = self._caller
        assert caller is not None
        try:
            received = caller.uploads.chunk(chunk.upload, chunk.offset, chunk.data)
        except (RealmError, OSError) as cause:
            error = cause if isinstance(cause, RealmError) else _internal("upload", cause)
            self.send(encode({"type": "upload_error", "upload": chunk.upload, "error": error_data(error)}))
        else:
            self.send(b'{"type":"upload_ack","upload":%d,"received":%d}' % (chunk.upload, received))

    def _end_calls(self) -> None:
        caller, self._caller = self._caller, None
        if caller is None:
            return
        for call in list(caller.calls.values()):
            if call.run is not None:
                self._gateway.runs.abandon(call.run)
            elif call.task is not None:
                call.task.cancel()
        caller.uploads.close()

    # --- writing --------------------------------------------------------------------------------

    def _flush(self) -> None:
        transport = self._transport
        if transport is None:
            return
        writes = self._socket.data_to_send()
        if self._out:
            # Queued while the socket was open, so it all goes before a close frame.
            writes = self._out + writes
            self._out = []
        end = bool(writes) and writes[-1] is SEND_EOF
        data = b"".join(writes)
        if data:
            transport.write(data)
            if self._reading and transport.get_write_buffer_size() > self._gateway.limits.read_stop_bytes:
                self._reading = False
                transport.pause_reading()
        if end:
            if transport.can_write_eof():
                transport.write_eof()
            else:
                transport.close()
        if self._closing_since is None and self._socket.close_expected():
            self._closing_since = time.monotonic()


def _internal(what: str, cause: BaseException) -> RealmError:
    """Log what went wrong under a number that the client gets."""
    correlation = secrets.token_hex(6)
    log.error("%s failed (correlation %s)", what, correlation, exc_info=cause)
    return RealmError("internal", "the host failed; its log has the cause", details={"correlation": correlation})


def _health(gateway: Gateway) -> Response:
    status = HTTPStatus.OK if gateway.status == "healthy" else HTTPStatus.SERVICE_UNAVAILABLE
    body = encode({"status": gateway.status})
    headers = Headers(
        [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
    )
    return Response(status.value, status.phrase, headers, body)


class ClientServer:
    """Listens for clients. ``port`` is the real one once :meth:`open` has returned."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.port = 0

    async def open(self, address: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a bound TCP socket; the server owns it from now on."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self._gateway), sock=address, ssl=tls, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self._sweep()

    async def close(self, grace: float = 1.0) -> None:
        """Stop listening, close all connections with 1001 and cut those that do not answer in ``grace`` seconds."""
        if self._timer is not None:
            self._timer.cancel()
        if self._server is not None:
            self._server.close()
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

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._gateway.connections):
            connection.sweep(now)
        self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)
