"""What goes over the socket: frames that we send, messages of frames that come, one HTTP answer. No I/O."""

from __future__ import annotations

import struct
from http import HTTPStatus

from websockets.datastructures import Headers
from websockets.frames import Frame, Opcode
from websockets.http11 import Response

from realm.gateway.protocol import encode


def text_frame(payload: bytes) -> bytes:
    """A whole unmasked text frame: what a server sends."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return struct.pack("!BBH", 0x81, 126, size) + payload
    return struct.pack("!BBQ", 0x81, 127, size) + payload


def received_size(payload: int) -> int:
    """Bytes of a masked frame with a payload of as many: what a client sends."""
    return payload + (6 if payload < 126 else 8 if payload < 65536 else 14)


def health_answer(status: str) -> Response:
    """The answer to ``GET /healthz``: 200 while the host is healthy, else 503."""
    code = HTTPStatus.OK if status == "healthy" else HTTPStatus.SERVICE_UNAVAILABLE
    body = encode({"status": status})
    headers = Headers(
        [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Connection", "close"),
        ]
    )
    return Response(code.value, code.phrase, headers, body)


class TooManyFragments(Exception):
    """A message has more frames than it may."""


class Messages:
    """Joins fragments. The WebSocket protocol's checks (order, sizes, opcodes) are done before.

    Those bound a message's bytes but not its frames, and an empty fragment costs memory, too.
    """

    __slots__ = ("_count", "_most", "_opcode", "_parts")

    def __init__(self, most_fragments: int) -> None:
        self._most = most_fragments
        self._count = 0
        self._opcode = Opcode.TEXT
        self._parts = bytearray()

    @property
    def held(self) -> int:
        """Bytes of the message begun."""
        return len(self._parts)

    @property
    def begun(self) -> bool:
        """Whether a message waits for further frames."""
        return self._count > 0

    def add(self, frame: Frame) -> tuple[Opcode, bytes] | None:
        """A frame came; gives TEXT or BINARY with a whole message's data. Control frames give None.

        Raises:
            TooManyFragments: of the message begun, which is forgotten.
        """
        opcode, data = frame.opcode, frame.data
        if opcode is Opcode.CONT:
            self._count += 1
            if self._count > self._most:
                self.clear()
                raise TooManyFragments
            self._parts += data
            if not frame.fin:
                return None
            whole = self._opcode, bytes(self._parts)
            self.clear()
            return whole
        if opcode is not Opcode.TEXT and opcode is not Opcode.BINARY:
            return None
        if frame.fin:
            return opcode, bytes(data)
        self._opcode, self._count, self._parts = opcode, 1, bytearray(data)
        return None

    def clear(self) -> None:
        """Forget the message begun."""
        self._count = 0
        self._parts = bytearray()
