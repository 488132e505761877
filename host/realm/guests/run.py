"""One run of a guest: everything the worker knows about it besides its fiber's stack."""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.guests.decoding import Refused
from realm.guests.deferral import Job, Steps
from realm.guests.draws import random_bits, random_block
from realm.guests.facts import TextStream
from realm.guests.fibers import Fiber
from realm.guests.helper import Ticket
from realm.guests.memory import Memory
from realm.guests.sequences import GuestSequence
from realm.messages import EngineOp, EngineResult, ForwardDone, LimitMet, OpenSequence
from realm.run_messages import Log, StartRun, StoreReply, Usage, WorkerEvent

if TYPE_CHECKING:
    from realm.guests.runtime import GuestRuntime
    from realm.guests.sampling_arguments import Decoded
    from realm.guests.tenants import Tenant

log = logging.getLogger("realm.guests")

HOST_CALL_FUEL = 5_000
"""What each host call costs besides the guest's own instructions: 1.3 us, about what it takes."""
LOG_LINE_BYTES = 64
"""What each line takes of a run's log besides its text, so that empty lines have an end too."""
MAX_WARNINGS = 64
"""Lines that the host writes to a run's log about its mistakes."""
ERROR_CHARACTERS = 500
"""Most of a text in a report: it is kept, listed and sent more than once, in up to six bytes a character."""
MAX_INBOX = 4 << 20
"""Bytes of client messages that may wait for ``recv``."""
MAX_TENANT_INBOXES = 64 << 20
"""The same for all runs of a tenant together."""
MESSAGE_BYTES = 64
"""What a waiting message takes besides its content, so that empty ones have an end too."""

_CODES = {"model_unsupported": ErrorCode.NOT_SUPPORTED, "invalid_params": ErrorCode.INVALID_ARGUMENT}


class Completion:
    """Takes an engine's answer to one call."""

    __slots__ = ()

    def done(self, result: EngineResult) -> int | None:
        """The host function's result, or None while more answers are missing."""
        raise NotImplementedError

    def drawn(self, token: int, logprob: float, cached: int, lane: int) -> int | None:
        """The same for a row of :data:`~realm.messages.DRAWN`."""
        return self.done(ForwardDone(0, token, logprob, cached))


StoreCompletion = Callable[[StoreReply], int]


def clipped(text: str, most: int = ERROR_CHARACTERS) -> str:
    """A text as reports have it."""
    return text if len(text) <= most else text[: most - 3] + "..."


class DetokenizeStream:
    """One numbered stream of ``detokenize``; ``unread`` is text that did not fit, and for which call."""

    __slots__ = ("flags", "stream", "unread", "unread_tokens")

    def __init__(self, stream: TextStream, flags: int) -> None:
        self.stream = stream
        self.flags = flags
        self.unread = b""
        self.unread_tokens: bytes | None = None


