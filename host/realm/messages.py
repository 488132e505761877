"""Every struct that crosses a process boundary inside the host, but for those of gateway and workers.

Three links carry them, each a Unix stream socket with length-prefixed MessagePack frames
(:mod:`realm.channel`):

* worker -> engine: one :class:`WorkerTurn` a turn; engine -> worker: one :class:`EngineReply`.
* gateway -> worker and back: :mod:`realm.run_messages`.
* gateway -> engine: :class:`StatsRequest`, :class:`WorkerLost`; back: :class:`EngineStats`.

Structs are arrays on the wire (``array_like``), so fields may be appended, never reordered.
Token ids travel as little-endian ``uint32`` bytes and logits as little-endian ``float32`` bytes,
because one buffer costs the same for 1 or 8,192 of them.
"""

from __future__ import annotations

import struct
from typing import Union

import msgspec


class Message(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Base of the tagged messages."""


class SamplingParams(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How the engine picks the next token of one sequence.

    The order of operations is: repetition penalty, logit bias, allowed-token mask, temperature,
    top-k, top-p, min-p, then one draw by inverse CDF in vocabulary order.

    Attributes:
        temperature: 0 is greedy (arg max, lowest id on a tie).
        top_k: keep the k most likely tokens; 0 is off.
        top_p: keep the smallest set of most likely tokens whose mass reaches this; 1 is off.
        min_p: drop tokens less likely than this fraction of the most likely one; 0 is off.
        repetition_penalty: CTRL's penalty over all tokens of the sequence; 1 is off.
        uniform: the draw, in [0, 1), where ``number`` is negative.
        key, number: otherwise the draw is :func:`realm.guests.draws.uniform` of them. The key comes from
            (run seed, sequence), so a run repeats itself whatever else is in the batch; numbers go up
            by one each draw, so the engine knows the next draw before it is asked for.
        mask: bit mask of allowed tokens, little-endian bit order, ceil(vocab / 8) bytes or more;
            None allows all.
        bias_tokens: ``uint32`` ids, bias_values: ``float32`` values added to those logits.
        logprob: also return the log-probability of the token under the model's own distribution
            (temperature 1, before penalty, bias and mask).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    uniform: float = 0.0
    mask: bytes | None = None
    bias_tokens: bytes | None = None
    bias_values: bytes | None = None
    logprob: bool = False
    key: int = 0
    number: int = -1


# --- worker -> engine ---------------------------------------------------------------------------


class OpenSequence(Message, tag="new"):
    """A new, empty sequence. ``seq`` is unique over all workers and never reused."""

    seq: int
    tenant: str
    run: int


class ForkSequence(Message, tag="fork"):
    """``child`` starts with all tokens of ``parent`` (pages shared, copied on write)."""

    parent: int
    child: int


class TruncateSequence(Message, tag="trunc"):
    """Drop the tokens after the first ``length``."""

    seq: int
    length: int


class FreeSequence(Message, tag="free"):
    """Forget a sequence; its pages become cached or free."""

    seq: int


class Forward(Message, tag="fwd"):
    """Append ``tokens`` (uint32 bytes, at least one) and compute. Answered by :class:`ForwardDone`.

    ``want_logits`` returns the last position's logits (float32, vocab entries). With ``sampling``
    the next token is drawn; it is *not* appended: the caller does so with its next call.
    """

    call: int
    seq: int
    tokens: bytes
    sampling: SamplingParams | None
    want_logits: bool


class SaveSequence(Message, tag="save"):
    """Keep a copy of the sequence under the tenant's ``name``. Answered by :class:`CallDone`."""

    call: int
    seq: int
    name: str


class OpenSaved(Message, tag="opensaved"):
    """Open a copy of a saved sequence as ``seq``. Answered by :class:`CallDone` (its length)."""

    call: int
    seq: int
    tenant: str
    run: int
    name: str


class ApplyAdapter(Message, tag="lora"):
    """From now on the sequence computes with an adapter, as if from its first token; "" is the base model's.

    ``name`` is looked up among the adapters of the sequence's tenant, then among the shared ones. Answered
    by :class:`CallDone` with the adapter's rank (0: none) once it can be used.
    """

    call: int
    seq: int
    name: str


class EndRun(Message, tag="end"):
    """A run is over: free all its sequences and drop its pending calls, unanswered."""

    run: int


EngineOp = Union[
    OpenSequence,
    ForkSequence,
    TruncateSequence,
    FreeSequence,
    Forward,
    SaveSequence,
    OpenSaved,
    ApplyAdapter,
    EndRun,
]


class WorkerHello(Message, tag="hello"):
    """First message on a worker's link. ``worker`` is the supervisor's number for it, never reused."""

    worker: int
    pid: int


CONTINUE = struct.Struct("<QqII")
"""A ``Forward`` that goes on as before, in 24 bytes: (call, sequence, lane, token).

It appends the one token that was drawn last, with the sampling of the sequence's last call, its draw's
number one higher, and wants no logits. A worker may send it when the sequence's last answer was a row of
:data:`DRAWN` with a lane, its last call had no mask and no bias, and nothing else was asked of the
sequence since.
"""


class WorkerTurn(Message, tag="turn"):
    """All that a worker's guests asked in one turn, in order.

    ``answered`` is the number of the last :class:`EngineReply` this turn has handled: the engine
    uses it to know that the guests it served have all had their chance to call again, and so
    that one merged step can follow rather than two halves.

    ``continues`` are rows of :data:`CONTINUE`, the calls of guests that go on as before; they are
    applied before ``ops``.
    """

    ops: list[EngineOp]
    answered: int = 0
    continues: bytes = b""


# --- engine -> worker ---------------------------------------------------------------------------


class ForwardDone(Message, tag="fwd_done"):
    """Answer to :class:`Forward`.

    Attributes:
        token: the sampled token, or -1 without ``sampling``.
        logprob: see :class:`SamplingParams`; NaN when not asked for.
        cached: how many of the call's tokens came from the prefix cache.
        logits: float32 bytes of the last position when asked for.
    """

    call: int
    token: int
    logprob: float
    cached: int
    logits: bytes | None = None


DRAWN = struct.Struct("<QifII")
"""A :class:`ForwardDone` without logits, in 24 bytes: (call, token, logprob, cached, lane).

``lane`` is what a :data:`CONTINUE` of the sequence has to name, or :data:`NO_LANE`.
"""

NO_LANE = 0xFFFFFFFF


class CallDone(Message, tag="done"):
    """Answer to save and open, where ``value`` is the sequence's length in tokens, and to :class:`ApplyAdapter`."""

    call: int
    value: int


class LimitMet(msgspec.Struct, array_like=True, gc=False):
    """Which of a tenant's limits refused something (:class:`realm.limits.TenantLimits`)."""

    name: str
    limit: int
    used: int
    retry_after: float | None = None


class CallFailed(Message, tag="failed"):
    """The call could not be done; ``code`` is an ABI error code (negative). ``limit`` says which was met."""

    call: int
    code: int
    message: str
    limit: LimitMet | None = None


EngineResult = Union[ForwardDone, CallDone, CallFailed]


class EngineReply(Message, tag="reply"):
    """All results that became ready for one worker. ``number`` counts replies to that worker.

    ``drawn`` are rows of :data:`DRAWN`: results like those of ``results``, in any order.
    """

    number: int
    results: list[EngineResult]
    drawn: bytes = b""


# --- gateway <-> engine -------------------------------------------------------------------------


class GatewayHello(Message, tag="gateway"):
    """First message on the gateway's link to the engine."""

    pid: int


class StatsRequest(Message, tag="stats?"):
    call: int


class WorkerLost(Message, tag="lost"):
    """A worker process died: free everything it owned."""

    worker: int


class TenantQuota(Message, tag="quota"):
    """What a tenant may take from the engine from now on; ``tenant`` "" is everybody not named.

    See :class:`realm.limits.TenantLimits` for the fields.
    """

    tenant: str
    kv_pages: int
    tokens_per_minute: int
    saved_sequences: int


class AdapterFile(Message, tag="adapter"):
    """A tenant's ``name`` stands for this adapter from now on; sequences that have another of that name keep
    it as long as it is in memory: its file may be gone.

    Attributes:
        tenant: whose it is; "" is everybody's who has none of that name.
        path: of its safetensors file, as PEFT writes it, checked by the sender. sha256: of the file, in hex.
        config: what its ``adapter_config.json`` holds.
        pinned: keep it where steps can use it at once, as far as there is room.
    """

    tenant: str
    name: str
    path: str
    sha256: str
    config: bytes
    pinned: bool = False


class AdapterGone(Message, tag="adapter-"):
    """A tenant's ``name`` stands for no adapter any more; sequences that have it keep it as long as it is in memory."""

    tenant: str
    name: str


class AdaptersRequest(Message, tag="adapters?"):
    """What is loaded of a tenant's adapters ("": of the shared ones). Answered by :class:`AdapterStates`."""

    call: int
    tenant: str


class AdapterState(msgspec.Struct, array_like=True, gc=False):
    """One adapter in the engine.

    Attributes:
        state: registered (on disk only), loading, cached (in memory), resident (steps can use it), failed.
        sequences: that have it. loads: how often it was read from disk. error: why it could not be.
    """

    name: str
    state: str
    sequences: int = 0
    loads: int = 0
    error: str | None = None


class AdapterStates(Message, tag="adapters"):
    """Adapters that a name stands for. A state is left out for those never used: it is "registered"."""

    call: int
    states: list[AdapterState]


class TenantStats(msgspec.Struct, array_like=True, gc=False):
    """What one tenant has used since the engine started, and what it holds now.

    Attributes:
        pages, sequences: held now. saved: sequences kept by name.
        minute_tokens: what counts against ``tokens_per_minute`` now.
        ahead_tokens: tokens that were computed before the guest had asked, and used. wasted_tokens: the
            same, but not used; they count like used ones in the tenant's share.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    pages: int = 0
    sequences: int = 0
    minute_tokens: int = 0
    saved: int = 0
    ahead_tokens: int = 0
    wasted_tokens: int = 0


class EngineStats(Message, tag="stats"):
    """Counters since the engine started.

    Attributes:
        steps: model passes. sequences: sum over steps of sequences in the step.
        max_sequences: the largest step. shared_steps: steps with calls of two tenants or more.
        busy_seconds: wall time inside model passes.
        pages_*: KV pages; ``free + used + cached == total`` always.
        adapters: how many steps can use now. adapter_loads: how often one was read from disk.
    """

    call: int
    model: str
    steps: int
    sequences: int
    max_sequences: int
    shared_steps: int
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    busy_seconds: float
    pages_total: int
    pages_free: int
    pages_used: int
    pages_cached: int
    tenants: dict[str, TenantStats]
    adapters: int = 0
    adapter_loads: int = 0


class EngineReady(Message, tag="ready"):
    """The engine has loaded its model and takes calls."""

    model: str
    pages: int
    page_size: int
    context_length: int
    load_seconds: float


# --- what each process decodes ------------------------------------------------------------------

ToEngine = Union[
    WorkerHello,
    WorkerTurn,
    GatewayHello,
    StatsRequest,
    WorkerLost,
    TenantQuota,
    AdapterFile,
    AdapterGone,
    AdaptersRequest,
]
EngineToWorker = EngineReply
EngineToGateway = Union[EngineReady, EngineStats, AdapterStates]
