"""Causal attention of prompt chunks against paged keys and values.

Tiles of queries walk over the keys with a running softmax (FlashAttention-2, Dao 2023). A row of a tile
is one token and one query head of those that share a KV head (grouped queries, Ainslie et al. 2023), so
that short chunks fill tiles too and each key is read once for its group. The host lists the tiles of all
chunks (:func:`prefill_tiles`), so a launch has as many programs as there is work, however long each chunk is.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from realm.engine.kernels.launching import Kernel, power_of_two

TILES = (16, 64, 128)
"""Rows of a tile; each is compiled at its first use."""

BLOCK = 64
"""Keys of a tile, at most."""

STAGES = 3
"""Depth of the loop's pipeline: page numbers, then keys and values, then their use."""


@triton.jit
def _attend(
    query: tl.tensor,
    position: tl.tensor,
    maximum: tl.tensor,
    total: tl.tensor,
    result: tl.tensor,
    cache: tl.tensor,
    values_at: tl.tensor,
    table: tl.tensor,
    kv_head: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Take keys ``begin .. end`` into the running softmax. Not ``MASKED``: whole blocks that every row sees."""
    column = tl.arange(0, BLOCK_DIM)
    for start in range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        page = tl.load(table + key // PAGE, mask=key < end, other=0)
        at = ((page.to(tl.int64) * KV_HEADS + kv_head) * PAGE + key % PAGE)[:, None] * DIM + column[None, :]
        if MASKED:
            inside = (key < end)[:, None] & (column < DIM)[None, :]
            keys = tl.load(cache + at, mask=inside, other=0.0)
        elif BLOCK_DIM == DIM:
            keys = tl.load(cache + at)
        else:
            keys = tl.load(cache + at, mask=(column < DIM)[None, :], other=0.0)
        score = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * SCALE
        if MASKED:
            score = tl.where(key[None, :] <= position[:, None], score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        if MASKED:
            values = tl.load(cache + values_at + at, mask=inside, other=0.0)
        elif BLOCK_DIM == DIM:
            values = tl.load(cache + values_at + at)
        else:
            values = tl.load(cache + values_at + at, mask=(column < DIM)[None, :], other=0.0)
        result = tl.dot(weight.to(values.dtype), values, result * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(weight, 1)
        maximum = higher
    return maximum, total, result


@triton.jit(
    do_not_specialize=["pages", "width"],
    do_not_specialize_on_alignment=["tables", "starts", "contexts", "tiles"],
)
def _attention_prefill_kernel(
    qkv: tl.tensor,
    cache: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    pages: tl.tensor,
    width: tl.tensor,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    at_tile = tiles + tl.program_id(0) * 2
    chunk = tl.load(at_tile)
    kv_head = tl.program_id(1)
    if chunk >= 0:
        tile = tl.load(at_tile + 1)
        first = tl.load(starts + chunk)
        count = tl.load(starts + chunk + 1) - first
        context = tl.load(contexts + chunk)
        table = tables + chunk.to(tl.int64) * width
        values_at = pages.to(tl.int64) * (KV_HEADS * PAGE * DIM)
        row = tile * TILE + tl.arange(0, TILE)
        token = row // GROUP
        head = kv_head * GROUP + row % GROUP
        column = tl.arange(0, BLOCK_DIM)
        inside = (token < count)[:, None] & (column < DIM)[None, :]
        line = (first + token).to(tl.int64)[:, None]
        at = head[:, None] * DIM + column[None, :]
        query = tl.load(qkv + line * ((GROUP + 2) * KV_HEADS * DIM) + at, mask=inside, other=0.0)
        maximum = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        result = tl.zeros([TILE, BLOCK_DIM], tl.float32)
        # The tile's first token sees the fewest keys, its last one the most.
        whole = (context + (tile * TILE) // GROUP + 1) // BLOCK * BLOCK
        end = context + tl.minimum((tile * TILE + TILE - 1) // GROUP + 1, count)
        maximum, total, result = _attend(
            query, context + token, maximum, total, result, cache, values_at, table, kv_head, 0, whole,
            SCALE, KV_HEADS, DIM, PAGE, BLOCK_DIM, BLOCK, PRECISION, False,
        )  # fmt: skip
        maximum, total, result = _attend(
            query, context + token, maximum, total, result, cache, values_at, table, kv_head, whole, end,
            SCALE, KV_HEADS, DIM, PAGE, BLOCK_DIM, BLOCK, PRECISION, True,
        )  # fmt: skip
        answer = (result / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + line * (GROUP * KV_HEADS * DIM) + at, answer, mask=inside)


ATTENTION_PREFILL = Kernel(_attention_prefill_kernel)


def prefill_tile(longest: int, group: int, dim: int, dtype: torch.dtype) -> int:
    """Rows of the tiles for chunks of up to ``longest`` tokens: the least of :data:`TILES` that holds one, if any
    does. ``group``: query heads of a KV head, each ``dim`` wide."""
    precise = dtype == torch.float32
    block_dim = max(16, power_of_two(dim))
    # float32 products use no tensor cores and twice the registers and shared memory.
    largest = 128 if block_dim <= 128 and not precise else 64 if block_dim <= 64 or not precise else 16
    return min(largest, next((tile for tile in TILES if tile >= longest * group), largest))


def most_tiles(tokens: int, chunks: int, group: int, tile: int) -> int:
    """The most tiles that so many chunks of so many tokens in all can have."""
    return -(-tokens * group // tile) + chunks


def prefill_tiles(
    counts: npt.NDArray[np.int64], contexts: npt.NDArray[np.int64], group: int, tile: int
) -> npt.NDArray[np.int32]:
    """Every tile of chunks of ``counts`` tokens [m] after ``contexts`` [m]: (chunk, which of its tiles), int32 [t, 2].

    Those that see most keys come first, so that they do not end last.
    """
    tiles = -(-counts * group // tile)
    chunk = np.repeat(np.arange(len(counts)), tiles)
    which = np.arange(len(chunk)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    order = np.argsort(-(contexts[chunk] + which * tile // group), kind="stable")
    return np.stack((chunk[order], which[order]), 1).astype(np.int32)


def attention_prefill(
    qkv: Tensor,
    cache: Tensor,
    tables: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    tile: int,
) -> None:
    """Attention of m chunks whose keys and values are in the cache already (``rope_and_store``).

    Args:
        qkv: [n, (heads + 2 * kv_heads) * head_dim], contiguous, queries rotated. bfloat16 or float32, as the cache.
        cache: one layer's, [2, pages, kv_heads, PAGE_SIZE, head_dim]; head_dim at most 256.
        tables: int32 [m, width], contiguous; row j is valid as far as chunk j's last token.
        starts: int32 [m + 1]: chunk j is rows ``starts[j] .. starts[j + 1]`` of qkv.
        contexts: int32 [m], tokens of the sequence that are before the chunk.
        tiles: int32 [t, 2], contiguous, see :func:`prefill_tiles`; chunk -1 is no tile.
        out: [n, heads * head_dim], contiguous; only rows of chunks are written.
        tile: what ``tiles`` were made for, see :func:`prefill_tile`.
    """
    _, pages, kv_heads, page, dim = cache.shape
    group = out.shape[1] // dim // kv_heads
    precise = qkv.dtype == torch.float32
    block_dim = max(16, power_of_two(dim))
    block = BLOCK if block_dim <= 128 and not precise else 32
    scale = dim**-0.5 * math.log2(math.e)
    ATTENTION_PREFILL.launch(
        (len(tiles), kv_heads, 1),
        (qkv, cache, tables, starts, contexts, tiles, out),
        (pages, tables.stride(0)),
        (scale, group, kv_heads, dim, page, block_dim, tile, block, "ieee" if precise else "tf32"),
        warps=8 if precise or tile > 64 else 4,
        stages=2 if precise or block_dim > 128 else STAGES,
    )
