"""One client's socket: the websockets package's sans-I/O protocol under an asyncio shell.

The shell is ours, not the package's, for the sake of streams: frames of one turn of the loop leave
in one write, no coroutine or task is involved, and a connection that falls behind is known at once
(``pause_writing``), which is what guests' credit hangs on.

What one connection can make the gateway hold is bounded by :class:`realm.settings.GatewayLimits`:

* before its key is accepted: ``handshake_bytes``, and one read of the socket (256 KiB);
* after that, of what it sends: one read of the socket and one message (``frame_bytes``);
* of what it is sent: ``unsent_bytes`` and one turn's frames.

Over all connections of a tenant, and of all tenants, ``tenant_buffer_bytes`` and ``buffer_bytes``
count for the last two together; :mod:`realm.gateway.server` sees to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from websockets.frames import Opcode
from websockets.http11 import Request
from websockets.protocol import SEND_EOF
from websockets.protocol import State as SocketState

from realm.errors import RealmError
from realm.gateway.calls import Call
from realm.gateway.frames import TooManyFragments, health_answer, text_frame
from realm.gateway.functions import Caller
from realm.gateway.gateway import Gateway
from realm.gateway.intake import Intake, TooEarly
from realm.gateway.invoking import internal_error, invoke
from realm.gateway.protocol import encode, error_data
from realm.gateway.quotas import TenantUse
from realm.gateway.session import (
    CLOSE_AUTH,
    CLOSE_TRY_LATER,
    Action,
    CheckKey,
    Chunk,
    Close,
    Invoke,
    Refuse,
    Send,
    Session,
)
from realm.gateway.uploads import Uploads
from realm.registry.database import Database
from realm.registry.records import Principal

if TYPE_CHECKING:
    from realm.gateway.server import Entrance

log = logging.getLogger("realm.gateway")

CLOSE_SECONDS = 5.0
"""How long a client may take to answer a close."""
_CLOSE_POLICY = 1008
_UNSENT_STEP = 64 << 10
"""Bytes written between two looks at what is unsent: adding it up takes time with many small writes."""

# Why a connection is not read; several may hold at a time.
_HOLD_KEY = 1  # its key is being looked up: what comes next depends on that
_HOLD_RATE = 2  # it calls too often
_HOLD_UNSENT = 4  # it does not take the answers


class Connection(asyncio.Protocol):
    """One client's socket, from its acceptance on (with TLS, that is before :meth:`connection_made`)."""

    def __init__(self, gateway: Gateway, entrance: Entrance, address: str) -> None:
        """``address`` is what counts as this client's in :mod:`realm.gateway.backoff`."""
        limits = gateway.limits
        self._gateway = gateway
        self._entrance = entrance
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._intake = Intake(limits)
        self._socket = self._intake.socket
        self._session = Session(limits.calls)
        self._caller: Caller | None = None
        self._use: TenantUse | None = None
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._behind = False
        self._unlooked = 0
        self._hold, self._reading = 0, True
        self._resume: asyncio.TimerHandle | None = None
        now = time.monotonic()
        self._auth_deadline = now + limits.auth_seconds
        self._heard = now
        self._pinged: float | None = None
        self._unsent_at_ping = 0
        self._closing_since: float | None = None
        self.accepting: asyncio.Task[None] | None = None
        """What makes the transport; with TLS, it does the handshake."""

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

    @property
    def tenant(self) -> str:
        """Empty before the key has been accepted."""
        return self._use.tenant if self._use is not None else ""

    @property
    def buffered(self) -> int:
        """Bytes held for this connection: come but not handled, and not yet taken."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return unsent + self._intake.held

    @property
    def closing(self) -> bool:
        """Whether it will be cut within seconds, whatever the client does."""
        return self._closing_since is not None

    def revoked(self, key_id: str) -> None:
        """Close if this key opened the connection."""
        if self._caller is not None and self._caller.principal.key_id == key_id:
            self.close(CLOSE_AUTH, "the key was revoked")

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake: nothing further is read as a call, and runs end."""
        self._session.closed()
        self._leave()
        if self._socket.state is SocketState.OPEN:
            self._socket.send_close(code, reason)
            self._flush()
        elif self._socket.state is SocketState.CONNECTING:
            self.abort()

    def close_soon(self, code: int, reason: str) -> None:
        """Close without waiting for the client to take what is unsent: the next sweep cuts it."""
        if self._closing_since is None:
            self._closing_since = time.monotonic() - CLOSE_SECONDS
            self.close(code, reason)

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()
        elif self.accepting is not None:
            self.accepting.cancel()

    def sweep(self, now: float) -> None:
        """Called each second: time-outs of authentication, messages, uploads, silence and closing."""
        limits = self._gateway.limits
        if self._closing_since is not None:
            if now - self._closing_since > CLOSE_SECONDS:
                self.abort()
            return
        caller = self._caller
        if caller is None:
            if now > self._auth_deadline:
                if self._socket.state is SocketState.CONNECTING:
                    self.abort()
                else:
                    self._act(self._session.refused("no key came in time"))
            return
        if self._socket.state is not SocketState.OPEN:
            return
        for number, error in caller.uploads.expire():
            self._upload_error(number, error)
        if self._intake.partial_since is not None and (self._hold or self._intake.waiting):
            # The host does not read on: this time is not the client's.
            self._intake.partial_since = now
        if self._intake.unfinished(now, limits.message_seconds):
            self.close(_CLOSE_POLICY, f"a message was not finished in {limits.message_seconds:g} seconds")
            return
        self._listen(now)

    def _listen(self, now: float) -> None:
        assert self._transport is not None
        most = self._gateway.limits.ping_seconds
        if self._pinged is None:
            if now - self._heard > most:
                self._pinged = now
                self._unsent_at_ping = self._transport.get_write_buffer_size()
                self._socket.send_ping(secrets.token_bytes(4))
                self._flush()
        elif now - self._pinged > most:
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
        self._intake.add(data)
        self._go_on()

    def eof_received(self) -> None:
        self._intake.end()
        self._go_on()
        # A client that reads no more must not keep the socket for what is still unsent.
        self._closing_since = self._closing_since or time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._resume is not None:
            self._resume.cancel()
        self._entrance.newcomers.leave(self)
        connections = self._gateway.connections
        connections.discard(self)
        if not connections:
            self._gateway.no_connections.set()
        self._session.closed()
        self._leave()
        self._out.clear()
        self._intake.drop()

    def pause_writing(self) -> None:
        self._behind = True

    def resume_writing(self) -> None:
        self._behind = False
        if self._caller is not None:
            self._gateway.runs.drained([call.run for call in self._caller.calls.values() if call.run is not None])
        self._release(_HOLD_UNSENT)

    # --- reading --------------------------------------------------------------------------------

    def read(self, units: int, late: Callable[[], bool]) -> tuple[int, bool]:
        """Handle what has come, a frame or a slice of bytes at a time; see :class:`pacing.Reader`."""
        used, intake = 0, self._intake
        while used < units and intake.waiting and self._transport is not None and not (self._hold or (used and late())):
            used += 1
            try:
                got = intake.step()
            except TooEarly:
                self._too_early()
            except TooManyFragments:
                self.close(_CLOSE_POLICY, "a message of too many fragments")
            else:
                if isinstance(got, tuple):
                    opcode, data = got
                    self._act(self._session.text(data) if opcode is Opcode.TEXT else self._session.binary(data))
                elif got is not None:
                    self._handshake(got)
        if self._socket.state is not SocketState.OPEN and self._caller is not None:
            # The client says goodbye: its runs end now, not when the TCP connection does.
            self._session.closed()
            self._leave()
        intake.note_partial(self._heard)
        self._flush()
        more = not self._hold and intake.waiting
        self._read_socket(not self._hold and not more)
        return used, more

    def _too_early(self) -> None:
        websocket, status = self._socket, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        if websocket.state is SocketState.CONNECTING:
            websocket.send_response(websocket.reject(status, "the request is too large\n"))
        else:
            self._act(self._session.refused("too much came before a key"))

    def _go_on(self) -> None:
        if not self._hold:
            self._entrance.turns.ask(self)
        if self._intake.waiting:
            # Others come first, or nothing is read at the moment.
            self._read_socket(False)

    def _read_socket(self, on: bool) -> None:
        """What is not handled yet is never more than one read of the socket."""
        if on is self._reading or self._transport is None or self._transport.is_closing():
            return
        self._reading = on
        if on:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _stop(self, why: int) -> None:
        self._hold |= why
        self._read_socket(False)

    def _release(self, why: int) -> None:
        if self._hold & why:
            self._hold &= ~why
            if not self._hold and self._transport is not None:
                self._entrance.turns.ask(self)

    def _handshake(self, request: Request) -> None:
        websocket, gateway = self._socket, self._gateway
        if request.path.partition("?")[0] == "/healthz":
            websocket.send_response(health_answer(gateway.status))
            return
        if self._entrance.authenticated >= gateway.limits.connections:
            response = websocket.reject(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
            response.headers["Retry-After"] = "1"
        else:
            response = websocket.accept(request)
        websocket.send_response(response)
        self._flush()
        if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            # Two keys are no key: nobody could say which one counts.
            given = request.headers.get_all("Authorization")
            self._act(self._session.opened(None if not given else given[0] if len(given) == 1 else ""))

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self.send(action.payload)
                case Refuse():
                    self.send(action.payload)
                    self._slow_down()
                case Invoke():
                    self._invoke(action)
                case Chunk():
                    self._chunk(action)
                case CheckKey():
                    self._check_key(action.key)
                case Close():
                    self.close(action.code, action.reason)

    def _slow_down(self) -> None:
        pause = self._entrance.refusals.refused(self.tenant, self._loop.time())
        if pause and self._resume is None:
            self._stop(_HOLD_RATE)
            self._resume = self._loop.call_later(pause, self._rested)

    def _rested(self) -> None:
        self._resume = None
        self._release(_HOLD_RATE)

    # --- the key --------------------------------------------------------------------------------

    def _check_key(self, key: str) -> None:
        wait = self._entrance.backoff.wait(self._address, key, time.monotonic())
        if wait:
            reason = "too many wrong keys came from this address"
            self._act(self._session.refused(reason, retry_after=round(wait, 3)))
            return
        self._stop(_HOLD_KEY)
        looked_up = self._gateway.registry.run(partial(Database.authenticate, key=key), urgent=True)
        looked_up.add_done_callback(partial(self._looked_up, key))

    def _looked_up(self, key: str, future: asyncio.Future[Principal | None]) -> None:
        if future.cancelled():
            return
        backoff, failure = self._entrance.backoff, future.exception()
        if failure is not None:
            log.error("a key could not be looked up", exc_info=failure)
            self.close(1011, "the host failed; its log has the cause")
        elif (principal := future.result()) is None:
            # Counted also when the client has not waited for the answer.
            backoff.failed(self._address, key, time.monotonic())
            self._act(self._session.refused("the key is unknown or revoked"))
        else:
            backoff.succeeded(self._address, key)
            self._admit(principal)
        self._release(_HOLD_KEY)

    def _admit(self, principal: Principal) -> None:
        if self._transport is None or self._socket.state is not SocketState.OPEN:
            self._session.closed()
            return
        gateway = self._gateway
        use = gateway.quotas.of(principal.tenant)
        try:
            use.connect()
        except RealmError as error:
            self._act(self._session.no_place(error))
            return
        opening = self._session.verified(principal, use.request)
        if not opening:
            # Closed by the host meanwhile.
            use.disconnect()
            return
        self._entrance.newcomers.leave(self)
        self._entrance.authenticated += 1
        self._intake.trusted = True
        self._use = use
        self._caller = Caller(principal, Uploads(gateway.limits, gateway.registry.blobs.incoming, use))
        self._act(opening)

    def _leave(self) -> None:
        """Nothing that the client has begun goes on, and its place is free. Once or more often."""
        caller, self._caller = self._caller, None
        if caller is None:
            return
        assert self._use is not None
        for call in list(caller.calls.values()):
            if call.run is not None:
                self._gateway.runs.abandon(call.run)
            elif call.task is not None:
                call.task.cancel()
        caller.uploads.close()
        self._use.disconnect()
        self._entrance.authenticated -= 1

    # --- calls ----------------------------------------------------------------------------------

    def _invoke(self, action: Invoke) -> None:
        caller = self._caller
        assert caller is not None
        call = Call(action.id, self)
        caller.calls[call.id] = call
        invoke(self._gateway.functions, caller, call, action)

    def _chunk(self, chunk: Chunk) -> None:
        caller, use = self._caller, self._use
        assert caller is not None and use is not None
        try:
            received = caller.uploads.chunk(chunk.upload, chunk.offset, chunk.data)
        except (RealmError, OSError) as cause:
            error = cause if isinstance(cause, RealmError) else internal_error("upload", cause)
            try:
                # Good chunks are paid for already; bad ones are calls.
                use.request()
            except RealmError as over:
                error = over
                self._slow_down()
            self._upload_error(chunk.upload, error)
        else:
            self.send(b'{"type":"upload_ack","upload":%d,"received":%d}' % (chunk.upload, received))

    def _upload_error(self, number: int, error: RealmError) -> None:
        self.send(encode({"type": "upload_error", "upload": number, "error": error_data(error)}))

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
        if end:
            # A client that has cut the connection meanwhile cannot be told; the loop will tell us.
            with contextlib.suppress(OSError):
                (transport.write_eof if transport.can_write_eof() else transport.close)()
        if self._closing_since is None and self._socket.close_expected():
            self._closing_since = time.monotonic()
        if data and self._behind:
            self._look_at_unsent(len(data))

    def _look_at_unsent(self, written: int) -> None:
        self._unlooked += written
        if self._unlooked < _UNSENT_STEP:
            return
        self._unlooked = 0
        assert self._transport is not None
        limits, unsent = self._gateway.limits, self._transport.get_write_buffer_size()
        if unsent > limits.read_stop_bytes:
            self._stop(_HOLD_UNSENT)
        if unsent > limits.unsent_bytes:
            self.close_soon(CLOSE_TRY_LATER, f"{unsent} bytes are unsent: read faster, or less at a time")
