"""Which rows of a step have which adapter, laid out for the kernels of :mod:`realm.engine.kernels.lora`.

A graph's launches are always of the same size, and a step's adapters are not. So the kernels read from the device
what there is to do: a *plan*, int32, of

* a head of :data:`HEAD` numbers: how many tiles there are and where they begin, then for each group of targets how
  many items it has and where they begin (numbers of int32 from the plan's beginning);
* the order: numbers of the rows that have an adapter, those of one slot beside each other. A place in it is a
  *position*; rows without adapter have none, so no kernel touches them;
* tiles, four numbers each: first position, positions, slot, 0. A tile is of one slot;
* items of each group, four numbers each: a tile's first three, and which block of its slot's lines of A.

So ranks are mixed without filling them up: an adapter of rank 128 has eight times the items of one of rank 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int32]

HEAD = 16
MOST_RANK = 256
GROUP_TARGETS = (3, 1, 2, 1)
"""Targets of each group of products: q k v, output, gate and up, down."""


def lora_plan(slots: Ints, lines: Ints, groups: Sequence[int], *, tile: int, block: int) -> Ints:
    """The plan of a step.

    Args:
        slots: int32 [rows], the slot of each row's adapter, or -1.
        lines: int32 [all slots, groups], how many lines A has in each group, over all layers the most; 0: none.
        groups: those that get items.
        tile: most positions of a tile. block: lines of A of an item.
    """
    adapted = np.flatnonzero(slots >= 0)
    adapted = adapted[np.argsort(slots[adapted], kind="stable")]
    of_row = slots[adapted]
    starts = np.flatnonzero(np.diff(of_row, prepend=-1))
    counts = np.diff(starts, append=len(of_row))
    tiles = _tiles(starts, counts, of_row[starts], tile)
    order = np.zeros(-(-len(adapted) // 4) * 4, np.int32)
    order[: len(adapted)] = adapted
    head = np.zeros(HEAD, np.int32)
    head[0], head[1] = len(tiles), HEAD + len(order)
    end = HEAD + len(order) + tiles.size
    parts = [head, order, tiles.reshape(-1)]
    for group in groups:
        items = _items(tiles, -(-lines[tiles[:, 2], group] // block))
        head[2 + 2 * group], head[3 + 2 * group] = len(items), end
        end += items.size
        parts.append(items.reshape(-1))
    return np.concatenate(parts)


def _tiles(starts: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], slots: Ints, tile: int) -> Ints:
    number = -(-counts // tile)
    of = np.repeat(np.arange(len(starts)), number)
    before = (np.arange(len(of)) - np.repeat(np.cumsum(number) - number, number)) * tile
    tiles = np.zeros((len(of), 4), np.int32)
    tiles[:, 0] = starts[of] + before
    tiles[:, 1] = np.minimum(counts[of] - before, tile)
    tiles[:, 2] = slots[of]
    return tiles


def _items(tiles: Ints, blocks: Ints) -> Ints:
    of = np.repeat(np.arange(len(tiles)), blocks)
    items = tiles[of]
    items[:, 3] = np.arange(len(of)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return items


def most_words(rows: int, sequences: int, *, tile: int, block: int) -> int:
    """The most numbers that a plan can have, of up to ``rows`` rows of up to ``sequences`` sequences."""
    tiles = min(rows, rows // tile + sequences)
    items = sum(-(-targets * MOST_RANK // block) for targets in GROUP_TARGETS)
    return HEAD + rows + 3 + 4 * tiles * (1 + items)
