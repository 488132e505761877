"""What calls give back. Fields that a newer server adds are ignored."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeAlias

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """What a run took.

    Attributes:
        cached_tokens: of the prompt tokens, how many the prefix cache held.
        fuel: WebAssembly instructions, about.
        memory_bytes: the guest's peak memory.
        wall_seconds: from start to end. first_call_seconds: from start to the guest's first host call.
        throttled_seconds: how long the guest was held back because of the tenant's ``fuel_per_second``.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    fuel: int = 0
    memory_bytes: int = 0
    host_calls: int = 0
    output_bytes: int = 0
    wall_seconds: float = 0.0
    first_call_seconds: float = 0.0
    throttled_seconds: float = 0.0


# --- a run's events ------------------------------------------------------------------------------


class Waiting(msgspec.Struct, frozen=True):
    """The run was taken and waits for a place; ``run`` is its id."""

    run: str
    kind: ClassVar[Literal["waiting"]] = "waiting"


class Started(msgspec.Struct, frozen=True):
    """The guest runs; ``run`` is its id."""

    run: str
    kind: ClassVar[Literal["started"]] = "started"


class Output(msgspec.Struct, frozen=True):
    """Text the guest emitted."""

    text: str
    kind: ClassVar[Literal["output"]] = "output"


class Log(msgspec.Struct, frozen=True):
    """A line of the guest's log; ``level`` is debug, info, warning or error."""

    level: str
    text: str
    kind: ClassVar[Literal["log"]] = "log"


class Finished(msgspec.Struct, frozen=True):
    """The last event of a run that did not fail.

    Attributes:
        run: the run's id.
        code: what the guest returned (0 when cancelled).
        text: all output of a run that was not streamed, else "".
        outcome: ``complete`` or ``cancelled``.
    """

    run: str = ""
    code: int = 0
    text: str = ""
    usage: Usage = Usage()
    outcome: Literal["complete", "cancelled"] = "complete"
    kind: ClassVar[Literal["finished"]] = "finished"


Event: TypeAlias = Waiting | Started | Output | Log | Finished


# --- generation ----------------------------------------------------------------------------------


class Piece(msgspec.Struct, frozen=True):
    """A piece of generated text. ``index`` counts from 0; the last piece has ``is_final``."""

    text: str
    index: int = 0
    is_final: bool = False


class Generation(msgspec.Struct, frozen=True):
    """A finished generation.

    Attributes:
        text: all of it (of a streamed one, too).
        finish_reason: ``stop`` (end of sequence or a stop text) or ``length``.
    """

    text: str = ""
    tokens_generated: int = 0
    prompt_tokens: int = 0
    finish_reason: str = ""
    run: str = ""
    usage: Usage = Usage()


# --- everything else -----------------------------------------------------------------------------


class RunInfo(msgspec.Struct, frozen=True):
    """One line of ``ps``.

    Attributes:
        status: waiting, running, cancelling, complete, error or cancelled.
        started: seconds since 1970. seconds: how long it has waited or run, or its length once it has ended.
        error: ``code`` and ``message`` of a run that failed.
    """

    run: str
    module: str
    status: str
    started: float = 0.0
    seconds: float = 0.0
    usage: Usage = Usage()
    tenant: str = ""
    error: dict[str, Any] | None = None


class Processes(msgspec.Struct, frozen=True):
    """What runs, and the engine's counters; ``more`` says that older runs were left out for want of room."""

    runs: list[RunInfo] = []
    engine: dict[str, Any] = {}
    more: bool = False


class LogLine(msgspec.Struct, frozen=True):
    """A line of a run's log."""

    level: str
    text: str


class RunLog(msgspec.Struct, frozen=True):
    """What a run logged, and the ``error`` (``code``, ``message``, ``details``) that it ended with."""

    run: str = ""
    lines: list[LogLine] = []
    error: dict[str, Any] | None = None


