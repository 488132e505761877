"""Runs: which wait and which worker has them, where their output goes, how far they may be ahead.

:class:`RunManager` does no I/O: workers are objects with a ``send``, a run's results go to its
:class:`Sink`. One batch of worker events is handled without a task or an allocation per run beyond
the frames themselves, since this is the way of every token.

A run starts at once if its tenant is under ``running_guests`` and a worker has room; else it waits
(:mod:`realm.gateway.waiting`), also while no worker is up. ``TenantUse.running`` counts the runs that a
worker has and ``TenantUse.waiting`` all others, so a run always counts in exactly one of the two.

A guest may emit ``credit`` bytes that its client has not taken. Credit is given back as output is
passed on, but not while the client's connection is behind (``Sink.behind``): then the guest waits,
and it alone.
"""

from __future__ import annotations

import codecs
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from realm.errors import RealmError
from realm.gateway.quotas import MESSAGE_BYTES, RETRY_SECONDS, Quotas, TenantUse
from realm.gateway.run import LOG_LEVELS, Run, Sink, Worker, check_end, parse_run, usage_data
from realm.gateway.waiting import WaitingRuns
from realm.gateway.workers import Workers
from realm.registry.records import LogLine, RunRecord
from realm.run_messages import (
    CancelRun,
    ClientMessage,
    Credit,
    ErrorInfo,
    GatewayToWorker,
    Log,
    Output,
    RunFinished,
    StartRun,
    StoreGet,
    StoreSet,
    Usage,
    WorkerEvent,
)
from realm.settings import GatewayLimits

ARTIFACT_DAMAGED = "artifact_damaged"
"""Code of a worker that found another content in a compiled module's file."""
_KEEP_BYTES = 64 << 10
"""Input up to this size is kept until the run has done something, for a second start."""


