"""Steps in which every row computes one token: a replayed CUDA graph for each size and kind of draw.

A graph's kernels have fixed addresses and grids, so inputs come in static buffers, a batch is filled up to
the next captured size with rows that attend to nothing and write to nobody's page and lane, and how a
context is split over programs depends on the size alone.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import Decodes, Draws, Ints
from realm.engine.kernels.attention_decode import MOST_SPLITS, DecodeWorkspace, attention_decode, decode_splits
from realm.engine.kernels.lora import FEW
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.memory import is_out_of_memory
from realm.engine.runners.cuda_buckets import COMMON, RARE, Variant, bucket_sizes, fit
from realm.engine.runners.cuda_draw import OutputRows, fill_draws
from realm.engine.runners.cuda_kernels import spread_tables
from realm.engine.runners.cuda_lora import EVERY, FAMILIES, AdaptedSteps
from realm.engine.runners.cuda_memory import MOST_ADAPTER_GRAPHS, MOST_PARTS, MOST_RARE_GRAPHS
from realm.engine.runners.cuda_pass import DevicePass
from realm.engine.runners.cuda_staging import Array, Block, DrawFields

log = logging.getLogger("realm.engine")

SHORT_CONTEXT = 4096
"""Tokens of context up to which all steps of a size share a graph."""


def captured(compute: Callable[[], None], pool: Any) -> Callable[[], None]:
    """What replays a graph of all that ``compute`` launches on the current stream; its kernels must have been
    compiled before.

    Raises:
        RuntimeError: among others when there is no memory for it (:func:`realm.engine.memory.is_out_of_memory`):
            then nothing else is changed, and steps can go on without it.
    """
    graph = torch.cuda.CUDAGraph()
    collecting = gc.isenabled()
    # Garbage with an event, a graph or pinned memory must not be freed in the middle: that is work of its own
    # for the stream, and would end the capture.
    gc.disable()
    try:
        # Not torch.cuda.graph(): that collects garbage and empties the allocator's cache each time.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            compute()
        finally:
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    replay: Callable[[], None] = graph.replay
    return replay


def captured_if_it_fits(compute: Callable[[], None], pool: Any) -> Callable[[], None]:
    """:func:`captured`, or ``compute`` itself where memory is short: that is slower, and as good."""
    for _ in range(2):
        try:
            return captured(compute, pool)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # What the allocator keeps for later steps it cannot give back in the middle of a capture.
        torch.cuda.empty_cache()
    log.warning(
        "no memory for one more CUDA graph: such steps take the host longer from now on; "
        "a lower --kv-fraction or --kv-pages leaves more"
    )
    return compute


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
            rows, compact = self._placed
            spread_tables(compact, self.device)
            self._there, self._placed = rows, None


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
        return min(splits, 1 << max(1, MOST_PARTS // rows).bit_length() - 1)

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
        lora: AdaptedSteps | None = None,
    ) -> None:
        """``rows``: most rows of a step. ``blocks`` share their device buffer. ``pool``: of graphs' memory;
        None computes without graphs. ``lora``: where rows may have adapters."""
        self._pass = device_pass
        self._outputs = outputs
        self._attention = attention
        self._spare_lane = len(device_pass.lane_tokens) - 1
        self._sizes = bucket_sizes(rows)
        self._fields = [{size: DecodeFields.place(block, size) for size in self._sizes} for block in blocks]
        self._pool = pool
        self._graphs: dict[tuple[int, Variant, int], Callable[[], None]] = {}
        self._most_graphs = len(self._sizes) * len(COMMON) + MOST_RARE_GRAPHS
        self._lora = lora
        # The forward pass alone: drawing is launched after it, in whichever way a step draws.
        self._adapted: dict[tuple[int, tuple[int, ...], int], Callable[[], None]] = {}
        self._most_adapted = len(self._sizes) * len(FAMILIES) + 2 * MOST_ADAPTER_GRAPHS

    def first(self) -> list[Callable[[], None]]:
        """What has to be done before the first step: all kernels compiled, and what most steps need captured,
        that is all sizes, greedy and sampled, for contexts of usual length."""

        def capture(size: int, variant: Variant) -> None:
            splits = self._attention.splits(size, 1)
            self._rehearse(size, variant, splits)
            if self._pool is not None:
                compute = partial(self._compute, size, variant, splits)
                self._graphs[size, variant, splits] = captured(compute, self._pool)

        # The largest first: the smaller ones then find their memory in the pool.
        captures = [partial(capture, size, variant) for size in reversed(self._sizes) for variant in COMMON]
        rare = [partial(self._rehearse, 1, variant, 1) for variant in RARE]
        powers = range(MOST_SPLITS.bit_length())
        if self._lora is not None:
            captures += [partial(self._capture_adapted, size) for size in reversed(self._sizes)]
        return [*rare, *(partial(self._rehearse, 1, COMMON[0], 1 << power) for power in powers), *captures]

    def _capture_adapted(self, size: int) -> None:
        """Steps of ``size`` rows with adapters, for contexts of usual length."""
        splits = self._attention.splits(size, 1)
        self._fields[0][size].pad_device(self._spare_lane)
        # One row alone otherwise takes no product of the library's.
        self._forward(size, splits, EVERY)
        for groups in FAMILIES:
            self._adapted_graph(size, groups, splits)

    def prepare(
        self, block: Block, decodes: Decodes, draws: Draws, variant: Variant, adapters: Ints | None = None
    ) -> Callable[[], None]:
        """Write a step's inputs to ``block``; returns what computes it once the block was sent.

        ``adapters``: int32 [rows], slots, -1 for none; None where no row has one.
        """
        count = len(decodes)
        size = fit(self._sizes, count)
        splits = self._attention.splits(size, decodes.longest)
        groups = None if adapters is None or self._lora is None else self._lora.family(adapters)
        if groups is None:
            replay = self._graph(size, variant, splits)
        else:
            replay = self._with_draw(self._adapted_graph(size, groups, splits), size, variant)
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
        if groups is not None:
            assert self._lora is not None and adapters is not None
            self._lora.place(block, adapters, groups, FEW)
        return replay

    def _graph(self, size: int, variant: Variant, splits: int) -> Callable[[], None]:
        """What computes a step of ``size`` rows from the device's buffers; captured when first asked for."""
        key = (size, variant, splits)
        graph = self._graphs.get(key)
        if graph is None:
            compute = partial(self._compute, size, variant, splits)
            if self._pool is None or len(self._graphs) >= self._most_graphs:
                return compute
            self._rehearse(size, variant, splits)
            graph = self._graphs[key] = captured_if_it_fits(compute, self._pool)
        return graph

    def _adapted_graph(self, size: int, groups: tuple[int, ...], splits: int) -> Callable[[], None]:
        """The same of a forward pass with adapters. Its kernels and the library's were all used at the start."""
        key = (size, groups, splits)
        graph = self._adapted.get(key)
        if graph is None:
            forward = partial(self._forward, size, splits, groups)
            if self._pool is None or len(self._adapted) >= self._most_adapted:
                return forward
            graph = self._adapted[key] = captured_if_it_fits(forward, self._pool)
        return graph

    def _with_draw(self, forward: Callable[[], None], size: int, variant: Variant) -> Callable[[], None]:
        def compute() -> None:
            forward()
            self._outputs.draw(size, self._fields[0][size].device_draws, variant)

        return compute

    def _rehearse(self, size: int, variant: Variant, splits: int) -> None:
        """Compute rows that only fill a batch, so that kernels are compiled and libraries take what they keep."""
        self._fields[0][size].pad_device(self._spare_lane)
        if variant.masked:
            self._outputs.allow_all(size)
        self._compute(size, variant, splits)

    def _compute(self, size: int, variant: Variant, splits: int) -> None:
        self._forward(size, splits, None)
        self._outputs.draw(size, self._fields[0][size].device_draws, variant)

    def _forward(self, size: int, splits: int, groups: tuple[int, ...] | None) -> None:
        """From input tokens to logits; with adapters where ``groups`` says which products have them."""
        fields = self._fields[0][size]
        adapted = None if groups is None or self._lora is None else self._lora.products(groups, FEW)

        def attend(qkv: Tensor, pages: Tensor, out: Tensor) -> None:
            self._attention(qkv, pages, fields.device_lengths, out, splits)

        lanes = fields.device_draws.lanes
        hidden = self._pass.hidden(fields.device_tokens, lanes, attend, every=True, adapted=adapted)
        self._outputs.compute(hidden)
