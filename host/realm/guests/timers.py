"""One timer a run: a heap in which only a run's newest entry counts."""

from __future__ import annotations

import heapq

from realm.guests.run import GuestRun


class Timers:
    """Times are :func:`time.monotonic` seconds. A run whose ``timer`` is 0 has none."""

    def __init__(self) -> None:
        # (time, number, run); an entry counts only while it is the run's timer.
        self._heap: list[tuple[float, int, GuestRun]] = []
        self._number = 0

    def put(self, run: GuestRun, when: float, runs: int) -> None:
        """Wake a run at a time, and at no other; ``runs`` is how many there are."""
        self._number = number = self._number + 1
        run.timer = number
        heapq.heappush(self._heap, (when, number, run))
        if len(self._heap) > 64 + 4 * runs:
            # Entries of finished runs and past waits: drop them once they are the most.
            self._heap = [entry for entry in self._heap if entry[2].timer == entry[1]]
            heapq.heapify(self._heap)

    def take_due(self, now: float) -> GuestRun | None:
        """A run whose time has come; its timer is spent."""
        heap = self._heap
        while heap:
            when, number, run = heap[0]
            stale = run.timer != number
            if not stale and when > now:
                return None
            heapq.heappop(heap)
            if not stale:
                return run
        return None

    @property
    def next(self) -> float | None:
        """When the next one may be due."""
        return self._heap[0][0] if self._heap else None

    @property
    def runs(self) -> set[GuestRun]:
        """Runs that have a timer."""
        return {run for _, number, run in self._heap if run.timer == number}
