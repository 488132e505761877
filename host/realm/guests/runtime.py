"""All guests of one worker, as a polled object: messages in, turns out. No sockets, no threads.

A turn runs either the guests that the engine has just answered (all of them, so that their next
calls reach the engine together) or, when there are none, a few slices of the others.
"""

from __future__ import annotations

import gc
import heapq
import logging
import secrets
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from realm.guests import wasi
from realm.guests.abi import ErrorCode
from realm.guests.facts import ModelFacts, TokenizerLike
from realm.guests.fiber_types import FUEL_SLICE, EngineFailure, FiberState, TrapInfo
from realm.guests.fibers import Fiber, LinkedModule
from realm.guests.hostcalls import shared_linker
from realm.guests.run import MAX_INBOX, Completion, GuestRun, StoreCompletion
from realm.messages import (
    CancelRun,
    ClientMessage,
    Credit,
    EndRun,
    EngineOp,
    EngineReply,
    ErrorInfo,
    RunFinished,
    StartRun,
    StoreReply,
    WorkerEvent,
)

log = logging.getLogger("realm.guests")

WOKEN_SECONDS = 0.002
WOKEN_SLICES = 16
"""How long a guest that the engine answered may compute before it has to queue up with the others."""
TURN_SECONDS = 0.001
TURN_SLICES = 16
"""How much one turn gives to the others before the links are looked at again."""
MODULES_KEPT = 64
"""Loaded modules that are kept for their next run."""


@dataclass(slots=True)
class Turn:
    """What one turn gave.

    Attributes:
        ops: for the engine, in order. events: for the gateway, in order.
        busy: some guest wants to run on: take another turn soon.
        deadline: :func:`time.monotonic` time at which a time-out is due, or None.
    """

    ops: list[EngineOp] = field(default_factory=list)
    events: list[WorkerEvent] = field(default_factory=list)
    busy: bool = False
    deadline: float | None = None


