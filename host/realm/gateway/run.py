"""One run, the worker that has it, and where its results go: the nouns of :mod:`realm.gateway.runs`."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from realm.errors import RealmError
from realm.gateway.quotas import TenantUse
from realm.registry.bounds import fit_error
from realm.registry.records import LogLine
from realm.run_messages import ErrorInfo, GatewayToWorker, RunFinished, Usage

OUTCOMES = ("complete", "error", "cancelled")
LOG_LEVELS = frozenset(("debug", "info", "warning", "error"))


class Sink(Protocol):
    """Where a run's results go. None of its methods may block or raise."""

    @property
    def behind(self) -> bool:
        """The client has not taken what it was sent: give the guest no more credit."""

    @property
    def collects(self) -> bool:
        """The text is kept until the run ends."""

    def waiting(self, run: Run) -> None:
        """The run was taken and waits for a place. Not called for one that starts at once."""

    def started(self, run: Run) -> None:
        """A worker has the run."""

    def output(self, run: Run, text: str) -> None:
        """Some text; whole characters, never empty."""

    def log(self, run: Run, level: str, text: str) -> None: ...

    def finished(self, run: Run, outcome: RunFinished) -> None:
        """The last call."""


@dataclass(slots=True, eq=False)
class Worker:
    """A connected guest worker.

    Attributes:
        unsent: gives the bytes that its link still holds.
        tenants: how many of the runs are each tenant's.
        heard: messages received; who watches over workers sees whether it grows.
    """

    number: int
    send: Callable[[GatewayToWorker], None]
    unsent: Callable[[], int] = lambda: 0
    runs: dict[int, Run] = field(default_factory=dict)
    tenants: dict[str, int] = field(default_factory=dict)
    heard: int = 0


@dataclass(slots=True, eq=False)
class Run:
    """One run that waits or is in progress.

    Attributes:
        artifact, artifact_sha256: the compiled module's file and what it must hold.
        data: the input; None once it is not needed for a (second) start.
        sink: None once its client is gone.
        queued: when it came; began: when a worker got it. Both by the manager's clock.
        started: the same as people's time: when it came until a worker has it, then since when.
        worker: None while it waits.
        inbox: messages that came while it waits.
        held: bytes that count against the tenant's waiting bytes.
        again: this is its second start.
        collected: bytes of text that the sink keeps.
        failure: what the run ends with instead of having been cancelled.
    """

    number: int
    use: TenantUse
    module: str
    sha256: str
    artifact: str
    artifact_sha256: str
    data: bytes | None
    seed: int
    sink: Sink | None
    queued: float
    started: float
    began: float = 0.0
    worker: Worker | None = None
    inbox: list[bytes] = field(default_factory=list)
    held: int = 0
    again: bool = False
    withheld: int = 0
    new_tokens: int = 0
    output_bytes: int = 0
    collected: int = 0
    cancelled: str | None = None
    failure: RealmError | None = None
    log: deque[LogLine] = field(default_factory=deque)
    log_bytes: int = 0
    decoder: codecs.IncrementalDecoder | None = None

    @property
    def id(self) -> str:
        return f"r{self.number}"

    @property
    def tenant(self) -> str:
        return self.use.tenant

    def describe(self, now: float) -> dict[str, Any]:
        """The entry of ``ps``; usage has what the gateway itself has seen."""
        waits = self.worker is None
        return {
            "run": self.id,
            "module": self.module,
            "status": "waiting" if waits else "cancelling" if self.cancelled else "running",
            "started": self.started,
            "seconds": now - (self.queued if waits else self.began),
            "usage": {
                "new_tokens": self.new_tokens,
                "output_bytes": self.output_bytes,
                "wall_seconds": self.wall_seconds(now),
            },
        }

    def wall_seconds(self, now: float) -> float:
        """Seconds in a worker: waiting does not count."""
        return 0.0 if self.worker is None else now - self.began


def parse_run(run: str) -> int:
    """The number in a run's id, which the parameters' check has already matched."""
    return int(run[1:])


def usage_data(usage: Usage) -> dict[str, Any]:
    """``usage`` as the wire has it."""
    return msgspec.structs.asdict(usage)


def check_end(event: RunFinished) -> None:
    """Make sure of what a worker says at a run's end, before anything is done about it; shorten a long error.

    Raises:
        ValueError: an outcome that there is not, or an error that cannot be sent on as JSON.
    """
    if event.outcome not in OUTCOMES:
        raise ValueError("a run ended with an outcome that there is not")
    if event.error is not None:
        try:
            event.error = ErrorInfo(**fit_error(msgspec.structs.asdict(event.error)))
        except (TypeError, RecursionError, msgspec.MsgspecError) as error:
            raise ValueError("a run's error cannot be sent on") from error
