"""Plain records that the registry gives out. Times are seconds since 1970."""

from __future__ import annotations

from typing import Any

import msgspec


class Principal(msgspec.Struct, frozen=True, gc=False):
    """Who a key stands for."""

    tenant: str
    key_id: str
    admin: bool


class TenantRecord(msgspec.Struct, frozen=True, gc=False):
    """``keys`` counts the keys that are not revoked."""

    name: str
    created: float
    keys: int


class Stored(msgspec.Struct, frozen=True, gc=False):
    """What a tenant keeps: versions of modules, the bytes of their contents, the bytes of the guests' store."""

    modules: int
    module_bytes: int
    store_bytes: int


class KeyRecord(msgspec.Struct, frozen=True, gc=False):
    """A key without its secret; ``revoked`` is when, or None."""

    id: str
    tenant: str
    created: float
    revoked: float | None


class NewKey(msgspec.Struct, frozen=True, gc=False):
    """A key with its secret: the only time it exists in clear."""

    key: str
    id: str
    tenant: str


class ModuleRecord(msgspec.Struct, frozen=True, gc=False):
    """The version of a module that its name stands for now."""

    name: str
    sha256: str
    size: int
    version: int
    created: float


class RunRecord(msgspec.Struct, gc=False):
    """A run's entry. ``status`` is running, complete, error or cancelled."""

    number: int
    tenant: str
    module: str
    sha256: str
    status: str
    started: float
    finished: float | None = None
    code: int | None = None
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


class LogLine(msgspec.Struct, gc=False):
    """``level`` is debug, info, warning or error."""

    level: str
    text: str
