"""One adapter, and what is asked of those who use adapters: the nouns of :mod:`realm.engine.adapters`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from realm.guests.abi import ErrorCode

if TYPE_CHECKING:
    from realm.adapters.weights import AdapterWeights
    from realm.engine.sequence import Call, Sequence

SHARED = ""
"""In place of a tenant: an adapter of everybody's."""

MAX_ADAPTER_NAME = 128
"""Longest name of an adapter, in characters."""

LEAST_WAITING = 64
"""Calls that may wait for an adapter before cancelled ones are looked for."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter of one tenant, under the name it had when it was registered.

    Attributes:
        identity: says which weights these are, in the keys of prefix pages.
        named: whether its tenant's name still stands for it.
        state: registered, reading, cached, placing or resident.
        rank: its largest; 0 before it was read. size: bytes of its weights; 0 before.
        weights: in host memory, or None. slot, at: where it is resident; slot is -1 elsewhere.
        since: step in which it became resident. used: number of its last use; the larger, the later.
        draining: its sequences leave it, to make room for another.
        keeps: it is pinned, and its size counts among the pinned ones'.
        coming: it is pinned or a sequence has got it, so it is brought in although no call waits for it yet: if that
            takes nobody's place who uses it.
        sequences: that have it. queued: those of them whose calls wait for steps.
        loads: how often it was read. error: why it could not be read the last time.
        calls: calls that wait until it is resident. applications: calls that wait until it was read once.
    """

    tenant: str
    name: str
    path: str
    sha256: str
    config: bytes
    identity: bytes
    pinned: bool = False
    named: bool = True
    state: str = "registered"
    rank: int = 0
    size: int = 0
    weights: AdapterWeights | None = None
    slot: int = -1
    at: int = 0
    since: int = 0
    used: int = 0
    draining: bool = False
    keeps: bool = False
    coming: bool = False
    sequences: int = 0
    queued: int = 0
    loads: int = 0
    error: str | None = None
    calls: list[tuple[Sequence, Call]] = field(default_factory=list)
    applications: list[tuple[Sequence, Call]] = field(default_factory=list)
    _room: int = LEAST_WAITING

    def wait(self, waiting: list[tuple[Sequence, Call]], sequence: Sequence, call: Call) -> None:
        """Add to ``waiting``, which is :attr:`calls` or :attr:`applications`.

        Whoever makes calls and frees their sequences at once would have all of them kept here, with their tokens,
        until the loader is done. So the cancelled ones are forgotten each time that there are twice as many.
        """
        waiting.append((sequence, call))
        if len(self.calls) + len(self.applications) > self._room:
            self.forget_cancelled()
            self._room = max(LEAST_WAITING, 2 * (len(self.calls) + len(self.applications)))

    def forget_cancelled(self) -> None:
        """Forget calls that nobody waits for any more."""
        self.calls = [(sequence, call) for sequence, call in self.calls if sequence.call is call]
        self.applications = [(sequence, call) for sequence, call in self.applications if sequence.call is call]

    @property
    def usable(self) -> bool:
        """Whether a step may use it from now on."""
        return self.state == "resident" and not self.draining

    @property
    def forgettable(self) -> bool:
        """Whether nobody can ask for it any more."""
        return not self.named and not self.sequences and not self.applications


class Users(Protocol):
    """What the core knows of those who use adapters, and what it does for them."""

    @property
    def step(self) -> int:
        """Number of the next step."""
        ...

    @property
    def in_flight(self) -> int:
        """Steps that are launched and not settled."""
        ...

    def in_use(self) -> dict[Adapter, bool]:
        """Adapters that steps in flight and lanes use; True for those of lanes only whose guests have not asked for
        long. Beside them those that have calls queued are in use."""
        ...

    def leave_lanes(self, adapter: Adapter) -> None:
        """Take its sequences out of their lanes."""
        ...

    def applied(self, adapter: Adapter, sequence: Sequence, call: Call) -> None:
        """The adapter is in memory: the sequence can have it."""
        ...

    def resumed(self, sequence: Sequence, call: Call) -> None:
        """The call need not wait any more."""
        ...

    def refused(self, sequence: Sequence, call: Call, code: ErrorCode, message: str) -> None:
        """The call's adapter cannot be had."""
        ...
