"""One client's side of the protocol, without any I/O: frames in, actions out.

The connection (:mod:`realm.gateway.connection`) carries the actions out. A session knows whether its
client has proved who it is and which calls are in progress, and nothing of sockets or runs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
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

CLOSE_AUTH = 4401
CLOSE_TRY_LATER = 1013


@dataclass(frozen=True, slots=True)
class Send:
    """Send a text frame."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """Send a text frame: the answer to a call beyond the tenant's rate. A client that goes on is slowed."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Close the connection."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class CheckKey:
    """Look the key up and tell :meth:`Session.verified` or :meth:`Session.refused`; give no frames before."""

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


Action = Union[Send, Refuse, Close, CheckKey, Invoke, Chunk]


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
    _count_call: Callable[[], None] | None = None

    def opened(self, authorization: str | None) -> list[Action]:
        """The WebSocket is open; ``authorization`` is that header of the handshake."""
        if authorization is None:
            return [_send({"type": "auth_required", "message": 'send {"type":"auth","api_key":…}'})]
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return self._refuse("the Authorization header is not `Bearer KEY`")
        self.state = State.CHECKING
        return [CheckKey(key.strip())]

    def verified(self, principal: Principal, count_call: Callable[[], None]) -> list[Action]:
        """The key is good. ``count_call`` is asked before each call, and raises RealmError to refuse it."""
        if self.state is not State.CHECKING:
            return []
        self.principal = principal
        self._count_call = count_call
        self.state = State.OPEN
        return [
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

    def refused(self, reason: str, *, retry_after: float | None = None) -> list[Action]:
        """There will be no tenant here: a wrong key, none, or an address that has to wait (seconds)."""
        return [] if self.state in (State.OPEN, State.CLOSED) else self._refuse(reason, retry_after)

    def no_place(self, error: RealmError) -> list[Action]:
        """The key is good, but the tenant may not have another connection."""
        if self.state is not State.CHECKING:
            return []
        self.closed()
        return [_send({"type": "refused", "error": error_data(error)}), Close(CLOSE_TRY_LATER, error.message[:120])]

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
                return self._unread()
            case State.CLOSED:
                return []

    def binary(self, data: bytes) -> list[Action]:
        """A binary frame came: upload number and offset (u64, little-endian), then data."""
        match self.state:
            case State.OPEN:
                if len(data) < 16:
                    error = RealmError("malformed_message", "a binary frame is upload (u64), offset (u64), data")
                    return [self._over_rate(None) or _error(None, error)]
                return [Chunk(int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little"), data[16:])]
            case State.WAITING:
                return self._refuse('the first message must be {"type":"auth","api_key":…}')
            case State.CHECKING:
                return self._unread()
            case State.CLOSED:
                return []

    def finished(self, call: int | str) -> None:
        """A call has had its last reply: its id may be used again."""
        self.calls.discard(call)

    def closed(self) -> None:
        """The connection is gone, or will be: nothing that still comes counts."""
        self.state = State.CLOSED

    # --- inside ---------------------------------------------------------------------------------

    def _call(self, data: bytes) -> Action:
        call = decode_call(data)
        # Before anything is done for it; and what is no call costs the host as much as one.
        if refusal := self._over_rate(call.id):
            return refusal
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

    def _over_rate(self, call: int | str | None) -> Refuse | None:
        assert self._count_call is not None
        try:
            self._count_call()
        except RealmError as error:
            return Refuse(encode(_error_message(call, error)))
        return None

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

    def _unread(self) -> list[Action]:
        raise AssertionError("a frame came while the key was being looked up")

    def _refuse(self, reason: str, retry_after: float | None = None) -> list[Action]:
        self.closed()
        message: dict[str, Any] = {"type": "auth_failed", "error": reason}
        if retry_after is not None:
            message["retry_after"] = retry_after
        return [_send(message), Close(CLOSE_AUTH, "authentication failed")]


def _send(message: dict[str, Any]) -> Send:
    return Send(encode(message))


def _error_message(call: int | str | None, error: RealmError) -> dict[str, Any]:
    return {"id": call, "status": "error", "error": error_data(error)}


def _error(call: int | str | None, error: RealmError) -> Send:
    return _send(_error_message(call, error))
