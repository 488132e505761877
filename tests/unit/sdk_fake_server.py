"""A server that says what a test tells it to: the SDK's counterpart, with none of the host's code.

A test writes a coroutine that gets a :class:`Peer`; it runs once for each connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

CHUNK = 256 << 10
"""Most bytes of data in one frame of an upload."""


class Peer:
    """The server's end of one connection."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        assert socket.request is not None
        self.headers = socket.request.headers

    async def say(self, **frame: Any) -> None:
        await self.socket.send(json.dumps(frame))

    async def hear(self) -> dict[str, Any]:
        """The next text frame."""
        frame = await self.socket.recv()
        assert isinstance(frame, str), "expected a text frame"
        heard: dict[str, Any] = json.loads(frame)
        return heard

    async def hear_chunk(self) -> tuple[int, int, bytes]:
        """The next binary frame: upload, offset, data."""
        frame = await self.socket.recv()
        assert isinstance(frame, bytes), f"expected a binary frame, got {frame!r}"
        return int.from_bytes(frame[:8], "little"), int.from_bytes(frame[8:16], "little"), frame[16:]

    async def greet(self, tenant: str = "acme") -> None:
        await self.say(type="auth_success", tenant_id=tenant)
        await self.say(status="connected", version="9.9", tenant_id=tenant, protocol="realm.v1")

    async def expect(self, function: str) -> dict[str, Any]:
        """The next call, which must be of ``function``."""
        call = await self.hear()
        assert call["function"] == function, call
        return call

    async def complete(self, call: dict[str, Any], **data: Any) -> None:
        await self.say(id=call["id"], status="complete", data=data)

    async def stream(self, call: dict[str, Any], seq: int, **data: Any) -> None:
        await self.say(id=call["id"], status="streaming", seq=seq, data=data)

    async def fail(self, call: dict[str, Any], code: str, message: str = "no", **more: Any) -> None:
        await self.say(id=call["id"], status="error", error={"code": code, "message": message, **more})

    async def take_upload(self, size: int, *, received: int = 0, kind: str = "modules") -> tuple[dict[str, Any], bytes]:
        """Answer ``KIND.begin`` with upload 4; then take chunks and acknowledge each. Its params, and what came."""
        begin = await self.expect(f"{kind}.begin")
        assert begin["params"]["size"] == size
        await self.complete(begin, upload=4, received=received, exists=False)
        taken = bytearray()
        while received + len(taken) < size:
            upload, offset, data = await self.hear_chunk()
            assert (upload, offset) == (4, received + len(taken))
            assert 0 < len(data) <= CHUNK
            taken += data
            await self.say(type="upload_ack", upload=4, received=offset + len(data))
        return begin["params"], bytes(taken)


Script = Callable[[Peer], Awaitable[None]]


class FakeServer:
    """``url``, and ``failed`` with whatever a script raised."""

    def __init__(self, server: Server, failed: list[BaseException]) -> None:
        self.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.failed = failed


@contextlib.asynccontextmanager
async def fake_server(script: Script, *, greet: bool = True) -> AsyncIterator[FakeServer]:
    """Serve ``script``; what it raised is raised at the end, so a failed assertion in it fails the test."""
    failed: list[BaseException] = []
    running: set[asyncio.Task[Any]] = set()

    async def handle(socket: ServerConnection) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        peer = Peer(socket)
        try:
            if greet:
                await peer.greet()
            await script(peer)
        except ConnectionClosed:
            return
        # pytest's own failures are no Exceptions.
        except (Exception, pytest.fail.Exception) as error:
            failed.append(error)
            raise
        finally:
            running.discard(task)

    async with serve(handle, "127.0.0.1", 0, compression=None) as server:
        yield FakeServer(server, failed)
        # Scripts end by themselves once the client is gone.
        if running:
            await asyncio.wait(running, timeout=5)
    if failed:
        raise failed[0]


async def idle(peer: Peer) -> None:
    """The end of a script that has no more to say: wait for the client to leave."""
    await peer.socket.wait_closed()
