"""A real engine process and real guest workers, driven from the gateway's side of their links.

No client and no gateway takes time beside them: what is measured is what a guest behind every token costs.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from realm.bench.adapters import NONE, Draws, Library, adapter_name
from realm.bench.children import Children, process_seconds, thread_seconds
from realm.bench.workload import Measured, Prompt, Prompts, Workload
from realm.channel import BlockingChannel, ChannelClosed, connect, listen
from realm.errors import RealmError
from realm.guests.compiler import CompiledModule
from realm.messages import (
    AdapterFile,
    AdapterGone,
    EngineReady,
    EngineStats,
    EngineToGateway,
    GatewayHello,
    StatsRequest,
    TenantQuota,
    WorkerHello,
)
from realm.models.config import ModelConfig
from realm.run_messages import (
    CancelRun,
    Log,
    Output,
    RunFinished,
    RunLimits,
    Shutdown,
    StartRun,
    TenantShare,
    WorkerToGateway,
)
from realm.settings import ServeSettings
from realm.supervisor import (
    ENGINE_MODULE,
    WORKER_ENVIRONMENT,
    WORKER_MODULE,
    engine_arguments,
    engine_environment,
    worker_arguments,
)

TENANTS = ("ada", "bob", "cy")
"""Requests belong to each in turn."""

UNBOUNDED = 1 << 50
"""What is measured is not a limit."""

_LIMITS = RunLimits(fuel=UNBOUNDED, wall_seconds=3600.0, tokens=UNBOUNDED, output_bytes=UNBOUNDED)
_START_SECONDS = 600.0
_SILENCE_SECONDS = 120.0
"""After so long without a word a run counts as stuck."""
_LOADED_AT_ONCE = 64
"""Guests that have adapters loaded before these are measured."""


class Processes:
    """One engine and ``settings.workers`` workers; a context manager."""

    def __init__(self, settings: ServeSettings, model: Path, *, traces: Path | None, quiet: bool) -> None:
        """
        Args:
            model: the model's folder.
            traces: folder for the trace of each process; None for no traces.
            quiet: show what the processes log only when one fails.
        """
        self._settings = settings
        self._model = model
        self._traces = traces
        self._exit = contextlib.ExitStack()
        self._children = Children(quiet=quiet)
        self._poll = select.poll()
        self._workers: dict[int, BlockingChannel[Any]] = {}
        self._links: dict[int, BlockingChannel[Any]] = {}
        self._runs = 0
        self._calls = 0

    def __enter__(self) -> Processes:
        try:
            self._start()
        except BaseException as error:
            self._exit.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    # --- start ----------------------------------------------------------------------------------

    def _start(self) -> None:
        folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="realm-")))
        self._exit.enter_context(self._children)
        engine, gateway = folder / "engine", folder / "gateway"
        listener = self._exit.enter_context(listen(str(gateway)))
        settings, model = self._settings, self._model
        self._engine_pid = self._children.spawn(
            ENGINE_MODULE,
            *engine_arguments(settings, engine, model),
            *self._trace("engine"),
            environment=engine_environment(settings),
        ).pid
        self._engine: BlockingChannel[Any] = BlockingChannel(self._connect(str(engine)), EngineToGateway)
        self._exit.callback(self._say_goodbye)
        self._engine.send(GatewayHello(os.getpid()))
        self._worker_pids = [
            self._children.spawn(
                WORKER_MODULE,
                *worker_arguments(settings, number, engine, gateway, model),
                *self._trace(f"worker{number}"),
                environment=WORKER_ENVIRONMENT,
            ).pid
            for number in range(1, settings.workers + 1)
        ]
        self._accept(listener)
        self.ready: EngineReady = self._from_engine(EngineReady, _START_SECONDS)
        self._engine.send(TenantQuota("", UNBOUNDED, UNBOUNDED, 64))
        for worker in self._workers.values():
            for tenant in TENANTS:
                worker.send(TenantShare(tenant, float(UNBOUNDED)))

    def _trace(self, name: str) -> list[str]:
        return [] if self._traces is None else ["--trace", str(self._traces / f"{name}.trace")]

    def _say_goodbye(self) -> None:
        """Workers end when they are told, the engine when its gateway goes."""
        for worker in self._workers.values():
            with contextlib.suppress(ChannelClosed):
                worker.send(Shutdown())
            worker.close()
        self._engine.close()

    def _connect(self, path: str) -> socket.socket:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self._children.check()
            try:
                return connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.02)
        raise self._children.failure("the engine does not listen")

    def _accept(self, listener: socket.socket) -> None:
        """Take the link of every worker, once it has said hello: then it has loaded everything."""
        deadline = time.monotonic() + _START_SECONDS
        newcomers: dict[int, BlockingChannel[Any]] = {}
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while len(self._workers) < self._settings.workers:
            self._children.check()
            if time.monotonic() > deadline:
                raise self._children.failure("the workers do not come up")
            for descriptor, _ in poll.poll(200):
                if descriptor == listener.fileno():
                    channel: BlockingChannel[Any] = BlockingChannel(listener.accept()[0], WorkerToGateway)
                    newcomers[channel.fileno()] = channel
                    poll.register(channel.fileno(), select.POLLIN)
                elif self._says_hello(newcomers[descriptor]):
                    poll.unregister(descriptor)
                    self._workers[descriptor] = newcomers.pop(descriptor)
                    self._poll.register(descriptor, select.POLLIN)

    def _says_hello(self, newcomer: BlockingChannel[Any]) -> bool:
        try:
            return any(isinstance(message, WorkerHello) for message in newcomer.receive())
        except ChannelClosed:
            raise self._children.failure("a worker has gone") from None

    # --- what the engine counts -----------------------------------------------------------------

    def _from_engine(self, kind: type[Any], seconds: float) -> Any:
        """The engine's next message, which is of ``kind``."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._engine.fileno(), select.POLLIN)
        while time.monotonic() < deadline:
            poll.poll(200)
            try:
                for message in self._engine.receive():
                    assert isinstance(message, kind)
                    return message
            except ChannelClosed:
                break
        raise self._children.failure("the engine does not answer")

    def stats(self) -> EngineStats:
        """What the engine has counted since it started."""
        self._calls += 1
        self._engine.send(StatsRequest(self._calls))
        stats: EngineStats = self._from_engine(EngineStats, _SILENCE_SECONDS)
        return stats

    def _cpu(self) -> tuple[float, float]:
        """Processor seconds of the engine's main thread, and of all workers."""
        engine = self._engine_pid
        return thread_seconds(engine, engine), sum(process_seconds(pid) for pid in self._worker_pids)

    # --- adapters -------------------------------------------------------------------------------

    def announce(self, changes: Iterable[AdapterFile | AdapterGone], *, wait: bool = True) -> None:
        """Tell the engine of adapters, as the gateway does. ``wait``: until it knows them."""
        for change in changes:
            self._engine.send(change)
        if wait:
            # The engine reads in order, but calls of guests come by other links.
            self.stats()

    # --- running --------------------------------------------------------------------------------

    def start(
        self, workload: Workload, module: CompiledModule, wanted: Iterable[tuple[str, Prompt, int, str]]
    ) -> tuple[float, list[int]]:
        """Start guests, all at once: when, and the numbers of their runs, whose events are :meth:`events`'.

        Args:
            wanted: of each guest its tenant, prompt, number of new tokens, and adapter ("": none).
        """
        links = list(self._workers.values())
        starts: list[tuple[BlockingChannel[Any], StartRun]] = []
        for tenant, prompt, new, adapter in wanted:
            self._runs += 1
            start = StartRun(
                run=self._runs,
                tenant=tenant,
                module="bench",
                artifact=str(module.artifact),
                input=workload.guest_input(prompt, new, adapter).encode(),
                seed=workload.seed + self._runs,
                limits=_LIMITS,
                credit=UNBOUNDED,
                artifact_sha256=module.artifact_sha256,
            )
            starts.append((links[self._runs % len(links)], start))
        began = time.perf_counter()
        for link, start in starts:
            link.send(start)
            self._links[start.run] = link
        return began, [start.run for _, start in starts]

    def cancel(self, runs: Iterable[int]) -> None:
        """End runs; each says so by a last event, unless it has ended already."""
        for run in runs:
            if run in self._links:
                self._links[run].send(CancelRun(run, "the benchmark has seen enough of it"))

    def events(self, seconds: float = _SILENCE_SECONDS) -> tuple[float, list[Output | RunFinished]]:
        """What runs say next, and when it came. Nothing after ``seconds`` without a word.

        Raises:
            RealmError: ``bench_failed`` when a worker has gone.
        """
        ready = self._poll.poll(seconds * 1000)
        at = time.perf_counter()
        found: list[Output | RunFinished] = []
        for descriptor, _ in ready:
            for message in self._receive(descriptor):
                for event in message.events:
                    if isinstance(event, (Output, RunFinished)):
                        found.append(event)
                        if isinstance(event, RunFinished):
                            self._links.pop(event.run, None)
                    elif isinstance(event, Log):
                        sys.stderr.write(f"guest: {event.text}\n")
        return at, found

    def failure(self, text: str) -> RealmError:
        """An error with the last lines that the processes have logged."""
        return self._children.failure(text)

    def _receive(self, descriptor: int) -> list[Any]:
        try:
            return self._workers[descriptor].receive()
        except ChannelClosed:
            raise self._children.failure("a worker has gone") from None

    # --- measuring ------------------------------------------------------------------------------

    def measure(
        self,
        workload: Workload,
        prompts: Prompts,
        module: CompiledModule,
        count: int,
        new: int,
        adapters: list[str] | None = None,
    ) -> Measured:
        """Run ``count`` guests at once, to the end of all of them.

        Args:
            adapters: the name of each guest's adapter, "" for none. None: the engine knows no adapters.
        """
        names = adapters or [""] * count
        taken = enumerate(zip(prompts.take(count), names, strict=True))
        wanted = [(TENANTS[index % len(TENANTS)], prompt, new, name) for index, (prompt, name) in taken]
        before, cpu_before = self.stats(), self._cpu()
        began, runs = self.start(workload, module, wanted)
        first, ends, tokens = self._finish(runs, new)
        cpu, after = self._cpu(), self.stats()
        waits = [at - began for at in first.values()]
        ended = max(ends.values())
        users = {run for run, name in zip(runs, names, strict=True) if name}
        return Measured(
            requests=count,
            tokens=tokens,
            began=began,
            seconds=ended - began,
            first_seconds=statistics.median(waits),
            last_first_seconds=max(waits),
            steps=after.steps - before.steps,
            rows=after.sequences - before.sequences,
            device_seconds=after.busy_seconds - before.busy_seconds,
            engine_cpu=cpu[0] - cpu_before[0],
            workers_cpu=cpu[1] - cpu_before[1],
            ahead=sum(t.ahead_tokens for t in after.tenants.values())
            - sum(t.ahead_tokens for t in before.tenants.values()),
            wasted=sum(t.wasted_tokens for t in after.tenants.values())
            - sum(t.wasted_tokens for t in before.tenants.values()),
            adapter_requests=len(users),
            adapter_different=len({*names} - {""}),
            adapter_seconds=max((ends[run] - began for run in users), default=None),
            plain_seconds=max((ends[run] - began for run in {*runs} - users), default=None),
            adapters_resident=after.adapters if adapters else None,
            loads=after.adapter_loads - before.adapter_loads if adapters else None,
        )

    def _finish(self, runs: list[int], new: int) -> tuple[dict[int, float], dict[int, float], int]:
        """Take the events of runs to their ends: when each had its first output and when it ended; all their tokens."""
        first: dict[int, float] = {}
        ends: dict[int, float] = {}
        tokens = 0
        while len(ends) < len(runs):
            at, events = self.events()
            if not events:
                raise self._children.failure(f"{len(runs) - len(ends)} runs are stuck")
            for event in events:
                if event.run not in first:
                    first[event.run] = at
                if isinstance(event, RunFinished):
                    if event.outcome != "complete" or event.code or event.usage.new_tokens != new:
                        raise self._children.failure(f"a run ended otherwise than it should: {event}")
                    tokens += event.usage.new_tokens
                    ends[event.run] = at
        return first, ends, tokens


