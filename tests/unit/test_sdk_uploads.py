"""Pushing modules against a scripted server: chunks, window, resumption, refusal, loss."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from realm_sdk import (
    Client,
    ConnectionLost,
    ModuleRefused,
    ProtocolError,
    WaitTimeout,
)
from tests.unit.sdk_fake_server import CHUNK, Peer, fake_server, idle


async def test_push_sends_chunks_and_reports_progress(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 + b"end"
    path = tmp_path / "m.wasm"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    async def script(peer: Peer) -> None:
        assert (await peer.take_upload(len(data)))[1] == data
        commit = await peer.expect("modules.commit")
        assert commit["params"] == {"upload": 4}
        await peer.complete(commit, name="m", sha256=digest, size=len(data), version=1, imports=["forward"])
        await idle(peer)

    seen: list[tuple[int, int]] = []
    async with fake_server(script) as server, Client(server.url, "k") as client:
        module = await client.push("m", path, lambda done, total: seen.append((done, total)))
    assert (module.version, module.imports) == (1, ["forward"])
    assert seen[-1] == (len(data), len(data))
    assert seen == sorted(seen)


async def test_push_goes_on_from_what_the_server_has() -> None:
    data = b"0123456789" * 60_000

    async def script(peer: Peer) -> None:
        assert (await peer.take_upload(len(data), received=400_000))[1] == data[400_000:]
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=len(data))
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.push("m", data)


async def test_push_of_known_content_sends_nothing() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=1, received=0, exists=True)
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=3)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        assert (await client.push("m", b"abc")).name == "m"


async def test_push_keeps_at_most_a_window_in_flight() -> None:
    data = bytes(20 * CHUNK)

    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        for _ in range(8):
            await peer.hear_chunk()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.socket.recv(), 0.2)
        await peer.say(type="upload_ack", upload=4, received=8 * CHUNK)
        for number in range(9, 21):
            await peer.hear_chunk()
            await peer.say(type="upload_ack", upload=4, received=number * CHUNK)
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=len(data))
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.push("m", data)


async def test_refused_chunk_aborts_the_upload() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        await peer.hear_chunk()
        error = {"code": "upload_size", "message": "too much"}
        await peer.say(type="upload_error", upload=4, error=error)
        abort = await peer.expect("modules.abort")
        assert abort["params"] == {"upload": 4}
        await peer.complete(abort)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ModuleRefused, match="upload_size"):
            await client.push("m", b"abc")
        await asyncio.sleep(0.05)


async def test_server_that_acknowledges_nothing() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        await peer.hear_chunk()
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k", wait_timeout=0.2) as client:
        with pytest.raises(WaitTimeout, match="acknowledgement"):
            await client.push("m", b"abc")


async def test_lost_connection_during_an_upload() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        await peer.hear_chunk()
        peer.socket.transport.abort()

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ConnectionLost):
            await client.push("m", bytes(3 * CHUNK))


async def test_server_that_claims_more_than_there_is() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=99, exists=False)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ProtocolError, match="99 of 3"):
            await client.push("m", b"abc")


async def test_push_from_a_pipe() -> None:
    """It can be read once only, and its content is needed for the hash and to be sent."""
    readable, writable = os.pipe()
    with os.fdopen(writable, "wb") as pipe:
        pipe.write(b"abc")

    async def script(peer: Peer) -> None:
        params, data = await peer.take_upload(3)
        assert (params["sha256"], data) == (hashlib.sha256(b"abc").hexdigest(), b"abc")
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=3)
        await idle(peer)

    try:
        async with fake_server(script) as server, Client(server.url, "k") as client:
            await client.push("m", f"/dev/fd/{readable}")
    finally:
        os.close(readable)


async def test_push_of_a_missing_file() -> None:
    async with fake_server(idle) as server, Client(server.url, "k") as client:
        with pytest.raises(FileNotFoundError):
            await client.push("m", Path("no-such.wasm"))
