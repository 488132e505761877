"""What a host function leaves to be done while its guest waits, off the guest's small stack."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

COPY_FUEL = 4
"""Fuel a byte that is copied or looked over: 1 ns, most of it for memory that was not touched before."""
OFFLOAD_FUEL = 4_000_000
"""Work that is charged more than this (about 1 ms) is left to the helper thread."""


@dataclass(slots=True)
class Job:
    """Work in two halves.

    Attributes:
        fuel: what the guest was charged for it, which is in proportion to the time it takes.
        work: must touch neither the guest's memory nor what another thread may change: the helper
            thread may run it.
        finish: takes what ``work`` gave and gives the host function's result; the owner's thread
            runs it, and only while the guest still waits.
    """

    fuel: int
    work: Callable[[], Any]
    finish: Callable[[Any], int]


Steps = Generator[None, None, "int | None"]
"""Work in small steps, each of a slice at most; it returns the host function's result, or None when
the guest has to wait for the engine."""
