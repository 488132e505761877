"""Who may try a key now: addresses that send wrong ones wait, longer each time. No I/O.

Keys are 256 random bits, so nobody finds one by trying; what the wait saves is the registry's time and
the log. Every address is on its own: neither failures nor successes of others count for it.

Tenants can sit behind one address with somebody who tries keys. Their keys go on working: a key that
was good from this address before is looked up whatever the address has done since. That opens no way
to guess: only such a key itself passes.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

from realm.settings import GatewayLimits

ADDRESSES = 16_384
"""Most addresses remembered; the one whose last failure is the oldest is forgotten first."""
KNOWN_KEYS = 16_384
"""Most pairs of an address and a good key remembered."""
_MOST_DOUBLINGS = 32


def client_address(peer: Any) -> str:
    """What counts as one client of a socket's peer name: an IPv4 address or the first 64 bits of an IPv6 one.

    Whoever has one IPv6 address usually has the whole /64.
    """
    if not isinstance(peer, tuple) or not peer:
        return ""
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))


@dataclass(slots=True)
class _Failures:
    times: deque[float] = field(default_factory=deque)
    doublings: int = 0
    until: float = 0.0


class Backoff:
    """See the module's docstring. Times are the caller's, in seconds, and never go back."""

    def __init__(self, limits: GatewayLimits, *, addresses: int = ADDRESSES, keys: int = KNOWN_KEYS) -> None:
        self._limits = limits
        self._most_addresses = addresses
        self._most_keys = keys
        self._failures: OrderedDict[str, _Failures] = OrderedDict()
        self._known: OrderedDict[bytes, None] = OrderedDict()
        self._secret = secrets.token_bytes(32)

    def wait(self, address: str, key: str, now: float) -> float:
        """Seconds until this key may be tried from here; 0 is now."""
        found = self._failures.get(address)
        if found is None or found.until <= now or self._digest(address, key) in self._known:
            return 0.0
        return found.until - now

    def succeeded(self, address: str, key: str) -> None:
        """The key was good. What others at this address have failed stays counted."""
        digest = self._digest(address, key)
        self._known[digest] = None
        self._known.move_to_end(digest)
        if len(self._known) > self._most_keys:
            self._known.popitem(last=False)

    def failed(self, address: str, key: str, now: float) -> None:
        """The key was wrong."""
        limits = self._limits
        self._known.pop(self._digest(address, key), None)
        found = self._failures.setdefault(address, _Failures())
        self._failures.move_to_end(address)
        self._forget(now)
        if now < found.until:
            # Looked up before the wait began: many at once count as one step.
            return
        times = found.times
        if found.doublings == 0:
            times.append(now)
            while times[0] < now - limits.auth_window:
                times.popleft()
            if len(times) < limits.auth_failures:
                return
            times.clear()
        wait = limits.auth_backoff_first * 2.0**found.doublings
        found.until = now + min(wait, limits.auth_backoff_most)
        found.doublings = min(found.doublings + 1, _MOST_DOUBLINGS)

    def __len__(self) -> int:
        """Addresses remembered."""
        return len(self._failures)

    def _forget(self, now: float) -> None:
        limits, failures = self._limits, self._failures
        # The front has the oldest last failure; one step a call keeps up with what is added.
        for _ in range(2):
            address, found = next(iter(failures.items()))
            last = max(found.until, found.times[-1] if found.times else 0.0)
            if len(failures) > self._most_addresses or (len(failures) > 1 and last + limits.auth_forget < now):
                del failures[address]
        newest = next(reversed(failures.values()))
        if newest.doublings and newest.until + limits.auth_forget < now:
            newest.doublings = 0
            newest.until = 0.0

    def _digest(self, address: str, key: str) -> bytes:
        # A memory dump should not hold keys in clear, nor anything a guess can be checked against later.
        text = f"{address}\n{key}".encode(errors="surrogatepass")
        return hashlib.blake2b(text, key=self._secret, digest_size=16).digest()
