"""Adapters in the registry: names, contents shared with others and with modules, limits, and older files."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from realm.errors import RealmError
from realm.limits import TenantLimits
from realm.registry.adapters import not_found
from realm.registry.blobs import BlobStore, hash_and_sync
from realm.registry.database import Database
from realm.registry.records import AdapterContent, AdapterRecord, Stored
from realm.registry.schema import SCHEMA_VERSION
from realm.registry.thread import Registry
from tests.fake_host import async_test


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
def database(tmp_path: Path, blobs: BlobStore) -> Iterator[Database]:
    database = Database(tmp_path / "r.sqlite", blobs, clock=lambda: 7.0)
    database.ensure_admin()
    for tenant in ("alice", "bob"):
        database.add_tenant(tenant)
    yield database
    database.close()


def received(blobs: BlobStore, data: bytes) -> tuple[Path, AdapterContent]:
    file = blobs.incoming()
    file.write_bytes(data)
    return file, AdapterContent(
        sha256=hash_and_sync(file),
        size=len(data),
        model="tiny",
        config=b'{"r":2}',
        rank=2,
        alpha=4.0,
        targets=("q_proj", "down_proj"),
        parameters=len(data),
    )


def add(database: Database, blobs: BlobStore, tenant: str, name: str, data: bytes, **limits: int) -> AdapterRecord:
    file, content = received(blobs, data)
    record = database.adapters.commit(tenant, name, file, content, limits=TenantLimits(**limits))
    assert not file.exists() and blobs.path(record.sha256).read_bytes() == data
    return record


def push(database: Database, blobs: BlobStore, tenant: str, name: str, data: bytes) -> str:
    """A module."""
    file = blobs.incoming()
    file.write_bytes(data)
    sha256 = hash_and_sync(file)
    return database.commit_module(tenant, name, file, sha256, len(data), [], limits=TenantLimits()).sha256


def settle(database: Database) -> None:
    for action in database.after_commit:
        action()
    database.after_commit.clear()


def test_what_is_kept_is_given_back(tmp_path: Path, database: Database, blobs: BlobStore) -> None:
    record = add(database, blobs, "alice", "legal", b"weights")
    assert record == AdapterRecord(
        tenant="alice",
        name="legal",
        version=1,
        created=7.0,
        pinned=False,
        shared=False,
        sha256=record.sha256,
        size=7,
        model="tiny",
        config=b'{"r":2}',
        rank=2,
        alpha=4.0,
        targets=("q_proj", "down_proj"),
        parameters=7,
    )
    other = Database(tmp_path / "r.sqlite", blobs)
    assert other.adapters.all() == [record] and other.adapters.find("alice", "legal") == record
    other.close()


@pytest.mark.parametrize(
    ("available", "says"),
    [
        ([], "none is available"),
        (list("abcdefgh"), "available: a, b, c, d, e, f, g, h"),
        (list("abcdefghi"), "available: a, b, c, d, e, f, g, h, …"),
    ],
)
def test_who_asks_for_none_is_told_which_there_are(available: list[str], says: str) -> None:
    error = not_found("legal", available)
    assert error.message == f"there is no adapter 'legal'; {says}"
    assert error.details == {"available": available}


def test_names_are_the_tenants_own(database: Database, blobs: BlobStore) -> None:
    add(database, blobs, "alice", "legal", b"a")
    add(database, blobs, "bob", "legal", b"b")
    add(database, blobs, "bob", "terse", b"c")
    limits = TenantLimits()
    changes: list[Callable[[], object]] = [
        lambda: database.adapters.find("alice", "terse"),
        lambda: database.adapters.pin("alice", "terse", True, limits=limits),
        lambda: database.adapters.share("alice", "terse", True),
        lambda: database.adapters.remove("alice", "terse"),
    ]
    for change in changes:
        with pytest.raises(RealmError) as refused:
            change()
        assert refused.value.code == "adapter_not_found" and refused.value.details == {"available": ["legal"]}
        assert refused.value.message == "there is no adapter 'terse'; available: legal"
    database.adapters.remove("alice", "legal")
    assert [(record.tenant, record.name) for record in database.adapters.all()] == [("bob", "legal"), ("bob", "terse")]
    assert database.adapters.find("bob", "legal").size == 1


def test_content_goes_when_nothing_refers_to_it(database: Database, blobs: BlobStore) -> None:
    sha256 = add(database, blobs, "alice", "one", b"same").sha256
    add(database, blobs, "alice", "two", b"same")
    add(database, blobs, "bob", "one", b"same")
    assert push(database, blobs, "bob", "module", b"same") == sha256
    for tenant, name in (("alice", "one"), ("alice", "two"), ("bob", "one")):
        database.adapters.remove(tenant, name)
        settle(database)
        assert blobs.path(sha256).exists()
    database.remove_module("bob", "module")
    settle(database)
    assert not blobs.path(sha256).exists()
    # The other way round: the module goes first.
    push(database, blobs, "alice", "module", b"same")
    add(database, blobs, "bob", "one", b"same")
    database.remove_module("alice", "module")
    settle(database)
    assert blobs.path(sha256).exists()
    database.adapters.remove("bob", "one")
    settle(database)
    assert not blobs.path(sha256).exists()


def test_a_name_given_again_stands_for_the_new_content(database: Database, blobs: BlobStore) -> None:
    first = add(database, blobs, "admin", "legal", b"1")
    database.adapters.pin("admin", "legal", True, limits=TenantLimits())
    database.adapters.share("admin", "legal", True)
    second = add(database, blobs, "admin", "legal", b"2")
    settle(database)
    assert (second.version, second.pinned, second.shared) == (2, True, True)
    assert database.adapters.all() == [second]
    assert not blobs.path(first.sha256).exists() and blobs.path(second.sha256).exists()
    # The same again takes nothing away.
    third = add(database, blobs, "admin", "legal", b"2")
    settle(database)
    assert third.version == 3 and blobs.path(third.sha256).exists()
    # Content that somebody has still is not deleted with the name that had it.
    add(database, blobs, "bob", "x", b"2")
    add(database, blobs, "admin", "legal", b"3")
    settle(database)
    assert blobs.path(third.sha256).exists()


def test_content_that_is_taken_in_the_same_commit_stays(database: Database, blobs: BlobStore) -> None:
    record = add(database, blobs, "alice", "one", b"x")
    database.adapters.remove("alice", "one")
    add(database, blobs, "bob", "two", b"x")
    settle(database)
    assert blobs.path(record.sha256).exists()


def test_a_crash_leaves_no_content_behind_and_takes_none(tmp_path: Path, database: Database, blobs: BlobStore) -> None:
    adapter = add(database, blobs, "alice", "one", b"adapter").sha256
    module = push(database, blobs, "alice", "m", b"module")
    lost, content = received(blobs, b"nobody's")
    blobs.adopt(lost, content.sha256)
    database.recover()
    assert blobs.path(adapter).exists() and blobs.path(module).exists() and not blobs.path(content.sha256).exists()


def refused(database: Database, tenant: str, name: str, data: bytes, blobs: BlobStore, **limits: int) -> dict[str, Any]:
    file, content = received(blobs, data)
    with pytest.raises(RealmError) as error:
        database.adapters.commit(tenant, name, file, content, limits=TenantLimits(**limits))
    assert error.value.code == "limit_exceeded" and "remove" in error.value.message
    # The file is the caller's still.
    file.unlink()
    return {key: error.value.details[key] for key in ("name", "limit", "used")}


def test_names_and_bytes_are_bounded(database: Database, blobs: BlobStore) -> None:
    add(database, blobs, "alice", "one", b"x" * 10, stored_adapters=2, stored_adapter_bytes=10)
    add(database, blobs, "alice", "two", b"x" * 10, stored_adapters=2, stored_adapter_bytes=10)
    error = refused(database, "alice", "three", b"y", blobs, stored_adapters=2)
    assert error == {"name": "stored_adapters", "limit": 2, "used": 2}
    # The same content counts once.
    assert database.adapters.stored("alice") == (2, 10, 0)
    error = refused(database, "alice", "two", b"y", blobs, stored_adapters=2, stored_adapter_bytes=10)
    assert error == {"name": "stored_adapter_bytes", "limit": 10, "used": 10}
    add(database, blobs, "alice", "two", b"y", stored_adapters=2, stored_adapter_bytes=11)
    # What is replaced makes room, to the byte.
    error = refused(database, "alice", "two", b"z" * 3, blobs, stored_adapter_bytes=12)
    assert error == {"name": "stored_adapter_bytes", "limit": 12, "used": 10}
    add(database, blobs, "alice", "two", b"z" * 2, stored_adapters=2, stored_adapter_bytes=12)
    assert database.stored("alice") == Stored(0, 0, 0, 2, 12, 0)
    # Modules and others' adapters do not count.
    push(database, blobs, "alice", "m", b"m" * 100)
    add(database, blobs, "bob", "one", b"b" * 100)
    assert database.adapters.stored("alice") == (2, 12, 0)
    add(database, blobs, "alice", "two", b"x" * 10, stored_adapter_bytes=12)
    assert database.adapters.stored("alice") == (2, 10, 0)
    error = refused(database, "alice", "one", b"", blobs, stored_adapters=0)
    assert error == {"name": "stored_adapters", "limit": 0, "used": 1}


def test_pins_are_bounded(database: Database, blobs: BlobStore) -> None:
    for name in ("a", "b", "c"):
        add(database, blobs, "alice", name, name.encode())
    limits = TenantLimits(pinned_adapters=2)
    assert database.adapters.pin("alice", "a", True, limits=limits).pinned
    database.adapters.pin("alice", "b", True, limits=limits)
    # Again is no further one.
    database.adapters.pin("alice", "b", True, limits=limits)
    with pytest.raises(RealmError) as error:
        database.adapters.pin("alice", "c", True, limits=limits)
    assert error.value.code == "limit_exceeded"
    assert error.value.details == {"name": "pinned_adapters", "limit": 2, "used": 2, "unit": "adapters"}
    assert database.adapters.stored("alice")[2] == 2
    # A limit that has been lowered keeps nobody from unpinning.
    assert not database.adapters.pin("alice", "a", False, limits=TenantLimits(pinned_adapters=0)).pinned
    database.adapters.pin("alice", "c", True, limits=limits)
    assert database.adapters.stored("alice")[2] == 2


def test_content_is_known_to_those_who_stored_it_as_an_adapter(database: Database, blobs: BlobStore) -> None:
    sha256 = add(database, blobs, "alice", "one", b"secret").sha256
    limits = TenantLimits()
    assert database.adapters.check_stored("alice", "x", sha256, 6, limits) == 6
    assert database.adapters.check_stored("bob", "x", sha256, 6, limits) is None
    assert database.has_content("alice", sha256) is None
    module = push(database, blobs, "alice", "m", b"module")
    assert database.adapters.has_content("alice", module) is None
    with pytest.raises(RealmError) as error:
        database.adapters.borrow_content("bob", sha256)
    assert error.value.code == "upload_not_found"
    with pytest.raises(RealmError):
        database.borrow_content("alice", sha256)
    borrowed = database.adapters.borrow_content("alice", sha256)
    database.adapters.remove("alice", "one")
    settle(database)
    assert borrowed.read_bytes() == b"secret"
    with pytest.raises(RealmError):
        database.adapters.borrow_content("alice", sha256)


def test_borrowed_content_can_be_committed_again(database: Database, blobs: BlobStore) -> None:
    first = add(database, blobs, "alice", "one", b"x")
    file = database.adapters.borrow_content("alice", first.sha256)
    _, content = received(blobs, b"x")
    again = database.adapters.commit("alice", "two", file, content, limits=TenantLimits())
    assert not file.exists() and blobs.path(again.sha256).read_bytes() == b"x"


def test_names_in_errors_are_bounded(database: Database, blobs: BlobStore) -> None:
    for number in range(60):
        add(database, blobs, "alice", f"a{number:02}", b"x")
    with pytest.raises(RealmError) as error:
        database.adapters.find("alice", "x")
    assert error.value.details["available"] == [f"a{number:02}" for number in range(50)]


# --- any order of changes ------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
TENANTS = st.sampled_from(["alice", "bob"])
DATA = st.sampled_from([b"", b"1", b"22", b"333"])


class Contents(RuleBasedStateMachine):
    """Whatever is added and removed in whatever order, each file is there as long as something refers to it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.blobs = BlobStore(Path(self.folder.name))
        self.database = Database(Path(self.folder.name) / "r.sqlite", self.blobs)
        self.database.connection.execute("PRAGMA synchronous = OFF")
        for tenant in ("alice", "bob"):
            self.database.add_tenant(tenant)
        self.adapters: dict[tuple[str, str], bytes] = {}
        self.modules: dict[tuple[str, str], set[bytes]] = {}

    @rule(tenant=TENANTS, name=NAMES, data=DATA)
    def add(self, tenant: str, name: str, data: bytes) -> None:
        try:
            add(self.database, self.blobs, tenant, name, data, stored_adapter_bytes=4, stored_adapters=2)
        except RealmError as error:
            kept = {d for key, d in self.adapters.items() if key[0] == tenant and key[1] != name}
            names = [key for key in self.adapters if key[0] == tenant and key[1] != name]
            assert len(names) >= 2 or (sum(map(len, kept)) + len(data) > 4 and data not in kept)
            assert error.code == "limit_exceeded"
        else:
            self.adapters[tenant, name] = data

    @rule(tenant=TENANTS, name=NAMES)
    def remove(self, tenant: str, name: str) -> None:
        if (tenant, name) in self.adapters:
            self.database.adapters.remove(tenant, name)
            del self.adapters[tenant, name]

    @rule(tenant=TENANTS, name=NAMES, data=DATA)
    def push(self, tenant: str, name: str, data: bytes) -> None:
        push(self.database, self.blobs, tenant, name, data)
        self.modules.setdefault((tenant, name), set()).add(data)

    @rule(tenant=TENANTS, name=NAMES)
    def remove_module(self, tenant: str, name: str) -> None:
        if self.modules.pop((tenant, name), None) is not None:
            self.database.remove_module(tenant, name)

    @rule()
    def restart(self) -> None:
        self.database.recover()

    @invariant()
    def files_are_there(self) -> None:
        settle(self.database)
        wanted = {*self.adapters.values()}.union(*self.modules.values()) if self.modules else {*self.adapters.values()}
        blobs = [blob for folder in (Path(self.folder.name) / "blobs").iterdir() for blob in folder.iterdir()]
        assert {blob.read_bytes() for blob in blobs} == wanted
        for tenant in ("alice", "bob"):
            own = [data for key, data in self.adapters.items() if key[0] == tenant]
            assert self.database.adapters.stored(tenant) == (len(own), sum(map(len, set(own))), 0)

    def teardown(self) -> None:
        self.database.close()
        self.folder.cleanup()


