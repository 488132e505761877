"""Length-prefixed MessagePack frames over a Unix stream socket: the links between processes.

A frame is a little-endian ``uint32`` length and that many bytes. :class:`FrameBuffer` is the
sans-I/O half (bytes in, frames out); :class:`BlockingChannel` is the shell that the engine and
the guest workers use, each from one thread.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from typing import Any, Generic, TypeVar

import msgspec

MAX_FRAME = 256 << 20
"""Largest frame in bytes. A turn of 1,024 guests that all read logits is 200 MB."""

_LENGTH = struct.Struct("<I")
_READ_SIZE = 1 << 18

T = TypeVar("T")


class ChannelClosed(ConnectionError):
    """The other process closed its end or died."""


class FrameBuffer:
    """Collects received bytes and gives back whole frames, in order."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._frames: deque[bytes] = deque()

    def feed(self, data: bytes | memoryview) -> None:
        """Add received bytes. Raises ValueError if a frame is longer than :data:`MAX_FRAME`."""
        buffer = self._data
        buffer += data
        at = 0
        while len(buffer) - at >= 4:
            (size,) = _LENGTH.unpack_from(buffer, at)
            if size > MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes is over the limit of {MAX_FRAME}")
            if len(buffer) - at - 4 < size:
                break
            self._frames.append(bytes(buffer[at + 4 : at + 4 + size]))
            at += 4 + size
        if at:
            del buffer[:at]

    def __bool__(self) -> bool:
        """Whether there is a whole frame."""
        return bool(self._frames)

    def pop(self) -> bytes | None:
        """The next whole frame, or None."""
        return self._frames.popleft() if self._frames else None


def frame(payload: bytes) -> bytes:
    """``payload`` with its length in front."""
    return _LENGTH.pack(len(payload)) + payload


class BlockingChannel(Generic[T]):
    """One end of a link, for a process whose loop is a plain thread.

    Sends block until the kernel has the bytes; receives never block (``wait`` does).
    Not thread-safe: one thread owns a channel.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        """``receives`` is the union of message structs that the other end may send."""
        self._sock = sock
        self._buffer = FrameBuffer()
        # Its own, because 256 KiB taken anew for each read may be fresh pages each time: 15 us.
        self._room = memoryview(bytearray(_READ_SIZE))
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(receives)
        sock.setblocking(False)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def waiting(self) -> bool:
        """Whether messages were read while something was sent: :meth:`receive` gives them, select knows nothing."""
        return bool(self._buffer)

    def send(self, message: Any) -> None:
        """Send one message. Raises :class:`ChannelClosed`."""
        data = memoryview(frame(self._encoder.encode(message)))
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                # The peer is behind. Reading meanwhile keeps two full pipes from locking up.
                readable, _, _ = select.select([self._sock], [self._sock], [])
                if readable:
                    self._fill()
            except OSError as error:
                raise ChannelClosed(str(error)) from error

    def _fill(self) -> bool:
        """Read once; whether there may be more. A read that finds nothing costs as much as one that does."""
        try:
            size = self._sock.recv_into(self._room)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if not size:
            raise ChannelClosed("the other end is closed")
        self._buffer.feed(self._room[:size])
        return size == len(self._room)

    def receive(self) -> list[T]:
        """All messages that have arrived, without waiting.

        Raises:
            ChannelClosed: the other end is closed and everything it sent has been given.
        """
        closed: ChannelClosed | None = None
        try:
            while self._fill():
                pass
        except ChannelClosed as error:
            closed = error
        messages: list[T] = []
        while (data := self._buffer.pop()) is not None:
            messages.append(self._decoder.decode(data))
        if closed and not messages:
            raise closed
        return messages

    def close(self) -> None:
        self._sock.close()


def connect(path: str) -> socket.socket:
    """A stream socket connected to the Unix socket at ``path``. Raises OSError if nobody listens."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def listen(path: str) -> socket.socket:
    """A listening Unix stream socket at ``path`` (the folder must be private to the host)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(path)
    sock.listen(64)
    sock.setblocking(False)
    return sock
