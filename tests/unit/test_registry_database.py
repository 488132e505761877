"""The registry: tenants, keys, modules, runs, store; and that nothing answered is ever lost."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import pytest

from realm.errors import RealmError
from realm.registry.blobs import BlobStore, hash_and_sync
from realm.registry.database import Database, hash_key
from realm.registry.records import LogLine, ModuleRecord, RunRecord
from realm.registry.thread import Registry
from tests.fake_host import async_test


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def database(tmp_path: Path, blobs: BlobStore):  # type: ignore[no-untyped-def]
    database = Database(tmp_path / "r.sqlite", blobs)
    yield database
    database.close()


def commit(database: Database, blobs: BlobStore, tenant: str, name: str, content: bytes) -> ModuleRecord:
    file = blobs.incoming()
    file.write_bytes(content)
    record = database.commit_module(tenant, name, file, hash_and_sync(file), len(content), ["realm.emit"])
    assert not file.exists()
    return record


def settle(database: Database) -> None:
    for action in database.after_commit:
        action()
    database.after_commit.clear()


def test_the_first_start_makes_an_admin_key_once(database: Database) -> None:
    key = database.ensure_admin()
    assert key is not None and key.key.startswith("realm_") and key.tenant == "admin"
    principal = database.authenticate(key.key)
    assert principal is not None and principal.admin and principal.key_id == key.id
    assert database.ensure_admin() is None


def test_keys_are_stored_as_hashes_only(database: Database, tmp_path: Path) -> None:
    key = database.ensure_admin()
    assert key is not None
    database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    stored = (tmp_path / "r.sqlite").read_bytes()
    assert key.key.encode() not in stored and key.key[6:].encode() not in stored
    assert hash_key(key.key) in stored
    assert (tmp_path / "r.sqlite").stat().st_mode & 0o077 == 0


def test_keys_are_revoked_for_good(database: Database) -> None:
    database.add_tenant("alice")
    first, second = database.add_key("alice"), database.add_key("alice")
    database.revoke_key(first.id)
    assert database.authenticate(first.key) is None
    principal = database.authenticate(second.key)
    assert principal is not None and principal.tenant == "alice" and not principal.admin
    (revoked,) = [key.revoked for key in database.list_keys("alice") if key.id == first.id]
    database.revoke_key(first.id)
    assert [key.revoked for key in database.list_keys("alice") if key.id == first.id] == [revoked]
    for wrong in ("", "realm_", second.key + " ", "\ud800", second.key.lower()):
        assert database.authenticate(wrong) is None
    with pytest.raises(RealmError, match="key_not_found"):
        database.revoke_key("nothing")
    with pytest.raises(RealmError, match="tenant_not_found"):
        database.add_key("nobody")
    with pytest.raises(RealmError, match="already_exists"):
        database.add_tenant("alice")


def test_versions_and_shared_content(database: Database, blobs: BlobStore) -> None:
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    content = b"module"
    sha = hashlib.sha256(content).hexdigest()
    assert commit(database, blobs, "alice", "m", content).version == 1
    assert commit(database, blobs, "alice", "m", b"other").version == 2
    assert commit(database, blobs, "bob", "n", content).version == 1
    assert database.find_module("alice", "m").version == 2
    assert database.has_content("alice", sha) == len(content)
    assert database.has_content("bob", hashlib.sha256(b"other").hexdigest()) is None
    database.remove_module("alice", "m")
    settle(database)
    assert blobs.path(sha).read_bytes() == content
    assert not blobs.path(hashlib.sha256(b"other").hexdigest()).exists()
    assert database.has_content("alice", sha) is None
    with pytest.raises(RealmError, match="upload_not_found"):
        database.borrow_content("alice", sha)
    borrowed = database.borrow_content("bob", sha)
    database.remove_module("bob", "n")
    settle(database)
    assert not blobs.path(sha).exists() and borrowed.read_bytes() == content


def test_a_crash_is_settled_at_the_next_start(database: Database, blobs: BlobStore) -> None:
    database.ensure_admin()
    database.add_run(RunRecord(database.reserve_runs(10), "admin", "m", "0", "running", 1.0))
    orphan = blobs.incoming()
    orphan.write_bytes(b"x")
    blobs.adopt(orphan, hash_and_sync(orphan))
    half = blobs.incoming()
    half.write_bytes(b"half")
    assert database.recover() == 1
    (run,) = database.list_runs(None, 10)
    assert run.status == "error" and run.error is not None and run.error["code"] == "worker_lost"
    assert "restarted" in run.error["message"] and run.finished is not None
    assert not blobs.path(hashlib.sha256(b"x").hexdigest()).exists()
    assert database.recover() == 0
    BlobStore(half.parent.parent)
    assert not half.exists()


def test_run_numbers_are_never_given_twice(database: Database) -> None:
    assert [database.reserve_runs(5), database.reserve_runs(5), database.reserve_runs(1)] == [1, 6, 11]
    database.release_runs(8)
    assert database.reserve_runs(5) == 8
    database.release_runs(100)
    assert database.reserve_runs(1) == 13


def test_runs_and_logs_are_the_tenants_own(database: Database) -> None:
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    for number, tenant in enumerate(("alice", "bob", "alice"), 1):
        run = RunRecord(number, tenant, "m", "0", "running", float(number))
        database.add_run(run)
        run.status, run.finished, run.code, run.usage = "complete", number + 1.0, 0, {"fuel": number}
        database.finish_run(run, [LogLine("info", tenant)])
    assert [run.number for run in database.list_runs("alice", 10)] == [3, 1]
    assert [run.number for run in database.list_runs(None, 2)] == [3, 2]
    assert database.list_runs("bob", 1)[0].usage == {"fuel": 2}
    assert database.run_log("bob", 2) == [LogLine("info", "bob")]
    assert database.run_log(None, 2) == [LogLine("info", "bob")]
    for tenant, number in (("alice", 2), ("alice", 99)):
        with pytest.raises(RealmError, match="run_not_found"):
            database.run_log(tenant, number)
    database.add_run(RunRecord(4, "alice", "m", "0", "running", 4.0))
    assert database.prune_runs(2) == 2
    assert [run.number for run in database.list_runs(None, 10)] == [3]


def test_the_store_counts_keys_and_values(database: Database) -> None:
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    put = partial(database.store_set, tenant_bytes=20)
    assert put("alice", "key", b"x" * 17)
    assert not put("alice", "k", b"x")
    assert not put("alice", "key", b"x" * 18)
    assert put("bob", "key", b"y")
    assert database.store_get("alice", "key") == b"x" * 17
    assert put("alice", "key", b"x") and put("alice", "é", b"x" * 14)
    assert not put("alice", "z", b"1")
    assert put("alice", "é", b"") and database.store_get("alice", "é") is None
    assert put("alice", "é", b"") and put("alice", "z", b"1" * 15)


def test_a_newer_schema_is_refused(tmp_path: Path, blobs: BlobStore) -> None:
    connection = sqlite3.connect(tmp_path / "new.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(RealmError, match="registry_version"):
        Database(tmp_path / "new.sqlite", blobs)


@async_test
async def test_operations_that_fail_leave_their_neighbours_alone(tmp_path: Path) -> None:
    registry = await Registry.open(tmp_path)
    futures = [registry.run(partial(Database.add_tenant, name=name)) for name in ("a", "b", "a", "c")]
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [isinstance(result, RealmError) for result in results] == [False, False, True, False]
    broken = registry.run(lambda database: database.connection.execute("SELECT nonsense"))
    with pytest.raises(RealmError, match="internal"):
        await broken
    assert [t.name for t in await registry.run(Database.list_tenants)] == ["a", "b", "c"]
    await registry.close()
    again = await Registry.open(tmp_path)
    assert len(await again.run(Database.list_tenants)) == 3
    await again.close()


@async_test
async def test_the_loop_is_not_held_up(tmp_path: Path) -> None:
    registry = await Registry.open(tmp_path)
    loop = asyncio.get_running_loop()
    longest = 0.0
    futures = [registry.run(partial(Database.add_tenant, name=f"t{n}")) for n in range(2000)]
    everything = asyncio.gather(*futures)
    while not everything.done():
        began = loop.time()
        await asyncio.sleep(0.001)
        longest = max(longest, loop.time() - began)
    await everything
    assert longest < 0.25
    await registry.close()


def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import asyncio, sys
        from functools import partial
        from pathlib import Path
        from realm.registry.database import Database
        from realm.registry.thread import Registry

        async def main():
            registry = await Registry.open(Path(sys.argv[1]))
            n = 0
            while True:
                await registry.run(partial(Database.add_tenant, name=f"t{n}"))
                print(n, flush=True)
                n += 1

        asyncio.run(main())
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        answered = [int(process.stdout.readline()) for _ in range(30)]
        process.send_signal(signal.SIGKILL)
        answered += [int(line) for line in process.stdout if line.endswith("\n")]
    database = Database(tmp_path / "registry.sqlite", BlobStore(tmp_path))
    names = {tenant.name for tenant in database.list_tenants()}
    database.close()
    assert {f"t{n}" for n in answered} <= names
