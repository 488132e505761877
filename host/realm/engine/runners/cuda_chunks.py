"""Steps with prompt chunks: one flat pass over decoding rows and the tokens of chunks.

The launches of such a step take the host some 8 ms, the device 1 to 4 ms where there are not many tokens. So
steps of up to :data:`~realm.engine.runners.cuda_buckets.GRAPH_TOKENS` tokens, and those that spend nearly the
whole token budget, are filled up to one of a few shapes that are captured at the start; only drawing is launched
on its own, in whichever way a step draws. Rows that only fill a step belong to no chunk and write to nobody's
page and lane.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import Chunk, Ints, Longs, StepBatch
from realm.engine.kernels.attention_prefill import (
    TILES,
    attention_prefill,
    most_tiles,
    prefill_tile,
    prefill_tiles,
)
from realm.engine.kernels.lora import lora_tile
from realm.engine.kernels.rotary import rope_and_store
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda_buckets import Room, Variant, chunk_rooms
from realm.engine.runners.cuda_decode import DecodeAttention, PageTables, captured_if_it_fits
from realm.engine.runners.cuda_draw import OutputRows, fill_draws
from realm.engine.runners.cuda_lora import FAMILIES, AdaptedSteps
from realm.engine.runners.cuda_memory import MOST_ADAPTER_GRAPHS, MOST_CHUNK_GRAPHS
from realm.engine.runners.cuda_pass import DevicePass
from realm.engine.runners.cuda_staging import Block

K = TypeVar("K")


class Shape(NamedTuple):
    """Rows that a step has room for.

    Attributes:
        decodes: decoding rows. tokens: of all chunks. chunks: how many.
        tile: rows of a tile of the chunks' attention. tiles: how many. splits: of the decoding rows' contexts.
    """

    decodes: int
    tokens: int
    chunks: int
    tile: int
    tiles: int
    splits: int

    @property
    def outputs(self) -> int:
        """Most output rows."""
        return self.decodes + self.chunks


class _Fields(NamedTuple):
    """A step's inputs, where they are written or where they are on the device."""

    tokens: Any
    lanes: Any
    lengths: Any
    positions: Any
    slots: Any
    starts: Any
    contexts: Any
    tiles: Any
    outputs: Any

    @classmethod
    def place(cls, block: Block, shape: Shape) -> tuple[_Fields, _Fields]:
        rows, decodes, tokens, chunks = shape.decodes + shape.tokens, shape.decodes, shape.tokens, shape.chunks
        kinds = (np.int32, np.int32, np.int32, np.int32, np.int64, np.int32, np.int32, np.int32, np.int64)
        counts = (rows, rows, decodes, tokens, tokens, chunks + 1, chunks, 2 * shape.tiles, shape.outputs)
        places = [block.place(kind, count) for kind, count in zip(kinds, counts, strict=True)]
        return cls(*(place[0] for place in places)), cls(*(place[1] for place in places))

    def pad_device(self, spare_lane: int, spare_slot: int) -> None:
        """Make every row on the device one that only fills a step."""
        for values in (self.tokens, self.lengths, self.positions, self.starts, self.contexts, self.outputs):
            values.zero_()
        self.lanes.fill_(spare_lane)
        self.slots.fill_(spare_slot)
        self.tiles.fill_(-1)


