"""Runs in progress: which worker has them, where their output goes, how far they may be ahead.

:class:`RunManager` does no I/O: workers are objects with a ``send``, a run's results go to its
:class:`Sink`. One batch of worker events is handled without a task or an allocation per run beyond
the frames themselves, since this is the way of every token.

A guest may emit ``credit`` bytes that its client has not taken. Credit is given back as output is
passed on, but not while the client's connection is behind (``Sink.behind``): then the guest waits,
and it alone.
"""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from realm.errors import RealmError
from realm.messages import (
    CancelRun,
    ClientMessage,
    Credit,
    ErrorInfo,
    GatewayToWorker,
    Log,
    Output,
    RunFinished,
    RunLimits,
    StartRun,
    StoreGet,
    StoreSet,
    Usage,
    WorkerEvent,
)
from realm.registry.records import LogLine, RunRecord
from realm.settings import GatewayLimits

RETRY_SECONDS = 1.0
"""What a client is told to wait after a process of the host died: about its restart."""


class Sink(Protocol):
    """Where a run's results go. None of its methods may block or raise."""

    @property
    def behind(self) -> bool:
        """The client has not taken what it was sent: give the guest no more credit."""

    def output(self, run: Run, text: str) -> None:
        """Some text; whole characters, never empty."""

    def log(self, run: Run, level: str, text: str) -> None: ...

    def finished(self, run: Run, outcome: RunFinished) -> None:
        """The last call."""


@dataclass(slots=True, eq=False)
class Worker:
    """A connected guest worker."""

    number: int
    send: Callable[[GatewayToWorker], None]
    runs: dict[int, Run] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Run:
    """One run in progress. ``sink`` is None once its client is gone."""

    number: int
    tenant: str
    module: str
    sha256: str
    worker: Worker
    sink: Sink | None
    started: float
    began: float
    withheld: int = 0
    new_tokens: int = 0
    output_bytes: int = 0
    cancelled: str | None = None
    log: deque[LogLine] = field(default_factory=deque)
    log_bytes: int = 0
    decoder: codecs.IncrementalDecoder | None = None

    @property
    def id(self) -> str:
        return f"r{self.number}"

    def describe(self, now: float) -> dict[str, Any]:
        """The entry of ``ps``; usage has what the gateway itself has seen."""
        return {
            "run": self.id,
            "module": self.module,
            "status": "cancelling" if self.cancelled else "running",
            "started": self.started,
            "seconds": now - self.began,
            "usage": {
                "new_tokens": self.new_tokens,
                "output_bytes": self.output_bytes,
                "wall_seconds": now - self.began,
            },
        }


def parse_run(run: str) -> int:
    """The number in a run's id, which the parameters' check has already matched."""
    return int(run[1:])


