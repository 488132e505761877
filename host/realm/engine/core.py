"""The engine as a polled object: operations in, steps, results out. No sockets, no threads.

:meth:`EngineCore.step` is the whole loop in five lines: plan, run, draw, commit, answer.
"""

from __future__ import annotations

import secrets
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from realm.engine.kv_cache import PAGE_SIZE, root_key
from realm.engine.runner import ModelRunner
from realm.engine.sampling import draw
from realm.engine.scheduler import Part, Scheduler
from realm.engine.sequence import Call, Sequence
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
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
    OpenSaved,
    OpenSequence,
    SaveSequence,
    TenantStats,
    TruncateSequence,
)
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import Progress, load_weights

MAX_SAVED_PER_TENANT = 64
"""Saved sequences a tenant may hold; their pages can be taken at any time, their tokens stay."""


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

    Operations that name an unknown sequence come only from a defective worker (workers check their
    guests' handles), so they fail that call or are dropped; they never raise.
    """

    def __init__(self, name: str, runner: ModelRunner, scheduler: Scheduler) -> None:
        self.name = name
        self.config = runner.model.config
        self.scheduler = scheduler
        self._runner = runner
        self._sequences: dict[int, Sequence] = {}
        self._by_run: dict[int, dict[int, Sequence]] = {}
        self._saved: dict[tuple[str, str], Sequence] = {}
        self._saved_ids = -1
        self._salts: dict[str, bytes] = {}
        self._results: dict[int, list[EngineResult]] = {}
        self._order = 0
        self._tenants: dict[str, TenantStats] = {}
        self.steps = 0
        self._step_sequences = 0
        self._max_step = 0
        self._shared_steps = 0
        self._busy = 0.0

    # --- operations -----------------------------------------------------------------------------

    def submit(self, worker: int, ops: list[EngineOp]) -> None:
        """Apply a worker's operations in order. Results come from :meth:`step`."""
        for op in ops:
            match op:
                case Forward():
                    self._forward(worker, op)
                case OpenSequence():
                    self._open(op.seq, worker, op.tenant, op.run)
                case ForkSequence():
                    parent = self._own(worker, op.parent)
                    if parent is not None and op.child not in self._sequences:
                        child = self._new(op.child, worker, parent.tenant, parent.run)
                        self.scheduler.fork(parent, child)
                        self._register(child)
                case TruncateSequence():
                    sequence = self._own(worker, op.seq)
                    if sequence is not None and sequence.call is None and op.length >= 0:
                        self.scheduler.truncate(sequence, op.length)
                case FreeSequence():
                    sequence = self._own(worker, op.seq)
                    if sequence is not None:
                        self._drop(sequence)
                case EndRun():
                    for sequence in list(self._by_run.get(op.run, {}).values()):
                        if sequence.worker == worker:
                            self._drop(sequence)
                case SaveSequence():
                    self._save(worker, op)
                case OpenSaved():
                    self._open_saved(worker, op)

    def _own(self, worker: int, seq: int) -> Sequence | None:
        sequence = self._sequences.get(seq)
        return sequence if sequence is not None and sequence.worker == worker else None

    def _new(self, seq: int, worker: int, tenant: str, run: int) -> Sequence:
        self._order += 1
        salt = self._salts.setdefault(tenant, secrets.token_bytes(32))
        return Sequence(seq, worker, tenant, run, self._order, root_key(salt, self.name, ""))

    def _register(self, sequence: Sequence) -> None:
        self._sequences[sequence.id] = sequence
        self._by_run.setdefault(sequence.run, {})[sequence.id] = sequence

    def _open(self, seq: int, worker: int, tenant: str, run: int) -> Sequence | None:
        if seq in self._sequences:
            return None
        sequence = self._new(seq, worker, tenant, run)
        self.scheduler.add(sequence)
        self._register(sequence)
        return sequence

    def _drop(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self._sequences[sequence.id]
        of_run = self._by_run[sequence.run]
        del of_run[sequence.id]
        if not of_run:
            del self._by_run[sequence.run]

    def drop_worker(self, worker: int) -> None:
        """A worker died: forget its sequences and calls."""
        for sequence in [s for s in self._sequences.values() if s.worker == worker]:
            self._drop(sequence)
        self._results.pop(worker, None)

    def _answer(self, worker: int, result: EngineResult) -> None:
        self._results.setdefault(worker, []).append(result)

    def _fail(self, worker: int, call: int, code: ErrorCode, message: str) -> None:
        self._answer(worker, CallFailed(call, int(code), message))

    def _forward(self, worker: int, op: Forward) -> None:
        sequence = self._own(worker, op.seq)
        if sequence is None or sequence.call is not None:
            self._fail(worker, op.call, ErrorCode.BAD_HANDLE, "no such sequence, or it has a call pending")
            return
        tokens = array("I")
        if not op.tokens or len(op.tokens) % 4:
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, "tokens are not whole uint32 values")
            return
        tokens.frombytes(op.tokens)
        if max(tokens) >= self.config.vocab_size:
            message = f"token {max(tokens)} is not below the vocabulary's size {self.config.vocab_size}"
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, message)
            return
        length = len(sequence.tokens) + len(tokens)
        if length > self.config.context_length:
            message = f"the sequence would have {length:,} tokens; the context is {self.config.context_length:,}"
            self._fail(worker, op.call, ErrorCode.CONTEXT_FULL, message)
            return
        if not self.scheduler.fits(length):
            total = self.scheduler.pool.total * PAGE_SIZE
            message = f"the sequence would have {length:,} tokens; the KV cache holds {total:,}"
            self._fail(worker, op.call, ErrorCode.OUT_OF_MEMORY, message)
            return
        sampling = op.sampling
        if sampling is not None and sampling.mask is not None and not self._allows_any(sampling.mask):
            self._fail(worker, op.call, ErrorCode.INVALID_ARGUMENT, "the mask allows no token")
            return
        sequence.tokens.extend(tokens)
        self._order += 1
        self.scheduler.submit(sequence, Call(op.call, self._order, len(tokens), sampling, op.want_logits))

    def _allows_any(self, mask: bytes) -> bool:
        vocab = self.config.vocab_size
        if len(mask) * 8 < vocab:
            return False
        return int.from_bytes(mask, "little") & ((1 << vocab) - 1) != 0

    def _save(self, worker: int, op: SaveSequence) -> None:
        sequence = self._own(worker, op.seq)
        if sequence is None or sequence.call is not None:
            self._fail(worker, op.call, ErrorCode.BAD_HANDLE, "no such sequence")
            return
        key = (sequence.tenant, op.name)
        mine = sum(tenant == sequence.tenant for tenant, _ in self._saved)
        if key not in self._saved and mine >= MAX_SAVED_PER_TENANT:
            message = f"the tenant has {mine} saved sequences, which is the most"
            self._fail(worker, op.call, ErrorCode.LIMIT, message)
            return
        if (old := self._saved.pop(key, None)) is not None:
            self.scheduler.remove(old)
        self._saved_ids -= 1
        # Saved copies belong to no run and no worker; they live until replaced or the engine ends.
        copy = self._new(self._saved_ids, -1, sequence.tenant, -1)
        self.scheduler.fork(sequence, copy)
        self._saved[key] = copy
        self._answer(worker, CallDone(op.call, len(copy.tokens)))

    def _open_saved(self, worker: int, op: OpenSaved) -> None:
        saved = self._saved.get((op.tenant, op.name))
        if saved is None or op.seq in self._sequences:
            self._fail(worker, op.call, ErrorCode.NOT_FOUND, f"the tenant has no saved sequence {op.name!r}")
            return
        sequence = self._new(op.seq, worker, op.tenant, op.run)
        self.scheduler.fork(saved, sequence)
        self._register(sequence)
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
        drawing = [part for part in wanting if part.sequence.call and part.sequence.call.sampling]
        tokens: dict[int, tuple[int, float]] = {}
        if drawing and logits is not None:
            params = [part.sequence.call.sampling for part in drawing if part.sequence.call]
            history = [
                np.frombuffer(part.sequence.tokens, dtype=np.uint32).copy() if p and p.repetition_penalty != 1 else None
                for part, p in zip(drawing, params, strict=True)
            ]
            rows = logits
            if len(drawing) < len(wanting):
                rows = logits[[row_of[part.sequence.id] for part in drawing]]
            drawn = draw(rows, [p for p in params if p is not None], history)
            for part, token, logprob in zip(drawing, drawn.tokens, drawn.logprobs, strict=True):
                tokens[part.sequence.id] = (token, logprob)
        for part in finished:
            sequence = part.sequence
            call = sequence.call
            assert call is not None
            sequence.call = None
            token, logprob = tokens.get(sequence.id, (-1, float("nan")))
            values = None
            if call.want_logits and logits is not None:
                values = logits[row_of[sequence.id]].contiguous().numpy().tobytes()
            self._answer(sequence.worker, ForwardDone(call.number, token, logprob, call.cached, values))
            self._tenant(sequence.tenant).cached_tokens += call.cached

    def _tenant(self, tenant: str) -> TenantStats:
        return self._tenants.setdefault(tenant, TenantStats())

    def _count(self, parts: list[Part]) -> None:
        self.steps += 1
        self._step_sequences += len(parts)
        self._max_step = max(self._max_step, len(parts))
        self._shared_steps += len({part.sequence.tenant for part in parts}) > 1
        for part in parts:
            tenant = self._tenant(part.sequence.tenant)
            if part.count == 1:
                tenant.decode_tokens += 1
            else:
                tenant.prefill_tokens += part.count

    # --- facts ----------------------------------------------------------------------------------

    def stats(self, call: int = 0) -> EngineStats:
        """Counters since the start; see :class:`realm.messages.EngineStats`."""
        for stats in self._tenants.values():
            stats.pages = stats.sequences = 0
        for sequence in self.scheduler.sequences:
            stats = self._tenant(sequence.tenant)
            stats.pages += len(sequence.pages)
            stats.sequences += 1
        pool = self.scheduler.pool
        tenants = self._tenants
        return EngineStats(
            call=call,
            model=self.name,
            steps=self.steps,
            sequences=self._step_sequences,
            max_sequences=self._max_step,
            shared_steps=self._shared_steps,
            prefill_tokens=sum(t.prefill_tokens for t in tenants.values()),
            decode_tokens=sum(t.decode_tokens for t in tenants.values()),
            cached_tokens=sum(t.cached_tokens for t in tenants.values()),
            preemptions=self.scheduler.preemptions,
            busy_seconds=self._busy,
            pages_total=pool.total,
            pages_free=pool.free,
            pages_used=pool.used,
            pages_cached=pool.cached,
            tenants=tenants,
        )

    def check(self) -> None:
        """Verify the page accounting. Raises AssertionError."""
        self.scheduler.check()


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
    folder: Path, options: EngineOptions | None = None, *, name: str | None = None, progress: Progress | None = None
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
    return EngineCore(name or folder.name, ModelRunner(model, pages), scheduler)
