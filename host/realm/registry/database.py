"""Tenants, keys, modules, adapters, runs and the guests' key-value store, in one SQLite file.

:class:`Database` is synchronous and belongs to one thread (:mod:`realm.registry.thread`). Its
methods are run inside a transaction that the caller owns, so that many can share one commit; what
must happen only once that commit is on disk (deleting a file) is left in :attr:`Database.after_commit`.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from realm.errors import RealmError
from realm.limits import TenantLimits, effective, over_limit
from realm.registry.adapters import Adapters
from realm.registry.blobs import BlobStore
from realm.registry.bounds import encode_log, fit_error
from realm.registry.records import (
    KeyRecord,
    LogLine,
    ModuleRecord,
    NewKey,
    Principal,
    RunRecord,
    Stored,
    TenantRecord,
)
from realm.registry.schema import ENTRY_BYTES, PART_BYTES, prepare

log = logging.getLogger("realm.registry")

ADMIN_TENANT = "admin"
KEY_PREFIX = "realm_"
_NAMES = 50
"""Most names of modules in an error."""
_RUN_BYTES = 512
"""What a run counts for in a list besides its usage and error: more than the rest of it takes as JSON."""


def hash_key(key: str) -> bytes:
    """What is stored of a key. Keys are 256 random bits, so a plain fast hash is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


