"""A run manager with workers that only remember, a clock that the test moves, and sinks that keep what they get."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from realm.errors import RealmError
from realm.gateway.quotas import Quotas
from realm.gateway.run import Run, Worker
from realm.gateway.runs import RunManager
from realm.registry.records import LogLine, RunRecord
from realm.run_messages import (
    Credit,
    ErrorInfo,
    GatewayToWorker,
    RunFinished,
    StartRun,
    StoreGet,
    StoreSet,
    TenantShare,
    Usage,
)
from realm.settings import GatewayLimits

LIMITS = GatewayLimits(
    runs_per_worker=4,
    worker_wait_seconds=10.0,
    waiting_bytes=4096,
    link_bytes=1000,
    collected_bytes=500,
    credit_bytes=100,
    log_bytes=20,
    log_lines=3,
)
DEFAULTS = {"running_guests": 3, "waiting_guests": 4, "fuel_per_second": 12_000_000}
DAMAGED = ErrorInfo("artifact_damaged", "another content", {"expected": "a"})


class RecordingSink:
    """Keeps what it gets; ``behind`` and ``collects`` are set by the test."""

    def __init__(self) -> None:
        self.behind = False
        self.collects = False
        self.text = ""
        self.told: list[str] = []
        self.ends: list[RunFinished] = []

    def waiting(self, run: Run) -> None:
        self.told.append("waiting")

    def started(self, run: Run) -> None:
        self.told.append("started")

    def output(self, run: Run, text: str) -> None:
        assert text and not self.ends
        self.text += text

    def log(self, run: Run, level: str, text: str) -> None:
        assert not self.ends

    def finished(self, run: Run, outcome: RunFinished) -> None:
        self.ends.append(outcome)

    @property
    def error(self) -> ErrorInfo:
        (end,) = self.ends
        assert end.outcome == "error" and end.error is not None
        return end.error


class Host:
    """A manager with workers that only remember, and a clock that the test moves."""

    def __init__(self, defaults: dict[str, int] | None = None) -> None:
        self.now = 1000.0
        self.sent: list[tuple[int, GatewayToWorker]] = []
        self.unsent: Counter[int] = Counter()
        self.started: list[RunRecord] = []
        self.finished: list[tuple[RunRecord, list[LogLine]]] = []
        self.stored: list[tuple[str, StoreGet | StoreSet]] = []
        self.damaged: list[tuple[Run, bool]] = []
        self.quotas = Quotas({**DEFAULTS, **(defaults or {})}, clock=lambda: self.now)
        self.manager = RunManager(
            LIMITS,
            self.quotas,
            on_start=self.started.append,
            on_finish=lambda record, lines: self.finished.append((record, lines)),
            on_store=lambda worker, tenant, request: self.stored.append((tenant, request)),
            on_damaged=lambda run, again: self.damaged.append((run, again)),
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )

    def worker(self, number: int) -> Worker:
        return self.manager.add_worker(number, lambda message: self.send(number, message), lambda: self.unsent[number])

    def send(self, number: int, message: GatewayToWorker) -> None:
        self.sent.append((number, message))

    def start(self, number: int, tenant: str = "alice", data: bytes = b"") -> tuple[Run, RecordingSink]:
        sink = RecordingSink()
        run = self.manager.start(
            number=number,
            tenant=tenant,
            module="m",
            sha256="0",
            artifact="a",
            artifact_sha256="1",
            data=data,
            seed=1,
            sink=sink,
        )
        return run, sink

    def end(self, worker: Worker, run: int, error: ErrorInfo | None = None) -> None:
        end = RunFinished(run, "complete" if error is None else "error", 0, error, Usage())
        self.manager.events(worker, [end])

    def starts(self) -> list[int]:
        return [message.run for _, message in self.sent if isinstance(message, StartRun)]

    def shares(self) -> list[tuple[int, float]]:
        """What the workers were told, and forget it."""
        told = [(number, message.fuel_per_second) for number, message in self.sent if isinstance(message, TenantShare)]
        self.sent.clear()
        return told

    def credit(self) -> int:
        return sum(message.size for _, message in self.sent if isinstance(message, Credit))


def refused(act: Any, *arguments: Any, **named: Any) -> RealmError:
    with pytest.raises(RealmError) as caught:
        act(*arguments, **named)
    return caught.value
