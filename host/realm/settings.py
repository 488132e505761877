"""What an operator may choose, each with its unit and a default that suits one machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from realm.engine.options import EngineOptions

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8765


def default_home() -> Path:
    """``REALM_HOME``, or ``~/.local/share/realm``."""
    chosen = os.environ.get("REALM_HOME")
    return Path(chosen) if chosen else Path.home() / ".local" / "share" / "realm"


MAX_DEFAULT_WORKERS = 16
"""Each worker costs the engine a message a step, so more are not always faster."""
_GPUS = Path("/dev")


def gpu_present() -> bool:
    """Whether this machine has an NVIDIA GPU that is not hidden from its processes; torch is not asked."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = visible is not None and not visible.strip().removeprefix("-1")
    return not hidden and any(_GPUS.glob("nvidia[0-9]*"))


def default_workers(device: str = "auto") -> int:
    """How many guest workers serve, by the processors that this process may use.

    Where the engine computes on a GPU (``device`` as in :class:`~realm.engine.options.EngineOptions`), all
    but three, which are for engine, gateway and system. On the CPU half of them: its threads need the others.
    """
    processors = len(os.sched_getaffinity(0))
    if device == "cuda" or (device == "auto" and gpu_present()):
        return max(1, min(processors - 3, MAX_DEFAULT_WORKERS))
    return max(1, processors // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    """Bounds on what connections may take from the gateway; what one tenant may take is :mod:`realm.limits`'s.

    Attributes:
        connections: open connections with a good key, of all tenants together.
        newcomers: connections without a good key yet, of all addresses together. Above it the oldest of the
            address with the most goes, if it is older than ``newcomer_grace`` seconds; else the new one does.
        newcomers_per_address: the same for one IPv4 address or IPv6 /64.
        newcomer_grace: see above; in seconds.
        handshake_bytes: what a client may send before its key has been accepted.
        auth_failures: failed keys of one address within ``auth_window`` seconds after which ...
        auth_backoff_first: ... its attempts are refused for as many seconds; doubled by each further failure ...
        auth_backoff_most: ... up to as many seconds.
        auth_window: see above; in seconds.
        auth_forget: seconds without a failure (and without back-off) after which an address begins anew.
        calls: calls in progress on one connection.
        runs_per_worker: runs in progress in one guest worker; more wait. Some 13,000 suspended guests
            use up a process's memory mappings (``vm.max_map_count``).
        worker_wait_seconds: how long a run waits while no guest worker is up.
        waiting_bytes: input of one tenant's waiting runs.
        link_bytes: unsent bytes of the link to a guest worker above which it gets nothing more from clients.
        upload_idle_seconds: how long an upload may be without data or commit.
        chunk_bytes: most data in one upload frame.
        frame_bytes: largest message of a client.
        message_fragments: most frames of one message.
        message_seconds: from a message's first byte to its last, while the host reads.
        credit_bytes: output a guest may be ahead of its client.
        write_high_bytes: unsent bytes of a connection above which its guests get no more credit ...
        write_low_bytes: ... until no more than these are left.
        read_stop_bytes: unsent bytes of a connection above which its calls are not read any more.
        unsent_bytes: unsent bytes of a connection above which it is closed.
        tenant_buffer_bytes: memory of all connections of one tenant for what has come in part and for what is
            unsent; above it the largest of them is closed (looked at each second).
        buffer_bytes: the same for all tenants together: then the tenant with the most loses a connection.
        collected_bytes: text of one tenant's calls that are not streamed, held until they end.
        refusals: calls of one tenant refused for their rate within a second before its connections are
            paused for ``refusal_pause`` seconds at each further one.
        refusal_pause: see above; in seconds.
        auth_seconds: from the socket's opening to a good key.
        ping_seconds: silence after which a ping is sent, and again this long until the close.
        log_bytes, log_lines: what is kept of a run's log (its end).
        runs_kept: finished runs remembered of each tenant.
        store_value_bytes: largest value of the guests' key-value store.
        compiles: modules compiled at a time.
        checks: uploaded adapters hashed and checked at a time.
    """

    connections: int = 4096
    newcomers: int = 2048
    newcomers_per_address: int = 1024
    newcomer_grace: float = 1.0
    handshake_bytes: int = 16 << 10
    auth_failures: int = 5
    auth_backoff_first: float = 5.0
    auth_backoff_most: float = 300.0
    auth_window: float = 60.0
    auth_forget: float = 600.0
    calls: int = 1024
    runs_per_worker: int = 4096
    worker_wait_seconds: float = 10.0
    waiting_bytes: int = 64 << 20
    link_bytes: int = 64 << 20
    upload_idle_seconds: float = 60.0
    chunk_bytes: int = 256 << 10
    frame_bytes: int = 1 << 20
    message_fragments: int = 1024
    message_seconds: float = 30.0
    credit_bytes: int = 64 << 10
    write_high_bytes: int = 256 << 10
    write_low_bytes: int = 64 << 10
    read_stop_bytes: int = 1 << 20
    unsent_bytes: int = 32 << 20
    tenant_buffer_bytes: int = 128 << 20
    buffer_bytes: int = 512 << 20
    collected_bytes: int = 64 << 20
    refusals: int = 64
    refusal_pause: float = 0.5
    auth_seconds: float = 10.0
    ping_seconds: float = 20.0
    log_bytes: int = 64 << 10
    log_lines: int = 1000
    runs_kept: int = 1000
    store_value_bytes: int = 64 << 10
    compiles: int = 2
    checks: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """How ``realm serve`` runs.

    Attributes:
        model: name of a model in the home's store; empty is right when there is exactly one.
        port: TCP port; 0 lets the system choose.
        tls_cert, tls_key: PEM files of the certificate (with its chain) and its key; both or none.
        allow_plaintext: serve addresses other machines can reach without TLS.
        workers: guest worker processes.
        engine: how the engine is built.
        ready_seconds: how long the engine may load before the start counts as failed.
        defaults: limits of all tenants (:mod:`realm.limits`), below what the operator has stored as the default.
    """

    model: str = ""
    home: Path = field(default_factory=default_home)
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    tls_cert: Path | None = None
    tls_key: Path | None = None
    allow_plaintext: bool = False
    workers: int = field(default_factory=default_workers)
    engine: EngineOptions = field(default_factory=EngineOptions)
    ready_seconds: float = 600.0
    limits: GatewayLimits = field(default_factory=GatewayLimits)
    defaults: Mapping[str, int] = field(default_factory=dict)