def measure_processes(
    settings: ServeSettings,
    workload: Workload,
    model: Path,
    *,
    vocab: int,
    module: CompiledModule,
    traces: Path | None,
    quiet: bool,
    progress: Callable[[str], None],
) -> Iterator[Measured]:
    """All cases of a workload, repeat by repeat, on one set of processes.

    Args:
        vocab: token ids of prompts are below it. progress: told what is being done.

    Raises:
        RealmError: ``bench_failed`` when a process or a run fails.
    """
    prompts = Prompts(vocab, workload.prompt, workload.seed)
    progress("loading the model")
    with Processes(settings, model, traces=traces, quiet=quiet) as processes:
        if workload.adapters is None or 0 in workload.adapters.counts:
            for count, new, counts in workload.rounds():
                progress(f"{count} guests" if counts else f"warming up with {count} guests")
                measured = processes.measure(workload, prompts, module, count, new)
                if workload.adapters is not None:
                    measured.adapters = 0
                if counts:
                    yield measured
        if workload.adapters is not None:
            yield from _measure_adapters(processes, workload, model, prompts, module, progress)


def _measure_adapters(
    processes: Processes,
    workload: Workload,
    model: Path,
    prompts: Prompts,
    module: CompiledModule,
    progress: Callable[[str], None],
) -> Iterator[Measured]:
    """The cases with registered adapters, of which there are more and more."""
    use = workload.adapters
    assert use is not None
    draws = Draws(use, workload.seed)
    with tempfile.TemporaryDirectory(prefix="realm-adapters-") as folder:
        library = Library(Path(folder), ModelConfig.load(model), use)
        for registered in filter(None, use.counts):
            progress(f"making {registered} adapters up")
            processes.announce(library.up_to(registered))
            if use.warm:
                progress(f"loading {registered} adapters")
                _load_all(processes, workload, module, registered)
            for count, new, counts, used in workload.adapter_rounds():
                what = f"{count} guests, {registered} adapters {use.mix if used else 'unused'}"
                progress(what if counts else f"warming up with {what}")
                names = draws.take(registered, count) if used else [""] * count
                measured = processes.measure(workload, prompts, module, count, new, names)
                measured.adapters, measured.mix = registered, use.mix if used else NONE
                if counts:
                    yield measured


def _load_all(processes: Processes, workload: Workload, module: CompiledModule, registered: int) -> None:
    """Have every adapter applied once, those that are drawn most last."""
    prompt = Prompts(2, 1, workload.seed)
    left = [adapter_name(number) for number in reversed(range(registered))]
    while left:
        names, left = left[:_LOADED_AT_ONCE], left[_LOADED_AT_ONCE:]
        processes.measure(workload, prompt, module, len(names), 1, names)
