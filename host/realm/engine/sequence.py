"""What the engine knows of a sequence, and of the tenant it belongs to."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from realm.buckets import Bucket
from realm.engine.kv_cache import PAGE_SIZE, PageHolder
from realm.messages import LimitMet, SamplingParams, TenantQuota, TenantStats

if TYPE_CHECKING:
    from realm.engine.adapter import Adapter

MINUTE = 60.0

SEQUENCE_BYTES = 512
TOKEN_BYTES = 4
BYTES_PER_PAGE = 4096
"""Memory for tokens and sequences that comes with each page of ``kv_pages``.

By default 32 MiB: 8 million tokens, or 65,536 sequences, which is what 256 runs of 256 sequences are.
A sequence counts :data:`SEQUENCE_BYTES` and :data:`TOKEN_BYTES` a token, whether forked, saved or
empty, because a fork copies its parent's tokens; a pending call counts its mask and bias. Page tables
and keys may add as much again.
"""


AHEAD_CREDIT = 64.0
"""Rows that a tenant may waste by running ahead, at most, ..."""
AHEAD_PER_SEQUENCE = 4.0
"""... besides so many for each sequence it has, because all of them may end at once."""
AHEAD_EARNED = 0.25
"""How many more each token that its guests ask for allows: so at most a fifth of its rows are wasted for long."""


@dataclass(slots=True)
class Call:
    """A pending ``forward``: done when everything in its sequence is computed.

    Attributes:
        number: the worker's number for the call. order: engine-wide arrival number.
        count: tokens the call appended. cached: of those, how many the prefix cache held.
        filtered: whether its draw may need a whole row, which is what costs (:mod:`~realm.engine.sampling`).
        weight: memory of its mask and bias, in tokens of :data:`TOKEN_BYTES`.
    """

    number: int
    order: int
    count: int
    sampling: SamplingParams | None
    want_logits: bool
    cached: int = 0
    matched: bool = False
    filtered: bool = False
    weight: int = 0

    def __post_init__(self) -> None:
        p = self.sampling
        if p is not None:
            self.filtered = p.temperature > 0 and (p.top_p < 1 or p.top_k > 0)
            if p.mask is not None or p.bias_tokens is not None:
                self.weight = (len(p.mask or b"") + 2 * len(p.bias_tokens or b"")) // TOKEN_BYTES


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of one sequence and how much of their KV stands in pages.

    ``tokens`` is the truth; pages can be dropped at any time (preemption) and are recomputed.

    Invariants: ``computed <= len(tokens)``; ``len(pages) * PAGE_SIZE >= computed``;
    ``keys[i]`` is the key of ``pages[i]`` for the leading full pages whose key is known.

    Attributes:
        arrival: engine-wide number of the sequence's creation; older ones are preempted last.
        queued: whether the scheduler has its call pending.
        last_step: number of the last step that computed it.
        lane: its lane (:mod:`realm.engine.lanes`), or -1. While it has one, its pending call and its last
            tokens are there, and ``call`` is None.
        sampling: of its last call in a lane, for one that goes on as before when the lane is gone.
        adapter: whose weights compute it, beside the base model's. root: parent key of its first page, or None
            for its tenant's.
        held: whether its call waits for something else than a step (:attr:`Scheduler.gate`).
    """

    id: int
    worker: int
    tenant: Tenant
    run: int
    arrival: int
    tokens: array[int] = field(default_factory=lambda: array("I"))
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    call: Call | None = None
    queued: bool = False
    last_step: int = -1
    lane: int = -1
    sampling: SamplingParams | None = None
    adapter: Adapter | None = None
    root: bytes | None = None
    held: bool = False

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the pending call is done."""
        return len(self.tokens) - self.computed

    def page_tokens(self, page: int) -> bytes:
        """uint32 bytes of the tokens of the page at index ``page``."""
        return self.tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes()

    def parent_key(self, page: int) -> bytes:
        """Key that page index ``page`` is chained to; all earlier pages must have keys."""
        if page:
            return self.keys[page - 1]
        return self.tenant.root if self.root is None else self.root


class Tenant(PageHolder):
    """One tenant's account. The scheduler owns the queues, the core what is saved.

    Attributes:
        quota: what it may take. root: parent key of its sequences' first pages.
        counter: virtual token counter. last_step: when it was last served.
        decodes, prompts: its pending sequences by id, in the order of their calls.
        idle: sequences with pages and nothing pending, least recently used first.
        blocked: its oldest sequence that got no pages in the last plan; it goes first in the next.
        flatness: part of its filtered draws that needed a whole row lately (0..1).
        ahead_credit: rows that it may waste by running ahead; below 1 it does not run ahead.
        parked_until: number of the step before which its sequences get no lanes.
        open, tokens: its sequences (saved ones too), and their tokens with the weight of pending calls.
        stats: counters since the engine started.
    """

    __slots__ = (
        "ahead_credit",
        "blocked",
        "bucket",
        "counter",
        "decodes",
        "flatness",
        "idle",
        "last_step",
        "name",
        "open",
        "parked_until",
        "prompts",
        "quota",
        "root",
        "saved",
        "stats",
        "tokens",
    )

    def __init__(self, name: str, root: bytes, quota: TenantQuota) -> None:
        super().__init__()
        self.name = name
        self.root = root
        self.quota = quota
        self.bucket: Bucket | None = None
        self.stats = TenantStats()
        self.saved: dict[str, Sequence] = {}
        self.open = 0
        self.tokens = 0
        self.counter = 0.0
        self.last_step = -(1 << 30)
        self.decodes: dict[int, Sequence] = {}
        self.prompts: dict[int, Sequence] = {}
        self.idle: dict[int, Sequence] = {}
        self.blocked: Sequence | None = None
        self.flatness = 0.0
        self.ahead_credit = AHEAD_CREDIT
        self.parked_until = 0

    @property
    def pending(self) -> int:
        """Calls that are not done."""
        return len(self.decodes) + len(self.prompts)

    @property
    def bytes(self) -> int:
        """Memory of its sequences, as it is counted."""
        return self.open * SEQUENCE_BYTES + self.tokens * TOKEN_BYTES

    @property
    def unused(self) -> bool:
        """Whether forgetting the tenant changes nothing for it."""
        return not self.open and not self.pages and self.bucket is None

    def went_on(self, rows: int) -> None:
        """Its guests have asked for the next tokens of so many lanes."""
        self.stats.decode_tokens += rows
        most = AHEAD_CREDIT + AHEAD_PER_SEQUENCE * self.open
        self.ahead_credit = min(most, self.ahead_credit + AHEAD_EARNED * rows)

    def wasted(self, rows: int) -> None:
        """Rows were computed ahead that its guests did not ask for."""
        self.stats.wasted_tokens += rows
        self.ahead_credit -= rows

    # --- limits ---------------------------------------------------------------------------------

    def has_tokens(self, count: int, now: float) -> bool:
        """Whether so many calls of one token each pass one after another."""
        limit = self.quota.tokens_per_minute
        return limit >= count if self.bucket is None else limit > 0 and self.bucket.level(now) >= count

    def over_rate(self, now: float) -> LimitMet | None:
        """Whether the minute's tokens are used up.

        As long as one token is left, a call of any size passes and goes into debt: a prompt longer
        than the whole minute's tokens could otherwise never run. The debt is waited for by the next call.
        """
        bucket = self.bucket
        limit = self.quota.tokens_per_minute
        if limit > 0 and (bucket is None or bucket.level(now) >= 1):
            return None
        used = 0 if bucket is None else math.ceil(bucket.used(now))
        wait = math.inf if bucket is None else bucket.wait(min(1.0, bucket.burst), now)
        # A rate of 0 never regains anything: there is nothing to wait for.
        return LimitMet("tokens_per_minute", limit, used, round(max(wait, 0.001), 3) if limit > 0 else None)

    def spend(self, tokens: int, now: float) -> None:
        """Count tokens that a call appended. A bucket exists only while it is not full."""
        if self.bucket is None:
            limit = self.quota.tokens_per_minute
            self.bucket = Bucket(limit / MINUTE, limit, now)
        self.bucket.spend(tokens, now)

    def change(self, quota: TenantQuota, now: float) -> None:
        """New limits; what has been used stays used, unless nothing may be used from now on."""
        self.quota = quota
        if quota.tokens_per_minute <= 0:
            # Nothing is taken from it, and it would never fill again: it would keep the tenant known for ever.
            self.bucket = None
        elif self.bucket is not None:
            self.bucket.change(quota.tokens_per_minute / MINUTE, quota.tokens_per_minute, now)

    def over_pages(self, pages: int) -> LimitMet | None:
        """Whether one sequence of so many pages is more than the tenant may ever hold."""
        limit = self.quota.kv_pages
        return LimitMet("kv_pages", limit, pages) if pages > limit else None
