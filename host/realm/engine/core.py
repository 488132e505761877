"""The engine as a polled object: operations in, steps, results out. No sockets, no threads.

A step is launched and settled, and while it is in flight the next one may be launched
(:meth:`EngineCore.launch`, :meth:`EngineCore.settle`); :meth:`EngineCore.step` does both. A sequence is
either the scheduler's or has a lane: the scheduler's can do everything, one at a time; those with lanes
only go on, all at once (:mod:`realm.engine.lanes`), and ahead of their guests.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable

import msgspec
import numpy as np

from realm.engine.adapter import MAX_ADAPTER_NAME, Adapter
from realm.engine.adapter_users import AdapterUsers
from realm.engine.adapters import Adapters
from realm.engine.answers import Answers, as_messages
from realm.engine.batch import Longs, Runner
from realm.engine.checking import sampling_fault
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.lanes import CLAIM
from realm.engine.pipeline import Pipeline
from realm.engine.scheduler import Scheduler
from realm.engine.sequence import Call, Sequence
from realm.engine.tenants import MAX_NAME, Tenants
from realm.engine.trace import Trace
from realm.engine.workers import Workers
from realm.guests.abi import ErrorCode
from realm.messages import (
    ApplyAdapter,
    CallDone,
    EndRun,
    EngineOp,
    EngineResult,
    EngineStats,
    ForkSequence,
    Forward,
    FreeSequence,
    LimitMet,
    OpenSaved,
    OpenSequence,
    SaveSequence,
    TenantQuota,
    TruncateSequence,
)


class EngineCore:
    """Sequences, their pending calls and the model. One thread owns it.

    A worker that was taken over may send anything (:mod:`realm.engine.workers` says what it reaches).
    A wrong operation fails its call or is dropped; none raises, or costs more than its tenant's share
    of pages, tokens and memory.
    """

    def __init__(
        self,
        name: str,
        runner: Runner,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float] = time.monotonic,
        run_ahead: int = 0,
        adapter_cache: int = 0,
    ) -> None:
        """``clock``: seconds, for rates; its zero does not matter. ``run_ahead``: see :class:`Pipeline`.
        ``adapter_cache``: bytes of host memory for adapters; see :class:`Adapters`."""
        self.name = name
        self.config = runner.config
        self.runner = runner
        self.scheduler = scheduler
        self.run_ahead = run_ahead
        self.tenants = Tenants(name)
        scheduler.clock = clock
        self._clock = clock
        self._answers = Answers()
        self._pipeline = Pipeline(runner, scheduler, self._answers, run_ahead=run_ahead, clock=clock)
        self._workers = Workers(scheduler, self.tenants)
        self._users = AdapterUsers(scheduler, self._pipeline, self._answers, clock)
        self.adapters = Adapters(runner.adapters, runner.config, self._users, cache=adapter_cache)
        scheduler.gate = self.adapters.admit

    # --- operations -----------------------------------------------------------------------------

    def submit(self, worker: int, ops: Iterable[EngineOp], continues: bytes = b"") -> None:
        """Apply a worker's operations: first those that go on, then the others in order.

        Args:
            continues: see :meth:`claim`.
        """
        if continues:
            self.claim([(worker, continues)])
        workers = self._workers
        sequences = workers.of(worker).sequences
        now = self._clock()
        for op in ops:
            match op:
                case Forward():
                    self._forward(worker, sequences.get(op.seq), op, now)
                case OpenSequence():
                    workers.open(worker, op.seq, op.tenant, op.run)
                case ForkSequence():
                    if (parent := sequences.get(op.parent)) is not None and parent.lane >= 0:
                        self._pipeline.park(parent)
                    workers.fork(worker, op.parent, op.child)
                case TruncateSequence():
                    sequence = self._free_to_change(sequences.get(op.seq))
                    if sequence is not None and op.length >= 0:
                        self.scheduler.truncate(sequence, op.length)
                case FreeSequence():
                    workers.free(worker, op.seq)
                case EndRun():
                    workers.end_run(worker, op.run)
                case SaveSequence():
                    self._save(worker, sequences.get(op.seq), op)
                case OpenSaved():
                    self._open_saved(worker, op)
                case ApplyAdapter():
                    self._apply(worker, sequences.get(op.seq), op, now)

    def claim(self, turns: list[tuple[int, bytes]]) -> None:
        """Take in calls that go on, of any workers, at once: most of what that costs is by call, not by row.

        Args:
            turns: a worker and its rows of :data:`realm.messages.CONTINUE`. What is no whole row is not looked at.
        """
        counts = [len(rows) // CLAIM.itemsize for _, rows in turns]
        joined = b"".join(rows[: count * CLAIM.itemsize] for (_, rows), count in zip(turns, counts, strict=True))
        claims = np.frombuffer(joined, dtype=CLAIM)
        workers = np.repeat(np.array([worker for worker, _ in turns], np.int64), counts)
        now = self._clock()
        single = self._pipeline.claim(workers, claims, now)
        if not single.any():
            return
        for worker, (call, seq, _, token) in zip(workers[single].tolist(), claims[single].tolist(), strict=True):
            self._go_on(worker, self._workers.of(worker).sequences.get(seq), call, seq, token, now)

    def set_quota(self, quota: TenantQuota) -> None:
        """Set what a tenant may take from now on. Pending calls that can no longer fit fail."""
        for tenant in self.tenants.set_quota(quota, self._clock()):
            self._pipeline.park_tenant(tenant)
            for sequence in [*tenant.decodes.values(), *tenant.prompts.values()]:
                met = tenant.over_pages(-(-len(sequence.tokens) // PAGE_SIZE))
                if met is not None and (call := sequence.call) is not None:
                    self.scheduler.cancel(sequence)
                    self._take_back(sequence, call)
                    self._answers.fail_limit(sequence.worker, call.number, met)

    def drop_worker(self, worker: int) -> None:
        """A worker died: forget its sequences and calls."""
        self._workers.drop(worker)
        self._answers.forget(worker)

    def _take_back(self, sequence: Sequence, call: Call) -> None:
        """A call that fails leaves its sequence as it was before."""
        self.scheduler.truncate(sequence, len(sequence.tokens) - call.count)

    def _no_sequence(self, worker: int, call: int, seq: int) -> None:
        """Answer a call on a sequence that is not there, or busy, or was refused when it was opened."""
        refusal = self._workers.refusal(worker, seq)
        if refusal is None:
            message = "no such sequence, or it has a call pending"
            self._answers.fail(worker, call, ErrorCode.BAD_HANDLE, message)
        else:
            self._answers.fail_memory(worker, call, *refusal)

    def _free_to_change(self, sequence: Sequence | None) -> Sequence | None:
        """The sequence without a lane, unless it has a call pending."""
        if sequence is None or sequence.call is not None:
            return None
        if sequence.lane >= 0:
            if self._pipeline.lanes.pending(sequence.lane):
                return None
            self._pipeline.park(sequence)
        return sequence

    def _go_on(self, worker: int, sequence: Sequence | None, call: int, seq: int, token: int, now: float) -> None:
        """A call that goes on as before, of a sequence that has no lane (any more), or that is not in order."""
        sequence = self._free_to_change(sequence)
        if sequence is None:
            self._no_sequence(worker, call, seq)
            return
        p = sequence.sampling
        if p is None:
            message = "the sequence has made no call that it could go on from"
            self._answers.fail(worker, call, ErrorCode.INVALID_ARGUMENT, message)
            return
        if p.number >= 0:
            p = msgspec.structs.replace(p, number=p.number + 1)
        self._forward(worker, sequence, Forward(call, seq, token.to_bytes(4, "little"), p, False), now)

    def _forward(self, worker: int, sequence: Sequence | None, op: Forward, now: float) -> None:
        if not 0 <= op.call < 1 << 64:
            # No worker numbers its calls so, and no row could say it.
            self._answers.fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, "the call's number is out of range")
            return
        sequence = self._free_to_change(sequence)
        if sequence is None:
            self._no_sequence(worker, op.call, op.seq)
            return
        tokens = array("I")
        if not op.tokens or len(op.tokens) % 4:
            self._answers.fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, "tokens are not whole uint32 values")
            return
        tenant, count = sequence.tenant, len(op.tokens) // 4
        length = len(sequence.tokens) + count
        if length > self.config.context_length:
            message = f"the sequence would have {length:,} tokens; the context is {self.config.context_length:,}"
            self._answers.fail(worker, op.call, ErrorCode.CONTEXT_FULL, message)
            return
        tokens.frombytes(op.tokens)
        highest = tokens[0] if count == 1 else int(np.frombuffer(op.tokens, dtype="<u4").max())
        if highest >= self.config.vocab_size:
            message = f"token {highest} is not below the vocabulary's size {self.config.vocab_size}"
            self._answers.fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, message)
            return
        if op.sampling is not None and (fault := sampling_fault(op.sampling, self.config.vocab_size)) is not None:
            self._answers.fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, fault)
            return
        if (why := self._pipeline.no_room(tenant, length)) is not None:
            self._pipeline.refuse(worker, op.call, why, length)
            return
        if (met := tenant.over_rate(now)) is not None:
            self._answers.fail_limit(worker, op.call, met)
            return
        call = Call(op.call, 0, count, op.sampling, op.want_logits)
        if (lack := self._workers.lacks_memory(tenant, 0, count + call.weight)) is not None:
            self._answers.fail_memory(worker, op.call, tenant, lack)
            return
        sequence.tokens.extend(tokens)
        # Whoever goes on later goes on from this call. Masks and biases are not kept: nobody goes on with them.
        p = op.sampling
        sequence.sampling = p if p is not None and p.mask is None and p.bias_tokens is None else None
        tenant.spend(count, now)
        self.scheduler.submit(sequence, call)

    def _save(self, worker: int, sequence: Sequence | None, op: SaveSequence) -> None:
        sequence = self._free_to_change(sequence)
        if sequence is None:
            self._no_sequence(worker, op.call, op.seq)
            return
        if len(op.name) > MAX_NAME:
            self._answers.fail(
                worker, op.call, ErrorCode.INVALID_ARGUMENT, f"the name is longer than {MAX_NAME} characters"
            )
            return
        tenant = sequence.tenant
        limit = tenant.quota.saved_sequences
        if len(tenant.saved) - (op.name in tenant.saved) >= limit:
            self._answers.fail_limit(worker, op.call, LimitMet("saved_sequences", limit, len(tenant.saved)))
        elif (lack := self._workers.lacks_memory(tenant, 1, len(sequence.tokens))) is not None:
            # If refused, the old copy of that name stays: so it counts beside the new one.
            self._answers.fail_memory(worker, op.call, tenant, lack)
        else:
            self._answers.add(worker, CallDone(op.call, len(self._workers.save(sequence, op.name).tokens)))

    def _open_saved(self, worker: int, op: OpenSaved) -> None:
        tenant = self.tenants.find(op.tenant)
        saved = None if tenant is None else tenant.saved.get(op.name)
        if saved is None:
            name = op.name[:MAX_NAME]
            self._answers.fail(worker, op.call, ErrorCode.NOT_FOUND, f"the tenant has no saved sequence {name!r}")
            return
        sequence = self._workers.open(worker, op.seq, op.tenant, op.run, saved)
        if sequence is None:
            self._no_sequence(worker, op.call, op.seq)
        else:
            self._answers.add(worker, CallDone(op.call, len(sequence.tokens)))

    def _apply(self, worker: int, sequence: Sequence | None, op: ApplyAdapter, now: float) -> None:
        sequence = self._free_to_change(sequence)
        if sequence is None:
            self._no_sequence(worker, op.call, op.seq)
            return
        if not op.name:
            if sequence.adapter is not None:
                self._users.change(sequence, None)
            self._answers.add(worker, CallDone(op.call, 0))
            return
        adapter = None
        if len(op.name) <= MAX_ADAPTER_NAME:
            adapter = self.adapters.find(sequence.tenant.name, op.name)
        if adapter is None:
            message = f"the tenant has no adapter {op.name[:MAX_ADAPTER_NAME]!r}, and no shared one has that name"
            self._answers.fail(worker, op.call, ErrorCode.NOT_FOUND, message)
        elif not self.adapters.capacity:
            self._answers.fail(worker, op.call, ErrorCode.NOT_SUPPORTED, "this engine was started without adapters")
        elif sequence.adapter is adapter:
            self._answers.add(worker, CallDone(op.call, adapter.rank))
        elif sequence.tokens and (met := sequence.tenant.over_rate(now)) is not None:
            # What it has is computed again, and counts again.
            self._answers.fail_limit(worker, op.call, met)
        else:
            # Until the adapter is there, the sequence has a call pending like any other.
            sequence.call = Call(op.call, 0, 0, None, False)
            self.adapters.apply(adapter, sequence, sequence.call)

    def advance(self) -> None:
        """Go on loading adapters. To be called in each turn of whoever drives the engine; costs next to nothing."""
        self.adapters.advance()

    # --- steps ----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Steps that are launched and not settled."""
        return self._pipeline.in_flight

    @property
    def trace(self) -> Trace | None:
        """Where spans of the steps go."""
        return self._pipeline.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._pipeline.trace = trace

    def has_work(self) -> bool:
        """Whether somebody waits for something, or results wait to be taken."""
        return bool(self._answers) or self.in_flight > 0 or self._pipeline.due

    @property
    def due(self) -> bool:
        """Whether somebody waits for something that is not launched."""
        return self._pipeline.due

    @property
    def may_run_ahead(self) -> bool:
        """Whether :meth:`launch` might find something although nobody waits for it."""
        return self._pipeline.may_run_ahead

    @property
    def claims_can_wait(self) -> bool:
        """Whether taking in calls that go on would change nothing before the oldest step in flight is done."""
        return self._pipeline.claims_can_wait

    def outlook(self) -> tuple[int, Longs]:
        """How many rows a step would have now, about, and the workers of sequences that have run ahead as
        far as they may, which it would not have: one for each."""
        return self._pipeline.outlook()

    def answered_singly(self) -> set[int]:
        """Workers whose results, as :meth:`take` will give them, go also to sequences that cannot run ahead."""
        return self._answers.singly

    @property
    def step_seconds(self) -> float:
        """How long the last step took on the device."""
        return self._pipeline.step_seconds

    def launch(self) -> bool:
        """Launch one step with all that is pending, and with rows run ahead; False if there is nothing."""
        return self._pipeline.launch()

    def settle(self, wait: bool) -> bool:
        """Take in the oldest step in flight, if it is done or when ``wait``; False if none was taken in."""
        return self._pipeline.settle(wait)

    def take(self) -> dict[int, tuple[list[EngineResult], bytes]]:
        """All results so far, by worker: messages, and rows of :data:`realm.messages.DRAWN`."""
        return self._answers.take()

    def step(self) -> dict[int, list[EngineResult]]:
        """Launch one step, wait for all that is in flight, and return the results by worker as messages."""
        self.advance()
        self.launch()
        while self.settle(True):
            pass
        return {worker: as_messages(*results) for worker, results in self.take().items()}

    def close(self) -> None:
        """Give the device back. Idempotent."""
        self.adapters.close()
        self.runner.close()

    # --- facts ----------------------------------------------------------------------------------

    def stats(self, call: int = 0) -> EngineStats:
        """Counters since the start; see :class:`realm.messages.EngineStats`."""
        tenants = self.tenants.stats(self._clock())
        every = [self.tenants.forgotten, *tenants.values()]
        pool, pipeline = self.scheduler.pool, self._pipeline
        return EngineStats(
            call=call,
            model=self.name,
            steps=pipeline.steps,
            sequences=pipeline.rows,
            max_sequences=pipeline.largest,
            shared_steps=pipeline.shared,
            prefill_tokens=sum(t.prefill_tokens for t in every),
            decode_tokens=sum(t.decode_tokens for t in every),
            cached_tokens=sum(t.cached_tokens for t in every),
            preemptions=self.scheduler.tables.preemptions,
            busy_seconds=pipeline.busy,
            pages_total=pool.total,
            pages_free=pool.free,
            pages_used=pool.used,
            pages_cached=pool.cached,
            tenants=tenants,
            adapters=self.adapters.resident,
            adapter_loads=self.adapters.loads,
        )

    def check(self) -> None:
        """Verify the accounting of pages, memory, calls, owners and adapters. Raises AssertionError."""
        self.scheduler.check()
        self._pipeline.lanes.check()
        self._workers.check()
        counts: dict[Adapter, list[int]] = {}
        for sequence in self.scheduler.sequences:
            if sequence.adapter is not None:
                count = counts.setdefault(sequence.adapter, [0, 0])
                count[0] += 1
                count[1] += sequence.queued
        self.adapters.check({adapter: (count, queued) for adapter, (count, queued) in counts.items()})
