"""A whole ``realm serve`` and SDK clients over WebSocket: what applications see.

Clients are processes of their own (:mod:`realm.bench.client_process`), on the same machine.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

import realm.bench
from realm.bench.children import Children, children_of, process_seconds, thread_seconds
from realm.bench.processes import TENANTS, UNBOUNDED
from realm.bench.workload import Measured, Prompts, Workload
from realm.settings import ServeSettings
from realm.supervisor import ENGINE_MODULE, WORKER_MODULE
from realm_sdk import SyncClient

MODULE = Path(realm.bench.__file__).with_name("bench.wasm")
"""The guest that every benchmark runs."""

LIMITS = {
    "running_guests": 65_536,
    "fuel_per_run": UNBOUNDED,
    "fuel_per_second": UNBOUNDED,
    "kv_pages": UNBOUNDED,
    "tokens_per_run": UNBOUNDED,
    "tokens_per_minute": UNBOUNDED,
    "requests_per_minute": UNBOUNDED,
    "output_bytes_per_run": UNBOUNDED,
}
"""What is measured is not a limit."""

_PROCESSORS_PER_CLIENT = 4
_MOST_CLIENTS = 8


class Order(msgspec.Struct, kw_only=True):
    """Guests that a client process is to run at once: their inputs, and how many tokens each will draw."""

    inputs: list[str]
    new: int


class Report(msgspec.Struct, kw_only=True):
    """What a client process saw: when each run's first output came, and when the last run ended.

    Times are of :func:`time.perf_counter`.
    """

    first: list[float]
    ended: float


def client_processes() -> int:
    """How many: so few that server and engine keep most processors."""
    return max(1, min(_MOST_CLIENTS, len(os.sched_getaffinity(0)) // _PROCESSORS_PER_CLIENT))


class _Server:
    """A running ``realm serve`` and its client processes; a context manager."""

    def __init__(self, settings: ServeSettings, model: Path, *, quiet: bool) -> None:
        self._settings = settings
        self._model = model
        self._children = Children(quiet=quiet)
        self._exit = contextlib.ExitStack()
        self._clients: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> _Server:
        with contextlib.ExitStack() as started:
            started.enter_context(self._children)
            self._start(started)
            self._exit = started.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def _start(self, started: contextlib.ExitStack) -> None:
        settings = self._settings
        words = ["serve", "--json", "--port=0", f"--model={self._model.name}", f"--workers={settings.workers}"]
        home = {"REALM_HOME": str(settings.home)}
        self._serve = self._children.spawn(
            "realm.cli", *words, *settings.engine.arguments(), variables=home, talks=True
        )
        started.callback(self._serve.terminate)
        ready = self._read(self._serve)
        url = ready["url"]
        self._admin = started.enter_context(SyncClient(url, ready["admin_key"]))
        self._admin.set_limits(None, LIMITS)
        keys = []
        for tenant in TENANTS:
            self._admin.add_tenant(tenant)
            keys.append(self._admin.add_key(tenant).key)
            with SyncClient(url, keys[-1]) as client:
                client.push("bench", MODULE)
        for index in range(client_processes()):
            process = self._children.spawn("realm.bench.client_process", talks=True)
            self._write(process, {"url": url, "key": keys[index % len(keys)]})
            assert process.stdin is not None
            started.callback(process.stdin.close)
            self._clients.append(process)

    def measure(self, workload: Workload, prompts: Prompts, count: int, new: int) -> Measured:
        inputs = [workload.guest_input(prompt, new) for prompt in prompts.take(count)]
        clients = self._clients[:count]
        for index, client in enumerate(clients):
            self._write(client, Order(inputs=inputs[index :: len(clients)], new=new))
            self._read(client)
        before, cpu_before = self._admin.health().engine, self._cpu()
        began = time.perf_counter()
        for client in clients:
            self._write(client, "go")
        reports = [msgspec.convert(self._read(client), Report) for client in clients]
        cpu, after = self._cpu(), self._admin.health().engine
        waits = [at - began for report in reports for at in report.first]
        seconds = max(report.ended for report in reports) - began

        def more(name: str) -> float:
            return float(after[name] - before[name])

        def of_tenants(name: str) -> int:
            return sum(int(t[name]) for t in after["tenants"].values()) - sum(
                int(t[name]) for t in before["tenants"].values()
            )

        return Measured(
            requests=count,
            tokens=count * new,
            began=began,
            seconds=seconds,
            first_seconds=statistics.median(waits),
            last_first_seconds=max(waits),
            steps=int(more("steps")),
            rows=int(more("sequences")),
            device_seconds=more("busy_seconds"),
            engine_cpu=cpu["engine"] - cpu_before["engine"],
            workers_cpu=cpu["workers"] - cpu_before["workers"],
            gateway_cpu=cpu["gateway"] - cpu_before["gateway"],
            ahead=of_tenants("ahead_tokens"),
            wasted=of_tenants("wasted_tokens"),
        )

    def _cpu(self) -> Mapping[str, float]:
        """Processor seconds of gateway, engine thread and workers."""
        spent = {"gateway": process_seconds(self._serve.pid), "engine": 0.0, "workers": 0.0}
        for pid, command in children_of(self._serve.pid).items():
            if ENGINE_MODULE in command:
                spent["engine"] += thread_seconds(pid, pid)
            elif WORKER_MODULE in command:
                spent["workers"] += process_seconds(pid)
        return spent

    def _write(self, process: subprocess.Popen[bytes], message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(message) + b"\n")
        process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes]) -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise self._children.failure("a process has gone")
        return msgspec.json.decode(line)


def measure_clients(
    settings: ServeSettings,
    workload: Workload,
    model: Path,
    *,
    vocab: int,
    quiet: bool,
    progress: Callable[[str], None],
) -> Iterator[Measured]:
    """All cases of a workload through one server, whose home is ``settings.home`` and holds ``model``.

    Raises:
        RealmError: ``bench_failed`` when a process fails. realm_sdk.RealmError: when a run does.
    """
    prompts = Prompts(vocab, workload.prompt, workload.seed)
    progress("starting the server")
    with _Server(settings, model, quiet=quiet) as server:
        for count, new, counts in workload.rounds():
            progress(f"{count} clients' guests")
            measured = server.measure(workload, prompts, count, new)
            if counts:
                yield measured
