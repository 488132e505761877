"""Sequences that decode token by token, as arrays: the part of the engine that every token goes through.

A sequence gets a *lane* when a call of it is launched that draws its next token on the device. From then
on its calls are *rows*: row 0 is that call's last token, row j takes in what row j - 1 drew. Each lane
counts its rows on their way::

    answered <= settled <= launched          launched: given to the device; settled: drawn
    answered <= claimed <= answered + 1      claimed: asked for by the guest; answered: told to it

``launched > claimed`` is running ahead: a row was launched before its guest asked for it. ``claimed >
launched`` is a row that is due. A guest that goes on as before claims the next row by 24 bytes
(:data:`realm.messages.CONTINUE`); anything else that it does takes its sequence out of the lane, back to
the scheduler, and rows that nobody claimed are forgotten. So a guest can never observe that they were
computed: what they wrote lies behind the sequence's end, and is written again before anything reads it.

Everything here is array operations over all rows of a step, or work that is done once in
:data:`FLUSH_ROWS` rows of a lane.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from realm.engine.batch import Flags, Ints, Longs
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.sampling import LEAST_TEMPERATURE, MOST_TOP_K
from realm.engine.sequence import Call, Sequence, Tenant

LOG_ROWS = 64
"""Drawn tokens that a lane remembers; a power of two."""
FLUSH_ROWS = 48
"""Claimed rows after which they are moved to the sequence. Rows run ahead have the rest of the log."""

CLAIM = np.dtype([("call", "<u8"), ("seq", "<i8"), ("lane", "<u4"), ("token", "<u4")])
"""Rows of :data:`realm.messages.CONTINUE`."""
ANSWER = np.dtype([("call", "<u8"), ("token", "<i4"), ("logprob", "<f4"), ("cached", "<u4"), ("lane", "<u4")])
"""Rows of :data:`realm.messages.DRAWN`."""

Rows = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class Ticket:
    """Which rows of a step belong to which lanes: ``lanes`` [n], and their ``epochs`` when it was launched.

    A lane that was given to another sequence meanwhile has another epoch: what was drawn is nobody's then.
    """

    rows: Longs
    lanes: Longs
    epochs: Longs


class Lanes:
    """The state of ``count`` lanes. Holds no policy: who gets a lane, and who runs ahead, is the core's.

    Attributes:
        count: lanes for sequences that go on. As many again, from ``count`` on, are for rows of one step.
        tables: int32 [2 * count, width], page numbers; ``sequence.pages`` is the truth.
        sequences: the sequence in each lane.
        tenants: tenants with a lane; ``slot`` says which is each lane's.
        active: bool [count], whether a lane is in use; all other arrays hold anything where it is not.
        adapter: int32 [count], slots of their sequences' adapters, or -1. adapted: how many lanes have one.
    """

    def __init__(self, count: int, width: int, context: int) -> None:
        """``width``: pages of the longest sequence. ``context``: its tokens."""
        self.count = count
        self.context = context
        self.tables: Ints = np.zeros((2 * count, width), dtype=np.int32)
        self.sequences: list[Sequence | None] = [None] * count
        self.tenants: list[Tenant | None] = []
        self._lanes_of: list[int] = []
        self._slots: dict[Tenant, int] = {}
        self._free = list(range(count - 1, -1, -1))
        self.active: Flags = np.zeros(count, dtype=np.bool_)
        self.epoch: Longs = np.zeros(count, dtype=np.int64)

        def longs() -> Longs:
            return np.zeros(count, dtype=np.int64)

        self.slot, self._seq, self._worker, self._cached = longs(), longs(), longs(), longs()
        self._call = np.zeros(count, dtype=np.uint64)
        self.base, self.room, self.asked, self._count = longs(), longs(), longs(), longs()
        self.claimed, self.launched, self.settled, self.answered, self._flushed = (longs() for _ in range(5))
        self.key = np.zeros(count, dtype=np.uint64)
        self.number = longs()
        self.temperature = np.zeros(count, dtype=np.float32)
        self.top_k = np.zeros(count, dtype=np.int32)
        self.top_p = np.ones(count, dtype=np.float32)
        self.min_p = np.zeros(count, dtype=np.float32)
        self.logprob: Flags = np.zeros(count, dtype=np.bool_)
        self.filtered: Flags = np.zeros(count, dtype=np.bool_)
        self.adapter: Ints = np.full(count, -1, dtype=np.int32)
        self.adapted = 0
        self._tokens: Ints = np.zeros((count, LOG_ROWS), dtype=np.int32)
        self._logprobs = np.zeros((count, LOG_ROWS), dtype=np.float32)

    @property
    def used(self) -> int:
        """Lanes in use."""
        return self.count - len(self._free)

    @property
    def full(self) -> bool:
        return not self._free

    # --- one lane -------------------------------------------------------------------------------

    def attach(self, sequence: Sequence, call: Call, base: int, step: int) -> int:
        """Give a sequence a lane, with its call as row 0, launched and claimed; returns the lane.

        ``base`` is the position of the call's last token. There must be a free lane (:attr:`full`), and
        the call must have sampling parameters without mask, penalty and bias.
        """
        p = call.sampling
        assert p is not None
        lane = self._free.pop()
        self.sequences[lane] = sequence
        sequence.lane = lane
        self.active[lane] = True
        tenant = sequence.tenant
        slot = self._slots.get(tenant)
        if slot is None:
            slot = next((at for at, other in enumerate(self.tenants) if other is None), len(self.tenants))
            if slot == len(self.tenants):
                self.tenants.append(tenant)
                self._lanes_of.append(0)
            self.tenants[slot] = tenant
            self._slots[tenant] = slot
        self._lanes_of[slot] += 1
        self.slot[lane] = slot
        self._seq[lane], self._worker[lane], self._call[lane] = sequence.id, sequence.worker, call.number
        self._cached[lane], self._count[lane] = call.cached, call.count
        self.base[lane], self.asked[lane] = base, step
        self.claimed[lane] = self.launched[lane] = 1
        self.settled[lane] = self.answered[lane] = self._flushed[lane] = 0
        self.key[lane], self.number[lane] = p.key, p.number
        # Not below the least temperature: float32 would round it to 0, which is greedy.
        self.temperature[lane] = max(p.temperature, LEAST_TEMPERATURE) if p.temperature else 0.0
        self.top_k[lane] = min(p.top_k, MOST_TOP_K)
        self.top_p[lane], self.min_p[lane] = p.top_p, p.min_p
        self.logprob[lane], self.filtered[lane] = p.logprob, call.filtered
        # It stays in its slot as long as a lane uses it.
        self.adapter[lane] = -1 if sequence.adapter is None else sequence.adapter.slot
        self.adapted += sequence.adapter is not None
        sequence.sampling = p
        self.show(lane, sequence.pages)
        return lane

    def detach(self, lane: int) -> None:
        """The lane is free again. What its rows in flight will draw is nobody's."""
        sequence = self.sequences[lane]
        assert sequence is not None
        sequence.lane = -1
        self.adapted -= sequence.adapter is not None
        self.sequences[lane] = None
        self.active[lane] = False
        self.epoch[lane] += 1
        self._seq[lane] = -1
        slot = int(self.slot[lane])
        self._lanes_of[slot] -= 1
        if not self._lanes_of[slot]:
            tenant = self.tenants[slot]
            assert tenant is not None
            del self._slots[tenant]
            self.tenants[slot] = None
        self._free.append(lane)

    def show(self, lane: int, pages: list[int]) -> None:
        """Write a sequence's pages into a row of the tables."""
        self.tables[lane, : len(pages)] = pages
        if lane < self.count:
            self.room[lane] = len(pages) * PAGE_SIZE

    def add_page(self, lane: int, page: int) -> None:
        """One page more for the lane's sequence, which lists it already."""
        self.tables[lane, self.room[lane] // PAGE_SIZE] = page
        self.room[lane] += PAGE_SIZE

    def pending(self, lane: int) -> bool:
        """Whether the lane's guest waits for an answer."""
        return bool(self.claimed[lane] > self.answered[lane])

    def call(self, lane: int) -> tuple[int, int, int]:
        """Of the last claimed row: the call's number, how many tokens it appended, how many were cached."""
        first = self.claimed[lane] == 1
        return int(self._call[lane]), int(self._count[lane]) if first else 1, int(self._cached[lane]) if first else 0

    def of(self, tenant: Tenant) -> list[int]:
        """A tenant's lanes."""
        slot = self._slots.get(tenant)
        return [] if slot is None else np.flatnonzero(self.active & (self.slot == slot)).tolist()

    def flush(self, lane: int) -> bytes:
        """Tokens that claims have appended since the last flush, uint32 bytes."""
        first, last = int(self._flushed[lane]), int(self.claimed[lane]) - 1
        self._flushed[lane] = last
        appended: Ints = self._tokens[lane, np.arange(first, last) % LOG_ROWS]
        return appended.tobytes()

    # --- rows -----------------------------------------------------------------------------------

    def by_tenant(self, lanes: Longs) -> list[tuple[Tenant, int]]:
        """How many of these lanes each tenant has, for those that have any."""
        counts = np.bincount(self.slot[lanes], minlength=len(self.tenants))
        found = np.flatnonzero(counts)
        return [(tenant, int(counts[at])) for at in found.tolist() if (tenant := self.tenants[at]) is not None]

    def due(self) -> int:
        """Rows that guests wait for and that are not launched."""
        return int(np.count_nonzero(self.active & (self.claimed > self.launched)))

    def held(self, depth: int) -> tuple[int, Longs]:
        """Lanes that can go on at once (but for context and pages), and the workers of those that cannot,
        having ``depth`` rows launched that nobody has claimed: one for each lane."""
        held = self.active & (self.launched - self.claimed >= depth)
        workers = self._worker[held]
        return self.used - len(workers), workers

    def lagging(self) -> bool:
        """Whether a row was drawn that its guest has not asked for: if it does now, the answer is there."""
        return bool((self.active & (self.settled > self.answered)).any())

    def may_run_ahead(self, depth: int) -> bool:
        """Whether any lane has fewer rows launched and not claimed than it may have."""
        ahead = self.launched - self.claimed
        return bool((self.active & (ahead < depth) & (self.base + self.launched < self.context)).any())

    def ready(self, depth: int, allowed: list[bool]) -> tuple[Longs, Longs]:
        """Lanes with a row to launch: those that are due, and those that may run ahead.

        Args:
            depth: most rows launched and not claimed. allowed: for each slot, whether it may run ahead.
        """
        ahead = self.launched - self.claimed
        due = np.flatnonzero(self.active & (ahead < 0))
        if not depth or not any(allowed):
            return due, due[:0]
        may = self.active & (ahead >= 0) & (ahead < depth) & (self.base + self.launched < self.context)
        if not all(allowed):
            may &= np.array(allowed, dtype=np.bool_)[self.slot]
        return due, np.flatnonzero(may)

    def check_claims(self, workers: Longs, claims: Rows) -> tuple[Longs, Flags]:
        """The lane of each claim (0 where it names none), and whether it is good.

        A good one names a lane of its worker with the very sequence, which waits for nothing and drew
        that token last, and there is context left. Of two for one lane the second is not good.

        Args:
            workers: who sent each of ``claims``.
        """
        lane = claims["lane"].astype(np.int64)
        good = lane < self.count
        lane[~good] = 0
        good &= self.active[lane] & (self._seq[lane] == claims["seq"]) & (self._worker[lane] == workers)
        answered = self.answered[lane]
        good &= (answered == self.claimed[lane]) & (answered > 0)
        good &= self._tokens[lane, (answered - 1) % LOG_ROWS] == claims["token"]
        good &= self.base[lane] + answered < self.context
        if len(lane) > 1:
            first = np.zeros(len(lane), dtype=np.bool_)
            candidates = np.flatnonzero(good)
            first[candidates[np.unique(lane[candidates], return_index=True)[1]]] = True
            good &= first
        return lane, good

    def claim(self, lanes: Longs, calls: npt.NDArray[np.uint64], step: int) -> tuple[Longs, Longs, Longs]:
        """Good claims for distinct lanes.

        Returns:
            Lanes whose row was launched already, those whose answer is there, and those to flush.
        """
        self._call[lanes] = calls
        self.asked[lanes] = step
        claimed = self.claimed[lanes] + 1
        self.claimed[lanes] = claimed
        was_ahead = lanes[self.launched[lanes] >= claimed]
        answerable = lanes[self.settled[lanes] >= claimed]
        return was_ahead, answerable, lanes[claimed - 1 - self._flushed[lanes] >= FLUSH_ROWS]

    def launch(self, lanes: Longs) -> None:
        """These lanes' next rows are launched."""
        self.launched[lanes] += 1

    def settle(self, ticket: Ticket, tokens: Ints, logprobs: npt.NDArray[np.float32]) -> Longs:
        """Take in what a step drew; returns the lanes whose guests wait for it."""
        lanes = ticket.lanes
        rows = ticket.rows
        current = self.epoch[lanes] == ticket.epochs
        if not current.all():
            lanes, rows = lanes[current], rows[current]
        settled = self.settled[lanes]
        self._tokens[lanes, settled % LOG_ROWS] = tokens[rows]
        self._logprobs[lanes, settled % LOG_ROWS] = logprobs[rows]
        self.settled[lanes] = settled + 1
        return lanes[self.claimed[lanes] > self.answered[lanes]]

    def drawn(self, lanes: Longs) -> Ints:
        """The tokens that these lanes' guests will be told next."""
        drawn: Ints = self._tokens[lanes, self.answered[lanes] % LOG_ROWS]
        return drawn

    def answer(self, lanes: Longs) -> tuple[Rows, Longs]:
        """Answers to the claimed rows of these lanes, which are settled, and each one's worker."""
        answered = self.answered[lanes]
        answers = np.empty(len(lanes), dtype=ANSWER)
        answers["call"] = self._call[lanes]
        answers["token"] = self._tokens[lanes, answered % LOG_ROWS]
        answers["logprob"] = self._logprobs[lanes, answered % LOG_ROWS]
        answers["cached"] = np.where(answered == 0, self._cached[lanes], 0)
        answers["lane"] = lanes
        self.answered[lanes] = answered + 1
        return answers, self._worker[lanes]

    def check(self) -> None:
        """Verify the counts and tables of all lanes. Raises AssertionError."""
        free = set(self._free)
        slots: dict[int, int] = {}
        for lane, sequence in enumerate(self.sequences):
            if (sequence is None) != (lane in free) or bool(self.active[lane]) != (sequence is not None):
                raise AssertionError(f"lane {lane} is in use and free")
            if sequence is None:
                continue
            if sequence.lane != lane or self._seq[lane] != sequence.id:
                raise AssertionError(f"lane {lane} has another sequence than it says")
            slot = int(self.slot[lane])
            slots[slot] = slots.get(slot, 0) + 1
            if self.tenants[slot] is not sequence.tenant:
                raise AssertionError(f"lane {lane} has another tenant than its sequence")
            counts = (self.answered[lane], self.claimed[lane], self.settled[lane], self.launched[lane])
            answered, claimed, settled, launched = (int(count) for count in counts)
            if not (
                answered <= claimed <= answered + 1 and answered <= settled <= launched and claimed <= launched + 1
            ):
                raise AssertionError(f"lane {lane} has counted its rows wrongly: {counts}")
            if self.room[lane] != len(sequence.pages) * PAGE_SIZE or self.base[lane] + launched > self.room[lane]:
                raise AssertionError(f"lane {lane} has a row outside its sequence's pages")
            if self.adapter[lane] != (-1 if sequence.adapter is None else sequence.adapter.slot):
                raise AssertionError(f"lane {lane} has another adapter than its sequence, or one that is not resident")
            if self.tables[lane, : len(sequence.pages)].tolist() != sequence.pages:
                raise AssertionError(f"lane {lane} has another table than its sequence")
            if len(sequence.tokens) != self.base[lane] + 1 + self._flushed[lane]:
                raise AssertionError(f"lane {lane} has lost a token")
        if len(free) != len(self._free):
            raise AssertionError("a lane is twice among the free ones")
        for slot, tenant in enumerate(self.tenants):
            if self._lanes_of[slot] != slots.get(slot, 0) or (tenant is None) != (slot not in slots):
                raise AssertionError("a tenant's lanes are counted wrongly")