class RunManager:
    """See the module's docstring."""

    def __init__(
        self,
        limits: GatewayLimits,
        *,
        on_start: Callable[[RunRecord], None],
        on_finish: Callable[[RunRecord, list[LogLine]], None],
        on_store: Callable[[Worker, str, StoreGet | StoreSet], None],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``on_store`` gets the worker to answer, the tenant, and the request."""
        self.limits = limits
        self.workers: dict[int, Worker] = {}
        self.runs: dict[int, Run] = {}
        self._of_tenant: dict[str, int] = {}
        self._on_start = on_start
        self._on_finish = on_finish
        self._on_store = on_store
        self._clock = clock
        self._wall_clock = wall_clock
        self._refusal: RealmError | None = None
        # Giving back in quarters keeps the messages few and the guest never short of room.
        self._credit_step = max(1, limits.credit_bytes // 4)

    # --- starting and steering ------------------------------------------------------------------

    def refuse(self, error: RealmError | None) -> None:
        """From now on answer starts with ``error``; None takes them again."""
        self._refusal = error

    def start(
        self,
        *,
        number: int,
        tenant: str,
        module: str,
        sha256: str,
        artifact: str,
        data: bytes,
        seed: int,
        limits: RunLimits,
        sink: Sink,
    ) -> Run:
        """Start a run on the least loaded worker.

        Raises:
            RealmError: ``busy``, ``worker_lost`` (none is up), or what :meth:`refuse` set.
        """
        if self._refusal is not None:
            refusal = self._refusal
            raise RealmError(refusal.code, refusal.message, details=refusal.details, retry_after=refusal.retry_after)
        used = self._of_tenant.get(tenant, 0)
        if used >= self.limits.runs:
            raise RealmError(
                "busy",
                f"{used} runs of this tenant are in progress",
                details={"limit": self.limits.runs, "used": used},
                retry_after=RETRY_SECONDS,
            )
        if not self.workers:
            raise RealmError("worker_lost", "no guest worker is up at the moment", retry_after=RETRY_SECONDS)
        worker = min(self.workers.values(), key=lambda worker: len(worker.runs))
        run = Run(number, tenant, module, sha256, worker, sink, self._wall_clock(), self._clock())
        self.runs[number] = worker.runs[number] = run
        self._of_tenant[tenant] = used + 1
        worker.send(StartRun(number, tenant, module, artifact, data, seed, limits, self.limits.credit_bytes))
        self._on_start(RunRecord(number, tenant, module, sha256, "running", run.started))
        return run

    def find(self, run: str, tenant: str | None) -> Run | None:
        """A run in progress, if it is this tenant's (None: anybody's)."""
        found = self.runs.get(parse_run(run))
        return found if found is not None and tenant in (None, found.tenant) else None

    def cancel(self, run: Run, reason: str) -> bool:
        """Ask the worker to stop a run; False if that has been asked before."""
        if run.cancelled is not None:
            return False
        run.cancelled = reason
        run.worker.send(CancelRun(run.number, reason))
        return True

    def abandon(self, run: Run) -> None:
        """The client is gone: stop the run and drop what it still says."""
        run.sink = None
        self.cancel(run, "the client is gone")

    def message(self, run: Run, data: bytes) -> None:
        """Give the guest a message."""
        run.worker.send(ClientMessage(run.number, data))

    def drained(self, runs: Iterable[Run]) -> None:
        """The connection of these runs has caught up: give their guests the credit held back."""
        for run in runs:
            if run.withheld:
                run.worker.send(Credit(run.number, run.withheld))
                run.withheld = 0

    # --- what workers say -----------------------------------------------------------------------

    def add_worker(self, number: int, send: Callable[[GatewayToWorker], None]) -> Worker:
        worker = Worker(number, send)
        self.workers[number] = worker
        return worker

    def lose_worker(self, worker: Worker) -> None:
        """No more runs for this worker; those it has are for :meth:`fail`."""
        if self.workers.get(worker.number) is worker:
            del self.workers[worker.number]

    def fail(self, runs: Iterable[Run], error: RealmError) -> None:
        """End runs whose worker or engine is gone."""
        info = ErrorInfo(error.code, error.message, error.details, error.retry_after)
        now = self._clock()
        for run in list(runs):
            usage = Usage(new_tokens=run.new_tokens, output_bytes=run.output_bytes, wall_seconds=now - run.began)
            self._finish(run, RunFinished(run.number, "error", 0, info, usage))

    def events(self, worker: Worker, events: list[WorkerEvent]) -> None:
        """Handle one batch of a worker, in order. Events of runs it does not have are late: dropped."""
        runs = worker.runs
        for event in events:
            run = runs.get(event.run)
            if run is None:
                continue
            if type(event) is Output:
                self._output(run, event)
            elif type(event) is RunFinished:
                self._finish(run, event)
            elif type(event) is Log:
                self._log(run, event)
            elif isinstance(event, StoreGet | StoreSet):
                self._on_store(worker, run.tenant, event)

    def _output(self, run: Run, event: Output) -> None:
        data = event.data
        size = len(data)
        run.new_tokens = event.tokens
        run.output_bytes += size
        sink = run.sink
        if sink is None:
            return
        text = self._decode(run, data)
        if text:
            sink.output(run, text)
        run.withheld += size
        if run.withheld >= self._credit_step and not sink.behind:
            run.worker.send(Credit(run.number, run.withheld))
            run.withheld = 0

    def _decode(self, run: Run, data: bytes) -> str:
        # Nearly all pieces are whole characters; a decoder with state is made when one is not.
        if run.decoder is None:
            try:
                return data.decode()
            except UnicodeDecodeError:
                run.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return run.decoder.decode(data)

    def _log(self, run: Run, event: Log) -> None:
        line = LogLine(event.level, event.text)
        run.log.append(line)
        run.log_bytes += len(event.text)
        while run.log and (run.log_bytes > self.limits.log_bytes or len(run.log) > self.limits.log_lines):
            run.log_bytes -= len(run.log.popleft().text)
        if run.sink is not None:
            run.sink.log(run, event.level, event.text)

    def _finish(self, run: Run, event: RunFinished) -> None:
        del self.runs[run.number]
        run.worker.runs.pop(run.number, None)
        left = self._of_tenant[run.tenant] - 1
        if left:
            self._of_tenant[run.tenant] = left
        else:
            del self._of_tenant[run.tenant]
        record = RunRecord(
            run.number,
            run.tenant,
            run.module,
            run.sha256,
            event.outcome,
            run.started,
            self._wall_clock(),
            event.code,
            usage_data(event.usage),
            error=None if event.error is None else msgspec.structs.asdict(event.error),
        )
        self._on_finish(record, list(run.log))
        sink = run.sink
        if sink is None:
            return
        if run.decoder is not None:
            rest = run.decoder.decode(b"", True)
            if rest:
                sink.output(run, rest)
        run.sink = None
        sink.finished(run, event)


def usage_data(usage: Usage) -> dict[str, Any]:
    """``usage`` as the wire has it."""
    return msgspec.structs.asdict(usage)
