"""One client's side of the protocol, without any I/O: frames in, actions out.

The server (:mod:`realm.gateway.server`) carries the actions out. A session knows whether its
client has proved who it is and which calls are in progress, and nothing of sockets or runs.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Union

from realm import __version__
from realm.errors import RealmError
from realm.gateway.protocol import (
    FUNCTIONS,
    PROTOCOL,
    Envelope,
    Function,
    Malformed,
    Params,
    decode_auth,
    decode_call,
    encode,
    error_data,
)
from realm.registry.records import Principal

CLOSE_PROTOCOL = 4400
CLOSE_AUTH = 4401
_EARLY_FRAMES = 64
"""Frames kept while a key is looked up; a client that sends more without waiting is closed."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a text frame."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckKey:
    """Look the key up and tell :meth:`Session.verified`."""

    key: str


@dataclass(frozen=True, slots=True)
class Invoke:
    """Carry a call out. Its id is taken until :meth:`Session.finished`."""

    id: int | str
    function: Function
    params: Params


@dataclass(frozen=True, slots=True)
class Chunk:
    """Data of an upload."""

    upload: int
    offset: int
    data: bytes


Action = Union[Send, Close, CheckKey, Invoke, Chunk]


class State(enum.Enum):
    WAITING = "waiting for a key"
    CHECKING = "looking a key up"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(slots=True)
class Session:
    """See the module's docstring. ``max_calls`` bounds the calls in progress."""

    max_calls: int
    principal: Principal | None = None
    state: State = State.WAITING
    calls: set[int | str] = field(default_factory=set)
    _early: deque[tuple[bool, bytes]] = field(default_factory=deque)

    def opened(self, authorization: str | None) -> list[Action]:
        """The WebSocket is open; ``authorization`` is that header of the handshake."""
        if authorization is None:
            return [_send({"type": "auth_required", "message": 'send {"type":"auth","api_key":…}'})]
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return self._refuse("the Authorization header is not `Bearer KEY`")
        self.state = State.CHECKING
        return [CheckKey(key.strip())]

    def verified(self, principal: Principal | None) -> list[Action]:
        """The answer to :class:`CheckKey`; None for a key that is unknown or revoked."""
        if self.state is not State.CHECKING:
            return []
        if principal is None:
            return self._refuse("the key is unknown or revoked")
        self.principal = principal
        self.state = State.OPEN
        actions: list[Action] = [
            _send({"type": "auth_success", "tenant_id": principal.tenant}),
            _send(
                {
                    "status": "connected",
                    "version": __version__,
                    "tenant_id": principal.tenant,
                    "protocol": PROTOCOL,
                }
            ),
        ]
        while self._early:
            binary, data = self._early.popleft()
            actions += self.binary(data) if binary else self.text(data)
        return actions

    def text(self, data: bytes) -> list[Action]:
        """A text frame came."""
        match self.state:
            case State.OPEN:
                return [self._call(data)]
            case State.WAITING:
                key = decode_auth(data)
                if key is None:
                    return self._refuse('the first message must be {"type":"auth","api_key":…}')
                self.state = State.CHECKING
                return [CheckKey(key)]
            case State.CHECKING:
                return self._keep(False, data)
            case State.CLOSED:
                return []

    def binary(self, data: bytes) -> list[Action]:
        """A binary frame came: upload number and offset (u64, little-endian), then data."""
        match self.state:
            case State.OPEN:
                if len(data) < 16:
                    error = RealmError("malformed_message", "a binary frame is upload (u64), offset (u64), data")
                    return [_send({"id": None, "status": "error", "error": error_data(error)})]
                return [Chunk(int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little"), data[16:])]
            case State.WAITING:
                return self._refuse('the first message must be {"type":"auth","api_key":…}')
            case State.CHECKING:
                return self._keep(True, data)
            case State.CLOSED:
                return []

    def finished(self, call: int | str) -> None:
        """A call has had its last reply: its id may be used again."""
        self.calls.discard(call)

    def timed_out(self) -> list[Action]:
        """The time to authenticate is over."""
        return self._refuse("no key came in time") if self.principal is None else []

    def closed(self) -> None:
        """The connection is gone, or will be: nothing that still comes counts."""
        self.state = State.CLOSED
        self._early.clear()

    # --- inside ---------------------------------------------------------------------------------

    def _call(self, data: bytes) -> Action:
        call = decode_call(data)
        if isinstance(call, Malformed):
            return _error(call.id, call.error)
        if call.id in self.calls:
            # The id belongs to the call in progress, which goes on.
            return _error(call.id, RealmError("duplicate_id", f"a call with the id {call.id!r} is in progress"))
        try:
            function, params = self._check(call)
        except RealmError as error:
            return _error(call.id, error)
        self.calls.add(call.id)
        return Invoke(call.id, function, params)

    def _check(self, call: Envelope) -> tuple[Function, Params]:
        principal = self.principal
        assert principal is not None
        if call.tenant_id is not None and call.tenant_id != principal.tenant:
            raise RealmError("tenant_mismatch", "tenant_id is not the tenant of this connection's key")
        function = FUNCTIONS.get(call.function)
        if function is None:
            raise RealmError(
                "unknown_function",
                f"there is no function {call.function[:64]!r}; there are {', '.join(FUNCTIONS)}",
                details={"available": list(FUNCTIONS)},
            )
        if function.admin and not principal.admin:
            raise RealmError("forbidden", f"{function.name} needs a key of the admin tenant")
        if len(self.calls) >= self.max_calls:
            raise RealmError(
                "busy",
                f"{self.max_calls} calls of this connection are in progress",
                details={"limit": self.max_calls, "used": len(self.calls)},
                retry_after=1.0,
            )
        params = call.params
        return function, function.decode(b"{}" if bytes(params) == b"null" else params)

    def _keep(self, binary: bool, data: bytes) -> list[Action]:
        if len(self._early) >= _EARLY_FRAMES:
            self.closed()
            return [Close(CLOSE_PROTOCOL, "too many frames before the key was checked")]
        self._early.append((binary, data))
        return []

    def _refuse(self, reason: str) -> list[Action]:
        self.closed()
        return [_send({"type": "auth_failed", "error": reason}), Close(CLOSE_AUTH, "authentication failed")]


def _send(message: dict[str, Any]) -> Send:
    return Send(encode(message))


def _error(call: int | str | None, error: RealmError) -> Send:
    return _send({"id": call, "status": "error", "error": error_data(error)})