class RunManager:
    """See the module's docstring."""

    def __init__(
        self,
        limits: GatewayLimits,
        quotas: Quotas,
        *,
        on_start: Callable[[RunRecord], None],
        on_finish: Callable[[RunRecord, list[LogLine]], None],
        on_store: Callable[[Worker, str, StoreGet | StoreSet], None],
        on_damaged: Callable[[Run, bool], None],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """``on_start`` is called when a run is taken, though it may wait.

        ``on_store`` gets the worker to answer, the tenant, and the request. ``on_damaged`` gets a run whose
        compiled module is not what was compiled, and whether to call :meth:`resume` (or :meth:`fail`) for it.
        """
        self.limits = limits
        self.quotas = quotas
        self.runs: dict[int, Run] = {}
        self._workers = Workers(limits, quotas)
        self._waiting = WaitingRuns()
        self._of_tenant: dict[str, dict[int, Run]] = {}
        self._on_start = on_start
        self._on_finish = on_finish
        self._on_store = on_store
        self._on_damaged = on_damaged
        self._clock = clock
        self._wall_clock = wall_clock
        self._refusal: RealmError | None = None
        self._alone_since = clock()
        # Giving back in quarters keeps the messages few and the guest never short of room.
        self._credit_step = max(1, limits.credit_bytes // 4)

    @property
    def workers(self) -> dict[int, Worker]:
        """The workers that are up, by their numbers."""
        return self._workers.up

    # --- starting and steering ------------------------------------------------------------------

    def refuse(self, error: RealmError | None) -> None:
        """From now on start nothing and answer starts with ``error``; None takes them again."""
        self._refusal = error
        self.pump()

    def start(
        self,
        *,
        number: int,
        tenant: str,
        module: str,
        sha256: str,
        artifact: str,
        artifact_sha256: str,
        data: bytes,
        seed: int,
        sink: Sink,
    ) -> Run:
        """Start a run on the least loaded worker, or let it wait.

        Raises:
            RealmError: ``rate_limited`` (``waiting_guests`` or ``tokens_per_minute``), ``busy``, or what
                :meth:`refuse` set.
        """
        use = self._admit(tenant)
        now = self._clock()
        run = Run(
            number, use, module, sha256, artifact, artifact_sha256, data, seed, sink, now, self._wall_clock(), now
        )
        worker = None
        # Who waits already goes first: tenants that are ready, and earlier runs of this one.
        if use.running < use.limits.running_guests and not self._waiting.has(tenant) and not self._waiting.any_ready:
            worker = self._workers.choose()
        if worker is None:
            use.wait(len(data), self.limits.waiting_bytes)
            run.held = len(data) + MESSAGE_BYTES
        self.runs[number] = run
        self._of_tenant.setdefault(tenant, {})[number] = run
        self._on_start(RunRecord(number, tenant, module, sha256, "running", run.started))
        if worker is None:
            self._waiting.add(run)
            sink.waiting(run)
        else:
            self._assign(run, worker)
        return run

    @contextlib.contextmanager
    def preparing(self, tenant: str, size: int) -> Iterator[None]:
        """Hold a waiting run's place, with ``size`` bytes of input, before there is a run to start.

        Raises:
            RealmError: as :meth:`start` does.
        """
        use = self._admit(tenant)
        # One that could start at once, were it compiled, needs no place for waiting.
        spare = max(0, use.limits.running_guests - use.running)
        use.wait(size, self.limits.waiting_bytes, spare=spare)
        try:
            yield
        finally:
            use.end_wait(size + MESSAGE_BYTES)

    def of(self, tenant: str | None) -> Iterable[Run]:
        """A tenant's runs (None: all), the latest first."""
        return reversed((self.runs if tenant is None else self._of_tenant.get(tenant, {})).values())

    def find(self, run: str, tenant: str | None) -> Run | None:
        """A run that waits or is in progress, if it is this tenant's (None: anybody's)."""
        found = self.runs.get(parse_run(run))
        return found if found is not None and tenant in (None, found.tenant) else None

    def cancel(self, run: Run, reason: str) -> bool:
        """Stop a run: a waiting one ends now, others when their worker says so. False if that was asked before."""
        if run.cancelled is not None:
            return False
        run.cancelled = reason
        if run.worker is None:
            self._finish(run, RunFinished(run.number, "cancelled", 0, None, self._usage(run)))
            self.pump()
        else:
            run.worker.send(CancelRun(run.number, reason))
        return True

    def abandon(self, run: Run) -> None:
        """The client is gone: stop the run and drop what it still says."""
        run.sink = None
        self.cancel(run, "the client is gone")

    def message(self, run: Run, data: bytes) -> None:
        """Give the guest a message; one that waits gets it at its start.

        Raises:
            RealmError: ``busy`` while too much is on its way to the worker, or waits here.
        """
        worker = run.worker
        if worker is None:
            run.use.hold(len(data), self.limits.waiting_bytes)
            run.held += len(data) + MESSAGE_BYTES
            run.inbox.append(data)
            return
        if self._workers.behind(worker):
            raise self._behind()
        run.data = None
        worker.send(ClientMessage(run.number, data))

    def drained(self, runs: Iterable[Run]) -> None:
        """The connection of these runs has caught up: give their guests the credit held back."""
        for run in runs:
            if run.withheld and run.worker is not None:
                run.worker.send(Credit(run.number, run.withheld))
                run.withheld = 0

    def pump(self) -> None:
        """Start waiting runs while there is room."""
        while self._waiting.any_ready and self._refusal is None:
            worker = self._workers.choose()
            if worker is None:
                return
            run = self._waiting.take()
            assert run is not None
            run.use.end_wait(run.held)
            run.held = 0
            self._assign(run, worker)
            self._waiting.settle(run.use)

    def expire(self) -> float | None:
        """End runs that have waited for too long without any worker.

        Gives the seconds until the next one's time is over; None when nothing waits for a worker.
        """
        if self._workers.up or not self._waiting:
            return None
        now, most = self._clock(), self.limits.worker_wait_seconds
        ends = {run: max(run.queued, self._alone_since) + most for run in self._waiting}
        error = RealmError("worker_lost", "no guest worker is up at the moment", retry_after=RETRY_SECONDS)
        self.fail([run for run, end in ends.items() if end <= now], error)
        return min((end - now for end in ends.values() if end > now), default=None)

    def resume(self, run: Run, artifact: str, artifact_sha256: str) -> None:
        """Start a run again with a compiled module that was made anew, before its tenant's other waiting runs."""
        if run.number in self.runs and run.worker is None:
            run.artifact, run.artifact_sha256 = artifact, artifact_sha256
            self._waiting.add(run, first=True)
            self.pump()

    def limits_changed(self, tenants: Iterable[str]) -> None:
        """The limits of these tenants have changed."""
        for tenant in tenants:
            self._workers.share(tenant)
            self._waiting.settle(self.quotas.of(tenant))
        self.pump()

    def _admit(self, tenant: str) -> TenantUse:
        """The tenant's entry, unless nothing of it may start now."""
        if self._refusal is not None:
            refusal = self._refusal
            raise RealmError(refusal.code, refusal.message, details=refusal.details, retry_after=refusal.retry_after)
        use = self.quotas.of(tenant)
        use.check_tokens()
        if self._workers.all_behind:
            raise self._behind()
        return use

    def _behind(self) -> RealmError:
        return RealmError(
            "busy",
            "a guest worker has not taken what it was sent before",
            details={"limit": self.limits.link_bytes},
            retry_after=RETRY_SECONDS,
        )

    def _assign(self, run: Run, worker: Worker) -> None:
        """Start a run that counts nowhere."""
        data = run.data
        assert data is not None
        number, use = run.number, run.use
        use.running += 1
        run.worker, run.began = worker, self._clock()
        if not run.again:
            run.started = self._wall_clock()
        self._workers.attach(worker, run)
        worker.send(
            StartRun(
                *(number, run.tenant, run.module, run.artifact, data, run.seed),
                *(use.limits.for_run(), self.limits.credit_bytes, run.artifact_sha256),
            )
        )
        for message in run.inbox:
            worker.send(ClientMessage(number, message))
        if run.inbox or len(data) > _KEEP_BYTES:
            run.data = None
        run.inbox.clear()
        if run.sink is not None and not run.again:
            run.sink.started(run)

    # --- what workers say -----------------------------------------------------------------------

    def add_worker(
        self, number: int, send: Callable[[GatewayToWorker], None], unsent: Callable[[], int] = lambda: 0
    ) -> Worker:
        """A worker is up; ``unsent`` gives the bytes that its link still holds."""
        worker = Worker(number, send, unsent)
        self._workers.add(worker)
        self.pump()
        return worker

    def lose_worker(self, worker: Worker) -> None:
        """No more runs for this worker; those it has are for :meth:`fail`."""
        self._workers.lose(worker)
        if not self._workers.up:
            self._alone_since = self._clock()

    def fail(self, runs: Iterable[Run], error: RealmError) -> None:
        """End runs that cannot go on."""
        for run in list(runs):
            info = ErrorInfo(error.code, error.message, error.details, error.retry_after)
            self._finish(run, RunFinished(run.number, "error", 0, info, self._usage(run)))
        self.pump()

    def events(self, worker: Worker, events: list[WorkerEvent]) -> None:
        """Handle one batch of a worker, in order. Events of runs it does not have are late: dropped.

        Raises:
            ValueError: the worker said something that no worker says.
        """
        runs = worker.runs
        for event in events:
            run = runs.get(event.run)
            if run is None:
                continue
            if type(event) is Output:
                self._output(run, event)
            elif type(event) is RunFinished:
                check_end(event)
                self._finish(run, event)
            elif type(event) is Log:
                self._log(run, event)
            elif isinstance(event, StoreGet | StoreSet):
                run.data = None
                self._on_store(worker, run.tenant, event)
        self.pump()

    def _output(self, run: Run, event: Output) -> None:
        data = event.data
        size = len(data)
        run.new_tokens = event.tokens
        run.output_bytes += size
        run.data = None
        sink = run.sink
        if sink is None:
            return
        text = self._decode(run, data)
        if text:
            sink.output(run, text)
        if sink.collects:
            self._collected(run, size)
        run.withheld += size
        if run.withheld >= self._credit_step and not sink.behind and run.worker is not None:
            run.worker.send(Credit(run.number, run.withheld))
            run.withheld = 0

    def _collected(self, run: Run, size: int) -> None:
        """A sink keeps so many bytes more: end the run with which a tenant's would be too many."""
        use, limit = run.use, self.limits.collected_bytes
        run.collected += size
        use.collected += size
        if use.collected > limit and run.failure is None:
            run.failure = RealmError(
                "output_limit",
                f"this tenant's calls that are not streamed have collected more than {limit:,} bytes: use stream",
                details={"name": "collected_bytes", "limit": limit, "used": use.collected, "unit": "bytes"},
            )
            self.cancel(run, "its output is too long to be collected")

    def _decode(self, run: Run, data: bytes) -> str:
        # Nearly all pieces are whole characters; a decoder with state is made when one is not.
        if run.decoder is None:
            try:
                return data.decode()
            except UnicodeDecodeError:
                run.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return run.decoder.decode(data)

    def _log(self, run: Run, event: Log) -> None:
        if event.level not in LOG_LEVELS:
            raise ValueError("a line of a run's log has a level that there is not")
        line = LogLine(event.level, event.text)
        run.data = None
        run.log.append(line)
        run.log_bytes += len(event.text)
        while run.log and (run.log_bytes > self.limits.log_bytes or len(run.log) > self.limits.log_lines):
            run.log_bytes -= len(run.log.popleft().text)
        if run.sink is not None:
            run.sink.log(run, event.level, event.text)

    def _usage(self, run: Run) -> Usage:
        """What the gateway itself has seen."""
        wall = run.wall_seconds(self._clock())
        return Usage(new_tokens=run.new_tokens, output_bytes=run.output_bytes, wall_seconds=wall)

    def _finish(self, run: Run, event: RunFinished) -> None:
        error = event.error
        if error is not None and error.code == ARTIFACT_DAMAGED and run.worker is not None:
            if self._set_back(run):
                return
            error.retry_after = RETRY_SECONDS
        self._release(run)
        self._forget(run)
        run.use.collected -= run.collected
        if run.failure is not None and event.outcome == "cancelled":
            failure = run.failure
            event.outcome, event.error = "error", ErrorInfo(failure.code, failure.message, failure.details)
        if error is not None and error.code == "rate_limited" and error.details.get("name") == "tokens_per_minute":
            used = error.details.get("used")
            run.use.tokens_refused(used if isinstance(used, int) else 0, error.retry_after or RETRY_SECONDS)
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

    def _set_back(self, run: Run) -> bool:
        """A compiled module is damaged: let the run wait until it is made anew, if nobody can notice."""
        unnoticed = run.data is not None and run.sink is not None and run.cancelled is None and not run.again
        if unnoticed:
            self._release(run)
            run.worker, run.again = None, True
            # Not refused for want of a place: it had been taken already.
            run.held = len(run.data or b"") + MESSAGE_BYTES
            run.use.waiting += 1
            run.use.waiting_bytes += run.held
        self._on_damaged(run, unnoticed)
        return unnoticed

    def _release(self, run: Run) -> None:
        """Give back the place that a run has, running or waiting."""
        if run.worker is not None:
            self._workers.detach(run.worker, run)
            run.use.running -= 1
            self._waiting.settle(run.use)
        else:
            self._waiting.remove(run)
            run.use.end_wait(run.held)
            run.held = 0

    def _forget(self, run: Run) -> None:
        del self.runs[run.number]
        mine = self._of_tenant[run.tenant]
        del mine[run.number]
        if not mine:
            del self._of_tenant[run.tenant]
