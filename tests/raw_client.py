"""A client that says what no library would: bytes on a socket, with or without TLS."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from tests.fake_host import FakeClient, FakeHost, eventually

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bytes | None = b"\1\2\3\4"
) -> bytes:
    """One frame; ``rsv`` are its three reserved bits."""
    head = bytes([fin << 7 | rsv << 4 | opcode])
    bit = 0 if mask is None else 0x80
    size = len(payload)
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([bit | 127]) + size.to_bytes(8, "big")
    if mask is None:
        return head + payload
    key = (mask * (size // 4 + 1))[:size]
    return head + mask + (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def call(ident: Any, function: str = "health", **params: Any) -> bytes:
    """The frame of a call."""
    return frame(TEXT, json.dumps({"id": ident, "function": function, "params": params}).encode())


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def upgrade(self, *headers: str) -> str:
        """Ask for a WebSocket; gives the head of the answer."""
        lines = [
            "GET / HTTP/1.1",
            "Host: x",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
            *headers,
        ]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode())
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def receive(self) -> tuple[int, bytes]:
        """The next frame of the server: opcode and payload. A server masks nothing and uses no reserved bits."""
        first, second = await self.reader.readexactly(2)
        assert first & 0xF0 == 0x80 and second < 128
        size = second
        if size >= 126:
            size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
        return first & 15, await self.reader.readexactly(size)

    async def message(self) -> dict[str, Any]:
        """The next text frame, as JSON."""
        while True:
            opcode, payload = await self.receive()
            if opcode == TEXT:
                message = json.loads(payload)
                assert isinstance(message, dict)
                return message
            assert opcode in (PING, PONG), (opcode, payload)

    async def closing(self) -> int:
        """The code the server closes with; frames before that are passed over. The socket is cut, too."""
        while True:
            opcode, payload = await self.receive()
            if opcode == CLOSE:
                break
        self.send(frame(CLOSE, payload[:2]))
        await self.ended()
        return int.from_bytes(payload[:2], "big")

    async def ended(self) -> None:
        """The server ends the connection; anything may come before."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(1 << 16):
                pass

    async def done(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def raw(
    host: FakeHost, *, receive_buffer: int = 0, source: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Raw]:
    """A connection, without a byte sent. ``source`` is the address it comes from."""
    sock = socket.socket()
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    sock.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", host.server.port))
    options: dict[str, Any] = {"ssl": tls, "server_hostname": "localhost"} if tls else {}
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096, **options)
    client = Raw(reader, writer)
    try:
        yield client
    finally:
        await client.done()


@contextlib.asynccontextmanager
async def authenticated(host: FakeHost, tenant: str = "alice", **options: Any) -> AsyncIterator[Raw]:
    """A raw connection that has shown a good key."""
    async with raw(host, **options) as client:
        await client.upgrade(f"Authorization: Bearer {host.keys[tenant]}")
        assert (await client.message())["type"] == "auth_success"
        assert (await client.message())["status"] == "connected"
        yield client


@dataclass
class Bystander:
    """Another tenant on the same host, which must notice nothing."""

    client: FakeClient

    async def works(self) -> None:
        """Its calls are answered, and rightly."""
        assert (await self.client.data("generate", prompt="by stander"))["text"] == "by stander"


@contextlib.asynccontextmanager
async def bystander(host: FakeHost) -> AsyncIterator[Bystander]:
    """While it lasts, and once more at the end when the attackers are gone, bob's calls work.

    After that nothing may be left of anybody: places, counters, tasks, files.
    """
    tasks = len(asyncio.all_tasks())
    async with host.client("bob") as client:
        watching = Bystander(client)
        await watching.works()
        yield watching
        await watching.works()
    entrance = host.server.entrance
    await eventually(lambda: not host.gateway.connections and not len(entrance.newcomers))
    assert entrance.authenticated == 0 and len(entrance.turns) == 0
    await eventually(lambda: not host.gateway.quotas.in_use)
    await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
    assert not list((host.home / "incoming").iterdir())
    assert not host.gateway.runs.runs
