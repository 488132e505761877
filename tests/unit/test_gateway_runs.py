"""The run manager alone: whatever happens in whatever order, it keeps account and forgets in the end."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from realm.errors import RealmError
from realm.gateway.runs import Run, RunManager, Worker
from realm.messages import (
    CancelRun,
    Credit,
    GatewayToWorker,
    Log,
    Output,
    RunFinished,
    RunLimits,
    StartRun,
    StoreGet,
    StoreSet,
    Usage,
)
from realm.registry.records import LogLine, RunRecord
from realm.settings import GatewayLimits

LIMITS = GatewayLimits(runs=3, credit_bytes=100, log_bytes=20, log_lines=3)


class RecordingSink:
    """Keeps what it gets; ``behind`` is set by the test."""

    def __init__(self) -> None:
        self.behind = False
        self.text = ""
        self.ends: list[RunFinished] = []

    def output(self, run: Run, text: str) -> None:
        assert text and not self.ends
        self.text += text

    def log(self, run: Run, level: str, text: str) -> None:
        assert not self.ends

    def finished(self, run: Run, outcome: RunFinished) -> None:
        self.ends.append(outcome)


class Host:
    """A manager with workers that only remember."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, GatewayToWorker]] = []
        self.started: list[RunRecord] = []
        self.finished: list[tuple[RunRecord, list[LogLine]]] = []
        self.stored: list[tuple[str, StoreGet | StoreSet]] = []
        self.manager = RunManager(
            LIMITS,
            on_start=self.started.append,
            on_finish=lambda record, lines: self.finished.append((record, lines)),
            on_store=lambda worker, tenant, request: self.stored.append((tenant, request)),
        )

    def worker(self, number: int) -> Worker:
        return self.manager.add_worker(number, lambda message: self.sent.append((number, message)))

    def start(self, number: int, tenant: str = "alice") -> tuple[Run, RecordingSink]:
        sink = RecordingSink()
        run = self.manager.start(
            number=number,
            tenant=tenant,
            module="m",
            sha256="0",
            artifact="a",
            data=b"",
            seed=1,
            limits=RunLimits(),
            sink=sink,
        )
        return run, sink

    def credit(self) -> int:
        return sum(message.size for _, message in self.sent if isinstance(message, Credit))


def test_credit_comes_in_quarters_and_not_while_behind() -> None:
    host = Host()
    worker = host.worker(1)
    run, sink = host.start(1)
    host.manager.events(worker, [Output(1, b"x" * 24, 1)])
    assert host.credit() == 0
    host.manager.events(worker, [Output(1, b"x", 1)])
    assert host.credit() == 25
    sink.behind = True
    host.manager.events(worker, [Output(1, b"x" * 30, 1), Output(1, b"x" * 30, 1)])
    assert host.credit() == 25
    sink.behind = False
    host.manager.drained([run])
    assert host.credit() == 85
    host.manager.drained([run])
    assert host.credit() == 85


def test_the_log_keeps_its_end() -> None:
    host = Host()
    worker = host.worker(1)
    host.start(1)
    host.manager.events(worker, [Log(1, "info", str(n) * 4) for n in range(9)])
    host.manager.events(worker, [RunFinished(1, "complete", 0, None, Usage())])
    ((_, lines),) = host.finished
    assert [line.text for line in lines] == ["6666", "7777", "8888"]
    host.start(2)
    host.manager.events(worker, [Log(2, "info", "x" * 1000), RunFinished(2, "complete", 0, None, Usage())])
    assert host.finished[-1][1] == []


def test_refusals_are_fresh_errors() -> None:
    host = Host()
    host.worker(1)
    host.manager.refuse(RealmError("engine_lost", "gone", retry_after=5.0))
    caught = []
    for number in range(2):
        with pytest.raises(RealmError) as error:
            host.start(number)
        caught.append(error.value)
    assert caught[0] is not caught[1] and caught[0].retry_after == 5.0
    host.manager.refuse(None)
    host.start(3)


