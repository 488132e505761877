"""Floods of good messages: calls, answers nobody reads, uploads never finished. With another tenant at work."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from realm.gateway.connection import Connection
from realm.run_messages import Output, StartRun
from realm.settings import GatewayLimits
from tests.fake_host import WASM, FakeHost, FakeWorker, async_test, echo, eventually, fake_host, hang
from tests.raw_client import BINARY, TEXT, Raw, authenticated, bystander, call, frame


def connection_of(host: FakeHost, tenant: str = "alice") -> Connection:
    (connection,) = [c for c in host.gateway.connections if c.tenant == tenant]
    return connection


def chunk(upload: int, offset: int, data: bytes) -> bytes:
    return frame(BINARY, upload.to_bytes(8, "little") + offset.to_bytes(8, "little") + data)


def begin(ident: int, name: str = "m", size: int = len(WASM), sha256: str = "0" * 64) -> bytes:
    return call(ident, "modules.begin", name=name, size=size, sha256=sha256)


# --- calls ----------------------------------------------------------------------------------------


@async_test
async def test_calls_beyond_the_rate_are_refused_and_the_client_slowed(tmp_path: Path) -> None:
    limits = GatewayLimits(refusals=10, refusal_pause=0.3)
    async with (
        fake_host(tmp_path, limits=limits, defaults={"requests_per_minute": 50}) as host,
        bystander(host) as bob,
        authenticated(host) as client,
    ):
        # Each of 400 calls is answered, though all but 50 with a refusal, and those not at once.
        client.send(b"".join(call(n, "metadata", junk=[1] * 100) for n in range(70)))
        answers = [await client.message() for _ in range(50 + limits.refusals)]
        for n, answer in enumerate(answers):
            assert answer["id"] == n
            assert (answer["status"] == "complete") is (n < 50)
        error = answers[-1]["error"]
        assert error["code"] == "rate_limited" and 0 < error["retry_after"] <= 60
        assert error["details"]["name"] == "requests_per_minute" and error["details"]["limit"] == 50
        assert error["details"]["unit"] == "calls/min"
        connection = connection_of(host)
        await eventually(lambda: connection._hold)
        await bob.works()
        assert [(await client.message())["id"] for _ in range(60, 70)] == list(range(60, 70))
        # A call that is refused starts nothing, and takes no id.
        assert not connection._session.calls


@async_test
async def test_a_refused_client_costs_nothing_while_it_is_not_read(tmp_path: Path) -> None:
    limits = GatewayLimits(refusals=10, refusal_pause=2.0)
    async with fake_host(tmp_path, limits=limits, defaults={"requests_per_minute": 1}) as host:
        async with authenticated(host) as client, host.client("admin") as other:
            for n in range(20):
                client.send(call(n, "metadata"))
            for _ in range(11):
                await client.message()
            connection = connection_of(host)
            await eventually(lambda: connection._hold)
            client.writer.transport.set_write_buffer_limits(high=1 << 16)
            for _ in range(200):
                client.send(call(1, "metadata", junk="x" * 100_000))
                await asyncio.sleep(0)
            # Much has been sent, and one read of the socket at most was taken.
            assert connection.buffered <= 256 << 10
            assert client.writer.transport.get_write_buffer_size() > 1 << 20
            assert (await other.call("health"))["status"] == "complete"
            client.writer.transport.abort()
        await eventually(lambda: not host.gateway.connections)
        assert not host.gateway.quotas.in_use


@async_test
async def test_ten_thousand_frames_in_one_write_hold_nobody_up(tmp_path: Path) -> None:
    defaults = {"requests_per_minute": 1_000_000}
    async with (
        fake_host(tmp_path, defaults=defaults) as host,
        bystander(host) as bob,
        authenticated(host) as client,
    ):
        read: list[int] = []
        connection = connection_of(host)
        original = connection.read

        def counted(units: int, late: Callable[[], bool]) -> tuple[int, bool]:
            used, more = original(units, late)
            read.append(used)
            return used, more

        connection.read = counted  # type: ignore[method-assign]
        count = 10_000
        client.send(b"".join(call(n, "nothing") for n in range(count)))
        answered = 0

        async def answers() -> None:
            nonlocal answered
            for n in range(count):
                assert (await client.message())["id"] == n
                answered += 1

        reading = asyncio.create_task(answers())
        await eventually(lambda: answered > 100)
        await bob.works()
        # bob's answer came in the midst of it: the flood is worked off in small parts.
        assert answered < count
        await reading
        assert max(read) <= 32


@async_test
async def test_malformed_messages_and_bad_chunks_count_as_calls(tmp_path: Path) -> None:
    for bad in (frame(TEXT, b"no call"), frame(BINARY, b"short"), chunk(9, 0, b"x")):
        folder = tmp_path / str(len(bad))
        folder.mkdir()
        async with (
            fake_host(folder, defaults={"requests_per_minute": 20}) as host,
            bystander(host) as bob,
            authenticated(host) as client,
        ):
            client.send(bad * 30)
            codes = [(await client.message())["error"]["code"] for _ in range(30)]
            assert "rate_limited" not in codes[:20] and set(codes[20:]) == {"rate_limited"}
            await bob.works()


# --- answers that nobody reads ---------------------------------------------------------------------


@async_test
async def test_a_client_that_never_reads_is_closed(tmp_path: Path) -> None:
    limits = GatewayLimits(
        unsent_bytes=1 << 20, read_stop_bytes=8 << 20, write_high_bytes=64 << 10, write_low_bytes=16 << 10
    )
    async with fake_host(tmp_path, script=hang, limits=limits) as host, host.client("bob") as bob:
        await bob.start("generate", prompt="x")
        await host.worker.until(lambda worker: len(worker.starts) == 1)
        async with authenticated(host, receive_buffer=4096) as client:
            connection = connection_of(host)
            for n in range(40):
                client.send(call(n, "generate", prompt="x", stream=True))
            await host.worker.until(lambda worker: len(worker.starts) == 41)
            # Each guest stays within its credit, and all together are too much.
            while not connection.closing:
                for start in host.worker.starts[1:]:
                    host.worker.say(Output(start.run, b"x" * 16_384, 1))
                await asyncio.sleep(0.001)
            # All its runs end, at once; nobody else's do.
            await host.worker.until(lambda worker: len(worker.cancels) == 40)
            assert 1 not in [cancel.run for cancel in host.worker.cancels]
            await eventually(lambda: connection not in host.gateway.connections)
        host.worker.finish(1)
        assert (await bob.replies(1))[-1]["status"] == "complete"
    assert not host.gateway.quotas.in_use


@async_test
async def test_unsent_answers_of_many_connections_are_bounded_together(tmp_path: Path) -> None:
    def script(worker: FakeWorker, start: StartRun) -> None:
        if start.tenant == "bob":
            echo(worker, start)
        else:
            worker.say(Output(start.run, b"x" * (1 << 20), 1))
            worker.finish(start.run)

    limits = GatewayLimits(tenant_buffer_bytes=8 << 20)
    async with (
        fake_host(tmp_path, script=script, limits=limits) as host,
        bystander(host) as bob,
        contextlib.AsyncExitStack() as stack,
    ):
        clients: list[Raw] = []
        for _ in range(6):
            clients.append(await stack.enter_async_context(authenticated(host, receive_buffer=4096)))
        for client in clients:
            # Each one is well within what a connection may have unsent.
            client.send(b"".join(call(n, "generate", prompt="x") for n in range(10)))
        await eventually(lambda: len(host.gateway.connections) < 7)
        await bob.works()

        def unsent() -> int:
            return sum(c.buffered for c in host.gateway.connections if not c.closing)

        await eventually(lambda: unsent() <= limits.tenant_buffer_bytes)
        for client in clients:
            client.writer.transport.abort()


# --- uploads --------------------------------------------------------------------------------------


@async_test
async def test_uploads_never_finished_end_and_their_files_go(tmp_path: Path) -> None:
    limits = GatewayLimits(upload_idle_seconds=0.3)
    async with fake_host(tmp_path, limits=limits, defaults={"uploads": 3}) as host, bystander(host) as bob:
        use = host.gateway.quotas.of("alice")
        async with authenticated(host) as client, host.client() as second:
            for n in range(2):
                client.send(begin(n, size=1000))
                assert (await client.message())["data"]["upload"] == n + 1
            client.send(chunk(1, 0, WASM))
            assert (await client.message())["type"] == "upload_ack"
            assert use.uploads == 2 and len(list((tmp_path / "incoming").iterdir())) == 2
            # The places are the tenant's, whichever of its connections asks.
            await second.begin("third", WASM)
            error = await second.error("modules.begin", name="x", size=1, sha256="0" * 64)
            assert error["code"] == "rate_limited" and error["details"]["name"] == "uploads"
            ended = [await client.message() for _ in range(2)]
            assert {answer["upload"] for answer in ended} == {1, 2}
            for answer in ended:
                assert answer["type"] == "upload_error" and answer["error"]["code"] == "upload_idle"
            await eventually(lambda: use.uploads == 0)
            assert not list((tmp_path / "incoming").iterdir())
            client.send(chunk(1, len(WASM), b"late"))
            assert (await client.message())["error"]["code"] == "upload_not_found"
            await bob.works()
            client.send(begin(9))
            assert (await client.message())["status"] == "complete"


@async_test
async def test_a_flood_of_empty_chunks_counts_as_calls(tmp_path: Path) -> None:
    async with (
        fake_host(tmp_path, defaults={"requests_per_minute": 20}) as host,
        bystander(host) as bob,
        authenticated(host) as client,
    ):
        client.send(begin(1))
        assert (await client.message())["data"]["upload"] == 1
        client.send(chunk(1, 0, b"") * 30)
        answers = [await client.message() for _ in range(30)]
        assert {answer["type"] for answer in answers[:19]} == {"upload_ack"}
        for answer in answers[19:]:
            assert answer["type"] == "upload_error" and answer["upload"] == 1
            assert answer["error"]["code"] == "rate_limited" and answer["error"]["retry_after"] > 0
        # What completes the upload is paid for by its beginning.
        client.send(chunk(1, 0, WASM))
        assert await client.message() == {"type": "upload_ack", "upload": 1, "received": len(WASM)}
        await bob.works()


@async_test
async def test_empty_chunks_do_not_keep_an_upload(tmp_path: Path) -> None:
    limits = GatewayLimits(upload_idle_seconds=0.3)
    async with fake_host(tmp_path, limits=limits) as host, bystander(host), authenticated(host) as client:
        client.send(begin(1, size=1000))
        assert (await client.message())["data"]["upload"] == 1
        while True:
            client.send(chunk(1, 0, b""))
            answer = await client.message()
            if answer["type"] == "upload_error":
                break
            await asyncio.sleep(0.01)
        assert answer["error"]["code"] == "upload_idle"


@pytest.mark.parametrize("end", ["cut", "goodbye", "revoked", "protocol error", "cancelled", "refused"])
@async_test
async def test_an_upload_gives_its_place_back_once(tmp_path: Path, end: str) -> None:
    async with fake_host(tmp_path) as host, bystander(host):
        use = host.gateway.quotas.of("alice")
        async with host.client() as client:
            committing = (await client.begin("a", WASM))["upload"]
            await client.begin("b", WASM + b"b")
            await client.chunk(committing, 0, WASM)
            host.compiler.gate.clear()
            before = host.compiler.calls
            commit = await client.start("modules.commit", upload=committing)
            await eventually(lambda: host.compiler.calls > before)
            assert use.uploads == 2
            # During the commit nothing may come, and it is neither begun twice nor given up.
            error = await client.chunk(committing, len(WASM), b"")
            assert error["error"]["code"] == "upload_out_of_order"
            for function in ("modules.commit", "modules.abort"):
                again = await client.start(function, upload=committing)
                (reply,) = await client.replies(again)
                assert reply["error"]["code"] == "upload_out_of_order"
            if end == "cut":
                client.socket.transport.abort()
            elif end == "goodbye":
                await client.socket.close()
            elif end == "revoked":
                host.gateway.drop_key(host.key_ids["alice"])
            elif end == "protocol error":
                client.socket.transport.write(frame(TEXT, b"x", mask=None))
            elif end == "cancelled":
                assert (await client.data("cancel", id=commit))["cancelled"] is True
                assert (await client.replies(commit))[-1]["status"] == "cancelled"
            else:
                host.compiler.gate.set()
                assert (await client.replies(commit))[-1]["status"] == "complete"
            host.compiler.gate.set()
            await eventually(lambda: use.uploads == (1 if end in ("cancelled", "refused") else 0))
        await eventually(lambda: use.uploads == 0)


@async_test
async def test_foreign_uploads_cannot_be_touched(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host), host.client() as alice, host.client("admin") as admin:
        number = (await alice.begin("m", WASM))["upload"]
        for other in (admin,):
            assert (await other.chunk(number, 0, b"bad"))["error"]["code"] == "upload_not_found"
            for function in ("modules.commit", "modules.abort"):
                assert (await other.error(function, upload=number))["code"] == "upload_not_found"
        # Overlapping, past the end, with gaps: refused, and the upload goes on.
        await alice.chunk(number, 0, WASM[:4])
        for offset, data in ((0, WASM), (2, WASM[2:]), (5, b"x"), (4, WASM), (2**64 - 1, b"x"), (8, b"")):
            error = await alice.chunk(number, offset, data)
            assert error["error"]["details"]["received"] == 4, error
        await alice.chunk(number, 4, WASM[4:])
        assert (await alice.data("modules.commit", upload=number))["size"] == len(WASM)


@async_test
async def test_a_chunk_sent_byte_by_byte(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host), authenticated(host) as client:
        content = WASM + bytes(200)
        client.send(begin(1, size=len(content), sha256=hashlib.sha256(content).hexdigest()))
        assert (await client.message())["data"]["upload"] == 1
        for n in range(len(content)):
            client.send(chunk(1, n, content[n : n + 1]))
        for n in range(len(content)):
            assert await client.message() == {"type": "upload_ack", "upload": 1, "received": n + 1}
        client.send(call(2, "modules.commit", upload=1))
        assert json.dumps(await client.message()).count("sha256") == 1