class GuestRun:
    """State of one run.

    Attributes:
        sequences: by handle. Handles count up from 1 and are never used twice.
        calls, store_calls: numbers of the calls to engine and store that the guest waits for.
        on_wake: what to do when data, credit or a time-out ends the wait (recv and emit).
        job: work that a host function left to be done off the guest's stack; ``ticket`` while the
            helper has it.
        debt: fuel owed for host calls, not yet taken from the fiber.
        counted: the fiber's fuel up to which the tenant's rate has been charged.
        limit: the limit that refused something last.
        unread: bytes that its ``streams`` keep until the guest has room for them.
        place: which of the tenant's queues it waits in, or -1; ``slices`` are left to it before it
            has to queue with those that only compute.
        held_since: since when it waits for its tenant's fuel rate, or None.
        held_output: emitted, but not sent yet; ``held_tokens`` goes with it. output_due: when it is to be
            sent, or from when on more may be sent at once. All three are :mod:`outputs`' own.
    """

    __slots__ = (
        "_log_left",
        "_memory_short",
        "_ordinals",
        "_randoms",
        "_warnings",
        "calls",
        "closed_input",
        "closing",
        "counted",
        "credit",
        "deadline",
        "debt",
        "fiber",
        "held_output",
        "held_since",
        "held_tokens",
        "inbox",
        "inbox_bytes",
        "job",
        "last_call",
        "last_error",
        "limit",
        "memory",
        "on_wake",
        "outbox",
        "output_due",
        "output_left",
        "place",
        "runtime",
        "sampling_cache",
        "sequences",
        "slices",
        "start",
        "started",
        "store_calls",
        "streams",
        "tenant",
        "ticket",
        "timer",
        "tokens_left",
        "unread",
        "usage",
        "wasi_lines",
    )

    def __init__(self, start: StartRun, runtime: GuestRuntime, tenant: Tenant, now: float) -> None:
        self.start = start
        self.runtime = runtime
        self.tenant = tenant
        self.started = now
        self.fiber: Fiber | None = None
        self.memory = Memory()
        self.sequences: dict[int, GuestSequence] = {}
        self.calls: list[int] = []
        self.store_calls: set[int] = set()
        self.on_wake: Callable[[bool], int | None] | None = None
        self.job: Job | Steps | None = None
        self.ticket: Ticket | None = None
        self.inbox: deque[bytes] = deque()
        self.inbox_bytes = 0
        self.outbox = memoryview(b"")
        self.credit = start.credit
        self.closed_input = False
        self.closing: str | None = None
        self.place = -1
        self.slices = 0
        self.held_since: float | None = None
        self.held_output = bytearray()
        self.held_tokens = 0
        self.output_due = 0.0
        self.deadline = now + start.limits.wall_seconds
        self.timer = 0
        self.debt = 0
        self.counted = start.limits.fuel
        self.last_call = ""
        self.last_error = ""
        self.limit: LimitMet | None = None
        self.tokens_left = start.limits.tokens
        self.output_left = start.limits.output_bytes
        self.streams: dict[int, DetokenizeStream] = {}
        self.unread = 0
        self.sampling_cache: Decoded | None = None
        self.usage = Usage()
        self.wasi_lines: dict[int, bytes] = {}
        self._log_left = start.limits.log_bytes
        self._warnings = 0
        self._memory_short = False
        self._ordinals = 0
        self._randoms = 0

    def attach(self, fiber: Fiber) -> None:
        """The fiber that runs this guest, made once."""
        self.fiber = fiber
        self.memory = fiber.memory

    @property
    def memory_held(self) -> int:
        """Bytes of the worker's memory that it takes: its own memory, and what the host keeps for it."""
        own = 0 if self.fiber is None else self.fiber.memory_bytes
        # Forks share their logits. What is left of the output keeps all of it.
        logits = {id(seq.logits): len(seq.logits) for seq in self.sequences.values() if seq.logits is not None}
        output = memoryview(self.outbox.obj).nbytes + len(self.held_output)
        return own + len(self.start.input) + self.inbox_held + output + sum(logits.values()) + self.unread

    @property
    def inbox_held(self) -> int:
        """Bytes that its waiting messages take."""
        return self.inbox_bytes + MESSAGE_BYTES * len(self.inbox)

    def put_message(self, data: bytes) -> bool:
        """A message for ``recv``; False if it is dropped for want of room, which the log then says."""
        size, tenant = len(data), self.tenant
        if self.inbox_bytes + size > MAX_INBOX:
            self.warn(f"recv: a message of {size:,} bytes is dropped: {self.inbox_bytes:,} bytes wait already")
            return False
        if tenant.inbox_bytes + size + MESSAGE_BYTES > MAX_TENANT_INBOXES:
            held = f"{tenant.inbox_bytes:,} bytes wait for this tenant's runs already"
            self.warn(f"recv: a message of {size:,} bytes is dropped: {held}")
            return False
        self.inbox.append(data)
        self.inbox_bytes += size
        tenant.inbox_bytes += size + MESSAGE_BYTES
        return True

    def take_message(self) -> None:
        """The first message is the guest's now."""
        size = len(self.inbox.popleft())
        self.inbox_bytes -= size
        self.tenant.inbox_bytes -= size + MESSAGE_BYTES

    def held(self, now: float) -> float:
        """Seconds for which it was held back because of its tenant's fuel rate."""
        return self.usage.throttled_seconds + (0.0 if self.held_since is None else now - self.held_since)

    def forget(self) -> None:
        """The run is over: let go of all that it kept."""
        self.tenant.inbox_bytes -= self.inbox_held
        self.inbox_bytes = 0
        for kept in (self.calls, self.store_calls, self.sequences, self.streams, self.inbox):
            kept.clear()
        self.outbox = memoryview(b"")

    # --- what host functions use ------------------------------------------------------------------

    def op(self, op: EngineOp) -> None:
        """Tell the engine something, in order with everything else of this turn."""
        self.runtime.ops.append(op)

    def event(self, event: WorkerEvent) -> None:
        """Tell the gateway something, after all that was emitted before."""
        if self.held_output:
            self.runtime.outputs.flush(self)
        self.runtime.events.append(event)

    def call(self, completion: Completion) -> int:
        """A number for a call to the engine; its answer goes to ``completion``."""
        return self.runtime.new_call(self, completion)

    def store_call(self, completion: StoreCompletion) -> int:
        """A number for a call to the tenant's store."""
        return self.runtime.new_store_call(self, completion)

    def fuel_left(self) -> int:
        fiber = self.fiber
        return 0 if fiber is None or fiber.closed else max(0, fiber.fuel - self.debt)

    def charge(self, units: int) -> None:
        """Bill fuel for work that the host does for the guest."""
        self.debt += units

    def fuel_used(self) -> int:
        return 0 if self.fiber is None else self.start.limits.fuel - self.fuel_left()

    def work(self, fuel: int, work: Callable[[], Any], finish: Callable[[Any], int]) -> None:
        """Let the guest wait for work that costs ``fuel``; see :class:`Job`."""
        self.debt += fuel
        self.job = Job(fuel, work, finish)

    def refuse_limit(self, name: str, limit: int, used: int, text: str) -> Refused:
        """The refusal that says which limit (of :class:`realm.limits.TenantLimits`) is met."""
        self.limit = LimitMet(name, limit, used)
        return Refused(ErrorCode.LIMIT, f"{text} (limit {limit:,}, used {used:,})")

    def next_random(self) -> int:
        self._randoms += 1
        return random_bits(self.start.seed, self._randoms)

    def random_bytes(self, size: int) -> bytes:
        """The same bytes that so many calls of :meth:`next_random` would give, seven from each."""
        count = -(-size // 7)
        first = self._randoms + 1
        self._randoms += count
        return random_block(self.start.seed, first, count)[:size]

    def add_sequence(self, sequence: GuestSequence) -> int:
        """Put it under a handle, which counts up and is never used again."""
        self.sequences[sequence.handle] = sequence
        return sequence.handle

    def new_sequence(self, parent: GuestSequence | None = None) -> GuestSequence:
        """A sequence with a number of its own; not yet under a handle.

        Raises:
            Refused: the run has as many as it may.
        """
        most = self.start.limits.sequences
        if len(self.sequences) >= most:
            raise self.refuse_limit("sequences_per_run", most, len(self.sequences), "no more sequences")
        self._ordinals += 1
        engine_id = self.runtime.new_sequence_id()
        if parent is not None:
            return parent.fork(engine_id, self.start.seed, self._ordinals)
        return GuestSequence(engine_id, self.start.seed, self._ordinals)

    def drop_sequence(self, sequence: GuestSequence) -> None:
        """Forget a sequence; its handle is not used again."""
        del self.sequences[sequence.handle]

    def open_sequence(self) -> int:
        sequence = self.new_sequence()
        self.op(OpenSequence(sequence.id, self.start.tenant, self.start.run))
        return self.add_sequence(sequence)

    # --- output and log ---------------------------------------------------------------------------

    def send_output(self, data: bytes) -> None:
        self.runtime.outputs.put(self, data)
        self.credit -= len(data)

    def write_log(self, level: str, text: str) -> bool:
        """A line of the guest; False if the run's log is full."""
        size = len(text.encode()) + LOG_LINE_BYTES
        if size > self._log_left:
            if self._log_left >= 0:
                limit = self.start.limits.log_bytes
                self.limit = LimitMet("log_bytes_per_run", limit, limit - self._log_left)
                self._log_left = -1
                self.event(Log(self.start.run, "warning", f"the log is full ({limit:,} bytes); nothing more is kept"))
            return False
        self._log_left -= size
        self.event(Log(self.start.run, level, text))
        return True

    @property
    def log_full(self) -> bool:
        """Nothing more is kept."""
        return self._log_left < 0

    def warn(self, text: str) -> None:
        """A line of the host about a mistake of the guest; only so many a run."""
        text = clipped(text)
        self.last_error = text
        self._warnings += 1
        if self._warnings > MAX_WARNINGS:
            return
        self.event(Log(self.start.run, "warning", text))
        if self._warnings == MAX_WARNINGS:
            self.event(Log(self.start.run, "warning", "further warnings of the host are not shown"))

    def failed(self, name: str, error: Exception) -> int:
        """The error code for an exception in a host function; call it while that is being handled."""
        if isinstance(error, Refused):
            self.warn(f"{name}: {error.text}")
            return int(error.code)
        if isinstance(error, RealmError):
            self.warn(f"{name}: {error.message}")
            return int(_CODES.get(error.code, ErrorCode.INTERNAL))
        if isinstance(error, MemoryError):
            if not self._memory_short:
                self._memory_short = True
                log.error("run %d: host function %s: the worker's memory is used up", self.start.run, name)
            self.warn(f"{name}: the worker's memory is used up")
            return int(ErrorCode.INTERNAL)
        correlation = secrets.token_hex(6)
        if self._warnings < MAX_WARNINGS:
            # No more than the run's log is told of: a guest that finds a defect must not fill the host's disk.
            log.exception("run %d: host function %s failed [%s]", self.start.run, name, correlation)
        self.warn(f"{name}: the host failed; its log has the cause under {correlation}")
        return int(ErrorCode.INTERNAL)
