"""Which pages a sequence has: found by prefix, allocated, shared until written, and taken from others.

Sequences with lanes are nobody's victims; a plan says when pages are short because of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from realm.engine.kv_cache import PAGE_SIZE, PagePool
from realm.engine.sequence import Sequence, Tenant
from realm.engine.victims import Victims


@dataclass(slots=True)
class Part:
    """One sequence's share of a step: compute ``count`` tokens after the ``start`` computed ones.

    ``finishes``: the sequence's pending call is done after this step.
    """

    sequence: Sequence
    start: int
    count: int
    finishes: bool


@dataclass(slots=True)
class StepPlan:
    """What to compute.

    ``fresh`` are pages to clear first: new ones that this step does not fill, whose rest attention
    will read (and hide). ``copies`` are (source, destination) pages to copy before anything is written.
    ``short`` are tenants, and ``full`` says that the pool is, for which no victim was found: sequences with
    lanes are none, until they are taken out of them.
    """

    parts: list[Part] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    short: set[Tenant] = field(default_factory=set)
    full: bool = False


class PageTables:
    """The page lists of all sequences. The scheduler's.

    Attributes:
        pool: the pages. victims: the choice of who loses its pages.
        preemptions: how often a sequence lost its pages so far.
    """

    def __init__(self, pool: PagePool, requeue: Callable[[Sequence], None]) -> None:
        """``requeue`` is told of each pending sequence whose number of tokens to compute has changed."""
        self.pool = pool
        self.victims = Victims()
        self.preemptions = 0
        self._requeue = requeue

    def match_prefix(self, sequence: Sequence) -> int:
        """Take cached pages that continue the computed ones; returns the tokens left to compute."""
        call = sequence.call
        assert call is not None
        if not call.matched:
            pool = self.pool
            tenant = sequence.tenant
            # The last token is always computed: its logits are what the call is about.
            while (
                sequence.computed % PAGE_SIZE == 0
                and sequence.remaining > PAGE_SIZE
                and len(sequence.keys) == sequence.computed // PAGE_SIZE == len(sequence.pages)
            ):
                index = sequence.computed // PAGE_SIZE
                found = pool.find(sequence.parent_key(index), sequence.page_tokens(index))
                if found is None:
                    break
                page, key = found
                if tenant.used >= tenant.quota.kv_pages and pool.is_cached(page):
                    # At its limit: what is computed instead will make its own room, or wait for it.
                    return sequence.remaining
                pool.retain(page)
                sequence.pages.append(page)
                sequence.keys.append(key)
                appended = len(sequence.tokens) - call.count
                sequence.computed += PAGE_SIZE
                call.cached += max(0, min(PAGE_SIZE, sequence.computed - appended))
            call.matched = True
            if sequence.remaining == 1:
                self._requeue(sequence)
        return sequence.remaining

    def make_room(self, sequence: Sequence, count: int, plan: StepPlan, planned: set[int]) -> bool:
        """Give the sequence writable pages for ``count`` more tokens, preempting others if needed.

        All or nothing: on failure the sequence holds what it held before, and nothing is copied.
        """
        pool = self.pool
        first = sequence.computed // PAGE_SIZE
        held = len(sequence.pages)
        needed = -(-(sequence.computed + count) // PAGE_SIZE)
        while len(sequence.pages) < needed:
            page = self._allocate(sequence, plan, planned)
            if page is None:
                self.release_from(sequence, held)
                return False
            sequence.pages.append(page)
        if first < held and not pool.make_writable(sequence.pages[first]):
            copy = self._allocate(sequence, plan, planned)
            original = sequence.pages[first]
            if pool.make_writable(original):
                # Making room took the other holders' pages: the original is ours alone now.
                if copy is not None:
                    pool.release(copy)
            elif copy is None:
                self.release_from(sequence, held)
                return False
            else:
                plan.copies.append((original, copy))
                pool.release(original)
                sequence.pages[first] = copy
        if needed > held and (sequence.computed + count) % PAGE_SIZE:
            plan.fresh.append(sequence.pages[-1])
        return True

    def _allocate(self, sequence: Sequence, plan: StepPlan, planned: set[int]) -> int | None:
        tenant = sequence.tenant
        while tenant.used >= tenant.quota.kv_pages:
            victim = self.victims.choose(sequence, planned, (tenant,))
            if victim is None:
                plan.short.add(tenant)
                return None
            self._preempt(victim)
        while (page := self.pool.allocate(tenant)) is None:
            victim = self.victims.choose(sequence, planned, self._tenants_with_pages())
            if victim is None:
                plan.full = True
                return None
            self._preempt(victim)
        return page

    def _tenants_with_pages(self) -> list[Tenant]:
        return [holder for holder in self.pool.holders if isinstance(holder, Tenant)]

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self.release_from(victim, 0)
        victim.computed = 0
        victim.keys.clear()
        victim.tenant.idle.pop(victim.id, None)
        if victim.queued:
            assert victim.call is not None
            victim.call.matched = False
            victim.call.cached = 0
            self._requeue(victim)

    def release_from(self, sequence: Sequence, index: int) -> None:
        # Last page first: the cache then gives away the end of a prefix before its start.
        while len(sequence.pages) > index:
            self.pool.release(sequence.pages.pop())

    def take_page(self, sequence: Sequence) -> int | None:
        """One more page for a sequence with a lane, if none has to be taken from others for it."""
        tenant = sequence.tenant
        if tenant.used >= tenant.quota.kv_pages or (page := self.pool.allocate(tenant)) is None:
            return None
        sequence.pages.append(page)
        return page

    def seal(self, sequence: Sequence) -> None:
        """Make the full pages of what is computed findable."""
        for index in range(len(sequence.keys), sequence.computed // PAGE_SIZE):
            parent = sequence.parent_key(index)
            sequence.keys.append(self.pool.seal(sequence.pages[index], parent, sequence.page_tokens(index)))
