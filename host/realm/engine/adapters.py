"""Which adapters there are, which are in memory, and which may be used by the next step.

An adapter is *registered* (a file that the gateway named), *cached* (its weights are in host memory) or
*resident* (in the runner's memory, in a slot that steps name). Only resident ones compute. A call of a sequence
whose adapter is not resident waits here, and nobody else with it: one loader thread (:mod:`adapter_loader`)
brings in one adapter after another, that of the tenant first which has the least in memory.

When there is no room, others make it, of the tenant that has most in memory, least recently used first:

1. those that no pending call and no lane uses;
2. those in lanes whose guests have not asked for long (they only leave their lanes);
3. those that have been resident for :data:`LEAST_STEPS` steps: their sequences leave their lanes, calls under way
   are finished, and what comes then waits for its adapter like everybody's;
4. pinned ones, for one that does not fit beside them: it is too large, or they lie in the middle of the memory.

Of each kind those leave that lie together, as few as there have to be: a large one would otherwise empty most of a
memory full of small ones, until some that were used long ago happened to be neighbours.

So whoever fits alone gets its turn, and tenants that want more than there is share the memory by time. A pinned
adapter is otherwise not removed as long as all pinned ones take no more than half of the memory.

Nothing is shared between tenants, not even equal contents: how long an adapter takes to load says nothing about
what others have. All of this is the core's, and its thread's.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from realm.engine.adapter import SHARED, Adapter, Users
from realm.engine.adapter_loader import AdapterLoader
from realm.engine.adapter_memory import Ranges
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.messages import AdapterFile, AdapterState

if TYPE_CHECKING:
    from realm.adapters.weights import AdapterWeights
    from realm.engine.batch import AdapterMemory
    from realm.engine.sequence import Call, Sequence
    from realm.models.config import ModelConfig

log = logging.getLogger("realm.engine")

LEAST_STEPS = 16
"""Steps that an adapter in use stays resident at least: else two that want one place would take turns at each."""

PINNED_PART = 2
"""Pinned adapters keep at most one part in as many of the memory."""

TURNS = 4
"""Of so many loads one is whatever has been wanted for longest: whoever holds least goes first otherwise, and a tenant
that never gets to hold anything, because its adapters fail, must not go first for ever."""


class Adapters:
    """All adapters of an engine, and what is in memory of them."""

    def __init__(self, memory: AdapterMemory, model: ModelConfig, users: Users, *, cache: int = 0) -> None:
        """``cache``: bytes of host memory for weights, those of resident adapters included."""
        self._ranges = Ranges(memory.capacity)
        self._free_slots = list(range(memory.slots - 1, -1, -1))
        self._users = users
        self._cache = cache
        self._loader = AdapterLoader(memory, model)
        self._named: dict[tuple[str, str], Adapter] = {}
        # All that are wanted, or have anything in memory.
        self._active: dict[Adapter, None] = {}
        # Those of them that may have to be brought in.
        self._wanted: dict[Adapter, None] = {}
        self._chosen: Adapter | None = None
        self._job: Adapter | None = None
        self._keeping = 0
        self._uses = 0
        self._draining = False
        self._blocked: tuple[int, int] | None = None
        self._choices = 0
        self.loads = 0

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`advance` has something to do."""
        return self._loader.fileno()

    def close(self) -> None:
        """End the loader. Idempotent."""
        self._loader.close()

    # --- names ----------------------------------------------------------------------------------

    def register(self, file: AdapterFile) -> None:
        """A name stands for this file from now on. The same file again changes only whether it is pinned."""
        key = (file.tenant, file.name)
        known = self._named.get(key)
        same = known is not None and (known.sha256, known.config, known.path) == (file.sha256, file.config, file.path)
        if known is None or not same:
            self.forget(*key)
            identity = hashlib.blake2b(file.sha256.encode() + b"\0" + file.config, digest_size=32).digest()
            known = Adapter(file.tenant, file.name, file.path, file.sha256, file.config, identity)
            self._named[key] = known
        known.pinned = file.pinned
        if file.pinned:
            self._active[known] = None
            self._bring(known)
            self._keep(known)
        elif known.keeps:
            known.keeps = False
            self._keeping -= known.size

    def forget(self, tenant: str, name: str) -> None:
        """A name stands for nothing any more."""
        adapter = self._named.pop((tenant, name), None)
        if adapter is not None:
            adapter.named = adapter.pinned = False
            if adapter.keeps:
                adapter.keeps = False
                self._keeping -= adapter.size

    def find(self, tenant: str, name: str) -> Adapter | None:
        """What a tenant means by a name: its own adapter, or else a shared one."""
        return self._named.get((tenant, name)) or self._named.get((SHARED, name))

    @property
    def capacity(self) -> int:
        """Bytes of the runner's memory for adapters."""
        return self._ranges.capacity

    @property
    def resident(self) -> int:
        """How many adapters steps can use now."""
        return sum(adapter.state == "resident" for adapter in self._active)

    def states(self, tenant: str) -> list[AdapterState]:
        """A tenant's adapters that were ever used, or are pinned."""
        shown = {"reading": "loading", "placing": "loading"}
        return [
            AdapterState(
                name,
                "failed" if adapter.error is not None else shown.get(adapter.state, adapter.state),
                adapter.sequences,
                adapter.loads,
                adapter.error,
            )
            for (owner, name), adapter in self._named.items()
            if owner == tenant and (adapter in self._active or adapter.loads or adapter.error)
        ]

    # --- who waits ------------------------------------------------------------------------------

    def apply(self, adapter: Adapter, sequence: Sequence, call: Call) -> None:
        """Tell ``users`` when the adapter can be had; now, if it was read before: where memory is short, what is
        read for this would be gone again before it is used."""
        self._use(adapter)
        if adapter.rank and adapter.error is None:
            self._users.applied(adapter, sequence, call)
        else:
            adapter.wait(adapter.applications, sequence, call)
        self._bring(adapter)

    def admit(self, sequence: Sequence) -> bool:
        """Whether the sequence's call can be in the next step. If not, ``users`` are told when it can."""
        adapter = sequence.adapter
        if adapter is None:
            return True
        self._use(adapter)
        if adapter.usable:
            return True
        assert sequence.call is not None
        adapter.wait(adapter.calls, sequence, sequence.call)
        self._wanted[adapter] = None
        return False

    def _bring(self, adapter: Adapter) -> None:
        """It is to be resident, if there is room."""
        if adapter.slot < 0:
            adapter.coming = True
            self._wanted[adapter] = None

    def _use(self, adapter: Adapter) -> None:
        self._uses += 1
        adapter.used = self._uses
        self._active[adapter] = None

    @property
    def waiting(self) -> bool:
        """Whether anybody waits for an adapter."""
        return any(self._is_wanted(adapter) for adapter in self._wanted)

    @property
    def stands(self) -> bool:
        """Whether somebody may wait for an adapter, and nothing is being loaded: :meth:`advance` is to be called even
        if nothing else happens."""
        return not self._loader.busy and bool(self._wanted or self._draining)

    @staticmethod
    def _is_wanted(adapter: Adapter) -> bool:
        """Whether it is to be brought in. Calls that were cancelled meanwhile do not count."""
        adapter.forget_cancelled()
        if adapter.state == "resident":
            return False
        if adapter.calls or adapter.applications:
            return True
        return adapter.coming and adapter.error is None and (adapter.pinned or adapter.sequences > 0)

    # --- loading --------------------------------------------------------------------------------

    def advance(self) -> None:
        """Take in what the loader has done, and give it the next job. Cheap when there is nothing to do."""
        while (outcome := self._loader.take()) is not None:
            self._blocked = None
            self._finish(outcome[0])
        # One that nobody waits for may be given up: then the next has its turn, as nobody might call again.
        while self.stands:
            # While there is no room, that can change with every step.
            now = (self._users.step, self._users.in_flight)
            if now == self._blocked and self._users.in_flight:
                return
            self._blocked = None
            self._filter_wanted()
            if not self._wanted:
                self._end_draining()
                return
            adapter = self._choose_wanted()
            # It may have been forgotten when the cache was trimmed.
            self._active[adapter] = None
            if adapter.weights is None:
                self._trim_cache()
                adapter.state = "reading"
                self._job = adapter
                self._loader.read(adapter.path, adapter.sha256, adapter.config)
            elif not self._place(adapter):
                self._blocked = now
                return

    def _filter_wanted(self) -> None:
        every, self._wanted = self._wanted, {}
        for adapter in every:
            if self._is_wanted(adapter):
                self._wanted[adapter] = None
            else:
                self._forget_unused(adapter)

    def _choose_wanted(self) -> Adapter:
        """Which one to bring in: one after another, for two that took turns at being read would both never fit."""
        if self._chosen is None or self._chosen not in self._wanted:
            held = self._held_by_tenant()
            # Adapters that somebody waits for go first.
            waiting = [a for a in self._wanted if a.calls or a.applications] or list(self._wanted)
            self._choices += 1
            oldest = self._choices % TURNS == 0
            self._chosen = waiting[0] if oldest else min(waiting, key=lambda a: (held.get(a.tenant, 0), a.used))
        return self._chosen

    def _held_by_tenant(self) -> dict[str, int]:
        held: dict[str, int] = {}
        for adapter in self._active:
            if adapter.slot >= 0 or adapter.weights is not None:
                held[adapter.tenant] = held.get(adapter.tenant, 0) + adapter.size
        return held

    def _finish(self, outcome: AdapterWeights | Exception | None) -> None:
        adapter, self._job = self._job, None
        assert adapter is not None
        if isinstance(outcome, Exception):
            self._fail(adapter, outcome)
        elif outcome is None:
            adapter.state, adapter.since, adapter.coming = "resident", self._users.step, False
            # It may have lost that for another's sake.
            self._keep(adapter)
            self._resume(adapter)
            self._trim_cache()
        else:
            adapter.state, adapter.error = "cached", None
            adapter.weights, adapter.rank = outcome, outcome.rank
            if not adapter.size:
                adapter.size = outcome.nbytes
                self._keep(adapter)
            adapter.loads += 1
            self.loads += 1
            applications, adapter.applications = adapter.applications, []
            for sequence, call in applications:
                if sequence.call is call:
                    self._users.applied(adapter, sequence, call)

    def _fail(self, adapter: Adapter, error: Exception) -> None:
        """It cannot be had: whoever waits for it is told why."""
        if adapter.slot >= 0:
            self._give_back(adapter)
        adapter.state, adapter.weights, adapter.coming = "registered", None, False
        if isinstance(error, RealmError):
            adapter.error = error.message
        else:
            # Not a tenant's fault, or not one that is known: the log has it.
            log.error("adapter %r of tenant %r could not be loaded", adapter.name, adapter.tenant, exc_info=error)
            adapter.error = "the engine could not load it; its log says why"
        too_large = isinstance(error, RealmError) and error.code == "adapter_too_large"
        code = ErrorCode.OUT_OF_MEMORY if too_large else ErrorCode.NOT_FOUND
        message = f"adapter {adapter.name!r}: {adapter.error}"
        waiting = [*adapter.applications, *adapter.calls]
        adapter.applications, adapter.calls = [], []
        self._active.pop(adapter, None)
        self._wanted.pop(adapter, None)
        for sequence, call in waiting:
            if sequence.call is call:
                self._users.refused(sequence, call, code, message)

    def _resume(self, adapter: Adapter) -> None:
        calls, adapter.calls = adapter.calls, []
        for sequence, call in calls:
            if sequence.call is call:
                self._users.resumed(sequence, call)

    def _keep(self, adapter: Adapter) -> None:
        """Count a pinned one's size, if all that are counted leave enough for others."""
        room = self._ranges.capacity // PINNED_PART - self._keeping
        if adapter.pinned and not adapter.keeps and 0 < adapter.size <= room:
            adapter.keeps = True
            self._keeping += adapter.size

    # --- room -----------------------------------------------------------------------------------

    def _place(self, adapter: Adapter) -> bool:
        """Begin to bring it into the runner's memory; False if others have to finish first."""
        assert adapter.weights is not None
        at = self._make_room(adapter, forced=bool(adapter.calls) or adapter.keeps)
        if at is None:
            if adapter.calls or adapter.keeps:
                return False
            # Nobody waits for it, or it is pinned beyond what pinned ones may take: it comes in when it is used. If
            # that is soon, it need not be read again: the cache is trimmed before another is.
            adapter.coming = False
            self._chosen = None
            del self._wanted[adapter]
            return True
        self._chosen = None
        adapter.slot, adapter.at, adapter.state = self._free_slots.pop(), at, "placing"
        self._job = adapter
        self._loader.put(adapter.slot, at, adapter.weights)
        self._end_draining()
        return True

    def _make_room(self, adapter: Adapter, *, forced: bool) -> int | None:
        """Remove others until there is room; None as long as some have to finish first, or where they would have to
        and it is not ``forced``."""
        while True:
            if self._free_slots and (at := self._ranges.allocate(adapter.size)) is not None:
                return at
            residents = [a for a in self._active if a.state == "resident"]
            used = self._users.in_use() | {a: False for a in residents if a.queued}
            others = [a for a in residents if not a.keeps]
            if forced and any(a.draining and a in used for a in others):
                return None
            unused = [a for a in others if a not in used]
            resting = [a for a in others if used.get(a)]
            if victims := self._victims(adapter.size, unused) or self._victims(adapter.size, unused + resting):
                for victim in victims:
                    if victim in used:
                        self._users.leave_lanes(victim)
                    self._evict(victim)
                continue
            if not forced:
                return None
            late = self._users.step - LEAST_STEPS
            if victims := self._victims(adapter.size, [a for a in others if a.since <= late or used.get(a, True)]):
                for victim in victims:
                    if victim in used:
                        # Before its sequences leave their lanes: their next calls must not come back.
                        victim.draining = self._draining = True
                        self._users.leave_lanes(victim)
            elif self._victims(adapter.size, others):
                return None
            else:
                # With all pinned ones there whoever waits would wait for ever. It is kept again when it comes back.
                (kept, *_) = self._in_order([a for a in residents if a.keeps])
                kept.keeps = False
                self._keeping -= kept.size

    def _victims(self, size: int, candidates: list[Adapter]) -> list[Adapter]:
        """Those that leave so that there is a slot, and ``size`` bytes in a row; none if all of them are not enough."""
        order = self._in_order(candidates)
        places = {adapter.at: rank for rank, adapter in enumerate(order)}
        starts = self._ranges.cheapest(size, places)
        if starts is None:
            return []
        return [order[places[start]] for start in starts] or order[:1]

    def _in_order(self, candidates: list[Adapter]) -> list[Adapter]:
        """Who leaves first."""
        held = self._held_by_tenant()
        return sorted(candidates, key=lambda a: (not a.forgettable, -held[a.tenant], a.used))

    def _evict(self, adapter: Adapter) -> None:
        self._give_back(adapter)
        adapter.draining = False
        adapter.state = "registered" if adapter.weights is None else "cached"
        if adapter.calls:
            self._wanted[adapter] = None
        self._forget_unused(adapter)

    def _give_back(self, adapter: Adapter) -> None:
        self._free_slots.append(adapter.slot)
        self._ranges.free(adapter.at)
        adapter.slot = -1

    def _end_draining(self) -> None:
        """Nobody wants the room any more: those that were to leave may stay."""
        self._draining = False
        for adapter in self._active:
            if adapter.draining:
                adapter.draining = False
                self._resume(adapter)

    def _trim_cache(self) -> None:
        """Keep no more weights in host memory than the cache may have."""
        cached = [a for a in self._active if a.weights is not None]
        total = sum(a.size for a in cached)
        shares: dict[str, int] = {}
        for adapter in cached:
            shares[adapter.tenant] = shares.get(adapter.tenant, 0) + adapter.size
        while total > self._cache:
            victim = min(cached, key=lambda a: (not a.forgettable, -shares[a.tenant], a.used))
            cached.remove(victim)
            total -= victim.size
            shares[victim.tenant] -= victim.size
            victim.weights = None
            if victim.state == "cached":
                victim.state = "registered"
            self._forget_unused(victim)

    def _forget_unused(self, adapter: Adapter) -> None:
        """Forget one that has nothing in memory and that nobody waits for."""
        idle = not adapter.calls and not adapter.applications and not adapter.pinned
        if idle and adapter.slot < 0 and adapter.weights is None:
            # It may have been forgotten when the cache was trimmed.
            self._active.pop(adapter, None)

    # --- for tests and when a worker is lost ------------------------------------------------------

    def __iter__(self) -> Iterator[Adapter]:
        """All that have a name, and all that are wanted or in memory."""
        yield from self._active
        yield from (adapter for adapter in self._named.values() if adapter not in self._active)

    def check(self, sequences: dict[Adapter, tuple[int, int]]) -> None:
        """Verify slots, memory and counts. Raises AssertionError.

        Args:
            sequences: how many sequences have each adapter, and how many of those are queued.
        """
        self._ranges.check()
        slots = [a.slot for a in self._active if a.slot >= 0]
        if len({*slots, *self._free_slots}) != len(slots) + len(self._free_slots):
            raise AssertionError("two adapters have one slot, or one has a free slot")
        if sum(-(-a.size // 256) * 256 for a in self._active if a.slot >= 0) != (
            self._ranges.capacity - self._ranges.free_bytes
        ):
            raise AssertionError("the adapters' memory does not add up")
        if self._keeping != sum(a.size for a in self if a.keeps):
            raise AssertionError("the pinned adapters are counted wrongly")
        for adapter, (count, queued) in sequences.items():
            if (adapter.sequences, adapter.queued) != (count, queued):
                raise AssertionError(f"adapter {adapter.name!r} is counted wrongly")
            if count and not adapter.named and adapter not in self._active and adapter.slot >= 0:
                raise AssertionError(f"adapter {adapter.name!r} is resident and unknown")
        for adapter in self:
            if (adapter.slot >= 0) != (adapter.state in ("resident", "placing")):
                raise AssertionError(f"adapter {adapter.name!r} is {adapter.state} in slot {adapter.slot}")
            if adapter.sequences and adapter not in sequences:
                raise AssertionError(f"adapter {adapter.name!r} counts sequences that are not there")
