"""Output that waits a little, so that a frame for a client carries more than one token.

A guest emits every token, and an emit that is a frame of its own costs the gateway more than the token
costs the worker. So a run's output goes out at once when none of it did lately, and else is held until
the run waits for something other than the engine, says something else, ends, or an interval is over.
The interval grows with the number of runs: a single one streams token by token.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import TYPE_CHECKING

from realm.run_messages import Output

if TYPE_CHECKING:
    from realm.guests.run import GuestRun

SECONDS_A_RUN = 0.0001
"""The interval, for each run of the worker: all of them together then make 10,000 frames a second at most."""
LONGEST_SECONDS = 0.05
SLACK_SECONDS = 0.001
"""What is due so soon goes out now, rather than in a turn of its own."""
MOST_BYTES = 16 << 10
"""So much is a frame worth sending, whatever the interval."""
_GOLDEN = 0.6180339887


class Outputs:
    """Output of all runs of a worker; one thread owns it.

    Args:
        send: takes what goes out.

    Attributes:
        now: the time of the present turn (:func:`time.monotonic` seconds).
        interval: in seconds; for ``runs`` of them see :meth:`begin`.
    """

    def __init__(self, send: Callable[[Output], None]) -> None:
        self._send = send
        self.now = 0.0
        self.interval = 0.0
        # (time, run number, run); an entry counts only while the run holds output that is due then.
        self._heap: list[tuple[float, int, GuestRun]] = []

    def begin(self, now: float, runs: int) -> None:
        """A turn begins."""
        self.now = now
        self.interval = min(LONGEST_SECONDS, runs * SECONDS_A_RUN)

    def put(self, run: GuestRun, data: bytes) -> None:
        """Output of a run, which goes out now or is held. ``data`` is not empty."""
        usage = run.usage
        held = run.held_output
        if held:
            held += data
            run.held_tokens = usage.new_tokens
            if len(held) > MOST_BYTES:
                self.flush(run)
        elif self.now >= run.output_due or len(data) > MOST_BYTES:
            # Runs that begin together are spread over the interval from their second frame on.
            spread = 1.0 if run.output_due else run.start.run * _GOLDEN % 1.0
            run.output_due = self.now + self.interval * spread
            self._send(Output(run.start.run, data, usage.new_tokens))
        else:
            held += data
            run.held_tokens = usage.new_tokens
            heapq.heappush(self._heap, (run.output_due, run.start.run, run))

    def flush(self, run: GuestRun) -> None:
        """Send what is held of a run."""
        held = run.held_output
        if held:
            run.output_due = self.now + self.interval
            self._send(Output(run.start.run, bytes(held), run.held_tokens))
            held.clear()

    def flush_due(self) -> None:
        """The turn ends: send what has been held long enough."""
        heap = self._heap
        until = self.now + SLACK_SECONDS
        while heap and heap[0][0] <= until:
            due, _, run = heapq.heappop(heap)
            if run.output_due == due:
                self.flush(run)

    @property
    def runs(self) -> set[GuestRun]:
        """Runs whose output is held."""
        return {run for _, _, run in self._heap if run.held_output}

    @property
    def next(self) -> float | None:
        """When the first of what is held is due."""
        heap = self._heap
        while heap and not (heap[0][2].held_output and heap[0][2].output_due == heap[0][0]):
            heapq.heappop(heap)
        return heap[0][0] if heap else None
