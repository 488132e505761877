"""Two engines get the same operations in the same order, one runs ahead: each call gets the same answer.

Limits make an answer depend on what was asked before, of all sequences: so here both engines are asked in
lockstep, and whatever decides on a refusal (pages, tokens a minute, memory, saved sequences) has to be equal
at each call. What depends on when a step is computed is asked for only when nothing is pending.
"""

from __future__ import annotations

import copy
import math

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from realm.engine.core import EngineCore
from realm.messages import (
    CallFailed,
    EndRun,
    EngineOp,
    EngineResult,
    ForkSequence,
    ForwardDone,
    FreeSequence,
    OpenSequence,
    SamplingParams,
    TenantQuota,
    TruncateSequence,
)
from tests.ahead_worker import AheadWorker
from tests.checked_runner import CheckedRunner, checked_engine

PLENTY = 1 << 40
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(logprob=True),
    SamplingParams(0.8, top_p=0.9, key=11, number=0),
    SamplingParams(1.2, top_k=30, key=12, number=5, logprob=True),
    SamplingParams(repetition_penalty=1.4),
    SamplingParams(0.5, mask=b"\xaa" * 125, key=13, number=0),
]


class Side:
    """One of the engines, and its worker."""

    def __init__(self, ahead: int, clock: list[float], pages: int, lanes: int) -> None:
        self.engine: EngineCore
        self.runner: CheckedRunner
        self.engine, self.runner = checked_engine(
            run_ahead=ahead, pages=pages, lanes=lanes, budget=48, clock=lambda: clock[0]
        )
        self.worker = AheadWorker(self.engine, 1)

    def answers(self, calls: list[int]) -> list[EngineResult]:
        for _ in range(3000):
            if all(call in self.worker.answers for call in calls):
                # As a server does: the next step is launched before the guests have seen their answers.
                self.engine.launch()
                return [self.worker.answers.pop(call) for call in calls]
            if self.engine.in_flight < 2:
                self.engine.launch()
            self.engine.settle(True)
            self.take()
        raise AssertionError("a call is not answered")

    def take(self) -> None:
        for number, (results, rows) in self.engine.take().items():
            assert number == 1
            self.worker.receive(results, rows)
        self.engine.check()


