"""Whose guest runs next: fair between tenants, within each tenant's fuel rate, and nobody for ever not."""

from __future__ import annotations

import pytest

from realm.guests import slices
from realm.guests.outputs import LONGEST_SECONDS
from realm.guests.run import GuestRun
from realm.guests.runtime import GuestRuntime
from realm.guests.tenants import BURST_SECONDS, DEFAULT_RATE, KEEP_SECONDS, Schedule
from realm.run_messages import CancelRun, RunFinished, RunLimits, StartRun, TenantShare
from tests.fakes import Host, compiled, digest
from tests.wat import GENERATE, SPIN, expected, guest, sampling

# --- order of turns ---------------------------------------------------------------------------------


def test_guests_the_engine_answered_run_before_spinning_ones() -> None:
    host = Host()
    host.start(SPIN)
    run = host.start(GENERATE, input=sampling())
    while not host.engine.forwards:
        host.turn(engine=False)
    for step in range(2, 8):
        host.deliver()
        turn = host.turn(engine=False)
        # One turn after its answer the guest's next call is out, spinner or not.
        assert len(host.engine.forwards) == step
        assert turn.busy
    assert len(host.output(run)) == 6


def test_a_spinning_guest_gives_way_and_can_be_cancelled() -> None:
    host = Host()
    run = host.start(SPIN)
    for _ in range(3):
        assert host.turn().busy
    host.runtime.cancel(CancelRun(run, "enough"))
    assert not host.turn().busy
    end = host.finished(run)
    assert end is not None
    assert end.outcome == "cancelled"
    assert end.usage.fuel >= 1_000_000
    host.check_empty()


