"""The scheduler and its pages under random use: every invariant after every step, and progress."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from realm.engine.kv_cache import PAGE_SIZE, PageHolder, PagePool
from realm.engine.page_tables import Part
from realm.engine.scheduler import Scheduler
from realm.engine.sequence import Call, Sequence, Tenant
from realm.engine.tenants import Tenants
from realm.messages import SamplingParams, TenantQuota

NOTHING = (b"", b"")
"""What a cleared place of a page holds."""


class Harness:
    """A scheduler, and a model of what every page holds: (sequence root, tokens up to here)."""

    def __init__(self, pages: int, budget: int, most: int) -> None:
        self.scheduler = Scheduler(pages, token_budget=budget, max_sequences=most)
        self.budget, self.most = budget, most
        self.contents: dict[int, dict[int, tuple[bytes, bytes]]] = {}
        self.sequences: dict[int, Sequence] = {}
        self.tenants = Tenants("m")
        self.count = 0

    def tenant(self, name: str, kv_pages: int | None = None) -> Tenant:
        """The account of a tenant; ``kv_pages`` sets its limit."""
        if kv_pages is not None:
            self.tenants.set_quota(TenantQuota(name, kv_pages, 1 << 40, 64), 0.0)
        account = self.tenants.of(name)
        assert account is not None
        return account

    def open(self, tenant: str) -> Sequence:
        self.count += 1
        sequence = Sequence(self.count, 1, self.tenant(tenant), 1, self.count)
        self.scheduler.add(sequence)
        self.sequences[sequence.id] = sequence
        return sequence

    def fork(self, parent: Sequence) -> Sequence:
        self.count += 1
        child = Sequence(self.count, 1, parent.tenant, 1, self.count)
        self.scheduler.fork(parent, child)
        self.sequences[child.id] = child
        return child

    def ask(self, sequence: Sequence, tokens: list[int], sampling: SamplingParams | None = None) -> None:
        sequence.tokens.extend(array("I", tokens))
        self.count += 1
        self.scheduler.submit(sequence, Call(self.count, self.count, len(tokens), sampling, False))

    def step(self) -> list[Part]:
        """Carry out a plan on the model of the pages, checking what the runner relies on."""
        plan = self.scheduler.plan()
        assert sum(part.count for part in plan.parts) <= self.budget
        assert len(plan.parts) <= self.most
        assert len({pair[1] for pair in plan.copies}) == len(plan.copies)
        copied = {target: dict(self.contents.get(source, {})) for source, target in plan.copies}
        self.contents.update(copied)
        written: set[tuple[int, int]] = set()
        for page in plan.fresh:
            assert all(page != pair[1] for pair in plan.copies)
            self.contents[page] = dict.fromkeys(range(PAGE_SIZE), NOTHING)
        for part in plan.parts:
            sequence = part.sequence
            assert part.start == sequence.computed
            for position in range(part.start, part.start + part.count):
                page, slot = sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE
                assert (page, slot) not in written, "two sequences write to one place"
                written.add((page, slot))
                self.contents.setdefault(page, {})[slot] = self.truth(sequence, position)
        for part in plan.parts:  # what attention will read is what this sequence's tokens are
            sequence = part.sequence
            for position in range(part.start + part.count):
                page, slot = sequence.pages[position // PAGE_SIZE], position % PAGE_SIZE
                assert self.contents[page][slot] == self.truth(sequence, position)
            # The rest of the last page is read, too, and hidden: it is empty or the tenant's own.
            position = part.start + part.count
            for slot in range(position % PAGE_SIZE, PAGE_SIZE if position % PAGE_SIZE else 0):
                assert self.contents[sequence.pages[-1]][slot][0] in (sequence.tenant.root, b"")
        self.scheduler.commit(plan)
        self.scheduler.seal(plan)
        finished = [part for part in plan.parts if part.finishes]
        for part in finished:
            part.sequence.call = None
        self.scheduler.check()
        return plan.parts

    @staticmethod
    def truth(sequence: Sequence, position: int) -> tuple[bytes, bytes]:
        return sequence.tenant.root, sequence.tokens[: position + 1].tobytes()


class SchedulerMachine(RuleBasedStateMachine):
    """Random operations of several tenants on a small cache. Few token values, so prefixes repeat."""

    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=50) | st.integers(1, 60).map(lambda count: [0] * count)

    @initialize(
        pages=st.integers(4, 12),
        budget=st.sampled_from([5, 16, 64]),
        most=st.sampled_from([2, 8]),
        limits=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    )
    def start(self, pages: int, budget: int, most: int, limits: tuple[int, int]) -> None:
        self.h = Harness(pages, budget, most)
        self.pages = pages
        for tenant, limit in zip("ab", limits, strict=True):
            self.h.tenant(tenant, limit)

    def capacity(self, tenant: Tenant) -> int:
        return min(self.pages, tenant.quota.kv_pages) * PAGE_SIZE

    def _idle(self) -> list[Sequence]:
        return [s for s in self.h.sequences.values() if s.call is None]

    @rule(tenant=st.sampled_from("abc"), tokens=tokens)
    def open(self, tenant: str, tokens: list[int]) -> None:
        if len(self.h.sequences) < 10 and len(tokens) <= self.capacity(self.h.tenant(tenant)):
            self.h.ask(self.h.open(tenant), tokens)

    @precondition(lambda self: self._idle())
    @rule(data=st.data(), tokens=tokens)
    def ask(self, data: st.DataObject, tokens: list[int]) -> None:
        sequence = data.draw(st.sampled_from(self._idle()))
        if len(sequence.tokens) + len(tokens) <= self.capacity(sequence.tenant):
            self.h.ask(sequence, tokens)

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        self.ask(data, [data.draw(st.integers(0, 1))])

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if len(self.h.sequences) < 10:
            self.h.fork(data.draw(st.sampled_from(self._idle())))

    @precondition(lambda self: self._idle())
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self._idle()))
        self.h.scheduler.truncate(sequence, data.draw(st.integers(0, len(sequence.tokens))))

    @precondition(lambda self: self.h.sequences)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.h.sequences.values())))
        self.h.scheduler.remove(sequence)
        del self.h.sequences[sequence.id]

    @rule()
    def step(self) -> None:
        self.h.step()

    @rule()
    def drain(self) -> None:
        """Whatever is pending finishes in a bounded number of steps: no deadlock, no starvation."""
        work = sum(len(s.tokens) + self.pages * PAGE_SIZE for s in self.h.sequences.values())
        for _ in range(3 * work + 10):
            if not self.h.scheduler.pending:
                return
            assert self.h.step(), "calls are pending and none is in the step"
        raise AssertionError("pending calls do not finish")

    @invariant()
    def sums(self) -> None:
        if hasattr(self, "h"):
            self.h.scheduler.check()
            pool = self.h.scheduler.pool
            assert pool.free + pool.used + pool.cached == pool.total
            for tenant in self.h.tenants:
                mine = {page for s in self.h.sequences.values() if s.tenant is tenant for page in s.pages}
                assert tenant.used == len(mine) <= tenant.quota.kv_pages

    def teardown(self) -> None:
        if hasattr(self, "h"):
            self.drain()
            for sequence in list(self.h.sequences.values()):
                self.h.scheduler.remove(sequence)
            assert self.h.scheduler.pool.used == 0


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def test_decodes_go_before_prompts_and_prompts_are_chunked() -> None:
    h = Harness(64, budget=20, most=8)
    long, short = h.open("a"), h.open("b")
    h.ask(short, [1])
    h.step()
    h.ask(long, [1] * 100)
    h.ask(short, [2])
    parts = h.step()
    assert [(p.sequence, p.count, p.finishes) for p in parts] == [(short, 1, True), (long, 19, False)]


def test_a_prefix_is_found_within_a_tenant_and_never_across() -> None:
    h = Harness(64, budget=200, most=8)
    text = [i % 7 for i in range(70)]
    h.ask(h.open("a"), text)
    assert h.step()[0].count == 70
    h.ask(h.open("a"), text)
    assert h.step()[0].count == 70 - 64
    h.ask(h.open("b"), text)
    assert h.step()[0].count == 70


def test_waiting_prompts_are_served_by_their_tenants_share() -> None:
    """One tenant with many prompts does not push another with one prompt to the end."""
    h = Harness(64, budget=16, most=8)
    for _ in range(10):
        h.ask(h.open("greedy"), [1] * 16)
    h.step()
    modest = h.open("modest")
    h.ask(modest, [2] * 16)
    served = [h.step()[0].sequence for _ in range(2)]
    assert modest in served


def test_the_oldest_takes_pages_from_the_younger_and_both_finish() -> None:
    h = Harness(4, budget=64, most=8)
    old, young = h.open("a"), h.open("b")
    h.ask(old, [1] * 30)
    h.ask(young, [0] * 30)
    h.step()
    h.ask(old, [1] * 20)
    h.ask(young, [0] * 2)
    finished: list[Sequence] = []
    while h.scheduler.pending:
        finished += [part.sequence for part in h.step() if part.finishes]
    assert finished == [old, young]
    assert h.scheduler.tables.preemptions > 0


def test_the_pool_notices_double_release() -> None:
    pool = PagePool(2)
    page = pool.allocate(PageHolder())
    assert page is not None
    pool.release(page)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(page)
