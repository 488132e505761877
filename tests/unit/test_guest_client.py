"""A guest and its client: output with credit, messages, time-outs, cancelling in every state."""

from __future__ import annotations

import pytest

from realm.guests import run as run_module
from realm.guests import slices
from realm.guests.abi import ErrorCode
from realm.guests.fiber_types import FUEL_SLICE
from realm.guests.run import GuestRun
from realm.guests.runtime import CLOSING_SECONDS
from realm.messages import EndRun, EngineReply, ForwardDone
from realm.run_messages import CancelRun, ClientMessage, Credit, Output
from tests.fakes import Host
from tests.wat import GENERATE, RECEIVE, SPIN, guest, sampling

# --- client -----------------------------------------------------------------------------------------


def test_emit_waits_for_credit() -> None:
    body = "(call $emit (i32.const 0) (i32.const 100))"
    host = Host()
    run = host.start(guest(body, "emit"), credit=30)
    host.settle()
    assert len(host.output(run)) == 30
    host.runtime.credit(Credit(run, 50))
    host.settle()
    assert len(host.output(run)) == 80
    assert host.finished(run) is None
    host.runtime.credit(Credit(run, 50))
    host.settle()
    assert host.finished(run) is not None
    assert len(host.output(run)) == 100
    assert [len(e.data) for e in host.events if isinstance(e, Output)] == [30, 50, 20]


def test_recv_takes_messages_in_order() -> None:
    body = """(drop (call $emit (i32.const 0) (call $recv (i32.const 0) (i32.const 16) (i32.const 5000))))
      (if (i32.ne (call $recv (i32.const 0) (i32.const 2) (i32.const 5000)) (i32.const 5)) (then unreachable))
      (drop (call $emit (i32.const 0) (call $recv (i32.const 0) (i32.const 5) (i32.const 0))))
      (call $recv (i32.const 0) (i32.const 16) (i32.const 0))"""
    host = Host()
    run = host.start(guest(body, "emit", "recv"))
    host.settle()
    host.runtime.message(ClientMessage(run, b"one"))
    host.runtime.message(ClientMessage(run, b"three"))
    host.settle()
    assert host.output(run) == b"onethree"
    end = host.finished(run)
    assert end is not None
    assert end.code == ErrorCode.TIMED_OUT


def test_recv_times_out() -> None:
    host = Host()
    run = host.start(RECEIVE)
    host.settle()
    assert host.last.deadline == host.now + 5
    host.now += 4.9
    host.settle()
    assert host.finished(run) is None
    host.now += 0.1
    host.settle()
    end = host.finished(run)
    assert end is not None
    assert end.code == ErrorCode.TIMED_OUT


def test_recv_without_a_client_is_closed() -> None:
    host = Host()
    run = host.start(RECEIVE)
    host.settle()
    host.runtime.message(ClientMessage(run, b"last"))
    host.runtime.close_input(run)
    host.settle()
    end = host.finished(run)
    assert end is not None
    assert end.code == 4
    second = host.start(RECEIVE)
    host.runtime.close_input(second)
    host.settle()
    end = host.finished(second)
    assert end is not None
    assert end.code == ErrorCode.CLOSED


def test_the_inbox_is_bounded() -> None:
    host = Host()
    run = host.start(guest("(loop $l (br $l)) (i32.const 0)"))
    for _ in range(9):
        host.runtime.message(ClientMessage(run, bytes(1 << 20)))
    host.turn()
    assert sum("dropped" in text for _, text in host.logs(run)) == 5


@pytest.mark.parametrize("state", ["fresh", "forward", "answered", "recv", "emit", "store", "spinning", "finished"])
def test_cancel_in_every_state(state: str) -> None:
    bodies = {
        "recv": RECEIVE,
        "emit": guest("(call $emit (i32.const 0) (i32.const 10))", "emit"),
        "store": guest("(call $kv_get (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 8))", "kv_get"),
        "spinning": SPIN,
    }
    host = Host()
    host.answer_store = False
    run = host.start(bodies.get(state, GENERATE), input=sampling(), credit=0 if state == "emit" else 100)
    if state != "fresh":
        host.turn(engine=False)
    if state == "answered":
        host.deliver()
    if state == "finished":
        host.settle()
    host.runtime.cancel(CancelRun(run, "client gone"))
    host.runtime.cancel(CancelRun(run, "again"))
    turn = host.turn(engine=False)
    end = host.finished(run)
    assert end is not None
    assert end.outcome == ("complete" if state == "finished" else "cancelled")
    assert any(isinstance(op, EndRun) for op in turn.ops) != (state == "finished")
    assert not turn.busy
    host.deliver()
    host.settle()
    host.check_empty()


def test_a_cancelled_guest_may_say_goodbye_but_not_stay() -> None:
    body = """(local.set $a (call $recv (i32.const 0) (i32.const 16) (i32.const 60000)))
      (drop (call $log (i32.const 1) (i32.const 100) (i32.const 3)))
      (if (i32.ne (call $emit (i32.const 0) (i32.const 1)) (i32.const -10)) (then unreachable))
      (loop $l (br $l)) (local.get $a)"""
    host = Host()
    run = host.start(guest(body, "recv", "log", "emit", extra='(data (i32.const 100) "bye")'))
    host.settle()
    host.runtime.cancel(CancelRun(run, "client gone"))
    host.turn()
    end = host.finished(run)
    assert end is not None
    assert end.outcome == "cancelled"
    assert host.logs(run) == [("info", "bye")]
    host.check_empty()


