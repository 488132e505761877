"""Which sequences compute how many tokens in the next step, and in which pages.

Sans-I/O and without torch: calls go in, a :class:`StepPlan` of plain data comes out, and
:meth:`Scheduler.commit` says that it is launched. From then on it counts as computed, because steps are
carried out in the order of their launches.

Policy:

* *Continuous batching, decode first.* Every pending call with one token left is in the step, then
  prompts in chunks under a token budget (chunked prefill; Agrawal et al., Sarathi-Serve, 2024), so
  that a long prompt never stalls the others.
* *Fairness.* Prompts wait in the order of their tenants' virtual token counters (Sheng et al., VTC,
  OSDI 2024): a token of prefill counts 1, a decoded one 2; a tenant that returns from idleness is
  lifted to the least counter of the active ones, so neither idling nor more guests buy a larger share.
* *Preemption by recomputation.* When pages run out: cached pages are given away first, then idle
  sequences lose their pages (of the tenant that holds most, least recently used first), then younger
  pending ones. The oldest pending sequence can always take every other's pages, and one that got none
  goes first in the next step, so each makes progress; only a sequence that does not fit alone fails.
* *Each tenant within its pages.* A tenant that holds ``kv_pages`` makes room by the same rule among its
  own sequences only: no other tenant loses a page because of it.
* *Flat draws in small numbers.* A row whose distribution is flat costs 0.2 ms to draw from, and a tenant
  can make all its rows flat. In a step shared with others it gets only :data:`COSTLY_ROWS` of them; the
  rest wait for the next step. Which step computes a row changes nothing in it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING

from realm.engine.kv_cache import PAGE_SIZE, PageHolder, PagePool
from realm.engine.page_tables import PageTables, Part, StepPlan
from realm.engine.sequence import SEQUENCE_BYTES, TOKEN_BYTES, Call, Sequence, Tenant
from realm.engine.victims import by_age

if TYPE_CHECKING:
    from realm.engine.adapter import Adapter

PREFILL_WEIGHT = 1.0
DECODE_WEIGHT = 2.0
IDLE_STEPS = 8
"""A tenant not served for so many steps is idle; between two tokens of a guest there are one or two."""

MAX_FAILURES = 8
"""Sequences of one tenant that may fail to get pages in a plan before it is left alone for this step."""

COSTLY_ROWS = 32
"""Flat rows that one tenant may draw in a step that it shares: some 7 ms of a vocabulary of 49,152."""
FLAT_WEIGHT = 1.0
"""What a flat row adds to its tenant's counter: it takes about half as long as a decoded token."""
FLATNESS_ROWS = 1024
"""Filtered rows after which a tenant's flat ones are forgotten."""