class Database:
    """The registry's tables. See the module's docstring for threads and transactions.

    ``adapters`` has those of adapters, in the same transactions.
    """

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
        try:
            prepare(connection, path)
        except BaseException:
            connection.close()
            raise
        self.adapters = Adapters(connection, blobs, clock, self._forget_content)

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
        self._blobs.sweep(
            {sha for (sha,) in self.connection.execute("SELECT sha256 FROM versions UNION SELECT sha256 FROM adapters")}
        )
        return cursor.rowcount

    def ensure_admin(self) -> NewKey | None:
        """At the very first start: tenant ``admin`` and its key. Later: None."""
        if self._row("SELECT 1 FROM tenants LIMIT 1"):
            return None
        self.connection.execute(
            "INSERT INTO tenants (name, created, admin) VALUES (?, ?, 1)", (ADMIN_TENANT, self._clock())
        )
        return self.add_key(ADMIN_TENANT)

    def reserve_runs(self, count: int) -> int:
        """First of ``count`` run numbers that no other reservation ever gets."""
        (value,) = self._row("UPDATE counters SET value = value + ? WHERE name = 'run' RETURNING value", count)
        return int(value) - count + 1

    def release_runs(self, next_run: int) -> None:
        """At a clean end: numbers from ``next_run`` on were not used and may be reserved again."""
        self.connection.execute("UPDATE counters SET value = ? WHERE name = 'run' AND value >= ?", (next_run - 1,) * 2)

    # --- tenants --------------------------------------------------------------------------------

    def add_tenant(self, name: str) -> None:
        try:
            self.connection.execute(
                "INSERT INTO tenants (name, created, admin) VALUES (?, ?, 0)", (name, self._clock())
            )
        except sqlite3.IntegrityError:
            raise RealmError("already_exists", f"there is a tenant {name!r} already") from None

    def list_tenants(self) -> list[TenantRecord]:
        rows = self.connection.execute(
            "SELECT name, created, (SELECT count(*) FROM keys WHERE tenant = name AND revoked IS NULL) "
            "FROM tenants ORDER BY name"
        )
        return [TenantRecord(*row) for row in rows]

    def find_tenant(self, name: str) -> TenantRecord:
        """Raises RealmError ``tenant_not_found``."""
        row = self._row(
            "SELECT name, created, (SELECT count(*) FROM keys WHERE tenant = name AND revoked IS NULL) "
            "FROM tenants WHERE name = ?",
            name,
        )
        if row is None:
            raise _no_tenant(name)
        return TenantRecord(*row)

    # --- limits ---------------------------------------------------------------------------------

    def load_limits(self) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """The default of all tenants, and the tenants' own values (without tenants that have none).

        What this Realm does not know (another version wrote it) is left out with a line in the log.
        """
        (defaults,) = self._row("SELECT value FROM settings WHERE name = 'limits'")
        chosen = {
            name: _usable(values, f"tenant {name}")
            for name, values in self.connection.execute("SELECT name, limits FROM tenants WHERE limits <> '{}'")
        }
        return _usable(defaults, "the default"), {name: values for name, values in chosen.items() if values}

    def change_limits(self, tenant: str | None, changes: Mapping[str, int | None]) -> dict[str, int]:
        """Set (None: unset) values of a tenant, or of (None) the default; gives all that are set now.

        Stored values that this Realm does not know stay, for the one that does.

        Raises:
            RealmError: ``tenant_not_found``.
        """
        if tenant is None:
            row = self._row("SELECT value FROM settings WHERE name = 'limits'")
        else:
            row = self._row("SELECT limits FROM tenants WHERE name = ?", tenant)
        if row is None:
            raise _no_tenant(str(tenant))
        whose = "the default" if tenant is None else f"tenant {tenant}"
        merged = {**_values(row[0], whose), **changes}
        text = msgspec.json.encode({name: value for name, value in merged.items() if value is not None}).decode()
        if tenant is None:
            self.connection.execute("UPDATE settings SET value = ? WHERE name = 'limits'", (text,))
        else:
            self.connection.execute("UPDATE tenants SET limits = ? WHERE name = ?", (text, tenant))
        return _usable(text, whose)

    def stored(self, tenant: str) -> Stored:
        """What a tenant keeps here. Raises RealmError ``tenant_not_found``."""
        row = self._row("SELECT store_bytes FROM tenants WHERE name = ?", tenant)
        if row is None:
            raise _no_tenant(tenant)
        (versions,) = self._row("SELECT count(*) FROM versions WHERE tenant = ?", tenant)
        # A content counts once, however many versions have it.
        (size,) = self._row(
            "SELECT coalesce(sum(size), 0) FROM (SELECT DISTINCT sha256, size FROM versions WHERE tenant = ?)", tenant
        )
        return Stored(versions, size, row[0], *self.adapters.stored(tenant))

    # --- keys -----------------------------------------------------------------------------------

    def add_key(self, tenant: str) -> NewKey:
        if not self._row("SELECT 1 FROM tenants WHERE name = ?", tenant):
            raise _no_tenant(tenant)
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        key_id = "k" + secrets.token_hex(6)
        digest = hash_key(key)
        self.connection.execute(
            "INSERT INTO keys (id, part, hash, tenant, created) VALUES (?, ?, ?, ?, ?)",
            (key_id, digest[:PART_BYTES], digest, tenant, self._clock()),
        )
        return NewKey(key, key_id, tenant)

    def list_keys(self, tenant: str | None) -> list[KeyRecord]:
        if tenant is not None and not self._row("SELECT 1 FROM tenants WHERE name = ?", tenant):
            raise _no_tenant(tenant)
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
        """The holder of a key; None if it is unknown or revoked.

        The index knows only a part of each hash; the whole is compared in constant time, so that the time
        of a refusal says nothing about the hashes that are stored.
        """
        digest = hash_key(key)
        found: Principal | None = None
        for stored, tenant, key_id, admin in self.connection.execute(
            "SELECT hash, tenant, id, admin FROM keys JOIN tenants ON name = tenant WHERE part = ? AND revoked IS NULL",
            (digest[:PART_BYTES],),
        ):
            if hmac.compare_digest(stored, digest):
                found = Principal(tenant, key_id, bool(admin))
        return found

    # --- modules --------------------------------------------------------------------------------

    def has_content(self, tenant: str, sha256: str) -> int | None:
        """Size in bytes of content that this tenant itself has stored; None otherwise."""
        row = self._row("SELECT size FROM versions WHERE sha256 = ? AND tenant = ? LIMIT 1", sha256, tenant)
        return int(row[0]) if row else None

    def check_stored(self, tenant: str, sha256: str, size: int, limits: TenantLimits) -> int | None:
        """Whether a tenant may store one more version, with this content; what :meth:`has_content` gives.

        Raises:
            RealmError: ``limit_exceeded`` (``stored_modules`` or ``stored_bytes``).
        """
        known = self.has_content(tenant, sha256)
        stored = self.stored(tenant)
        if stored.modules >= limits.stored_modules:
            text = "all versions of all modules count: remove a module"
            raise over_limit("stored_modules", limits.stored_modules, stored.modules, text)
        if known is None and stored.module_bytes + size > limits.stored_bytes:
            text = f"{size:,} bytes more are too many: remove a module"
            raise over_limit("stored_bytes", limits.stored_bytes, stored.module_bytes, text)
        return known

    def borrow_content(self, tenant: str, sha256: str) -> Path:
        """A private name for content this tenant has stored.

        Raises:
            RealmError: ``upload_not_found`` if it was removed meanwhile.
        """
        if self.has_content(tenant, sha256) is None:
            raise RealmError("upload_not_found", "this content was removed meanwhile: upload it again")
        return self._blobs.borrow(sha256)

    def commit_module(
        self,
        tenant: str,
        name: str,
        file: Path,
        sha256: str,
        size: int,
        imports: list[str],
        *,
        limits: TenantLimits,
    ) -> ModuleRecord:
        """Make ``file`` (synced, its hash checked) the next version of a module; takes the file.

        Raises:
            RealmError: as :meth:`check_stored` does; the file is left then.
        """
        self.check_stored(tenant, sha256, size, limits)
        self._blobs.adopt(file, sha256)
        (last,) = self._row("SELECT max(version) FROM versions WHERE tenant = ? AND name = ?", tenant, name)
        record = ModuleRecord(name, sha256, size, (last or 0) + 1, self._clock())
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
            "SELECT name, sha256, size, version, created "
            "FROM modules JOIN versions USING (tenant, name, version) WHERE tenant = ? ORDER BY name",
            (tenant,),
        )
        return [ModuleRecord(*row) for row in rows]

    def find_module(self, tenant: str, name: str) -> ModuleRecord:
        """Raises RealmError ``module_not_found`` with the tenant's own names (the first ones of many)."""
        row = self._row(
            "SELECT name, sha256, size, version, created "
            "FROM modules JOIN versions USING (tenant, name, version) WHERE tenant = ? AND name = ?",
            tenant,
            name,
        )
        if row is not None:
            return ModuleRecord(*row)
        names = self.connection.execute(
            "SELECT name FROM modules WHERE tenant = ? ORDER BY name LIMIT ?", (tenant, _NAMES)
        )
        raise RealmError(
            "module_not_found",
            f"there is no module {name!r}: push it first",
            details={"available": [name for (name,) in names]},
        )

    def remove_module(self, tenant: str, name: str) -> None:
        """Forget a module with all its versions; content nobody uses any more is deleted."""
        self.find_module(tenant, name)
        rows = self.connection.execute("SELECT sha256 FROM versions WHERE tenant = ? AND name = ?", (tenant, name))
        contents = {sha for (sha,) in rows}
        self.connection.execute("DELETE FROM modules WHERE tenant = ? AND name = ?", (tenant, name))
        self.connection.execute("DELETE FROM versions WHERE tenant = ? AND name = ?", (tenant, name))
        for sha in contents:
            self._forget_content(sha)

    # --- contents -------------------------------------------------------------------------------

    def _forget_content(self, sha256: str) -> None:
        """One thing less refers to this content: delete it, if nothing else does, module or adapter, of any tenant."""
        self.after_commit.append(partial(self._remove_unused, sha256))

    def _remove_unused(self, sha256: str) -> None:
        # Asked again after the commit: another operation of the same commit may have taken the content.
        used = "SELECT 1 FROM versions WHERE sha256 = ?1 UNION ALL SELECT 1 FROM adapters WHERE sha256 = ?1 LIMIT 1"
        if not self._row(used, sha256):
            self._blobs.remove(sha256)

    # --- runs -----------------------------------------------------------------------------------

    def add_run(self, run: RunRecord) -> None:
        self.connection.execute(
            "INSERT INTO runs (number, tenant, module, sha256, status, started) VALUES (?, ?, ?, ?, ?, ?)",
            (run.number, run.tenant, run.module, run.sha256, run.status, run.started),
        )

    def finish_run(self, run: RunRecord, log: Sequence[LogLine]) -> None:
        """How a run ended, and the log's end; both bounded (:mod:`realm.registry.bounds`)."""
        self.connection.execute(
            "UPDATE runs SET status = ?, started = ?, finished = ?, code = ?, usage = ?, error = ?, log = ? "
            "WHERE number = ?",
            (
                run.status,
                run.started,
                run.finished,
                run.code,
                msgspec.json.encode(run.usage).decode(),
                msgspec.json.encode(None if run.error is None else fit_error(run.error)).decode(),
                encode_log(log),
                run.number,
            ),
        )

    def prune_runs(self, keep: int) -> int:
        """Forget each tenant's oldest finished runs beyond ``keep``; counts them.

        By tenant, so that nobody's runs push another's out.
        """
        tenants = [name for (name,) in self.connection.execute("SELECT name FROM tenants")]
        return sum(
            self.connection.execute(
                "DELETE FROM runs WHERE tenant = ?1 AND status <> 'running' AND number <= "
                "(SELECT number FROM runs WHERE tenant = ?1 ORDER BY number DESC LIMIT 1 OFFSET ?2)",
                (tenant, keep),
            ).rowcount
            for tenant in tenants
        )

    def list_runs(self, tenant: str | None, limit: int, *, size: int = 1 << 20) -> list[RunRecord]:
        """The latest finished runs, newest first, of one tenant or (None) of all.

        No more than take about ``size`` bytes as JSON.
        """
        return self.page_runs(tenant, limit, size)[0]

    def page_runs(self, tenant: str | None, limit: int, size: int) -> tuple[list[RunRecord], bool]:
        """What :meth:`list_runs` gives, and whether ``size`` has left some out."""
        rows = self.connection.execute(
            "SELECT number, tenant, module, sha256, status, started, finished, code, usage, error FROM runs "
            "WHERE status <> 'running' AND (? IS NULL OR tenant = ?) ORDER BY number DESC LIMIT ?",
            (tenant, tenant, limit),
        )
        found: list[RunRecord] = []
        for *plain, usage, error in rows:
            size -= _RUN_BYTES + len((usage or "").encode()) + len((error or "").encode())
            if size < 0:
                # What is left out is not read either.
                rows.close()
                return found, True
            decoded = (msgspec.json.decode(text) if text else None for text in (usage, error))
            found.append(RunRecord(*plain, *decoded))
        return found, False

    def run_log(self, tenant: str | None, number: int) -> tuple[list[LogLine], dict[str, Any] | None]:
        """What a run logged, and the error that it ended with.

        Raises:
            RealmError: ``run_not_found``; for another tenant's, too.
        """
        row = self._row(
            "SELECT log, error FROM runs WHERE number = ? AND (? IS NULL OR tenant = ?)", number, tenant, tenant
        )
        if row is None:
            raise RealmError("run_not_found", f"there is no run r{number}")
        lines = msgspec.json.decode(row[0], type=list[LogLine]) if row[0] else []
        return lines, msgspec.json.decode(row[1]) if row[1] else None

    # --- the guests' store ----------------------------------------------------------------------

    def store_get(self, tenant: str, key: str) -> bytes | None:
        row = self._row("SELECT value FROM store WHERE tenant = ? AND key = ?", tenant, key)
        return bytes(row[0]) if row else None

    def store_set(self, tenant: str, key: str, value: bytes, *, limit: int) -> None:
        """Keep ``value``; an empty one deletes the key.

        Raises:
            RealmError: ``limit_exceeded`` (``store_bytes``) if all entries would take more than ``limit``
                bytes; then nothing has changed.
        """
        size = len(key.encode()) + ENTRY_BYTES
        old = self._row("SELECT length(value) FROM store WHERE tenant = ? AND key = ?", tenant, key)
        (used,) = self._row("SELECT store_bytes FROM tenants WHERE name = ?", tenant)
        change = (size + len(value) if value else 0) - (size + old[0] if old else 0)
        if change > 0 and used + change > limit:
            raise over_limit("store_bytes", limit, used, f"the tenant's store has no room for {change:,} bytes more")
        if value:
            self.connection.execute(
                "INSERT INTO store VALUES (?, ?, ?) ON CONFLICT (tenant, key) DO UPDATE SET value = excluded.value",
                (tenant, key, value),
            )
        else:
            self.connection.execute("DELETE FROM store WHERE tenant = ? AND key = ?", (tenant, key))
        self.connection.execute("UPDATE tenants SET store_bytes = store_bytes + ? WHERE name = ?", (change, tenant))


def _no_tenant(name: str) -> RealmError:
    return RealmError("tenant_not_found", f"there is no tenant {name!r}")


def _values(text: str, whose: str) -> dict[str, Any]:
    """Stored limits as they are; nothing if they cannot be read."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        log.warning("the stored limits of %s cannot be read and are ignored: %s", whose, error)
        return {}


def _usable(text: str, whose: str) -> dict[str, int]:
    """Of stored limits those that this Realm knows and takes."""
    usable: dict[str, int] = {}
    for name, value in _values(text, whose).items():
        try:
            effective({name: value})
        except RealmError as error:
            log.warning("a stored limit of %s is ignored: %s", whose, error)
        else:
            usable[name] = value
    return usable
