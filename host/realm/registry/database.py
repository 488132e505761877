"""Tenants, keys, modules, runs and the guests' key-value store, in one SQLite file.

:class:`Database` is synchronous and belongs to one thread (:mod:`realm.registry.thread`). Its
methods are run inside a transaction that the caller owns, so that many can share one commit; what
must happen only once that commit is on disk (deleting a file) is left in :attr:`Database.after_commit`.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from realm.errors import RealmError
from realm.registry.blobs import BlobStore
from realm.registry.records import KeyRecord, LogLine, ModuleRecord, NewKey, Principal, RunRecord, TenantRecord

SCHEMA_VERSION = 1
ADMIN_TENANT = "admin"
KEY_PREFIX = "realm_"

_SCHEMA = """
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
INSERT INTO counters (name, value) VALUES ('run', 0);
"""


def hash_key(key: str) -> bytes:
    """What is stored of a key. Keys are 256 random bits, so a plain fast hash is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Database:
    """The registry's tables. See the module's docstring for threads and transactions."""

    def __init__(self, path: Path, blobs: BlobStore, *, clock: Callable[[], float] = time.time) -> None:
        """Opens or creates the file.

        Raises:
            RealmError: ``registry_version`` if a newer Realm wrote it.
        """
        self._blobs = blobs
        self._clock = clock
        self.after_commit: list[Callable[[], object]] = []
        path.touch(mode=0o600, exist_ok=True)
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        connection = self.connection
        connection.execute("PRAGMA journal_mode = WAL")
        # A commit that was answered survives a power cut; the thread makes many share one.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            connection.close()
            raise RealmError(
                "registry_version",
                f"{path} has schema {version}, this Realm knows {SCHEMA_VERSION}: use the newer Realm",
            )
        if version == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        self.connection.close()

    def _row(self, sql: str, *values: Any) -> Any:
        return self.connection.execute(sql, values).fetchone()

    # --- start ----------------------------------------------------------------------------------

    def recover(self) -> int:
        """Settle what a crash left: unfinished runs become errors, unknown blobs go. Counts the runs."""
        error: dict[str, Any] = {
            "code": "worker_lost",
            "message": "the host restarted while this run was in progress",
            "details": {},
            "retry_after": None,
        }
        cursor = self.connection.execute(
            "UPDATE runs SET status = 'error', finished = ?, error = ? WHERE status = 'running'",
            (self._clock(), msgspec.json.encode(error).decode()),
        )
        self._blobs.sweep({sha for (sha,) in self.connection.execute("SELECT DISTINCT sha256 FROM versions")})
        return cursor.rowcount

    def ensure_admin(self) -> NewKey | None:
        """At the very first start: tenant ``admin`` and its key. Later: None."""
        if self._row("SELECT 1 FROM tenants LIMIT 1"):
            return None
        self.connection.execute("INSERT INTO tenants VALUES (?, ?, 1, 0)", (ADMIN_TENANT, self._clock()))
        return self.add_key(ADMIN_TENANT)

    def reserve_runs(self, count: int) -> int:
        """First of ``count`` run numbers that no other reservation ever gets."""
        (value,) = self._row("UPDATE counters SET value = value + ? WHERE name = 'run' RETURNING value", count)
        return int(value) - count + 1

    def release_runs(self, next_run: int) -> None:
        """At a clean end: numbers from ``next_run`` on were not used and may be reserved again."""
        self.connection.execute("UPDATE counters SET value = ? WHERE name = 'run' AND value >= ?", (next_run - 1,) * 2)

    # --- tenants and keys -----------------------------------------------------------------------

    def add_tenant(self, name: str) -> None:
        try:
            self.connection.execute("INSERT INTO tenants VALUES (?, ?, 0, 0)", (name, self._clock()))
        except sqlite3.IntegrityError:
            raise RealmError("already_exists", f"there is a tenant {name!r} already") from None

    def list_tenants(self) -> list[TenantRecord]:
        rows = self.connection.execute(
            "SELECT name, created, (SELECT count(*) FROM keys WHERE tenant = name AND revoked IS NULL) "
            "FROM tenants ORDER BY name"
        )
        return [TenantRecord(*row) for row in rows]

    def add_key(self, tenant: str) -> NewKey:
        if not self._row("SELECT 1 FROM tenants WHERE name = ?", tenant):
            raise RealmError("tenant_not_found", f"there is no tenant {tenant!r}")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        key_id = "k" + secrets.token_hex(6)
        self.connection.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, NULL)", (hash_key(key), key_id, tenant, self._clock())
        )
        return NewKey(key, key_id, tenant)

    def list_keys(self, tenant: str | None) -> list[KeyRecord]:
        if tenant is not None and not self._row("SELECT 1 FROM tenants WHERE name = ?", tenant):
            raise RealmError("tenant_not_found", f"there is no tenant {tenant!r}")
        rows = self.connection.execute(
            "SELECT id, tenant, created, revoked FROM keys WHERE ? IS NULL OR tenant = ? ORDER BY created, id",
            (tenant, tenant),
        )
        return [KeyRecord(*row) for row in rows]

    def revoke_key(self, key_id: str) -> None:
        """Revoking again keeps the first time."""
        row = self._row(
            "UPDATE keys SET revoked = coalesce(revoked, ?) WHERE id = ? RETURNING id", self._clock(), key_id
        )
        if row is None:
            raise RealmError("key_not_found", f"there is no key with the id {key_id!r}")

    def authenticate(self, key: str) -> Principal | None:
        """The holder of a key; None if it is unknown or revoked. Compares hashes, never keys."""
        row = self._row(
            "SELECT tenant, id, admin FROM keys JOIN tenants ON name = tenant WHERE hash = ? AND revoked IS NULL",
            hash_key(key),
        )
        return Principal(row[0], row[1], bool(row[2])) if row else None

    # --- modules --------------------------------------------------------------------------------

    def has_content(self, tenant: str, sha256: str) -> int | None:
        """Size in bytes of content that this tenant itself has stored; None otherwise."""
        row = self._row("SELECT size FROM versions WHERE sha256 = ? AND tenant = ? LIMIT 1", sha256, tenant)
        return int(row[0]) if row else None

    def borrow_content(self, tenant: str, sha256: str) -> Path:
        """A private name for content this tenant has stored.

        Raises:
            RealmError: ``upload_not_found`` if it was removed meanwhile.
        """
        if self.has_content(tenant, sha256) is None:
            raise RealmError("upload_not_found", "this content was removed meanwhile: upload it again")
        return self._blobs.borrow(sha256)

    def commit_module(
        self, tenant: str, name: str, file: Path, sha256: str, size: int, imports: list[str]
    ) -> ModuleRecord:
        """Make ``file`` (synced, its hash checked) the next version of a module; takes the file."""
        self._blobs.adopt(file, sha256)
        (last,) = self._row("SELECT max(version) FROM versions WHERE tenant = ? AND name = ?", tenant, name)
        record = ModuleRecord(name, sha256, size, (last or 0) + 1, self._clock(), imports)
        self.connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?)",
            (tenant, name, record.version, sha256, size, record.created, msgspec.json.encode(imports).decode()),
        )
        self.connection.execute(
            "INSERT INTO modules VALUES (?, ?, ?) ON CONFLICT (tenant, name) DO UPDATE SET version = excluded.version",
            (tenant, name, record.version),
        )
        return record

    def list_modules(self, tenant: str) -> list[ModuleRecord]:
        rows = self.connection.execute(
            "SELECT name, sha256, size, version, created, imports "
            "FROM modules JOIN versions USING (tenant, name, version) WHERE tenant = ? ORDER BY name",
            (tenant,),
        )
        return [
            ModuleRecord(name, sha256, size, version, created, msgspec.json.decode(imports, type=list[str]))
            for name, sha256, size, version, created, imports in rows
        ]

    def find_module(self, tenant: str, name: str) -> ModuleRecord:
        """Raises RealmError ``module_not_found`` with the tenant's own names."""
        modules = self.list_modules(tenant)
        for module in modules:
            if module.name == name:
                return module
        raise RealmError(
            "module_not_found",
            f"there is no module {name!r}: push it first",
            details={"available": [module.name for module in modules]},
        )

    def remove_module(self, tenant: str, name: str) -> None:
        """Forget a module with all its versions; content nobody uses any more is deleted."""
        self.find_module(tenant, name)
        rows = self.connection.execute("SELECT sha256 FROM versions WHERE tenant = ? AND name = ?", (tenant, name))
        contents = {sha for (sha,) in rows}
        self.connection.execute("DELETE FROM modules WHERE tenant = ? AND name = ?", (tenant, name))
        self.connection.execute("DELETE FROM versions WHERE tenant = ? AND name = ?", (tenant, name))
        for sha in contents:
            self.after_commit.append(partial(self._remove_unused, sha))

    def _remove_unused(self, sha256: str) -> None:
        # Asked again after the commit: another operation of the same commit may have taken the content.
        if not self._row("SELECT 1 FROM versions WHERE sha256 = ? LIMIT 1", sha256):
            self._blobs.remove(sha256)

    # --- runs -----------------------------------------------------------------------------------

    def add_run(self, run: RunRecord) -> None:
        self.connection.execute(
            "INSERT INTO runs (number, tenant, module, sha256, status, started) VALUES (?, ?, ?, ?, ?, ?)",
            (run.number, run.tenant, run.module, run.sha256, run.status, run.started),
        )

    def finish_run(self, run: RunRecord, log: Sequence[LogLine]) -> None:
        self.connection.execute(
            "UPDATE runs SET status = ?, finished = ?, code = ?, usage = ?, error = ?, log = ? WHERE number = ?",
            (
                run.status,
                run.finished,
                run.code,
                msgspec.json.encode(run.usage).decode(),
                msgspec.json.encode(run.error).decode(),
                msgspec.json.encode(log).decode() if log else None,
                run.number,
            ),
        )

    def prune_runs(self, keep: int) -> int:
        """Forget the oldest finished runs beyond ``keep``; counts them."""
        return self.connection.execute(
            "DELETE FROM runs WHERE status <> 'running' AND number <= "
            "(SELECT number FROM runs ORDER BY number DESC LIMIT 1 OFFSET ?)",
            (keep,),
        ).rowcount

    def list_runs(self, tenant: str | None, limit: int) -> list[RunRecord]:
        """The latest finished runs, newest first, of one tenant or (None) of all."""
        rows = self.connection.execute(
            "SELECT number, tenant, module, sha256, status, started, finished, code, usage, error FROM runs "
            "WHERE status <> 'running' AND (? IS NULL OR tenant = ?) ORDER BY number DESC LIMIT ?",
            (tenant, tenant, limit),
        )
        return [
            RunRecord(
                number,
                owner,
                module,
                sha256,
                status,
                started,
                finished,
                code,
                msgspec.json.decode(usage) if usage else None,
                msgspec.json.decode(error) if error else None,
            )
            for number, owner, module, sha256, status, started, finished, code, usage, error in rows
        ]

    def run_log(self, tenant: str | None, number: int) -> list[LogLine]:
        """Raises RealmError ``run_not_found`` for another tenant's, too."""
        row = self._row("SELECT log FROM runs WHERE number = ? AND (? IS NULL OR tenant = ?)", number, tenant, tenant)
        if row is None:
            raise RealmError("run_not_found", f"there is no run r{number}")
        return msgspec.json.decode(row[0], type=list[LogLine]) if row[0] else []

    # --- the guests' store ----------------------------------------------------------------------

    def store_get(self, tenant: str, key: str) -> bytes | None:
        row = self._row("SELECT value FROM store WHERE tenant = ? AND key = ?", tenant, key)
        return bytes(row[0]) if row else None

    def store_set(self, tenant: str, key: str, value: bytes, *, tenant_bytes: int) -> bool:
        """Keep ``value``; False (and nothing kept) if keys and values would exceed ``tenant_bytes``.

        An empty value deletes the key.
        """
        size = len(key.encode())
        old = self._row("SELECT length(value) FROM store WHERE tenant = ? AND key = ?", tenant, key)
        (used,) = self._row("SELECT store_bytes FROM tenants WHERE name = ?", tenant)
        change = (size + len(value) if value else 0) - (size + old[0] if old else 0)
        if change > 0 and used + change > tenant_bytes:
            return False
        if value:
            self.connection.execute(
                "INSERT INTO store VALUES (?, ?, ?) ON CONFLICT (tenant, key) DO UPDATE SET value = excluded.value",
                (tenant, key, value),
            )
        else:
            self.connection.execute("DELETE FROM store WHERE tenant = ? AND key = ?", (tenant, key))
        self.connection.execute("UPDATE tenants SET store_bytes = store_bytes + ? WHERE name = ?", (change, tenant))
        return True
