"""The kernels that find where top-k and top-p cut a row.

Both keep the first tokens of one order (larger logit first, then lower id), so the cut is a logit and how
many of the tokens at it are kept. It is found without sorting, by measuring how many tokens, or how much
weight, are above some values: first above four values, by all tiles of the row; the part in which the cut lies
(or the two cuts of a row with both) is gathered into a list; and the list is parted into eight by one program
again and again until one value is left. For top-p a sample of the row says where the first four should be, so
that a few percent of a flat row are left in the list, and a few dozen tokens of a language model's; for top-k they
part the row's range evenly, which is at most as wide as matters to float32. A sample that misleads costs time and
changes nothing. Whatever the logits, the list never has to be measured more than 20 times.

In which order tiles come to the list is left to chance, but not the result: weights are added up as whole
numbers.

The idea of searching a threshold rather than sorting is common (radix select; the pivots of FlashInfer's
samplers); here the result is the one of the exact order, ties and all, because guests may repeat their runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from realm.engine.kernels.sampling_rows import (
    BEST,
    CUT,
    EDGES,
    HIGH,
    LOW,
    OVER_COUNT,
    OVER_MASS,
    ROOM,
    SEARCH,
    SLOTS,
    TOTAL,
    drawn_logits,
)

FIRST_PARTS = tl.constexpr(4)
"""How many parts a row is split into at first: two instructions a token for each."""

SAMPLE = 2048
"""Tokens of a row, evenly apart, from which the first parts are guessed."""

_DEVIATIONS = tl.constexpr(3.0)
"""How many standard deviations of the sample's error the cut is looked for first, on both sides of the guess."""

_GUESS_ROUNDS = tl.constexpr(11)
"""Halvings of a row's range for a guess."""

PARTS = tl.constexpr(8)
"""How many parts a list is split into at once."""

_WHOLE = tl.constexpr(8796093022208.0)
"""2**43: weights, at most 1, are counted in parts of this, so that 2**19 of them do not overflow 63 bits."""

_WIDEST = tl.constexpr(104.0)
"""exp(-104) is 0 in float32: a token that is this far below the best has no weight, kept or not."""

_EVEN_ROUNDS = tl.constexpr(4)
"""So many rounds part a range evenly, which suits logits. Later ones part the float32 numbers in it evenly,
which ends after 11 rounds whatever the logits are."""

_MOST_ROUNDS = tl.constexpr(20)
"""Never reached; a bound, because a kernel that does not end hangs the device."""


