"""The engine as a polled object: operations in, steps, results out. No sockets, no threads.

:meth:`EngineCore.step` is the whole loop in five lines: plan, run, draw, commit, answer.
"""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from realm.engine.checking import sampling_fault
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runner import ModelRunner
from realm.engine.sampling import draw
from realm.engine.scheduler import Part, Scheduler
from realm.engine.sequence import BYTES_PER_PAGE, Call, Sequence, Tenant
from realm.engine.tenants import MAX_NAME, Tenants
from realm.engine.workers import Workers
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.limits import LIMITS
from realm.messages import (
    CallDone,
    CallFailed,
    EndRun,
    EngineOp,
    EngineResult,
    EngineStats,
    ForkSequence,
    Forward,
    ForwardDone,
    FreeSequence,
    LimitMet,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TenantQuota,
    TruncateSequence,
)
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import Progress, load_weights

log = logging.getLogger("realm.engine")


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        dtype: ``bfloat16`` for speed, ``float32`` for exactness.
        pages: KV pages of 16 tokens; 0 sizes the pool from free memory (:func:`default_pages`).
        token_budget: most tokens a step; bounds how long a step of prompts stalls decoding.
        max_sequences: most sequences a step.
        threads: torch threads; 0 leaves torch's default.
    """

    dtype: str = "bfloat16"
    pages: int = 0
    token_budget: int = 512
    max_sequences: int = 256
    threads: int = 0


class EngineCore:
    """Sequences, their pending calls and the model. One thread owns it.

    A worker that was taken over may send anything (:mod:`realm.engine.workers` says what it reaches).
    A wrong operation fails its call or is dropped; none raises, or costs more than its tenant's share
    of pages, tokens and memory.
    """

    def __init__(
        self, name: str, runner: ModelRunner, scheduler: Scheduler, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``clock``: seconds, for rates; its zero does not matter."""
        self.name = name
        self.config = runner.model.config
        self.scheduler = scheduler
        self.tenants = Tenants(name)
        scheduler.clock = clock
        self._clock = clock
        self._runner = runner
        self._workers = Workers(scheduler, self.tenants)
        self._results: dict[int, list[EngineResult]] = {}
        self._order = 0
        self.steps = 0
        self._step_sequences = 0
        self._max_step = 0
        self._shared_steps = 0
        self._busy = 0.0

    # --- operations -----------------------------------------------------------------------------

    def submit(self, worker: int, ops: Iterable[EngineOp]) -> None:
        """Apply a worker's operations in order. Results come from :meth:`step`."""
        workers = self._workers
        sequences = workers.of(worker).sequences
        now = self._clock()
        for op in ops:
            match op:
                case Forward():
                    self._forward(worker, sequences.get(op.seq), op, now)
                case OpenSequence():
                    workers.open(worker, op.seq, op.tenant, op.run)
                case ForkSequence():
                    workers.fork(worker, op.parent, op.child)
                case TruncateSequence():
                    sequence = sequences.get(op.seq)
                    if sequence is not None and sequence.call is None and op.length >= 0:
                        self.scheduler.truncate(sequence, op.length)
                case FreeSequence():
                    workers.free(worker, op.seq)
                case EndRun():
                    workers.end_run(worker, op.run)
                case SaveSequence():
                    self._save(worker, sequences.get(op.seq), op)
                case OpenSaved():
                    self._open_saved(worker, op)

    def set_quota(self, quota: TenantQuota) -> None:
        """Set what a tenant may take from now on. Pending calls that can no longer fit fail."""
        for tenant in self.tenants.set_quota(quota, self._clock()):
            for sequence in [*tenant.decodes.values(), *tenant.prompts.values()]:
                met = tenant.over_pages(-(-len(sequence.tokens) // PAGE_SIZE))
                if met is not None and (call := sequence.call) is not None:
                    self.scheduler.cancel(sequence)
                    self._take_back(sequence, call)
                    self._fail_limit(sequence.worker, call.number, met)

    def drop_worker(self, worker: int) -> None:
        """A worker died: forget its sequences and calls."""
        self._workers.drop(worker)
        self._results.pop(worker, None)

    def _take_back(self, sequence: Sequence, call: Call) -> None:
        """A call that fails leaves its sequence as it was before."""
        self.scheduler.truncate(sequence, len(sequence.tokens) - call.count)

    def _answer(self, worker: int, result: EngineResult) -> None:
        self._results.setdefault(worker, []).append(result)

    def _fail(self, worker: int, call: int, code: ErrorCode, message: str) -> None:
        self._answer(worker, CallFailed(call, int(code), message))

    def _fail_limit(self, worker: int, call: int, met: LimitMet, text: str = "") -> None:
        unit = LIMITS[met.name].unit
        message = text or f"{met.name} of the tenant is {met.limit:,} {unit}, used {met.used:,}"
        self._answer(worker, CallFailed(call, int(ErrorCode.LIMIT), message, met))

    def _no_sequence(self, worker: int, call: int, seq: int) -> None:
        """Answer a call on a sequence that is not there, or busy, or was refused when it was opened."""
        refusal = self._workers.refusal(worker, seq)
        if refusal is None:
            message = "no such sequence, or it has a call pending"
            self._fail(worker, call, ErrorCode.BAD_HANDLE, message)
        else:
            self._fail_memory(worker, call, *refusal)

    def _fail_memory(self, worker: int, call: int, tenant: Tenant, code: ErrorCode) -> None:
        if code is not ErrorCode.LIMIT:
            message = "the engine holds as many sequences and tokens as it can; try again when other runs have ended"
            self._fail(worker, call, code, message)
            return
        limit = tenant.quota.kv_pages
        room = limit * BYTES_PER_PAGE
        text = f"the tenant's sequences and their tokens fill the {room:,} bytes that come with kv_pages"
        self._fail_limit(worker, call, LimitMet("kv_pages", limit, -(-tenant.bytes // BYTES_PER_PAGE)), text)

    def _forward(self, worker: int, sequence: Sequence | None, op: Forward, now: float) -> None:
        if sequence is None or sequence.call is not None:
            self._no_sequence(worker, op.call, op.seq)
            return
        tokens = array("I")
        if not op.tokens or len(op.tokens) % 4:
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, "tokens are not whole uint32 values")
            return
        tenant, count = sequence.tenant, len(op.tokens) // 4
        length = len(sequence.tokens) + count
        if length > self.config.context_length:
            message = f"the sequence would have {length:,} tokens; the context is {self.config.context_length:,}"
            self._fail(worker, op.call, ErrorCode.CONTEXT_FULL, message)
            return
        tokens.frombytes(op.tokens)
        highest = tokens[0] if count == 1 else int(np.frombuffer(op.tokens, dtype="<u4").max())
        if highest >= self.config.vocab_size:
            message = f"token {highest} is not below the vocabulary's size {self.config.vocab_size}"
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, message)
            return
        if op.sampling is not None and (fault := sampling_fault(op.sampling, self.config.vocab_size)) is not None:
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, fault)
            return
        pages = -(-length // PAGE_SIZE)
        if pages > self.scheduler.pool.total:
            total = self.scheduler.pool.total * PAGE_SIZE
            message = f"the sequence would have {length:,} tokens; the KV cache holds {total:,}"
            self._fail(worker, op.call, ErrorCode.OUT_OF_MEMORY, message)
            return
        if (met := tenant.over_pages(pages) or tenant.over_rate(now)) is not None:
            self._fail_limit(worker, op.call, met)
            return
        call = Call(op.call, self._order, count, op.sampling, op.want_logits)
        if (lack := self._workers.lacks_memory(tenant, 0, count + call.weight)) is not None:
            self._fail_memory(worker, op.call, tenant, lack)
            return
        sequence.tokens.extend(tokens)
        tenant.spend(count, now)
        self._order += 1
        self.scheduler.submit(sequence, call)

    def _save(self, worker: int, sequence: Sequence | None, op: SaveSequence) -> None:
        if sequence is None or sequence.call is not None:
            self._no_sequence(worker, op.call, op.seq)
            return
        if len(op.name) > MAX_NAME:
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, f"the name is longer than {MAX_NAME} characters")
            return
        tenant = sequence.tenant
        limit = tenant.quota.saved_sequences
        if len(tenant.saved) - (op.name in tenant.saved) >= limit:
            self._fail_limit(worker, op.call, LimitMet("saved_sequences", limit, len(tenant.saved)))
        elif (lack := self._workers.lacks_memory(tenant, 1, len(sequence.tokens))) is not None:
            # If refused, the old copy of that name stays: so it counts beside the new one.
            self._fail_memory(worker, op.call, tenant, lack)
        else:
            self._answer(worker, CallDone(op.call, len(self._workers.save(sequence, op.name).tokens)))

    def _open_saved(self, worker: int, op: OpenSaved) -> None:
        tenant = self.tenants.find(op.tenant)
        saved = None if tenant is None else tenant.saved.get(op.name)
        if saved is None:
            name = op.name[:MAX_NAME]
            self._fail(worker, op.call, ErrorCode.NOT_FOUND, f"the tenant has no saved sequence {name!r}")
            return
        sequence = self._workers.open(worker, op.seq, op.tenant, op.run, saved)
        if sequence is None:
            self._no_sequence(worker, op.call, op.seq)
        else:
            self._answer(worker, CallDone(op.call, len(sequence.tokens)))

    # --- steps ----------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether :meth:`step` would compute or return something."""
        return self.scheduler.has_work() or bool(self._results)

    def step(self) -> dict[int, list[EngineResult]]:
        """One merged model pass over what is pending; returns results by worker."""
        plan = self.scheduler.plan()
        if plan.parts:
            began = time.perf_counter()
            wanting = [part for part in plan.parts if part.finishes and self._wants_logits(part)]
            logits = self._runner.run(plan, wanting)
            finished = self.scheduler.commit(plan)
            self._settle(finished, wanting, logits)
            self._busy += time.perf_counter() - began
            self._count(plan.parts)
        results, self._results = self._results, {}
        return results

    @staticmethod
    def _wants_logits(part: Part) -> bool:
        call = part.sequence.call
        return call is not None and (call.sampling is not None or call.want_logits)

    def _settle(self, finished: list[Part], wanting: list[Part], logits: torch.Tensor | None) -> None:
        row_of = {part.sequence.id: row for row, part in enumerate(wanting)}
        drawn = {} if logits is None else self._draw(wanting, logits)
        for part in finished:
            sequence = part.sequence
            call = sequence.call
            assert call is not None
            sequence.call = None
            sequence.tenant.stats.cached_tokens += call.cached
            token, logprob = drawn.get(sequence.id, (-1, float("nan")))
            if token < 0 and call.sampling is not None:
                message = "the next token could not be drawn; the engine's log says why"
                self._take_back(sequence, call)
                self._fail(sequence.worker, call.number, ErrorCode.INTERNAL, message)
                continue
            values = None
            if call.want_logits and logits is not None:
                values = logits[row_of[sequence.id]].contiguous().numpy().tobytes()
            self._answer(sequence.worker, ForwardDone(call.number, token, logprob, call.cached, values))

    def _draw(self, wanting: list[Part], logits: torch.Tensor) -> dict[int, tuple[int, float]]:
        """Token and log-probability of each sequence that samples; ``wanting`` are the rows of ``logits``."""
        rows: list[int] = []
        params: list[SamplingParams] = []
        for row, part in enumerate(wanting):
            call = part.sequence.call
            if call is not None and call.sampling is not None:
                rows.append(row)
                params.append(call.sampling)
        if not rows:
            return {}
        history = [
            np.frombuffer(wanting[row].sequence.tokens, dtype=np.uint32).copy() if p.repetition_penalty != 1 else None
            for row, p in zip(rows, params, strict=True)
        ]
        try:
            drawn = draw(logits if len(rows) == len(wanting) else logits[rows], params, history)
        except Exception:
            # Checked parameters do not get here. If some do, they fail their own call, not the process.
            log.exception("a step's draws failed; drawing its rows one by one")
            return self._draw_each(wanting, logits, rows, params, history)
        self._note_flat(wanting, rows, params, set(drawn.sorted_rows))
        pairs = zip(drawn.tokens, drawn.logprobs, strict=True)
        return {wanting[row].sequence.id: pair for row, pair in zip(rows, pairs, strict=True)}

    @staticmethod
    def _draw_each(
        wanting: list[Part],
        logits: torch.Tensor,
        rows: list[int],
        params: list[SamplingParams],
        history: list[np.ndarray | None],
    ) -> dict[int, tuple[int, float]]:
        result: dict[int, tuple[int, float]] = {}
        for at, row in enumerate(rows):
            try:
                drawn = draw(logits[row : row + 1], [params[at]], [history[at]])
            except Exception:
                # Not the whole of it: mask and biases are a tenant's, and long.
                p = params[at]
                chosen = (p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty)
                log.exception("a draw with (temperature, top_k, top_p, min_p, penalty) %r failed", chosen)
                continue
            result[wanting[row].sequence.id] = (drawn.tokens[0], drawn.logprobs[0])
        return result

    def _note_flat(self, wanting: list[Part], rows: list[int], params: list[SamplingParams], flat: set[int]) -> None:
        """Tell the scheduler which tenants' draws cost much."""
        counts: dict[Tenant, list[int]] = {}
        for at, row in enumerate(rows):
            call = wanting[row].sequence.call
            if call is not None and call.filtered:
                count = counts.setdefault(wanting[row].sequence.tenant, [0, 0])
                count[0] += 1
                count[1] += at in flat
        for tenant, (filtered, costly) in counts.items():
            self.scheduler.drawn(tenant, filtered, costly)

    def _count(self, parts: list[Part]) -> None:
        self.steps += 1
        self._step_sequences += len(parts)
        self._max_step = max(self._max_step, len(parts))
        self._shared_steps += len({part.sequence.tenant for part in parts}) > 1
        for part in parts:
            stats = part.sequence.tenant.stats
            if part.count == 1:
                stats.decode_tokens += 1
            else:
                stats.prefill_tokens += part.count

    # --- facts ----------------------------------------------------------------------------------

    def stats(self, call: int = 0) -> EngineStats:
        """Counters since the start; see :class:`realm.messages.EngineStats`."""
        tenants = self.tenants.stats(self._clock())
        every = [self.tenants.forgotten, *tenants.values()]
        pool = self.scheduler.pool
        return EngineStats(
            call=call,
            model=self.name,
            steps=self.steps,
            sequences=self._step_sequences,
            max_sequences=self._max_step,
            shared_steps=self._shared_steps,
            prefill_tokens=sum(t.prefill_tokens for t in every),
            decode_tokens=sum(t.decode_tokens for t in every),
            cached_tokens=sum(t.cached_tokens for t in every),
            preemptions=self.scheduler.preemptions,
            busy_seconds=self._busy,
            pages_total=pool.total,
            pages_free=pool.free,
            pages_used=pool.used,
            pages_cached=pool.cached,
            tenants=tenants,
        )

    def check(self) -> None:
        """Verify the accounting of pages, memory, calls and owners. Raises AssertionError."""
        self.scheduler.check()
        self._workers.check()


def page_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one KV page over all layers."""
    return PAGE_SIZE * 2 * config.kv_heads * config.head_dim * config.layers * dtype.itemsize


def default_pages(config: ModelConfig, dtype: torch.dtype, free_bytes: int) -> int:
    """A quarter of the free memory, but not more than eight full contexts need."""
    most = 8 * -(-config.context_length // PAGE_SIZE)
    return max(1, min(most, free_bytes // 4 // page_bytes(config, dtype)))


def available_memory() -> int:
    """Bytes the kernel says a new process can take (Linux ``MemAvailable``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RealmError("engine_start", "the free memory cannot be read; give --kv-pages")


def load_engine(
    folder: Path,
    options: EngineOptions | None = None,
    *,
    name: str | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> EngineCore:
    """Load a model folder and build its engine on the CPU.

    Raises:
        RealmError: ``model_invalid`` (see :func:`realm.models.loading.load_weights`) or
            ``engine_start`` when options and model do not fit.
    """
    options = options or EngineOptions()
    if options.dtype not in ("bfloat16", "float32"):
        raise RealmError("engine_start", f"dtype {options.dtype!r} is not bfloat16 or float32")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config, dtype=dtype, device=torch.device("cpu"), progress=progress)
    with torch.inference_mode():
        model = LlamaModel(config, weights)
    pages = options.pages or default_pages(config, dtype, available_memory())
    scheduler = Scheduler(pages, token_budget=options.token_budget, max_sequences=options.max_sequences)
    return EngineCore(name or folder.name, ModelRunner(model, pages), scheduler, clock=clock)
