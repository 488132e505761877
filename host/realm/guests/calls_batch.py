"""``batch_forward``: many sequences in one suspension, prepared in small steps."""

from __future__ import annotations

import math
import struct
from typing import Any

from realm.guests.abi import MAX_BATCH_BYTES, ErrorCode
from realm.guests.calls_model import check_kept, check_room, commit, go_on, goes_on, settle_drawn, settle_forward
from realm.guests.decoding import LAYOUTS, Refused, Rows
from realm.guests.deferral import Steps
from realm.guests.fiber_types import FUEL_SLICE, OutOfBounds
from realm.guests.run import Completion, GuestRun
from realm.guests.sampling_arguments import MAX_BIAS, Decoded, check_tokens, decode_sampling
from realm.guests.sequences import GuestSequence
from realm.messages import CONTINUE, CallFailed, EngineResult, Forward

ITEM_FUEL = 20_000
"""Fuel an item, besides one a byte that it carries: 5 us."""
_SAMPLING = LAYOUTS["realm_sampling"]
_ITEM = LAYOUTS["realm_item"]
_ANSWER = struct.Struct("<ifII")
_ANSWER_AT = 24

Prepared = tuple[GuestSequence, bytes, Forward | None, int, int]
"""A good item: its tokens, its message or, where it only goes on, its lane, and where its answer is written."""


class BatchCalls:
    """The one function of the table that works in steps."""

    def batch_forward(self, run: GuestRun, items: Rows) -> None:
        run.job = _Batch(run).steps(items)


class _Batch:
    """One call: first its items are checked, some each slice; then it misses so many answers."""

    def __init__(self, run: GuestRun) -> None:
        self.run = run
        self._seen: set[int] = set()
        self._decoded: dict[bytes, Decoded] = {}
        self._bytes = 0
        self._kept = 0
        self._missing = 0
        self._succeeded = 0

    def steps(self, items: Rows) -> Steps:
        """Prepare the items; all good ones go to the engine together at the end."""
        run = self.run
        good: list[Prepared] = []
        fuel = 0
        for number, item in enumerate(items.rows):
            at = items.pointer + number * _ITEM.size + _ANSWER_AT
            carried, owed = self._bytes, run.debt
            try:
                good.append((*self._prepare(item), at))
            except Refused as refused:
                run.warn(f"batch_forward: items[{number}]: {refused.text}")
                run.memory.pack(_ANSWER, at, int(refused.code), math.nan, 0, 0)
            run.charge(ITEM_FUEL + self._bytes - carried)
            fuel += run.debt - owed
            if fuel >= FUEL_SLICE:
                fuel = 0
                yield
        self._missing = len(good)
        for seq, tokens, op, lane, at in good:
            call = run.call(_Answer(self, seq, len(tokens) >> 2, at))
            if op is None:
                token = int.from_bytes(tokens, "little")
                run.runtime.continues += CONTINUE.pack(call, seq.id, lane, token)
            else:
                op.call = call
                run.op(op)
        return None if good else 0

    def _prepare(self, item: tuple[Any, ...]) -> tuple[GuestSequence, bytes, Forward | None, int]:
        run = self.run
        handle, count, tokens_at, sampling_at, *_ = item
        seq = run.sequences.get(handle)
        if seq is None or handle in self._seen:
            why = "is in the batch already" if handle in self._seen else "is no sequence of this run"
            raise Refused(ErrorCode.BAD_HANDLE, f"seq {handle} {why}")
        self._seen.add(handle)
        if not 1 <= count <= 1 << 20:
            raise Refused(ErrorCode.INVALID_ARGUMENT, f"count is {count}; it must be 1..{1 << 20}")
        try:
            run.memory.check(tokens_at, count * 4)
            # Before anything is copied: a thousand items may point to the same megabytes.
            check_room(run, seq, count)
            self._carry(count * 4)
            tokens = run.memory.read(tokens_at, count * 4)
            raw = run.memory.read(sampling_at, _SAMPLING.size) if sampling_at else None
        except OutOfBounds:
            raise Refused(ErrorCode.BAD_POINTER, "tokens or sampling reach outside the memory") from None
        if goes_on(seq, tokens, raw):
            return seq, tokens, None, go_on(run, seq, tokens)
        check_tokens(run, tokens, "tokens")
        decoded = None if raw is None else self._sampling(raw)
        if decoded is None or decoded.keep_logits:
            check_kept(run, seq, self._kept)
        params, keep = commit(run, seq, tokens, decoded)
        self._kept += keep
        return seq, tokens, Forward(0, seq.id, tokens, params, keep), -1

    def _sampling(self, raw: bytes) -> Decoded:
        *_, mask_words, bias_count = _SAMPLING.unpack(raw)
        self._carry(4 * min(mask_words, self.run.runtime.facts.mask_words) + 8 * min(bias_count, MAX_BIAS))
        # The guest waits, so what a struct points to is the same for all items of the call.
        decoded = self._decoded.get(raw)
        if decoded is None:
            decoded = self._decoded[raw] = decode_sampling(self.run, raw)
        return decoded

    def _carry(self, size: int) -> None:
        if self._bytes + size > MAX_BATCH_BYTES:
            raise Refused(
                ErrorCode.INVALID_ARGUMENT,
                f"tokens, masks and biases of one call may have {MAX_BATCH_BYTES:,} bytes; the batch has more",
            )
        self._bytes += size

    def answered(self, success: bool) -> int | None:
        """One more item is answered; the call's result once none is missing."""
        self._succeeded += success
        self._missing -= 1
        return None if self._missing else self._succeeded


class _Answer(Completion):
    """Answers one item of ``count`` tokens; its place for that is at ``at``."""

    __slots__ = ("_at", "_batch", "_count", "_seq")

    def __init__(self, batch: _Batch, seq: GuestSequence, count: int, at: int) -> None:
        self._batch, self._seq, self._count, self._at = batch, seq, count, at

    def done(self, result: EngineResult) -> int | None:
        run, seq = self._batch.run, self._seq
        token, logprob, flags = settle_forward(run, seq, self._count, result)
        run.memory.pack(_ANSWER, self._at, token, logprob, seq.length, flags)
        return self._batch.answered(not isinstance(result, CallFailed))

    def drawn(self, token: int, logprob: float, cached: int, lane: int) -> int | None:
        run, seq = self._batch.run, self._seq
        flags = settle_drawn(run, seq, token, cached, lane)
        run.memory.pack(_ANSWER, self._at, token, logprob, seq.length, flags)
        return self._batch.answered(True)