class AheadMachine(RuleBasedStateMachine):
    """``texts``: tokens of each sequence with its tenant, as its guest knows it."""

    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=40) | st.integers(1, 60).map(lambda count: [1] * count)

    @initialize(ahead=st.sampled_from([1, 2]), pages=st.sampled_from([10, 16, 200]), lanes=st.sampled_from([2, 8]))
    def start(self, ahead: int, pages: int, lanes: int) -> None:
        self.now = [1000.0]
        self.pages = pages
        self.sides = (Side(0, self.now, pages, lanes), Side(ahead, self.now, pages, lanes))
        self.texts: dict[int, tuple[str, list[int]]] = {}
        self.params: dict[int, SamplingParams] = {}
        self.drawn: dict[int, int] = {}
        self.pending: dict[int, tuple[int, list[int], SamplingParams | None]] = {}
        self.refused: set[int] = set()

    # --- asking -----------------------------------------------------------------------------------------

    def op(self, op: EngineOp) -> None:
        for side in self.sides:
            side.worker.op(op)
            side.worker.flush()

    def ask(self, seq: int, tokens: list[int], p: SamplingParams | None, *, logits: bool = False) -> None:
        if p is not None and p.number >= 0:
            self.params[seq] = msgspec.structs.replace(p, number=p.number + 1)
        calls = {side.worker.forward(seq, tokens, p, logits=logits) for side in self.sides}
        for side in self.sides:
            side.worker.flush()
        self.pending[calls.pop()] = (seq, tokens, p)
        assert not calls

    def idle(self) -> list[int]:
        busy = {seq for seq, _, _ in self.pending.values()}
        return [seq for seq in self.texts if seq not in busy]

    def pick(self, data: st.DataObject) -> int:
        seq: int = data.draw(st.sampled_from(self.idle()))
        return seq

    @rule()
    def answer(self, *, but_limits: bool = False) -> None:
        """All that is pending is answered alike; ``but_limits``: but for what only one of them still could compute."""
        calls = list(self.pending)
        plain, ahead = (side.answers(calls) for side in self.sides)
        for call, mine, theirs in zip(calls, plain, ahead, strict=True):
            seq, tokens, p = self.pending.pop(call)
            if but_limits and isinstance(mine, CallFailed) != isinstance(theirs, CallFailed):
                failed = mine if isinstance(mine, CallFailed) else theirs
                assert isinstance(failed, CallFailed) and failed.limit is not None and failed.limit.name == "kv_pages"
                self.even(self.texts[seq][0])
                self.op(FreeSequence(seq))
                self.gone({seq})
                continue
            self.compare(mine, theirs)
            if isinstance(mine, ForwardDone):
                self.texts[seq][1].extend(tokens)
                self.drawn.pop(seq, None)
                if p is not None:
                    self.drawn[seq] = mine.token

    def even(self, tenant: str) -> None:
        """A call was computed by one and failed by the other: it cost the tenant what the other gave back."""
        plain, ahead = (side.engine.tenants.find(tenant) for side in self.sides)
        assert plain is not None and ahead is not None
        ahead.bucket = copy.copy(plain.bucket)

    def compare(self, mine: EngineResult, theirs: EngineResult) -> None:
        if isinstance(mine, ForwardDone) and isinstance(theirs, ForwardDone):
            assert (mine.call, mine.token, mine.logits) == (theirs.call, theirs.token, theirs.logits)
            assert mine.logprob == theirs.logprob or (math.isnan(mine.logprob) and math.isnan(theirs.logprob))
        elif isinstance(mine, CallFailed):
            assert mine == theirs
        else:
            assert mine == theirs

    # --- rules ------------------------------------------------------------------------------------------

    @rule(tenant=st.sampled_from("ab"), tokens=tokens, p=st.sampled_from(SAMPLINGS))
    def open(self, tenant: str, tokens: list[int], p: SamplingParams) -> None:
        if len(self.texts) >= 8:
            return
        (seq,) = {side.worker.fresh() for side in self.sides}
        self.texts[seq] = (tenant, [])
        self.params[seq] = p
        self.op(OpenSequence(seq, tenant, 1))
        self.ask(seq, tokens, p)

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), turns=st.integers(1, 20))
    def go_on(self, data: st.DataObject, turns: int) -> None:
        """Some sequences go on by what they drew, for some turns."""
        seqs = data.draw(st.lists(st.sampled_from(self.idle()), min_size=1, max_size=4, unique=True))
        for _ in range(turns):
            for seq in seqs:
                self.ask(seq, [self.drawn.get(seq, 7)], self.params[seq])
            self.answer()

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), tokens=tokens, p=st.sampled_from([*SAMPLINGS, None]), logits=st.booleans())
    def forward(self, data: st.DataObject, tokens: list[int], p: SamplingParams | None, logits: bool) -> None:
        seq = self.pick(data)
        self.params[seq] = p or SAMPLINGS[0]
        self.ask(seq, tokens, p, logits=logits)

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if len(self.texts) >= 8:
            return
        seq = self.pick(data)
        (child,) = {side.worker.fresh() for side in self.sides}
        self.op(ForkSequence(seq, child))
        tenant, tokens = self.texts[seq]
        self.texts[child] = (tenant, tokens[:])
        self.params[child] = self.params[seq]
        if seq in self.drawn:
            self.drawn[child] = self.drawn[seq]

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), back=st.integers(0, 40))
    def truncate(self, data: st.DataObject, back: int) -> None:
        seq = self.pick(data)
        tokens = self.texts[seq][1]
        length = max(0, len(tokens) - back)
        self.op(TruncateSequence(seq, length))
        del tokens[length:]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """Also with a call in flight."""
        seq = data.draw(st.sampled_from(sorted(self.texts)))
        self.op(FreeSequence(seq))
        self.gone({seq})

    def gone(self, seqs: set[int]) -> None:
        for call, (seq, _, _) in list(self.pending.items()):
            if seq in seqs:
                del self.pending[call]
        for seq in seqs:
            del self.texts[seq]
            self.drawn.pop(seq, None)

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), name=st.sampled_from("xyz"), tenant=st.sampled_from("ab"))
    def save_and_open(self, data: st.DataObject, name: str, tenant: str) -> None:
        seq = self.pick(data)
        calls = [{side.worker.save(seq, name) for side in self.sides}.pop()]
        (child,) = {side.worker.fresh() for side in self.sides}
        calls += [{side.worker.open_saved(child, tenant, 1, name) for side in self.sides}.pop()]
        for side in self.sides:
            side.worker.flush()
        plain, ahead = (side.answers(calls) for side in self.sides)
        assert plain == ahead
        # What was opened is somebody's: it is not used, but it takes memory and pages.
        self.op(FreeSequence(child))

    @rule(
        tenant=st.sampled_from("ab"),
        pages=st.sampled_from([2, 3, 4, 6, 10, 200]),
        minute=st.sampled_from([0, 40, 300, PLENTY, PLENTY, PLENTY, PLENTY]),
    )
    def limit(self, tenant: str, pages: int, minute: int) -> None:
        """Which pending calls a new limit still finds depends on the steps before."""
        for side in self.sides:
            side.engine.set_quota(TenantQuota(tenant, pages, minute, 2))
            side.engine.check()
        self.answer(but_limits=True)

    @rule(seconds=st.sampled_from([0.5, 7.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.now[0] += seconds

    @rule(side=st.sampled_from([0, 1, 1]), waits=st.booleans())
    def move(self, side: int, waits: bool) -> None:
        """One of the engines goes on by itself."""
        one = self.sides[side]
        if one.engine.in_flight < 3:
            one.engine.launch()
        one.engine.settle(waits)
        one.take()

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "sides"):
            return
        if self.pending:
            return
        # With nothing pending, what a tenant is charged with and holds in sequences is the same.
        plain, ahead = (side.engine.stats().tenants for side in self.sides)
        assert plain.keys() == ahead.keys()
        for name, mine in plain.items():
            theirs = ahead[name]
            assert (mine.sequences, mine.saved, mine.minute_tokens) == (
                theirs.sequences,
                theirs.saved,
                theirs.minute_tokens,
            )

    def teardown(self) -> None:
        if not hasattr(self, "sides"):
            return
        self.answer()
        self.op(EndRun(1))
        for side in self.sides:
            engine = side.engine
            while engine.launch() or engine.settle(True):
                pass
            side.take()
            for tenant in engine.tenants:
                for name in list(tenant.saved):
                    engine.scheduler.remove(tenant.saved.pop(name))
            engine.check()
            assert engine.stats().pages_used == 0 and not engine.has_work()


AheadMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAhead = AheadMachine.TestCase
