"""Attacks by frames and messages: malformed, endless, compressed, far too many. With another tenant at work."""

from __future__ import annotations

import asyncio
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from realm.settings import GatewayLimits
from tests.fake_host import async_test, eventually, fake_host, hang
from tests.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    authenticated,
    bystander,
    call,
    frame,
    raw,
)

BOMB = zlib.compressobj(wbits=-15)
BOMB_FRAME = BOMB.compress(bytes(64 << 20)) + BOMB.flush(zlib.Z_SYNC_FLUSH)[:-4]
"""64 MiB of zeros as permessage-deflate would send them."""


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(TEXT, b"{}", mask=None), 1002),
        (frame(TEXT, b"{}", rsv=4), 1002),
        (frame(TEXT, b"{}", rsv=2), 1002),
        (frame(TEXT, b"{}", rsv=1), 1002),
        (frame(TEXT, BOMB_FRAME, rsv=4), 1002),
        *[(frame(opcode, b"x"), 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)],
        (frame(CONTINUATION, b"x"), 1002),
        (frame(TEXT, b"x", fin=False) + frame(TEXT, b"x"), 1002),
        (frame(TEXT, b"x", fin=False) + frame(CLOSE, b"\x03\xe8"), 1002),
        (frame(PING, b"x", fin=False), 1002),
        (frame(PING, b"x" * 126), 1002),
        (frame(CLOSE, b"\x03"), 1002),
        (frame(CLOSE, b"\x03\xed"), 1002),
        (frame(CLOSE, b"\x03\xe8\xff"), 1007),
        (b"\x81\xff" + b"\xff" * 8 + bytes(4), 1009),
        (b"\x82\xff" + (1 << 62).to_bytes(8, "big") + bytes(4), 1009),
        (b"\x81\xff" + ((1 << 20) + 1).to_bytes(8, "big"), 1009),
        (frame(TEXT, b"x" * (1 << 19), fin=False) + frame(CONTINUATION, b"x" * ((1 << 19) + 1)), 1009),
        (frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 1024, 1008),
        (frame(BINARY, b"x", fin=False) + frame(CONTINUATION, b"x", fin=False) * 5000, 1008),
    ],
)
@async_test
async def test_frames_that_break_the_rules_close_the_connection(tmp_path: Path, data: bytes, code: int) -> None:
    async with fake_host(tmp_path, script=hang) as host:
        use = host.gateway.quotas.of("alice")
        async with host.client("bob") as bob, authenticated(host) as client:
            client.send(call(1, "generate", prompt="x"))
            await host.worker.until(lambda worker: len(worker.starts) == 1)
            client.send(data)
            assert await client.closing() == code
            # Its runs have ended, its place is free, and bob has noticed nothing.
            await host.worker.until(lambda worker: len(worker.cancels) == 1)
            await eventually(lambda: use.idle)
            assert (await bob.data("health"))["status"] == "healthy"
        await eventually(lambda: not host.gateway.connections and not host.gateway.quotas.in_use)


