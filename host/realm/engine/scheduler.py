"""Which sequences compute how many tokens in the next step, and in which pages.

Sans-I/O and without torch: calls go in, a :class:`StepPlan` of plain data comes out, and
:meth:`Scheduler.commit` says that it was carried out.

Policy:

* *Continuous batching, decode first.* Every pending call with one token left is in the step, then
  prompts in chunks under a token budget (chunked prefill; Agrawal et al., Sarathi-Serve, 2024), so
  that a long prompt never stalls the others.
* *Fairness.* Prompts wait in the order of their tenants' virtual token counters (Sheng et al., VTC,
  OSDI 2024): a token of prefill counts 1, a decoded one 2; a tenant that returns from idleness is
  lifted to the least counter of the active ones, so neither idling nor more guests buy a larger share.
* *Preemption by recomputation.* When pages run out: cached pages are given away first, then idle
  sequences lose their pages (least recently used first), then younger pending ones. The oldest
  pending sequence can always take every other's pages, so each step makes progress; only a
  sequence that does not fit alone fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from realm.engine.kv_cache import PAGE_SIZE, PagePool
from realm.engine.sequence import Call, Sequence

PREFILL_WEIGHT = 1.0
DECODE_WEIGHT = 2.0
IDLE_STEPS = 8
"""A tenant not served for so many steps is idle; between two tokens of a guest there are one or two."""


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
    """What to compute. ``copies`` are (source, destination) pages to copy before anything is written."""

    parts: list[Part] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass(slots=True)
class TenantShare:
    """A tenant's virtual counter, how many of its calls are pending, and when it was last served."""

    counter: float = 0.0
    pending: int = 0
    last_step: int = -1 - IDLE_STEPS


