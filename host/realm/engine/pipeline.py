"""Steps on their way through the device: what is launched next, and what becomes of what was drawn.

The scheduler and the lanes each have their sequences; the pipeline moves them between the two. A sequence
gets a lane when a call is launched that may go on (:func:`~realm.engine.launching.may_go_on`), and leaves
it (:meth:`Pipeline.park`) when its guest does anything else, when its tenant or the pool is short of pages,
or when more calls wait than fit a step: then the scheduler decides, and nobody runs ahead.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from realm.engine.answers import Answers
from realm.engine.batch import Flags, Longs, Runner, StepResult
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.lanes import Lanes, Rows
from realm.engine.launching import InFlight, Single, build_batch, may_go_on, on_host
from realm.engine.page_tables import StepPlan
from realm.engine.sampling import draw
from realm.engine.scheduler import COSTLY_ROWS, Scheduler
from realm.engine.sequence import Call, Sequence, Tenant
from realm.engine.trace import Trace
from realm.guests.abi import ErrorCode
from realm.messages import LimitMet

if TYPE_CHECKING:
    from realm.engine.adapter import Adapter

log = logging.getLogger("realm.engine")

PARKED_STEPS = 16
"""Steps for which nobody (or a tenant) gets a lane after pages or places had run out."""
LEAST_FLATNESS = 0.001
"""Draws as rarely flat as this are not followed any more."""
RESTING_STEPS = 8
"""A guest that has not asked for so many steps gives its lane up for another's adapter."""
UNUSED_STEPS = 32
"""A lane whose guest has not asked for so many steps is given to another sequence that wants one."""


