"""A runner without a model: tokens are hashes of what a row may read, so one wrong page, lane or parameter
gives another token. It checks every promise that the core makes to a runner, too.

The contents of a place of the KV cache are a hash of its token, its position and all that was read before
it, as a transformer's are. :func:`state_of` is what a row must see, straight from its tokens.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from realm.engine.batch import LAST_DRAWN, AdapterMemory, NoAdapterMemory, StepBatch, StepResult
from realm.engine.core import EngineCore
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.sampling import draw
from realm.engine.scheduler import Scheduler
from realm.guests import draws
from realm.messages import ForwardDone, SamplingParams
from realm.models.config import ModelConfig

VOCAB = 1000
CONTEXT = 160
_MASK = (1 << 64) - 1
_WEIGHTS = [draws.mix(position) | 1 for position in range(CONTEXT)]
_WEIGHT_ROW = np.array(_WEIGHTS, dtype=np.uint64)

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=16,
    layers=1,
    heads=1,
    kv_heads=1,
    head_dim=16,
    context_length=CONTEXT,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    bos=1,
    eos=frozenset({2}),
)


# --- what the tokens must be ----------------------------------------------------------------------------


def _extend(seen: int, token: int, position: int, adapter: int) -> tuple[int, int]:
    """Contents of one more place, and the sum over all places with it."""
    contents = draws.mix((seen + token * 0x9E3779B1 + position + adapter * 0xC2B2AE3D27D4EB4F) & _MASK) | 1
    return contents, (seen + contents * _WEIGHTS[position]) & _MASK


def state_of(tokens: Iterable[int], adapter: int = 0) -> int:
    """What the row of the last of a sequence's ``tokens`` has to see; ``adapter``: its contents, 0 is none."""
    seen = 0
    for position, token in enumerate(tokens):
        _, seen = _extend(seen, token, position, adapter)
    return seen


def logits_of(state: int) -> npt.NDArray[np.float32]:
    """Logits float32 [VOCAB]."""
    return np.random.default_rng(state).normal(size=VOCAB).astype(np.float32)


def choose(
    state: int, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float, mask: bytes | None
) -> int:
    """The token that is drawn: every parameter that matters changes it."""
    text = struct.pack("<Q", state)
    if temperature > 0:
        top_k = 0 if top_k >= VOCAB else top_k
        text += struct.pack("<fIffd", temperature, top_k, top_p, min_p, uniform)
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    if mask is None:
        return number % VOCAB
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[:VOCAB])
    return int(allowed[number % len(allowed)])


def logprob_of(state: int, token: int) -> float:
    return float(np.float32(-((state + token) % 4096) / 64))


def check_result(tokens: list[int], p: SamplingParams | None, result: ForwardDone, adapter: int = 0) -> None:
    """Raises AssertionError unless this is what a call of a sequence that now has ``tokens`` must give."""
    state = state_of(tokens, adapter)
    if result.logits is not None:
        assert result.logits == logits_of(state).tobytes(), "another position's logits"
    if p is None:
        assert result.token == -1
    elif p.repetition_penalty != 1 or p.bias_tokens is not None:
        drawn = draw(torch.from_numpy(logits_of(state))[None], [p], [np.array(tokens, dtype=np.uint32)])
        assert result.token == drawn.tokens[0]
        assert math.isnan(result.logprob) != p.logprob
    else:
        uniform = p.uniform if p.number < 0 else draws.uniform(p.key, p.number)
        token = choose(state, p.temperature, p.top_k, p.top_p, p.min_p, uniform, p.mask)
        assert result.token == token, "a token of another context or other parameters"
        assert result.logprob == logprob_of(state, token) if p.logprob else math.isnan(result.logprob)


# --- the runner -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One sequence's part: ``tokens`` at ``start ..``, or :data:`LAST_DRAWN` of ``lane``. ``slot``: its adapter's."""

    tokens: list[int]
    start: int
    pages: list[int]
    lane: int
    draws: bool
    slot: int = -1


class _Step:
    def __init__(self, runner: CheckedRunner, number: int) -> None:
        self._runner, self._number = runner, number

    def done(self) -> bool:
        return self._runner.executed > self._number

    def wait(self) -> StepResult:
        self._runner.execute(self._number + 1 - self._runner.executed)
        return self._runner.results.pop(self._number)


@dataclass(frozen=True, slots=True)
class FakeWeights:
    """In place of an adapter's weights: what they are is a number. ``nbytes``: their size."""

    contents: int
    nbytes: int
    rank: int = 4


