"""Token buckets: how rates (requests, tokens, fuel) are bounded. No clock of their own."""

from __future__ import annotations


class Bucket:
    """Holds at most ``burst`` units and gains ``rate`` units a second.

    :meth:`take` refuses when too little is there; :meth:`spend` takes what was used already, into
    debt, so that work whose cost is known only afterwards is paid before the next of it.
    """

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at = now

    def change(self, rate: float, burst: float, now: float) -> None:
        """New bounds; what has been used stays used."""
        used = self.burst - self.level(now)
        self.rate, self.burst = rate, burst
        self._level = burst - used

    def level(self, now: float) -> float:
        """Units that are there; negative is debt."""
        if now > self._at:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
            self._at = now
        return self._level

    def take(self, units: float, now: float) -> bool:
        """Take units if as many are there."""
        if self.level(now) < units:
            return False
        self._level -= units
        return True

    def spend(self, units: float, now: float) -> None:
        """Take units whether they are there or not."""
        self.level(now)
        self._level -= units

    def wait(self, units: float, now: float) -> float:
        """Seconds until as many units are there; infinite if they never are."""
        missing = units - self.level(now)
        if missing <= 0:
            return 0.0
        return missing / self.rate if self.rate > 0 and units <= self.burst else float("inf")

    def used(self, now: float) -> float:
        """Units used and not yet regained."""
        return self.burst - self.level(now)
