"""Every struct that crosses between the gateway and its guest workers.

Gateway -> worker: :class:`StartRun` and friends; worker -> gateway: one :class:`WorkerEvents` a turn. The other
links, and what they all have in common, are in :mod:`realm.messages`.
"""

from __future__ import annotations

from typing import Any, Union

import msgspec

from realm.messages import LimitMet, Message, WorkerHello

# --- gateway -> worker --------------------------------------------------------------------------


class RunLimits(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What one run may take. Units are in the names; 0 never means "unlimited".

    ``tokens`` counts prompt and new tokens together.
    """

    fuel: int = 20_000_000_000
    wall_seconds: float = 600.0
    memory_bytes: int = 64 << 20
    table_elements: int = 65_536
    tokens: int = 1_000_000
    output_bytes: int = 16 << 20
    log_bytes: int = 256 << 10
    sequences: int = 256
    first_call_seconds: float = 30.0


class StartRun(Message, tag="start"):
    """Start a guest.

    Attributes:
        run: number of the run, unique over the host's life.
        artifact: path of the compiled module inside the host's private cache.
        input: what ``input_read`` gives.
        seed: seeds ``random`` and every draw of the run (u64).
        credit: bytes the guest may emit before the gateway grants more (:class:`Credit`).
        artifact_sha256: hash of the compiled module in hex; another content is refused.
    """

    run: int
    tenant: str
    module: str
    artifact: str
    input: bytes
    seed: int
    limits: RunLimits
    credit: int = 65_536
    artifact_sha256: str = ""


class TenantShare(Message, tag="share"):
    """Fuel per second that this worker may give to all runs of a tenant together."""

    tenant: str
    fuel_per_second: float


class CancelRun(Message, tag="cancel"):
    run: int
    reason: str


class ClientMessage(Message, tag="msg"):
    """Data for the guest's ``recv``."""

    run: int
    data: bytes


class Credit(Message, tag="credit"):
    """The client has taken ``size`` bytes of output: the guest may emit as many more."""

    run: int
    size: int


class StoreReply(Message, tag="store"):
    """Answer to :class:`StoreGet` (``value``) and :class:`StoreSet`; ``code`` is 0 or an ABI error.

    ``limit`` says which of the tenant's limits refused a value.
    """

    call: int
    code: int
    value: bytes | None = None
    message: str = ""
    limit: LimitMet | None = None


class Shutdown(Message, tag="shutdown"):
    """End all runs and exit."""


class Ping(Message, tag="ping"):
    """Are you there? The next :class:`WorkerEvents`, which may be empty, is the answer."""


GatewayToWorker = Union[StartRun, TenantShare, CancelRun, ClientMessage, Credit, StoreReply, Shutdown, Ping]

# --- worker -> gateway --------------------------------------------------------------------------


class Usage(msgspec.Struct, array_like=True, gc=False):
    """What a run took.

    Attributes:
        prompt_tokens: tokens given to ``forward`` that no ``forward`` had sampled just before.
        new_tokens: tokens sampled by the engine or by ``sample``.
        cached_tokens: of the prompt, how many the prefix cache held.
        first_call_seconds: from ``StartRun`` to the guest's first host call.
        throttled_seconds: how long the guest was held back because of ``fuel_per_second``.
    """

    fuel: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    memory_bytes: int = 0
    host_calls: int = 0
    output_bytes: int = 0
    wall_seconds: float = 0.0
    first_call_seconds: float = 0.0
    throttled_seconds: float = 0.0


class ErrorInfo(msgspec.Struct, array_like=True, gc=False):
    """A :class:`realm.errors.RealmError` on its way to a client."""

    code: str
    message: str
    details: dict[str, Any] = {}
    retry_after: float | None = None


class Output(Message, tag="out"):
    """Bytes the guest emitted, in order. ``tokens`` is new_tokens of the run so far."""

    run: int
    data: bytes
    tokens: int


class Log(Message, tag="log"):
    """``level`` is one of debug, info, warning, error."""

    run: int
    level: str
    text: str


class StoreGet(Message, tag="get"):
    call: int
    run: int
    key: str


class StoreSet(Message, tag="set"):
    call: int
    run: int
    key: str
    value: bytes


class RunFinished(Message, tag="fin"):
    """The last event of a run. ``outcome`` is complete, error or cancelled.

    ``code`` is what the guest's ``run`` returned (0 when it did not return).
    """

    run: int
    outcome: str
    code: int
    error: ErrorInfo | None
    usage: Usage


WorkerEvent = Union[Output, Log, StoreGet, StoreSet, RunFinished]


class WorkerEvents(Message, tag="events"):
    events: list[WorkerEvent]


WorkerToGateway = Union[WorkerHello, WorkerEvents]
