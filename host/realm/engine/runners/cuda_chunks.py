"""Steps with prompt chunks: one flat pass over decoding rows and the tokens of chunks.

The launches of such a step take the host some 8 ms, the device 1 to 4 ms where there are not many tokens. So
steps of up to :data:`GRAPH_TOKENS` tokens are filled up to one of a few shapes, and a shape that comes again
is captured. Rows that only fill a step belong to no chunk and write to nobody's page and lane.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import Chunk, StepBatch
from realm.engine.kernels.attention_prefill import TILES, attention_prefill
from realm.engine.kernels.rotary import rope_and_store
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda_buckets import Variant
from realm.engine.runners.cuda_decode import DecodeAttention, PageTables, captured_if_it_fits
from realm.engine.runners.cuda_draw import OutputRows, fill_draws
from realm.engine.runners.cuda_memory import GRAPH_TOKENS, MOST_CHUNK_GRAPHS
from realm.engine.runners.cuda_pass import DevicePass
from realm.engine.runners.cuda_staging import Array, Block, DrawFields

_DECODES = (0, 8, 32, 64, 128, 256, 512)
_CHUNKS = (1, 4, 16, 64)
_LEAST_TOKENS = 16


def _least(sizes: tuple[int, ...], wanted: int) -> int:
    """The least of ``sizes`` that is not less than ``wanted``."""
    return sizes[bisect_left(sizes, wanted)]


class Shape(NamedTuple):
    """Rows that a step has room for.

    Attributes:
        decodes: decoding rows. tokens: of all chunks. chunks: how many. longest: the longest chunk at most.
        splits: of the decoding rows' contexts.
    """

    decodes: int
    tokens: int
    chunks: int
    longest: int
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
    outputs: Any

    @classmethod
    def place(cls, block: Block, shape: Shape) -> tuple[_Fields, _Fields]:
        rows, decodes, tokens, chunks = shape.decodes + shape.tokens, shape.decodes, shape.tokens, shape.chunks
        kinds = (np.int32, np.int32, np.int32, np.int32, np.int64, np.int32, np.int32, np.int64)
        counts = (rows, rows, decodes, tokens, tokens, chunks + 1, chunks, shape.outputs)
        places = [block.place(kind, count) for kind, count in zip(kinds, counts, strict=True)]
        return cls(*(place[0] for place in places)), cls(*(place[1] for place in places))


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
        pool: Any,
    ) -> None:
        """``rows``: most output rows of a step. ``pool``: of graphs' memory; None computes without graphs."""
        config, device = device_pass.model.config, device_pass.model.device
        self._pass = device_pass
        self._outputs = outputs
        self._attention = attention
        self._rows = rows
        self._pool = pool
        self._spare_lane = len(device_pass.lane_tokens) - 1
        self._spare_slot = (device_pass.cache.shape[2] - 1) * PAGE_SIZE
        self._seen: set[tuple[Shape, Variant]] = set()
        self._graphs: dict[tuple[Shape, Variant], Callable[[], None]] = {}
        self.tables = PageTables(rows, -(-config.context_length // PAGE_SIZE), device)

    def shape(self, batch: StepBatch) -> tuple[Shape, bool]:
        """The room that a step is given, and whether that is one of the few shapes that are captured; where
        there is none, it is exactly what the step needs."""
        decodes, chunks = len(batch.decodes), len(batch.chunks)
        lengths = [len(chunk.tokens) for chunk in batch.chunks]
        tokens = sum(lengths)
        if tokens <= GRAPH_TOKENS and decodes <= _DECODES[-1] and chunks <= _CHUNKS[-1]:
            filled = max(_LEAST_TOKENS, 1 << (tokens - 1).bit_length())
            rows = _least(_DECODES, decodes)
            room = Shape(rows, filled, _least(_CHUNKS, chunks), filled, self._splits(rows, batch))
            if room.outputs <= self._rows:
                return room, True
        return Shape(decodes, tokens, chunks, max(lengths), self._splits(decodes, batch)), False

    def _splits(self, rows: int, batch: StepBatch) -> int:
        return self._attention.splits(rows, batch.decodes.longest) if rows else 1

    def compile_tiles(self) -> None:
        """Launch the attention of chunks with every tile that it may take, on no chunk at all."""
        model, pages = self._pass.model, self._pass.cache[0]
        config = model.config
        group = config.heads // config.kv_heads
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        qkv = torch.zeros((1, width), dtype=model.dtype, device=model.device)
        out = torch.zeros((1, config.heads * config.head_dim), dtype=model.dtype, device=model.device)
        none = torch.zeros(2, dtype=torch.int32, device=model.device)
        for tile in TILES:
            attention_prefill(qkv, pages, self.tables.device[:1], none, none[:1], out, longest=max(1, tile // group))

    def prepare(self, block: Block, batch: StepBatch, variant: Variant) -> Callable[[], None]:
        """Write a step's inputs to ``block``; returns what computes it once the block was sent.

        Raises:
            ValueError: when there are more sequences than the runner was made for.
        """
        shape, common = self.shape(batch)
        if shape.outputs > self._rows:
            raise ValueError(f"a step of {shape.outputs} sequences; the runner has {self._rows} output rows")
        block.reset()
        host, device = _Fields.place(block, shape)
        draws, device_draws = block.draws(shape.outputs)
        self._write_decodes(block, host, shape, batch)
        self._write_chunks(block, host, shape, batch.chunks)
        self._write_outputs(host, draws, shape, batch)
        fill_draws(draws, batch.draws, variant)
        compute = partial(self._compute, shape, variant, device, device_draws)
        key = (shape, variant)
        graph = self._graphs.get(key)
        if graph is None and common and self._pool is not None:
            # The first step of a kind compiles what it needs; the second one is captured.
            if key in self._seen and len(self._graphs) < MOST_CHUNK_GRAPHS:
                graph = self._graphs[key] = captured_if_it_fits(compute, self._pool)
            self._seen.add(key)
        return compute if graph is None else graph

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
        width = max(-(-(chunk.start + len(chunk.tokens)) // PAGE_SIZE) for chunk in chunks)
        tables = np.zeros((len(chunks), width), np.int32)
        end = 0
        host.starts[0] = 0
        for at, chunk in enumerate(chunks):
            begin, end = end, end + len(chunk.tokens)
            host.starts[at + 1] = end
            host.contexts[at] = chunk.start
            used = -(-(chunk.start + end - begin) // PAGE_SIZE)
            tables[at, :used] = chunk.pages[:used]
            host.tokens[shape.decodes + begin : shape.decodes + end] = chunk.tokens
            where = np.arange(chunk.start, chunk.start + end - begin)
            host.positions[begin:end] = where
            host.slots[begin:end] = tables[at, where // PAGE_SIZE] * np.int64(PAGE_SIZE) + where % PAGE_SIZE
        host.tokens[shape.decodes + end :] = 0
        host.positions[end:] = 0
        host.slots[end:] = self._spare_slot
        host.starts[len(chunks) + 1 :] = end
        host.contexts[len(chunks) :] = 0
        self.tables.place(block, tables)

    def _write_outputs(self, host: _Fields, draws: DrawFields[Array], shape: Shape, batch: StepBatch) -> None:
        count, outputs = len(batch.decodes), batch.outputs
        drawing = [at for at, chunk in enumerate(batch.chunks) if chunk.draws]
        host.outputs[:count] = np.arange(count)
        host.outputs[count:outputs] = [shape.decodes + host.starts[at + 1] - 1 for at in drawing]
        host.outputs[outputs:] = 0
        lanes = [batch.chunks[at].lane for at in drawing]
        draws.lanes[:count] = batch.decodes.lanes
        draws.lanes[count:outputs] = [self._spare_lane if lane < 0 else lane for lane in lanes]
        draws.lanes[outputs:] = self._spare_lane

    def _compute(self, shape: Shape, variant: Variant, fields: _Fields, draws: DrawFields[Tensor]) -> None:
        model, first = self._pass.model, shape.decodes
        tables = self.tables.device[: shape.chunks]

        def attend(qkv: Tensor, pages: Tensor, out: Tensor) -> None:
            if first:
                self._attention(qkv[:first], pages, fields.lengths, out[:first], shape.splits)
            some = qkv[first:]
            rope_and_store(some, model.cos, model.sin, fields.positions, fields.slots, pages)
            attention_prefill(some, pages, tables, fields.starts, fields.contexts, out[first:], longest=shape.longest)

        hidden = self._pass.hidden(fields.tokens, fields.lanes, attend, every=False)
        self._outputs.draw(hidden.rows(fields.outputs), draws, variant)