@triton.jit
def _searched(
    temperature: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, row: tl.tensor, vocab: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Whether the row has a top-k, and whether it has a top-p."""
    k = tl.load(top_k + row)
    sampled = tl.load(temperature + row) > 0
    return sampled & (k > 0) & (k < vocab), sampled & (tl.load(top_p + row) < 1)


@triton.jit
def _weight_reaches(x: tl.tensor, weight: tl.tensor, aim: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """A value up to which the sample has a weight of about ``aim``, between ``low`` and ``high``."""
    for _ in range(_GUESS_ROUNDS):
        middle = low + (high - low) * 0.5
        reached = tl.sum(tl.where(x <= middle, weight, 0.0), axis=0) >= aim
        low = tl.where(reached, low, middle)
        high = tl.where(reached, middle, high)
    return high


@triton.jit
def begin_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    tile_best: tl.tensor,
    tile_sum: tl.tensor,
    tile_least: tl.tensor,
    state: tl.tensor,
    length: tl.tensor,
    TILES: tl.constexpr,
    PLACES: tl.constexpr,
    COUNT: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """Put the tiles of a row together, and place the first edges, from a sample of COUNT tokens."""
    row = tl.program_id(0).to(tl.int64)
    slot = state + row * SLOTS
    tile = tl.arange(0, PLACES)
    inside = tile < TILES
    at = row * TILES + tile
    bests = tl.load(tile_best + at, mask=inside, other=-float("inf"))
    best = tl.max(bests, axis=0)
    finite = tl.where(best > -float("inf"), best, 0.0)
    sums = tl.load(tile_sum + at, mask=inside, other=0.0) * tl.exp(bests - finite)
    total = tl.sum(sums.to(tl.float64), axis=0)
    least = tl.min(tl.load(tile_least + at, mask=inside, other=float("inf")), axis=0)
    least = tl.maximum(least, finite - _WIDEST)
    by_count, by_mass = _searched(temperature, top_k, top_p, row, vocab)
    search = (by_count | by_mass) & (best > -float("inf"))
    tl.store(slot + BEST, best)
    tl.store(slot + TOTAL, total)
    tl.store(slot + SEARCH, search.to(tl.float64))
    tl.store(slot + CUT, -float("inf"))
    tl.store(slot + ROOM, 0.0)
    tl.store(length + row, 0)
    # Kept, not computed again: each kernel may round this in its own way, but all must see the same edges.
    part = tl.arange(0, FIRST_PARTS)
    edges = least + (finite - least) * (part.to(tl.float32) / FIRST_PARTS)
    if search & by_mass & (by_count == 0):
        # The weight below the cut is known, and a few tokens of much weight are hardly ever in the sample.
        token = (tl.arange(0, COUNT).to(tl.int64) * vocab // COUNT).to(tl.int32)
        x = drawn_logits(logits + row * stride, mask + row * words, token, vocab, tl.load(temperature + row), MASKED)
        weight = tl.exp(x - best)
        share = (1.0 - tl.load(top_p + row).to(tl.float64)) * total * COUNT / vocab
        aim = share.to(tl.float32)
        guess = _weight_reaches(x, weight, aim, least, finite)
        below = tl.where(x <= guess, weight, 0.0)
        found = tl.maximum(tl.sum(below, axis=0), 1e-30)
        error = tl.minimum(tl.sqrt(tl.sum(below * below, axis=0)) * _DEVIATIONS / found, 0.9)
        under = _weight_reaches(x, weight, aim * (1.0 - error), least, guess)
        over = _weight_reaches(x, weight, aim * (1.0 + error), guess, finite)
        edges = tl.where(part == 0, least, tl.where(part == 1, under, tl.where(part == 2, guess, over)))
    tl.store(slot + EDGES + part, edges)


@triton.jit
def split_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    state: tl.tensor,
    above_count: tl.tensor,
    above_mass: tl.tensor,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """For each tile, how much weight is above each of the first edges, and with top-k how many tokens."""
    row = tl.program_id(1).to(tl.int64)
    slot = state + row * SLOTS
    if tl.load(slot + SEARCH) > 0:
        line, words_at = logits + row * stride, mask + row * words
        degree = tl.load(temperature + row)
        best = tl.load(slot + BEST).to(tl.float32)
        edge_0 = tl.load(slot + EDGES).to(tl.float32)
        edge_1 = tl.load(slot + EDGES + 1).to(tl.float32)
        edge_2 = tl.load(slot + EDGES + 2).to(tl.float32)
        edge_3 = tl.load(slot + EDGES + 3).to(tl.float32)
        at = (row * TILES + tl.program_id(0)) * FIRST_PARTS
        begin = tl.program_id(0) * TILE
        # One sum for each edge, not an array of them: that would be spread over threads which all compute x.
        above_0 = tl.zeros([STEP], tl.float32)
        above_1 = tl.zeros([STEP], tl.float32)
        above_2 = tl.zeros([STEP], tl.float32)
        above_3 = tl.zeros([STEP], tl.float32)
        for start in range(0, TILE, STEP):
            x = drawn_logits(line, words_at, begin + start + tl.arange(0, STEP), vocab, degree, MASKED)
            weight = tl.exp(x - best)
            above_0 += tl.where(x > edge_0, weight, 0.0)
            above_1 += tl.where(x > edge_1, weight, 0.0)
            above_2 += tl.where(x > edge_2, weight, 0.0)
            above_3 += tl.where(x > edge_3, weight, 0.0)
        tl.store(above_mass + at, tl.sum(above_0, axis=0))
        tl.store(above_mass + at + 1, tl.sum(above_1, axis=0))
        tl.store(above_mass + at + 2, tl.sum(above_2, axis=0))
        tl.store(above_mass + at + 3, tl.sum(above_3, axis=0))
        by_count, _ = _searched(temperature, top_k, top_p, row, vocab)
        if by_count:
            count_0 = tl.zeros([STEP], tl.int32)
            count_1 = tl.zeros([STEP], tl.int32)
            count_2 = tl.zeros([STEP], tl.int32)
            count_3 = tl.zeros([STEP], tl.int32)
            for start in range(0, TILE, STEP):
                x = drawn_logits(line, words_at, begin + start + tl.arange(0, STEP), vocab, degree, MASKED)
                count_0 += (x > edge_0).to(tl.int32)
                count_1 += (x > edge_1).to(tl.int32)
                count_2 += (x > edge_2).to(tl.int32)
                count_3 += (x > edge_3).to(tl.int32)
            tl.store(above_count + at, tl.sum(count_0, axis=0))
            tl.store(above_count + at + 1, tl.sum(count_1, axis=0))
            tl.store(above_count + at + 2, tl.sum(count_2, axis=0))
            tl.store(above_count + at + 3, tl.sum(count_3, axis=0))


@triton.jit
def _at(values: tl.tensor, part: tl.tensor, index: tl.tensor) -> tl.tensor:
    """``values[index]``, and 0 for an index beyond: nothing is above the end of the last part."""
    return tl.sum(tl.where(part == index, values, 0.0), axis=0)


@triton.jit
def window_kernel(
    vocab: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    state: tl.tensor,
    above_count: tl.tensor,
    above_mass: tl.tensor,
    TILES: tl.constexpr,
    PLACES: tl.constexpr,
) -> None:
    """Which parts the cuts are in."""
    row = tl.program_id(0).to(tl.int64)
    slot = state + row * SLOTS
    if tl.load(slot + SEARCH) > 0:
        by_count, by_mass = _searched(temperature, top_k, top_p, row, vocab)
        part = tl.arange(0, FIRST_PARTS)
        tile = tl.arange(0, PLACES)
        inside = (tile < TILES)[:, None]
        at = (row * TILES + tile[:, None]) * FIRST_PARTS + part[None, :]
        # Nothing has been written there without a top-k, and nothing is made of it.
        counts = tl.load(above_count + at, mask=inside, other=0)
        masses = tl.load(above_mass + at, mask=inside, other=0.0)
        count = tl.sum(counts, axis=0).to(tl.float64)
        mass = tl.sum(masses.to(tl.float64), axis=0)

        # The last part whose lower edge has enough above it holds the cut. None has where many tokens are at
        # the least edge itself: then the cut is there.
        part_low = FIRST_PARTS + tl.zeros([], tl.int32)
        part_high = tl.zeros([], tl.int32)
        total_low = tl.load(slot + TOTAL)
        total_high = total_low
        if by_count:
            found = tl.max(tl.where(count >= tl.load(top_k + row), part, -1), axis=0)
            part_low = tl.maximum(found, 0)
            part_high = found + 1
            # The weight that top-k leaves, of which top-p takes its share, is known to within a part.
            total_low = _at(mass, part, part_high)
            total_high = tl.where(found < 0, total_high, _at(mass, part, found))
        if by_mass:
            p = tl.load(top_p + row).to(tl.float64)
            found = tl.max(tl.where(mass >= p * total_high, part, -1), axis=0)
            part_low = tl.minimum(part_low, tl.maximum(found, 0))
            part_high = tl.maximum(part_high, tl.max(tl.where(mass >= p * total_low, part, -1), axis=0) + 1)

        edges = tl.load(slot + EDGES + part)
        tl.store(slot + LOW, _at(edges, part, part_low))
        tl.store(slot + HIGH, tl.where(part_high < FIRST_PARTS, _at(edges, part, part_high), tl.load(slot + BEST)))
        tl.store(slot + OVER_COUNT, _at(count, part, part_high))
        tl.store(slot + OVER_MASS, _at(mass, part, part_high))


@triton.jit
def gather_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    state: tl.tensor,
    length: tl.tensor,
    listed: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """Write the scaled logits within the window to the row's list, in whichever order, and count them."""
    row = tl.program_id(1).to(tl.int64)
    slot = state + row * SLOTS
    if tl.load(slot + SEARCH) > 0:
        # Groups are counted first, then the tokens of each, which are in one thread's registers. To count over
        # all of a tile's tokens at once takes more time than all the rest.
        token = tl.program_id(0) * TILE + tl.arange(0, TILE)
        degree = tl.load(temperature + row)
        x = drawn_logits(logits + row * stride, mask + row * words, token, vocab, degree, MASKED)
        low = tl.load(slot + LOW).to(tl.float32)
        high = tl.load(slot + HIGH).to(tl.float32)
        x = tl.reshape(x, [TILE // GROUP, GROUP])
        inside = (x > low) & (x <= high)
        chosen = inside.to(tl.int32)
        counts = tl.sum(chosen, axis=1)
        first = tl.atomic_add(length + row, tl.sum(counts, axis=0), sem="relaxed")
        first += tl.cumsum(counts, axis=0) - counts
        place = first[:, None] + tl.cumsum(chosen, axis=1) - 1
        tl.store(listed + row * vocab + place, x, mask=inside)


@triton.jit
def _ordinal(x: tl.tensor) -> tl.tensor:
    """The float32 numbers in order, counted: int64."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _number(ordinal: tl.tensor) -> tl.tensor:
    """The float32 number of an ordinal."""
    bits = ordinal.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _find_cut(
    listed: tl.tensor,
    length: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    over: tl.tensor,
    target: tl.tensor,
    best: tl.tensor,
    MASS: tl.constexpr,
    STEP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The value at which the tokens above ``high`` (``over``) and the list reach the target, and what is above it.

    Invariant: above ``low`` the target is reached, above ``high`` it is not. Where even the whole list does
    not reach it, the cut is at ``low``.
    """
    part = tl.arange(0, PARTS)
    beyond = over
    cut = low
    above = over
    rounds = tl.zeros([], tl.int32)
    while rounds < _MOST_ROUNDS:
        # One rounding, said out loud: wherever the compiler repeats this it gives the same edges.
        even = tl.fma(part.to(tl.float32) / PARTS, high - low, low)
        first = _ordinal(low)
        edges = tl.where(rounds < _EVEN_ROUNDS, even, _number(first + (((_ordinal(high) - first) * part) >> 3)))
        sums = tl.zeros([PARTS, STEP], tl.int64)
        least = tl.full([1, STEP], float("inf"), tl.float32)
        most = tl.full([1, STEP], -float("inf"), tl.float32)
        for start in range(0, length, STEP):
            place = (start + tl.arange(0, STEP))[None, :]
            x = tl.load(listed + place, mask=place < length, other=-float("inf"))
            weight = tl.full([1, STEP], 1, tl.int64)
            if MASS:
                weight = (tl.exp(x - best) * _WHOLE).to(tl.int64)
            sums += tl.where(x > edges[:, None], weight, 0)
            least = tl.minimum(least, tl.where(x > low, x, float("inf")))
            most = tl.maximum(most, tl.where(x <= high, x, -float("inf")))
        measured = tl.sum(sums, axis=1).to(tl.float64)
        reached = beyond + (measured / _WHOLE if MASS else measured)
        smallest = tl.min(least)
        largest = tl.max(most)
        found = tl.max(tl.where(reached >= target, part, -1), axis=0)
        if found < 0:
            cut = low
            above = _at(reached, part, 0)
            rounds += _MOST_ROUNDS
        elif smallest >= largest:
            cut = tl.where(smallest == largest, largest, high)
            above = over
            rounds += _MOST_ROUNDS
        else:
            over = tl.where(found < PARTS - 1, _at(reached, part, found + 1), over)
            upper = tl.where(found < PARTS - 1, _at(edges, part, found + 1), high)
            high = tl.minimum(upper, largest)
            low = _at(edges, part, found)
            cut = high
            above = over
            rounds += 1
    return cut, above


@triton.jit
def _mass_above(listed: tl.tensor, length: tl.tensor, cut: tl.tensor, best: tl.tensor, STEP: tl.constexpr) -> tl.tensor:
    """The weight of the list's tokens above the cut."""
    sums = tl.zeros([STEP], tl.int64)
    for start in range(0, length, STEP):
        place = start + tl.arange(0, STEP)
        x = tl.load(listed + place, mask=place < length, other=-float("inf"))
        sums += tl.where(x > cut, (tl.exp(x - best) * _WHOLE).to(tl.int64), 0)
    return tl.sum(sums, axis=0).to(tl.float64) / _WHOLE


@triton.jit
def cut_kernel(
    vocab: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    state: tl.tensor,
    lengths: tl.tensor,
    listed: tl.tensor,
    STEP: tl.constexpr,
) -> None:
    """Where top-k and top-p cut each row: a logit, and how many of the tokens at it are kept."""
    row = tl.program_id(0).to(tl.int64)
    slot = state + row * SLOTS
    by_count, by_mass = _searched(temperature, top_k, top_p, row, vocab)
    best = tl.load(slot + BEST).to(tl.float32)
    if (by_count | by_mass) & (best > -float("inf")):
        listed += row * vocab
        length = tl.load(lengths + row)
        low = tl.load(slot + LOW).to(tl.float32)
        high = tl.load(slot + HIGH).to(tl.float32)
        over_mass = tl.load(slot + OVER_MASS)
        total = tl.load(slot + TOTAL)
        cut = low
        room = tl.zeros([], tl.float64)
        if by_count:
            k = tl.load(top_k + row).to(tl.float64)
            over_count = tl.load(slot + OVER_COUNT)
            cut, above = _find_cut(listed, length, low, high, over_count, k, best, False, STEP)
            room = k - above
            at_cut = room * tl.exp(cut - best).to(tl.float64)
            # A mask may leave fewer than k tokens: then there are not as many at the cut, but all are kept.
            total = tl.minimum(over_mass + _mass_above(listed, length, cut, best, STEP) + at_cut, total)
        if by_mass:
            target = tl.load(top_p + row).to(tl.float64) * total
            place, above = _find_cut(listed, length, low, high, over_mass, target, best, True, STEP)
            weight = tl.exp(place - best).to(tl.float64)
            some = tl.maximum(tl.ceil((target - above) / tl.maximum(weight, 1e-300)), 1.0)
            # Rounding of the sums must not keep more than top-k did.
            if by_count:
                some = tl.where(place == cut, tl.minimum(some, room), some)
                room = tl.where(place >= cut, some, room)
                cut = tl.maximum(place, cut)
            else:
                cut = place
                room = some
        tl.store(slot + CUT, cut)
        tl.store(slot + ROOM, room)


@triton.jit
def weigh_kernel(
    logits: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    mask: tl.tensor,
    words: tl.tensor,
    state: tl.tensor,
    tile_sum: tl.tensor,
    tile_equal: tl.tensor,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:
    """For each tile, the weight that is kept above the cut, and how many tokens are at it."""
    row = tl.program_id(1).to(tl.int64)
    degree = tl.load(temperature + row)
    if degree > 0:
        slot = state + row * SLOTS
        best = tl.load(slot + BEST).to(tl.float32)
        cut = tl.load(slot + CUT).to(tl.float32)
        token = tl.program_id(0) * TILE + tl.arange(0, TILE)
        x = drawn_logits(logits + row * stride, mask + row * words, token, vocab, degree, MASKED)
        weight = tl.exp(x - best)
        kept = tl.where((x > cut) & (weight >= tl.load(min_p + row)), weight, 0.0)
        at = row * TILES + tl.program_id(0)
        tl.store(tile_sum + at, tl.sum(kept, axis=0))
        tl.store(tile_equal + at, tl.sum((x == cut).to(tl.int32), axis=0))
