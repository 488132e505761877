"""What one tenant may do to the registry: how much it keeps of runs, and who waits for whom."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from realm.errors import RealmError
from realm.gateway.guest_store import GuestStore
from realm.gateway.quotas import Quotas
from realm.gateway.run import Worker, check_end
from realm.guests.abi import ErrorCode
from realm.registry.blobs import BlobStore
from realm.registry.bounds import ERROR_BYTES, LOG_BYTES, encode_log, fit_error
from realm.registry.database import Database
from realm.registry.records import LogLine, RunRecord
from realm.registry.thread import Registry
from realm.registry.turns import Turns
from realm.run_messages import ErrorInfo, Log, RunFinished, StartRun, StoreGet, Usage
from tests.fake_host import FakeWorker, async_test, fake_host
from tests.run_manager import Host

NULS = "\0" * 65_000


@pytest.fixture
def database(tmp_path: Path):  # type: ignore[no-untyped-def]
    database = Database(tmp_path / "r.sqlite", BlobStore(tmp_path))
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    yield database
    database.close()


def finish(database: Database, number: int, error: dict[str, Any] | None, log: list[LogLine]) -> None:
    run = RunRecord(number, "alice", "m", "0", "running", 1.0)
    database.add_run(run)
    run.status, run.finished, run.usage, run.error = "error", 2.0, {"fuel": 1}, error
    database.finish_run(run, log)


@pytest.mark.parametrize(
    "details",
    [
        {"code": -1, "last_error": NULS},
        {f"{number}" * 20: "\0" * 100 for number in range(1000)},
        {"\0" * 5000: 1, "deep": [[NULS]], "code": -1},
    ],
)
def test_an_error_is_kept_in_bounds(database: Database, details: dict[str, Any]) -> None:
    error = {"code": "guest_error" + NULS, "message": "it failed" + NULS, "details": details, "retry_after": 2.5}
    fitted = fit_error(error)
    assert len(msgspec.json.encode(fitted)) <= ERROR_BYTES
    assert fitted["message"].startswith("it failed") and fitted["retry_after"] == 2.5
    assert fitted["details"].get("code") == details.get("code") and "bytes" in fitted["details"]["left_out"]
    finish(database, 1, error, [])
    assert database.run_log("alice", 1) == ([], fitted)


def test_an_ordinary_error_and_log_are_kept_whole(database: Database) -> None:
    error = {"code": "guest_trap", "message": "m", "details": {"backtrace": ["f" * 100] * 20}, "retry_after": None}
    lines = [LogLine("info", "x" * 65) for _ in range(1000)]
    finish(database, 1, error, lines)
    assert database.run_log("alice", 1) == (lines, error)
    assert encode_log([]) is None


@pytest.mark.parametrize(
    "lines",
    [
        [LogLine("error", NULS)],
        [
            LogLine("info", "early"),
            LogLine("error", "x" + NULS),
            LogLine("info", "\0" * 10_000),
            LogLine("info", "end"),
        ],
        [LogLine("info", "\0" * 60)] * 1000,
    ],
)
def test_a_log_is_kept_in_bounds_and_says_so(database: Database, lines: list[LogLine]) -> None:
    text = encode_log(lines)
    assert text is not None and len(text.encode()) <= LOG_BYTES
    finish(database, 1, None, lines)
    kept, _ = database.run_log("alice", 1)
    assert kept[-1].text[:50] == lines[-1].text[:50]
    assert "left out" in kept[0].text or any("characters more" in line.text for line in kept)


def test_a_list_of_runs_reads_no_more_than_it_gives(database: Database) -> None:
    error = {"code": "guest_error", "message": "m" * 3000, "details": {}, "retry_after": None}
    for number in range(1, 21):
        finish(database, number, error, [])
    runs, more = database.page_runs("alice", 100, 20_000)
    assert more and [run.number for run in runs] == list(range(20, 20 - len(runs), -1)) and 3 <= len(runs) <= 6
    assert sum(len(msgspec.json.encode(run)) for run in runs) <= 20_000
    runs, more = database.page_runs("alice", 5, 1 << 20)
    assert len(runs) == 5 and not more
    # What does not fit is not decoded: this would fail.
    database.connection.execute("UPDATE runs SET error = '{' || error WHERE number = 1")
    assert database.page_runs("alice", 100, 20_000)[1]
    assert database.page_runs("alice", 100, 0) == ([], True)


def test_a_module_is_looked_up_without_the_others(database: Database) -> None:
    # Imports that are no JSON: whoever read them would fail.
    for number in range(60):
        values = ("alice", f"m{number:02}", 1, "0", 1, 0.0, "not JSON")
        database.connection.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        database.connection.execute("INSERT INTO modules VALUES (?, ?, 1)", values[:2])
    assert database.find_module("alice", "m59").name == "m59"
    assert len(database.list_modules("alice")) == 60
    with pytest.raises(RealmError, match="module_not_found") as caught:
        database.find_module("alice", "nope")
    assert caught.value.details["available"] == [f"m{number:02}" for number in range(50)]
    with pytest.raises(RealmError, match="module_not_found") as caught:
        database.find_module("bob", "m00")
    assert caught.value.details["available"] == []


# --- turns ------------------------------------------------------------------------------------------


def drain(turns: Turns[str]) -> list[str]:
    taken = []
    while (operation := turns.take(wait=False)) is not None:
        taken.append(operation)
    return taken


def test_tenants_have_their_turns_and_log_ins_go_first() -> None:
    turns: Turns[str] = Turns()
    for number in range(1000):
        turns.put(f"evil {number}", "evil")
    turns.put("quiet 0", "quiet")
    turns.put("quiet 1", "quiet")
    turns.put("log-in", None, urgent=True)
    taken = drain(turns)
    assert taken[:5] == ["log-in", "evil 0", "quiet 0", "evil 1", "quiet 1"]
    assert [name for name in taken if name.startswith("evil")] == [f"evil {number}" for number in range(1000)]
    assert turns.take(wait=False) is None
    turns.close()
    assert turns.take(wait=True) is None


def test_an_operation_on_everything_comes_after_what_was_before_it() -> None:
    turns: Turns[str] = Turns()
    for name in ("a0", "a1", "b0"):
        turns.put(name, name[0])
    turns.put("all", None)
    turns.put("all again", None)
    turns.put("a2", "a")
    turns.put("b1", "b")
    taken = drain(turns)
    assert sorted(taken) == ["a0", "a1", "a2", "all", "all again", "b0", "b1"]
    before = taken[: taken.index("all")]
    assert {"a0", "a1", "b0"} <= set(before) and taken.index("all") < taken.index("all again")


@async_test
async def test_a_log_in_passes_a_tenants_thousand_operations(tmp_path: Path) -> None:
    registry = await Registry.open(tmp_path)
    key = await registry.run(Database.ensure_admin)
    assert key is not None
    held, done = threading.Event(), []
    blocking = registry.run(lambda database: held.wait(30), tenant="evil")
    for number in range(1000):
        registry.post(lambda database, number=number: done.append(number), tenant="evil")  # type: ignore[misc]
    quiet = registry.run(lambda database: len(done), tenant="quiet")
    log_in = registry.run(lambda database: (database.authenticate(key.key), len(done)), urgent=True)
    last = registry.run(lambda database: len(done))
    held.set()
    assert await blocking
    principal, passed = await log_in
    assert principal is not None and principal.tenant == "admin" and passed == 0
    assert await quiet <= 2
    # The host's own comes after all that were before it.
    assert await last == 1000 and done == list(range(1000))
    await registry.close()


@async_test
async def test_what_is_queued_when_it_closes_is_done(tmp_path: Path) -> None:
    registry = await Registry.open(tmp_path)
    futures = [registry.run(partial(Database.add_tenant, name=f"t{n}"), tenant=f"t{n % 3}") for n in range(300)]
    await registry.close()
    await asyncio.gather(*futures)


# --- what a worker says -----------------------------------------------------------------------------


def test_a_workers_long_error_is_shortened() -> None:
    end = RunFinished(1, "error", 0, ErrorInfo("guest_error", NULS, {"last_error": NULS, "code": -1}), Usage())
    check_end(end)
    assert end.error is not None and len(msgspec.json.encode(end.error)) <= ERROR_BYTES
    assert end.error.details["code"] == -1 and end.error.details["left_out"]


@async_test
async def test_a_workers_error_is_short_for_the_client_and_for_ps(tmp_path: Path) -> None:
    def script(worker: FakeWorker, start: StartRun) -> None:
        error = ErrorInfo("guest_error", NULS, {f"d{n}": "\0" * 100 for n in range(1000)})
        worker.say(Log(start.run, "error", NULS), RunFinished(start.run, "error", -1, error, Usage()))

    async with fake_host(tmp_path, script=script) as host, host.client("alice") as client:
        error = await client.error("generate", prompt="x")
        assert error["code"] == "guest_error" and len(msgspec.json.encode(error)) <= 2 * ERROR_BYTES
        (run,) = (await client.data("ps", all=True))["runs"]
        assert len(msgspec.json.encode(run["error"])) <= ERROR_BYTES
        kept = await client.data("logs", run=run["run"])
        assert len(msgspec.json.encode(kept["lines"])) <= LOG_BYTES and "more" in kept["lines"][0]["text"]


def test_a_worker_that_makes_up_levels_is_refused() -> None:
    host = Host()
    worker = host.worker(1)
    host.start(1)
    with pytest.raises(ValueError, match="level"):
        host.manager.events(worker, [Log(1, "l" * 100_000, "")])


@async_test
async def test_a_store_that_fails_is_not_quoted_to_the_guest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = await Registry.open(tmp_path)
    await registry.run(lambda database: database.connection.execute("DROP TABLE store"))
    told: asyncio.Queue[Any] = asyncio.Queue()
    store = GuestStore(registry, Quotas(), 1 << 20)
    store.request(Worker(1, told.put_nowait), "alice", StoreGet(7, 1, "key"))
    reply = await asyncio.wait_for(told.get(), 30)
    await registry.close()
    assert (reply.call, reply.code) == (7, ErrorCode.INTERNAL)
    correlation = reply.message.rsplit(" ", 1)[1]
    assert reply.message.startswith("the host failed") and "registry" not in reply.message
    (record,) = [record for record in caplog.records if correlation in record.getMessage()]
    assert record.exc_info and "no such table" in caplog.text


@async_test
async def test_ps_is_bounded_whatever_runs_ended_with(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client("alice") as client:
        registry = host.gateway.registry
        error = {"code": "guest_error", "message": "m" * 7000, "details": {}, "retry_after": None}
        for number in range(10_001, 10_301):
            run = RunRecord(number, "alice", "m", "0", "running", 1.0)
            registry.post(partial(Database.add_run, run=run), tenant="alice")
            ended = RunRecord(number, "alice", "m", "0", "error", 1.0, 2.0, -1, {}, error)
            registry.post(partial(Database.finish_run, run=ended, log=[]), tenant="alice")
        listed = await client.data("ps", all=True, limit=1000)
        assert listed["more"] is True and 100 < len(listed["runs"]) < 200
        assert len(msgspec.json.encode(listed["runs"])) <= 1 << 20
        few = await client.data("ps", all=True, limit=10)
        assert "more" not in few and len(few["runs"]) == 10