class Scheduler:
    """Pending calls and page tables. One thread owns it.

    Attributes:
        pool: the pages. tables: which sequence has which.
        bytes: memory of all sequences, as :data:`~realm.engine.sequence.BYTES_PER_PAGE` counts it.
        clock: seconds; tells how long a tenant has not called.
        step: number of the next step.
        on_remove: told of each sequence before it is forgotten.
        gate: asked for each sequence with a call whether steps may compute it; if not, the call is held, and whoever
            said so calls :meth:`release`.
    """

    def __init__(
        self,
        pages: int,
        *,
        token_budget: int,
        max_sequences: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``token_budget``: most tokens a step; ``max_sequences``: most sequences a step."""
        self.pool = PagePool(pages)
        self.tables = PageTables(self.pool, self._requeue)
        self.bytes = 0
        self.clock = clock
        self._budget = token_budget
        self.max_sequences = max_sequences
        self._sequences: dict[int, Sequence] = {}
        self._active: dict[Tenant, None] = {}
        self._pending = 0
        self._order = 0
        self.step = 0
        self.on_remove: Callable[[Sequence], None] = _nothing
        self.gate: Callable[[Sequence], bool] = _open

    # --- sequences ------------------------------------------------------------------------------

    @property
    def sequences(self) -> Iterable[Sequence]:
        return self._sequences.values()

    @property
    def pending(self) -> int:
        """Calls that are not in a step yet."""
        return self._pending

    @property
    def pending_decodes(self) -> int:
        """Those of them with one token left."""
        return sum(len(tenant.decodes) for tenant in self._active)

    @property
    def waiting(self) -> list[Tenant]:
        """Tenants with pending calls."""
        return [tenant for tenant in self._active if tenant.pending]

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.id] = sequence
        self._account(sequence.tenant, 1, len(sequence.tokens))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """``child`` gets the parent's tokens and shares its pages until one of them writes."""
        child.tokens = parent.tokens[:]
        child.computed = parent.computed
        # A failed attempt never leaves spare pages, so every page listed holds computed tokens.
        child.pages = parent.pages[:]
        child.keys = parent.keys[:]
        child.root = parent.root
        if (adapter := parent.adapter) is not None:
            child.adapter = adapter
            adapter.sequences += 1
        # A fork counts as a use: so the idle ones stay in the order of their last use.
        child.last_step = self.step - 1
        for page in child.pages:
            self.pool.retain(page)
        if child.pages:
            child.tenant.idle[child.id] = child
        self.add(child)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Drop tokens after the first ``length``. The sequence must have no pending call."""
        if length >= len(sequence.tokens):
            return
        self._account(sequence.tenant, 0, length - len(sequence.tokens))
        del sequence.tokens[length:]
        sequence.computed = min(sequence.computed, length)
        keep = -(-sequence.computed // PAGE_SIZE)
        self.tables.release_from(sequence, keep)
        del sequence.keys[sequence.computed // PAGE_SIZE :]

    def change_adapter(self, sequence: Sequence, adapter: Adapter | None) -> None:
        """All that the sequence has is computed again, with other weights. It must have no pending call."""
        if sequence.adapter is not None:
            sequence.adapter.sequences -= 1
        sequence.adapter, sequence.root, sequence.sampling = adapter, None, None
        if adapter is not None:
            adapter.sequences += 1
            # The tenant's own root is secret, so no other tenant can make this key.
            key = sequence.tenant.root[:32]
            sequence.root = hashlib.blake2b(adapter.identity, key=key, digest_size=32).digest()
        sequence.computed = 0
        sequence.keys.clear()
        self.tables.release_from(sequence, 0)
        sequence.tenant.idle.pop(sequence.id, None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and its pending call."""
        self.on_remove(sequence)
        self.cancel(sequence)
        if sequence.adapter is not None:
            sequence.adapter.sequences -= 1
        self.tables.release_from(sequence, 0)
        sequence.tenant.idle.pop(sequence.id, None)
        del self._sequences[sequence.id]
        self._account(sequence.tenant, -1, -len(sequence.tokens))

    def _account(self, tenant: Tenant, sequences: int, tokens: int) -> None:
        tenant.open += sequences
        tenant.tokens += tokens
        self.bytes += sequences * SEQUENCE_BYTES + tokens * TOKEN_BYTES

    def submit(self, sequence: Sequence, call: Call) -> None:
        """Queue a call whose tokens are already appended to the sequence; its ``order`` is given here."""
        self._account(sequence.tenant, 0, call.count + call.weight)
        self.resubmit(sequence, call)

    def resubmit(self, sequence: Sequence, call: Call) -> None:
        """Queue a call that a sequence had in its lane: its tokens are counted already."""
        tenant = sequence.tenant
        sequence.call = call
        sequence.held = not self.gate(sequence)
        if sequence.held:
            return
        call.order = self._order
        self._order += 1
        self._wake(tenant)
        tenant.idle.pop(sequence.id, None)
        sequence.queued = True
        if sequence.adapter is not None:
            sequence.adapter.queued += 1
        self._pending += 1
        self._enqueue(sequence)

    def _wake(self, tenant: Tenant) -> None:
        """A tenant that was idle is active from now on: its counter is lifted to the least of the others."""
        if self._is_idle(tenant):
            self._forget_idle()
            if self._active:
                tenant.counter = max(tenant.counter, min(other.counter for other in self._active))
            self._active[tenant] = None

    def _is_idle(self, tenant: Tenant) -> bool:
        return not tenant.pending and tenant.last_step < self.step - IDLE_STEPS

    def _forget_idle(self) -> None:
        for tenant in [tenant for tenant in self._active if self._is_idle(tenant)]:
            del self._active[tenant]

    @staticmethod
    def _enqueue(sequence: Sequence) -> None:
        tenant = sequence.tenant
        (tenant.decodes if sequence.remaining == 1 else tenant.prompts)[sequence.id] = sequence

    def _dequeue(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        if tenant.decodes.pop(sequence.id, None) is None:
            del tenant.prompts[sequence.id]
        sequence.queued = False
        if sequence.adapter is not None:
            sequence.adapter.queued -= 1
        self._pending -= 1
        self._forget_weight(sequence)
        if tenant.blocked is sequence:
            tenant.blocked = None
        if sequence.pages:
            # What was not served counts as used now, too: the idle ones stay in order.
            sequence.last_step = max(sequence.last_step, self.step - 1)
            tenant.idle[sequence.id] = sequence

    def _forget_weight(self, sequence: Sequence) -> None:
        if sequence.call is not None and sequence.call.weight:
            self._account(sequence.tenant, 0, -sequence.call.weight)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a sequence's call, if it has one. Its tokens stay appended."""
        if sequence.queued:
            self._dequeue(sequence)
        elif sequence.held:
            self._forget_weight(sequence)
            sequence.held = False
        sequence.call = None

    # --- planning -------------------------------------------------------------------------------

    def plan(self, taken: int = 0) -> StepPlan:
        """The next step; empty when nothing is pending. Pages are allocated here.

        ``taken`` rows are the lanes' already.
        """
        plan = self._plan(taken)
        if not plan.parts and self._pending:
            # The oldest with pages may stand beyond those that were looked at; now it goes first.
            again = self._plan(taken)
            again.full |= plan.full
            again.short |= plan.short
            return again
        return plan

    def _plan(self, taken: int) -> StepPlan:
        plan = StepPlan()
        budget = max(1, self._budget - taken)
        most_parts = max(1, self.max_sequences - taken)
        planned: set[int] = set()
        self.tables.victims.begin(self.step)
        self.pool.now = self.clock()
        failures: dict[Tenant, int] = {}
        ordered, urgent = self._ordered()
        costly = self._costly_rows()
        # Those that go first because they were blocked leave a token for each decode of the step.
        reserve = min(sum(len(tenant.decodes) for tenant in self._active), budget // 2) if urgent else 0
        for place, sequence in enumerate(ordered):
            if len(plan.parts) >= most_parts or budget <= 0:
                break
            tenant, call = sequence.tenant, sequence.call
            assert call is not None
            if sequence.id in planned or (call.filtered and costly.get(tenant, 1) <= 0):
                continue
            if failures and failures.get(tenant, 0) >= MAX_FAILURES and self._needs_pages(sequence):
                continue
            # An earlier part of this plan may have taken this sequence's pages: it starts over.
            most = budget - reserve if place < urgent else budget
            if most <= 0:
                continue
            count = min(self.tables.match_prefix(sequence), most)
            if not self.tables.make_room(sequence, count, plan, planned):
                failures[tenant] = failures.get(tenant, 0) + 1
                self._block(sequence, planned)
                continue
            planned.add(sequence.id)
            budget -= count
            finishes = count == sequence.remaining
            if finishes and call.filtered and tenant in costly:
                costly[tenant] -= 1
            plan.parts.append(Part(sequence, sequence.computed, count, finishes))
        return plan

    def _block(self, sequence: Sequence, planned: set[int]) -> None:
        """Let the oldest of the tenant's sequences that are stuck go first in the next plan.

        It can take the pages of all others that are not in a plan, so it always makes progress.
        """
        tenant = sequence.tenant
        self.tables.victims.add(sequence)
        holder = self.tables.victims.oldest(tenant)
        if holder is not None and holder.id not in planned and holder.arrival < sequence.arrival:
            sequence = holder
        if tenant.blocked is None or sequence.arrival < tenant.blocked.arrival:
            tenant.blocked = sequence

    def _ordered(self) -> tuple[list[Sequence], int]:
        """Blocked ones, then decodes by age, then prompts by their tenant's counter and arrival.

        Of one tenant no more are looked at than a step can take, so its queue is its own affair.
        Returns how many are blocked ones, too; they come a second time in their places.
        """
        most = self.max_sequences
        blocked: list[Sequence] = []
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        self._forget_idle()
        for tenant in self._active:
            if tenant.pending:
                tenant.seen = self.pool.now
            if tenant.blocked is not None:
                blocked.append(tenant.blocked)
                tenant.blocked = None
            decodes += islice(tenant.decodes.values(), most)
            prompts += islice(tenant.prompts.values(), most)
        blocked.sort(key=by_age)
        prompts.sort(key=_by_share)
        decodes.sort(key=_by_share if len(decodes) > most else by_age)
        return blocked + decodes + prompts, len(blocked)

    def _costly_rows(self) -> dict[Tenant, int]:
        """How many rows with a filter a tenant may finish in this step, where others are active and its
        last such rows had flat distributions."""
        if len(self._active) < 2:
            return {}
        return {
            tenant: max(1, int(COSTLY_ROWS / tenant.flatness))
            for tenant in self._active
            if tenant.flatness * self.max_sequences > COSTLY_ROWS
        }

    @staticmethod
    def _needs_pages(sequence: Sequence) -> bool:
        return sequence.computed == len(sequence.pages) * PAGE_SIZE

    def _requeue(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        tenant.decodes.pop(sequence.id, None)
        tenant.prompts.pop(sequence.id, None)
        self._enqueue(sequence)

    # --- after the step -------------------------------------------------------------------------

    def commit(self, plan: StepPlan) -> None:
        """The plan is about to be launched: charge tenants. :meth:`seal` has to follow, and may once it is launched.

        Calls that it finishes are no longer pending; the caller clears ``part.sequence.call`` when it answers them.
        """
        for part in plan.parts:
            sequence = part.sequence
            sequence.computed += part.count
            sequence.last_step = self.step
            tenant = sequence.tenant
            tenant.last_step = self.step
            decode = part.count == 1 and part.finishes
            tenant.counter += DECODE_WEIGHT if decode else PREFILL_WEIGHT * part.count
            if part.finishes:
                self._dequeue(sequence)
            elif sequence.remaining == 1:
                self._requeue(sequence)
        self.step += 1

    def seal(self, plan: StepPlan) -> None:
        """Make the full pages of a committed plan findable. That takes 30 us a prompt, which the device need not
        wait for: whoever finds a page is in a later step."""
        for part in plan.parts:
            self.tables.seal(part.sequence)

    # --- sequences with lanes ---------------------------------------------------------------------

    def append(self, sequence: Sequence, tokens: bytes) -> None:
        """Add tokens, uint32 bytes, that a sequence with a lane has got there."""
        sequence.tokens.frombytes(tokens)
        self._account(sequence.tenant, 0, len(tokens) // TOKEN_BYTES)

    def served(self, tenant: Tenant, rows: int) -> None:
        """A step computes so many rows of a tenant's lanes."""
        self._wake(tenant)
        tenant.counter += DECODE_WEIGHT * rows
        tenant.last_step = self.step
        tenant.seen = self.pool.now

    def park(self, sequence: Sequence) -> None:
        """A sequence has left its lane: its tokens are all there, and ``computed`` says how many are computed.

        Pages beyond those are given back. A step in flight may still write them; whoever gets them
        writes them in a later one.
        """
        self.tables.release_from(sequence, -(-sequence.computed // PAGE_SIZE))
        # A row that is to be computed again may have filled its page.
        del sequence.keys[sequence.computed // PAGE_SIZE :]
        self.tables.seal(sequence)
        sequence.last_step = max(sequence.last_step, self.step - 1)
        if sequence.pages:
            sequence.tenant.idle[sequence.id] = sequence

    def drawn(self, tenant: Tenant, filtered: int, flat: int) -> None:
        """Note how many of a tenant's draws with a filter were flat: they are charged, and fewer are
        taken into a step."""
        tenant.counter += FLAT_WEIGHT * flat
        part = min(1.0, filtered / FLATNESS_ROWS)
        tenant.flatness += part * (flat / filtered - tenant.flatness)
        if flat * self.max_sequences > COSTLY_ROWS * filtered:
            # What costs is believed at once, and forgotten slowly.
            tenant.flatness = max(tenant.flatness, flat / filtered)

    def check(self) -> None:
        """Verify pages against sequences (see :meth:`PagePool.check`) and all counts. Raises AssertionError."""
        held: dict[int, int] = {}
        owned: dict[int, PageHolder] = {}
        totals: dict[Tenant, list[int]] = {}
        for sequence in self._sequences.values():
            if not sequence.computed <= len(sequence.tokens):
                raise AssertionError(f"sequence {sequence.id} computed more than it has")
            if len(sequence.pages) * PAGE_SIZE < sequence.computed:
                raise AssertionError(f"sequence {sequence.id} has too few pages")
            if len(sequence.keys) > sequence.computed // PAGE_SIZE:
                raise AssertionError(f"sequence {sequence.id} has keys of pages that are not full")
            tenant = sequence.tenant
            for page in sequence.pages:
                held[page] = held.get(page, 0) + 1
                if owned.setdefault(page, tenant) is not tenant:
                    raise AssertionError(f"page {page} is held by two tenants")
            counts = totals.setdefault(tenant, [0, 0, 0])
            counts[0] += 1
            counts[1] += len(sequence.tokens)
            counts[2] += sequence.queued
            if sequence.queued:
                queue = tenant.decodes if sequence.remaining == 1 else tenant.prompts
                if sequence.call is None or queue.get(sequence.id) is not sequence:
                    raise AssertionError(f"sequence {sequence.id} is pending without a call or in the wrong queue")
                counts[1] += sequence.call.weight
            elif sequence.held:
                if sequence.call is None or sequence.lane >= 0:
                    raise AssertionError(f"sequence {sequence.id} is held without a call, or has a lane")
                counts[1] += sequence.call.weight
                if sequence.pages and tenant.idle.get(sequence.id) is not sequence:
                    raise AssertionError(f"held sequence {sequence.id} cannot be preempted")
            elif sequence.lane >= 0:
                if sequence.call is not None or sequence.id in tenant.idle:
                    raise AssertionError(f"sequence {sequence.id} has a lane and something else")
            elif sequence.pages and tenant.idle.get(sequence.id) is not sequence:
                raise AssertionError(f"idle sequence {sequence.id} cannot be preempted")
        self.pool.check(held, owned)
        for tenant, (open_, tokens, pending) in totals.items():
            if (tenant.open, tenant.tokens, tenant.pending) != (open_, tokens, pending):
                raise AssertionError(f"tenant {tenant.name!r} is counted wrongly")
            if any(other.queued for other in tenant.idle.values()):
                raise AssertionError(f"tenant {tenant.name!r} has a pending sequence among its idle ones")
        if self._pending != sum(counts[2] for counts in totals.values()):
            raise AssertionError("the number of pending calls is wrong")
        if self.bytes != sum(tenant.bytes for tenant in totals):
            raise AssertionError("the memory of the sequences is counted wrongly")


def _nothing(sequence: Sequence) -> None:
    pass


def _open(sequence: Sequence) -> bool:
    return True


def _by_share(sequence: Sequence) -> tuple[float, int]:
    return sequence.tenant.counter, sequence.call.order if sequence.call else 0
