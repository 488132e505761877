"""What a guest worker does towards an engine that runs ahead."""

from __future__ import annotations

import msgspec

from realm.engine.core import EngineCore
from realm.engine.workers import WORKER_SHIFT
from realm.messages import (
    CONTINUE,
    DRAWN,
    NO_LANE,
    EngineOp,
    EngineResult,
    Forward,
    ForwardDone,
    OpenSaved,
    SamplingParams,
    SaveSequence,
)
from tests.tiny import pack


def continues(last: SamplingParams, now: SamplingParams) -> bool:
    """Whether a call may be a row of :data:`CONTINUE` after one with the parameters ``last``."""
    if last.mask is not None or last.bias_tokens is not None:
        return False
    if last.number >= 0:
        return now == msgspec.structs.replace(last, number=last.number + 1)
    return last.temperature == 0 and now == last


class AheadWorker:
    """A worker's side of an engine: puts calls that go on as before into rows, and takes rows back.

    Attributes:
        asked: calls that are not answered. answers: those that are.
        lanes: of each sequence that may go on by a row: (lane, token, parameters of its last call).
    """

    def __init__(self, engine: EngineCore, number: int, *, rows: bool = True) -> None:
        self.engine, self.number, self.rows = engine, number, rows
        self.asked: dict[int, tuple[int, SamplingParams | None]] = {}
        self.answers: dict[int, EngineResult] = {}
        self.lanes: dict[int, tuple[int, int, SamplingParams]] = {}
        self.rows_sent = 0
        self._ops: list[EngineOp] = []
        self._continues = bytearray()
        self._calls = 0
        self._seqs = number << WORKER_SHIFT

    def fresh(self) -> int:
        self._seqs += 1
        return self._seqs

    def call(self) -> int:
        self._calls += 1
        return self._calls

    def op(self, op: EngineOp) -> None:
        for name in ("seq", "parent"):
            self.lanes.pop(getattr(op, name, -1), None)
        self._ops.append(op)

    def forward(
        self, seq: int, tokens: list[int], sampling: SamplingParams | None, *, logits: bool = False, row: bool = True
    ) -> int:
        """``row``: as a row where that is allowed."""
        call = self.call()
        place = self.lanes.pop(seq, None)
        self.asked[call] = (seq, sampling)
        if (
            self.rows
            and row
            and place is not None
            and sampling is not None
            and not logits
            and tokens == [place[1]]
            and continues(place[2], sampling)
        ):
            self._continues += CONTINUE.pack(call, seq, place[0], place[1])
            self.rows_sent += 1
        else:
            self._ops.append(Forward(call, seq, pack(tokens), sampling, logits))
        return call

    def save(self, seq: int, name: str) -> int:
        call = self.call()
        self.op(SaveSequence(call, seq, name))
        self.asked[call] = (seq, None)
        return call

    def open_saved(self, seq: int, tenant: str, run: int, name: str) -> int:
        call = self.call()
        self.op(OpenSaved(call, seq, tenant, run, name))
        self.asked[call] = (seq, None)
        return call

    def flush(self) -> None:
        """Send what was asked since the last time: one turn."""
        if self._ops or self._continues:
            ops, rows = self._ops, bytes(self._continues)
            self._ops, self._continues = [], bytearray()
            self.engine.submit(self.number, ops, rows)

    def receive(self, results: list[EngineResult], rows: bytes) -> None:
        for result in results:
            self._answered(result)
            _, sampling = self.asked.pop(result.call)
            plain = isinstance(result, ForwardDone) and sampling is not None and result.logits is None
            assert not plain or not self.rows, "a drawn token that did not come as a row"
        assert len(rows) % DRAWN.size == 0
        for call, token, logprob, cached, lane in DRAWN.iter_unpack(rows):
            self._answered(ForwardDone(call, token, logprob, cached))
            seq, sampling = self.asked.pop(call)
            assert sampling is not None, "a row for a call that did not draw"
            if lane != NO_LANE:
                self.lanes[seq] = (lane, token, sampling)

    def _answered(self, result: EngineResult) -> None:
        assert result.call in self.asked and result.call not in self.answers, "a result that nobody waits for"
        self.answers[result.call] = result