@async_test
async def test_compression_is_never_agreed_to(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other, raw(host) as client:
        head = await client.upgrade(
            f"Authorization: Bearer {host.keys['alice']}",
            "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits, x-webkit-deflate-frame",
        )
        assert head.startswith("HTTP/1.1 101 ") and "extensions" not in head.lower()
        assert (await client.message())["type"] == "auth_success"
        assert len(BOMB_FRAME) < 1 << 20
        client.send(frame(TEXT, BOMB_FRAME, rsv=4))
        await other.works()
        assert await client.closing() == 1002


@async_test
async def test_a_message_in_many_fragments_with_pings_between(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host), authenticated(host) as client:
        text = json.dumps({"id": 1, "function": "generate", "params": {"prompt": "é" * 400}}, ensure_ascii=False)
        data = text.encode()
        client.send(frame(TEXT, data[:1], fin=False))
        for n in range(1, len(data) - 1):
            client.send(frame(CONTINUATION, data[n : n + 1], fin=False) + frame(PING) + frame(PONG, b"?"))
        client.send(frame(CONTINUATION, data[-1:]))
        assert (await client.message())["data"]["text"] == "é" * 400


@pytest.mark.parametrize(
    "begin",
    [
        frame(TEXT, b'{"id":1', fin=False),
        frame(TEXT, b'{"id":1,"function":"health"}')[:-1],
        b"\x81",
        b"\x81\xfe",
        frame(TEXT, b"", fin=False) + frame(PING, b"x"),
        call(1, "health") + frame(BINARY, bytes(100_000))[:-1],
    ],
)
@async_test
async def test_a_message_never_finished(tmp_path: Path, begin: bytes) -> None:
    async with (
        fake_host(tmp_path, limits=GatewayLimits(message_seconds=0.2)) as host,
        bystander(host) as other,
        authenticated(host) as client,
    ):
        client.send(begin)
        await other.works()

        async def keep_alive() -> None:
            while not client.writer.is_closing():
                client.send(frame(PING) if begin[0] == TEXT else b"")
                await asyncio.sleep(0.02)

        # Control frames between fragments are no progress.
        alive = asyncio.create_task(keep_alive())
        assert await client.closing() == 1008
        alive.cancel()
        await asyncio.wait([alive])


@async_test
async def test_a_slow_message_is_finished_in_time(tmp_path: Path) -> None:
    async with (
        fake_host(tmp_path, limits=GatewayLimits(message_seconds=8.0)) as host,
        bystander(host) as other,
        authenticated(host) as client,
    ):
        for byte in call(1, "generate", prompt="slow"):
            client.send(bytes([byte]))
            await asyncio.sleep(0.002)
        assert (await client.message())["data"]["text"] == "slow"
        await other.works()


@async_test
async def test_a_ping_flood_of_a_client_that_never_reads(tmp_path: Path) -> None:
    limits = GatewayLimits(read_stop_bytes=256 << 10, write_high_bytes=64 << 10, write_low_bytes=16 << 10)
    async with (
        fake_host(tmp_path, limits=limits) as host,
        bystander(host) as other,
        authenticated(host, receive_buffer=4096) as client,
    ):
        (connection,) = [c for c in host.gateway.connections if c.tenant == "alice"]
        flood = frame(PING, b"x" * 125) * 500
        # Written as long as the gateway reads; it must stop by itself.
        client.writer.transport.set_write_buffer_limits(high=1 << 16)
        sent = 0
        while client.writer.transport.get_write_buffer_size() < 1 << 20:
            client.send(flood)
            sent += len(flood)
            await asyncio.sleep(0)
            assert sent < 200 << 20
        # What it holds is bounded: some pongs, one read of the socket, one frame.
        for _ in range(50):
            await asyncio.sleep(0)
            assert connection.buffered < limits.read_stop_bytes + (512 << 10)
        await other.works()
        client.writer.transport.abort()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b'{"id":1,"id":2,"function":"health"}', None),
        (b'{"id":1,"function":"nothing","function":"health"}', None),
        (b'{"id":1,"function":"generate","params":{"prompt":"x","max_tokens":NaN}}', "malformed_message"),
        (b'{"id":1,"function":"generate","params":{"prompt":"x","temperature":Infinity}}', "malformed_message"),
        (b'{"id":1,"function":"generate","params":{"prompt":"x","temperature":1e999}}', "invalid_params"),
        (b'{"id":1,"function":"generate","params":{"prompt":"x","seed":1e400}}', "invalid_params"),
        (b'{"id":1,"function":"generate","params":{"prompt":"x","max_tokens":' + b"9" * 900_000 + b"}}", None),
        (b'{"id":' + b"9" * 900_000 + b',"function":"health"}', "malformed_message"),
        (b'{"id":1e1,"function":"health"}', "malformed_message"),
        (b'{"id":{"a":1},"function":"health"}', "malformed_message"),
        (b'{"id":false,"function":"health"}', "malformed_message"),
        (b'{"id":"","function":"health"}', None),
        (b'{"id":-9007199254740992,"function":"health"}', None),
        (b'{"id":1,"function":"' + b"x" * 900_000 + b'"}', "unknown_function"),
        (b'{"id":1,"function":"health","params":' + b"[" * 900_000 + b"}", "malformed_message"),
        (b'{"id":1,"function":"run","params":{"module":"x","input":' + b'{"a":' * 150_000 + b"}}", "malformed_message"),
        (b'{"id":1,"function":"generate","params":{"messages":' + b"[{}," * 200_000 + b"]}}", "malformed_message"),
        (b'{"id":1,"function":"generate","params":{"prompt":"\xed\xa0\x80"}}', "malformed_message"),
        (b'{"id":1,"function":"generate","params":{"prompt":"\\ud800"}}', None),
        (b'{"id":1,"function":"health",' + b'"x":1,' * 100_000 + b'"y":1}', None),
        (b" " * 1_000_000, "malformed_message"),
        (b"\0" * 1000, "malformed_message"),
    ],
)
@async_test
async def test_json_that_wants_to_hurt(tmp_path: Path, text: bytes, code: str | None) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other, authenticated(host) as client:
        client.send(frame(TEXT, text))
        answer = await client.message()
        if code is not None:
            assert answer["status"] == "error" and answer["error"]["code"] == code, answer
        assert len(json.dumps(answer)) < 16_384
        await other.works()
        client.send(call("after"))
        assert (await client.message())["id"] == "after"


