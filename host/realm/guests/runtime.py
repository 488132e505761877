"""All guests of one worker, as a polled object: messages in, turns out. No sockets.

A turn first takes in what has become ready. If the engine or the helper has answered guests, it runs
those: each for a slice at most, so that the short turns of all are over and their next calls reach
the engine together, and then those that need more. Otherwise it gives a few slices to the others.
Which tenant's guest is next, and who may run at all, is decided in :mod:`tenants`.

Guests that only compute get nothing in a turn with answered ones, but are never passed over for
longer than :data:`~realm.guests.slices.OTHERS_SECONDS`. See :mod:`slices` for how both are bounded.
"""

from __future__ import annotations

import gc
import logging
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from realm.guests import reports, wasi
from realm.guests.facts import ModelFacts, TokenizerLike
from realm.guests.fiber_types import EngineFailure, TrapInfo
from realm.guests.fibers import Fiber
from realm.guests.guard import MemoryGuard
from realm.guests.helper import Helper, InlineHelper
from realm.guests.outputs import Outputs
from realm.guests.run import Completion, GuestRun, StoreCompletion
from realm.guests.slices import WOKEN_SLICES, Slices
from realm.guests.starting import Starter
from realm.guests.tenants import READY, Schedule
from realm.guests.timers import Timers
from realm.messages import DRAWN, EndRun, EngineOp, EngineReply
from realm.run_messages import (
    CancelRun,
    ClientMessage,
    Credit,
    ErrorInfo,
    RunFinished,
    StartRun,
    StoreReply,
    TenantShare,
    WorkerEvent,
)

log = logging.getLogger("realm.guests")

MAX_RUNS = 10_000
"""Runs at a time. Each guest takes five memory mappings, and Linux gives a process 65,530 of them:
beyond that no guest could grow its memory either."""
CLOSING_SECONDS = 1.0
"""A cancelled guest that has not had its last slice by then is ended without one."""


@dataclass(slots=True)
class Turn:
    """What one turn gave.

    Attributes:
        ops: for the engine, in order. events: for the gateway, in order.
        continues: rows of :data:`~realm.messages.CONTINUE`, which the engine is to apply before ``ops``.
        busy: some guest wants to run on: take another turn soon.
        deadline: :func:`time.monotonic` time at which a time-out or held output is due, or a tenant held
            back for its fuel rate may go on, or None.
    """

    ops: list[EngineOp] = field(default_factory=list)
    events: list[WorkerEvent] = field(default_factory=list)
    busy: bool = False
    deadline: float | None = None
    continues: bytes = b""


