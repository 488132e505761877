"""Whatever guests, the gateway and the loader do, and in whatever order: each token is one of its own text under
its own adapter, and everybody is answered."""

from __future__ import annotations

from itertools import product

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from realm.guests.abi import ErrorCode
from realm.messages import (
    AdapterFile,
    ApplyAdapter,
    CallDone,
    CallFailed,
    EndRun,
    ForkSequence,
    ForwardDone,
    FreeSequence,
    OpenSequence,
    SamplingParams,
    TenantQuota,
    TruncateSequence,
)
from tests.adapter_loading import manual_loading
from tests.ahead_worker import AheadWorker
from tests.checked_runner import CheckedMemory, check_result, checked_engine

SLOT = 256
CAPACITY = 4 * SLOT
SAMPLINGS = [SamplingParams(), SamplingParams(0.8, top_p=0.9, key=11, number=0), SamplingParams(repetition_penalty=1.4)]


class AdapterMachine(RuleBasedStateMachine):
    """``texts``: of each sequence its tenant and tokens; ``adapters``: the contents that compute it, 0 is none.
    ``named``: the contents that a (tenant, name) stands for; -1 is a file that cannot be read."""

    @initialize(
        ahead=st.sampled_from([0, 1, 2]),
        pages=st.sampled_from([12, 200]),
        slots=st.sampled_from([1, 2, 3, 8]),
        cache=st.sampled_from([0, 2 * SLOT, 1 << 20]),
        names=st.lists(st.sampled_from("xyz"), min_size=1, max_size=6),
    )
    def start(self, ahead: int, pages: int, slots: int, cache: int, names: list[str]) -> None:
        self.engine, self.runner = checked_engine(
            run_ahead=ahead, pages=pages, lanes=4, budget=48, memory=CheckedMemory(slots, CAPACITY)
        )
        self.engine.adapters._cache = cache
        self.loader = manual_loading(self.engine)
        self.engine.set_quota(TenantQuota("", 200, 1 << 40, 2))
        self.worker = AheadWorker(self.engine, 1)
        self.texts: dict[int, tuple[str, list[int]]] = {}
        self.adapters: dict[int, int] = {}
        self.params: dict[int, SamplingParams] = {}
        self.drawn: dict[int, int] = {}
        self.pending: dict[int, tuple[int, list[int], SamplingParams]] = {}
        self.applying: dict[int, tuple[int, int]] = {}
        self.named: dict[tuple[str, str], int] = {}
        # Answered or not, nobody waits for these.
        self.gone: set[int] = set()
        self.last = 0
        # Something to begin with: two tenants' guests, each with an adapter of its own choice.
        for tenant, name, size in product("ab", "xyz", (256,)):
            self.register(tenant, name, size, False, False)
        for at, name in enumerate(names):
            tenant = "ab"[at % 2]
            self.open(tenant, 1, SAMPLINGS[0])
            self.apply_to(max(self.texts), name)

    # --- the gateway ------------------------------------------------------------------------------------

    @rule(
        tenant=st.sampled_from(["a", "b", ""]),
        name=st.sampled_from("xyz"),
        size=st.sampled_from([1, 200, 256, 500, 1000]),
        pinned=st.booleans(),
        broken=st.sampled_from([False] * 7 + [True]),
    )
    def register(self, tenant: str, name: str, size: int, pinned: bool, broken: bool) -> None:
        self.last += 1
        path = "broken" if broken else f"{self.last} {size}"
        self.engine.adapters.register(AdapterFile(tenant, name, path, f"{self.last}", b"", pinned))
        self.named[tenant, name] = -1 if broken else self.last

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        tenant, name = data.draw(st.sampled_from(sorted(self.named)))
        self.engine.adapters.forget(tenant, name)
        del self.named[tenant, name]

    # --- guests -----------------------------------------------------------------------------------------

    def idle(self) -> list[int]:
        busy = {seq for seq, *_ in [*self.pending.values(), *self.applying.values()]}
        return [seq for seq in self.texts if seq not in busy]

    def op(self, op: object) -> None:
        self.worker.op(op)  # type: ignore[arg-type]
        self.worker.flush()

    def ask(self, seq: int, tokens: list[int], p: SamplingParams) -> None:
        if p.number >= 0:
            self.params[seq] = SamplingParams(p.temperature, p.top_k, p.top_p, key=p.key, number=p.number + 1)
        self.pending[self.worker.forward(seq, tokens, p)] = (seq, tokens, p)
        self.worker.flush()

    @rule(tenant=st.sampled_from("ab"), count=st.integers(1, 40), p=st.sampled_from(SAMPLINGS))
    def open(self, tenant: str, count: int, p: SamplingParams) -> None:
        if len(self.texts) >= 8:
            return
        seq = self.worker.fresh()
        self.texts[seq], self.adapters[seq], self.params[seq] = (tenant, []), 0, p
        self.op(OpenSequence(seq, tenant, 1))

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), name=st.sampled_from(["x", "y", "z", ""]))
    def apply(self, data: st.DataObject, name: str) -> None:
        self.apply_to(data.draw(st.sampled_from(self.idle())), name)

    def apply_to(self, seq: int, name: str) -> None:
        tenant = self.texts[seq][0]
        call = self.worker.call()
        contents = 0
        if name:
            contents = self.named.get((tenant, name), self.named.get(("", name), -2))
        self.applying[call] = (seq, contents)
        self.worker.asked[call] = (seq, None)
        self.op(ApplyAdapter(call, seq, name))

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), count=st.integers(1, 30), p=st.sampled_from(SAMPLINGS))
    def forward(self, data: st.DataObject, count: int, p: SamplingParams) -> None:
        seq = data.draw(st.sampled_from(self.idle()))
        self.params[seq] = p
        self.ask(seq, [count % 3] * count, p)

    @rule(turns=st.integers(1, 60), some=st.integers(1, 8))
    def go_on(self, turns: int, some: int) -> None:
        """Some sequences go on by what they drew, one turn after another."""
        for _ in range(turns):
            for seq in self.idle()[:some]:
                self.ask(seq, [self.drawn.get(seq, 7)], self.params[seq])
            self.move(True, True)

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if len(self.texts) >= 8:
            return
        seq = data.draw(st.sampled_from(self.idle()))
        child = self.worker.fresh()
        self.op(ForkSequence(seq, child))
        self.texts[child] = (self.texts[seq][0], self.texts[seq][1][:])
        self.adapters[child], self.params[child] = self.adapters[seq], self.params[seq]

    @precondition(lambda self: self.idle())
    @rule(data=st.data(), back=st.integers(0, 40))
    def truncate(self, data: st.DataObject, back: int) -> None:
        seq = data.draw(st.sampled_from(self.idle()))
        tokens = self.texts[seq][1]
        del tokens[max(0, len(tokens) - back) :]
        self.op(TruncateSequence(seq, len(tokens)))

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """Also with a call pending."""
        seq = data.draw(st.sampled_from(sorted(self.texts)))
        self.op(FreeSequence(seq))
        for calls in (self.pending, self.applying):
            for call in [call for call, entry in calls.items() if entry[0] == seq]:
                del calls[call]  # type: ignore[attr-defined]
                self.gone.add(call)
        del self.texts[seq]
        self.drawn.pop(seq, None)

    # --- the engine -------------------------------------------------------------------------------------

    @rule(works=st.booleans(), waits=st.booleans())
    def move(self, works: bool, waits: bool) -> None:
        """One turn of the engine's loop; ``works``: the loader does what it was asked for."""
        if works:
            self.loader.work()
        self.engine.advance()
        if self.engine.in_flight < 2:
            self.engine.launch()
        self.engine.settle(waits)
        self.take()

    def take(self) -> None:
        for _, (results, rows) in self.engine.take().items():
            self.worker.receive(results, rows)
        for call, result in list(self.worker.answers.items()):
            del self.worker.answers[call]
            if call in self.gone:
                continue
            if call in self.applying:
                seq, contents = self.applying.pop(call)
                if isinstance(result, CallDone):
                    assert contents >= 0 and result.value == (4 if contents else 0)
                    if self.adapters[seq] != contents:
                        self.drawn.pop(seq, None)
                    self.adapters[seq] = contents
                else:
                    assert isinstance(result, CallFailed) and result.code == ErrorCode.NOT_FOUND and contents < 0
            else:
                seq, tokens, p = self.pending.pop(call)
                if isinstance(result, CallFailed):
                    # Only a sequence beyond pool or context fails: adapters that were had once can be had again.
                    assert result.code in (ErrorCode.OUT_OF_MEMORY, ErrorCode.CONTEXT_FULL), result
                    continue
                assert isinstance(result, ForwardDone)
                self.texts[seq][1].extend(tokens)
                check_result(self.texts[seq][1], p, result, self.adapters[seq])
                self.drawn[seq] = result.token

    @rule()
    def everybody_is_answered(self) -> None:
        for _ in range(400):
            if not self.pending and not self.applying:
                return
            self.move(True, True)
        raise AssertionError("a call is not answered")

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.everybody_is_answered()
        self.op(EndRun(1))
        self.texts.clear()
        for tenant, name in self.named:
            self.engine.adapters.forget(tenant, name)
        while self.engine.launch() or self.engine.settle(True):
            pass
        self.engine.check()
        assert self.engine.stats().pages_used == 0


AdapterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAdapters = AdapterMachine.TestCase
