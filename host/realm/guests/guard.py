"""Guests may take memory up to their ceiling, the host's own code beyond it: who is under it when.

The ceiling is a limit of the whole process, and native code of the host (the tokenizer) aborts the process
where it gets no memory. So the limit is lowered only while the helper is kept from working. While the
helper works, guests run without it as long as all that run in that turn could grow to their own limits
below the ceiling; else the turn waits for the end of the helper's present work, and is under the limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from realm.guests.helper import HelperThread
from realm.sandbox import Ceiling

if TYPE_CHECKING:
    from realm.guests.run import GuestRun

T = TypeVar("T")


class MemoryGuard:
    """One thread owns it, that of the runtime. Without a ceiling it does nothing."""

    def __init__(self, ceiling: Ceiling | None = None, helper: HelperThread | None = None) -> None:
        self._ceiling = ceiling
        self._helper = helper
        self._low = False
        # Bytes that guests may still take while the limit is not lowered.
        self._room = math.inf

    def enter(self) -> None:
        """From now on guests run."""
        if self._ceiling is None:
            return
        if self._helper is None or self._helper.hold():
            self._lower(self._ceiling)
        else:
            self._room = self._ceiling.room()

    def leave(self) -> None:
        """No guest runs any more."""
        if self._ceiling is None:
            return
        self._ceiling.lift()
        self._low, self._room = False, math.inf
        if self._helper is not None:
            self._helper.let_go()

    def admit(self, run: GuestRun) -> None:
        """A guest is about to run, and may take all that its own limit allows."""
        size = run.start.limits.memory_bytes
        if size > self._room:
            size = self._measure(size - (0 if run.fiber is None else run.fiber.memory_bytes))
        self._room -= size

    def _measure(self, growth: int) -> int:
        assert self._ceiling is not None and self._helper is not None, "only the helper's work keeps the limit up"
        self._room = self._ceiling.room()
        if growth > self._room:
            self._helper.hold(wait=True)
            self._lower(self._ceiling)
        return growth

    def _lower(self, ceiling: Ceiling) -> None:
        ceiling.lower()
        self._low, self._room = True, math.inf

    def around(self, work: Callable[[], T]) -> T:
        """Do work of the host between two slices: it may use what guests do not get."""
        if not self._low or self._ceiling is None:
            return work()
        self._ceiling.lift()
        try:
            return work()
        finally:
            self._ceiling.lower()
