"""The runner's own small kernels: input tokens, lanes, page tables and page copies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _embed(
    tokens: tl.tensor,
    lanes: tl.tensor,
    lane_tokens: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    drawn = tl.load(lane_tokens + tl.load(lanes + row))
    token = tl.where(token < 0, drawn, token).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    tl.store(out + row * HIDDEN + column, tl.load(table + token * HIDDEN + column, mask=inside), mask=inside)


def embed(tokens: Tensor, lanes: Tensor, lane_tokens: Tensor, table: Tensor, out: Tensor) -> None:
    """Rows of ``table`` [vocab, hidden] for int32 ``tokens`` [n], into ``out`` [n, hidden].

    A negative token stands for ``lane_tokens[lanes[row]]``, what the row's lane drew last.
    """
    hidden = table.shape[1]
    _embed[(len(tokens),)](tokens, lanes, lane_tokens, table, out, hidden, triton.next_power_of_2(hidden))


@triton.jit(do_not_specialize=["count"])
def _keep(
    tokens: tl.tensor,
    lanes: tl.tensor,
    lane_tokens: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    lane = tl.load(lanes + row, mask=inside, other=0)
    tl.store(lane_tokens + lane, tl.load(tokens + row, mask=inside, other=0), mask=inside)


def keep(tokens: Tensor, lanes: Tensor, lane_tokens: Tensor) -> None:
    """``lane_tokens[lanes] = tokens`` for int32 [n]; only the spare lane may come more than once."""
    _keep[(-(-len(tokens) // 128),)](tokens, lanes, lane_tokens, len(tokens), 128)


@triton.jit(do_not_specialize=["used", "width"])
def _spread(
    compact: tl.tensor,
    tables: tl.tensor,
    used: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < used
    tl.store(tables + row * width + column, tl.load(compact + row * used + column, mask=inside), mask=inside)


def spread_tables(compact: Tensor, tables: Tensor) -> None:
    """``tables[:n, :used] = compact`` for int32 ``compact`` [n, used] and ``tables`` [rows, width]."""
    count, used = compact.shape
    _spread[(count, -(-used // 128))](compact, tables, used, tables.shape[1], 128)


@triton.jit(do_not_specialize=["from_pages", "to_pages"])
def _copy(
    source: tl.tensor,
    from_at: tl.tensor,
    from_pages: tl.tensor,
    target: tl.tensor,
    to_at: tl.tensor,
    to_pages: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    half = tl.program_id(1).to(tl.int64)  # keys or values of a layer
    read = source + (half * from_pages + tl.load(from_at + pair)) * SIZE
    write = target + (half * to_pages + tl.load(to_at + pair)) * SIZE
    for first in range(0, SIZE, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(write + at, tl.load(read + at, mask=at < SIZE), mask=at < SIZE)


def copy_pages(source: Tensor, from_pages: Tensor, target: Tensor, to_pages: Tensor) -> None:
    """``target[:, :, to_pages] = source[:, :, from_pages]``, int64 page numbers [m].

    Both are [layers, 2, their pages, kv_heads, PAGE_SIZE, head_dim] and contiguous. When they are the
    same, no page may be read and written.
    """
    layers, two, pages = source.shape[:3]
    size = source[0, 0, 0].numel()
    block = min(1024, triton.next_power_of_2(size))
    _copy[(len(from_pages), layers * two)](source, from_pages, pages, target, to_pages, target.shape[2], size, block)


def copy_pages_at_once(cache: Tensor, source: Tensor, target: Tensor) -> None:
    """:func:`copy_pages` within one cache, where a page that is written may be read too: all are read first."""
    shape = (*cache.shape[:2], len(source), *cache.shape[3:])
    between = torch.empty(shape, dtype=cache.dtype, device=cache.device)
    order = torch.arange(len(source), device=cache.device)
    copy_pages(cache, source, between, order)
    copy_pages(between, order, cache, target)