TestContents = Contents.TestCase
TestContents.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


# --- files of earlier versions -------------------------------------------------------------------

VERSION_2 = """
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    created REAL NOT NULL,
    admin INTEGER NOT NULL,
    store_bytes INTEGER NOT NULL DEFAULT 0,
    limits TEXT NOT NULL DEFAULT '{}'
) STRICT, WITHOUT ROWID;
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    part BLOB NOT NULL,
    hash BLOB NOT NULL,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    created REAL NOT NULL,
    revoked REAL
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_by_part ON keys (part);
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
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO settings (name, value) VALUES ('limits', '{"uploads":3}');
INSERT INTO tenants VALUES ('admin', 1.0, 1, 0, '{}'), ('alice', 2.0, 0, 67, '{"kv_pages":9}');
INSERT INTO versions VALUES ('alice', 'm', 1, 'aa', 5, 3.0, '[]');
INSERT INTO modules VALUES ('alice', 'm', 1);
INSERT INTO store VALUES ('alice', 'k', x'0102');
PRAGMA user_version = 2;
"""


def version_2(path: Path, more: str = "") -> None:
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_2 + more)
    connection.close()


def test_a_file_of_version_2_takes_adapters(tmp_path: Path, blobs: BlobStore) -> None:
    path = tmp_path / "old.sqlite"
    version_2(path)
    for _ in range(2):
        database = Database(path, blobs)
        assert database.connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert database.adapters.all() == []
        assert database.stored("alice") == Stored(1, 5, 67)
        assert database.load_limits() == ({"uploads": 3}, {"alice": {"kv_pages": 9}})
        assert database.store_get("alice", "k") == b"\1\2" and database.find_module("alice", "m").version == 1
        database.close()
    database = Database(path, blobs)
    add(database, blobs, "alice", "legal", b"x")
    assert database.stored("alice") == Stored(1, 5, 67, 1, 1, 0)
    fresh = Database(tmp_path / "fresh.sqlite", blobs)
    for each in (database, fresh):
        names = [row[0] for row in each.connection.execute("SELECT sql FROM sqlite_schema WHERE tbl_name = 'adapters'")]
        assert len(names) == 3 and any("adapters_by_content" in (sql or "") for sql in names)
    assert _columns(database) == _columns(fresh)
    for each in (database, fresh):
        each.close()


