"""Places for connections that have not proved who they are. No I/O.

A flood of such connections must not keep others from getting in. So when there is no place, it is
the oldest connection that goes, and of the address that has the most: a client that means it is
through within a moment, one that only holds a place is not. A burst of many clients at once finds
nobody old enough to go; then the new one is turned away and may come again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from realm.settings import GatewayLimits

T = TypeVar("T", bound=Hashable)


class Admission(Generic[T]):
    """Times are the caller's, in seconds, and never go back."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._address: dict[T, str] = {}
        self._since: dict[str, OrderedDict[T, float]] = {}

    def room(self, address: str, now: float) -> tuple[bool, T | None]:
        """Whether one more may come from an address; and who has to leave for it (and has left, here)."""
        limits = self._limits
        here = self._since.get(address)
        if here is not None and len(here) >= limits.newcomers_per_address:
            crowd = here
        elif len(self._address) >= limits.newcomers:
            crowd = max(self._since.values(), key=len)
        else:
            return True, None
        oldest, since = next(iter(crowd.items()))
        if now - since < limits.newcomer_grace:
            return False, None
        self.leave(oldest)
        return True, oldest

    def enter(self, who: T, address: str, now: float) -> None:
        """Take a place, after :meth:`room` has found one."""
        self._address[who] = address
        self._since.setdefault(address, OrderedDict())[who] = now

    def leave(self, who: T) -> None:
        """Give the place back: authenticated, or gone. Once or more often."""
        address = self._address.pop(who, None)
        if address is None:
            return
        here = self._since[address]
        del here[who]
        if not here:
            del self._since[address]

    def __len__(self) -> int:
        return len(self._address)
