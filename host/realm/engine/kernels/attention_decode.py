"""One step of decoding: rotary positions, the new keys and values, and attention over the pages, in one kernel.

Each sequence has one query row. A program takes the query heads that share a KV head (grouped queries,
Ainslie et al. 2023), so keys are read once for all of them, and one part of the context (Flash-Decoding,
Dao et al. 2023); the program of a row that ends last adds the parts up. How many parts a row really has
follows from its length alone, so that one CUDA graph serves short and long contexts: programs without a
part end at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from realm.engine.kernels.launching import Kernel, power_of_two

SHORTEST_PART = 64
"""Tokens of context that a part has at least, where it is not the last."""

MOST_SPLITS = 64

TILE_BYTES = 8192
"""Bytes of keys in a tile: small enough that several programs fit on a multiprocessor, each with loads in flight."""

WARPS = 4
STAGES = 3
"""Depth of the loop's pipeline: page numbers are loaded first, then keys and values, then they are used."""

LONGEST_PART = 4096
"""Tokens of context above which rows are split even where there are rows enough: one long row must not
keep the others waiting."""


def decode_splits(rows: int, kv_heads: int, longest: int, multiprocessors: int) -> int:
    """Into how many parts contexts of up to ``longest`` tokens are split at most: a power of two.

    Enough for four programs a multiprocessor, and no more than there are parts of :data:`SHORTEST_PART`. A
    launch with fewer splits than its contexts call for is slower, and never wrong.
    """
    wanted = max(1, 4 * multiprocessors // (rows * kv_heads), longest // LONGEST_PART)
    useful = (longest - 1) // SHORTEST_PART
    return min(MOST_SPLITS, 1 << wanted.bit_length() - 1, 1 << useful.bit_length())


@dataclass(frozen=True)
class DecodeWorkspace:
    """Where the parts of split rows meet. One serves all layers and graphs of a stream.

    Attributes:
        partial: float32, sums of weighted values of each row, head and part.
        weights: float32, the maximum and the sum of the weights of each row, head and part.
        arrived: int32, parts that are done of each row and KV head; zero between launches.
    """

    partial: Tensor
    weights: Tensor
    arrived: Tensor

    @classmethod
    def allocate(cls, parts: int, rows: int, heads: int, head_dim: int, device: torch.device) -> DecodeWorkspace:
        """For launches with ``rows * splits`` of at most ``parts``, and at most ``rows`` rows."""
        return cls(
            torch.empty(parts * heads * head_dim, dtype=torch.float32, device=device),
            torch.empty(parts * heads * 2, dtype=torch.float32, device=device),
            torch.zeros(rows * heads, dtype=torch.int32, device=device),
        )


@triton.jit
def _add_parts(
    partial: tl.tensor,
    weights: tl.tensor,
    first: tl.tensor,
    parts: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """The weighted mean of the values of parts ``first .. first + parts``: [BLOCK_GROUP, BLOCK_DIM]."""
    member = tl.arange(0, BLOCK_GROUP)
    column = tl.arange(0, BLOCK_DIM)
    maximum = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    result = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        inside = (part < parts)[:, None] & (member < GROUP)[None, :]
        line = (first + part)[:, None] * GROUP + member[None, :]
        # Past the first-level cache, which may still hold what an earlier launch left there.
        highest = tl.load(weights + line * 2, mask=inside, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(weights + line * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        values = tl.load(
            partial + line[:, :, None] * DIM + column[None, None, :],
            mask=inside[:, :, None] & (column < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = tl.maximum(maximum, tl.max(highest, 0))
        # Rows beyond the group have no maximum; theirs must not become NaN.
        higher = tl.where(member < GROUP, higher, 0.0)
        scale = tl.exp2(highest - higher[None, :])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(sums * scale, 0)
        result = result * shrink[:, None] + tl.sum(values * scale[:, :, None], 0)
        maximum = higher
    return result / tl.where(member < GROUP, total, 1.0)[:, None]


@triton.jit(
    do_not_specialize=["pages", "width"],
    do_not_specialize_on_alignment=["tables", "lengths", "arrived"],
)
def _attention_decode_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    cache: tl.tensor,
    tables: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    weights: tl.tensor,
    arrived: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    SCALE: tl.constexpr,
    ANGLES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    ADD_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    # What a short row takes is waiting for loads, one after the other: so these, which need nothing, come first.
    length = tl.load(lengths + row)
    member = tl.arange(0, BLOCK_GROUP)
    column = tl.arange(0, BLOCK_DIM)
    present = column < DIM
    inside = (member < GROUP)[:, None] & present[None, :]
    # Rotary positions (Su et al. 2021): each half of a head turns with the other.
    other = tl.where(column < HALF, column + HALF, column - HALF)
    line = qkv + row * ((GROUP + 2) * KV_HEADS * DIM)
    source = line + (kv_head * GROUP + member)[:, None] * DIM
    query = tl.load(source + column[None, :], mask=inside, other=0.0)
    turned = tl.load(source + other[None, :], mask=inside, other=0.0)

    table = tables + row * width
    values_at = pages.to(tl.int64) * (KV_HEADS * PAGE * DIM)
    # Tokens whose keys are in the cache; the row's own are still in qkv.
    past = tl.maximum(length - 1, 0)
    share = tl.maximum(SHORTEST, tl.cdiv(tl.cdiv(past, SPLITS), BLOCK) * BLOCK)
    parts = tl.maximum(tl.cdiv(past, share), 1)
    target = out + (row * KV_HEADS + kv_head) * GROUP * DIM + member[:, None] * DIM + column[None, :]
    if length == 0:
        if split == 0:
            tl.store(target, tl.zeros([BLOCK_GROUP, BLOCK_DIM], out.dtype.element_ty), mask=inside)
    elif split < parts:
        last = tl.load(table + past // PAGE).to(tl.int64)
        angle = past.to(tl.int64) * ANGLES + column % HALF
        cosine = tl.load(cos + angle, mask=present, other=0.0).to(tl.float32)
        sine = tl.load(sin + angle, mask=present, other=0.0).to(tl.float32)
        sine = tl.where(column < HALF, -sine, sine)
        query = (query.to(tl.float32) * cosine[None, :] + turned.to(tl.float32) * sine[None, :]).to(query.dtype)
        maximum = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_GROUP], tl.float32)
        result = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        end = tl.minimum((split + 1) * share, past)
        for start in range(split * share, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            page = tl.load(table + token // PAGE, mask=token < end, other=0).to(tl.int64)
            at = ((page * KV_HEADS + kv_head) * PAGE + token % PAGE)[:, None] * DIM + column[None, :]
            seen = (token < end)[:, None] & present[None, :]
            keys = tl.load(cache + at, mask=seen, other=0.0)
            scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * SCALE
            scores = tl.where((token < end)[None, :], scores, float("-inf"))
            higher = tl.maximum(maximum, tl.max(scores, 1))
            weight = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(maximum - higher)
            values = tl.load(cache + values_at + at, mask=seen, other=0.0)
            result = tl.dot(weight.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
            total = total * shrink + tl.sum(weight, 1)
            maximum = higher
        if split == 0:
            # The first part has the row's own token, from registers: in the cache it is for later steps.
            own = line + (GROUP * KV_HEADS + kv_head) * DIM
            key = tl.load(own + column, mask=present, other=0.0)
            turned_key = tl.load(own + other, mask=present, other=0.0)
            value = tl.load(own + KV_HEADS * DIM + column, mask=present, other=0.0)
            key = (key.to(tl.float32) * cosine + turned_key.to(tl.float32) * sine).to(key.dtype)
            place = cache + ((last * KV_HEADS + kv_head) * PAGE + past % PAGE) * DIM + column
            tl.store(place, key, mask=present)
            tl.store(place + values_at, value, mask=present)
            score = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * SCALE
            higher = tl.maximum(maximum, score)
            weight = tl.exp2(score - higher)
            shrink = tl.exp2(maximum - higher)
            result = result * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            total = total * shrink + weight
            maximum = higher
        if parts == 1:
            tl.store(target, (result / total[:, None]).to(out.dtype.element_ty), mask=inside)
        elif SPLITS > 1:
            lines = (row * KV_HEADS + kv_head) * SPLITS
            mine = (lines + split) * GROUP + member
            tl.store(partial + mine[:, None] * DIM + column[None, :], result, mask=inside)
            tl.store(weights + mine * 2, maximum, mask=member < GROUP)
            tl.store(weights + mine * 2 + 1, total, mask=member < GROUP)
            # All threads' stores come before the count (release), and the last program's loads after it (acquire).
            tl.debug_barrier()
            counter = arrived + row * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.store(counter, 0)
                answer = _add_parts(
                    partial, weights, lines, parts, GROUP, BLOCK_GROUP, DIM, BLOCK_DIM, ADD_BLOCK
                )  # fmt: skip
                tl.store(target, answer.to(out.dtype.element_ty), mask=inside)


ATTENTION_DECODE = Kernel(_attention_decode_kernel)


def attention_decode(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    out: Tensor,
    workspace: DecodeWorkspace,
    *,
    splits: int,
) -> None:
    """Rotate each row's query and key, store its key and value at position ``length - 1``, and attend to all up to it.

    Computed in float32 from inputs of the cache's type (bfloat16 or float32).

    Args:
        qkv: [n, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values, not rotated; left as it is.
        cos, sin: [context, ...] of head_dim or head_dim / 2 angles each; any float type.
        cache: one layer's, [2, pages, kv_heads, PAGE_SIZE, head_dim]; head_dim even, at most 256.
        tables: int32 [n, width], rows contiguous; row i is valid as far as page ``(lengths[i] - 1) // PAGE_SIZE``.
        lengths: int32 [n], tokens of the sequence with this one. 0: padding, which stores nothing but zeros in out.
        out: [n, heads * head_dim], contiguous.
        splits: a power of two, see :func:`decode_splits`.
    """
    _, pages, kv_heads, page, dim = cache.shape
    group = out.shape[1] // dim // kv_heads
    block_group = max(16, power_of_two(group))
    block_dim = max(16, power_of_two(dim))
    block = max(16, TILE_BYTES // (block_dim * cache.element_size()))
    ATTENTION_DECODE.launch(
        (len(lengths), kv_heads, splits),
        (qkv, cos, sin, cache, tables, lengths, out, workspace.partial, workspace.weights, workspace.arrived),
        (pages, tables.stride(0)),
        (
            dim**-0.5 * math.log2(math.e),
            cos.stride(0),
            group,
            block_group,
            kv_heads,
            dim,
            block_dim,
            page,
            block,
            splits,
            max(SHORTEST_PART, block),
            max(1, 4096 // (block_group * block_dim)),
            "ieee" if qkv.dtype == torch.float32 else "tf32",
        ),
        warps=WARPS,
        stages=STAGES,
    )
