"""What an operator may choose, each with its unit and a default that suits one machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from realm.messages import RunLimits

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8765


def default_home() -> Path:
    """``REALM_HOME``, or ``~/.local/share/realm``."""
    chosen = os.environ.get("REALM_HOME")
    return Path(chosen) if chosen else Path.home() / ".local" / "share" / "realm"


def default_workers() -> int:
    """Half of the processors that this process may use: the engine's threads need the others."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Bounds on what connections may take from the gateway.

    Attributes:
        connections: open sockets, of all tenants together.
        calls: calls in progress on one connection.
        runs: runs in progress of one tenant.
        uploads: uploads in flight on one connection.
        module_bytes: largest module.
        chunk_bytes: most data in one upload frame.
        frame_bytes: largest message of a client.
        credit_bytes: output a guest may be ahead of its client.
        write_high_bytes: unsent bytes of a connection above which its guests get no more credit ...
        write_low_bytes: ... until no more than these are left.
        read_stop_bytes: unsent bytes of a connection above which its calls are not read any more.
        auth_seconds: from the socket's opening to a good key.
        ping_seconds: silence after which a ping is sent, and again this long until the close.
        log_bytes, log_lines: what is kept of a run's log (its end).
        runs_kept: finished runs remembered, of all tenants together.
        store_value_bytes, store_tenant_bytes: key-value store.
        compiles: modules compiled at a time.
    """

    connections: int = 4096
    calls: int = 1024
    runs: int = 4096
    uploads: int = 4
    module_bytes: int = 16 << 20
    chunk_bytes: int = 256 << 10
    frame_bytes: int = 1 << 20
    credit_bytes: int = 64 << 10
    write_high_bytes: int = 256 << 10
    write_low_bytes: int = 64 << 10
    read_stop_bytes: int = 1 << 20
    auth_seconds: float = 10.0
    ping_seconds: float = 20.0
    log_bytes: int = 64 << 10
    log_lines: int = 1000
    runs_kept: int = 10_000
    store_value_bytes: int = 64 << 10
    store_tenant_bytes: int = 16 << 20
    compiles: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How ``realm serve`` runs.

    Attributes:
        model: name of a model in the home's store; empty is right when there is exactly one.
        port: TCP port; 0 lets the system choose.
        workers: guest worker processes.
        dtype: ``bfloat16`` or ``float32``.
        kv_pages: KV pages of 16 tokens; 0 sizes the pool from free memory.
        token_budget: most tokens of one engine step.
        max_sequences: most sequences of one engine step.
        threads: the engine's torch threads; 0 leaves torch's default.
        ready_seconds: how long the engine may load before the start counts as failed.
        run: limits of every run.
    """

    model: str = ""
    home: Path = field(default_factory=default_home)
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    workers: int = field(default_factory=default_workers)
    dtype: str = "bfloat16"
    kv_pages: int = 0
    token_budget: int = 512
    max_sequences: int = 256
    threads: int = 0
    ready_seconds: float = 600.0
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    run: RunLimits = field(default_factory=RunLimits)
