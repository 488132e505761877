"""Two ceilings of a worker's memory: one for its guests, and a higher one for its own work.

Guests that take all there is leave nothing for the messages that say so. So the limit is lower while
a guest runs, by a reserve that only the host's own code can use.
"""

from __future__ import annotations

import math
import os
import resource
from typing import Final, Protocol

RESERVE: Final = 256 << 20
"""Bytes that guests do not get. The largest turn's messages are 32 MiB a frame, copied a few times."""
NEAR: Final = 32 << 20
"""Closer than this to the guests' ceiling, and somebody's memory cannot grow any more."""
_LEAST: Final = 64 << 20
_PAGE: Final = resource.getpagesize()


class Ceiling(Protocol):
    """Around everything that a guest can make grow: :meth:`lower`, then :meth:`lift`."""

    most: int
    """Bytes of the process that guests may bring it to."""

    def lower(self) -> None: ...

    def lift(self) -> None: ...

    def room(self) -> float:
        """Bytes that guests may still take; below 0 if the host is beyond their part already."""

    def crowded(self) -> bool:
        """Whether guests have used up their part, or nearly."""


class NoCeiling:
    """For a process without a limit, as in tests and local runs."""

    most = 0

    def lower(self) -> None: ...

    def lift(self) -> None: ...

    def room(self) -> float:
        return math.inf

    def crowded(self) -> bool:
        return False


class DataCeiling:
    """By the soft limit of RLIMIT_DATA, which the kernel checks; the hard one stays as it is.

    To be made after that was set. Lowering and lifting take 1.2 us together.
    """

    def __init__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        self.most = max(_LEAST, hard - RESERVE)
        self._lower = (self.most, hard)
        self._full = (hard, hard)
        # Opened now: a contained process cannot.
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    def lower(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._lower)

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._full)

    def room(self) -> float:
        # The sixth number is what RLIMIT_DATA counts, and the stack, in pages.
        return self.most - int(os.pread(self._statm, 256, 0).split()[5]) * _PAGE

    def crowded(self) -> bool:
        return self.room() < NEAR

    def close(self) -> None:
        os.close(self._statm)