class GuestRuntime:
    """Runs guests; one thread owns it.

    Args:
        worker: the worker's number; sequences are numbered ``(worker << 40) | counter``.
        clock: monotonic seconds. wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        worker: int,
        tokenizer: TokenizerLike,
        facts: ModelFacts,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.tokenizer = tokenizer
        self.facts = facts
        self.clock = clock
        self.wall_clock = wall_clock
        self.ops: list[EngineOp] = []
        self.events: list[WorkerEvent] = []
        self._linker = shared_linker()
        self._modules: OrderedDict[str, LinkedModule] = OrderedDict()
        self._runs: dict[int, GuestRun] = {}
        self._calls: dict[int, tuple[GuestRun, Completion]] = {}
        self._store_calls: dict[int, tuple[GuestRun, StoreCompletion]] = {}
        self._woken: deque[GuestRun] = deque()
        self._ready: deque[GuestRun] = deque()
        self._spinning: deque[GuestRun] = deque()
        # (time, number, run); an entry counts only while it is the run's timer.
        self._timers: list[tuple[float, int, GuestRun]] = []
        self._timer_number = 0
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
        while self._modules:
            self._modules.popitem()[1].close()

    # --- messages ---------------------------------------------------------------------------------

    def start(self, message: StartRun) -> None:
        """Start a guest; it runs from the next turn on. Failures are its ``RunFinished``."""
        run = GuestRun(message, self, self.clock())
        if message.run in self._runs:
            raise ValueError(f"run {message.run} is running already")
        self._runs[message.run] = run
        limits = message.limits
        try:
            module = self._module(message.artifact)
            run.attach(
                Fiber(
                    module,
                    run,
                    fuel=limits.fuel,
                    memory_bytes=limits.memory_bytes,
                    table_elements=limits.table_elements,
                )
            )
        except (EngineFailure, OSError):
            self._fail_internal(run, "the compiled module cannot be loaded")
            return
        self._set_timer(run, run.deadline)
        self._enqueue(run, self._ready)

    def cancel(self, message: CancelRun) -> None:
        """End a run. A guest inside ``recv`` or ``emit`` gets CLOSED and one slice to say good-bye."""
        run = self._runs.get(message.run)
        if run is None:
            return
        run.closing = message.reason
        if run.on_wake is not None:
            self._wake(run, late=False)
            if run.fiber is not None and not run.fiber.waiting:
                self._advance(run, slices=1)
        if message.run in self._runs:
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
        size = len(message.data)
        if run.inbox_bytes + size > MAX_INBOX:
            run.warn(f"recv: a message of {size:,} bytes is dropped: {run.inbox_bytes:,} bytes wait already")
            return
        run.inbox.append(message.data)
        run.inbox_bytes += size
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
        self._answer(run, lambda: completion(message), self._ready)

    def deliver(self, reply: EngineReply) -> None:
        """The engine's results; those for finished runs are dropped."""
        calls, woken = self._calls, self._woken
        for result in reply.results:
            entry = calls.pop(result.call, None)
            if entry is None:
                continue
            run, completion = entry
            try:
                value = completion(result)
            except Exception as error:
                value = run.failed(run.last_call, error)
                # A batch may have more calls out, whose answers now belong to nobody.
                for call in run.calls:
                    calls.pop(call, None)
            if value is not None:
                # The guest waits in one host function at a time: all its calls are answered now.
                run.calls.clear()
                run.fiber.resume(value)  # type: ignore[union-attr]
                if not run.queued:
                    run.queued = True
                    woken.append(run)

    # --- turns ------------------------------------------------------------------------------------

    def turn(self, now: float) -> Turn:
        """Let guests run; see the module's description. ``now`` is :meth:`clock` time."""
        self._expire(now)
        if self._woken:
            woken, self._woken = self._woken, deque()
            for run in woken:
                run.queued = False
                self._advance(run, WOKEN_SLICES)
        elif self._ready or self._spinning:
            self._slices()
        turn = Turn(
            self.ops,
            self.events,
            bool(self._ready or self._spinning or self._woken),
            self._timers[0][0] if self._timers else None,
        )
        self.ops, self.events = [], []
        return turn

    def _slices(self) -> None:
        """Guests that were started or answered first, then one that spins, until the time is over."""
        end = self.clock() + TURN_SECONDS
        slices = 0
        while self._ready or self._spinning:
            for queue in (self._ready, self._spinning):
                if queue:
                    run = queue.popleft()
                    run.queued = False
                    self._advance(run, slices=1)
                    slices += 1
            if slices >= TURN_SLICES or self.clock() >= end:
                return

    def _advance(self, run: GuestRun, slices: int) -> None:
        """Poll a guest until it waits for something outside, ends, or has had its share."""
        fiber = run.fiber
        if fiber is None:
            return
        end = 0.0
        while True:
            try:
                state = fiber.poll()
            except EngineFailure:
                self._fail_internal(run, "the guest cannot be run")
                return
            if run.debt >= FUEL_SLICE and not self._settle(run, fiber):
                return
            if state is FiberState.WAITING:
                if run.job is None:
                    return
                job, run.job = run.job, None
                try:
                    value = job()
                except Exception as error:
                    value = run.failed(run.last_call, error)
                fiber.resume(value)
            elif state is FiberState.DONE:
                self._returned(run, fiber.result)
                return
            elif state is FiberState.TRAPPED:
                self._trapped(run, fiber)
                return
            slices -= 1
            if slices > 0:
                now = self.clock()
                end = end or now + WOKEN_SECONDS
                if now < end:
                    continue
            self._enqueue(run, self._spinning)
            return

    def _settle(self, run: GuestRun, fiber: Fiber) -> bool:
        """Take the fuel owed for host calls; False if that was the last of it."""
        if fiber.trap is not None or fiber.exit_code is not None:
            return True
        left = fiber.fuel - run.debt
        if left <= 0:
            self._fail_fuel(run)
            return False
        fiber.fuel, run.debt = left, 0
        return True

    def _enqueue(self, run: GuestRun, queue: deque[GuestRun]) -> None:
        if not run.queued:
            run.queued = True
            queue.append(run)

    def _answer(self, run: GuestRun, work: Callable[[], int | None], queue: deque[GuestRun]) -> None:
        """Resume a waiting guest with what ``work`` gives, unless that is None."""
        try:
            value = work()
        except Exception as error:
            value = run.failed(run.last_call, error)
        if value is not None and run.fiber is not None:
            run.fiber.resume(value)
            self._enqueue(run, queue)

    def _wake(self, run: GuestRun, *, late: bool) -> None:
        on_wake = run.on_wake
        if on_wake is not None:
            self._answer(run, lambda: on_wake(late), self._ready)

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
        self._timer_number = number = self._timer_number + 1
        run.timer = number
        heapq.heappush(self._timers, (when, number, run))
        if len(self._timers) > 64 + 4 * len(self._runs):
            # Entries of finished runs and past waits: drop them once they are the most.
            self._timers = [entry for entry in self._timers if entry[2].timer == entry[1]]
            heapq.heapify(self._timers)

    def _expire(self, now: float) -> None:
        while self._timers:
            when, number, run = self._timers[0]
            stale = run.timer != number
            if not stale and when > now:
                return
            heapq.heappop(self._timers)
            if stale:
                continue
            if now >= run.deadline:
                limit = run.start.limits.wall_seconds
                used = round(now - run.started, 3)
                text = f"the run took longer than its {limit:g} seconds"
                self._fail(run, "wall_time_exceeded", text, {"limit": limit, "used": used})
                continue
            self._wake(run, late=True)
            self._set_timer(run, run.deadline)

    # --- ends -------------------------------------------------------------------------------------

    def _returned(self, run: GuestRun, code: int) -> None:
        if run.closing is not None:
            self._finish(run, "cancelled", code, None)
            return
        if code >= 0:
            self._finish(run, "complete", code, None)
            return
        if code == ErrorCode.LIMIT and run.limit is not None and run.limit[0] in _LIMIT_CODES:
            name, limit, used = run.limit
            self._fail(run, _LIMIT_CODES[name], run.last_error, {"limit": limit, "used": used}, code)
            return
        name = ErrorCode(code).name.lower() if code in _ERROR_NUMBERS else "unknown"
        message = f"the guest returned {code} ({name})"
        if run.last_error:
            message += f"; its last error: {run.last_error}"
        self._fail(run, "guest_error", message, {"code": code, "name": name, "last_error": run.last_error}, code)

    def _trapped(self, run: GuestRun, fiber: Fiber) -> None:
        trap = fiber.trap or TrapInfo("unknown", "the guest died")
        limits = run.start.limits
        if fiber.host_failed:
            self._fail_internal(run, f"a host function failed ({run.last_call})")
        elif trap.kind == "out_of_fuel":
            self._fail_fuel(run)
        elif trap.kind == "memory_limit":
            text = f"the guest needs more memory than its {limits.memory_bytes:,} bytes: {trap.message}"
            self._fail(run, "memory_limit", text, {"limit": limits.memory_bytes, "used": fiber.memory_bytes})
        else:
            self._fail(
                run,
                "guest_trap",
                f"the guest trapped: {trap.message}",
                {
                    "trap": trap.kind,
                    "backtrace": list(trap.frames),
                    "last_call": run.last_call,
                    "last_error": run.last_error,
                    "memory_bytes": fiber.memory_bytes,
                    "memory_limit": limits.memory_bytes,
                },
            )

    def _fail_fuel(self, run: GuestRun) -> None:
        limit = run.start.limits.fuel
        run.debt = max(run.debt, 0)
        self._fail(run, "fuel_exhausted", f"the run burnt its {limit:,} units of fuel", {"limit": limit, "used": limit})

    def _fail_internal(self, run: GuestRun, text: str) -> None:
        correlation = secrets.token_hex(6)
        log.error("run %d: %s [%s]", run.start.run, text, correlation, exc_info=sys.exc_info()[0] is not None)
        message = f"{text}; the host's log has the cause under {correlation}"
        self._fail(run, "internal", message, {"correlation": correlation})

    def _fail(self, run: GuestRun, code: str, message: str, details: dict[str, object], result: int = 0) -> None:
        if run.closing is not None:
            self._finish(run, "cancelled", 0, None)
        else:
            self._finish(run, "error", result, ErrorInfo(code, message, details))

    def _finish(self, run: GuestRun, outcome: str, code: int, error: ErrorInfo | None) -> None:
        """The only way out: free all that the run has, here and in the engine, and say how it ended."""
        number = run.start.run
        del self._runs[number]
        for call in run.calls:
            self._calls.pop(call, None)
        for call in run.store_calls:
            del self._store_calls[call]
        run.timer = 0
        run.on_wake = run.job = None
        wasi.flush_lines(run)
        usage, fiber = run.usage, run.fiber
        if fiber is not None:
            limit = run.start.limits.fuel
            usage.fuel = min(limit, limit - fiber.fuel + run.debt)
            usage.memory_bytes = fiber.memory_bytes
            run.fiber = None
            fiber.close()
        usage.wall_seconds = self.clock() - run.started
        run.calls.clear()
        run.store_calls.clear()
        run.sequences.clear()
        run.streams.clear()
        run.inbox.clear()
        self.ops.append(EndRun(number))
        self.events.append(RunFinished(number, outcome, code, error, usage))

    def _module(self, artifact: str) -> LinkedModule:
        module = self._modules.get(artifact)
        if module is None:
            module = self._modules[artifact] = self._linker.load(Path(artifact))
            if len(self._modules) > MODULES_KEPT:
                self._modules.popitem(last=False)[1].close()
        else:
            self._modules.move_to_end(artifact)
        return module


def tune_collector() -> None:
    """Make the garbage collector rare, for a process that only runs guests.

    Suspended guests are thousands of live objects, and a turn makes a few more for each: with the
    default thresholds they were walked again and again, for 2 us of every host call.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


_LIMIT_CODES = {"tokens": "token_limit", "output_bytes": "output_limit"}
_ERROR_NUMBERS = frozenset(int(code) for code in ErrorCode)