class Seen:
    """Notes which run gets each slice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[GuestRun] = []
        advance = slices.Slices.advance

        def noted(this: slices.Slices, run: GuestRun) -> bool:
            self.order.append(run)
            return advance(this, run)

        monkeypatch.setattr(slices.Slices, "advance", noted)

    def take(self) -> str:
        """The tenants of the slices so far, and forget them."""
        tenants = "".join(run.tenant.name for run in self.order)
        self.order.clear()
        return tenants


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def test_a_tenant_with_many_spinning_guests_gets_no_more_than_one_with_one(seen: Seen) -> None:
    host = Host()
    for _ in range(20):
        host.start(SPIN)
    host.start(SPIN, tenant="b")
    # Their first slices, then some when all of them spin.
    while len(seen.order) < 40:
        host.turn()
    seen.take()
    while len(seen.order) < 60:
        host.turn()
    order = seen.take()
    assert abs(2 * order.count("b") - len(order)) <= 1


def test_the_guests_of_one_tenant_take_turns(seen: Seen) -> None:
    host = Host()
    for _ in range(3):
        host.start(SPIN)
    while len(seen.order) < 33:
        host.turn()
    numbers = [run.start.run for run in seen.order]
    assert all(sorted(numbers[at : at + 3]) == [1, 2, 3] for at in range(3, 30, 3))


# Computes for more than a slice after each answer, for ever.
HEAVY = guest(
    """(local.set $a (call $seq_new))
    (loop $again
      (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 0)))
      (drop (call $seq_truncate (local.get $a) (i32.const 0)))
      (local.set $b (i32.const 0))
      (loop $l (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 500000))))
      (br $again))
    (i32.const 0)""",
    "seq_new",
    "seq_truncate",
    "forward",
)


def test_short_turns_of_one_tenant_come_before_the_second_slices_of_another(seen: Seen) -> None:
    host = Host()
    heavy = [host.start(HEAVY) for _ in range(10)]
    quiet = [host.start(GENERATE, input=sampling(), tenant="b") for _ in range(10)]
    while len(host.engine.forwards) < len(heavy) + len(quiet):
        host.turn(engine=False)
    for _ in range(6):
        forwards = len(host.engine.forwards)
        seen.take()
        host.deliver()
        host.turn(engine=False)
        order = seen.take()
        # One slice of the heavy tenant may come first, and one between each few of the quiet guests.
        assert order.index("b") <= 1
        assert order[: order.rindex("b")].count("a") <= 4
        quiets = {op.seq for op in host.engine.forwards[forwards:]}
        assert len(quiets) >= len(quiet)
        while len(host.engine.forwards) < forwards + len(heavy) + len(quiet):
            host.turn(engine=False)
    # Held output is due.
    host.now += LONGEST_SECONDS
    host.turn(engine=False)
    assert all(len(host.output(run)) >= 6 for run in quiet)


class Ticking(Host):
    """Each look at the clock takes a tenth of a millisecond."""

    def __init__(self) -> None:
        super().__init__()

        def clock() -> float:
            self.now += 0.0001
            return self.now

        self.runtime.clock = clock


def test_a_turn_ends_however_many_guests_compute(seen: Seen) -> None:
    host = Ticking()
    for _ in range(300):
        host.start(HEAVY, input=sampling(), first_call_seconds=1e6, wall_seconds=1e6)
    host.runtime.share(TenantShare("a", 1e15))
    while len(host.engine.forwards) < 300:
        host.turn(engine=False)
    seen.take()
    host.deliver()
    turn = host.turn(engine=False)
    # Each slice is a visit here, of 0.1 ms at least: 2 ms for the tenant and 8 ms for what comes after.
    assert turn.busy
    assert 10 <= len(seen.order) < 150
    for _ in range(200):
        host.turn(engine=False)
    assert len(set(seen.order)) == 300


def test_spinning_guests_are_not_starved_by_answered_ones(seen: Seen) -> None:
    host = Host()
    host.start(SPIN, tenant="b")
    run = host.start(
        guest(
            """(local.set $a (call $seq_new))
        (loop $again
          (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 0)))
          (drop (call $seq_truncate (local.get $a) (i32.const 0)))
          (br $again)) (i32.const 0)""",
            "seq_new",
            "seq_truncate",
            "forward",
        )
    )
    while not host.engine.forwards:
        host.turn(engine=False)
    seen.take()
    for _ in range(100):
        # Every turn has an answered guest.
        host.deliver()
        host.now += 0.001
        host.turn(engine=False)
    slices_of_the_spinner = seen.take().count("b")
    assert 20 <= slices_of_the_spinner <= 30
    assert len(host.engine.forwards) == 101
    assert host.finished(run) is None


# --- fuel per second --------------------------------------------------------------------------------


def test_a_tenant_burns_no_more_than_its_rate(seen: Seen) -> None:
    host = Host()
    host.runtime.share(TenantShare("a", 20_000_000.0))
    run = host.start(SPIN)
    began = host.now
    for _ in range(2000):
        turn = host.turn()
        if not turn.busy:
            # Nothing can run: the worker may sleep until the tenant has fuel again.
            assert turn.deadline is not None and turn.deadline > host.now
            host.now = turn.deadline
        if host.now - began > 5:
            break
    host.runtime.cancel(CancelRun(run, "enough"))
    host.turn()
    end = host.finished(run)
    assert end is not None
    seconds = host.now - began
    burnt = end.usage.fuel
    assert 20e6 * seconds * 0.9 <= burnt <= 20e6 * (seconds + BURST_SECONDS) + 20_000_000
    assert end.usage.throttled_seconds == pytest.approx(seconds, rel=0.1)
    host.check_empty()


def test_time_that_fuel_does_not_show_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Touching fresh pages burns hardly any fuel and much time: the tenant's rate covers it all the same."""
    host = Host()
    run = host.start(SPIN)
    advance = slices.Slices.advance

    def dear(this: slices.Slices, run: GuestRun) -> bool:
        host.cpu += 0.022
        return advance(this, run)

    monkeypatch.setattr(slices.Slices, "advance", dear)
    host.turn()
    (tenant,) = host.runtime.schedule.tenants
    slice_of_fuel = slices.FUEL_SLICE
    taken = tenant.bucket.used(host.now)
    turns = host.cpu / 0.022
    assert taken == pytest.approx(turns * (0.021 * slices.FUEL_A_SECOND + slice_of_fuel), rel=0.05)
    host.runtime.cancel(CancelRun(run, "enough"))


def test_one_tenants_rate_is_not_anothers() -> None:
    host = Host()
    host.runtime.share(TenantShare("a", 1_000_000.0))
    slow = host.start(SPIN)
    quick = host.start(GENERATE, input=sampling(), tenant="b")
    run_until(host, quick)
    assert host.output(quick) == expected()
    assert host.finished(quick).usage.throttled_seconds == 0  # type: ignore[union-attr]
    assert host.finished(slow) is None


def run_until(host: Host, run: int) -> RunFinished:
    for _ in range(10_000):
        end = host.finished(run)
        if end is not None:
            return end
        host.turn()
    raise AssertionError("the run does not end")


