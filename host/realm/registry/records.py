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
    """What a tenant keeps: versions of modules, the bytes of their contents, the bytes of the guests' store.

    The same of adapters: names, the bytes of their contents, and how many are pinned.
    """

    modules: int
    module_bytes: int
    store_bytes: int
    adapters: int = 0
    adapter_bytes: int = 0
    pinned: int = 0


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


class AdapterContent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What an adapter is.

    Attributes:
        sha256, size: of its safetensors file; in hex, in bytes.
        model: name of the model that it was checked against.
        config: its ``adapter_config.json``, as uploaded.
        rank: the largest one. targets: short names of the layers that it changes. parameters: how many.
    """

    sha256: str
    size: int
    model: str
    config: bytes
    rank: int
    alpha: float
    targets: tuple[str, ...]
    parameters: int


class AdapterRecord(AdapterContent, frozen=True, kw_only=True, gc=False):
    """What a tenant's name stands for now. ``shared``: also for tenants that have none of that name."""

    tenant: str
    name: str
    version: int
    created: float
    pinned: bool
    shared: bool


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
