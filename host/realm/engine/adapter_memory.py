"""Which bytes of a runner's adapter memory are whose: one range for each adapter. No I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

ALIGNMENT = 256
"""Ranges begin at multiples of this many bytes: what a GPU's widest loads and copies want."""


class Ranges:
    """Gives out ranges of ``capacity`` bytes, the first hole that is large enough each time.

    Adapters differ much in size (a rank of 4 beside one of 256), so equal places would waste most of the memory.
    Holes between ranges are joined as soon as they touch; who needs a larger one has others removed.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self.free_bytes = self.capacity
        self._holes: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []
        self._taken: dict[int, int] = {}

    def allocate(self, size: int) -> int | None:
        """Where ``size`` bytes (more than 0) begin; None if no hole is large enough."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for index, (start, length) in enumerate(self._holes):
            if length >= size:
                if length == size:
                    del self._holes[index]
                else:
                    self._holes[index] = (start + size, length - size)
                self._taken[start] = size
                self.free_bytes -= size
                return start
        return None

    def cheapest(self, size: int, ranks: dict[int, int]) -> list[int] | None:
        """Which ranges to free so that ``size`` bytes are free in a row; None if there are no such ones.

        Of all that would do those whose highest rank is lowest, and then the fewest. To free one after another by rank
        alone, wherever they lie, would free most of a full memory for a range as large as a few of them.

        Args:
            ranks: of the ranges that may be freed, by their beginning.
        """
        best: tuple[int, int] | None = None
        found: list[int] = []
        window: deque[tuple[int, int, int]] = deque()
        total = 0
        # Ranks in the window that are higher than all behind them.
        highest: deque[int] = deque()
        for start, length in sorted([*self._holes, *self._taken.items()]):
            rank = -1 if start not in self._taken else ranks.get(start)
            if rank is None:
                window.clear()
                highest.clear()
                total = 0
                continue
            window.append((start, length, rank))
            total += length
            while highest and highest[-1] < rank:
                highest.pop()
            highest.append(rank)
            while total - window[0][1] >= size:
                _, less, left = window.popleft()
                total -= less
                if left == highest[0]:
                    highest.popleft()
            if total >= size:
                taken = sum(rank >= 0 for _, _, rank in window) if best is None or highest[0] <= best[0] else 0
                if best is None or (highest[0], taken) < best:
                    best = highest[0], taken
                    found = [start for start, _, rank in window if rank >= 0]
        return None if best is None else found

    def free(self, start: int) -> None:
        """Give a range back. Raises KeyError for one that was not given out."""
        size = self._taken.pop(start)
        self.free_bytes += size
        index = bisect_left(self._holes, (start, 0))
        if index < len(self._holes) and self._holes[index][0] == start + size:
            size += self._holes.pop(index)[1]
        if index and sum(self._holes[index - 1]) == start:
            start, before = self._holes.pop(index - 1)
            size += before
        insort(self._holes, (start, size))

    def check(self) -> None:
        """Verify that holes and ranges cover everything once, and that no two holes touch. Raises AssertionError."""
        at, hole_before = 0, False
        holes = dict(self._holes)
        for start, size in sorted([*self._holes, *self._taken.items()]):
            if start != at or size <= 0:
                raise AssertionError(f"bytes {at} to {start} are nobody's, or somebody's twice")
            if hole_before and start in holes:
                raise AssertionError(f"the hole at {start} was not joined with the one before")
            at, hole_before = start + size, start in holes
        if at != self.capacity or sum(holes.values()) != self.free_bytes:
            raise AssertionError("the ranges do not add up to the capacity")
