"""Deaths of real processes (fake inside), one by one: who fails, who goes on, what takes their place."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import wasmtime

import realm.serve
import realm.supervisor
from realm.child import how_it_ended
from realm.serve import ServeInfo, running
from realm.settings import ServeSettings
from realm.supervisor import early_wait
from tests.fake_host import FakeClient, async_test
from tests.fakes import Host
from tests.model_files import write_folder
from tests.serve_harness import PYTHONPATH, children, client_of, healthy, prepare, serving, until
from tests.wat import RECEIVE, guest


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    return prepare(tmp_path, monkeypatch.setattr)


@contextlib.asynccontextmanager
async def two_runs(info: ServeInfo) -> AsyncIterator[tuple[FakeClient, dict[str, FakeClient]]]:
    """An observer, and a client for each of two runs, one on either worker."""
    async with client_of(info) as observer, client_of(info) as first, client_of(info) as second:
        await serving(2)
        clients = {}
        for client in (first, second):
            await client.start("run", module="echo", input="hang")
            started = await client.receive()
            assert started["data"]["kind"] == "started"
            clients[started["data"]["run"]] = client
        yield observer, clients


async def progress(observer: FakeClient) -> list[str]:
    return [entry["run"] for entry in (await observer.data("ps"))["runs"]]


async def runs_left(observer: FakeClient, count: int) -> list[str]:
    while True:
        left = await progress(observer)
        if len(left) == count:
            return left
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGSYS])
@async_test
async def test_a_death_ends_its_own_runs_only(
    settings: ServeSettings, number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(settings) as info, two_runs(info) as (observer, clients):
        victim, other = await serving(2)
        (reserve,) = (worker for worker in children("fake_worker") if worker not in (victim, other))
        (engine,) = children("fake_engine")
        victim.send_signal(number)
        (left,) = await runs_left(observer, 1)
        (lost,) = (client for run, client in clients.items() if run != left)
        reply = await lost.receive()
        assert reply["error"]["code"] == "worker_lost" and reply["error"]["retry_after"] > 0
        # What stood in reserve serves, another stands in reserve, and nobody else was replaced.
        now = await serving(2)
        assert other in now and reserve in now and engine.is_running()
        assert await progress(observer) == [left]
        assert (await lost.data("run", module="echo", input="x", stream=False))["text"] == "x"
        assert number.name in caplog.text


# Every level of the recursion calls the host, so one of them does so with no stack left.
SINK = guest(
    "(call $sink)",
    "log",
    extra="""(func $sink (result i32)
      (drop (call $log (i32.const 0) (i32.const 0) (i32.const 0)))
      (i32.add (i32.const 1) (call $sink)))""",
)


@async_test
async def test_a_real_abort_of_a_real_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    compile_module = realm.serve._compile
    settings = prepare(tmp_path, monkeypatch.setattr)
    monkeypatch.setattr(realm.serve, "_compile", compile_module)
    monkeypatch.setattr(realm.supervisor, "WORKER_MODULE", "tests.thin_worker")
    write_folder(tmp_path / "models" / "tiny")
    async with (
        running(settings) as info,
        client_of(info, echo=False) as client,
        client_of(info, echo=False) as neighbour,
    ):
        await until(lambda: len(children("thin_worker")) == 3)
        before = children("thin_worker")
        await client.push("sink", bytes(wasmtime.wat2wasm(SINK)))
        await client.push("receive", bytes(wasmtime.wat2wasm(RECEIVE)))
        call = await neighbour.start("run", module="receive", input="")
        started = (await neighbour.receive())["data"]
        error = await client.error("run", module="sink", input="", stream=False)
        assert error["code"] == "worker_lost"
        assert "was ended by SIGABRT" in caplog.text
        assert "overflowed its stack" in capfd.readouterr().err
        await healthy(client)
        assert len({*before} & {*children("thin_worker")}) == 2
        # The neighbour on the other worker is still waiting for its message.
        await client.data("send", run=started["run"], data="hello")
        end = (await neighbour.replies(call))[-1]
        assert end["status"] == "complete", end


def test_with_the_stack_that_workers_have_it_is_the_guests_trap() -> None:
    host = Host()
    run = host.start(SINK)
    host.settle()
    error = host.finished(run).error
    assert error is not None and error.code == "guest_trap" and error.details["trap"] == "stack_overflow"


@async_test
async def test_a_worker_that_leaves_in_order_is_replaced_too(settings: ServeSettings) -> None:
    async with running(settings) as info, client_of(info) as client:
        before = await serving(2)
        error = await client.error("run", module="echo", input="quit", stream=False)
        assert error["code"] == "worker_lost"
        await healthy(client)
        assert len({*await serving(2)} - {*before}) == 1


@async_test
async def test_a_worker_that_does_not_answer_is_killed(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(realm.supervisor, "PING_SECONDS", 0.2)
    monkeypatch.setattr(realm.supervisor, "PINGS_MISSED", 10)
    async with running(settings) as info, two_runs(info) as (observer, clients):
        victim, other = await serving(2)
        victim.suspend()
        (left,) = await runs_left(observer, 1)
        (lost,) = (client for run, client in clients.items() if run != left)
        assert (await lost.receive())["error"]["code"] == "worker_lost"
        assert not victim.is_running() and other in await serving(2)
        assert "has not answered 10 pings" in caplog.text


@async_test
async def test_workers_that_answer_are_left_alone(settings: ServeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realm.supervisor, "PING_SECONDS", 0.2)
    async with running(settings) as info, two_runs(info) as (observer, clients):
        before = await serving(2)
        # 15 rounds of pings; both runs say nothing.
        await asyncio.sleep(3)
        assert await serving(2) == before
        assert set(await progress(observer)) == set(clients)


@async_test
async def test_a_worker_that_does_not_come_up_is_killed(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(realm.supervisor, "PING_SECONDS", 0.2)
    monkeypatch.setattr(realm.supervisor, "_JOIN_SECONDS", 3.0)
    async with running(settings) as info, client_of(info) as client:
        victim, other = await serving(2)
        (reserve,) = (worker for worker in children("fake_worker") if worker not in (victim, other))
        reserve.suspend()
        victim.kill()
        await until(lambda: reserve not in children("fake_worker"))
        now = await serving(2)
        assert other in now and reserve not in now and not reserve.is_running()
        assert "has not come up" in caplog.text
        await healthy(client)


@async_test
async def test_the_reserve_is_replaced_and_nobody_notices(settings: ServeSettings) -> None:
    async with running(settings) as info, two_runs(info) as (observer, clients):
        before = await serving(2)
        (reserve,) = (worker for worker in children("fake_worker") if worker not in before)
        reserve.kill()
        await until(lambda: reserve not in children("fake_worker"))
        assert await serving(2) == before
        assert set(await progress(observer)) == set(clients)


@async_test
async def test_a_lost_engine_takes_the_reserve_with_it(settings: ServeSettings) -> None:
    async with running(settings) as info, client_of(info) as client:
        await serving(2)
        before = children("tests.fake_")
        (engine,) = children("fake_engine")
        engine.kill()
        await until(lambda: not any(process.is_running() for process in before))
        await serving(2)
        await healthy(client)
        assert not {*before} & {*children("tests.fake_")}


@async_test
async def test_workers_that_cannot_start_are_tried_ever_more_rarely(
    settings: ServeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []

    def counted(deaths: int) -> float:
        waits.append(deaths)
        return early_wait(min(deaths, 3))

    monkeypatch.setattr(realm.supervisor, "early_wait", counted)
    async with running(settings) as info, client_of(info) as client:
        workers = await serving(2)
        monkeypatch.setattr(realm.supervisor, "WORKER_MODULE", "tests.no_such_worker")
        for worker in workers:
            worker.kill()
        await until(lambda: len(waits) >= 8)
        # The one in reserve took a place; it is not enough for two.
        assert (await client.data("health"))["workers"] == 1
        assert (await client.data("run", module="echo", input="x", stream=False))["text"] == "x"
        assert max(waits) >= 4
        monkeypatch.setattr(realm.supervisor, "WORKER_MODULE", "tests.fake_worker")
        await healthy(client)


def test_the_first_early_death_may_be_an_accident() -> None:
    waits = [early_wait(deaths) for deaths in range(12)]
    assert waits[:2] == [0.0, 0.0] and waits[2] > 0
    assert waits == sorted(waits) and waits[-1] == waits[-2] == 10.0


def test_ends_in_words() -> None:
    assert how_it_ended(0) == "ended with status 0"
    assert how_it_ended(-9) == "was ended by SIGKILL"
    assert "its sandbox forbids" in how_it_ended(-signal.SIGSYS)
    assert how_it_ended(-120) == "was ended by signal 120"
