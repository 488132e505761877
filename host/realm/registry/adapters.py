"""The registry's part for adapters: part of :class:`realm.registry.database.Database`, in its thread and transactions.

An adapter belongs to a tenant and has a name among that tenant's. Its content is a blob, which others may
have stored, too: nobody is told.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from realm.errors import RealmError
from realm.limits import TenantLimits, over_limit
from realm.registry.blobs import BlobStore
from realm.registry.records import AdapterContent, AdapterRecord

NAMES = 50
"""Most names of adapters in an error's details."""
_NAMED = 8
"""Most of them in its message."""
_COLUMNS = (
    "tenant, name, version, created, pinned, shared, sha256, size, model, rank, alpha, targets, parameters, config"
)


class Adapters:
    """The table of adapters."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        blobs: BlobStore,
        clock: Callable[[], float],
        forget: Callable[[str], None],
    ) -> None:
        """``forget`` is told of each content that an adapter has no more."""
        self._connection = connection
        self._blobs = blobs
        self._clock = clock
        self._forget = forget

    def _row(self, sql: str, *values: Any) -> Any:
        return self._connection.execute(sql, values).fetchone()

    def stored(self, tenant: str) -> tuple[int, int, int]:
        """A tenant's adapters, the bytes of their contents (each one counts once), and how many are pinned."""
        count, pinned = self._row("SELECT count(*), coalesce(sum(pinned), 0) FROM adapters WHERE tenant = ?", tenant)
        return count, self._bytes_beside(tenant, ""), pinned

    def _bytes_beside(self, tenant: str, name: str) -> int:
        """Bytes of a tenant's contents without those that only ``name`` has."""
        (size,) = self._row(
            "SELECT coalesce(sum(size), 0) FROM "
            "(SELECT DISTINCT sha256, size FROM adapters WHERE tenant = ? AND name <> ?)",
            tenant,
            name,
        )
        return int(size)

    def has_content(self, tenant: str, sha256: str) -> int | None:
        """Size in bytes of an adapter's content that this tenant itself has stored; None otherwise."""
        row = self._row("SELECT size FROM adapters WHERE sha256 = ? AND tenant = ? LIMIT 1", sha256, tenant)
        return int(row[0]) if row else None

    def check_stored(self, tenant: str, name: str, sha256: str, size: int, limits: TenantLimits) -> int | None:
        """Whether a tenant may give ``name`` this content; what :meth:`has_content` gives.

        What has the name now goes, so it does not count.

        Raises:
            RealmError: ``limit_exceeded`` (``stored_adapters`` or ``stored_adapter_bytes``).
        """
        (others,) = self._row("SELECT count(*) FROM adapters WHERE tenant = ? AND name <> ?", tenant, name)
        if others >= limits.stored_adapters:
            text = f"there is no place for {name!r}: remove an adapter"
            raise over_limit("stored_adapters", limits.stored_adapters, others, text)
        used = self._bytes_beside(tenant, name)
        has = "SELECT 1 FROM adapters WHERE tenant = ? AND sha256 = ? AND name <> ? LIMIT 1"
        more = 0 if self._row(has, tenant, sha256, name) else size
        if more and used + more > limits.stored_adapter_bytes:
            text = f"{size:,} bytes more are too many: remove an adapter"
            raise over_limit("stored_adapter_bytes", limits.stored_adapter_bytes, used, text)
        return self.has_content(tenant, sha256)

    def borrow_content(self, tenant: str, sha256: str) -> Path:
        """A private name for content this tenant has stored.

        Raises:
            RealmError: ``upload_not_found`` if it was removed meanwhile.
        """
        if self.has_content(tenant, sha256) is None:
            raise RealmError("upload_not_found", "this content was removed meanwhile: upload it again")
        return self._blobs.borrow(sha256)

    def commit(
        self, tenant: str, name: str, file: Path, content: AdapterContent, *, limits: TenantLimits
    ) -> AdapterRecord:
        """Let ``name`` stand for ``file`` (synced, its hash and all else checked); takes the file.

        What the name stood for before is gone; whether it was pinned and shared stays.

        Raises:
            RealmError: as :meth:`check_stored` does; the file is left then.
        """
        self.check_stored(tenant, name, content.sha256, content.size, limits)
        self._blobs.adopt(file, content.sha256)
        old = self._find(tenant, name)
        record = AdapterRecord(
            **msgspec.structs.asdict(content),
            tenant=tenant,
            name=name,
            version=old.version + 1 if old else 1,
            created=self._clock(),
            pinned=old.pinned if old else False,
            shared=old.shared if old else False,
        )
        self._connection.execute(
            f"INSERT OR REPLACE INTO adapters ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                tenant,
                name,
                record.version,
                record.created,
                record.pinned,
                record.shared,
                record.sha256,
                record.size,
                record.model,
                record.rank,
                record.alpha,
                msgspec.json.encode(record.targets).decode(),
                record.parameters,
                record.config,
            ),
        )
        if old is not None and old.sha256 != record.sha256:
            self._forget(old.sha256)
        return record

    def all(self) -> list[AdapterRecord]:
        """All adapters of all tenants."""
        return [
            _record(row) for row in self._connection.execute(f"SELECT {_COLUMNS} FROM adapters ORDER BY tenant, name")
        ]

    def find(self, tenant: str, name: str) -> AdapterRecord:
        """One of the tenant's own. Raises RealmError ``adapter_not_found`` with the tenant's own names."""
        record = self._find(tenant, name)
        if record is not None:
            return record
        names = self._connection.execute(
            "SELECT name FROM adapters WHERE tenant = ? ORDER BY name LIMIT ?", (tenant, NAMES)
        )
        raise not_found(name, [name for (name,) in names])

    def pin(self, tenant: str, name: str, pinned: bool, *, limits: TenantLimits) -> AdapterRecord:
        """Raises RealmError ``adapter_not_found``, or ``limit_exceeded`` (``pinned_adapters``)."""
        record = self.find(tenant, name)
        (others,) = self._row("SELECT count(*) FROM adapters WHERE tenant = ? AND pinned AND name <> ?", tenant, name)
        if pinned and others >= limits.pinned_adapters:
            raise over_limit("pinned_adapters", limits.pinned_adapters, others, "unpin an adapter first")
        self._connection.execute("UPDATE adapters SET pinned = ? WHERE tenant = ? AND name = ?", (pinned, tenant, name))
        return msgspec.structs.replace(record, pinned=pinned)

    def share(self, tenant: str, name: str, shared: bool) -> AdapterRecord:
        """Let all tenants use it, or no more. Raises RealmError ``adapter_not_found``."""
        record = self.find(tenant, name)
        self._connection.execute("UPDATE adapters SET shared = ? WHERE tenant = ? AND name = ?", (shared, tenant, name))
        return msgspec.structs.replace(record, shared=shared)

    def remove(self, tenant: str, name: str) -> None:
        """Forget an adapter; content nobody uses any more is deleted. Raises RealmError ``adapter_not_found``."""
        record = self.find(tenant, name)
        self._connection.execute("DELETE FROM adapters WHERE tenant = ? AND name = ?", (tenant, name))
        self._forget(record.sha256)

    def _find(self, tenant: str, name: str) -> AdapterRecord | None:
        row = self._row(f"SELECT {_COLUMNS} FROM adapters WHERE tenant = ? AND name = ?", tenant, name)
        return _record(row) if row else None


def not_found(name: str, available: list[str]) -> RealmError:
    """The error for a name that stands for no adapter; ``available`` are those that do."""
    there = ", ".join(available[:_NAMED]) + (", …" if len(available) > _NAMED else "")
    text = f"there is no adapter {name!r}; {f'available: {there}' if there else 'none is available'}"
    return RealmError("adapter_not_found", text, details={"available": available})


def _record(row: Any) -> AdapterRecord:
    tenant, name, version, created, pinned, shared, sha256, size, model, rank, alpha, targets, parameters, config = row
    return AdapterRecord(
        tenant=tenant,
        name=name,
        version=version,
        created=created,
        pinned=bool(pinned),
        shared=bool(shared),
        sha256=sha256,
        size=size,
        model=model,
        rank=rank,
        alpha=alpha,
        targets=msgspec.json.decode(targets, type=tuple[str, ...]),
        parameters=parameters,
        config=config,
    )