class CheckedMemory:
    """Memory for adapters. What a slot holds changes at once, also for rows that are launched and not computed:
    those must be nobody's."""

    dtype = torch.float32

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.contents = [0] * slots
        self._ranges: dict[int, tuple[int, int]] = {}

    def put(self, slot: int, at: int, weights: FakeWeights) -> None:
        assert 0 <= slot < self.slots and at % 256 == 0 and 0 <= at <= self.capacity - weights.nbytes
        self.contents[slot] = weights.contents
        self._ranges[slot] = (at, at + weights.nbytes)
        for other, (start, end) in self._ranges.items():
            if other != slot and start < at + weights.nbytes and at < end:
                # Overwritten: whoever computes with it now computes nonsense.
                self.contents[other] = 0xBAD


class CheckedRunner:
    """Steps are computed in the order of their launches, when somebody waits or :meth:`execute` says so.

    Attributes:
        executed, launched: numbers of steps. computed: tokens computed so far.
        undrawable: states for which no token can be drawn (the row's token is then -1).
    """

    def __init__(self, pages: int, lanes: int, memory: CheckedMemory | None = None) -> None:
        self.config = CONFIG
        self.adapters: AdapterMemory = memory or NoAdapterMemory(torch.float32)
        self.pages, self.lanes = pages, lanes
        self.executed = self.launched = self.computed = 0
        self.results: dict[int, StepResult] = {}
        self.undrawable: Callable[[int], bool] = lambda state: False
        self.closed = False
        self._queue: deque[tuple[StepBatch, list[_Row]]] = deque()
        # 0 is a place that nothing was written to since it was cleared.
        self._cache = np.zeros((pages, PAGE_SIZE), dtype=np.uint64)
        self._last = [0] * lanes

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True

    def launch(self, batch: StepBatch) -> _Step:
        assert not self.closed
        rows = self._rows(batch)
        assert rows, "a step without rows"
        self._check_draws(batch)
        self._check_pages(batch, rows)
        # The core may use its arrays again: what a step needs is copied now.
        d = batch.draws
        kept = type(d)(
            *(array.copy() for array in (d.temperature, d.top_k, d.top_p, d.min_p, d.uniform, d.logprob)),
            list(d.masks),
        )
        copy = StepBatch(batch.decodes, [], kept, list(batch.logits), list(batch.copies), list(batch.fresh))
        self._queue.append((copy, rows))
        self.launched += 1
        assert self.launched - self.executed <= 8, "more steps in flight than anybody needs"
        return _Step(self, self.launched - 1)

    def execute(self, count: int = 1) -> None:
        """Compute the next ``count`` steps that were launched."""
        for _ in range(min(count, len(self._queue))):
            batch, rows = self._queue.popleft()
            self.results[self.executed] = self._execute(batch, rows)
            self.executed += 1

    # --- the core's promises --------------------------------------------------------------------------

    def _rows(self, batch: StepBatch) -> list[_Row]:
        decodes = batch.decodes
        for array in (decodes.lanes, decodes.tokens, decodes.positions):
            assert array.shape == (len(decodes),) and array.dtype == np.int32
        assert decodes.tables.dtype == np.int32
        rows = []
        for lane, token, position in zip(
            decodes.lanes.tolist(), decodes.tokens.tolist(), decodes.positions.tolist(), strict=True
        ):
            assert 0 <= lane < self.lanes and (token == LAST_DRAWN or 0 <= token < VOCAB)
            pages = decodes.tables[lane, : position // PAGE_SIZE + 1].tolist()
            rows.append(_Row([token], position, pages, lane, True))
        if rows:
            assert decodes.longest == max(row.start for row in rows) + 1
        for chunk in batch.chunks:
            assert chunk.tokens.dtype == np.uint32 and len(chunk.tokens) > 0 and int(chunk.tokens.max()) < VOCAB
            assert -1 <= chunk.lane < self.lanes and (chunk.draws or chunk.lane < 0)
            rows.append(_Row(chunk.tokens.tolist(), chunk.start, list(chunk.pages), chunk.lane, chunk.draws))
        if batch.adapters is not None:
            assert batch.adapters.dtype == np.int32 and batch.adapters.shape == (len(rows),)
            assert (batch.adapters >= 0).any(), "a step without adapters that is not a plain one"
            for row, slot in zip(rows, batch.adapters.tolist(), strict=True):
                assert -1 <= slot < self.adapters.slots
                row.slot = slot
        lanes = [row.lane for row in rows if row.lane >= 0]
        assert len(set(lanes)) == len(lanes), "two rows of a step in one lane"
        assert batch.outputs == sum(row.draws for row in rows)
        return rows

    def _check_draws(self, batch: StepBatch) -> None:
        d, count = batch.draws, batch.outputs
        kinds = [np.float32, np.int32, np.float32, np.float32, np.float64, np.bool_]
        arrays = [d.temperature, d.top_k, d.top_p, d.min_p, d.uniform, d.logprob]
        for array, kind in zip(arrays, kinds, strict=True):
            assert array.shape == (count,) and array.dtype == kind
        assert ((d.uniform >= 0) & (d.uniform < 1)).all() and (d.temperature >= 0).all()
        masked = [row for row, _ in d.masks]
        assert len(set(masked)) == len(masked) and all(0 <= row < count for row in masked)
        assert all(len(mask) * 8 >= VOCAB for _, mask in d.masks)
        assert batch.logits == sorted(set(batch.logits)) and all(0 <= row < count for row in batch.logits)

    def _check_pages(self, batch: StepBatch, rows: list[_Row]) -> None:
        targets = [target for _, target in batch.copies]
        assert len(set(targets)) == len(targets)
        assert len(set(batch.fresh)) == len(batch.fresh) and not set(batch.fresh) & set(targets)
        used = [page for pair in batch.copies for page in pair] + batch.fresh
        written: dict[tuple[int, int], int] = {}
        for index, row in enumerate(rows):
            end = row.start + len(row.tokens)
            assert row.start >= 0 and end <= CONTEXT and len(row.pages) * PAGE_SIZE >= end
            used += row.pages
            for position in range(row.start, end):
                place = (row.pages[position // PAGE_SIZE], position % PAGE_SIZE)
                assert written.setdefault(place, index) == index, "two sequences write to one place"
        assert all(0 <= page < self.pages for page in used)
        for index, row in enumerate(rows):
            for position in range(row.start):
                place = (row.pages[position // PAGE_SIZE], position % PAGE_SIZE)
                assert written.get(place, index) == index, "a sequence reads what another writes in the same step"

    # --- computing ------------------------------------------------------------------------------------

    def _execute(self, batch: StepBatch, rows: list[_Row]) -> StepResult:
        if batch.copies:
            # All are read before any is written: a page may be copied away and written anew in one step.
            sources, targets = zip(*batch.copies, strict=True)
            self._cache[list(targets)] = self._cache[list(sources)]
        self._cache[batch.fresh] = 0
        tokens: list[int] = []
        logprobs: list[float] = []
        logits = []
        masks = dict(batch.draws.masks)
        drawn: dict[int, int] = {}
        for row in rows:
            state = self._forward(row)
            if not row.draws:
                continue
            at = len(tokens)
            d = batch.draws
            values = [array[at].item() for array in (d.temperature, d.top_k, d.top_p, d.min_p, d.uniform)]
            token = -1 if self.undrawable(state) else choose(state, *values, masks.get(at))
            if row.lane >= 0:
                drawn[row.lane] = token
            tokens.append(token)
            logprobs.append(logprob_of(state, token) if d.logprob[at] else float("nan"))
            if at in batch.logits:
                logits.append(logits_of(state))
        for lane, token in drawn.items():
            self._last[lane] = token
        return StepResult(
            np.array(tokens, dtype=np.int32),
            np.array(logprobs, dtype=np.float32),
            np.stack(logits) if logits else None,
            seconds=0.001,
        )

    def _forward(self, row: _Row) -> int:
        """Write the row's places; returns its last state. What it reads must have been written."""
        count = -(-(row.start + len(row.tokens)) // PAGE_SIZE)
        past = self._cache[row.pages[:count]].reshape(-1)[: row.start]
        # A token of a failed draw has no right contents, but nobody is to see what follows from it either.
        assert past.all(), "a row reads a place that was cleared and not written"
        seen = int((past * _WEIGHT_ROW[: row.start]).sum(dtype=np.uint64))
        memory = self.adapters
        adapter = memory.contents[row.slot] if isinstance(memory, CheckedMemory) and row.slot >= 0 else 0
        for position, token in enumerate(row.tokens, row.start):
            known = self._last[row.lane] if token == LAST_DRAWN else token
            contents, seen = _extend(seen, known, position, adapter)
            self._cache[row.pages[position // PAGE_SIZE], position % PAGE_SIZE] = contents
            self.computed += 1
        return seen


def checked_engine(
    *,
    pages: int = 64,
    lanes: int = 8,
    budget: int = 64,
    run_ahead: int = 0,
    clock: Callable[[], float] = time.monotonic,
    memory: CheckedMemory | None = None,
) -> tuple[EngineCore, CheckedRunner]:
    """An engine on a checked runner. ``lanes``: most sequences a step. ``memory``: for adapters."""
    runner = CheckedRunner(pages, 2 * lanes, memory)
    scheduler = Scheduler(pages, token_budget=budget, max_sequences=lanes)
    return EngineCore("checked", runner, scheduler, clock=clock, run_ahead=run_ahead), runner
