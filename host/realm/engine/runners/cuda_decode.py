"""Steps in which every row computes one token: a replayed CUDA graph for each size and kind of draw.

A graph's kernels have fixed addresses and grids, so inputs come in static buffers, a batch is filled up to
the next captured size with rows that attend to nothing and write to nobody's page and lane, and how a
context is split over programs depends on the size alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import Decodes, Draws, Ints
from realm.engine.kernels.attention_decode import DecodeWorkspace, attention_decode, decode_splits
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda_buckets import COMMON, Variant, bucket_sizes, fit
from realm.engine.runners.cuda_draw import OutputRows, fill_draws
from realm.engine.runners.cuda_kernels import spread_tables
from realm.engine.runners.cuda_memory import MOST_PARTS
from realm.engine.runners.cuda_pass import DevicePass
from realm.engine.runners.cuda_staging import Array, Block, DrawFields
from realm.models.loading import Progress

SHORT_CONTEXT = 4096
"""Tokens of context up to which all steps of a size share a graph."""


def captured(compute: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """A graph of what ``compute`` launches on the current stream; its kernels must have been compiled before."""
    graph = torch.cuda.CUDAGraph()
    # Not torch.cuda.graph(): that collects garbage and empties the allocator's cache each time.
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        compute()
    finally:
        graph.capture_end()
    return graph


@dataclass(frozen=True, slots=True)
class DecodeFields:
    """Where a size's inputs are, in a block and on the device, and the byte after them."""

    tokens: Array
    lengths: Array
    draws: DrawFields[Array]
    device_tokens: Tensor
    device_lengths: Tensor
    device_draws: DrawFields[Tensor]
    end: int

    @classmethod
    def place(cls, block: Block, rows: int) -> DecodeFields:
        """Lay out ``rows`` rows from the front of ``block``."""
        block.reset()
        tokens, device_tokens = block.place(np.int32, rows)
        lengths, device_lengths = block.place(np.int32, rows)
        draws, device_draws = block.draws(rows)
        return cls(tokens, lengths, draws, device_tokens, device_lengths, device_draws, block.end)

    def pad_device(self, spare_lane: int) -> None:
        """Make every row on the device one that only fills the batch."""
        self.device_tokens.zero_()
        self.device_lengths.zero_()
        for values in (self.device_draws.temperature, self.device_draws.top_k, self.device_draws.min_p):
            values.zero_()
        self.device_draws.uniform.zero_()
        self.device_draws.top_p.fill_(1)
        self.device_draws.lanes.fill_(spare_lane)


