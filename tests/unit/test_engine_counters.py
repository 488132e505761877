"""Every counter returns to zero, whatever two workers do and however it ends, with and without running ahead."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from realm.engine.core import EngineCore
from realm.engine.workers import WORKER_SHIFT
from realm.messages import (
    CONTINUE,
    DRAWN,
    NO_LANE,
    EndRun,
    EngineOp,
    ForkSequence,
    Forward,
    FreeSequence,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TenantQuota,
    TruncateSequence,
)
from tests.checked_runner import VOCAB, checked_engine
from tests.tiny import pack

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(100.0, top_p=0.99, uniform=0.5),
    SamplingParams(0.8, top_k=9, key=5, number=3, logprob=True),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(1.0, mask=b"\x0f" * 125),
    None,
]


class CountersMachine(RuleBasedStateMachine):
    """Three tenants with limits, all operations; then everything ends in some way.

    ``waiting`` are each worker's calls that must be answered, with their sequences; ``given_up`` those that
    may be, because their sequence went first. ``rows``: what each sequence could go on by.
    """

    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=60)
    tenants = st.sampled_from("abc")
    workers = st.sampled_from([1, 2])

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sequences: dict[int, int] = {}
        self.waiting: dict[int, dict[int, int]] = {1: {}, 2: {}}
        self.given_up: dict[int, set[int]] = {1: set(), 2: set()}
        self.rows: dict[int, tuple[int, int]] = {}
        self.number = 0

    @initialize(ahead=st.integers(0, 2), lanes=st.sampled_from([2, 16]))
    def start(self, ahead: int, lanes: int) -> None:
        self.engine: EngineCore
        self.engine, _ = checked_engine(clock=lambda: self.now, pages=14, budget=32, lanes=lanes, run_ahead=ahead)
        for tenant, pages in (("a", 5), ("b", 14), ("c", 9)):
            self.engine.set_quota(TenantQuota(tenant, pages, 600, 2))

    def fresh(self, worker: int) -> int:
        self.number += 1
        return (worker << WORKER_SHIFT) + self.number

    def submit(self, worker: int, op: EngineOp) -> None:
        if isinstance(op, Forward | SaveSequence | OpenSaved):
            self.waiting[worker][op.call] = op.seq
        self.engine.submit(worker, [op])

    def pick(self, data: st.DataObject) -> tuple[int, int]:
        seq = data.draw(st.sampled_from(sorted(self.sequences)))
        return self.sequences[seq], seq

    def give_up(self, worker: int, seqs: set[int]) -> None:
        gone = {call for call, seq in self.waiting[worker].items() if seq in seqs}
        self.given_up[worker] |= gone
        for call in gone:
            del self.waiting[worker][call]

    @rule(worker=workers, tenant=tenants, run=st.integers(1, 3))
    def open(self, worker: int, tenant: str, run: int) -> None:
        seq = self.fresh(worker)
        self.sequences[seq] = worker
        self.submit(worker, OpenSequence(seq, tenant, run))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=tokens, sampling=st.sampled_from(SAMPLINGS), logits=st.booleans())
    def forward(self, data: st.DataObject, tokens: list[int], sampling: SamplingParams | None, logits: bool) -> None:
        worker, seq = self.pick(data)
        self.number += 1
        self.submit(worker, Forward(self.number, seq, pack(tokens), sampling, logits))

    @precondition(lambda self: self.rows)
    @rule(count=st.integers(1, 8), wrong=st.integers(0, 9))
    def go_on(self, count: int, wrong: int) -> None:
        """The sequences that drew last go on, one of them by another token at times."""
        turns: dict[int, bytes] = {}
        for at, (seq, (lane, token)) in enumerate(list(self.rows.items())[-count:]):
            worker = self.sequences.get(seq)
            if worker is not None:
                self.number += 1
                self.waiting[worker][self.number] = seq
                token = (token + (at == wrong)) % VOCAB
                turns[worker] = turns.get(worker, b"") + CONTINUE.pack(self.number, seq, lane, token)
        for worker, rows in turns.items():
            self.engine.submit(worker, [], rows)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        worker, seq = self.pick(data)
        child = self.fresh(worker)
        self.sequences[child] = worker
        self.submit(worker, ForkSequence(seq, child))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), length=st.integers(0, 40))
    def truncate(self, data: st.DataObject, length: int) -> None:
        worker, seq = self.pick(data)
        self.submit(worker, TruncateSequence(seq, length))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        worker, seq = self.pick(data)
        if seq in self.engine._workers.of(worker).sequences:
            self.give_up(worker, {seq})
        self.submit(worker, FreeSequence(seq))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), name=st.sampled_from("xyz"))
    def save(self, data: st.DataObject, name: str) -> None:
        worker, seq = self.pick(data)
        self.number += 1
        self.submit(worker, SaveSequence(self.number, seq, name))

    @rule(worker=workers, tenant=tenants, name=st.sampled_from("xyz"))
    def open_saved(self, worker: int, tenant: str, name: str) -> None:
        self.number += 1
        seq = self.fresh(worker)
        self.sequences[seq] = worker
        self.submit(worker, OpenSaved(self.number, seq, tenant, 1, name))

    @rule(worker=workers, run=st.integers(1, 3))
    def end_run(self, worker: int, run: int) -> None:
        sequences = self.engine._workers.of(worker).sequences.values()
        self.give_up(worker, {sequence.id for sequence in sequences if sequence.run == run})
        self.submit(worker, EndRun(run))

    @rule(worker=workers)
    def lose_worker(self, worker: int) -> None:
        self.engine.drop_worker(worker)
        self.waiting[worker].clear()
        self.given_up[worker].clear()
        self.sequences = {seq: owner for seq, owner in self.sequences.items() if owner != worker}

    @rule(tenant=tenants, pages=st.integers(1, 14), tokens=st.integers(0, 900))
    def change_limits(self, tenant: str, pages: int, tokens: int) -> None:
        self.engine.set_quota(TenantQuota(tenant, pages, tokens, 1))

    @rule(seconds=st.sampled_from([0.1, 5.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.engine.in_flight < 3)
    @rule()
    def launch(self) -> None:
        self.engine.launch()

    @rule(wait=st.booleans())
    def settle(self, wait: bool) -> None:
        self.engine.settle(wait)
        self.take()

    @rule()
    def step(self) -> None:
        self.engine.launch()
        while self.engine.settle(True):
            pass
        self.take()

    def take(self) -> None:
        for worker, (results, rows) in self.engine.take().items():
            for result in results:
                self.answered(worker, result.call)
            for call, token, _, _, lane in DRAWN.iter_unpack(rows):
                seq = self.answered(worker, call)
                self.rows.pop(seq, None)
                if lane != NO_LANE:
                    self.rows[seq] = (lane, token)

    def answered(self, worker: int, call: int) -> int:
        if call in self.given_up[worker]:
            self.given_up[worker].remove(call)
            return -1
        assert call in self.waiting[worker], "a result that nobody waits for"
        return self.waiting[worker].pop(call)

    @rule()
    def drain(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work():
                assert self.waiting == {1: {}, 2: {}}, "calls were never answered"
                return
            self.step()
        raise AssertionError("pending calls do not finish")

    @invariant()
    def sums(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        self.drain()
        engine.submit(1, [EndRun(run) for run in (1, 2, 3)])
        engine.drop_worker(2)
        self.now += 1e6
        for tenant in engine.tenants:  # what is saved outlives its worker; the engine's end is its end
            for name in list(tenant.saved):
                engine.scheduler.remove(tenant.saved.pop(name))
        engine.check()
        stats = engine.stats()
        assert (stats.pages_used, stats.pages_free + stats.pages_cached) == (0, stats.pages_total)
        assert (engine.scheduler.bytes, list(engine.scheduler.sequences)) == (0, [])
        assert not engine.has_work() and engine.step() == {}
        state = engine._workers.of(1)
        assert not state.sequences and not state.runs and not state.refused
        for tenant in engine.tenants:
            assert (tenant.used, tenant.open, tenant.tokens, tenant.pending, tenant.bucket) == (0, 0, 0, 0, None)
            assert not tenant.idle and tenant.blocked is None
            assert tenant.stats.minute_tokens == 0


CountersMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCounters = CountersMachine.TestCase
