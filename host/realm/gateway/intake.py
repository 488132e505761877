"""From the bytes of a client to its messages: the websockets package's protocol, a step at a time. No I/O.

The package bounds the bytes of a message. What it leaves open is bounded here: how much is done at
once, how many frames a message has, how long one may take, and how much may come before the key.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Event
from websockets.protocol import State as SocketState
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from realm.gateway.frames import Messages, received_size
from realm.gateway.protocol import PROTOCOL
from realm.settings import GatewayLimits

# At DEBUG the package logs headers and frames: keys and prompts. So its level does not follow ours.
_wire_log = logging.getLogger("realm.gateway.wire")
_wire_log.setLevel(logging.WARNING)

_SLICE = 4096
"""Bytes parsed at a time: at most 682 frames, 1.3 ms."""

Message = tuple[Opcode, bytes]


class TooEarly(Exception):
    """More came than a client may send before its key has been accepted."""


def _select_subprotocol(protocol: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    # Clients of the original protocol offer none, and ones of a later version more than ours.
    return Subprotocol(PROTOCOL) if PROTOCOL in offered else None


class Intake:
    """One client's. ``socket`` is the WebSocket protocol, which also makes what is sent.

    Attributes:
        trusted: the key has been accepted.
        partial_since: when the message or frame began whose rest has not come; None if there is none.
    """

    __slots__ = (
        "_early_bytes",
        "_events",
        "_frame_bytes",
        "_head_end",
        "_limits",
        "_messages",
        "_unread",
        "partial_since",
        "socket",
        "trusted",
    )

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self.socket = ServerProtocol(
            select_subprotocol=_select_subprotocol, max_size=limits.frame_bytes, logger=_wire_log
        )
        self.trusted = False
        self.partial_since: float | None = None
        self._unread = bytearray()
        self._events: deque[Event] = deque()
        self._messages = Messages(limits.message_fragments)
        self._early_bytes = 0
        self._head_end = b""
        self._frame_bytes = 0

    def add(self, data: bytes) -> None:
        """Bytes came. They wait for :meth:`step`."""
        self._unread += data

    def end(self) -> None:
        """The client sends no more. What is unread is left: it reads no answers either, as we see it."""
        self._unread.clear()
        self.socket.receive_eof()
        self._events.extend(self.socket.events_received())

    def drop(self) -> None:
        """The connection is gone."""
        self._unread.clear()
        self._events.clear()
        self._messages.clear()

    @property
    def waiting(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return bool(self._events or self._unread)

    @property
    def held(self) -> int:
        """Bytes that have come and are not handled."""
        return len(self._unread) + len(self.socket.reader.buffer) + self._messages.held

    def step(self) -> Request | Message | None:
        """Handle one frame, or a slice of bytes; gives what it completes.

        Raises:
            TooEarly: what is unread is left.
            TooManyFragments: of one message.
        """
        if not self._events:
            self._parse()
            return None
        event = self._events.popleft()
        if isinstance(event, Request):
            return event
        assert isinstance(event, Frame)
        # The package does not tell whether it waits for the rest of a frame; what was given to it and
        # has not come back is one. Longer forms of a length than needed, which are not allowed, look so, too.
        self._frame_bytes -= received_size(len(event.data))
        message = self._messages.add(event)
        if not self._messages.begun:
            self.partial_since = None
        return message

    def note_partial(self, now: float) -> None:
        """After steps: see whether something has begun and not ended."""
        if not self._events and self.partial_since is None and (self._frame_bytes or self._messages.begun):
            self.partial_since = now

    def unfinished(self, now: float, most: float) -> bool:
        """Whether something has not ended for more than so many seconds, while nothing kept us from reading it."""
        return self.partial_since is not None and now - self.partial_since > most

    def _parse(self) -> None:
        part = bytes(self._unread[:_SLICE])
        if self.socket.state is SocketState.CONNECTING:
            part = self._of_head(part)
        else:
            self._frame_bytes += len(part)
        del self._unread[: len(part)]
        # Whoever has been refused may send what it likes until it is cut: nobody looks.
        if not self.trusted and not self.socket.close_expected():
            self._early_bytes += len(part)
            if self._early_bytes > self._limits.handshake_bytes:
                self._unread.clear()
                raise TooEarly
        self.socket.receive_data(part)
        self._events.extend(self.socket.events_received())

    def _of_head(self, part: bytes) -> bytes:
        """As much as belongs to the request's head: frames after it are counted from their first byte."""
        before = len(self._head_end)
        joined = self._head_end + part
        end = joined.find(b"\r\n\r\n")
        self._head_end = joined[-3:] if end < 0 else b""
        return part if end < 0 else part[: end + 4 - before]
