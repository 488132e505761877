"""Slices: which answered guest runs when within a turn, and what happens while one runs.

How long a turn takes is bounded, whatever the guests do: see :data:`TENANT_SECONDS` and its company.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from types import GeneratorType
from typing import TYPE_CHECKING

from realm.guests import reports
from realm.guests.deferral import OFFLOAD_FUEL, Job
from realm.guests.fiber_types import FUEL_SLICE, FiberState
from realm.guests.fibers import Fiber
from realm.guests.helper import Ticket
from realm.guests.run import GuestRun
from realm.guests.tenants import LONG, SPINNING, WOKEN, Tenant

if TYPE_CHECKING:
    from realm.guests.runtime import GuestRuntime

TENANT_SECONDS = 0.002
"""How long one tenant's answered guests may run in a turn, besides :data:`SHORT_SECONDS` for each."""
ANSWERED_SECONDS = 0.008
"""The same for all tenants together."""
SHORT_SECONDS = 0.00005
VISIT_SECONDS = 0.00025
"""After this, or a whole slice of one guest, the next tenant's answered guests come first."""
VISIT_GUESTS = 8
"""So many guests run between two looks at the clock."""
WOKEN_SLICES = 16
"""Slices for which an answered guest goes before those that only compute."""
TURN_SECONDS = 0.001
TURN_SLICES = 16
"""How much one turn gives to the others before the links are looked at again."""
OTHERS_SECONDS = 0.004
"""After this time without a slice the others get one also in a turn with answered guests."""
DEAR_SECONDS = 0.0004
"""A slice of ordinary code takes 0.26 ms. What takes longer than this (strides over much memory; touching
fresh pages costs 1.4 us for 12 units of fuel, so that 64 MiB are one slice of 22 ms) is charged by time, ..."""
FUEL_A_SECOND = FUEL_SLICE / 0.00026
"""... at what ordinary code burns in that time: cheap fuel must not buy more than a tenant's rate."""


