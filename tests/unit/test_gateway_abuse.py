"""Attacks on the way in: handshakes that never end, connections that only hold a place, floods of them.

Each through a real gateway on loopback, with another tenant at work on it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from realm.gateway.server import ClientServer
from realm.settings import GatewayLimits
from tests.fake_host import FakeHost, async_test, eventually, fake_host, hang
from tests.raw_client import TEXT, Raw, authenticated, bystander, call, frame, raw


@contextlib.asynccontextmanager
async def crowd(host: FakeHost, size: int, source: str = "127.0.0.1") -> AsyncIterator[list[Raw]]:
    """As many connections as given, all open at the gateway."""
    async with contextlib.AsyncExitStack() as stack:
        before = len(host.gateway.connections)
        clients = [await stack.enter_async_context(raw(host, source=source)) for _ in range(size)]
        await eventually(lambda: len(host.gateway.connections) == before + size)
        yield clients


# --- handshakes -----------------------------------------------------------------------------------


@async_test
async def test_slow_and_silent_handshakes_end(tmp_path: Path) -> None:
    limits = GatewayLimits(auth_seconds=0.5)
    async with (
        fake_host(tmp_path, limits=limits) as host,
        bystander(host) as other,
        raw(host) as silent,
        raw(host) as dripping,
        raw(host) as half,
        raw(host) as keyless,
    ):
        assert (await keyless.upgrade()).startswith("HTTP/1.1 101 ")
        half.send(b"GET / HTTP/1.1\r\nHost: x\r\n")

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                for byte in b"GET / HTTP/1.1\r\n" + b"X-Slow: 1\r\n" * 1000:
                    dripping.send(bytes([byte]))
                    await asyncio.sleep(0.02)

        dripper = asyncio.create_task(drip())
        await other.works()
        assert (await keyless.message())["type"] == "auth_required"
        assert (await keyless.message()) == {"type": "auth_failed", "error": "no key came in time"}
        assert await keyless.closing() == 4401
        for client in (silent, half, dripping):
            await client.ended()
        dripper.cancel()
        await asyncio.wait([dripper])


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"x" * 9000, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 9000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200, 431),
        (b"GET / HTTP/1.1\r\n" + (b"X: " + b"y" * 4000 + b"\r\n") * 10, 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 30_000, 400),
        (b"\r\n" * 20_000, 400),
        (b"\xff" * 100_000, 414),
    ],
)
@async_test
async def test_requests_too_long_or_none(tmp_path: Path, request_: bytes, status: int) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other, raw(host) as client:
        client.send(request_)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while data := await client.reader.read(4096):
                answer += data
        # A server that does not read on may reset the connection, and the answer with it.
        assert not answer or answer.startswith(b"HTTP/1.1 %d " % status), answer[:100]
        await other.works()


GOOD = [
    b"Host: x",
    b"Upgrade: websocket",
    b"Connection: Upgrade",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    b"Sec-WebSocket-Version: 13",
]


@pytest.mark.parametrize(
    ("lines", "statuses"),
    [
        *[([*GOOD, line], "101 400 426") for line in GOOD],
        *[([line for line in GOOD if line != left], "101 400 426") for left in GOOD],
        ([*GOOD, b"Authorization: Bearer a", b"authorization: Bearer b"], "101"),
        ([*GOOD, b"Authorization: Bearer \xff\xfe\x80"], "101"),
        ([*GOOD, b"Authorization: " + b"Bearer " * 1000], "101"),
        ([*GOOD, b"Origin: a", b"Origin: b"], "101 400 403"),
        ([*GOOD, b"Sec-WebSocket-Protocol: \xff", b'Sec-WebSocket-Protocol: ,,;="' * 3], "101 400"),
        ([*GOOD, b"Sec-WebSocket-Extensions: ;;==,,\xff"], "101 400"),
        ([*GOOD, b"Content-Length: 99999999999"], "cut"),
        ([*GOOD, b"Transfer-Encoding: chunked"], "cut"),
        ([*GOOD, b"X: a\0b"], "cut"),
        ([*GOOD, b" folded: line"], "cut"),
        ([*GOOD[:3], b"Sec-WebSocket-Key: short", GOOD[4]], "400"),
        ([*GOOD[:4], b"Sec-WebSocket-Version: 99999999999999999999"], "400 426"),
    ],
)
@async_test
async def test_odd_handshakes_are_no_fault_of_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: list[bytes], statuses: str
) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other, raw(host) as client:
        client.send(b"GET /?x=y HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n")
        head = b"HTTP/1.1 cut" if statuses == "cut" else await client.reader.readuntil(b"\r\n")
        assert head.split(b" ")[1].decode() in statuses.split(), head
        if statuses == "cut":
            # No request at all: no answer.
            assert await client.reader.read() == b""
        elif head.startswith(b"HTTP/1.1 101 "):
            await client.reader.readuntil(b"\r\n\r\n")
            first = await client.message()
            if any(line.lower().startswith(b"authorization") for line in lines):
                assert first["type"] == "auth_failed" and await client.closing() == 4401
            else:
                assert first["type"] == "auth_required"
        else:
            await client.ended()
        await other.works()
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


@async_test
async def test_a_client_that_is_gone_when_its_goodbye_is_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fake_host(tmp_path) as host, bystander(host), authenticated(host) as client:
        (connection,) = [c for c in host.gateway.connections if c.tenant == "alice"]

        def not_connected() -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

        monkeypatch.setattr(connection._transport, "write_eof", not_connected)
        client.send(frame(8, b"\x03\xe8"))
        assert await client.receive() == (8, b"\x03\xe8")
    assert not caplog.records


@pytest.mark.parametrize(
    "data",
    [
        frame(TEXT, b'{"type":"auth","api_key":"' + b"x" * 900_000)[:800_000],
        frame(TEXT, b"", fin=False) + frame(0, b"", fin=False) * 1000 + frame(0, b"x" * 100, fin=False) * 1000,
        frame(9, b"x" * 100) * 1000,
    ],
)
@async_test
async def test_too_much_before_the_key(tmp_path: Path, data: bytes) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other, raw(host) as client:
        await client.upgrade()
        client.send(data)
        assert (await client.message())["type"] == "auth_required"
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while (answer := await client.receive())[0] != TEXT:
                pass
            assert b"too much came before a key" in answer[1]
        await client.ended()
        await other.works()


@async_test
async def test_what_comes_with_the_key_waits_for_its_look_up(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host), raw(host) as client:
        await client.upgrade(f"Authorization: Bearer {host.keys['alice']}")
        # Much more than a client without a key may send.
        client.send(b"".join(call(n, "generate", prompt="x" * 1000) for n in range(100)))
        assert (await client.message())["type"] == "auth_success"
        assert (await client.message())["status"] == "connected"
        seen = [(await client.message())["id"] for _ in range(100)]
        assert sorted(seen) == list(range(100))


# --- places ---------------------------------------------------------------------------------------


@async_test
async def test_a_flood_from_one_address_hits_only_itself(tmp_path: Path) -> None:
    limits = GatewayLimits(newcomers=40, newcomers_per_address=20, newcomer_grace=0.0)
    async with fake_host(tmp_path, limits=limits) as host, bystander(host) as other:
        async with contextlib.AsyncExitStack() as stack:
            flood = [await stack.enter_async_context(raw(host, source="127.0.0.9")) for _ in range(60)]
            newcomers = host.server.entrance.newcomers
            await eventually(lambda: len(newcomers) == 20)
            # The oldest had to go.
            for client in flood[:40]:
                await client.ended()
            async with host.client(), host.client() as client:
                assert (await client.data("health"))["status"] == "healthy"
            await other.works()
            # The survivors are the latest, and may still show a key.
            await flood[-1].upgrade(f"Authorization: Bearer {host.keys['alice']}")
            assert (await flood[-1].message())["type"] == "auth_success"
        await eventually(lambda: not len(newcomers))


@async_test
async def test_when_all_places_are_taken_the_largest_crowd_yields(tmp_path: Path) -> None:
    limits = GatewayLimits(newcomers=30, newcomers_per_address=20, newcomer_grace=0.0)
    async with (
        fake_host(tmp_path, limits=limits) as host,
        bystander(host) as other,
        crowd(host, 18, "127.0.0.9") as large,
        crowd(host, 12, "127.0.0.8") as small,
    ):
        async with raw(host, source="127.0.0.7") as client:
            await client.upgrade(f"Authorization: Bearer {host.keys['alice']}")
            assert (await client.message())["type"] == "auth_success"
            await large[0].ended()
            for lucky in (*large[1:], *small):
                assert (await lucky.upgrade()).startswith("HTTP/1.1 101 ")
        await other.works()


@async_test
async def test_a_burst_turns_the_new_ones_away(tmp_path: Path) -> None:
    limits = GatewayLimits(newcomers=10, newcomers_per_address=10, newcomer_grace=60.0)
    async with fake_host(tmp_path, limits=limits) as host, bystander(host) as other, crowd(host, 10) as clients:
        async with raw(host) as late:
            await late.ended()
        await other.works()
        for client in clients:
            await client.upgrade(f"Authorization: Bearer {host.keys['alice']}")
            assert (await client.message())["type"] == "auth_success"
        async with host.client():
            pass


@async_test
async def test_a_tenants_connections_are_limited_and_given_back(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang, defaults={"connections": 2}) as host:
        use = host.gateway.quotas.of("alice")
        async with host.client("bob") as bob:
            for round_ in range(3):
                async with authenticated(host) as first, host.client() as second:
                    assert use.connections == 2
                    async with raw(host) as third:
                        await third.upgrade(f"Authorization: Bearer {host.keys['alice']}")
                        refused = await third.message()
                        assert refused["type"] == "refused" and refused["error"]["code"] == "rate_limited"
                        details = {"name": "connections", "limit": 2, "used": 2, "unit": "connections"}
                        assert refused["error"]["details"] == details and refused["error"]["retry_after"] > 0
                        assert await third.closing() == 1013
                    assert use.connections == 2
                    assert (await bob.data("health"))["status"] == "healthy"
                    # However it ends: with a goodbye, cut, with a protocol error, with calls in progress.
                    first.send(call(1, "generate", prompt="x"))
                    await host.worker.until(lambda worker, n=round_: len(worker.starts) == n + 1)
                    if round_ == 0:
                        first.writer.transport.abort()
                    elif round_ == 1:
                        first.send(frame(TEXT, b"x", mask=None))
                        assert await first.closing() == 1002
                    else:
                        host.gateway.drop_key(host.key_ids["alice"])
                        assert await first.closing() == 4401
                    await eventually(lambda: use.connections <= 1)
                    await second.socket.close()
                await eventually(lambda: use.connections == 0)
        await eventually(lambda: not host.gateway.quotas.in_use)
        assert host.server.entrance.authenticated == 0


@async_test
async def test_the_hosts_connections_are_limited_without_newcomers(tmp_path: Path) -> None:
    async with fake_host(tmp_path, limits=GatewayLimits(connections=2)) as host, crowd(host, 10):
        async with host.client() as client, host.client("bob"):
            with pytest.raises(InvalidStatus) as caught:
                async with host.raw():
                    pass
            assert caught.value.response.status_code == 503
            assert caught.value.response.headers["Retry-After"] == "1"
            assert (await client.data("health"))["status"] == "healthy"
        await eventually(lambda: host.server.entrance.authenticated == 0)
        async with host.client():
            pass


@async_test
async def test_idle_connections_by_the_hundred(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other:
        async with crowd(host, 300):
            await other.works()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(200):
                await stack.enter_async_context(authenticated(host))
            await other.works()
            assert host.gateway.quotas.of("alice").connections == 200


@async_test
async def test_the_host_survives_having_no_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other:
        listener = host.server._listener
        assert listener is not None

        class Exhausted:
            """A listening socket of a process that may open nothing more."""

            failures = 0

            def fileno(self) -> int:
                assert listener is not None
                return listener.fileno()

            def accept(self) -> tuple[socket.socket, object]:
                Exhausted.failures += 1
                raise OSError(errno.EMFILE, "Too many open files")

            def close(self) -> None:
                assert listener is not None
                listener.close()

        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        monkeypatch.setattr(host.server, "_listener", Exhausted())
        host.server._listen()
        async with raw(host) as waiting:
            await eventually(lambda: Exhausted.failures)
            # It is not asked again and again meanwhile, and those who are in go on.
            for _ in range(20):
                await asyncio.sleep(0)
            assert Exhausted.failures == 1
            await other.works()
            monkeypatch.setattr(host.server, "_listener", listener)
            assert (await waiting.upgrade()).startswith("HTTP/1.1 101 ")


@async_test
async def test_the_end_of_the_server_leaves_no_handshake(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host:
        server = ClientServer(host.gateway)
        address = socket.socket()
        address.bind(("127.0.0.1", 0))
        await server.open(address)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(5)]
        await eventually(lambda: len(server.entrance.newcomers))
        await server.close(grace=0.1)
        assert not len(server.entrance.newcomers) and not host.gateway.connections
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        for client in clients:
            client.close()
