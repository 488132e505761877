"""The wire protocol without I/O: frames in, typed events out; calls in, frames out.

:class:`Protocol` is all that knows JSON and the frames of ``sdk/README.md``. It is driven by
:mod:`realm_sdk.client` over a socket and by the tests with plain strings.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import msgspec

from realm_sdk.errors import AuthenticationError, ProtocolError, RealmError, error_of

CHUNK_SIZE = 256 << 10
"""Most bytes of data in one upload frame."""

_CHUNK_HEADER = struct.Struct("<QQ")


class NeedAuth(msgspec.Struct, frozen=True):
    """The server wants a key: send ``frame``."""

    frame: str


class Opened(msgspec.Struct, frozen=True):
    """Calls may begin."""

    tenant: str
    version: str


class Item(msgspec.Struct, frozen=True):
    """One streamed message of a call."""

    call: int
    data: msgspec.Raw


class Done(msgspec.Struct, frozen=True):
    """A call's last message: it worked, or (``cancelled``) it was cancelled."""

    call: int
    data: msgspec.Raw
    cancelled: bool = False


class Failed(msgspec.Struct, frozen=True):
    """A call's last message: it failed."""

    call: int
    error: RealmError


class Ack(msgspec.Struct, frozen=True):
    """The server has the first ``received`` bytes of an upload."""

    upload: int
    received: int


class UploadFailed(msgspec.Struct, frozen=True):
    """The server refused a chunk."""

    upload: int
    error: RealmError


ServerEvent: TypeAlias = NeedAuth | Opened | Item | Done | Failed | Ack | UploadFailed


class _Error(msgspec.Struct):
    code: str
    message: str = ""
    details: dict[str, Any] | None = None
    retry_after: float | None = None


class _Frame(msgspec.Struct):
    """Every server frame at once: which fields are set says which frame it is."""

    type: str | None = None
    status: str | None = None
    id: int | str | None = None
    seq: int | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")
    error: _Error | str | None = None
    message: str | None = None
    tenant_id: str | None = None
    version: str | None = None
    upload: int | None = None
    received: int | None = None
    retry_after: float | None = None


_decoder = msgspec.json.Decoder(_Frame)


class Protocol:
    """One connection's state: first the opening, then any number of calls at once."""

    def __init__(self, api_key: str) -> None:
        # It becomes a header: a line break in it would be another header.
        if not api_key.isascii() or not api_key.isprintable() or not api_key:
            raise AuthenticationError("auth_failed", "the key is empty or has characters that no key has")
        self._api_key = api_key
        self._open = False
        self._next_id = 0
        self._next_seq: dict[int, int] = {}

    @property
    def opened(self) -> bool:
        """Whether calls may be made."""
        return self._open

    def headers(self) -> dict[str, str]:
        """Headers of the handshake: the key goes here, which saves a round trip."""
        return {"Authorization": f"Bearer {self._api_key}"}

    def call(self, function: str, params: dict[str, Any]) -> tuple[int, str]:
        """A new call: its id, and the frame to send.

        Raises:
            RealmError: ``invalid_params`` if ``params`` cannot be JSON.
        """
        ident = self._next_id
        try:
            frame = msgspec.json.encode({"id": ident, "function": function, "params": params})
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise error_of("invalid_params", f"the parameters of {function} cannot be sent as JSON: {error}") from error
        self._next_id += 1
        self._next_seq[ident] = 0
        return ident, frame.decode()

    @staticmethod
    def chunk(upload: int, offset: int, data: bytes | memoryview) -> bytes:
        """The binary frame that carries ``data`` (at most :data:`CHUNK_SIZE` bytes) of an upload."""
        return _CHUNK_HEADER.pack(upload, offset) + data

    def receive(self, frame: str | bytes) -> ServerEvent | None:
        """What a received frame means; None if there is nothing to do.

        Raises:
            AuthenticationError: the key was refused.
            RealmError: the key is good, but there is no place for the connection.
            ProtocolError: the frame is not in the protocol. The connection cannot go on.
        """
        if isinstance(frame, bytes):
            raise ProtocolError("protocol_error", "the server sent a binary frame")
        try:
            parsed = _decoder.decode(frame)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ProtocolError("protocol_error", f"the server sent a frame that cannot be read: {error}") from error
        if parsed.type is not None:
            return self._typed(parsed.type, parsed)
        if not self._open:
            if parsed.status != "connected":
                raise ProtocolError("protocol_error", f"expected 'connected', got status {parsed.status!r}")
            self._open = True
            return Opened(tenant=parsed.tenant_id or "", version=parsed.version or "")
        return self._answer(parsed)

    def _typed(self, kind: str, frame: _Frame) -> ServerEvent | None:
        if kind == "auth_required":
            return NeedAuth(msgspec.json.encode({"type": "auth", "api_key": self._api_key}).decode())
        if kind == "auth_failed":
            reason = frame.error.message if isinstance(frame.error, _Error) else frame.error or frame.message
            raise AuthenticationError(
                "auth_failed", reason or "the server refused the key", retry_after=frame.retry_after
            )
        if kind == "refused":
            raise _error(frame)
        if kind == "upload_ack" and frame.upload is not None and frame.received is not None:
            return Ack(frame.upload, frame.received)
        if kind == "upload_error" and frame.upload is not None:
            return UploadFailed(frame.upload, _error(frame))
        # auth_success, and kinds that a newer server may add.
        return None

    def _answer(self, frame: _Frame) -> ServerEvent | None:
        ident = frame.id
        if ident is None and frame.status == "error":
            # The server could not tell which call this was about, so no caller can be told.
            raise ProtocolError("protocol_error", f"the server refused a frame: {_error(frame)}")
        if not isinstance(ident, int) or ident not in self._next_seq:
            raise ProtocolError("protocol_error", f"an answer to a call that is not in progress: id {ident!r}")
        if frame.status == "streaming":
            expected = self._next_seq[ident]
            if frame.seq is not None and frame.seq != expected:
                raise ProtocolError("protocol_error", f"call {ident}: expected message {expected}, got {frame.seq}")
            self._next_seq[ident] = expected + 1
            return Item(ident, frame.data)
        if frame.status in ("complete", "cancelled"):
            del self._next_seq[ident]
            return Done(ident, frame.data, cancelled=frame.status == "cancelled")
        if frame.status == "error":
            del self._next_seq[ident]
            return Failed(ident, _error(frame))
        raise ProtocolError("protocol_error", f"call {ident}: unknown status {frame.status!r}")


def _error(frame: _Frame) -> RealmError:
    error = frame.error
    if isinstance(error, _Error):
        return error_of(error.code, error.message, error.details, error.retry_after)
    return error_of("internal", error or "the server gave no reason")