def test_another_tenants_run_is_not_found() -> None:
    host = Host()
    host.worker(1)
    run, _ = host.start(1)
    assert host.manager.find("r1", "alice") is run and host.manager.find("r1", None) is run
    assert host.manager.find("r1", "bob") is None and host.manager.find("r2", "alice") is None


class RunMachine(RuleBasedStateMachine):
    """Starts, outputs, cancels, ends, lost clients, workers and engines, in any order."""

    runs: Bundle[int] = Bundle("runs")
    workers: Bundle[int] = Bundle("workers")

    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.alive: dict[int, Worker] = {}
        self.open: dict[int, tuple[Run, RecordingSink]] = {}
        self.ended: list[RecordingSink] = []
        self.numbers = 0

    @rule(target=workers)
    def join(self) -> int:
        self.numbers += 1
        self.alive[self.numbers] = self.host.worker(self.numbers)
        return self.numbers

    @rule(target=runs, tenant=st.sampled_from(["alice", "bob"]))
    def start(self, tenant: str) -> int:
        self.numbers += 1
        used = sum(run.tenant == tenant for run, _ in self.open.values())
        try:
            self.open[self.numbers] = self.host.start(self.numbers, tenant)
        except RealmError as error:
            assert (error.code, used) == ("busy", 3) or (error.code == "worker_lost" and not self.alive)
        else:
            assert used < 3 and self.alive
            number, message = self.host.sent[-1]
            assert isinstance(message, StartRun) and message.run == self.numbers
            loads = {number: len(worker.runs) for number, worker in self.alive.items()}
            assert loads[number] - 1 == min({**loads, number: loads[number] - 1}.values())
        return self.numbers

    @rule(run=runs, worker=workers, data=st.binary(max_size=40), behind=st.booleans())
    def say(self, run: int, worker: int, data: bytes, behind: bool) -> None:
        """Also of runs that are over, and from workers that do not have them."""
        if worker not in self.alive:
            return
        if run in self.open:
            self.open[run][1].behind = behind
        self.host.manager.events(self.alive[worker], [Output(run, data, 1), StoreGet(1, run, "k")])

    @rule(run=runs)
    def cancel(self, run: int) -> None:
        if run in self.open:
            self.host.manager.cancel(self.open[run][0], "test")

    @rule(run=runs)
    def vanish(self, run: int) -> None:
        if run in self.open:
            self.host.manager.abandon(self.open[run][0])

    @rule(run=runs, outcome=st.sampled_from(["complete", "error", "cancelled"]))
    def finish(self, run: int, outcome: str) -> None:
        for worker in self.alive.values():
            self.host.manager.events(worker, [RunFinished(run, outcome, 0, None, Usage())])
        self.over({run})

    @rule(worker=consumes(workers))
    def die(self, worker: int) -> None:
        lost = self.alive.pop(worker)
        gone = set(lost.runs)
        self.host.manager.lose_worker(lost)
        self.host.manager.fail(lost.runs.values(), RealmError("worker_lost", "test"))
        self.over(gone)

    @rule()
    def lose_engine(self) -> None:
        self.host.manager.fail(self.host.manager.runs.values(), RealmError("engine_lost", "test"))
        self.over(set(self.open))

    def over(self, runs: set[int]) -> None:
        for run in runs & self.open.keys():
            self.ended.append(self.open.pop(run)[1])

    @invariant()
    def accounted(self) -> None:
        manager = self.host.manager
        assert manager.runs.keys() == self.open.keys()
        assert sorted(run for worker in self.alive.values() for run in worker.runs) == sorted(self.open)
        assert manager._of_tenant == Counter(run.tenant for run, _ in self.open.values())
        assert len(self.host.finished) == len(self.host.started) - len(self.open) == len(self.ended)
        assert all(len(sink.ends) <= 1 for sink in self.ended)
        cancels = Counter(message.run for _, message in self.host.sent if isinstance(message, CancelRun))
        assert all(count == 1 for count in cancels.values())

    def teardown(self) -> None:
        self.lose_engine()
        assert not self.host.manager.runs and not self.host.manager._of_tenant


TestRuns = RunMachine.TestCase
TestRuns.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
