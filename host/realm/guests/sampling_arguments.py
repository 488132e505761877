"""Checks of what guests say about sampling: ``realm_sampling``, its mask and its biases, and token ids."""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np

from realm.guests.abi import CONSTANTS, ErrorCode
from realm.guests.decoding import LAYOUTS, Refused
from realm.guests.deferral import COPY_FUEL
from realm.guests.fiber_types import OutOfBounds
from realm.guests.run import GuestRun
from realm.guests.sequences import GuestSequence
from realm.messages import SamplingParams

LOGPROB = CONSTANTS["SAMPLE_LOGPROB"][0]
KEEP_LOGITS = CONSTANTS["SAMPLE_KEEP_LOGITS"][0]
SEED = CONSTANTS["SAMPLE_SEED"][0]
MAX_BIAS = 4096
_SAMPLING = LAYOUTS["realm_sampling"]
_SMALL = 64
_BIAS_FUEL = 64
"""Fuel an entry of a bias: 8 bytes that are looked over and copied more than once."""


def check_tokens(run: GuestRun, tokens: bytes, name: str) -> None:
    if not tokens:
        return
    if len(tokens) == 4:
        highest = int.from_bytes(tokens, "little")
    elif len(tokens) <= _SMALL * 4:
        highest = max(array("I", tokens))
    else:
        highest = int(np.frombuffer(tokens, dtype="<u4").max())
    vocab = run.runtime.facts.vocab_size
    if highest >= vocab:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"{name}: {highest} is not below the vocabulary's size {vocab:,}")


class Decoded(NamedTuple):
    """A checked ``realm_sampling``; ``params`` lacks its draw. ``raw``: its bytes, unless it points to more."""

    params: SamplingParams
    keep_logits: bool
    seed: int | None
    raw: bytes | None


def with_draw(seq: GuestSequence, decoded: Decoded) -> SamplingParams:
    """The parameters of one draw. Each uses up one number of the sequence, greedy or not."""
    p = decoded.params
    number = seq.draws
    seq.draws = number + 1
    if p.temperature == 0:
        return p
    return SamplingParams(
        p.temperature,
        p.top_k,
        p.top_p,
        p.min_p,
        p.repetition_penalty,
        0.0,
        p.mask,
        p.bias_tokens,
        p.bias_values,
        p.logprob,
        seq.draw_key(decoded.seed),
        number,
    )


def decode_sampling(run: GuestRun, raw: bytes) -> Decoded:
    """Check a ``realm_sampling`` and what it points to."""
    cached = run.sampling_cache
    if cached is not None and cached.raw == raw:
        return cached
    temperature, top_p, min_p, penalty, top_k, flags, seed, mask_at, bias_at, mask_words, bias_count = _SAMPLING.unpack(
        raw
    )
    # Comparisons are false for NaN, so each range refuses it too.
    _range("temperature", temperature, 0.0, 100.0)
    _range("top_p", top_p, 0.0, 1.0)
    _range("min_p", min_p, 0.0, 1.0)
    _range("repetition_penalty", penalty, 0.0, 100.0)
    if flags > LOGPROB | KEEP_LOGITS | SEED:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.flags is {flags:#x}: unknown bits")
    mask = bias_tokens = bias_values = None
    if mask_at:
        mask = _read_mask(run, mask_at, mask_words)
    elif mask_words:
        raise Refused(ErrorCode.INVALID_ARGUMENT, "sampling.mask_words is given without a mask")
    if bias_count:
        bias_tokens, bias_values = _read_bias(run, bias_at, bias_count)
    params = SamplingParams(
        temperature,
        top_k,
        top_p or 1.0,
        min_p,
        penalty or 1.0,
        0.0,
        mask,
        bias_tokens,
        bias_values,
        bool(flags & LOGPROB),
    )
    # What lies behind pointers may change between calls; plain values do not.
    plain = not mask_at and not bias_count
    decoded = Decoded(params, bool(flags & KEEP_LOGITS), seed if flags & SEED else None, raw if plain else None)
    if plain:
        run.sampling_cache = decoded
    return decoded


def _range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.{name} is {value}; it must be {low:g}..{high:g}")


def _read_mask(run: GuestRun, pointer: int, words: int) -> bytes:
    facts = run.runtime.facts
    if words != facts.mask_words:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.mask_words is {words}; it must be {facts.mask_words}")
    run.charge(COPY_FUEL * 4 * words)
    try:
        mask = run.memory.read(pointer, words * 4)
    except OutOfBounds:
        raise Refused(ErrorCode.BAD_POINTER, "sampling.mask reaches outside the memory") from None
    if not int.from_bytes(mask, "little") & ((1 << facts.vocab_size) - 1):
        raise Refused(ErrorCode.INVALID_ARGUMENT, "sampling.mask allows no token")
    return mask


def _read_bias(run: GuestRun, pointer: int, count: int) -> tuple[bytes, bytes]:
    if count > MAX_BIAS:
        raise Refused(ErrorCode.INVALID_ARGUMENT, f"sampling.bias_count is {count}; it must be 0..{MAX_BIAS}")
    run.charge(_BIAS_FUEL * count)
    try:
        pairs = np.frombuffer(run.memory.read(pointer, count * 8), dtype=[("token", "<u4"), ("value", "<f4")])
    except OutOfBounds:
        raise Refused(ErrorCode.BAD_POINTER, "sampling.bias reaches outside the memory") from None
    if not np.isfinite(pairs["value"]).all():
        raise Refused(ErrorCode.INVALID_ARGUMENT, "sampling.bias has a value that is not finite")
    tokens = pairs["token"].tobytes()
    check_tokens(run, tokens, "sampling.bias")
    return tokens, pairs["value"].tobytes()
