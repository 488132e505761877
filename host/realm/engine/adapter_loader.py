"""The thread that reads adapters from disk and brings them into a runner's memory, beside the steps.

One job at a time: :class:`realm.engine.adapters.Adapters` chooses the next by who waits. What is done is told
through a descriptor, so that an engine that has nothing else to do can sleep until then.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import TypeAlias

import torch

from realm.adapters.peft import parse_config
from realm.adapters.weights import AdapterWeights, load_adapter, packed_bytes
from realm.engine.adapter_memory import ALIGNMENT
from realm.engine.batch import AdapterMemory
from realm.errors import RealmError
from realm.models.config import ModelConfig

Job: TypeAlias = Callable[[], AdapterWeights | None]
Outcome: TypeAlias = AdapterWeights | Exception | None
"""What a job gave: weights (read), nothing (put), or why it failed."""

_HASH_CHUNK = 1 << 20

REST_SECONDS = 0.0003
"""How long the thread rests after each tensor. Reading is Python's work, some 50 us a tensor, and holds the engine's
thread up wherever that gives the interpreter away. A turn of 0.23 ms that does so 40 times took up to 1.2 ms beside a
load without rests, and 0.5 with them; a load of 128 tensors takes 62 rather than 21 ms then."""


def read_adapter(
    path: str, sha256: str, config: bytes, model: ModelConfig, dtype: torch.dtype, most: int
) -> AdapterWeights:
    """An adapter from its file, whose content must have this SHA-256 (hex).

    Raises:
        RealmError: ``adapter_invalid``, ``adapter_not_found`` where the file is not there or is another, or
            ``adapter_too_large`` where its weights take more than ``most`` bytes: then they are not read.
    """
    file = Path(path)
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise RealmError("adapter_not_found", "its file is gone: it was removed or replaced") from error
    if digest.hexdigest() != sha256:
        raise RealmError("adapter_not_found", "its file does not hold what was stored: add the adapter again")
    parsed = parse_config(config)
    # Ranks that differ within a layer make the weights larger than their file.
    size = packed_bytes(file, parsed, model, dtype)
    if size > most:
        message = (
            f"it takes {size:,} bytes, and all adapters together may take {most:,}: "
            "the operator can raise --adapter-memory"
        )
        raise RealmError("adapter_too_large", message)
    return load_adapter(file, parsed, model, dtype, _rest)


def _rest() -> None:
    time.sleep(REST_SECONDS)


def _work(jobs: SimpleQueue[Job | None], done: deque[Outcome], wake: int) -> None:
    """The thread. It knows nothing of the loader, which ends it when it is forgotten."""
    # A second thread with a pool of threads would keep all of them from waiting by spinning: steps of the CPU
    # runner then take half as long again.
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        outcome: Outcome
        try:
            outcome = job()
        except Exception as error:
            outcome = error
        del job
        done.append(outcome)
        os.eventfd_write(wake, 1)
        del outcome


def _end(jobs: SimpleQueue[Job | None], thread: threading.Thread, wake: int) -> None:
    jobs.put(None)
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()
    os.close(wake)


class AdapterLoader:
    """Carries out jobs in a thread of its own, which starts with the first one.

    Attributes:
        busy: whether a job was given whose outcome has not been taken.
    """

    def __init__(self, memory: AdapterMemory, model: ModelConfig) -> None:
        self._memory = memory
        self._model = model
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._done: deque[Outcome] = deque()
        self.busy = False
        # Outcomes that were taken before their wake came.
        self._early = 0
        parts = (self._jobs, self._done, self._wake)
        self._thread = threading.Thread(target=_work, args=parts, name="realm-adapters", daemon=True)
        self._end = weakref.finalize(self, _end, self._jobs, self._thread, self._wake)

    def fileno(self) -> int:
        """A descriptor that is readable while an outcome waits to be taken."""
        return self._wake

    def read(self, path: str, sha256: str, config: bytes) -> None:
        """Begin to read an adapter; see :func:`read_adapter`. No other job may be under way."""
        model, dtype = self._model, self._memory.dtype
        most = self._memory.capacity // ALIGNMENT * ALIGNMENT
        self._begin(lambda: read_adapter(path, sha256, config, model, dtype, most))

    def put(self, slot: int, at: int, weights: AdapterWeights) -> None:
        """Begin to bring an adapter into the runner's memory. No other job may be under way."""
        memory = self._memory

        def job() -> None:
            memory.put(slot, at, weights)

        self._begin(job)

    def _begin(self, job: Job) -> None:
        assert not self.busy
        self.busy = True
        if self._thread.ident is None:
            self._thread.start()
        self._jobs.put(job)

    def take(self) -> tuple[Outcome] | None:
        """The outcome of the job under way, if it is done."""
        if self._early:
            self._sleep()
        if not self._done:
            return None
        outcome = self._done.popleft()
        self._early += 1
        self._sleep()
        self.busy = False
        return (outcome,)

    def _sleep(self) -> None:
        """Take the wakes that have come. One that came later and was left would never let the engine sleep."""
        with contextlib.suppress(BlockingIOError):
            self._early -= os.eventfd_read(self._wake)

    def close(self) -> None:
        """End the thread, after the job it has begun. Idempotent."""
        self._end()