class ChunkSteps:
    """Captures and launches them. The rows of a pass are the decoding ones, then the chunks' tokens.

    Attributes:
        tables: the chunks' pages.
    """

    def __init__(
        self,
        device_pass: DevicePass,
        outputs: OutputRows,
        attention: DecodeAttention,
        rows: int,
        token_budget: int,
        pool: Any,
        lora: AdaptedSteps | None = None,
    ) -> None:
        """``rows``: most output rows of a step. ``token_budget``: most tokens of its chunks. ``pool``: of graphs'
        memory; None computes without graphs. ``lora``: where sequences may have adapters."""
        config, device = device_pass.model.config, device_pass.model.device
        self._pass = device_pass
        self._outputs = outputs
        self._attention = attention
        self._rows = rows
        self._pool = pool
        self._group = config.heads // config.kv_heads
        self._spare_lane = len(device_pass.lane_tokens) - 1
        self._spare_slot = (device_pass.cache.shape[2] - 1) * PAGE_SIZE
        self._rooms = chunk_rooms(token_budget, rows)
        self._most_graphs = len(self._rooms) + MOST_CHUNK_GRAPHS
        self._seen: set[Shape] = set()
        self._graphs: dict[Shape, Callable[[], None]] = {}
        self._lora = lora
        self._adapted_rooms = chunk_rooms(token_budget, rows, adapted=True)
        self._most_adapted = len(self._adapted_rooms) * len(FAMILIES) + 2 * MOST_ADAPTER_GRAPHS
        self._adapted: dict[tuple[Shape, tuple[int, ...]], Callable[[], None]] = {}
        self._adapted_seen: set[tuple[Shape, tuple[int, ...]]] = set()
        self.tables = PageTables(rows, -(-config.context_length // PAGE_SIZE), device)

    def shape(self, batch: StepBatch, *, adapted: bool = False) -> tuple[Shape, bool]:
        """The room that a step is given, and whether that is one of the few shapes that are captured; where
        there is none, it is exactly what the step needs. ``adapted``: some sequence has an adapter."""
        decodes, chunks = len(batch.decodes), len(batch.chunks)
        counts = np.array([len(chunk.tokens) for chunk in batch.chunks])
        tokens = int(counts.sum())
        longest = batch.decodes.longest
        for room in self._adapted_rooms if adapted else self._rooms:
            if room.holds(decodes, tokens, chunks):
                return self._filled(room, longest), True
        tile = self._tile(int(counts.max()))
        tiles = int((-(-counts * self._group // tile)).sum())
        return Shape(decodes, tokens, chunks, tile, tiles, self._splits(decodes, longest)), False

    def _filled(self, room: Room, longest: int) -> Shape:
        tile = self._tile(room.tokens)
        tiles = most_tiles(room.tokens, room.chunks, self._group, tile)
        return Shape(room.decodes, room.tokens, room.chunks, tile, tiles, self._splits(room.decodes, longest))

    def _tile(self, longest: int) -> int:
        model = self._pass.model
        return prefill_tile(longest, self._group, model.config.head_dim, model.dtype)

    def _splits(self, rows: int, longest: int) -> int:
        return self._attention.splits(rows, longest) if rows else 1

    def first(self, block: Block) -> list[Callable[[], None]]:
        """What has to be done before the first step: every room captured, for contexts of usual length."""
        # The largest first: the smaller ones then find their memory in the pool.
        shapes = [self._filled(room, 1) for room in reversed(self._rooms)]
        captures: list[Callable[[], None]] = [partial(self._rehearse, block, shape) for shape in shapes]
        if self._lora is not None and self._pool is not None:
            shapes = [self._filled(room, 1) for room in reversed(self._adapted_rooms)]
            captures += [partial(self._capture_adapted, block, shape) for shape in shapes]
        return captures

    def _capture_adapted(self, block: Block, shape: Shape) -> None:
        """A shape with adapters. What it launches was launched before: it is only captured."""
        block.reset()
        _, fields = _Fields.place(block, shape)
        for groups in FAMILIES:
            forward = partial(self._compute, shape, fields, groups)
            self._adapted[shape, groups] = captured_if_it_fits(forward, self._pool)

    def _rehearse(self, block: Block, shape: Shape) -> None:
        """Compute a step of rows that only fill it, and capture that."""
        block.reset()
        _, fields = _Fields.place(block, shape)
        fields.pad_device(self._spare_lane, self._spare_slot)
        compute = partial(self._compute, shape, fields, None)
        compute()
        if self._pool is not None:
            self._graphs[shape] = captured_if_it_fits(compute, self._pool)

    def compile_tiles(self) -> None:
        """Launch the attention of chunks with every tile that it may take, on no chunk at all."""
        model, pages = self._pass.model, self._pass.cache[0]
        config = model.config
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        qkv = torch.zeros((1, width), dtype=model.dtype, device=model.device)
        out = torch.zeros((1, config.heads * config.head_dim), dtype=model.dtype, device=model.device)
        none = torch.full((2,), -1, dtype=torch.int32, device=model.device)
        for longest in TILES:
            tile = self._tile(max(1, longest // self._group))
            attention_prefill(qkv, pages, self.tables.device[:1], none, none[:1], none.view(1, 2), out, tile=tile)

    def prepare(
        self, block: Block, batch: StepBatch, variant: Variant, adapters: Ints | None = None
    ) -> Callable[[], None]:
        """Write a step's inputs to ``block``; returns what computes it once the block was sent.

        ``adapters``: the batch's, or None where no sequence has one.

        Raises:
            ValueError: when there are more sequences or rows than the runner was made for.
        """
        groups = None if adapters is None or self._lora is None else self._lora.family(adapters)
        shape, common = self.shape(batch, adapted=groups is not None)
        if shape.decodes + shape.tokens > self._pass.rows:
            raise ValueError(f"a step of {shape.decodes + shape.tokens} rows; the runner has {self._pass.rows}")
        if shape.outputs > self._rows:
            raise ValueError(f"a step of {shape.outputs} sequences; the runner has {self._rows} output rows")
        block.reset()
        host, device = _Fields.place(block, shape)
        draws, device_draws = block.draws(batch.outputs)
        self._write_decodes(block, host, shape, batch)
        self._write_chunks(block, host, shape, batch.chunks)
        draws.lanes[:] = self._write_outputs(host, shape, batch)
        fill_draws(draws, batch.draws, variant)
        if groups is not None:
            assert self._lora is not None and adapters is not None
            self._lora.place(block, self._slots(shape, batch, adapters), groups, lora_tile(shape.tokens))
        forward: Callable[[], None] = partial(self._compute, shape, device, groups)
        if common and self._pool is not None:
            forward = self._graph(shape, groups, forward)

        def compute() -> None:
            forward()
            if batch.outputs:
                self._outputs.draw(batch.outputs, device_draws, variant)

        return compute

    def _graph(self, shape: Shape, groups: tuple[int, ...] | None, compute: Callable[[], None]) -> Callable[[], None]:
        """What computes a shape; a kind that was not captured at the start is when it comes for the second time."""
        if groups is None:
            return _captured_again(self._graphs, self._seen, shape, self._most_graphs, compute, self._pool)
        key = (shape, groups)
        return _captured_again(self._adapted, self._adapted_seen, key, self._most_adapted, compute, self._pool)

    @staticmethod
    def _slots(shape: Shape, batch: StepBatch, adapters: Ints) -> Ints:
        """The slot of each row of the pass, -1 for none."""
        slots = np.full(shape.decodes + shape.tokens, -1, np.int32)
        count = len(batch.decodes)
        slots[:count] = adapters[:count]
        of_tokens = np.repeat(adapters[count:], [len(chunk.tokens) for chunk in batch.chunks])
        slots[shape.decodes : shape.decodes + len(of_tokens)] = of_tokens
        return slots

    def _write_decodes(self, block: Block, host: _Fields, shape: Shape, batch: StepBatch) -> None:
        decodes, count = batch.decodes, len(batch.decodes)
        host.tokens[:count] = decodes.tokens
        host.tokens[count : shape.decodes] = 0
        host.lanes[:count] = decodes.lanes
        host.lanes[count:] = self._spare_lane
        np.add(decodes.positions, 1, out=host.lengths[:count])
        host.lengths[count:] = 0
        if count:
            self._attention.place(block, decodes)

    def _write_chunks(self, block: Block, host: _Fields, shape: Shape, chunks: list[Chunk]) -> None:
        counts: Longs = np.array([len(chunk.tokens) for chunk in chunks], np.int64)
        contexts: Longs = np.array([chunk.start for chunk in chunks], np.int64)
        used = -(-(contexts + counts) // PAGE_SIZE)
        tables = np.zeros((len(chunks), int(used.max())), np.int32)
        for at, (chunk, width) in enumerate(zip(chunks, used.tolist(), strict=True)):
            tables[at, :width] = chunk.pages[:width]
        ends = np.cumsum(counts)
        end = int(ends[-1])
        host.starts[0] = 0
        host.starts[1 : len(chunks) + 1] = ends
        host.starts[len(chunks) + 1 :] = end
        host.contexts[: len(chunks)] = contexts
        host.contexts[len(chunks) :] = 0
        host.tokens[shape.decodes : shape.decodes + end] = np.concatenate([chunk.tokens for chunk in chunks])
        host.tokens[shape.decodes + end :] = 0
        where = np.arange(end) + np.repeat(contexts - (ends - counts), counts)
        host.positions[:end] = where
        host.positions[end:] = 0
        pages = tables[np.repeat(np.arange(len(chunks)), counts), where // PAGE_SIZE]
        host.slots[:end] = pages * np.int64(PAGE_SIZE) + where % PAGE_SIZE
        host.slots[end:] = self._spare_slot
        tiles = prefill_tiles(counts, contexts, self._group, shape.tile).reshape(-1)
        host.tiles[: len(tiles)] = tiles
        host.tiles[len(tiles) :] = -1
        self.tables.place(block, tables)

    def _write_outputs(self, host: _Fields, shape: Shape, batch: StepBatch) -> list[int]:
        """Which rows give logits; returns the lanes that keep their tokens."""
        count, outputs = len(batch.decodes), batch.outputs
        drawing = [at for at, chunk in enumerate(batch.chunks) if chunk.draws]
        host.outputs[:count] = np.arange(count)
        host.outputs[count:outputs] = [shape.decodes + host.starts[at + 1] - 1 for at in drawing]
        host.outputs[outputs:] = 0
        lanes = [batch.chunks[at].lane for at in drawing]
        return [*batch.decodes.lanes.tolist(), *(self._spare_lane if lane < 0 else lane for lane in lanes)]

    def _compute(self, shape: Shape, fields: _Fields, groups: tuple[int, ...] | None) -> None:
        model, first = self._pass.model, shape.decodes
        tables, tiles = self.tables.device[: shape.chunks], fields.tiles.view(-1, 2)

        def attend(qkv: Tensor, pages: Tensor, out: Tensor) -> None:
            if first:
                self._attention(qkv[:first], pages, fields.lengths, out[:first], shape.splits)
            some = qkv[first:]
            rope_and_store(some, model.cos, model.sin, fields.positions, fields.slots, pages)
            attention_prefill(some, pages, tables, fields.starts, fields.contexts, tiles, out[first:], tile=shape.tile)

        adapted = None if groups is None or self._lora is None else self._lora.products(groups, lora_tile(shape.tokens))
        hidden = self._pass.hidden(fields.tokens, fields.lanes, attend, every=False, adapted=adapted)
        self._outputs.compute(hidden.rows(fields.outputs))


def _captured_again(
    graphs: dict[K, Callable[[], None]], seen: set[K], key: K, most: int, compute: Callable[[], None], pool: Any
) -> Callable[[], None]:
    """The graph of ``key``; made if it was ``seen`` before and there are not ``most`` already."""
    graph = graphs.get(key)
    if graph is None and key in seen and len(graphs) < most:
        graph = graphs[key] = captured_if_it_fits(compute, pool)
    seen.add(key)
    return compute if graph is None else graph