class Slices:
    """Gives the guests of a runtime their slices.

    Attributes:
        jobs: what the helper has, and what is to be done with it.
    """

    def __init__(self, runtime: GuestRuntime) -> None:
        self._runtime = runtime
        self._schedule = runtime.schedule
        self.jobs: dict[Ticket, Callable[[Ticket], None]] = {}
        self._others_at = 0.0

    def answered(self, now: float) -> None:
        """One slice for each answered guest, then more for those that need it, then one for the others."""
        schedule, clock = self._schedule, self._runtime.clock
        tenants = schedule.woken.tenants
        began = at = clock()
        served = 0
        spent: dict[Tenant, tuple[float, int]] = {}
        aside: list[Tenant] = []
        try:
            while tenants:
                tenant = tenants[0]
                if not schedule.may_run(tenant, now):
                    continue
                queue = tenant.queues[WOKEN]
                count = self._visit(queue, at)
                served += count
                was, at = at, clock()
                seconds, guests = spent.get(tenant, (0.0, 0))
                seconds, guests = seconds + at - was, guests + count
                spent[tenant] = seconds, guests
                # Ending runs does not move other guests, so the tenant is still the first.
                tenants.popleft()
                if queue:
                    over = seconds > TENANT_SECONDS + guests * SHORT_SECONDS
                    (aside if over else tenants).append(tenant)
                if at - began > ANSWERED_SECONDS + served * SHORT_SECONDS:
                    break
        finally:
            tenants.extend(aside)
            self._charge_dear(spent)
        end = began + ANSWERED_SECONDS + served * SHORT_SECONDS
        while schedule.long and at < end:
            if schedule.may_run(schedule.long.tenants[0], now):
                self._slice(schedule.long.pop())
            at = clock()
        if at - self._others_at >= OTHERS_SECONDS:
            self._one_of_each(now)

    def _charge_dear(self, spent: dict[Tenant, tuple[float, int]]) -> None:
        """Tenants whose visits took long pay for it.

        By wall time, which may count what other processes took: asking for processor time costs 0.5 us,
        too much for every turn, and a tenant of short turns is far from its rate.
        """
        for tenant, (seconds, guests) in spent.items():
            dear = seconds - guests * SHORT_SECONDS - DEAR_SECONDS
            if dear > 0:
                tenant.bucket.spend(dear * FUEL_A_SECOND, self._runtime.clock())

    def _visit(self, queue: deque[GuestRun], began: float) -> int:
        """Run a tenant's answered guests until one takes a whole slice or the time is over; how many."""
        served = 0
        while queue:
            run = queue.popleft()
            run.place = -1
            served += 1
            if self.advance(run):
                self._schedule.push(run, LONG)
                break
            if not served % VISIT_GUESTS and self._runtime.clock() - began > VISIT_SECONDS:
                break
        return served

    def others(self, now: float) -> None:
        """Guests that were started or answered first, then one that spins, until the time is over."""
        end = self._runtime.clock() + TURN_SECONDS
        slices = 0
        schedule = self._schedule
        while schedule.ready or schedule.spinning:
            slices += self._one_of_each(now)
            if slices >= TURN_SLICES or self._runtime.clock() >= end:
                return

    def _one_of_each(self, now: float) -> int:
        """A slice for a guest that is ready and one for a guest that spins; how many there were."""
        slices = 0
        schedule = self._schedule
        for rotation in (schedule.ready, schedule.spinning):
            while rotation.tenants and not schedule.may_run(rotation.tenants[0], now):
                pass
            if rotation.tenants:
                run = rotation.pop()
                run.slices = 0
                self._slice(run)
                slices += 1
        self._others_at = self._runtime.clock()
        return slices

    def _slice(self, run: GuestRun) -> None:
        """One slice; if the guest wants more, it waits among those that still have some, or that spin."""
        began = self._runtime.cpu_clock()
        more = self.advance(run)
        dear = self._runtime.cpu_clock() - began - DEAR_SECONDS
        if dear > 0:
            run.tenant.bucket.spend(dear * FUEL_A_SECOND, self._runtime.clock())
        if run.closing is not None:
            self._runtime.had_last_slice(run)
        elif more:
            run.slices -= 1
            self._schedule.push(run, LONG if run.slices > 0 else SPINNING)

    def advance(self, run: GuestRun) -> bool:
        """Poll a guest until it waits for something outside or ends (False) or has had a slice (True)."""
        fiber = run.fiber
        if fiber is None:
            return False
        self._runtime.guard.admit(run)
        try:
            while True:
                state = fiber.poll()
                # Small jobs and calls add up; so many of them are a slice like any other.
                over = run.debt >= FUEL_SLICE
                if over and not self._account(run, fiber):
                    return False
                if state is FiberState.WAITING:
                    if run.job is None or not self._work(run, fiber):
                        if run.held_output and not run.calls:
                            # It waits for something that may depend on what it emitted.
                            self._runtime.outputs.flush(run)
                        return run.job is not None
                    if not over:
                        continue
                elif state is FiberState.DONE:
                    self._runtime.returned(run, fiber.result)
                    return False
                elif state is FiberState.TRAPPED:
                    self._runtime.trapped(run, fiber)
                    return False
                return self._account(run, fiber)
        except Exception as error:
            # Whatever it is, and be it a defect or a lack of memory: it is this run's end alone.
            self._runtime.fail_internal(run, "the guest cannot be run", error)
            return False

    def _account(self, run: GuestRun, fiber: Fiber) -> bool:
        """Take the fuel owed for host calls, and charge the tenant's rate; False if it was the last.

        Reading fuel costs as much as a short turn's bookkeeping, so this is done once a slice: a guest
        gives way each time it has burnt one, however many waits it had meanwhile.
        """
        if fiber.trap is not None or fiber.exit_code is not None:
            return True
        left = fiber.fuel - run.debt
        run.tenant.bucket.spend(run.counted - left, self._runtime.clock())
        run.counted = left
        if left <= 0:
            self._runtime.fail(run, reports.fuel(run))
            return False
        if run.debt:
            fiber.fuel, run.debt = left, 0
        return True

    # --- jobs -------------------------------------------------------------------------------------

    def _work(self, run: GuestRun, fiber: Fiber) -> bool:
        """Do what a host function left to be done, or a step of it; True if the guest can go on."""
        job = run.job
        value: int | None
        try:
            if isinstance(job, Job):
                run.job = None
                if job.fuel > OFFLOAD_FUEL:
                    run.ticket = ticket = self._runtime.helper.submit(run.tenant.name, job.work)
                    self.jobs[ticket] = partial(self._worked, run, job)
                    return False
                value = job.finish(self._runtime.guard.around(job.work))
            else:
                assert isinstance(job, GeneratorType)
                try:
                    next(job)
                    return False
                except StopIteration as over:
                    run.job, value = None, over.value
        except Exception as error:
            run.job, value = None, run.failed(run.last_call, error)
        if value is None:
            return False
        fiber.resume(value)
        return True

    def collect(self) -> None:
        """Take in what the helper has done; what nobody waits for any more is dropped."""
        for ticket in self._runtime.helper.collect():
            done = self.jobs.pop(ticket, None)
            if done is not None:
                done(ticket)

    def _worked(self, run: GuestRun, job: Job, ticket: Ticket) -> None:
        run.ticket = None
        run.slices = WOKEN_SLICES

        def finish() -> int:
            if ticket.error is not None:
                raise ticket.error
            return job.finish(ticket.value)

        self._runtime.answer(run, finish, WOKEN)