class Module(msgspec.Struct, frozen=True):
    """A stored module.

    Attributes:
        size: in bytes. version: counts what was stored under this name.
        created: seconds since 1970; 0 from ``push``. imports: from ``push`` only.
    """

    name: str
    sha256: str
    size: int
    version: int = 0
    created: float = 0.0
    imports: list[str] = []


class Adapter(msgspec.Struct, frozen=True):
    """A LoRA adapter that this tenant may use.

    Attributes:
        model: the model it was made for.
        sha256, size: of its weights' file; size in bytes. version: counts what was stored under this name.
        created: seconds since 1970.
        rank: the largest of its modules'. alpha: scales it, as ``lora_alpha`` in PEFT.
        targets: what it adapts, such as ``q_proj``. parameters: numbers in it.
        pinned: the engine keeps it ready, as far as there is room.
        shared: an operator shares it with all tenants. own: it belongs to this tenant.
        state: ``registered`` (on disk), ``loading``, ``cached`` (in the engine's memory), ``resident`` (ready for the
            next step) or ``failed`` (then ``error`` says why); None while the engine restarts, and of an adapter for
            a model that is not served.
        sequences: how many have it now. loads: how often it was read from disk. Both None where ``state`` is, and
            of other tenants' adapters.
    """

    name: str
    model: str = ""
    sha256: str = ""
    size: int = 0
    version: int = 0
    created: float = 0.0
    rank: int = 0
    alpha: float = 0.0
    targets: list[str] = []
    parameters: int = 0
    pinned: bool = False
    shared: bool = False
    own: bool = True
    state: str | None = None
    sequences: int | None = None
    loads: int | None = None
    error: str | None = None


class Model(msgspec.Struct, frozen=True):
    """A model on the server; ``served`` says that the engine has it loaded."""

    name: str
    served: bool = False
    context_length: int = 0
    parameters: int = 0


class Health(msgspec.Struct, frozen=True):
    """How the server is."""

    status: str
    model: str | None = None
    uptime_seconds: float = 0.0
    workers: int = 0
    engine: dict[str, Any] = {}


class Parameter(msgspec.Struct, frozen=True):
    """A parameter of a function of the protocol."""

    name: str
    type: str = ""
    required: bool = False
    doc: str = ""


class Function(msgspec.Struct, frozen=True):
    """A function of the protocol."""

    name: str
    doc: str = ""
    params: list[Parameter] = []


class Metadata(msgspec.Struct, frozen=True):
    """Every function of the server."""

    version: str
    functions: list[Function] = []


class Tenant(msgspec.Struct, frozen=True):
    """A tenant; ``keys`` is how many good keys it has."""

    name: str
    created: float = 0.0
    keys: int = 0


class Limit(msgspec.Struct, frozen=True, rename={"source": "from"}):
    """One limit of a tenant.

    Attributes:
        source: ``built-in``, ``default`` (set for all tenants) or ``tenant`` (set for this one).
        used: None where the server does not know.
        doc: what it means.
    """

    name: str
    value: int
    unit: str = ""
    source: str = "built-in"
    used: int | None = None
    doc: str = ""


class TenantLimits(msgspec.Struct, frozen=True):
    """All limits of a tenant; ``name`` None is what counts for tenants without values of their own."""

    limits: list[Limit]
    name: str | None = None
    created: float = 0.0
    keys: int = 0

    def __getitem__(self, name: str) -> Limit:
        """A limit by its name; KeyError if the server has none of that name."""
        for limit in self.limits:
            if limit.name == name:
                return limit
        raise KeyError(name)


class NewKey(msgspec.Struct, frozen=True):
    """A new key. The server keeps only its hash: this is the one time that ``key`` is shown."""

    key: str
    id: str
    tenant: str


class Key(msgspec.Struct, frozen=True):
    """What the server knows of a key. ``revoked`` is when, or None. Times are seconds since 1970."""

    id: str
    tenant: str
    created: float = 0.0
    revoked: float | None = None