class PageTables:
    """Page numbers of a step's sequences.

    Attributes:
        device: int32 [rows, width], as wide as the context; a row's rest is what earlier steps left there.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.device = torch.zeros((rows, width), dtype=torch.int32, device=device)
        self._there: Ints = np.zeros((0, 0), np.int32)
        self._placed: tuple[Ints, Tensor] | None = None

    def reset(self) -> None:
        """Forget what was placed for a step that was not launched."""
        self._placed = None

    def place(self, block: Block, rows: Ints) -> None:
        """Write page numbers [n, used] into ``block``, unless the device has them: decoding changes them
        once in 16 steps. The array is kept."""
        if not np.array_equal(rows, self._there):
            host, device = block.place(np.int32, rows.size)
            host[:] = rows.reshape(-1)
            self._placed = rows, device.view(rows.shape)

    def spread(self) -> None:
        """Bring what :meth:`place` wrote to its place, after the block was sent."""
        if self._placed is not None:
            self._there, compact = self._placed
            spread_tables(compact, self.device)
            self._placed = None


class DecodeAttention:
    """Attention of decoding rows.

    Attributes:
        tables: the rows' pages.
    """

    def __init__(self, device_pass: DevicePass, rows: int) -> None:
        """``rows``: most rows of a step."""
        config, device = device_pass.model.config, device_pass.model.device
        self._model = device_pass.model
        self._kv_heads = config.kv_heads
        self._multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        )
        self.tables = PageTables(rows, -(-config.context_length // PAGE_SIZE), device)
        self._workspace = DecodeWorkspace.allocate(max(MOST_PARTS, rows), rows, config.heads, config.head_dim, device)

    def place(self, block: Block, decodes: Decodes) -> None:
        """Write the rows' page numbers into ``block``."""
        used = -(-decodes.longest // PAGE_SIZE)
        self.tables.place(block, decodes.tables[decodes.lanes, :used])

    def splits(self, rows: int, longest: int) -> int:
        """Into how many parts the contexts of ``rows`` rows are split at most. It is the same for all steps
        up to :data:`SHORT_CONTEXT` tokens, and for those up to each further power of two."""
        upto = max(SHORT_CONTEXT, 1 << (longest - 1).bit_length())
        splits = decode_splits(rows, self._kv_heads, upto, self._multiprocessors)
        return max(1, min(splits, 1 << (MOST_PARTS // rows).bit_length() - 1))

    def __call__(self, qkv: Tensor, pages: Tensor, lengths: Tensor, out: Tensor, splits: int) -> None:
        """One layer's attention of rows that attend to ``lengths`` tokens each, int32 [n]."""
        model = self._model
        tables = self.tables.device[: len(lengths)]
        attention_decode(qkv, model.cos, model.sin, pages, tables, lengths, out, self._workspace, splits=splits)


class DecodeSteps:
    """Captures and launches them."""

    def __init__(
        self,
        device_pass: DevicePass,
        outputs: OutputRows,
        attention: DecodeAttention,
        rows: int,
        blocks: list[Block],
        pool: Any,
    ) -> None:
        """``rows``: most rows of a step. ``blocks`` share their device buffer. ``pool``: of graphs' memory;
        None computes without graphs."""
        self._pass = device_pass
        self._outputs = outputs
        self._attention = attention
        self._spare_lane = len(device_pass.lane_tokens) - 1
        self._sizes = bucket_sizes(rows)
        self._fields = [{size: DecodeFields.place(block, size) for size in self._sizes} for block in blocks]
        self._pool = pool
        self._graphs: dict[tuple[int, Variant, int], torch.cuda.CUDAGraph] = {}

    def capture(self, progress: Progress | None) -> None:
        """Capture what most steps need: all sizes, greedy and sampled, for contexts of usual length."""
        # The largest first: the smaller ones then find their memory in the pool.
        wanted = [(size, variant) for size in reversed(self._sizes) for variant in COMMON]
        for done, (size, variant) in enumerate(wanted, 1):
            self._graph(size, variant, self._attention.splits(size, 1))
            if progress is not None:
                progress(done, len(wanted))

    def prepare(self, block: Block, decodes: Decodes, draws: Draws, variant: Variant) -> Callable[[], None]:
        """Write a step's inputs to ``block``; returns what computes it once the block was sent."""
        count = len(decodes)
        size = fit(self._sizes, count)
        replay = self._graph(size, variant, self._attention.splits(size, decodes.longest))
        fields = self._fields[block.number][size]
        block.reset(fields.end)
        fields.tokens[:count] = decodes.tokens
        fields.tokens[count:] = 0
        fields.draws.lanes[:count] = decodes.lanes
        fields.draws.lanes[count:] = self._spare_lane
        np.add(decodes.positions, 1, out=fields.lengths[:count])
        fields.lengths[count:] = 0
        fill_draws(fields.draws, draws, variant)
        self._attention.place(block, decodes)
        return replay

    def _graph(self, size: int, variant: Variant, splits: int) -> Callable[[], None]:
        """What computes a step of ``size`` rows from the device's buffers; captured when first asked for."""
        if self._pool is None:
            return partial(self._compute, size, variant, splits)
        graph = self._graphs.get((size, variant, splits))
        if graph is None:
            graph = self._graphs[size, variant, splits] = self._captured(size, variant, splits, self._pool)
        replay: Callable[[], None] = graph.replay
        return replay

    def _captured(self, size: int, variant: Variant, splits: int, pool: Any) -> torch.cuda.CUDAGraph:
        self._fields[0][size].pad_device(self._spare_lane)
        if variant.masked:
            self._outputs.allow_all(size)
        # Once without capture: kernels are compiled, and libraries take what they keep.
        self._compute(size, variant, splits)
        return captured(partial(self._compute, size, variant, splits), pool)

    def _compute(self, size: int, variant: Variant, splits: int) -> None:
        fields = self._fields[0][size]

        def attend(qkv: Tensor, pages: Tensor, out: Tensor) -> None:
            self._attention(qkv, pages, fields.device_lengths, out, splits)

        hidden = self._pass.hidden(fields.device_tokens, fields.device_draws.lanes, attend, every=True)
        self._outputs.draw(hidden, fields.device_draws, variant)
