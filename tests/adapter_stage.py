"""An engine on a checked runner whose adapters are loaded when a test says so, and one worker."""

from __future__ import annotations

from realm.engine.core import EngineCore
from realm.messages import (
    AdapterFile,
    ApplyAdapter,
    EngineResult,
    ForwardDone,
    OpenSequence,
    SamplingParams,
    TenantQuota,
)
from tests.adapter_loading import manual_loading
from tests.ahead_worker import AheadWorker
from tests.checked_runner import CheckedMemory, check_result, checked_engine

GREEDY = SamplingParams()
PLENTY = 1 << 40


class Stage:
    """An engine whose loader works when it is told to, and one worker."""

    def __init__(
        self, *, slots: int = 4, capacity: int = 1024, cache: int = 0, ahead: int = 2, clock: float = 1000.0
    ) -> None:
        self.engine: EngineCore
        self.engine, self.runner = checked_engine(
            run_ahead=ahead, pages=200, lanes=8, memory=CheckedMemory(slots, capacity), clock=lambda: clock
        )
        self.engine.adapters._cache = cache
        self.loader = manual_loading(self.engine)
        self.worker = AheadWorker(self.engine, 1)
        self.texts: dict[int, list[int]] = {}
        self.engine.set_quota(TenantQuota("", 200, PLENTY, 4))

    def register(
        self, name: str, contents: int, size: int = 256, *, tenant: str = "a", pinned: bool = False, path: str = ""
    ) -> None:
        self.engine.adapters.register(
            AdapterFile(tenant, name, path or f"{contents} {size}", str(contents), b"", pinned)
        )

    def open(self, tenant: str = "a", run: int = 1) -> int:
        seq = self.worker.fresh()
        self.worker.op(OpenSequence(seq, tenant, run))
        self.worker.flush()
        self.texts[seq] = []
        return seq

    def apply(self, seq: int, name: str) -> int:
        call = self.worker.call()
        self.worker.asked[call] = (seq, None)
        self.worker.op(ApplyAdapter(call, seq, name))
        self.worker.flush()
        return call

    def forward(self, seq: int, tokens: list[int], p: SamplingParams = GREEDY) -> int:
        call = self.worker.forward(seq, tokens, p)
        self.worker.flush()
        return call

    def turn(self, *, works: bool = True) -> None:
        if works:
            self.loader.work()
        self.engine.advance()
        if self.engine.in_flight < 2:
            self.engine.launch()
        self.engine.settle(True)
        for results, rows in self.engine.take().values():
            self.worker.receive(results, rows)
        self.engine.check()

    def answer(self, call: int, turns: int = 100) -> EngineResult:
        for _ in range(turns):
            if call in self.worker.answers:
                return self.worker.answers.pop(call)
            self.turn()
        raise AssertionError("the call is not answered")

    def applied(self, seq: int, name: str) -> EngineResult:
        return self.answer(self.apply(seq, name))

    def say(self, seq: int, tokens: list[int], contents: int, p: SamplingParams = GREEDY) -> int:
        """A call that must give what the adapter with these contents gives; its token."""
        result = self.answer(self.forward(seq, tokens, p))
        assert isinstance(result, ForwardDone), result
        self.texts[seq] += tokens
        check_result(self.texts[seq], p, result, contents)
        return result.token

    def state(self, name: str, tenant: str = "a") -> str:
        found = [state.state for state in self.engine.adapters.states(tenant) if state.name == name]
        return found[0] if found else "registered"
