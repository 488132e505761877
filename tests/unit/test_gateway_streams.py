"""Streams under stress: slow readers, clients that vanish, workers and engines that die."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import msgspec
import pytest

from realm.messages import LimitMet
from realm.run_messages import ErrorInfo, Output, RunFinished, StartRun, StoreGet, StoreSet, Usage
from realm.settings import GatewayLimits
from tests.fake_host import FakeWorker, async_test, echo, eventually, fake_host, hang


class Flood:
    """A guest that emits ``total`` bytes as fast as its credit lets it, and keeps account."""

    def __init__(self, total: int, piece: int = 4096) -> None:
        self.total = total
        self.piece = piece
        self.emitted = 0
        self.credit = 0
        self.run = 0

    def __call__(self, worker: FakeWorker, start: StartRun) -> None:
        self.run, self.credit = start.run, start.credit
        self.emit(worker)

    def emit(self, worker: FakeWorker) -> None:
        while self.emitted < self.total and self.credit >= self.piece:
            worker.say(Output(self.run, b"x" * self.piece, 1))
            self.emitted += self.piece
            self.credit -= self.piece
        if self.emitted >= self.total:
            worker.finish(self.run)
            self.total = -1

    async def drive(self, worker: FakeWorker) -> None:
        """Emit whenever credit comes, until all is out."""
        seen = 0
        while self.total >= 0:
            await worker.until(lambda worker, seen=seen: len(worker.credits) > seen)
            self.credit += sum(credit.size for credit in worker.credits[seen:])
            seen = len(worker.credits)
            self.emit(worker)


@async_test
async def test_a_slow_reader_pauses_only_its_own_guest(tmp_path: Path) -> None:
    total = 24 << 20
    flood = Flood(total)

    def script(worker: FakeWorker, start: StartRun) -> None:
        (flood if start.module == "flood" else echo)(worker, start)

    limits = GatewayLimits(write_high_bytes=64 << 10, write_low_bytes=16 << 10)
    async with fake_host(tmp_path, script=script, limits=limits) as host, host.client() as client:
        await client.push("flood")
        # A client that reads nothing, with a small buffer of its own.
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", host.server.port))
        async with host.client(sock=slow, max_queue=1) as reader:
            call = await reader.start("run", module="flood")
            await host.worker.until(lambda worker: bool(worker.starts))
            driving = asyncio.create_task(flood.drive(host.worker))
            before = -1
            while before != flood.emitted:
                before = flood.emitted
                await asyncio.sleep(0.2)
            # Stuck for good: what is on its way is bounded by credit and buffers, not by the guest's wish.
            assert flood.emitted < 8 << 20 and not driving.done()
            (connection,) = [c for c in host.gateway.connections if c.behind]
            assert connection._transport is not None
            buffered = connection._transport.get_write_buffer_size()
            assert buffered < limits.write_high_bytes + 2 * limits.credit_bytes
            # Others are served meanwhile.
            assert (await client.data("generate", prompt="still here"))["text"] == "still here"
            # And it all comes once the client reads.
            size, replies = 0, 0
            while True:
                message = await reader.receive()
                if message["status"] != "streaming":
                    break
                size += len(message["data"].get("text", ""))
                assert message["seq"] == replies
                replies += 1
            assert message["id"] == call and message["status"] == "complete" and size == total
            await driving


@async_test
async def test_small_messages_do_not_wait_for_acknowledgements(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client():
        (connection,) = host.gateway.connections
        accepted = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@async_test
async def test_unstreamed_runs_need_no_reader(tmp_path: Path) -> None:
    flood = Flood(1 << 20)
    async with fake_host(tmp_path, script=flood) as host, host.client() as client:
        await client.push("flood")
        call = await client.start("run", module="flood", stream=False)
        await flood.drive(host.worker)
        (reply,) = await client.replies(call)
        assert len(reply["data"]["text"]) == 1 << 20


@async_test
async def test_a_vanished_client_cancels_its_runs_at_once(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as other:
        await other.start("generate", prompt="mine")
        async with host.client() as client:
            for _ in range(3):
                await client.start("generate", prompt="x", stream=True)
            await host.worker.until(lambda worker: len(worker.starts) == 4)
            mine = {start.run for start in host.worker.starts if json.loads(start.input)["prompt"] == "mine"}
            host.worker.finish_cancelled = False
            began = asyncio.get_running_loop().time()
            client.socket.transport.abort()
            await host.worker.until(lambda worker: len(worker.cancels) == 3)
            assert asyncio.get_running_loop().time() - began < 0.5
        assert not mine & {cancel.run for cancel in host.worker.cancels}
        # What such a run still says goes nowhere, and its end is recorded.
        for cancel in host.worker.cancels:
            host.worker.say(Output(cancel.run, b"late", 1))
            host.worker.finish(cancel.run, outcome="cancelled")
        await eventually(lambda: len(host.gateway.runs.runs) <= 1)
        runs = (await other.data("ps", all=True))["runs"]
        assert sorted(run["status"] for run in runs) == ["cancelled"] * 3 + ["running"]


@async_test
async def test_a_goodbye_cancels_runs_too(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host:
        async with host.client() as client:
            await client.start("generate", prompt="x", stream=True)
            await host.worker.until(lambda worker: len(worker.starts) == 1)
        await host.worker.until(lambda worker: len(worker.cancels) == 1)


@async_test
async def test_a_silent_client_is_cut(tmp_path: Path) -> None:
    limits = GatewayLimits(ping_seconds=0.3)
    async with fake_host(tmp_path, script=hang, limits=limits) as host:
        reader, writer = await asyncio.open_connection("127.0.0.1", host.server.port)
        key = host.keys["alice"]
        writer.write(
            f"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        )
        data = await reader.read()  # to the end: no pong is ever sent
        assert b"auth_success" in data and b"\x89\x04" in data
        writer.close()
        async with host.client() as client:
            # The websockets client answers pings by itself, so it stays however quiet it is.
            await asyncio.sleep(1.5)
            assert (await client.data("health"))["status"] == "healthy"


@async_test
async def test_a_dead_worker_fails_only_its_runs(tmp_path: Path) -> None:
    limits = GatewayLimits(worker_wait_seconds=0.2)
    async with fake_host(tmp_path, script=hang, workers=2, limits=limits) as host, host.client() as client:
        calls = [await client.start("generate", prompt=str(n)) for n in range(4)]
        for worker in host.workers:
            await worker.until(lambda worker: len(worker.starts) == 2)
        host.workers[0].die()
        failed = [await client.receive() for _ in range(2)]
        for reply in failed:
            assert reply["error"]["code"] == "worker_lost" and reply["error"]["retry_after"] > 0
        for start in host.workers[1].starts:
            host.workers[1].finish(start.run)
        good = [await client.receive() for _ in range(2)]
        assert {reply["status"] for reply in good} == {"complete"}
        assert sorted(reply["id"] for reply in failed + good) == calls
        await eventually(lambda: host.engine.lost_workers == [1])
        # Its successor gets runs; with none at all they wait for a while, then the error says so.
        host.workers[1].script = echo
        await host.add_worker(3)
        assert (await client.data("generate", prompt="x"))["text"] == "x"
        for worker in host.workers[1:]:
            worker.die()
        await eventually(lambda: not host.gateway.runs.workers)
        error = await client.error("generate", prompt="x")
        assert error["code"] == "worker_lost" and error["retry_after"] > 0
        assert (await client.data("health"))["status"] == "degraded"


@async_test
async def test_a_worker_that_talks_nonsense_is_cut(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang, workers=2) as host, host.client() as client:
        host.workers[0].write_raw(b"\x05\0\0\0\xc1\xc1\xc1\xc1\xc1")
        await host.workers[0].closed.wait()
        assert len(host.gateway.runs.workers) == 1
        # Events of runs it does not have are ignored, another worker's run included.
        await client.start("generate", prompt="x")
        worker = await host.add_worker(9)
        await host.workers[1].until(lambda worker: len(worker.starts) == 1)
        worker.say(Output(1, b"forged", 1), Output(777, b"unknown", 1))
        worker.finish(1)
        host.workers[1].say(Output(1, b"true", 1))
        host.workers[1].finish(1)
        assert (await client.receive())["data"]["text"] == "true"


@async_test
async def test_a_second_hello_ends_only_its_own_link(tmp_path: Path) -> None:
    async with fake_host(tmp_path, workers=2) as host, host.client() as client:
        runs = host.gateway.runs
        good = dict(runs.workers)
        intruder = FakeWorker(1)
        await intruder.connect(host.sockets / "gateway")
        await intruder.closed.wait()
        assert runs.workers == good
        twice = host.workers.pop()
        twice.hello(77)
        await twice.closed.wait()
        await eventually(lambda: list(runs.workers) == [1])
        assert (await client.data("generate", prompt="x"))["text"] == "x"


@pytest.mark.parametrize(
    "end",
    [
        RunFinished(1, "?", 0, None, Usage()),
        RunFinished(1, "error", 0, ErrorInfo("x", "y", {"a": msgspec.msgpack.Ext(1, b"")}), Usage()),
    ],
    ids=["outcome", "details"],
)
def test_an_end_that_is_none_costs_its_worker_only(tmp_path: Path, end: RunFinished) -> None:
    @async_test
    async def check() -> None:
        async with fake_host(tmp_path, script=hang, workers=2) as host, host.client() as client:
            for _ in range(2):
                await client.start("generate", prompt="x")
            for worker in host.workers:
                await worker.until(lambda worker: bool(worker.starts))
            end.run = host.workers[0].starts[0].run
            host.workers[0].say(end)
            await host.workers[0].closed.wait()
            host.workers[1].finish(host.workers[1].starts[0].run)
            replies = {reply["status"]: reply for reply in [await client.receive(), await client.receive()]}
            assert replies.keys() == {"complete", "error"}
            assert replies["error"]["error"]["code"] == "worker_lost"
            await eventually(lambda: not host.gateway.quotas.of("alice").running)

    check()


@async_test
async def test_odd_numbers_of_a_worker_reach_the_client_as_json(tmp_path: Path) -> None:
    nan = float("nan")
    error = ErrorInfo("guest_trap", "t", {"fuel": nan, "deep": [{"1": [nan]}]}, nan)
    end = RunFinished(1, "error", 0, error, Usage(wall_seconds=nan, fuel=-(2**63)))

    def script(worker: FakeWorker, start: StartRun) -> None:
        worker.say(Output(1, b"\xff", -5), end)

    async with fake_host(tmp_path, script=script) as host, host.client() as client:
        reply = await client.error("generate", prompt="x")
        assert reply["code"] == "guest_trap" and reply["details"]["fuel"] is None
        (run,) = (await client.data("ps", all=True))["runs"]
        assert run["status"] == "error" and run["usage"]["wall_seconds"] is None


@async_test
async def test_a_lost_engine_fails_all_runs_until_it_is_back(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client:
        await client.start("generate", prompt="x")
        await host.worker.until(lambda worker: bool(worker.starts))
        engine = host.gateway.engine
        assert engine is not None
        host.engine.die()
        await engine.lost.wait()
        host.gateway.engine_lost()
        assert (await client.receive())["error"]["code"] == "engine_lost"
        error = await client.error("generate", prompt="x")
        assert error["code"] == "engine_lost" and error["retry_after"] > 0
        health = await client.data("health")
        assert health["status"] == "degraded" and health["engine"]["available"] is False
        assert (await client.data("ps"))["engine"]["available"] is False


@async_test
async def test_the_guests_store(tmp_path: Path) -> None:
    limits = GatewayLimits(store_value_bytes=100)
    # An entry counts for 64 bytes more than its key and value.
    defaults = {"store_bytes": 250 + 2 * 64}
    async with (
        fake_host(tmp_path, script=hang, limits=limits, defaults=defaults) as host,
        host.client() as alice,
        host.client("bob") as bob,
    ):
        await alice.start("generate", prompt="x")
        await host.worker.until(lambda worker: len(worker.starts) == 1)
        await bob.start("generate", prompt="x")
        worker = host.worker
        await worker.until(lambda worker: len(worker.starts) == 2)
        requests = [
            StoreSet(1, 1, "key", b"a" * 100),
            StoreGet(2, 1, "key"),
            StoreGet(3, 2, "key"),
            StoreSet(4, 1, "big", b"b" * 101),
            StoreSet(5, 1, "two", b"b" * 100),
            StoreSet(6, 1, "three", b"c" * 100),
            StoreSet(7, 1, "key", b""),
            StoreGet(8, 1, "key"),
            StoreSet(9, 1, "three", b"c" * 100),
            StoreSet(10, 2, "key", b"bob"),
            StoreGet(11, 2, "key"),
        ]
        worker.say(*requests)
        await worker.until(lambda worker: len(worker.store_replies) == len(requests))
        replies = {reply.call: (reply.code, reply.value) for reply in worker.store_replies}
        assert replies == {
            1: (0, None),
            2: (0, b"a" * 100),
            3: (-7, None),
            4: (-6, None),
            5: (0, None),
            6: (-6, None),
            7: (0, None),
            8: (-7, None),
            9: (0, None),
            10: (0, None),
            11: (0, b"bob"),
        }
        limits_met = {reply.call: reply.limit for reply in worker.store_replies if reply.limit is not None}
        assert limits_met == {6: LimitMet("store_bytes", 378, 334)}
        assert any("store_bytes is 378 bytes, used 334" in reply.message for reply in worker.store_replies)


@async_test
async def test_shutting_down_cancels_and_says_goodbye(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client:
        await client.start("generate", prompt="x")
        await host.worker.until(lambda worker: bool(worker.starts))
        host.gateway.drain()
        assert (await client.receive())["status"] == "cancelled"
        await host.gateway.no_runs.wait()
        assert (await client.error("generate", prompt="x"))["code"] == "shutting_down"
        await host.server.close()
        await client.socket.wait_closed()
        assert client.socket.close_code == 1001
        await host.gateway.close()
        await host.worker.shut_down.wait()


@async_test
async def test_a_restart_loses_nothing(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.push("chat")
        await client.data("run", module="chat", input="x", stream=False)
        keys = host.keys
    async with fake_host(tmp_path) as host:
        host.keys = keys
        async with host.client() as client:
            assert (await client.data("modules.list"))["modules"][0]["name"] == "chat"
            assert [run["run"] for run in (await client.data("ps", all=True))["runs"]] == ["r1"]
            answer = await client.data("run", module="chat", input="y", stream=False)
            # Numbers go on, and the module needs no push.
            assert answer["run"] == "r2" and answer["text"] == "y"