class Scheduler:
    """Pending calls and page tables. One thread owns it.

    Attributes:
        pool: the pages.
        preemptions: how often a sequence lost its pages so far.
    """

    def __init__(self, pages: int, *, token_budget: int, max_sequences: int) -> None:
        """``token_budget``: most tokens a step; ``max_sequences``: most sequences a step."""
        self.pool = PagePool(pages)
        self.preemptions = 0
        self._budget = token_budget
        self._max_sequences = max_sequences
        self._sequences: dict[int, Sequence] = {}
        self._pending: dict[int, Sequence] = {}
        self._shares: dict[str, TenantShare] = {}
        self._step = 0

    # --- sequences ------------------------------------------------------------------------------

    @property
    def sequences(self) -> Iterable[Sequence]:
        return self._sequences.values()

    def has_work(self) -> bool:
        return bool(self._pending)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.id] = sequence

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """``child`` gets the parent's tokens and shares its pages until one of them writes."""
        child.tokens = parent.tokens[:]
        child.computed = parent.computed
        # A failed attempt never leaves spare pages, so every page listed holds computed tokens.
        child.pages = parent.pages[:]
        child.keys = parent.keys[:]
        child.last_step = parent.last_step
        for page in child.pages:
            self.pool.retain(page)
        self._sequences[child.id] = child

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Drop tokens after the first ``length``. The sequence must have no pending call."""
        del sequence.tokens[length:]
        sequence.computed = min(sequence.computed, length)
        keep = -(-sequence.computed // PAGE_SIZE)
        self._release_from(sequence, keep)
        del sequence.keys[sequence.computed // PAGE_SIZE :]

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and its pending call."""
        self._unqueue(sequence)
        self._release_from(sequence, 0)
        del self._sequences[sequence.id]

    def fits(self, length: int) -> bool:
        """Whether a sequence of ``length`` tokens fits into an otherwise empty cache."""
        return -(-length // PAGE_SIZE) <= self.pool.total

    def submit(self, sequence: Sequence, call: Call) -> None:
        """Queue a call whose tokens are already appended to the sequence."""
        share = self._shares.setdefault(sequence.tenant, TenantShare())
        if self._is_idle(share):
            active = [other.counter for other in self._shares.values() if not self._is_idle(other)]
            if active:
                share.counter = max(share.counter, min(active))
        share.pending += 1
        sequence.call = call
        self._pending[sequence.id] = sequence

    def _is_idle(self, share: TenantShare) -> bool:
        return not share.pending and share.last_step < self._step - IDLE_STEPS

    def _unqueue(self, sequence: Sequence) -> None:
        if self._pending.pop(sequence.id, None) is not None:
            self._shares[sequence.tenant].pending -= 1
        sequence.call = None

    # --- planning -------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step; empty when nothing is pending. Pages are allocated here."""
        plan = StepPlan()
        budget = self._budget
        planned: set[int] = set()
        for sequence in self._ordered():
            if len(plan.parts) >= self._max_sequences or budget <= 0:
                break
            # An earlier part of this plan may have taken this sequence's pages: it starts over.
            count = min(self._match_prefix(sequence), budget)
            planned.add(sequence.id)
            if not self._make_room(sequence, count, plan, planned):
                planned.discard(sequence.id)
                continue
            budget -= count
            plan.parts.append(Part(sequence, sequence.computed, count, count == sequence.remaining))
        return plan

    def _ordered(self) -> list[Sequence]:
        """Decodes by age, then prompts by their tenant's counter and arrival."""
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._pending.values():
            (decodes if sequence.remaining == 1 else prompts).append(sequence)
        decodes.sort(key=lambda s: s.arrival)
        shares = self._shares
        prompts.sort(key=lambda s: (shares[s.tenant].counter, s.call.order if s.call else 0))
        if len(decodes) > self._max_sequences:
            decodes.sort(key=lambda s: (shares[s.tenant].counter, s.call.order if s.call else 0))
        return decodes + prompts

    def _match_prefix(self, sequence: Sequence) -> int:
        """Take cached pages that continue the computed ones; returns the tokens left to compute."""
        call = sequence.call
        assert call is not None
        if not call.matched:
            call.matched = True
            pool = self.pool
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
                pool.retain(page)
                sequence.pages.append(page)
                sequence.keys.append(key)
                appended = len(sequence.tokens) - call.count
                sequence.computed += PAGE_SIZE
                call.cached += max(0, min(PAGE_SIZE, sequence.computed - appended))
        return sequence.remaining

    def _make_room(self, sequence: Sequence, count: int, plan: StepPlan, planned: set[int]) -> bool:
        """Give the sequence writable pages for ``count`` more tokens, preempting others if needed.

        All or nothing: on failure the sequence holds what it held before, and nothing is copied.
        """
        pool = self.pool
        first = sequence.computed // PAGE_SIZE
        held = len(sequence.pages)
        needed = -(-(sequence.computed + count) // PAGE_SIZE)
        while len(sequence.pages) < needed:
            page = self._allocate(sequence, planned)
            if page is None:
                self._release_from(sequence, held)
                return False
            sequence.pages.append(page)
        if first < held and not pool.make_writable(sequence.pages[first]):
            copy = self._allocate(sequence, planned)
            if copy is None:
                self._release_from(sequence, held)
                return False
            original = sequence.pages[first]
            if pool.make_writable(original):
                # Making room took the other holders' pages: the original is ours alone now.
                pool.release(copy)
            else:
                plan.copies.append((original, copy))
                pool.release(original)
                sequence.pages[first] = copy
        return True

    def _allocate(self, sequence: Sequence, planned: set[int]) -> int | None:
        while (page := self.pool.allocate()) is None:
            victim = self._victim(sequence, planned)
            if victim is None:
                return None
            self._preempt(victim)
        return page

    def _victim(self, sequence: Sequence, planned: set[int]) -> Sequence | None:
        """Who loses its pages for ``sequence``: idle ones first, then younger pending ones.

        A sequence served in the last step counts as pending: its guest is about to answer.
        """
        idle: Sequence | None = None
        young: Sequence | None = None
        for other in self._sequences.values():
            if not other.pages or other.id in planned:
                continue
            if other.call is None and other.last_step < self._step - 1:
                if idle is None or other.last_step < idle.last_step:
                    idle = other
            elif other.arrival > sequence.arrival or other.call is None:
                rank = (self._shares[other.tenant].counter if other.tenant in self._shares else 0.0, other.arrival)
                if young is None or rank > (self._shares[young.tenant].counter, young.arrival):
                    young = other
        return idle or young

    def _preempt(self, victim: Sequence) -> None:
        self.preemptions += 1
        self._release_from(victim, 0)
        victim.computed = 0
        victim.keys.clear()
        if victim.call is not None:
            victim.call.matched = False
            victim.call.cached = 0

    def _release_from(self, sequence: Sequence, index: int) -> None:
        # Last page first: the cache then gives away the end of a prefix before its start.
        while len(sequence.pages) > index:
            self.pool.release(sequence.pages.pop())

    # --- after the step -------------------------------------------------------------------------

    def commit(self, plan: StepPlan) -> list[Part]:
        """The plan was computed: seal full pages, charge tenants, and return the finished parts.

        Their calls are no longer pending; ``part.sequence.call`` is cleared by the caller.
        """
        finished: list[Part] = []
        for part in plan.parts:
            sequence = part.sequence
            sequence.computed += part.count
            sequence.last_step = self._step
            for index in range(len(sequence.keys), sequence.computed // PAGE_SIZE):
                parent = sequence.parent_key(index)
                sequence.keys.append(self.pool.seal(sequence.pages[index], parent, sequence.page_tokens(index)))
            share = self._shares[sequence.tenant]
            share.last_step = self._step
            decode = part.count == 1 and part.finishes
            share.counter += DECODE_WEIGHT if decode else PREFILL_WEIGHT * part.count
            if part.finishes:
                finished.append(part)
                del self._pending[sequence.id]
                share.pending -= 1
        self._step += 1
        return finished

    def check(self) -> None:
        """Verify pages against sequences (see :meth:`PagePool.check`). Raises AssertionError."""
        held: dict[int, int] = {}
        for sequence in self._sequences.values():
            if not sequence.computed <= len(sequence.tokens):
                raise AssertionError(f"sequence {sequence.id} computed more than it has")
            if len(sequence.pages) * PAGE_SIZE < sequence.computed:
                raise AssertionError(f"sequence {sequence.id} has too few pages")
            if len(sequence.keys) > sequence.computed // PAGE_SIZE:
                raise AssertionError(f"sequence {sequence.id} has keys of pages that are not full")
            for page in sequence.pages:
                held[page] = held.get(page, 0) + 1
        self.pool.check(held)
        for sequence_id, sequence in self._pending.items():
            if sequence.call is None or self._sequences.get(sequence_id) is not sequence:
                raise AssertionError(f"sequence {sequence_id} is pending without a call")
