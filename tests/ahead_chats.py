"""Sequences that go on token by token on an engine that runs ahead, one case at a time."""

from __future__ import annotations

import msgspec

from realm.engine.core import EngineCore
from realm.messages import (
    CallFailed,
    ForkSequence,
    ForwardDone,
    OpenSequence,
    SamplingParams,
    TenantStats,
    TruncateSequence,
)
from tests.ahead_worker import AheadWorker
from tests.checked_runner import check_result

GREEDY = SamplingParams()


class Chats:
    """Sequences that go on token by token, with all that the engine has to know of them.

    Attributes:
        tokens, sampling: of each sequence; its next call's parameters. asked: its last call and that one's.
        given: the last result of each.
    """

    def __init__(self, engine: EngineCore, *, checked: bool = True) -> None:
        self.engine, self.checked = engine, checked
        self.worker = AheadWorker(engine, 1)
        self.tokens: dict[int, list[int]] = {}
        self.sampling: dict[int, SamplingParams] = {}
        self.asked: dict[int, tuple[int, SamplingParams]] = {}
        self.given: dict[int, ForwardDone] = {}

    def start(self, prompt: list[int], p: SamplingParams = GREEDY, *, tenant: str = "a") -> int:
        seq = self.worker.fresh()
        self.worker.op(OpenSequence(seq, tenant, 1))
        self.tokens[seq], self.sampling[seq] = [], p
        self.ask(seq, prompt)
        return seq

    def begin(self, *prompts: list[int], tenant: str = "a") -> list[int]:
        """New sequences, and the first token of each."""
        seqs = [self.start(prompt, tenant=tenant) for prompt in prompts]
        for seq in seqs:
            self.answer(seq)
        return seqs

    def fork(self, seq: int) -> int:
        child = self.worker.fresh()
        self.worker.op(ForkSequence(seq, child))
        self.tokens[child], self.sampling[child] = self.tokens[seq][:], self.sampling[seq]
        self.given[child] = self.given[seq]
        return child

    def truncate(self, seq: int, count: int) -> None:
        """Drop so many tokens."""
        del self.tokens[seq][len(self.tokens[seq]) - count :]
        self.worker.op(TruncateSequence(seq, len(self.tokens[seq])))

    def ask(self, seq: int, tokens: list[int] | None = None, **how: bool) -> None:
        """``tokens``: else it goes on by what it drew."""
        p = self.sampling[seq]
        tokens = tokens or [self.given[seq].token]
        self.asked[seq] = (self.worker.forward(seq, tokens, p, **how), p)
        if p.number >= 0:
            self.sampling[seq] = msgspec.structs.replace(p, number=p.number + 1)
        self.tokens[seq] += tokens

    def answer(self, seq: int) -> int:
        """The token that the sequence's call gives."""
        call, p = self.asked[seq]
        result = self.result(call)
        assert isinstance(result, ForwardDone), result
        if self.checked:
            check_result(self.tokens[seq], p, result)
        self.given[seq] = result
        return result.token

    def failure(self, seq: int) -> CallFailed:
        """How the sequence's call fails, which leaves it as it was."""
        call, _ = self.asked[seq]
        result = self.result(call)
        assert isinstance(result, CallFailed), result
        self.tokens[seq].pop()
        return result

    def turn(self, *seqs: int) -> list[int]:
        """All of these go on by what they drew, at once, and are answered."""
        for seq in seqs:
            self.ask(seq)
        return [self.answer(seq) for seq in seqs]

    def result(self, call: int) -> object:
        self.worker.flush()
        for _ in range(500):
            if call in self.worker.answers:
                return self.worker.answers.pop(call)
            self.move()
        raise AssertionError("the engine does not answer")

    def move(self) -> bool:
        """One launch, and the results of the step before it: what a server does."""
        self.worker.flush()
        launched = self.engine.launch()
        settled = False
        if self.engine.in_flight > 1 or not launched:
            settled = self.engine.settle(True)
        self.take()
        return launched or settled

    def take(self) -> None:
        for number, (results, rows) in self.engine.take().items():
            assert number == self.worker.number
            self.worker.receive(results, rows)
        self.engine.check()

    def rest(self) -> None:
        """Until there is nothing left to do."""
        for _ in range(100):
            if not self.move() and not self.engine.has_work():
                return
        raise AssertionError("work that nobody asked for does not end")

    def stats(self, tenant: str = "a") -> TenantStats:
        return self.engine.stats().tenants[tenant]