def test_the_end_of_a_client_with_many_guests_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced: list[int] = []
    advance = slices.Slices.advance

    def noting(this: slices.Slices, run: GuestRun) -> bool:
        advanced.append(run.start.run)
        return advance(this, run)

    host = Host()
    monkeypatch.setattr(slices.Slices, "advance", noting)
    other = host.start(SPIN, tenant="b")
    body = "(drop (call $recv (i32.const 0) (i32.const 16) (i32.const -1))) (loop $l (br $l)) (i32.const 0)"
    runs = [host.start(guest(body, "recv")) for _ in range(40)]
    while any(host.runtime._runs[run].on_wake is None for run in runs):
        host.turn()
    (tenant,) = (tenant for tenant in host.runtime.schedule.tenants if tenant.name == "a")
    used = tenant.bucket.used(host.now)
    advanced.clear()
    for run in runs:
        host.runtime.cancel(CancelRun(run, "client gone"))
        host.runtime.cancel(CancelRun(run, "again"))
        host.runtime.credit(Credit(run, 1))
        host.runtime.message(ClientMessage(run, b"late"))
    assert advanced == []
    while any(host.finished(run) is None for run in runs):
        host.turn()
        host.runtime.check()
    # One slice each, in turn with the other tenant, and paid for.
    assert sorted(run for run in advanced if run != other) == runs
    assert advanced.count(other) >= len(runs) // 2
    assert tenant.bucket.used(host.now) - used >= len(runs) * FUEL_SLICE * 0.9
    assert {host.finished(run).outcome for run in runs} == {"cancelled"}  # type: ignore[union-attr]
    host.runtime.close()
    host.turn()
    host.check_empty()


def test_a_cancelled_guest_whose_tenant_is_held_back_is_cut() -> None:
    host = Host()
    run = host.start(RECEIVE)
    host.settle()
    (tenant,) = host.runtime.schedule.tenants
    tenant.bucket.spend(1e12, host.now)
    host.runtime.cancel(CancelRun(run, "client gone"))
    turn = host.turn()
    assert host.finished(run) is None and not turn.busy
    assert turn.deadline == host.now + CLOSING_SECONDS
    host.now = turn.deadline
    host.turn()
    end = host.finished(run)
    assert end is not None and end.outcome == "cancelled"
    host.check_empty()


def test_the_inboxes_of_a_tenant_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "MAX_TENANT_INBOXES", 1 << 20)
    host = Host()
    first, second = host.start(SPIN), host.start(SPIN)
    other = host.start(SPIN, tenant="b")
    room = (1 << 20) - run_module.MESSAGE_BYTES
    for run, data in ((first, bytes(room)), (second, b""), (other, bytes(room))):
        host.runtime.message(ClientMessage(run, data))
    host.runtime.check()
    host.turn()
    dropped = {run: sum("dropped" in text for _, text in host.logs(run)) for run in (first, second, other)}
    assert dropped == {first: 0, second: 1, other: 0}
    # With its run the messages go.
    host.runtime.cancel(CancelRun(first, "enough"))
    host.runtime.message(ClientMessage(second, b""))
    assert len(host.runtime._runs[second].inbox) == 1
    host.runtime.close()
    host.turn()
    host.check_empty()


def test_detokenize_streams_whole_characters() -> None:
    # é is two tokens here: the first call gives nothing, the second the character.
    body = """
      (i32.store (i32.const 512) (i32.const 97)) (i32.store (i32.const 516) (i32.const 98))
      (local.set $a (call $detokenize (i32.const 3) (i32.const 512) (i32.const 2) (i32.const 0) (i32.const 0)
        (i32.const 1)))
      (if (i32.ne (local.get $a) (i32.const 2)) (then unreachable))
      (local.set $a (call $detokenize (i32.const 3) (i32.const 512) (i32.const 2) (i32.const 0) (i32.const 0)
        (i32.const 9)))
      (drop (call $emit (i32.const 0) (local.get $a)))
      (local.set $a (call $detokenize (i32.const 3) (i32.const 512) (i32.const 0) (i32.const 0) (i32.const 0)
        (i32.const 9)))
      (if (i32.ne (call $detokenize (i32.const 3) (i32.const 512) (i32.const 1) (i32.const 1) (i32.const 0)
        (i32.const 9)) (i32.const 1)) (then unreachable))
      (call $detokenize (i32.const 3) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 9))"""
    host = Host()
    end = host.run(guest(body, "detokenize", "emit"))
    assert end.error is not None
    assert end.error.details["name"] == "invalid_argument"
    assert host.output(1) == b"ab"


def test_results_for_nobody_are_dropped() -> None:
    host = Host()
    host.runtime.deliver(EngineReply(1, [ForwardDone(99, 1, 0.0, 0)]))
    host.runtime.message(ClientMessage(9, b""))
    host.runtime.credit(Credit(9, 1))
    host.runtime.cancel(CancelRun(9, ""))
    assert host.turn().ops == []


def test_closing_the_runtime_ends_all_runs() -> None:
    host = Host()
    for wat in (GENERATE, SPIN, RECEIVE):
        host.start(wat, input=sampling())
    host.turn(engine=False)
    host.runtime.close()
    host.turn(engine=False)
    host.deliver()
    host.check_empty()
