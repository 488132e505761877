"""The tables of the registry, and how a file of an earlier Realm becomes one of this.

Each step of :data:`_STEPS` brings a file from one version to the next, in one transaction: a crash or a
failure leaves it as it was.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from realm.errors import RealmError

SCHEMA_VERSION = 3
PART_BYTES = 4
"""So much of a key's hash is indexed: enough to find it, too little to tell it."""
ENTRY_BYTES = 64
"""What an entry of the guests' store counts for beside its key and value: about what a row takes on disk."""

_KEYS = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY,
    part BLOB NOT NULL,
    hash BLOB NOT NULL,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    created REAL NOT NULL,
    revoked REAL
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_by_part ON keys (part);
"""
_SETTINGS = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
INSERT INTO settings (name, value) VALUES ('limits', '{}');
"""
# The configuration is last: lists that leave it out do not read it.
_ADAPTERS = """
CREATE TABLE adapters (
    tenant TEXT NOT NULL REFERENCES tenants (name),
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    created REAL NOT NULL,
    pinned INTEGER NOT NULL,
    shared INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    size INTEGER NOT NULL,
    model TEXT NOT NULL,
    rank INTEGER NOT NULL,
    alpha REAL NOT NULL,
    targets TEXT NOT NULL,
    parameters INTEGER NOT NULL,
    config BLOB NOT NULL,
    PRIMARY KEY (tenant, name)
) STRICT;
CREATE INDEX adapters_by_content ON adapters (sha256, tenant);
"""
_SCHEMA = f"""
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    created REAL NOT NULL,
    admin INTEGER NOT NULL,
    store_bytes INTEGER NOT NULL DEFAULT 0,
    limits TEXT NOT NULL DEFAULT '{{}}'
) STRICT, WITHOUT ROWID;
{_KEYS}
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
{_SETTINGS}
{_ADAPTERS}
"""

# length() of a text counts characters, and stops at a NUL.
_TO_2 = f"""
ALTER TABLE tenants ADD COLUMN limits TEXT NOT NULL DEFAULT '{{}}';
{_SETTINGS}
ALTER TABLE keys RENAME TO keys_of_1;
{_KEYS}
INSERT INTO keys (id, part, hash, tenant, created, revoked)
    SELECT id, substr(hash, 1, {PART_BYTES}), hash, tenant, created, revoked FROM keys_of_1;
DROP TABLE keys_of_1;
UPDATE tenants SET store_bytes = coalesce(
    (SELECT sum(length(CAST(key AS BLOB)) + length(value) + {ENTRY_BYTES}) FROM store WHERE tenant = name), 0
);
"""

_STEPS = {0: (_SCHEMA, SCHEMA_VERSION), 1: (_TO_2, 2), 2: (_ADAPTERS, 3)}
"""By the version that is found: what to do, and the version after it."""


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables of a new file, or bring those of an earlier Realm up to date.

    Raises:
        RealmError: ``registry_version`` if a newer Realm wrote the file.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise RealmError(
            "registry_version",
            f"{path} has schema {version}, this Realm knows {SCHEMA_VERSION}: use the newer Realm",
        )
    while version < SCHEMA_VERSION:
        script, following = _STEPS[version]
        try:
            connection.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {following}; COMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        version = following
