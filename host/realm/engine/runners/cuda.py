"""A model on a CUDA device, behind :class:`realm.engine.batch.Runner`.

Launching a step writes its inputs to pinned memory, and puts on the runner's own stream: one copy to the
device, the step's kernels (a graph's replay where all rows decode), one copy of the results back, and an
event. Nothing in it waits for the device, so the host prepares the next step while this one runs, and the
device begins it right after: the tokens it depends on are on the device already.

On a CPU the same code runs through Triton's interpreter, without graphs and streams, for tests.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import AdapterMemory, Chunk, Decodes, Draws, Flags, Floats, Ints, StepBatch, StepResult
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.memory import is_out_of_memory
from realm.engine.runners.cuda_adapters import DeviceAdapters
from realm.engine.runners.cuda_buckets import Variant, most_rows
from realm.engine.runners.cuda_chunks import ChunkSteps
from realm.engine.runners.cuda_decode import DecodeAttention, DecodeSteps, PageTables
from realm.engine.runners.cuda_draw import OutputRows
from realm.engine.runners.cuda_kernels import copy_pages, copy_pages_at_once
from realm.engine.runners.cuda_lora import AdaptedSteps
from realm.engine.runners.cuda_memory import block_bytes
from realm.engine.runners.cuda_pass import DevicePass
from realm.engine.runners.cuda_staging import Block, Results, new_event
from realm.models.llama import LlamaModel
from realm.models.loading import Progress

log = logging.getLogger("realm.engine")

RING = 4
"""Steps that may be in flight at once; a further launch waits for the oldest."""


class _Slot:
    """What a step in flight keeps for itself: inputs, results, and where it lies in the stream."""

    def __init__(self, block: Block, results: Results, device: torch.device) -> None:
        self.block = block
        self.results = results
        self.began = new_event(device)
        self.ended = new_event(device)
        self.step: CudaStep | None = None


class CudaStep:
    """A launched step (:class:`realm.engine.batch.Launched`)."""

    def __init__(self, slot: _Slot, wanted: Flags, logits: Tensor | None) -> None:
        """``wanted``: [outputs], whose log-probabilities are asked for. ``logits``: pinned, on their way."""
        self._slot = slot
        self._wanted = wanted
        self._logits = logits
        self._result: StepResult | None = None

    def done(self) -> bool:
        """See :class:`realm.engine.batch.Launched`."""
        return self._result is not None or self._slot.ended.query()

    def wait(self) -> StepResult:
        """See :class:`realm.engine.batch.Launched`."""
        if self._result is None:
            slot = self._slot
            slot.ended.synchronize()
            tokens, logprobs = slot.results.take(len(self._wanted))
            logprobs[~self._wanted] = np.nan
            logits: Floats | None = None if self._logits is None else self._logits.numpy()
            seconds = slot.began.elapsed_time(slot.ended) / 1e3
            self._result = StepResult(tokens, logprobs, logits, seconds=seconds)
            slot.step = None
        return self._result


class CudaRunner:
    """See :class:`realm.engine.batch.Runner`.

    ``fresh`` pages of a step are not cleared: the kernels load no position that is beyond a row's length.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: LlamaModel,
        *,
        pages: int,
        lanes: int,
        token_budget: int = 8192,
        adapter_memory: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Take the memory, compile the kernels and capture the common graphs.

        Args:
            model: on the device.
            pages: KV pages. lanes: see :class:`realm.engine.batch.Runner`; a step has at most half as
                many output rows. token_budget: most tokens of a step's chunks.
            adapter_memory: bytes for adapters; 0 does without.
            progress: called with (parts done, parts in all); most of them capture a graph.

        Raises:
            torch.OutOfMemoryError: when the device has not enough memory.
        """
        self.config = model.config
        self.pages = pages
        self.lanes = lanes
        self._rows = rows = max(1, lanes // 2)
        device = model.device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # The weights may still be on their way, on another stream.
            torch.cuda.synchronize(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with self._on_stream():
            self._pass = DevicePass(model, pages, lanes, most_rows(token_budget, rows))
            self._outputs = OutputRows(self._pass, rows)
            self._adapters = DeviceAdapters(model.config, model.dtype, device, adapter_memory)
            self.adapters: AdapterMemory = self._adapters
            self._lora: AdaptedSteps | None = None
            if self._adapters.capacity:
                self._lora = AdaptedSteps(self._adapters, self._pass, token_budget, rows)
            size = block_bytes(model.config, token_budget, rows, adapters=self._lora is not None)
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            pinned = device.type == "cuda"
            self._slots = [
                _Slot(
                    Block(number, torch.empty(size, dtype=torch.uint8, pin_memory=pinned), buffer),
                    Results(rows, self._outputs.tokens, self._outputs.logprobs),
                    device,
                )
                for number in range(RING)
            ]
            self._next = 0
            attention = DecodeAttention(self._pass, rows)
            blocks = [slot.block for slot in self._slots]
            pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self._decodes = DecodeSteps(self._pass, self._outputs, attention, rows, blocks, pool, self._lora)
            self._chunks = ChunkSteps(self._pass, self._outputs, attention, rows, token_budget, pool, self._lora)
            self._tables: list[PageTables | AdaptedSteps] = [attention.tables, self._chunks.tables]
            if self._lora is not None:
                self._tables.append(self._lora)
            if device.type == "cuda":
                self._start(token_budget, progress or _unwatched)
                torch.cuda.synchronize(device)

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        if self._stream is None:
            return contextlib.nullcontext()
        stream: contextlib.AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def _start(self, token_budget: int, progress: Progress) -> None:
        """Compile every kernel that a step may need, and capture what most steps do."""
        block = self._slots[0].block
        work = [self._pass.load_products, *self._prompts(token_budget), self._chunks.compile_tiles]
        if self._lora is not None:
            work.append(self._lora.compile_kernels)
        work += [self._copy_nothing, *self._decodes.first(), *self._chunks.first(block)]
        for done, part in enumerate(work, 1):
            part()
            progress(done, len(work))

    def _copy_nothing(self) -> None:
        spare = torch.full((1,), self.pages, dtype=torch.int64, device=self._pass.cache.device)
        copy_pages(self._pass.cache, spare, self._pass.cache, spare)

    def _prompts(self, token_budget: int) -> list[Callable[[], None]]:
        """Steps of one prompt, on nobody's page: the largest, for what it takes, greedy and not."""
        most = min(token_budget, self.config.context_length)
        none = np.zeros(0, np.int32)
        decodes = Decodes(none, none, none, np.zeros((0, 0), np.int32), 0)
        one = np.ones(1, np.float32)

        def compute(temperature: Floats) -> None:
            draws = Draws(temperature, np.zeros(1, np.int32), one, one * 0, np.zeros(1), np.zeros(1, np.bool_))
            chunk = Chunk(np.zeros(most, np.uint32), 0, [self.pages] * -(-most // PAGE_SIZE), True)
            self.launch(StepBatch(decodes, [chunk], draws)).wait()

        return [partial(compute, temperature) for temperature in (one * 0, one)]

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> CudaStep:
        """See :class:`realm.engine.batch.Runner`.

        Raises:
            ValueError: when the step has more rows or tokens than the runner was made for.
            RuntimeError: what CUDA says, as when the device's memory does not suffice. What the step should
                have written is missing then, so the engine cannot go on.
        """
        try:
            return self._launch(batch)
        except RuntimeError as error:
            if is_out_of_memory(error):
                log.critical(
                    "the GPU has no memory left for a step of %d rows and %d tokens of prompts: "
                    "lower --kv-fraction, --kv-pages, --token-budget or --max-sequences",
                    len(batch.decodes),
                    sum(len(chunk.tokens) for chunk in batch.chunks),
                )
            raise

    def _launch(self, batch: StepBatch) -> CudaStep:
        if batch.outputs > self._rows:
            raise ValueError(f"a step of {batch.outputs} output rows; the runner has {self._rows}")
        adapters = self._adapters_of(batch)
        slot = self._slots[self._next]
        if slot.step is not None:
            slot.step.wait()
        self._next = (self._next + 1) % RING
        variant = Variant.of(batch.draws)
        for tables in self._tables:
            tables.reset()
        with self._on_stream():
            if batch.chunks:
                compute = self._chunks.prepare(slot.block, batch, variant, adapters)
            else:
                compute = self._decodes.prepare(slot.block, batch.decodes, batch.draws, variant, adapters)
            before = self._prepare_rare(slot.block, batch)
            rows = self._place_longs(slot.block, batch.logits) if batch.logits else None
            slot.began.record(self._stream)
            slot.block.send()
            for part in before:
                part()
            for tables in self._tables:
                tables.spread()
            compute()
            slot.results.fetch(batch.outputs, variant.logprobs)
            logits = None if rows is None else self._fetch_logits(rows)
            slot.ended.record(self._stream)
        slot.step = CudaStep(slot, batch.draws.logprob, logits)
        return slot.step

    def _adapters_of(self, batch: StepBatch) -> Ints | None:
        """A step's adapters, checked: what the plan says is where kernels read and write."""
        adapters = batch.adapters
        if adapters is None:
            return None
        rows, slots = len(batch.decodes) + len(batch.chunks), self.adapters.slots
        if adapters.shape != (rows,) or (rows and not -1 <= int(adapters.min()) <= int(adapters.max()) < slots):
            raise ValueError(f"adapters must be {rows} numbers of -1 to {slots - 1}, one for each sequence")
        return adapters

    def _prepare_rare(self, block: Block, batch: StepBatch) -> list[Callable[[], None]]:
        """Write what few steps need to ``block``; returns what has to be done with it before the step."""
        before: list[Callable[[], None]] = []
        if batch.copies:
            sources, targets = [pair[0] for pair in batch.copies], [pair[1] for pair in batch.copies]
            pages = [self._place_longs(block, numbers) for numbers in (sources, targets)]
            cache = self._pass.cache
            if set(sources).isdisjoint(targets):
                before.append(partial(copy_pages, cache, pages[0], cache, pages[1]))
            else:
                before.append(partial(copy_pages_at_once, cache, *pages))
        if batch.draws.masks:
            placed = self._outputs.place_masks(block, batch.draws.masks)
            before.append(partial(self._outputs.allow_all, batch.outputs))
            before.append(partial(self._outputs.spread_masks, *placed))
        return before

    @staticmethod
    def _place_longs(block: Block, numbers: list[int]) -> Tensor:
        host, device = block.place(np.int64, len(numbers))
        host[:] = numbers
        return device

    def _fetch_logits(self, rows: Tensor) -> Tensor:
        """Start the copy of some output rows' logits to the host: float32 [m, vocab]."""
        chosen = self._outputs.logits.index_select(0, rows).float()
        pinned = torch.empty(chosen.shape, dtype=torch.float32, pin_memory=self._stream is not None)
        return pinned.copy_(chosen, non_blocking=True)

    def fileno(self) -> int:
        """See :class:`realm.engine.batch.Runner`: -1, steps are asked."""
        return -1

    def close(self) -> None:
        """See :class:`realm.engine.batch.Runner`. No step may be launched after it."""
        if not self._slots:
            return
        if self._stream is not None:
            self._stream.synchronize()
        # In this order: a graph's memory is given back with the graph, what it reads after it.
        del self._decodes, self._chunks, self._tables, self._lora, self._outputs, self._pass
        self._adapters.close()
        self._slots = []
        if self._stream is not None:
            torch.cuda.empty_cache()


def _unwatched(done: int, total: int) -> None:
    """Progress that nobody watches."""