class GuestRuntime:
    """Runs guests; one thread owns it.

    Args:
        worker: the worker's number; sequences are numbered ``(worker << 40) | counter``.
        clock: monotonic seconds. wall_clock: seconds since 1970. cpu_clock: processor seconds of this thread.
        helper: does work that takes too long; closed by its maker.

    Attributes:
        guard: keeps guests below their ceiling of memory; whoever calls in is between its ``enter`` and ``leave``.
        ops, continues, events: what the next turn will give.
    """

    def __init__(
        self,
        worker: int,
        tokenizer: TokenizerLike,
        facts: ModelFacts,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        cpu_clock: Callable[[], float] = time.thread_time,
        helper: Helper | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.clock = clock
        self.wall_clock = wall_clock
        self.cpu_clock = cpu_clock
        self.helper: Helper = InlineHelper() if helper is None else helper
        self.guard = MemoryGuard()
        self.ops: list[EngineOp] = []
        self.continues = bytearray()
        self.events: list[WorkerEvent] = []
        self.outputs = Outputs(lambda output: self.events.append(output))
        self.schedule = Schedule()
        self.slices = Slices(self)
        self._starter = Starter(self)
        self._timers = Timers()
        self._runs: dict[int, GuestRun] = {}
        self._calls: dict[int, tuple[GuestRun, Completion]] = {}
        self._store_calls: dict[int, tuple[GuestRun, StoreCompletion]] = {}
        self._call_number = 0
        self._sequence_number = worker << 40

    # --- what goes on -----------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Runs that have not finished."""
        return len(self._runs)

    @property
    def pending_calls(self) -> int:
        """Calls to engine and store that have no answer yet."""
        return len(self._calls) + len(self._store_calls)

    def close(self) -> None:
        """End all runs as cancelled and free the modules. The last events are in the next turn."""
        for run in list(self._runs.values()):
            self._finish(run, "cancelled", 0, None)
        self._starter.close()

    def check(self) -> None:
        """Raise AssertionError unless all that is kept belongs to a run that goes on. For tests."""
        runs = set(self._runs.values())
        self.schedule.check()
        for calls in (self._calls, self._store_calls):
            for number, (run, _) in calls.items():
                assert run in runs, "a call outlives its run"
                assert number in run.calls or number in run.store_calls, "a call is nobody's"
        tickets = {run.ticket for run in runs if run.ticket is not None}
        assert tickets <= set(self.slices.jobs), "a run waits for a job that is not there"
        assert len(self.slices.jobs) == len(tickets) + self._starter.loading, "a job outlives its run"
        assert self._timers.runs <= runs, "a timer outlives its run"
        assert self.outputs.runs == {run for run in runs if run.held_output}, "held output is nobody's or is forgotten"
        for tenant in self.schedule.tenants:
            inboxes = sum(run.inbox_held for run in runs if run.tenant is tenant)
            assert tenant.inbox_bytes == inboxes, "a tenant's waiting messages are miscounted"
        assert sum(tenant.runs for tenant in self.schedule.tenants) == len(runs), "a tenant's runs are miscounted"
        starting = self._starter.waiting
        assert starting <= runs, "a module is loaded for a run that has ended"
        assert all((run.fiber is None) == (run in starting) for run in runs), "a run without a fiber"

    def relieve(self, limit: int) -> None:
        """The process nears its ceiling: end the largest run of the tenant that holds most memory.

        ``limit`` is to how many bytes all guests together may bring the process.
        """
        held: dict[str, int] = {}
        largest: dict[str, tuple[int, GuestRun]] = {}
        for run in self._runs.values():
            name, size = run.tenant.name, run.memory_held
            held[name] = held.get(name, 0) + size
            if name not in largest or size > largest[name][0]:
                largest[name] = size, run
        if held:
            name = max(held, key=lambda tenant: held[tenant])
            run = largest[name][1]
            self.fail(run, reports.crowded(run, limit, held[name]))

    # --- messages ---------------------------------------------------------------------------------

    def start(self, message: StartRun) -> None:
        """Start a guest; it runs from the next turn on. Failures are its ``RunFinished``."""
        if message.run in self._runs:
            raise ValueError(f"run {message.run} is running already")
        now = self.clock()
        run = GuestRun(message, self, self.schedule.enter(message.tenant, now), now)
        self._runs[message.run] = run
        if len(self._runs) > MAX_RUNS:
            self.fail(run, reports.busy(f"this worker runs {MAX_RUNS:,} guests already"))
            return
        self._set_timer(run, self._first_deadline(run))
        self._starter.begin(run)

    def share(self, message: TenantShare) -> None:
        """A tenant's fuel rate in this worker."""
        self.schedule.share(message.tenant, message.fuel_per_second, self.clock())

    def cancel(self, message: CancelRun) -> None:
        """End a run. A guest inside ``recv`` or ``emit`` gets CLOSED and one slice to say good-bye.

        That slice comes in its tenant's turn like any other, so that the end of a client with hundreds
        of guests holds nobody up.
        """
        run = self._runs.get(message.run)
        if run is None or run.closing is not None:
            return
        run.closing = message.reason
        if run.on_wake is not None:
            self._wake(run, late=False)
            # It waits no more: credit that comes now must not answer it again.
            run.on_wake = None
            if run.place >= 0:
                self._set_timer(run, min(self.clock() + CLOSING_SECONDS, run.deadline))
                return
        self._finish(run, "cancelled", 0, None)

    def had_last_slice(self, run: GuestRun) -> None:
        """A cancelled guest has had its slice: if it has not returned, it is ended."""
        if self._runs.get(run.start.run) is run:
            self._finish(run, "cancelled", 0, None)

    def close_input(self, number: int) -> None:
        """No more messages will come: ``recv`` gives CLOSED once the waiting ones are taken."""
        run = self._runs.get(number)
        if run is not None:
            run.closed_input = True
            self._wake(run, late=False)

    def message(self, message: ClientMessage) -> None:
        """Data for ``recv``. What does not fit the inbox is dropped, and the run's log says so."""
        run = self._runs.get(message.run)
        if run is None:
            return
        if run.put_message(message.data):
            self._wake(run, late=False)

    def credit(self, message: Credit) -> None:
        """The client has taken output: the guest may emit more."""
        run = self._runs.get(message.run)
        if run is not None:
            run.credit += message.size
            self._wake(run, late=False)

    def store_reply(self, message: StoreReply) -> None:
        """The answer to a ``StoreGet`` or ``StoreSet``; one for a finished run is dropped."""
        entry = self._store_calls.pop(message.call, None)
        if entry is None:
            return
        run, completion = entry
        run.store_calls.discard(message.call)
        self.answer(run, lambda: completion(message), READY)

    def deliver(self, reply: EngineReply) -> None:
        """The engine's results; those for finished runs are dropped."""
        take = self._calls.pop
        for call, token, logprob, cached, lane in DRAWN.iter_unpack(reply.drawn):
            entry = take(call, None)
            if entry is not None:
                run, completion = entry
                try:
                    value = completion.drawn(token, logprob, cached, lane)
                except Exception as error:
                    value = self._failed(run, error)
                if value is not None:
                    self._answered(run, value)
        for result in reply.results:
            entry = take(result.call, None)
            if entry is not None:
                run, completion = entry
                try:
                    value = completion.done(result)
                except Exception as error:
                    value = self._failed(run, error)
                if value is not None:
                    self._answered(run, value)

    def _failed(self, run: GuestRun, error: Exception) -> int:
        # A batch may have more calls out, whose answers now belong to nobody.
        for call in run.calls:
            self._calls.pop(call, None)
        return run.failed(run.last_call, error)

    def _answered(self, run: GuestRun, value: int) -> None:
        # The guest waits in one host function at a time: all its calls are answered now.
        run.calls.clear()
        run.slices = WOKEN_SLICES
        run.fiber.resume(value)  # type: ignore[union-attr]
        if run.place < 0:
            self.schedule.woken.push(run)

    # --- turns ------------------------------------------------------------------------------------

    def turn(self, now: float) -> Turn:
        """Let guests run; see the module's description. ``now`` is :meth:`clock` time."""
        schedule = self.schedule
        self.outputs.begin(now, len(self._runs))
        self._expire(now)
        schedule.release(now)
        if self.slices.jobs:
            self.slices.collect()
        if schedule.woken or schedule.long:
            self.slices.answered(now)
        elif schedule.ready or schedule.spinning:
            self.slices.others(now)
        self.outputs.flush_due()
        deadline = self._timers.next
        for due in (schedule.next_release, self.outputs.next):
            if due is not None and (deadline is None or due < deadline):
                deadline = due
        busy = schedule.runnable or bool(self.slices.jobs and self.helper.immediate)
        turn = Turn(self.ops, self.events, busy, deadline, bytes(self.continues))
        self.ops, self.continues, self.events = [], bytearray(), []
        return turn

    def answer(self, run: GuestRun, work: Callable[[], int | None], place: int) -> None:
        """Resume a waiting guest with what ``work`` gives, unless that is None."""
        try:
            value = work()
        except Exception as error:
            value = run.failed(run.last_call, error)
        if value is not None and run.fiber is not None:
            run.fiber.resume(value)
            self.schedule.push(run, place)

    def _wake(self, run: GuestRun, *, late: bool) -> None:
        on_wake = run.on_wake
        if on_wake is not None:
            self.answer(run, lambda: on_wake(late), READY)

    # --- numbers and timers -----------------------------------------------------------------------

    def new_sequence_id(self) -> int:
        self._sequence_number += 1
        return self._sequence_number

    def new_call(self, run: GuestRun, completion: Completion) -> int:
        self._call_number = number = self._call_number + 1
        self._calls[number] = (run, completion)
        run.calls.append(number)
        return number

    def new_store_call(self, run: GuestRun, completion: StoreCompletion) -> int:
        self._call_number = number = self._call_number + 1
        self._store_calls[number] = (run, completion)
        run.store_calls.add(number)
        return number

    def wake_at(self, run: GuestRun, when: float) -> None:
        """Wake the guest's ``recv`` at a time, unless the run's own limit comes first."""
        self._set_timer(run, min(when, run.deadline))

    def _set_timer(self, run: GuestRun, when: float) -> None:
        self._timers.put(run, when, len(self._runs))

    def _first_deadline(self, run: GuestRun) -> float:
        """Until when the guest must have called the host; being held back is not its fault."""
        return min(run.started + run.start.limits.first_call_seconds + run.held(self.clock()), run.deadline)

    def _expire(self, now: float) -> None:
        while (run := self._timers.take_due(now)) is not None:
            if run.closing is not None:
                self._finish(run, "cancelled", 0, None)
            elif now >= run.deadline:
                self.fail(run, reports.wall_time(run, now - run.started))
            elif not run.usage.host_calls:
                until = self._first_deadline(run)
                if now >= until:
                    self.fail(run, reports.first_call(run, now - run.started))
                else:
                    self._set_timer(run, until)
            else:
                self._wake(run, late=True)
                self._set_timer(run, run.deadline)

    # --- ends -------------------------------------------------------------------------------------

    def returned(self, run: GuestRun, code: int) -> None:
        if run.closing is not None:
            self._finish(run, "cancelled", code, None)
        elif code >= 0:
            self._finish(run, "complete", code, None)
        else:
            self.fail(run, reports.refused(run, code) or reports.guest_error(run, code), code)

    def trapped(self, run: GuestRun, fiber: Fiber) -> None:
        trap = fiber.trap or TrapInfo("unknown", "the guest died")
        if fiber.host_failed:
            self.fail_internal(run, f"a host function failed ({run.last_call})", None)
        elif trap.kind == "instantiation":
            # Neither a trap nor a limit: the system refused Wasmtime something.
            self.fail_internal(run, "the guest cannot be started", EngineFailure(trap.message))
        else:
            self.fail(run, reports.trapped(run, trap))

    def fail_internal(self, run: GuestRun, text: str, error: Exception | None) -> None:
        """End a run because of the host; the cause is in the log only."""
        correlation = secrets.token_hex(6)
        log.error("run %d: %s [%s]", run.start.run, text, correlation, exc_info=error)
        if self._runs.get(run.start.run) is not run:
            return
        if isinstance(error, MemoryError):
            self.fail(run, reports.busy("this worker's memory is used up"))
        else:
            self.fail(run, reports.internal(text, correlation))

    def fail(self, run: GuestRun, error: ErrorInfo, result: int = 0) -> None:
        if run.closing is not None:
            self._finish(run, "cancelled", 0, None)
        else:
            self._finish(run, "error", result, error)

    def _finish(self, run: GuestRun, outcome: str, code: int, error: ErrorInfo | None) -> None:
        """The only way out: free all that the run has, here and in the engine, and say how it ended."""
        number, now = run.start.run, self.clock()
        if self._runs.pop(number, None) is not run:
            raise ValueError(f"run {number} has ended already")
        for call in run.calls:
            self._calls.pop(call, None)
        for call in run.store_calls:
            self._store_calls.pop(call, None)
        if run.ticket is not None:
            self.helper.cancel(run.ticket)
            self.slices.jobs.pop(run.ticket, None)
            run.ticket = None
        self._starter.forget(run)
        run.timer = 0
        run.on_wake = run.job = None
        self.schedule.leave(run, now)
        wasi.flush_lines(run)
        usage, fiber = run.usage, run.fiber
        if fiber is not None:
            left = fiber.fuel - run.debt
            run.tenant.bucket.spend(run.counted - left, now)
            usage.fuel = min(run.start.limits.fuel, run.start.limits.fuel - left)
            usage.memory_bytes = fiber.memory_bytes
            run.fiber = None
            fiber.close()
        usage.wall_seconds = now - run.started
        run.forget()
        self.outputs.flush(run)
        self.ops.append(EndRun(number))
        self.events.append(RunFinished(number, outcome, code, error, usage))


def tune_collector() -> None:
    """Make the garbage collector rare, for a process that only runs guests.

    Suspended guests are thousands of live objects, and a turn makes a few more for each: with the
    default thresholds they were walked again and again, for 2 us of every host call.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def tune_switching() -> None:
    """Let the helper thread have the interpreter for a millisecond at a time, not for five."""
    sys.setswitchinterval(0.001)
