"""What the engine will tell its workers: results as messages, and drawn tokens as rows."""

from __future__ import annotations

import numpy as np

from realm.engine.batch import Longs
from realm.engine.lanes import ANSWER, Rows
from realm.engine.sequence import BYTES_PER_PAGE, Tenant
from realm.guests.abi import ErrorCode
from realm.limits import LIMITS
from realm.messages import DRAWN, NO_LANE, CallFailed, EngineResult, ForwardDone, LimitMet


class Answers:
    """Results by worker, until they are taken.

    Attributes:
        singly: workers with results for sequences without a lane.
    """

    def __init__(self) -> None:
        self._messages: dict[int, list[EngineResult]] = {}
        self._rows: dict[int, list[bytes]] = {}
        self.singly: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._messages or self._rows)

    def take(self) -> dict[int, tuple[list[EngineResult], bytes]]:
        """All results so far, by worker: messages, and rows of :data:`realm.messages.DRAWN`."""
        messages, self._messages = self._messages, {}
        rows, self._rows = self._rows, {}
        self.singly = set()
        return {
            worker: (messages.get(worker, []), b"".join(rows.get(worker, ())))
            for worker in messages.keys() | rows.keys()
        }

    def forget(self, worker: int) -> None:
        """Drop what a worker would have been told."""
        self._messages.pop(worker, None)
        self._rows.pop(worker, None)
        self.singly.discard(worker)

    def add(self, worker: int, result: EngineResult) -> None:
        self.singly.add(worker)
        self._messages.setdefault(worker, []).append(result)

    def add_rows(self, answers: Rows, workers: Longs) -> None:
        """Rows of :data:`~realm.engine.lanes.ANSWER`, and whose each is."""
        if not len(answers):
            return
        first = int(workers[0])
        if (workers == first).all():
            self._rows.setdefault(first, []).append(answers.tobytes())
            return
        order = np.argsort(workers, kind="stable")
        workers, answers = workers[order], answers[order]
        starts = np.flatnonzero(workers[1:] != workers[:-1]) + 1
        data, size = answers.tobytes(), ANSWER.itemsize
        begin = 0
        for end in [*(starts * size).tolist(), len(data)]:
            self._rows.setdefault(int(workers[begin // size]), []).append(data[begin:end])
            begin = end

    def done(self, worker: int, call: int, token: int, logprob: float, cached: int, logits: bytes | None) -> None:
        """The answer to a call of a sequence without a lane: a row if it can be one."""
        if token < 0 or logits is not None:
            self.add(worker, ForwardDone(call, token, logprob, cached, logits))
        else:
            self.singly.add(worker)
            self._rows.setdefault(worker, []).append(DRAWN.pack(call, token, logprob, cached, NO_LANE))

    def fail(self, worker: int, call: int, code: ErrorCode, message: str) -> None:
        self.add(worker, CallFailed(call, int(code), message))

    def fail_limit(self, worker: int, call: int, met: LimitMet, text: str = "") -> None:
        unit = LIMITS[met.name].unit
        message = text or f"{met.name} of the tenant is {met.limit:,} {unit}, used {met.used:,}"
        self.add(worker, CallFailed(call, int(ErrorCode.LIMIT), message, met))

    def fail_memory(self, worker: int, call: int, tenant: Tenant, code: ErrorCode) -> None:
        if code is not ErrorCode.LIMIT:
            message = "the engine holds as many sequences and tokens as it can; try again when other runs have ended"
            self.fail(worker, call, code, message)
            return
        limit = tenant.quota.kv_pages
        room = limit * BYTES_PER_PAGE
        text = f"the tenant's sequences and their tokens fill the {room:,} bytes that come with kv_pages"
        self.fail_limit(worker, call, LimitMet("kv_pages", limit, -(-tenant.bytes // BYTES_PER_PAGE)), text)


def as_messages(results: list[EngineResult], rows: bytes) -> list[EngineResult]:
    """Results with their rows turned into messages, for callers that are not in a hurry."""
    drawn = np.frombuffer(rows, dtype=ANSWER)
    return results + [ForwardDone(call, token, logprob, cached) for call, token, logprob, cached, _ in drawn.tolist()]
