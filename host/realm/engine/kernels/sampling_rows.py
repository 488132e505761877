"""The kernels that every draw takes: a survey of all tiles, and the choice of one token a row.

A row is cut into tiles of a fixed size, one program each, whatever the number of rows: so a step of one row
uses many multiprocessors too, and a row's sums do not depend on its batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST_TEMPERATURE = tl.constexpr(1e-8)
"""As in :mod:`realm.engine.sampling`."""

_LARGEST = tl.constexpr(3.4e38)
"""A logit that is larger, or is not a number, counts as this, so that no infinity meets another."""

SLOTS = tl.constexpr(24)
"""float64 numbers that are kept for each row between the kernels of a filtered draw; their places follow."""

BEST = tl.constexpr(0)
"""The largest scaled logit."""

TOTAL = tl.constexpr(1)
"""The sum of all weights, that is of exp(scaled logit - best)."""

LOW = tl.constexpr(2)
"""The cut is above LOW or just at it, and not above HIGH."""

HIGH = tl.constexpr(3)

OVER_COUNT = tl.constexpr(4)
"""How many tokens are above HIGH."""

OVER_MASS = tl.constexpr(5)
"""The weight of the tokens above HIGH."""

SEARCH = tl.constexpr(6)
"""Whether the row has to be searched for a cut: 1, else 0."""

CUT = tl.constexpr(7)
"""Tokens above the cut are kept, and of those at the cut the first ROOM by id."""

ROOM = tl.constexpr(8)

EDGES = tl.constexpr(16)
"""The first of the four lower borders of the parts of the first search."""


@triton.jit
def raw_logits(logits: tl.tensor, token: tl.tensor, vocab: tl.tensor) -> tl.tensor:
    """A row's logits as float32, -inf beyond the vocabulary."""
    x = tl.load(logits + token, mask=token < vocab, other=-float("inf")).to(tl.float32)
    return tl.where(x < _LARGEST, x, _LARGEST)