def _columns(database: Database) -> list[Any]:
    tables = [row[0] for row in database.connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return [(table, database.connection.execute(f"PRAGMA table_xinfo({table})").fetchall()) for table in sorted(tables)]


def test_a_step_to_3_that_fails_leaves_the_file_as_it_was(tmp_path: Path, blobs: BlobStore) -> None:
    path = tmp_path / "old.sqlite"
    version_2(path, "CREATE TABLE holder (x); CREATE INDEX adapters_by_content ON holder (x);")
    with pytest.raises(sqlite3.Error):
        Database(path, blobs)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'adapters'").fetchone() == (0,)
    connection.execute("DROP TABLE holder")
    connection.close()
    database = Database(path, blobs)
    assert database.adapters.all() == [] and database.stored("alice").modules == 1
    database.close()


# --- in the registry's thread ---------------------------------------------------------------------


@async_test
async def test_a_refused_commit_changes_nothing(tmp_path: Path) -> None:
    """Of operations in one transaction the one that fails leaves no row and takes no content."""
    registry = await Registry.open(tmp_path)
    await registry.run(lambda database: database.add_tenant("alice"))
    blobs, limits = registry.blobs, TenantLimits(stored_adapters=1)
    (first, one), (second, two) = received(blobs, b"1"), received(blobs, b"2")
    kept = registry.run(lambda d: d.adapters.commit("alice", "a", first, one, limits=limits), tenant="alice")
    failed = registry.run(lambda d: d.adapters.commit("alice", "b", second, two, limits=limits), tenant="alice")
    assert (await kept).name == "a"
    with pytest.raises(RealmError):
        await failed
    assert await registry.run(lambda database: [record.name for record in database.adapters.all()]) == ["a"]
    assert second.exists() and not blobs.path(two.sha256).exists()
    # An adapter of nobody is refused by the file itself.
    with pytest.raises(RealmError) as error:
        await registry.run(lambda d: d.adapters.commit("nobody", "b", second, two, limits=limits))
    assert error.value.code == "internal"
    await registry.close()
