"""The engine's ends of its links: neither reading nor writing ever waits for a peer.

A worker may be stopped, hung or taken over. What it does not read is queued up to a bound, what it sends
is read in portions, so that other workers' steps go on between them.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

import msgspec

from realm.channel import ChannelClosed, FrameBuffer, frame
from realm.messages import ToEngine

MAX_TURN = 64 << 20
"""Largest frame that a peer may send, in bytes: 2,048 prompts of 8,192 tokens."""

MAX_UNREAD = 256 << 20
"""Bytes that may wait for a peer that does not read: more than five steps of 256 rows of logits."""

READ_PORTION = 1 << 20
"""Bytes after which reading from one peer stops once it has brought a whole frame."""

_READ_SIZE = 1 << 18


class PeerLink:
    """One accepted connection. One thread owns it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._buffer = FrameBuffer()
        # Its own, because memory taken anew for each read may be fresh pages each time: 15 us.
        self._room = memoryview(bytearray(_READ_SIZE))
        self._incomplete = 0
        self._closed = False
        self._unsent: deque[memoryview] = deque()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self.unread = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> list[ToEngine]:
        """Messages that have arrived; there may be more.

        Raises:
            ChannelClosed: the other end is closed and everything it sent has been given.
            ValueError: a frame is too long. msgspec.MsgspecError: a frame is not a message.
        """
        frames: list[bytes] = []
        taken = 0
        while not self._closed and (taken < READ_PORTION or not frames):
            try:
                size = self._sock.recv_into(self._room)
            except BlockingIOError:
                break
            except OSError:
                size = 0
            if not size:
                self._closed = True
                break
            taken += size
            self._incomplete += size
            self._buffer.feed(self._room[:size])
            while (payload := self._buffer.pop()) is not None:
                frames.append(payload)
                self._incomplete -= len(payload) + 4
            if self._incomplete > MAX_TURN + 4:
                raise ValueError(f"a frame is longer than {MAX_TURN} bytes")
            if size < len(self._room):
                break  # a read that finds nothing costs as much as one that does
        if self._closed and not frames:
            raise ChannelClosed("the other end is closed")
        return [self._decoder.decode(payload) for payload in frames]

    def send(self, message: Any) -> bool:
        """Queue a message and write what the socket takes; False if too much is unread by now."""
        data = frame(self._encoder.encode(message))
        self._unsent.append(memoryview(data))
        self.unread += len(data)
        self.flush()
        return self.unread <= MAX_UNREAD

    def flush(self) -> None:
        """Write what the socket takes. A closed link is noticed by :meth:`receive`."""
        while self._unsent:
            data = self._unsent[0]
            try:
                sent = self._sock.send(data)
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                self.unread = 0
                return
            self.unread -= sent
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = data[sent:]

    def close(self) -> None:
        self._sock.close()