class Pipeline:
    """Launched steps, lanes, and what passes between them and the scheduler.

    Attributes:
        lanes: sequences that go on. in_flight: steps that are launched and not settled.
        steps, rows, largest, shared: steps so far, their rows, the largest, and those with two tenants or more.
        busy: seconds that the device was at work. step_seconds: the same of the last step.
        trace: spans of plan, launch, settle and of the device's steps.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        answers: Answers,
        *,
        run_ahead: int,
        clock: Callable[[], float],
    ) -> None:
        """``run_ahead``: most rows of a sequence launched before its guest asks; 0 gives nobody a lane."""
        config = runner.config
        self.lanes = Lanes(runner.lanes // 2, -(-config.context_length // PAGE_SIZE), config.context_length)
        self.steps = self.rows = self.largest = self.shared = 0
        self.busy = self.step_seconds = 0.0
        self.trace: Trace | None = None
        self._runner = runner
        self._scheduler = scheduler
        self._answers = answers
        self._depth = run_ahead
        self._clock = clock
        self._launched: deque[InFlight] = deque()
        self._done_at = 0.0
        self._parked_until = 0
        self._flatness = False
        scheduler.on_remove = self._forget

    @property
    def in_flight(self) -> int:
        return len(self._launched)

    @property
    def due(self) -> bool:
        """Whether a guest waits for something that is not launched."""
        return self._scheduler.pending > 0 or self.lanes.due() > 0

    @property
    def may_run_ahead(self) -> bool:
        """Whether :meth:`launch` might find something although nobody waits for it."""
        return self.lanes.used > 0 and self.lanes.may_run_ahead(self._depth)

    @property
    def claims_can_wait(self) -> bool:
        """Whether taking in calls that go on would change nothing before the oldest step in flight is done."""
        return len(self._launched) > 0 and not self._launched[0].handle.done() and not self.lanes.lagging()

    def outlook(self) -> tuple[int, Longs]:
        """How many rows a step would have now, about, and the workers of sequences that have run ahead as
        far as they may, which it would not have: one for each."""
        ready, held = self.lanes.held(self._depth)
        return self._scheduler.pending + ready, held

    # --- launching ------------------------------------------------------------------------------

    def launch(self) -> bool:
        """Launch one step with all that can be in it; False if there is nothing."""
        began = time.perf_counter()
        scheduler, lanes = self._scheduler, self.lanes
        scheduler.pool.now = self._clock()
        while True:
            used = lanes.used
            plan = self._plan()
            rows = self._lane_rows(plan)
            if plan.parts or len(rows):
                break
            if not scheduler.pending or lanes.used == used:
                return False
            # Sequences have just given up their lanes for pages: now the scheduler has them, and their pages.
        planned = time.perf_counter()
        placed = self._commit(plan)
        batch, ticket, singles = build_batch(lanes, rows, plan, placed)
        served = lanes.by_tenant(rows)
        for tenant, count in served:
            scheduler.served(tenant, count)
        lanes.launch(rows)
        handle = self._runner.launch(batch)
        adapters = {part.sequence.adapter for part in plan.parts if part.sequence.adapter is not None}
        self._launched.append(InFlight(handle, ticket, singles, planned, adapters))
        scheduler.seal(plan)
        self._count(plan, served, len(rows))
        if self.trace is not None:
            self.trace.span("plan", began, planned, len(plan.parts) + len(rows))
            self.trace.span("launch", planned, time.perf_counter(), batch.outputs)
        return True

    def _plan(self) -> StepPlan:
        """What the scheduler adds to the step. Lanes are given up where they are in its way."""
        scheduler, lanes = self._scheduler, self.lanes
        if not scheduler.pending:
            return StepPlan()
        if lanes.due() + max(1, scheduler.pending_decodes) > scheduler.max_sequences:
            self._make_places()
        plan = scheduler.plan(lanes.due())
        if lanes.full and plan.parts:
            self._free_unused()
        if lanes.used:
            if plan.full:
                self._park_all()
            else:
                for tenant in plan.short:
                    self._park_tenant(tenant)
        return plan

    def _make_places(self) -> None:
        """Sequences without a lane must find places in the step: else those with one would keep theirs for ever.

        Whoever has more than its share of them leaves it to the scheduler; others keep their lanes.
        """
        scheduler, lanes = self._scheduler, self.lanes
        holders = lanes.by_tenant(np.flatnonzero(lanes.active))
        share = scheduler.max_sequences // max(1, len({tenant for tenant, _ in holders} | set(scheduler.waiting)))
        for tenant, count in holders:
            if count + len(tenant.decodes) > share:
                self._park_tenant(tenant)
        if lanes.due() >= scheduler.max_sequences:
            self._park_all()

    def _lane_rows(self, plan: StepPlan) -> Longs:
        """Lanes whose next row is in the step beside the scheduler's plan, with a page for it."""
        lanes = self.lanes
        if not lanes.used:
            return np.zeros(0, dtype=np.int64)
        allowed = [tenant is not None and tenant.ahead_credit >= 1 for tenant in lanes.tenants]
        due, ahead = lanes.ready(self._depth, allowed)
        places = self._scheduler.max_sequences - len(plan.parts) - len(due)
        rows = np.concatenate((due, ahead[: max(0, places)]))
        lacking = rows[lanes.base[rows] + lanes.launched[rows] >= lanes.room[rows]]
        if not len(lacking):
            return rows
        without: set[int] = set()
        for lane in lacking.tolist():
            sequence = lanes.sequences[lane]
            assert sequence is not None
            page = self._scheduler.tables.take_page(sequence)
            if page is not None:
                lanes.add_page(lane, page)
                plan.fresh.append(page)
                continue
            without.add(lane)
            if lanes.claimed[lane] > lanes.launched[lane]:
                # Its guest waits: the scheduler makes room, or says why there is none.
                self.park(sequence)
        return rows if not without else np.array([lane for lane in rows.tolist() if lane not in without], np.int64)

    def _commit(self, plan: StepPlan) -> list[int]:
        """The plan is launched; gives those of its sequences a lane that may go on. Returns each part's, or -1."""
        self._scheduler.commit(plan)
        return [self._place(part.sequence) if part.finishes else -1 for part in plan.parts]

    def _place(self, sequence: Sequence) -> int:
        """A lane for a sequence whose call was just launched, or -1."""
        call, tenant = sequence.call, sequence.tenant
        assert call is not None
        step = self._scheduler.step
        if not self._depth or not may_go_on(call) or step < max(self._parked_until, tenant.parked_until):
            return -1
        if sequence.adapter is not None and sequence.adapter.draining:
            return -1  # a lane would keep it in its slot for as long as the guest goes on
        if call.filtered and tenant.flatness * self._scheduler.max_sequences > COSTLY_ROWS:
            return -1
        if self.lanes.full:
            return -1
        sequence.call = None
        tenant.idle.pop(sequence.id, None)
        tenant.stats.cached_tokens += call.cached
        return self.lanes.attach(sequence, call, sequence.computed - 1, step)

    def _free_unused(self) -> None:
        """Take the lanes of guests that have not asked for long. Before rows are chosen: none of them is one."""
        lanes = self.lanes
        unused = lanes.active & (lanes.claimed == lanes.answered) & (lanes.asked < self._scheduler.step - UNUSED_STEPS)
        for lane in np.flatnonzero(unused).tolist():
            sequence = lanes.sequences[lane]
            assert sequence is not None
            self.park(sequence)

    def _count(self, plan: StepPlan, served: list[tuple[Tenant, int]], rows: int) -> None:
        self.steps += 1
        total = len(plan.parts) + rows
        self.rows += total
        self.largest = max(self.largest, total)
        tenants = {tenant for tenant, _ in served}
        tenants.update(part.sequence.tenant for part in plan.parts)
        self.shared += len(tenants) > 1
        for part in plan.parts:
            stats = part.sequence.tenant.stats
            if part.count == 1:
                stats.decode_tokens += 1
            else:
                stats.prefill_tokens += part.count

    # --- lanes and the scheduler ----------------------------------------------------------------

    def claim(self, workers: Longs, claims: Rows, now: float) -> Flags:
        """Take in calls of guests that go on; returns which of them have to be looked at one by one.

        Args:
            workers: who sent each of ``claims``.
        """
        lanes = self.lanes
        places, good = lanes.check_claims(workers, claims)
        for tenant, count in lanes.by_tenant(places[good]):
            if tenant.has_tokens(count, now):
                tenant.spend(count, now)
                tenant.went_on(count)
            else:
                good &= np.array([lanes.tenants[slot] is not tenant for slot in lanes.slot[places].tolist()])
        claimed = places[good]
        if len(claimed):
            ahead, answerable, full = lanes.claim(claimed, claims["call"][good], self._scheduler.step)
            for tenant, count in lanes.by_tenant(ahead):
                tenant.stats.ahead_tokens += count
            for lane in full.tolist():
                sequence = lanes.sequences[lane]
                assert sequence is not None
                self._scheduler.append(sequence, lanes.flush(lane))
            self._answer_drawn(answerable)
        return ~good

    def park(self, sequence: Sequence) -> None:
        """Take a sequence out of its lane. If its guest waits for a row, the scheduler gets it as a call."""
        lanes, lane = self.lanes, sequence.lane
        self._scheduler.append(sequence, lanes.flush(lane))
        waiting = lanes.pending(lane)
        claimed = int(lanes.claimed[lane])
        number, count, cached = lanes.call(lane)
        p = sequence.sampling
        assert p is not None
        if p.number >= 0:
            p = sequence.sampling = msgspec.structs.replace(p, number=p.number + claimed - 1)
        sequence.computed = int(lanes.base[lane]) + claimed - waiting
        self._leave(sequence)
        self._scheduler.park(sequence)
        if waiting:
            # What is computed again was counted when it was asked for.
            stats = sequence.tenant.stats
            stats.cached_tokens -= cached
            stats.decode_tokens -= claimed > 1
            self.resubmit(sequence, Call(number, 0, count, p, False, cached=cached, matched=True))

    def _leave(self, sequence: Sequence) -> None:
        lanes, lane = self.lanes, sequence.lane
        wasted = int(lanes.launched[lane] - lanes.claimed[lane])
        if wasted > 0:
            sequence.tenant.wasted(wasted)
        lanes.detach(lane)

    def _forget(self, sequence: Sequence) -> None:
        if sequence.lane >= 0:
            self._leave(sequence)

    def resubmit(self, sequence: Sequence, call: Call) -> None:
        """Give the scheduler a call whose tokens are counted already, or fail it if it does not fit any more."""
        met = self.no_room(sequence.tenant, len(sequence.tokens))
        if met is None:
            self._scheduler.resubmit(sequence, call)
            return
        self._scheduler.cancel(sequence)
        self._scheduler.truncate(sequence, len(sequence.tokens) - call.count)
        if sequence.tenant.bucket is not None:
            sequence.tenant.spend(-call.count, self._clock())
        self.refuse(sequence.worker, call.number, met, len(sequence.tokens) + call.count)

    def no_room(self, tenant: Tenant, length: int) -> LimitMet | ErrorCode | None:
        """Why a sequence of so many tokens can never be computed, if it cannot."""
        pages = -(-length // PAGE_SIZE)
        if pages > self._scheduler.pool.total:
            return ErrorCode.OUT_OF_MEMORY
        return tenant.over_pages(pages)

    def refuse(self, worker: int, call: int, why: LimitMet | ErrorCode, length: int) -> None:
        """Fail a call for what :meth:`no_room` says."""
        if isinstance(why, LimitMet):
            self._answers.fail_limit(worker, call, why)
        else:
            total = self._scheduler.pool.total * PAGE_SIZE
            message = f"the sequence would have {length:,} tokens; the KV cache holds {total:,}"
            self._answers.fail(worker, call, why, message)

    # --- adapters -------------------------------------------------------------------------------

    def adapters_in_use(self) -> dict[Adapter, bool]:
        """Adapters of steps in flight and of lanes; True for those of lanes whose guests have asked for nothing
        lately, only."""
        lanes, scheduler = self.lanes, self._scheduler
        resting = not self._launched and not self.due
        used: dict[Adapter, bool] = {adapter: False for step in self._launched for adapter in step.adapters}
        for lane, sequence in enumerate(lanes.sequences):
            if sequence is not None and (adapter := sequence.adapter) is not None:
                late = resting or bool(lanes.asked[lane] < scheduler.step - RESTING_STEPS)
                used[adapter] = used.get(adapter, True) and late and not lanes.pending(lane)
        return used

    def leave_lanes(self, adapter: Adapter) -> None:
        """Take the sequences with an adapter out of their lanes."""
        for sequence in [s for s in self.lanes.sequences if s is not None and s.adapter is adapter]:
            self.park(sequence)

    def park_tenant(self, tenant: Tenant) -> None:
        """Take all sequences of a tenant out of their lanes."""
        for lane in self.lanes.of(tenant):
            sequence = self.lanes.sequences[lane]
            assert sequence is not None
            self.park(sequence)

    def _park_tenant(self, tenant: Tenant) -> None:
        tenant.parked_until = self._scheduler.step + PARKED_STEPS
        self.park_tenant(tenant)

    def _park_all(self) -> None:
        self._parked_until = self._scheduler.step + PARKED_STEPS
        for sequence in [sequence for sequence in self.lanes.sequences if sequence is not None]:
            self.park(sequence)

    # --- settling -------------------------------------------------------------------------------

    def settle(self, wait: bool) -> bool:
        """Take in the oldest launched step if it is done, or wait for it; False if none was taken in."""
        if not self._launched or not (wait or self._launched[0].handle.done()):
            return False
        step = self._launched.popleft()
        result = step.handle.wait()
        done = time.perf_counter()
        self.busy += result.seconds
        self.step_seconds = result.seconds
        for single in step.singles:
            self._settle_single(single, result)
        self._answer_drawn(self.lanes.settle(step.ticket, result.tokens, result.logprobs))
        self._note_flat(step, result)
        if self.trace is not None:
            began = max(self._done_at, done - result.seconds)
            self.trace.span("gpu/step", began, done, len(result.tokens))
            self.trace.span("settle", done, time.perf_counter(), len(result.tokens))
        self._done_at = done
        return True

    def _answer_drawn(self, lanes: Longs) -> None:
        """Answer the calls of lanes that have drawn their tokens; those that could not be drawn fail."""
        if not len(lanes):
            return
        failed = self.lanes.drawn(lanes) < 0
        if failed.any():
            for lane in lanes[failed].tolist():
                sequence = self.lanes.sequences[lane]
                assert sequence is not None
                self.park(sequence)
                if (call := sequence.call) is not None:
                    self._scheduler.cancel(sequence)
                    self._fail_draw(sequence, call)
            lanes = lanes[~failed]
        self._answers.add_rows(*self.lanes.answer(lanes))

    def _fail_draw(self, sequence: Sequence, call: Call) -> None:
        """A call that fails leaves its sequence as it was before."""
        self._scheduler.truncate(sequence, len(sequence.tokens) - call.count)
        message = "the next token could not be drawn; the engine's log says why"
        self._answers.fail(sequence.worker, call.number, ErrorCode.INTERNAL, message)

    def _settle_single(self, single: Single, result: StepResult) -> None:
        sequence, call = single.sequence, single.call
        if sequence.call is not call:
            return  # forgotten, or cancelled, while the step was in flight
        sequence.call = None
        sequence.tenant.stats.cached_tokens += call.cached
        logits: np.ndarray[Any, Any] | None = None
        if single.logits >= 0:
            assert result.logits is not None
            logits = result.logits[single.logits]
        token, logprob = -1, float("nan")
        if (p := call.sampling) is not None:
            if on_host(p):
                assert logits is not None
                token, logprob = self._draw(sequence, call, logits)
            else:
                token, logprob = int(result.tokens[single.row]), float(result.logprobs[single.row])
            if token < 0:
                self._fail_draw(sequence, call)
                return
        kept = logits.tobytes() if call.want_logits and logits is not None else None
        self._answers.done(sequence.worker, call.number, token, logprob, call.cached, kept)

    def _draw(self, sequence: Sequence, call: Call, logits: np.ndarray[Any, Any]) -> tuple[int, float]:
        """Draw a token here: with a penalty or a bias."""
        p = call.sampling
        assert p is not None
        history = np.frombuffer(sequence.tokens, dtype=np.uint32).copy() if p.repetition_penalty != 1 else None
        try:
            drawn = draw(torch.from_numpy(logits).unsqueeze(0), [p], [history])
        except Exception:
            # Checked parameters do not get here. If some do, they fail their own call, not the process.
            # Not the whole of them are logged: mask and biases are a tenant's, and long.
            chosen = (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty)
            log.exception("a draw with (temperature, top_k, top_p, min_p, penalty) %r failed", chosen)
            return -1, float("nan")
        if call.filtered:
            self._scheduler.drawn(sequence.tenant, 1, len(drawn.sorted_rows))
        return drawn.tokens[0], drawn.logprobs[0]

    def _note_flat(self, step: InFlight, result: StepResult) -> None:
        """Tell the scheduler which tenants' draws cost much, and keep their rows from others' steps."""
        if not result.flat and not self._flatness:
            return
        flat = set(result.flat)
        counts: dict[Tenant, list[int]] = {}
        for single in step.singles:
            p = single.call.sampling
            if single.call.filtered and p is not None and not on_host(p):
                _add(counts, single.sequence.tenant, single.row in flat)
        lanes, rows = self.lanes, step.ticket.rows
        filtered = lanes.filtered[step.ticket.lanes] & lanes.active[step.ticket.lanes]
        if filtered.any():
            for lane, row in zip(step.ticket.lanes[filtered].tolist(), rows[filtered].tolist(), strict=True):
                tenant = lanes.tenants[int(lanes.slot[lane])]
                assert tenant is not None
                _add(counts, tenant, row in flat)
        for tenant, (count, costly) in counts.items():
            self._scheduler.drawn(tenant, count, costly)
            if costly and tenant.flatness * self._scheduler.max_sequences > COSTLY_ROWS:
                self.park_tenant(tenant)
        self._flatness = any(tenant.flatness > LEAST_FLATNESS for tenant in counts)


def _add(counts: dict[Tenant, list[int]], tenant: Tenant, costly: bool) -> None:
    count = counts.setdefault(tenant, [0, 0])
    count[0] += 1
    count[1] += costly
