"""Rotary positions of prompt chunks, and their keys and values on the way into the cache.

Rows that decode do not come here: :func:`realm.engine.kernels.attention_decode.attention_decode` rotates
and stores its own, which saves a launch a layer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realm.engine.kernels.launching import Kernel, power_of_two

HEADS_BLOCK = 16
"""Heads that one program rotates."""


@triton.jit(do_not_specialize=["pages"], do_not_specialize_on_alignment=["positions", "slots"])
def _rope_and_store_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    slots: tl.tensor,
    cache: tl.tensor,
    pages: tl.tensor,
    ANGLES: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
) -> None:
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < HALF)[None, :]
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    cosine = tl.load(cos + position * ANGLES + column, mask=column < HALF, other=0.0).to(tl.float32)
    sine = tl.load(sin + position * ANGLES + column, mask=column < HALF, other=0.0).to(tl.float32)
    source = qkv + row * (HEADS + 2 * KV_HEADS) * DIM + head[:, None] * DIM + column[None, :]
    left = tl.load(source, mask=inside, other=0.0)
    right = tl.load(source + HALF, mask=inside, other=0.0)
    turned_left = left.to(tl.float32) * cosine[None, :] - right.to(tl.float32) * sine[None, :]
    turned_right = right.to(tl.float32) * cosine[None, :] + left.to(tl.float32) * sine[None, :]
    turns = (head < HEADS + KV_HEADS)[:, None]
    left = tl.where(turns, turned_left.to(left.dtype), left)
    right = tl.where(turns, turned_right.to(right.dtype), right)
    query = inside & (head < HEADS)[:, None]
    tl.store(source, left, mask=query)
    tl.store(source + HALF, right, mask=query)
    # Heads are queries, then keys, then values.
    kv_head = (head - HEADS) % KV_HEADS
    values = pages.to(tl.int64) * (KV_HEADS * PAGE * DIM)
    tensor = cache + tl.where(head < HEADS + KV_HEADS, 0, values)
    at = ((slot // PAGE) * KV_HEADS + kv_head) * PAGE + slot % PAGE
    target = tensor[:, None] + at[:, None] * DIM + column[None, :]
    stored = inside & (head >= HEADS)[:, None]
    tl.store(target, left, mask=stored)
    tl.store(target + HALF, right, mask=stored)


ROPE_AND_STORE = Kernel(_rope_and_store_kernel)


def rope_and_store(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, cache: Tensor) -> None:
    """Rotate the queries in place, and write rotated keys, and values, to the cache.

    Su et al. 2021, rotating the two halves of each head. Computed in float32.

    Args:
        qkv: [n, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values.
        cos, sin: [context, ...] of head_dim or head_dim / 2 angles each; any float type.
        positions: int32 or int64 [n]. slots: int32 or int64 [n], page * PAGE_SIZE + offset, distinct.
        cache: one layer's, [2, pages, kv_heads, PAGE_SIZE, head_dim].
    """
    _, pages, kv_heads, page, dim = cache.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    ROPE_AND_STORE.launch(
        (qkv.shape[0], -(-(heads + 2 * kv_heads) // HEADS_BLOCK), 1),
        (qkv, cos, sin, positions, slots, cache),
        (pages,),
        (cos.stride(0), heads, kv_heads, dim, page, HEADS_BLOCK, power_of_two(dim // 2)),
        warps=4,
    )