def test_answered_guests_of_a_tenant_in_debt_wait() -> None:
    host = Host()
    host.runtime.share(TenantShare("a", 4_000_000.0))
    run = host.start(GENERATE, input=sampling())
    host.start(SPIN)
    while not host.engine.forwards or host.last.busy:
        host.turn(engine=False)
    host.deliver()
    forwards = len(host.engine.forwards)
    for _ in range(5):
        turn = host.turn(engine=False)
        assert not turn.busy and turn.deadline is not None
        assert len(host.engine.forwards) == forwards
    assert turn.deadline is not None
    host.now = turn.deadline
    host.turn(engine=False)
    assert len(host.engine.forwards) == forwards + 1
    host.runtime.cancel(CancelRun(run, "enough"))
    host.turn()
    assert host.finished(run).usage.throttled_seconds > 0  # type: ignore[union-attr]


def test_work_of_the_host_counts_too() -> None:
    host = Host()
    host.runtime.share(TenantShare("a", 10_000_000.0))
    wat = guest("(loop $l (drop (call $now)) (br $l)) (i32.const 0)", "now")
    host.start(wat)
    for _ in range(100):
        if not host.turn().busy:
            return
    raise AssertionError("host calls cost nothing")


def test_being_held_back_is_no_reason_to_end_a_guest_that_has_not_begun() -> None:
    host = Host()
    host.runtime.share(TenantShare("a", 1_000_000.0))
    host.start(SPIN, first_call_seconds=1e6)
    while host.turn().busy:
        pass
    late = host.start(GENERATE, input=sampling(), first_call_seconds=0.5)
    for _ in range(20):
        turn = host.turn()
        assert host.finished(late) is None or host.finished(late).error is None  # type: ignore[union-attr]
        if not turn.busy and turn.deadline is not None:
            host.now = turn.deadline
        if host.engine.forwards:
            return
    raise AssertionError("it never began")


def test_a_share_of_nothing_holds_for_ever_but_never_for_an_infinite_time() -> None:
    host = Host()
    run = host.start(SPIN, wall_seconds=200.0, first_call_seconds=1e6)
    host.runtime.share(TenantShare("a", 0.0))
    for _ in range(20):
        turn = host.turn()
        end = host.finished(run)
        if end is not None:
            break
        if not turn.busy:
            assert turn.deadline is not None
            assert host.now < turn.deadline <= host.now + 60
            host.now = turn.deadline
    assert end is not None and end.error is not None
    assert end.error.code == "wall_time_exceeded"
    assert end.usage.throttled_seconds == pytest.approx(200.0)
    host.turn()
    host.check_empty()


def test_a_changed_share_counts_at_once() -> None:
    host = Host()
    host.runtime.share(TenantShare("a", 1_000_000.0))
    host.start(SPIN)
    while host.turn().busy:
        pass
    assert host.last.deadline is not None and host.last.deadline > host.now + 0.2
    host.runtime.share(TenantShare("a", 1e9))
    host.now += 0.1
    assert host.turn().busy


def test_debts_outlive_runs_and_buckets_do_not_outlive_debts() -> None:
    host = Host()
    schedule: Schedule = host.runtime.schedule
    host.runtime.share(TenantShare("a", 1_000_000.0))
    run = host.start(SPIN)
    while host.turn().busy:
        pass
    host.runtime.cancel(CancelRun(run, "enough"))
    host.start(SPIN)
    # A new run does not begin with a new bucket.
    assert not host.turn().busy
    host.runtime.cancel(CancelRun(2, "enough"))
    host.turn()
    host.check_empty()
    schedule.forget(host.now + KEEP_SECONDS - 1)
    assert [tenant.name for tenant in schedule.tenants] == ["a"]
    schedule.forget(host.now + KEEP_SECONDS + 5)
    assert not list(schedule.tenants)
    host.start(SPIN)
    assert next(iter(schedule.tenants)).bucket.rate == DEFAULT_RATE


def test_thousands_of_tenants_leave_nothing() -> None:
    host = Host()
    path = compiled(guest("(i32.const 0)"))
    runtime: GuestRuntime = host.runtime
    for number in range(2000):
        runtime.start(StartRun(number, f"t{number}", "m", path, b"", 1, RunLimits(), artifact_sha256=digest(path)))
        runtime.turn(host.now)
        host.now += 0.1
    assert runtime.live == 0
    assert len(list(runtime.schedule.tenants)) < 300
    runtime.check()
