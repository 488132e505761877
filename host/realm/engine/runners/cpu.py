"""Carries out steps with torch on the CPU, in the caller's thread or in one of its own.

A thread of its own computes while the engine's takes in the next calls: torch gives the GIL back in
every operation. What a step needs of the core's arrays is copied in :meth:`CpuRunner.launch`; all of
torch is used in the computing thread, because every thread that uses it gets a pool of threads.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from realm.engine.attention.sdpa import ChunkRows, KvCache, PagedAttention
from realm.engine.batch import LAST_DRAWN, Draws, Ints, Longs, StepBatch, StepResult
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.sampling import Drawn, draw_batch, taken
from realm.engine.segmented import AdapterRows, AdapterSlots, StepAdapters
from realm.models.llama import LlamaModel

log = logging.getLogger("realm.engine")

ADAPTER_MEMORY = 512 << 20
"""Bytes that adapters may take where nothing else is said."""


@dataclass(slots=True)
class _Work:
    """A step, laid out as the model takes it: decoding rows by length, then the longer chunks.

    Attributes:
        ids: int64 [rows]; those of ``ahead`` are filled in when the step before has drawn them.
        ahead: rows whose token is the last of the lane in ``ahead_lanes``.
        lengths, tables, chunks: see :class:`PagedAttention`.
        outputs: the row of each output row. lanes: where its token is kept, or -1.
        adapters: those of the step's rows; the weights stay the step's whatever their slot gets meanwhile.
    """

    ids: Longs
    ahead: Longs
    ahead_lanes: Longs
    lengths: Longs
    tables: Longs
    chunks: list[ChunkRows]
    outputs: Longs
    lanes: Longs
    draws: Draws
    logits: list[int]
    copies: list[tuple[int, int]]
    fresh: list[int]
    adapters: AdapterRows


def _lay_out(batch: StepBatch, slots: AdapterSlots) -> _Work:
    """Copy what a step needs of the core's arrays and lists."""
    decodes, count = batch.decodes, len(batch.decodes)
    # A chunk of one token is computed like a decoding sequence.
    singles = [chunk for chunk in batch.chunks if len(chunk.tokens) == 1]
    longer = [chunk for chunk in batch.chunks if len(chunk.tokens) > 1]
    lengths = np.concatenate((decodes.positions, [chunk.start for chunk in singles])).astype(np.int64) + 1
    used = -(-lengths // PAGE_SIZE)
    tables = np.zeros((len(lengths), int(used.max(initial=0))), np.int64)
    tables[:count] = decodes.tables[decodes.lanes, : tables.shape[1]]
    for row, chunk in enumerate(singles, count):
        tables[row, : used[row]] = chunk.pages[: used[row]]
    order = np.argsort(lengths, kind="stable")
    tokens = [decodes.tokens, *(chunk.tokens for chunk in singles)]
    ids = np.concatenate(tokens).astype(np.int64)[order]
    ahead = np.flatnonzero(ids == LAST_DRAWN)
    row_of = np.empty_like(order)
    row_of[order] = np.arange(len(order))

    outputs, lanes = row_of[:count].tolist(), decodes.lanes.tolist()
    chunks: list[ChunkRows] = []
    single, end = count, len(order)
    for chunk in batch.chunks:
        if len(chunk.tokens) == 1:
            row = int(row_of[single])
            single += 1
        else:
            length = chunk.start + len(chunk.tokens)
            chunks.append(ChunkRows(chunk.start, length, np.array(chunk.pages, np.int64)))
            end += len(chunk.tokens)
            row = end - 1
        if chunk.draws:
            outputs.append(row)
            lanes.append(chunk.lane)
    return _Work(
        ids=np.concatenate((ids, *(chunk.tokens for chunk in longer))).astype(np.int64, copy=False),
        ahead=ahead,
        ahead_lanes=decodes.lanes[order[ahead]].astype(np.int64),
        lengths=lengths[order],
        tables=tables[order],
        chunks=chunks,
        outputs=np.array(outputs, np.int64),
        lanes=np.array(lanes, np.int64),
        draws=batch.draws,
        logits=batch.logits,
        copies=batch.copies,
        fresh=batch.fresh,
        adapters=[] if batch.adapters is None else slots.of(_row_slots(batch, batch.adapters, order)),
    )


def _row_slots(batch: StepBatch, slots: Ints, order: Longs) -> Longs:
    """The adapter slot of each row as laid out. ``order``: of the decoding rows and then the chunks of one token."""
    counts = np.array([len(chunk.tokens) for chunk in batch.chunks], np.int64)
    own, single = slots[len(batch.decodes) :], counts == 1
    decoding = np.concatenate((slots[: len(batch.decodes)], own[single]))[order]
    return np.concatenate((decoding, np.repeat(own[~single], counts[~single]))).astype(np.int64)


class _Device:
    """The model, the KV cache and the lanes' last tokens. One thread computes on it, step by step."""

    def __init__(self, model: LlamaModel, pages: int, lanes: int) -> None:
        config = model.config
        self._model = model
        self._cache = KvCache(config.layers, pages, config.kv_heads, config.head_dim, model.dtype, model.device)
        self._last = np.zeros(lanes, np.int64)
        self.stopped: str | None = None
        """Why no further step is computed."""

    def compute(self, work: _Work) -> StepResult:
        """Raises whatever went wrong; then no later step is computed, for it would build on this one."""
        if self.stopped is not None:
            raise RuntimeError(self.stopped)
        try:
            return self._compute(work)
        except Exception as error:
            self.stopped = f"an earlier step failed: {error!r}"
            raise

    @torch.inference_mode()
    def _compute(self, work: _Work) -> StepResult:
        began = time.perf_counter()
        if work.copies:
            self._cache.copy(work.copies)
        if work.fresh:
            self._cache.clear(work.fresh)
        work.ids[work.ahead] = self._last[work.ahead_lanes]
        attention = PagedAttention(self._cache, work.lengths, work.tables, work.chunks, self._model.dtype)
        inputs = (torch.from_numpy(work.ids), attention.positions, attention)
        if work.adapters:
            hidden = self._model.hidden(*inputs, StepAdapters(work.adapters, len(work.ids)))
        else:
            hidden = self._model.hidden(*inputs)
        drawn, values = Drawn([], [], []), None
        if len(work.outputs):
            logits = self._model.logits(hidden[torch.from_numpy(work.outputs)])
            drawn = _draw(logits, work.draws)
            values = logits[work.logits].numpy() if work.logits else None
        tokens = np.array(drawn.tokens, np.int32)
        kept = work.lanes >= 0
        # The -1 of a row that was not drawn may be an input, too: it takes the embedding's last row.
        self._last[work.lanes[kept]] = tokens[kept]
        logprobs = np.array(drawn.logprobs, np.float32)
        return StepResult(tokens, logprobs, values, drawn.sorted_rows, time.perf_counter() - began)


def _draw(logits: Tensor, draws: Draws) -> Drawn:
    """Draw every row; one that cannot be drawn gets token -1 and fails only its own call."""
    try:
        return draw_batch(logits, draws)
    except Exception:
        # Checked parameters do not get here. If some do, they fail their own call, not the process.
        log.exception("a step's draws failed; drawing its rows one by one")
    drawn = Drawn([], [], [])
    for row in range(len(logits)):
        try:
            one = draw_batch(logits[row : row + 1], taken(draws, [row]))
        except Exception:
            # Not the whole of it: a mask is a tenant's, and long.
            chosen = tuple(values[row].item() for values in (draws.temperature, draws.top_k, draws.top_p, draws.min_p))
            log.exception("a draw with (temperature, top_k, top_p, min_p) %r failed", chosen)
            one = Drawn([-1], [float("nan")], [])
        drawn.tokens.extend(one.tokens)
        drawn.logprobs.extend(one.logprobs)
        drawn.sorted_rows.extend(row for _ in one.sorted_rows)
    return drawn


class _Signal:
    """A descriptor that is readable as often as it was raised and not taken."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def raise_(self) -> None:
        os.eventfd_write(self.descriptor, 1)

    def take(self) -> None:
        if self.descriptor >= 0:
            os.eventfd_read(self.descriptor)

    def close(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        os.close(descriptor)


class _Step:
    """A step that was launched; see :class:`realm.engine.batch.Launched`."""

    def __init__(self, work: _Work, signal: _Signal | None) -> None:
        self._work: _Work | None = work
        self._signal = signal
        self._outcome: StepResult | Exception | None = None
        self._over = threading.Event()

    def compute(self, device: _Device) -> None:
        work, self._work = self._work, None
        assert work is not None
        try:
            self._outcome = device.compute(work)
        except Exception as error:
            self._outcome = error
        # In this order: who finds the descriptor readable finds the step done and a signal to take.
        if self._signal is not None:
            self._signal.raise_()
        self._over.set()

    def done(self) -> bool:
        return self._outcome is not None

    def wait(self) -> StepResult:
        self._over.wait()
        signal, self._signal = self._signal, None
        if signal is not None:
            signal.take()
        assert self._outcome is not None
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


_Queue = SimpleQueue[_Step | None]


def _compute_all(device: _Device, queue: _Queue, signal: _Signal) -> None:
    """The computing thread. It knows nothing of the runner, which ends it when it is forgotten."""
    torch.get_num_threads()  # It is settled now, whatever a loading thread sets for itself later.
    while (step := queue.get()) is not None:
        step.compute(device)
        del step  # Else its results would live until the next one.
    signal.close()


def _end(device: _Device, queue: _Queue, thread: threading.Thread) -> None:
    device.stopped = "the runner was closed"
    queue.put(None)
    if thread is not threading.current_thread():  # Where garbage is collected, nobody can say.
        thread.join()


class CpuRunner:
    """A model on the CPU; see :class:`realm.engine.batch.Runner`."""

    def __init__(
        self,
        model: LlamaModel,
        *,
        pages: int,
        lanes: int,
        threaded: bool = False,
        adapter_memory: int = ADAPTER_MEMORY,
    ) -> None:
        """``threaded``: compute in a thread of its own; otherwise :meth:`launch` computes.

        ``adapter_memory``: bytes that adapters may take.
        """
        self.config = model.config
        self.pages = pages
        self.lanes = lanes
        self.adapters = AdapterSlots(model.config, model.dtype, adapter_memory)
        self._device = _Device(model, pages, lanes)
        self._signal: _Signal | None = None
        if threaded:
            self._signal = _Signal()
            self._queue: _Queue = SimpleQueue()
            parts = (self._device, self._queue, self._signal)
            thread = threading.Thread(target=_compute_all, args=parts, name="realm-compute", daemon=True)
            thread.start()
            self._end = weakref.finalize(self, _end, self._device, self._queue, thread)

    def launch(self, batch: StepBatch) -> _Step:
        if self._signal is not None and self._end.alive:
            step = _Step(_lay_out(batch, self.adapters), self._signal)
            self._queue.put(step)
        else:
            step = _Step(_lay_out(batch, self.adapters), None)
            step.compute(self._device)
        return step

    def fileno(self) -> int:
        return -1 if self._signal is None else self._signal.descriptor

    def close(self) -> None:
        if self._signal is None:
            self._device.stopped = "the runner was closed"
        else:
            self._end()
