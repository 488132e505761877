"""What becomes of calls that wait for adapters: between :class:`~realm.engine.adapters.Adapters` and the rest of
the core."""

from __future__ import annotations

from collections.abc import Callable

from realm.engine.adapter import Adapter
from realm.engine.answers import Answers
from realm.engine.pipeline import Pipeline
from realm.engine.scheduler import Scheduler
from realm.engine.sequence import Call, Sequence
from realm.guests.abi import ErrorCode
from realm.messages import CallDone


class AdapterUsers:
    """See :class:`realm.engine.adapter.Users`."""

    def __init__(self, scheduler: Scheduler, pipeline: Pipeline, answers: Answers, clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._answers = answers
        self._clock = clock

    @property
    def step(self) -> int:
        return self._scheduler.step

    @property
    def in_flight(self) -> int:
        return self._pipeline.in_flight

    def in_use(self) -> dict[Adapter, bool]:
        return self._pipeline.adapters_in_use()

    def leave_lanes(self, adapter: Adapter) -> None:
        self._pipeline.leave_lanes(adapter)

    def applied(self, adapter: Adapter, sequence: Sequence, call: Call) -> None:
        sequence.call = None
        self.change(sequence, adapter)
        self._answers.add(sequence.worker, CallDone(call.number, adapter.rank))

    def change(self, sequence: Sequence, adapter: Adapter | None) -> None:
        """Give a sequence another adapter, or none. What it had computed is computed again, and charged again:
        otherwise a guest that changes to and fro would have a long prompt computed for each token it pays for."""
        if sequence.computed:
            sequence.tenant.spend(sequence.computed, self._clock())
        self._scheduler.change_adapter(sequence, adapter)

    def resumed(self, sequence: Sequence, call: Call) -> None:
        self._pipeline.resubmit(sequence, call)

    def refused(self, sequence: Sequence, call: Call, code: ErrorCode, message: str) -> None:
        self._scheduler.cancel(sequence)
        self._scheduler.truncate(sequence, len(sequence.tokens) - call.count)
        self._answers.fail(sequence.worker, call.number, code, message)
