"""Low-rank adapters, any mix of them in one step: ``out += x A^T B^T`` with each row's own A and B.

Two launches a product: *shrink* computes ``y = x A^T`` for the rows of each adapter together, *expand* adds
``y B^T`` to what the base model's product gave. (The idea of segments gathered by adapter is Punica's, Chen et al.
2023; of mixed ranks in one pool of memory S-LoRA's, Sheng et al. 2023.) What they have to do is a plan in the
device's memory (:mod:`realm.engine.kernels.lora_plan`): a fixed number of programs walk over its items, so one CUDA
graph serves every mix.

Shrink is the reading of A, which at rank 16 is spread over too few programs if each takes whole lines. So the inner
dimension is split, and the parts are added when expand reads them, in the same order each time. How it is split
depends on the step's room and never on who else is in it: a row's result is the same beside any others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from realm.engine.kernels.launching import Kernel
from realm.engine.kernels.lora_plan import GROUP_TARGETS, HEAD, MOST_RANK

FEW, MANY = 16, 64
"""Positions of a tile, and lines of A of an item: of steps that decode, and of those with longer prompts."""

FEW_TOKENS = 64
"""Tokens of prompts up to which a step has tiles of :data:`FEW`."""

SPLIT_ROWS = 2560
"""Rows above which the inner dimension is not split: there is work enough, and the parts take memory."""

PART = 512
"""Least part of the inner dimension, in elements, where it is split."""


class Tuning(NamedTuple):
    """What a kernel does at a time.

    Attributes:
        width: elements of the inner dimension that shrink loads at once, or columns that an item of expand has.
        stages: loads in flight and the one in use. warps: of a program. programs: for each multiprocessor.
    """

    width: int
    stages: int
    warps: int
    programs: int


SHRINK_FEW, SHRINK_MANY = Tuning(128, 3, 2, 16), Tuning(64, 3, 4, 4)
EXPAND_FEW, EXPAND_MANY = Tuning(128, 3, 2, 8), Tuning(128, 3, 4, 8)
SHRINK_PRECISE, EXPAND_PRECISE = Tuning(32, 2, 4, 4), Tuning(32, 3, 4, 8)
"""By the rows of a tile; the last two for float32. Measured on an H200 with Llama-3.2-1B's q k v o at rank 16: all
four launches of a layer take 13.7 us for 64 rows of 16 adapters, 49.8 for 256 of 512; with 4 warps and tiles of 256
they took 14.9 and 55.6. One launch that computes both, y anew for each block of columns, took 15.6 and 67.9."""

LEAST_RANK = 16
"""Ranks are multiples of it."""


class Group(NamedTuple):
    """One of a layer's products.

    Attributes:
        number: its place in the tables. inner: elements of a row that goes in. widths: of the targets' results,
            which are beside each other in a row that comes out.
    """

    number: int
    inner: int
    widths: tuple[int, ...]

    @property
    def most_lines(self) -> int:
        """Lines of A at most: those of one position in the workspace."""
        return len(self.widths) * MOST_RANK


class Adapters(NamedTuple):
    """Where the weights of all slots are.

    Attributes:
        weights: 1-D, of the model's type. places: int64 [slots, layers, groups, 2], at which elements of it A and B
            begin, multiples of 16. A is [targets * rank, inner], B is [width, rank], both contiguous.
        ranks: int32 [slots, layers, groups], multiples of 16 up to 256; 0: the slot has nothing there.
    """

    weights: Tensor
    places: Tensor
    ranks: Tensor


def lora_tile(tokens: int) -> int:
    """Positions of a tile, and lines of an item, for steps with so many tokens of prompts."""
    return FEW if tokens <= FEW_TOKENS else MANY


def splits(rows: int, group: Group) -> int:
    """Into how many parts the inner dimension is split in steps of up to ``rows`` rows."""
    if rows > SPLIT_ROWS:
        return 1
    return min(8 if len(group.widths) == 1 else 4, -(-group.inner // PART))


def workspace_size(rows: int) -> int:
    """Float32 numbers that hold the parts of any product of up to ``rows`` rows."""
    whole = max(GROUP_TARGETS) * MOST_RANK
    # Three targets in four parts are the most; one target has up to eight.
    return max(rows * whole, min(rows, SPLIT_ROWS) * whole * 4)


@triton.jit(
    do_not_specialize=["layer", "layers", "rows"],
    do_not_specialize_on_alignment=["places", "ranks", "plan"],
)
def _lora_shrink_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    partial: tl.tensor,
    places: tl.tensor,
    ranks: tl.tensor,
    plan: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    rows: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TARGETS: tl.constexpr,
    INNER: tl.constexpr,
    MOST: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    count = tl.load(plan + 2 + 2 * GROUP)
    items = plan + tl.load(plan + 3 + 2 * GROUP)
    member = tl.arange(0, TILE)
    for work in range(tl.program_id(0), count * SPLITS, tl.num_programs(0)):
        item = items + (work // SPLITS) * 4
        split = work % SPLITS
        first = tl.load(item)
        used = member < tl.load(item + 1)
        slot = tl.load(item + 2)
        line = tl.load(item + 3) * LINES + tl.arange(0, LINES)
        at = (slot * layers + layer) * GROUPS + GROUP
        lines = tl.load(ranks + at) * TARGETS
        a_at = tl.multiple_of(tl.load(places + at * 2), 16)
        row = tl.load(plan + HEAD_WORDS + first + member, mask=used, other=0).to(tl.int64)
        # Of a slot whose other layers have a larger rank, the last blocks may be of no line.
        present = line < lines
        source = x + row[:, None] * INNER
        a = weights + a_at + line.to(tl.int64)[:, None] * INNER
        begin = split * DEPTH
        total = tl.zeros([TILE, LINES], tl.float32)
        for start in tl.range(begin, tl.minimum(begin + DEPTH, INNER), BLOCK, num_stages=STAGES):
            inner = start + tl.arange(0, BLOCK)
            inside = (inner < INNER)[None, :]
            values = tl.load(source + inner[None, :], mask=used[:, None] & inside, other=0.0)
            block = tl.load(a + inner[None, :], mask=present[:, None] & inside, other=0.0)
            total = tl.dot(values, tl.trans(block), total, input_precision=PRECISION)
        place = (split * rows + first + member).to(tl.int64)
        tl.store(partial + place[:, None] * MOST + line[None, :], total, mask=used[:, None] & present[None, :])


LORA_SHRINK = Kernel(_lora_shrink_kernel)


def lora_shrink(
    x: Tensor,
    adapters: Adapters,
    plan: Tensor,
    partial: Tensor,
    group: Group,
    *,
    layer: int,
    tile: int,
    multiprocessors: int,
) -> None:
    """``y = x A^T`` of all rows that have an adapter, in parts, into ``partial``.

    Args:
        x: [rows, inner], contiguous; bfloat16 or float32, as the weights. Products in float32 ("ieee") or of tensor
            cores with sums in float32.
        plan: of these rows, with items of ``group``, for tiles and blocks of ``tile``.
        partial: float32, at least :func:`workspace_size`; written as [splits, rows, group.most_lines]: a position
            is a row there, of which rank * targets numbers are written.
    """
    rows = len(x)
    parts = splits(rows, group)
    precise = x.dtype == torch.float32
    tuning = SHRINK_PRECISE if precise else SHRINK_FEW if tile == FEW else SHRINK_MANY
    depth = -(-group.inner // (parts * tuning.width)) * tuning.width
    most = rows * (group.most_lines // tile) * parts
    LORA_SHRINK.launch(
        (min(tuning.programs * multiprocessors, most), 1, 1),
        (x, adapters.weights, partial, adapters.places, adapters.ranks, plan),
        (layer, adapters.ranks.shape[1], rows),
        (
            group.number,
            adapters.ranks.shape[2],
            len(group.widths),
            group.inner,
            group.most_lines,
            HEAD,
            parts,
            depth,
            tile,
            tile,
            tuning.width,
            tuning.stages,
            "ieee" if precise else "tf32",
        ),
        warps=tuning.warps,
    )


@triton.jit(
    do_not_specialize=["layer", "layers", "rows"],
    do_not_specialize_on_alignment=["places", "ranks", "plan"],
)
def _lora_expand_kernel(
    partial: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    places: tl.tensor,
    ranks: tl.tensor,
    plan: tl.tensor,
    layer: tl.tensor,
    layers: tl.tensor,
    rows: tl.tensor,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    MOST: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    HEAD_WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    # A program's columns are of one target: blocks of the first one's results, then of the others'.
    SOME: tl.constexpr = (FIRST + COLUMNS - 1) // COLUMNS
    MORE: tl.constexpr = SOME + (SECOND + COLUMNS - 1) // COLUMNS
    BLOCKS: tl.constexpr = MORE + (THIRD + COLUMNS - 1) // COLUMNS
    WIDTH: tl.constexpr = FIRST + SECOND + THIRD
    count = tl.load(plan)
    tiles = plan + tl.load(plan + 1)
    member = tl.arange(0, TILE)
    for work in range(tl.program_id(0), count * BLOCKS, tl.num_programs(0)):
        item = tiles + (work // BLOCKS) * 4
        number = work % BLOCKS
        first = tl.load(item)
        used = member < tl.load(item + 1)
        slot = tl.load(item + 2)
        at = (slot * layers + layer) * GROUPS + GROUP
        rank = tl.multiple_of(tl.load(ranks + at), 16)
        if rank > 0:
            b_at = tl.multiple_of(tl.load(places + at * 2 + 1), 16)
            row = tl.load(plan + HEAD_WORDS + first + member, mask=used, other=0).to(tl.int64)
            target = (number >= SOME).to(tl.int32) + (number >= MORE).to(tl.int32)
            before = tl.where(target == 0, 0, tl.where(target == 1, SOME, MORE))
            begin = tl.where(target == 0, 0, tl.where(target == 1, FIRST, FIRST + SECOND))
            end = tl.where(target == 0, FIRST, tl.where(target == 1, FIRST + SECOND, WIDTH))
            column = begin + (number - before) * COLUMNS + tl.arange(0, COLUMNS)
            inside = column < end
            result = out + row[:, None] * WIDTH + column[None, :]
            written = used[:, None] & inside[None, :]
            base = tl.load(result, mask=written, other=0.0)
            y_at = partial + (first + member).to(tl.int64)[:, None] * MOST + target * rank
            b = weights + b_at + column.to(tl.int64)[:, None] * rank
            total = tl.zeros([TILE, COLUMNS], tl.float32)
            for start in range(0, rank, RANKS):
                low = start + tl.arange(0, RANKS)
                block = tl.load(b + low[None, :], mask=inside[:, None], other=0.0)
                y = tl.load(y_at + low[None, :], mask=used[:, None], other=0.0)
                for split in tl.static_range(1, SPLITS):
                    part = y_at + rows.to(tl.int64) * (split * MOST)
                    y += tl.load(part + low[None, :], mask=used[:, None], other=0.0)
                total = tl.dot(y.to(block.dtype), tl.trans(block), total, input_precision=PRECISION)
            tl.store(result, (base.to(tl.float32) + total).to(out.dtype.element_ty), mask=written)


LORA_EXPAND = Kernel(_lora_expand_kernel)


def lora_expand(
    partial: Tensor,
    adapters: Adapters,
    plan: Tensor,
    out: Tensor,
    group: Group,
    *,
    layer: int,
    tile: int,
    multiprocessors: int,
) -> None:
    """``out += y B^T`` for all rows that have an adapter; other rows are not touched.

    Args:
        partial: from :func:`lora_shrink`. plan: the same.
        out: [rows, widths together], contiguous, of the weights' type; what the base model's product gave.
    """
    rows = len(out)
    precise = out.dtype == torch.float32
    tuning = EXPAND_PRECISE if precise else EXPAND_FEW if tile == FEW else EXPAND_MANY
    columns = tuning.width
    widths = [*group.widths, 0, 0][:3]
    blocks = sum(-(-width // columns) for width in widths)
    LORA_EXPAND.launch(
        (min(tuning.programs * multiprocessors, rows * blocks), 1, 1),
        (partial, adapters.weights, out, adapters.places, adapters.ranks, plan),
        (layer, adapters.ranks.shape[1], rows),
        (
            group.number,
            adapters.ranks.shape[2],
            group.most_lines,
            *widths,
            HEAD,
            splits(rows, group),
            tile,
            columns,
            LEAST_RANK,
            "ieee" if precise else "tf32",
        ),
        warps=tuning.warps,
    )