@triton.jit
def masked_logits(
    x: tl.tensor, words: tl.tensor, token: tl.tensor, vocab: tl.tensor, MASKED: tl.constexpr
) -> tl.tensor:
    """-inf for the tokens that the row's mask does not allow."""
    if MASKED:
        word = tl.load(words + token // 32, mask=token < vocab, other=0)
        x = tl.where(((word >> (token % 32)) & 1) != 0, x, -float("inf"))
    return x


@triton.jit
def scaled_logits(raw: tl.tensor, temperature: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """Divided by the temperature. A tie here is a tie of the CPU's sampler, and no other.

    That takes the rounding of IEEE 754 for float32 logits (``EXACT``), 20 instructions each. Different bfloat16
    logits are too far apart to tie after either rounding, so the product with the inverse serves.
    """
    divisor = tl.where(temperature > 0, tl.maximum(temperature, LEAST_TEMPERATURE), 1.0)
    x = tl.div_rn(raw, divisor) if EXACT else raw * tl.div_rn(1.0, divisor)
    return tl.where(x < _LARGEST, x, _LARGEST)


@triton.jit
def drawn_logits(
    logits: tl.tensor,
    words: tl.tensor,
    token: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """What a row's tokens are drawn by. Every kernel sees the same numbers, to the last bit."""
    x = scaled_logits(raw_logits(logits, token, vocab), temperature, logits.dtype.element_ty == tl.float32)
    # Masked last: the division is slow for infinities.
    return masked_logits(x, words, token, vocab, MASKED)


@triton.jit
def survey_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    tile_best: tl.tensor,
    tile_token: tl.tensor,
    tile_sum: tl.tensor,
    tile_least: tl.tensor,
    raw_best: tl.tensor,
    raw_sum: tl.tensor,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    MASKED: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    """For each tile: its best logit and the first token that has it, the sum of its weights, its least logit."""
    row = tl.program_id(1).to(tl.int64)
    at = row * TILES + tl.program_id(0)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    raw = raw_logits(logits + row * stride, token, vocab)
    x = raw
    if not GREEDY:
        x = scaled_logits(x, tl.load(temperature + row), logits.dtype.element_ty == tl.float32)
    x = masked_logits(x, mask + row * words, token, vocab, MASKED)
    best = tl.max(x, axis=0)
    tl.store(tile_best + at, best)
    tl.store(tile_token + at, tl.min(tl.where(x == best, token, vocab), axis=0))
    if not GREEDY:
        # A tile that is all -inf has no weight, and -inf - -inf is not a number.
        finite = tl.where(best > -float("inf"), best, 0.0)
        tl.store(tile_sum + at, tl.sum(tl.exp(x - finite), axis=0))
    if FILTERED:
        tl.store(tile_least + at, tl.min(tl.where(x > -float("inf"), x, float("inf")), axis=0))
    if LOGPROBS:
        highest = tl.max(raw, axis=0)
        finite = tl.where(highest > -float("inf"), highest, 0.0)
        tl.store(raw_best + at, highest)
        tl.store(raw_sum + at, tl.sum(tl.exp(raw - finite), axis=0))


@triton.jit
def first_above(cumulative: tl.tensor, weight: tl.tensor, target: tl.tensor, place: tl.tensor) -> tl.tensor:
    """The first place that has weight and whose cumulative sum is above the target, else the last with weight.

    A target may be rounded up to the whole sum. -1 where nothing has weight.
    """
    none = place.shape[0]
    first = tl.min(tl.where((cumulative > target) & (weight > 0), place, none), axis=0)
    last = tl.max(tl.where(weight > 0, place, -1), axis=0)
    return tl.where(first < none, first, last)


@triton.jit
def choose_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    uniform: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    tile_best: tl.tensor,
    tile_token: tl.tensor,
    tile_sum: tl.tensor,
    tile_equal: tl.tensor,
    raw_best: tl.tensor,
    raw_sum: tl.tensor,
    state: tl.tensor,
    out_tokens: tl.tensor,
    out_logprobs: tl.tensor,
    TILES: tl.constexpr,
    PLACES: tl.constexpr,
    TILE: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    MASKED: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    """One token a row: the first of the best, or the inverse CDF over the tiles and then within one tile.

    The sums of the tiles, and those within one, are added up in float64.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, PLACES)
    inside = tile < TILES
    at = row * TILES + tile
    bests = tl.load(tile_best + at, mask=inside, other=-float("inf"))
    best = tl.max(bests, axis=0)
    first = tl.min(tl.where((bests == best) & inside, tile, TILES - 1), axis=0)
    chosen = tl.load(tile_token + row * TILES + first)
    if not GREEDY:
        degree = tl.load(temperature + row)
        if (degree > 0) & (best > -float("inf")):
            mass = tl.load(tile_sum + at, mask=inside, other=0.0).to(tl.float64)
            before = tl.zeros([PLACES], tl.float64)
            cut = best
            room = tl.zeros([], tl.float64)
            least_weight = tl.zeros([], tl.float32)
            if FILTERED:
                cut = tl.load(state + row * SLOTS + CUT).to(tl.float32)
                room = tl.load(state + row * SLOTS + ROOM)
                least_weight = tl.load(min_p + row)
                # Of the tokens at the cut the first few are kept, whichever tile they are in.
                equal = tl.load(tile_equal + at, mask=inside, other=0).to(tl.float64)
                before = tl.cumsum(equal, axis=0) - equal
                kept = tl.minimum(tl.maximum(room - before, 0.0), equal)
                weight = tl.exp(cut - best)
                mass += kept * tl.where(weight >= least_weight, weight, 0.0).to(tl.float64)
            else:
                mass = mass * tl.exp(bests - best).to(tl.float64)
            target = tl.load(uniform + row).to(tl.float64) * tl.sum(mass, axis=0)
            spot = tl.maximum(first_above(tl.cumsum(mass, axis=0), mass, target, tile), 0)
            target = tl.maximum(target - tl.sum(tl.where(tile < spot, mass, 0.0), axis=0), 0.0)

            place = tl.arange(0, TILE)
            token = spot * TILE + place
            x = drawn_logits(logits + row * stride, mask + row * words, token, vocab, degree, MASKED)
            weights = tl.exp(x - best)
            if FILTERED:
                level = (x == cut).to(tl.int32)
                rank = tl.cumsum(level, axis=0) - level
                left = room - tl.sum(tl.where(tile == spot, before, 0.0), axis=0)
                keep = ((x > cut) | ((level > 0) & (rank < left))) & (weights >= least_weight)
                weights = tl.where(keep, weights, 0.0)
            heavy = weights.to(tl.float64)
            chosen = spot * TILE + tl.maximum(first_above(tl.cumsum(heavy, axis=0), heavy, target, place), 0)
    chosen = tl.minimum(chosen, vocab - 1)
    tl.store(out_tokens + row, chosen)
    if LOGPROBS:
        highest = tl.load(raw_best + at, mask=inside, other=-float("inf"))
        top = tl.max(highest, axis=0)
        sums = tl.load(raw_sum + at, mask=inside, other=0.0) * tl.exp(highest - top)
        value = tl.load(logits + row * stride + chosen).to(tl.float32)
        tl.store(out_logprobs + row, (value - top) - tl.log(tl.sum(sums, axis=0)))
