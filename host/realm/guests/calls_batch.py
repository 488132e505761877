"""``batch_forward``: many sequences in one suspension, prepared in small steps."""

from __future__ import annotations

import math
import struct
from functools import partial
from typing import Any

from realm.guests.abi import MAX_BATCH_BYTES, ErrorCode
from realm.guests.calls_model import check_kept, check_room, commit, settle_forward
from realm.guests.decoding import LAYOUTS, Refused, Rows
from realm.guests.deferral import Steps
from realm.guests.fiber_types import FUEL_SLICE, OutOfBounds
from realm.guests.run import GuestRun
from realm.guests.sampling_arguments import MAX_BIAS, Decoded, check_tokens, decode_sampling
from realm.guests.sequences import GuestSequence
from realm.messages import CallFailed, EngineResult, Forward, SamplingParams

ITEM_FUEL = 20_000
"""Fuel an item, besides one a byte that it carries: 5 us."""
_SAMPLING = LAYOUTS["realm_sampling"]
_ITEM = LAYOUTS["realm_item"]
_ANSWER = struct.Struct("<ifII")
_ANSWER_AT = 24

Prepared = tuple[GuestSequence, bytes, SamplingParams | None, bool, int]


class BatchCalls:
    """The one function of the table that works in steps."""

    def batch_forward(self, run: GuestRun, items: Rows) -> None:
        run.job = _Batch(run).steps(items)


class _Batch:
    """One call: first its items are checked, some each slice; then it misses so many answers."""

    def __init__(self, run: GuestRun) -> None:
        self._run = run
        self._seen: set[int] = set()
        self._decoded: dict[tuple[Any, ...], Decoded] = {}
        self._bytes = 0
        self._kept = 0
        self._missing = 0
        self._succeeded = 0

    def steps(self, items: Rows) -> Steps:
        """Prepare the items; all good ones go to the engine together at the end."""
        run = self._run
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
        for seq, tokens, params, keep, at in good:
            call = run.call(partial(self._done, seq, tokens, at))
            run.op(Forward(call, seq.id, tokens, params, keep))
        return None if good else 0

    def _prepare(self, item: tuple[Any, ...]) -> tuple[GuestSequence, bytes, SamplingParams | None, bool]:
        run = self._run
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
            raw = run.memory.unpack(_SAMPLING, sampling_at) if sampling_at else None
        except OutOfBounds:
            raise Refused(ErrorCode.BAD_POINTER, "tokens or sampling reach outside the memory") from None
        check_tokens(run, tokens, "tokens")
        decoded = None if raw is None else self._sampling(raw)
        if decoded is None or decoded.keep_logits:
            check_kept(run, seq, self._kept)
        params, keep = commit(run, seq, tokens, decoded)
        self._kept += keep
        return seq, tokens, params, keep

    def _sampling(self, raw: tuple[Any, ...]) -> Decoded:
        *_, mask_words, bias_count = raw
        self._carry(4 * min(mask_words, self._run.runtime.facts.mask_words) + 8 * min(bias_count, MAX_BIAS))
        # The guest waits, so what a struct points to is the same for all items of the call.
        decoded = self._decoded.get(raw)
        if decoded is None:
            decoded = self._decoded[raw] = decode_sampling(self._run, raw)
        return decoded

    def _carry(self, size: int) -> None:
        if self._bytes + size > MAX_BATCH_BYTES:
            raise Refused(
                ErrorCode.INVALID_ARGUMENT,
                f"tokens, masks and biases of one call may have {MAX_BATCH_BYTES:,} bytes; the batch has more",
            )
        self._bytes += size

    def _done(self, seq: GuestSequence, tokens: bytes, at: int, result: EngineResult) -> int | None:
        run = self._run
        token, logprob, flags = settle_forward(run, seq, tokens, result)
        run.memory.pack(_ANSWER, at, token, logprob, seq.length, flags)
        self._succeeded += not isinstance(result, CallFailed)
        self._missing -= 1
        return None if self._missing else self._succeeded
