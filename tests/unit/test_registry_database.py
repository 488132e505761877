"""The registry: tenants, keys, modules, runs, store; and that nothing answered is ever lost."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from realm.errors import RealmError
from realm.limits import TenantLimits
from realm.registry.blobs import BlobStore, hash_and_sync
from realm.registry.database import Database, hash_key
from realm.registry.records import LogLine, ModuleRecord, RunRecord, Stored
from realm.registry.schema import SCHEMA_VERSION
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


def commit(database: Database, blobs: BlobStore, tenant: str, name: str, content: bytes, **limits: int) -> ModuleRecord:
    file = blobs.incoming()
    file.write_bytes(content)
    record = database.commit_module(
        tenant, name, file, hash_and_sync(file), len(content), ["realm.emit"], limits=TenantLimits(**limits)
    )
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
    assert database.run_log("bob", 2) == ([LogLine("info", "bob")], None)
    assert database.run_log(None, 2) == ([LogLine("info", "bob")], None)
    for tenant, number in (("alice", 2), ("alice", 99)):
        with pytest.raises(RealmError, match="run_not_found"):
            database.run_log(tenant, number)
    database.add_run(RunRecord(4, "alice", "m", "0", "running", 4.0))
    # Each tenant keeps its own latest: one that runs a lot pushes nobody else's out.
    assert database.prune_runs(1) == 2
    assert [run.number for run in database.list_runs(None, 10)] == [2]
    failed = RunRecord(5, "bob", "m", "0", "running", 5.0)
    database.add_run(failed)
    failed.status, failed.started, failed.error = "error", 6.0, {"code": "guest_trap", "message": "m"}
    database.finish_run(failed, [])
    assert database.run_log("bob", 5) == ([], {"code": "guest_trap", "message": "m"})
    # It began when a worker had it, not when it came.
    assert database.list_runs("bob", 1)[0].started == 6.0


def test_the_store_counts_keys_values_and_entries(database: Database) -> None:
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    put = partial(database.store_set, limit=2 * 64 + 20)

    def full(key: str, value: bytes) -> dict[str, Any]:
        before = database.stored("alice")
        with pytest.raises(RealmError, match="limit_exceeded") as caught:
            put("alice", key, value)
        assert database.stored("alice") == before
        return caught.value.details

    put("alice", "key", b"x" * 16)
    assert full("k", b"x")["name"] == "store_bytes"
    assert full("key", b"x" * 82) == {"name": "store_bytes", "limit": 148, "used": 83, "unit": "bytes"}
    put("bob", "key", b"y")
    assert database.store_get("alice", "key") == b"x" * 16
    put("alice", "key", b"x")
    put("alice", "é", b"x" * 14)
    assert database.stored("alice").store_bytes == 148
    full("z", b"1")
    put("alice", "é", b"")
    assert database.store_get("alice", "é") is None
    put("alice", "é", b"")
    put("alice", "a\0b", b"1" * 13)
    assert database.stored("alice").store_bytes == 148
    # Nothing but entries is bounded, too.
    put("alice", "a\0b", b"")
    put("alice", "key", b"")
    assert database.stored("alice").store_bytes == 0
    put("alice", "", b"1")
    put("alice", "2", b"1")
    full("3", b"1")


def test_stored_modules_and_bytes_are_bounded(database: Database, blobs: BlobStore) -> None:
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    for version in (1, 2):
        assert commit(database, blobs, "alice", "m", b"x" * 10).version == version
    assert database.stored("alice") == Stored(2, 10, 0)
    assert commit(database, blobs, "alice", "n", b"y" * 10, stored_modules=3, stored_bytes=20).version == 1
    for limits, name, used in (
        ({"stored_modules": 3}, "stored_modules", 3),
        ({"stored_bytes": 20}, "stored_bytes", 20),
    ):
        with pytest.raises(RealmError, match="limit_exceeded") as caught:
            commit(database, blobs, "alice", "o", b"z", **limits)
        assert (caught.value.details["name"], caught.value.details["used"]) == (name, used)
        assert not blobs.path(hashlib.sha256(b"z").hexdigest()).exists()
    # Content that is stored already takes no more bytes, and another tenant's counts for that one only.
    assert commit(database, blobs, "alice", "o", b"y" * 10, stored_bytes=20).version == 1
    commit(database, blobs, "bob", "m", b"z", stored_bytes=1, stored_modules=1)
    database.remove_module("alice", "m")
    assert database.stored("alice") == Stored(2, 10, 0)


# --- limits and versions of the file -------------------------------------------------------------


def test_limits_are_kept_changed_and_returned(database: Database) -> None:
    database.add_tenant("alice")
    database.add_tenant("bob")
    assert database.load_limits() == ({}, {})
    assert database.change_limits("alice", {"uploads": 1, "connections": 2}) == {"uploads": 1, "connections": 2}
    assert database.change_limits("alice", {"uploads": None, "kv_pages": 9}) == {"connections": 2, "kv_pages": 9}
    assert database.change_limits(None, {"uploads": 7}) == {"uploads": 7}
    assert database.load_limits() == ({"uploads": 7}, {"alice": {"connections": 2, "kv_pages": 9}})
    database.change_limits("alice", {"connections": None, "kv_pages": None})
    assert database.load_limits() == ({"uploads": 7}, {})
    with pytest.raises(RealmError, match="tenant_not_found"):
        database.change_limits("nobody", {"uploads": 1})


@pytest.mark.parametrize(
    "text", ['{"warp": 3, "uploads": 2, "connections": -1, "kv_pages": "x"}', "{", "[]", '{"a": {}}']
)
def test_limits_of_another_realm_do_not_stop_the_start(
    database: Database, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    database.add_tenant("alice")
    database.connection.execute("UPDATE tenants SET limits = ? WHERE name = 'alice'", (text,))
    database.connection.execute("UPDATE settings SET value = ?", (text,))
    known = {"uploads": 2} if "uploads" in text else {}
    assert database.load_limits() == (known, {"alice": known} if known else {})
    assert "ignored" in caplog.text and "alice" in caplog.text and "the default" in caplog.text
    if "warp" in text:
        assert "warp" in caplog.text and "connections" in caplog.text
        # The Realm that knows it finds it again.
        assert database.change_limits("alice", {"uploads": 3}) == {"uploads": 3}
        (stored,) = database.connection.execute("SELECT limits FROM tenants").fetchone()
        assert json.loads(stored)["warp"] == 3


VERSION_1 = """
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    created REAL NOT NULL,
    admin INTEGER NOT NULL,
    store_bytes INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE TABLE keys (
    hash BLOB PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    created REAL NOT NULL,
    revoked REAL
) STRICT, WITHOUT ROWID;
CREATE TABLE versions (
    tenant TEXT NOT NULL REFERENCES tenants (name),
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    created REAL NOT NULL,
    imports TEXT NOT NULL,
    PRIMARY KEY (tenant, name, version)
) STRICT, WITHOUT ROWID;
CREATE INDEX versions_by_content ON versions (sha256, tenant);
CREATE TABLE modules (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (tenant, name),
    FOREIGN KEY (tenant, name, version) REFERENCES versions (tenant, name, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE runs (
    number INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    module TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    status TEXT NOT NULL,
    started REAL NOT NULL,
    finished REAL,
    code INTEGER,
    usage TEXT,
    error TEXT,
    log TEXT
) STRICT;
CREATE INDEX runs_by_tenant ON runs (tenant, number);
CREATE INDEX runs_unfinished ON runs (number) WHERE status = 'running';
CREATE TABLE store (
    tenant TEXT NOT NULL REFERENCES tenants (name),
    key TEXT NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (tenant, key)
) STRICT, WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO counters (name, value) VALUES ('run', 41);
INSERT INTO tenants VALUES ('admin', 1.0, 1, 0), ('alice', 2.0, 0, 10);
INSERT INTO store VALUES ('alice', 'é', x'0102'), ('alice', 'a' || char(0) || 'b', x'000102');
INSERT INTO versions VALUES ('alice', 'm', 1, 'aa', 5, 3.0, '[]');
INSERT INTO modules VALUES ('alice', 'm', 1);
INSERT INTO runs VALUES (1, 'alice', 'm', 'aa', 'complete', 1.0, 2.0, 0, '{}', NULL, NULL);
PRAGMA user_version = 1;
"""


def version_1(path: Path, more: str = "") -> None:
    """A file as the first Realm left it, with the keys ``good`` and ``old`` (revoked)."""
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1 + more)
    rows = [(hash_key("good"), "k1", "alice", 4.0, None), (hash_key("old"), "k2", "admin", 5.0, 6.0)]
    connection.executemany("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()


def test_a_file_of_version_1_becomes_one_of_today(tmp_path: Path, blobs: BlobStore) -> None:
    path = tmp_path / "old.sqlite"
    version_1(path)
    for _ in range(2):
        database = Database(path, blobs)
        assert database.connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        principal = database.authenticate("good")
        assert principal is not None and (principal.tenant, principal.key_id, principal.admin) == ("alice", "k1", False)
        assert database.authenticate("old") is None
        assert [(key.id, key.tenant, key.created, key.revoked) for key in database.list_keys(None)] == [
            ("k1", "alice", 4.0, None),
            ("k2", "admin", 5.0, 6.0),
        ]
        # Each entry counts for 64 bytes more, and a key for its bytes: 2 + 2 and 3 + 3.
        assert database.stored("alice") == Stored(1, 5, 10 + 2 * 64)
        assert database.stored("admin").store_bytes == 0
        assert database.load_limits() == ({}, {})
        assert database.find_module("alice", "m").version == 1
        assert database.ensure_admin() is None and len(database.list_runs(None, 9)) == 1
        database.close()
    database = Database(path, blobs)
    database.change_limits("alice", {"uploads": 1})
    database.store_set("alice", "é", b"", limit=0)
    database.store_set("alice", "a\0b", b"", limit=0)
    assert database.stored("alice").store_bytes == 0
    assert database.authenticate(database.add_key("alice").key) is not None
    assert database.reserve_runs(1) == 42
    # A new file has the same tables.
    fresh = Database(tmp_path / "fresh.sqlite", blobs)
    assert _tables(database) == _tables(fresh)
    for each in (database, fresh):
        each.close()


def _tables(database: Database) -> dict[str, list[Any]]:
    names = [name for (name,) in database.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return {name: database.connection.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names}


def test_a_step_that_fails_leaves_the_file_as_it_was(tmp_path: Path, blobs: BlobStore) -> None:
    path = tmp_path / "old.sqlite"
    version_1(path, "CREATE TABLE keys_of_1 (x);")
    with pytest.raises(sqlite3.Error):
        Database(path, blobs)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM keys").fetchone() == (2,)
    assert "limits" not in [row[1] for row in connection.execute("PRAGMA table_info(tenants)")]
    connection.execute("DROP TABLE keys_of_1")
    connection.commit()
    connection.close()
    database = Database(path, blobs)
    assert database.authenticate("good") is not None
    database.close()


def test_keys_are_compared_whole(database: Database) -> None:
    """Only a part of a hash is indexed: another key with the same part is no key."""
    database.add_tenant("alice")
    made = database.add_key("alice")
    digest = hash_key(made.key)
    for changed in (digest[:4] + bytes(28), digest[:31] + bytes([digest[31] ^ 1])):
        database.connection.execute("UPDATE keys SET hash = ?", (changed,))
        assert database.authenticate(made.key) is None
    # Several with one part: the right one is found.
    database.connection.execute("UPDATE keys SET hash = ?", (digest,))
    other = database.add_key("alice")
    database.connection.execute("UPDATE keys SET part = ? WHERE id = ?", (digest[:4], other.id))
    found = database.authenticate(made.key)
    assert found is not None and found.key_id == made.id


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
