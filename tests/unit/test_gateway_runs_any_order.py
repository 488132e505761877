"""The run manager: whatever happens in whatever order, it keeps account and forgets in the end."""

from __future__ import annotations

import contextlib
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from realm.errors import RealmError
from realm.gateway.quotas import MESSAGE_BYTES
from realm.gateway.run import Run, Worker
from realm.run_messages import (
    CancelRun,
    ErrorInfo,
    GatewayToWorker,
    Output,
    RunFinished,
    StartRun,
    StoreGet,
    TenantShare,
    Usage,
)
from tests.run_manager import DEFAULTS, LIMITS, Host, RecordingSink

INDEX = st.integers(0, 9)


class RunMachine(RuleBasedStateMachine):
    """Starts, outputs, cancels, ends, lost clients, workers and engines, new limits, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.host = Host()
        self.host.send = self.sent  # type: ignore[method-assign]
        self.alive: dict[int, Worker] = {}
        self.dying: dict[int, Worker] = {}
        self.open: dict[int, tuple[Run, RecordingSink]] = {}
        self.preparing: list[tuple[str, int, contextlib.AbstractContextManager[None]]] = []
        self.ended: list[RecordingSink] = []
        self.order: dict[str, list[int]] = {}
        self.shares: dict[tuple[int, str], float] = {}
        self.numbers = 0
        self.refused = False

    def sent(self, number: int, message: GatewayToWorker) -> None:
        """Each message, as it is sent."""
        self.host.sent.append((number, message))
        if isinstance(message, TenantShare):
            self.shares[number, message.tenant] = message.fuel_per_second
        elif isinstance(message, StartRun):
            use = self.host.quotas.of(message.tenant)
            assert not self.refused and use.running <= use.limits.running_guests
            assert len(self.alive[number].runs) <= LIMITS.runs_per_worker
            assert (number, message.tenant) in self.shares
            run = self.host.manager.runs[message.run]
            if not run.again:
                order = self.order.setdefault(message.tenant, [])
                assert not order or order[-1] < message.run, "first come, first served"
                order.append(message.run)

    def run(self, index: int) -> int:
        """A run that is open, if there is any; index 0 takes any number that was ever given."""
        opened = sorted(self.open)
        return opened[index % len(opened)] if index and opened else index % (self.numbers + 1)

    def lost(self, index: int) -> int | None:
        return list(self.alive)[index % len(self.alive)] if self.alive else None

    @initialize(count=st.integers(0, 2))
    def begin(self, count: int) -> None:
        for _ in range(count):
            self.join()

    @rule()
    def join(self) -> None:
        self.numbers += 1
        worker = Worker(self.numbers, lambda message: None)
        # Known before it joins, since joining starts what waits.
        self.alive[self.numbers] = worker
        self.alive[self.numbers] = self.host.worker(self.numbers)

    @rule(tenants=st.lists(st.sampled_from(["alice", "bob", "carol"]), max_size=5), size=st.sampled_from([0, 10, 2000]))
    def start_some(self, tenants: list[str], size: int) -> None:
        for tenant in tenants:
            self.start(tenant, size)

    def start(self, tenant: str, size: int) -> None:
        self.numbers += 1
        use = self.host.quotas.of(tenant)
        before = (use.running, use.waiting, use.waiting_bytes)
        try:
            self.open[self.numbers] = self.host.start(self.numbers, tenant, b"x" * size)
        except RealmError as error:
            assert (use.running, use.waiting, use.waiting_bytes) == before
            if self.refused:
                assert error.code == "engine_lost"
            elif error.code == "rate_limited":
                assert error.details["name"] == "waiting_guests" and use.waiting >= use.limits.waiting_guests
            else:
                assert error.code == "busy" and use.waiting_bytes + size + MESSAGE_BYTES > LIMITS.waiting_bytes

    @rule(tenant=st.sampled_from(["alice", "bob"]), size=st.integers(0, 100))
    def prepare(self, tenant: str, size: int) -> None:
        context = self.host.manager.preparing(tenant, size)
        with contextlib.suppress(RealmError):
            context.__enter__()
            self.preparing.append((tenant, size, context))

    @rule()
    def prepared(self) -> None:
        if self.preparing:
            self.preparing.pop(0)[2].__exit__(None, None, None)

    @rule(index=INDEX, data=st.binary(max_size=40), behind=st.booleans(), collects=st.booleans())
    def say(self, index: int, data: bytes, behind: bool, collects: bool) -> None:
        """Also of runs that are over, and from workers that do not have them."""
        run = self.run(index)
        if run in self.open:
            self.open[run][1].behind = behind
            self.open[run][1].collects |= collects
        for worker in self.alive.values():
            self.host.manager.events(worker, [Output(run, data, 1), StoreGet(1, run, "k")])

    @rule(index=INDEX, data=st.binary(max_size=40))
    def tell(self, index: int, data: bytes) -> None:
        run = self.run(index)
        if run in self.open:
            with contextlib.suppress(RealmError):
                self.host.manager.message(self.open[run][0], data)

    @rule(index=INDEX)
    def cancel(self, index: int) -> None:
        run = self.run(index)
        if run in self.open:
            self.host.manager.cancel(self.open[run][0], "test")
            self.settle()

    @rule(index=INDEX)
    def vanish(self, index: int) -> None:
        run = self.run(index)
        if run in self.open:
            self.host.manager.abandon(self.open[run][0])
            self.settle()

    @rule(index=INDEX, outcome=st.sampled_from(["complete", "error", "cancelled"]))
    def finish(self, index: int, outcome: str) -> None:
        run = self.run(index)
        for worker in self.alive.values():
            self.host.manager.events(worker, [RunFinished(run, outcome, 0, None, Usage())])
        self.settle()

    @rule(index=INDEX)
    def damage(self, index: int) -> None:
        run = self.run(index)
        for worker in self.alive.values():
            error = ErrorInfo("artifact_damaged", "test")
            self.host.manager.events(worker, [RunFinished(run, "error", 0, error, Usage())])
        self.settle()

    @rule(works=st.booleans())
    def made_anew(self, works: bool) -> None:
        """As the gateway does, of runs that may have ended meanwhile."""
        damaged, self.host.damaged = self.host.damaged, []
        for run, again in damaged:
            if not again:
                continue
            if works:
                self.host.manager.resume(run, "new", "2")
            elif run.number in self.host.manager.runs:
                self.host.manager.fail([run], RealmError("compile_limit", "test"))
        self.settle()

    @rule(index=INDEX)
    def die(self, index: int) -> None:
        worker = self.lost(index)
        if worker is not None:
            lost = self.dying[worker] = self.alive.pop(worker)
            self.host.manager.lose_worker(lost)

    @rule()
    def bury(self) -> None:
        """A moment after its loss."""
        for lost in self.dying.values():
            self.host.manager.fail(lost.runs.values(), RealmError("worker_lost", "test"))
        self.dying.clear()
        self.settle()

    @rule(back=st.sampled_from([True, True, False]))
    def engine_dies(self, back: bool) -> None:
        self.lose_engine()
        if back:
            self.regain_engine()

    def lose_engine(self) -> None:
        self.refused = True
        error = RealmError("engine_lost", "test")
        self.host.manager.refuse(error)
        self.host.manager.fail(self.host.manager.runs.values(), error)
        self.settle()
        assert not self.open

    @rule()
    def regain_engine(self) -> None:
        self.refused = False
        self.host.manager.refuse(None)

    @rule(tenant=st.sampled_from([None, "alice"]), running=st.integers(0, 5), fuel=st.sampled_from([10**6, 10**9]))
    def change(self, tenant: str | None, running: int, fuel: int) -> None:
        values = {"running_guests": running, "fuel_per_second": fuel}
        if tenant is None:
            self.host.quotas.set_defaults({**DEFAULTS, **values})
        else:
            self.host.quotas.set_tenant(tenant, values)
        self.host.manager.limits_changed(self.host.quotas.known)

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.host.now += seconds
        left = self.host.manager.expire()
        assert left is None or 0 < left <= LIMITS.worker_wait_seconds
        self.settle()

    def settle(self) -> None:
        """Compare with what the manager says has ended."""
        for number in self.open.keys() - self.host.manager.runs.keys():
            self.ended.append(self.open.pop(number)[1])

    @invariant()
    def accounted(self) -> None:
        self.settle()
        manager, quotas = self.host.manager, self.host.quotas
        runs = [run for run, _ in self.open.values()]
        workers = {**self.alive, **self.dying}
        assert manager.runs == {run.number: run for run in runs}
        assert sorted(n for worker in workers.values() for n in worker.runs) == sorted(
            run.number for run in runs if run.worker is not None
        )
        for tenant in quotas.known:
            use = quotas.of(tenant)
            mine = [run for run in runs if run.tenant == tenant]
            held = [size + MESSAGE_BYTES for name, size, _ in self.preparing if name == tenant]
            assert list(manager.of(tenant)) == sorted(mine, key=lambda run: -run.number)
            assert use.running == sum(run.worker is not None for run in mine)
            assert use.waiting == sum(run.worker is None for run in mine) + len(held)
            assert use.waiting_bytes == sum(run.held for run in mine) + sum(held)
            assert use.collected == sum(run.collected for run in mine)
            having = [worker for worker in self.alive.values() if worker.tenants.get(tenant)]
            for worker in having:
                assert self.shares[worker.number, tenant] == use.limits.fuel_per_second / len(having)
                assert worker.tenants[tenant] == sum(run.tenant == tenant for run in worker.runs.values())
            # Nothing waits that could run.
            anew = {run.number for run, again in self.host.damaged if again}
            queued = [run for run in mine if run.worker is None and run.number not in anew]
            room = any(len(worker.runs) < LIMITS.runs_per_worker for worker in self.alive.values())
            assert not (queued and room and use.running < use.limits.running_guests and not self.refused)
        assert len(self.host.finished) == len(self.host.started) - len(self.open) == len(self.ended)
        assert all(len(sink.ends) <= 1 for sink in self.ended)
        cancels = Counter(message.run for _, message in self.host.sent if isinstance(message, CancelRun))
        assert all(count == 1 for count in cancels.values())

    def teardown(self) -> None:
        for _, _, context in self.preparing:
            context.__exit__(None, None, None)
        self.preparing.clear()
        self.lose_engine()
        manager = self.host.manager
        assert not manager.runs and not manager._of_tenant and not manager._waiting
        assert not manager._workers._having and self.host.quotas.in_use == []
        assert all(use.waiting_bytes == use.collected == 0 for use in map(self.host.quotas.of, self.host.quotas.known))


TestRuns = RunMachine.TestCase
TestRuns.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