@async_test
async def test_ids_reused_and_alike(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client("bob") as bob, authenticated(host) as client:
        ids: list[Any] = [0, "0", -0, "", "1", 1, "a" * 128]
        expected = [0, "0", "", "1", 1, "a" * 128]
        for ident in ids:
            client.send(call(ident, "generate", prompt="x"))
        answer = await client.message()
        assert answer["id"] == 0 and answer["error"]["code"] == "duplicate_id"
        await host.worker.until(lambda worker: len(worker.starts) == len(expected))
        for ident in expected * 20:
            client.send(call(ident, "health"))
        for ident in expected * 20:
            answer = await client.message()
            assert answer["id"] == ident and answer["error"]["code"] == "duplicate_id"
        # Nobody else's ids, and all are free again when their calls have ended.
        assert (await bob.data("health"))["status"] == "healthy"
        for number in range(1, len(expected) + 1):
            host.worker.finish(number)
        ended = [(await client.message())["id"] for _ in expected]
        assert ended == expected
        for ident in expected:
            client.send(call(ident, "metadata"))
            answer = await client.message()
            assert answer["id"] == ident and answer["status"] == "complete"


@async_test
async def test_binary_before_the_key_and_frames_after_the_close(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client("bob") as bob:
        async with raw(host) as client:
            await client.upgrade()
            client.send(frame(BINARY, bytes(64)))
            assert (await client.message())["type"] == "auth_required"
            assert (await client.message())["type"] == "auth_failed"
            assert await client.closing() == 4401
        async with authenticated(host) as client:
            client.send(frame(CLOSE, b"\x03\xe8") + call(1, "generate", prompt="after the close") * 10)
            assert await client.closing() == 1000
        async with raw(host) as client:
            await client.upgrade()
            wrong = frame(TEXT, b'{"type":"auth","api_key":"wrong"}')
            right = frame(TEXT, json.dumps({"type": "auth", "api_key": host.keys["alice"]}).encode())
            client.send(wrong + right + call(1, "generate", prompt="x") * 10)
            assert (await client.message())["type"] == "auth_required"
            assert (await client.message())["type"] == "auth_failed"
            assert await client.closing() == 4401
        assert not host.worker.starts
        assert (await bob.data("health"))["status"] == "healthy"
    assert not host.gateway.quotas.in_use


@async_test
async def test_partial_messages_of_many_connections_are_bounded_together(tmp_path: Path) -> None:
    limits = GatewayLimits(tenant_buffer_bytes=4 << 20, message_seconds=60.0)
    async with fake_host(tmp_path, limits=limits) as host, bystander(host) as other:
        clients = []
        contexts = [authenticated(host) for _ in range(8)]
        for context in contexts:
            clients.append(await context.__aenter__())
        for client in clients:
            client.send(frame(TEXT, bytes(1 << 20))[:-100_000])
        codes = [asyncio.create_task(client.closing()) for client in clients]
        await eventually(lambda: sum(code.done() for code in codes) >= 4)
        await other.works()
        held = sum(connection.buffered for connection in host.gateway.connections)
        assert held <= limits.tenant_buffer_bytes
        closed = [code.result() for code in codes if code.done()]
        assert set(closed) == {1013} and 4 <= len(closed) < 8
        for code in codes:
            code.cancel()
        await asyncio.wait(codes)
        for context in contexts:
            await context.__aexit__(None, None, None)
