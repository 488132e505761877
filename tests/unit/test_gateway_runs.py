"""The run manager alone: who waits and who starts, what workers are told, what is given back."""

from __future__ import annotations

import contextlib

import pytest

from realm.errors import RealmError
from realm.gateway.quotas import MESSAGE_BYTES
from realm.run_messages import (
    CancelRun,
    ClientMessage,
    ErrorInfo,
    Log,
    Output,
    RunFinished,
    StartRun,
    StoreSet,
    TenantShare,
    Usage,
)
from tests.run_manager import DAMAGED, Host, refused


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
        caught.append(refused(host.start, number))
    assert caught[0] is not caught[1] and caught[0].retry_after == 5.0
    host.manager.refuse(None)
    host.start(3)


def test_another_tenants_run_is_not_found() -> None:
    host = Host()
    host.worker(1)
    run, _ = host.start(1)
    assert host.manager.find("r1", "alice") is run and host.manager.find("r1", None) is run
    assert host.manager.find("r1", "bob") is None and host.manager.find("r2", "alice") is None


# --- waiting -------------------------------------------------------------------------------------


def test_runs_wait_for_their_tenants_places_and_start_in_order() -> None:
    host = Host()
    worker = host.worker(1)
    opened = [host.start(number) for number in range(1, 8)]
    assert host.starts() == [1, 2, 3]
    assert [sink.told for _, sink in opened] == [["started"]] * 3 + [["waiting"]] * 4
    error = refused(host.start, 8)
    assert error.code == "rate_limited" and error.retry_after is not None
    assert error.details == {"name": "waiting_guests", "limit": 4, "used": 4, "unit": "runs"}
    # Another tenant is not held up by it.
    host.start(9, "bob")
    assert host.starts() == [1, 2, 3, 9]
    host.end(worker, 2)
    assert host.starts() == [1, 2, 3, 9, 4]
    assert opened[3][1].told == ["waiting", "started"]
    host.start(10)
    host.end(worker, 1)
    host.end(worker, 3)
    assert host.starts()[-2:] == [5, 6]


def test_tenants_take_turns_when_the_workers_are_full() -> None:
    host = Host({"running_guests": 10, "waiting_guests": 10})
    worker = host.worker(1)
    for number in range(1, 9):
        host.start(number, "alice")
    for number in range(11, 14):
        host.start(number, "bob")
    host.start(21, "carol")
    assert host.starts() == [1, 2, 3, 4]
    for _ in range(8):
        host.end(worker, host.starts()[-1])
    assert host.starts()[4:] == [5, 11, 21, 6, 12, 7, 13, 8]


def test_waiting_counts_no_wall_time_and_shows_as_waiting() -> None:
    host = Host({"running_guests": 1})
    worker = host.worker(1)
    host.start(1)
    run, _ = host.start(2)
    host.now += 50
    shown = run.describe(host.now)
    assert (shown["status"], shown["seconds"], shown["usage"]["wall_seconds"]) == ("waiting", 50.0, 0.0)
    host.end(worker, 1)
    host.now += 3
    shown = run.describe(host.now)
    assert (shown["status"], shown["seconds"], shown["usage"]["wall_seconds"]) == ("running", 3.0, 3.0)
    host.end(worker, 2)
    record, _ = host.finished[-1]
    assert (record.started, record.finished) == (1050.0, 1053.0)


def test_a_waiting_run_is_cancelled_and_abandoned_at_once() -> None:
    host = Host({"running_guests": 1})
    host.worker(1)
    host.start(1)
    (second, told), (third, silent) = host.start(2), host.start(3)
    assert host.manager.cancel(second, "test") and not host.manager.cancel(second, "again")
    assert [end.outcome for end in told.ends] == ["cancelled"]
    host.manager.abandon(third)
    assert silent.ends == [] and [record.status for record, _ in host.finished] == ["cancelled"] * 2
    assert not any(isinstance(message, CancelRun) for _, message in host.sent)
    use = host.quotas.of("alice")
    assert (use.running, use.waiting, use.waiting_bytes) == (1, 0, 0)


def test_what_waits_is_bounded_in_bytes() -> None:
    host = Host({"running_guests": 0})
    host.worker(1)
    run, _ = host.start(1, data=b"x" * 3000)
    error = refused(host.start, 2, data=b"x" * 1000)
    assert error.code == "busy" and error.retry_after is not None and error.details["used"] == 3064
    host.start(3, data=b"x" * 900)
    host.start(4, "bob", data=b"x" * 3000)
    # Messages count, too, and so do empty ones.
    host.manager.message(run, b"")
    assert refused(host.manager.message, run, b"").code == "busy"
    host.manager.cancel(run, "test")
    assert host.quotas.of("alice").waiting_bytes == 900 + MESSAGE_BYTES


def test_messages_to_a_waiting_run_come_after_its_start() -> None:
    host = Host({"running_guests": 1})
    worker = host.worker(1)
    host.start(1)
    run, _ = host.start(2)
    host.manager.message(run, b"one")
    host.manager.message(run, b"two")
    host.end(worker, 1)
    sent = [message for _, message in host.sent if isinstance(message, StartRun | ClientMessage)]
    assert [type(message).__name__ for message in sent] == ["StartRun", "StartRun", "ClientMessage", "ClientMessage"]
    assert sent[2:] == [ClientMessage(2, b"one"), ClientMessage(2, b"two")]
    assert host.quotas.of("alice").waiting_bytes == 0


def test_calls_that_are_prepared_hold_a_place() -> None:
    host = Host({"waiting_guests": 0, "running_guests": 2})
    worker = host.worker(1)
    host.start(1)
    with host.manager.preparing("alice", 100):
        assert host.quotas.of("alice").waiting == 1
        assert refused(lambda: host.manager.preparing("alice", 1).__enter__()).details["name"] == "waiting_guests"
    host.start(2)
    assert refused(lambda: host.manager.preparing("alice", 1).__enter__()).details["name"] == "waiting_guests"
    for number in (1, 2):
        host.end(worker, number)
    with contextlib.suppress(ValueError), host.manager.preparing("alice", 100):
        raise ValueError
    assert host.quotas.in_use == [] and host.quotas.of("alice").waiting_bytes == 0


def test_new_limits_start_what_they_let_in() -> None:
    host = Host({"running_guests": 0})
    host.worker(1)
    host.start(1)
    host.start(2)
    host.quotas.set_tenant("alice", {"running_guests": 1})
    host.manager.limits_changed(["alice"])
    assert host.starts() == [1]
    host.quotas.set_defaults({"running_guests": 5})
    host.manager.limits_changed(["alice"])
    assert host.starts() == [1]
    host.quotas.set_tenant("alice", {})
    host.manager.limits_changed(["alice"])
    assert host.starts() == [1, 2]


# --- workers -------------------------------------------------------------------------------------


def test_runs_wait_while_no_worker_is_up() -> None:
    host = Host()
    _, sink = host.start(1)
    assert sink.told == ["waiting"] and host.manager.expire() == 10.0
    worker = host.worker(1)
    assert sink.told == ["waiting", "started"] and host.manager.expire() is None
    host.start(2)
    host.manager.lose_worker(worker)
    host.manager.fail(list(worker.runs.values()), RealmError("worker_lost", "test"))
    host.now += 4
    _, early = host.start(3)
    host.now += 4
    _, late = host.start(4)
    # Each its own time, from when it came.
    assert host.manager.expire() == 6.0 and not early.ends
    host.now += 6
    assert host.manager.expire() == 4.0
    assert early.error.code == "worker_lost" and early.error.retry_after == 1.0
    assert not late.ends
    host.now += 4
    assert host.manager.expire() is None
    assert late.error.code == "worker_lost"


def test_patience_counts_from_the_loss_of_the_last_worker() -> None:
    host = Host({"running_guests": 1})
    worker = host.worker(1)
    host.start(1)
    _, sink = host.start(2)
    host.now += 100
    host.manager.lose_worker(worker)
    assert host.manager.expire() == 10.0 and not sink.ends


def test_a_worker_that_does_not_read_gets_nothing_more() -> None:
    host = Host({"running_guests": 1})
    first = host.worker(1)
    run, _ = host.start(1)
    host.unsent[1] = 1001
    error = refused(host.manager.message, run, b"x")
    assert error.code == "busy" and error.retry_after is not None and error.details["limit"] == 1000
    assert refused(host.start, 2, "bob").code == "busy"
    host.worker(2)
    host.start(3, "bob")
    assert host.sent[-1][0] == 2
    # Waiting runs start when it has caught up.
    host.unsent[2] = 1001
    host.unsent[1] = 0
    host.start(4)
    host.unsent[1] = 1001
    host.end(first, 1)
    assert host.starts() == [1, 3]
    host.unsent[1] = 1000
    host.manager.pump()
    assert host.starts() == [1, 3, 4]


def test_a_tenants_fuel_is_shared_by_the_workers_that_run_it() -> None:
    host = Host({"running_guests": 10})
    first, second = host.worker(1), host.worker(2)
    host.start(1)
    assert isinstance(host.sent[0][1], TenantShare) and isinstance(host.sent[1][1], StartRun)
    assert host.shares() == [(1, 12e6)]
    host.start(2)
    assert host.shares() == [(1, 6e6), (2, 6e6)]
    host.start(3)
    host.start(4)
    assert host.shares() == []
    host.start(5, "bob")
    assert host.shares() == [(1, 12e6)]
    host.quotas.set_tenant("alice", {"fuel_per_second": 2_000_000})
    host.manager.limits_changed(["alice"])
    assert host.shares() == [(1, 1e6), (2, 1e6)]
    host.end(second, 2)
    assert host.shares() == []
    host.end(second, 4)
    assert host.shares() == [(1, 2e6)]
    host.start(6)
    assert host.shares() == [(1, 1e6), (2, 1e6)]
    # A lost worker's part goes to the others before its runs are buried.
    host.manager.lose_worker(first)
    assert host.shares() == [(2, 2e6)]
    host.manager.fail(list(first.runs.values()), RealmError("worker_lost", "test"))
    assert host.shares() == []
    host.end(second, 6)
    assert host.shares() == []


# --- damaged artifacts, tokens, collected text ---------------------------------------------------


def test_a_damaged_artifact_is_made_anew_and_nobody_notices() -> None:
    host = Host({"running_guests": 1})
    worker = host.worker(1)
    run, sink = host.start(1, data=b"input")
    host.end(worker, 1, DAMAGED)
    assert host.damaged == [(run, True)] and not sink.ends and not worker.runs
    use = host.quotas.of("alice")
    assert (use.running, use.waiting, use.waiting_bytes) == (0, 1, 5 + MESSAGE_BYTES)
    host.start(2)
    host.start(3)
    host.manager.resume(run, "new", "2")
    assert host.starts() == [1, 2]
    host.end(worker, 2)
    # It goes before what came after it, with the new artifact.
    again = next(message for _, message in reversed(host.sent) if isinstance(message, StartRun))
    assert (again.run, again.artifact, again.artifact_sha256, again.input) == (1, "new", "2", b"input")
    assert sink.told == ["started"]
    host.end(worker, 1)
    assert [end.outcome for end in sink.ends] == ["complete"]
    # Once only.
    host.end(worker, 3, DAMAGED)
    (third, _) = host.damaged[-1]
    host.manager.resume(third, "new", "3")
    host.end(worker, 3, DAMAGED)
    assert host.damaged[-1] == (third, False)
    assert host.finished[-1][0].error is not None and host.finished[-1][0].error["retry_after"] == 1.0


@pytest.mark.parametrize("what", ["output", "log", "store", "message", "cancel", "abandon", "large"])
def test_a_run_that_somebody_has_seen_is_not_started_again(what: str) -> None:
    host = Host()
    worker = host.worker(1)
    run, sink = host.start(1, data=b"x" * (100_000 if what == "large" else 1))
    if what == "output":
        host.manager.events(worker, [Output(1, b"x", 1)])
    elif what == "log":
        host.manager.events(worker, [Log(1, "info", "x")])
    elif what == "store":
        host.manager.events(worker, [StoreSet(1, 1, "k", b"v")])
    elif what == "message":
        host.manager.message(run, b"x")
    elif what == "cancel":
        host.manager.cancel(run, "test")
    elif what == "abandon":
        host.manager.abandon(run)
    host.end(worker, 1, ErrorInfo("artifact_damaged", "another content"))
    assert host.damaged == [(run, False)] and not host.manager.runs
    if what != "abandon":
        assert sink.error.code == "artifact_damaged" and sink.error.retry_after == 1.0


def test_a_run_being_made_anew_can_be_cancelled_and_fail() -> None:
    host = Host()
    worker = host.worker(1)
    (first, told), (second, failed) = host.start(1), host.start(2)
    host.end(worker, 1, DAMAGED)
    host.end(worker, 2, DAMAGED)
    assert host.manager.cancel(first, "test")
    assert [end.outcome for end in told.ends] == ["cancelled"]
    host.manager.resume(first, "new", "2")
    host.manager.fail([second], RealmError("compile_limit", "test"))
    assert failed.error.code == "compile_limit"
    assert host.starts() == [1, 2] and host.quotas.in_use == []


def test_tokens_that_are_used_up_refuse_new_runs_for_a_while() -> None:
    host = Host({"tokens_per_minute": 100})
    worker = host.worker(1)
    _, sink = host.start(1)
    details = {"name": "tokens_per_minute", "limit": 100, "used": 130, "unit": "tokens/min"}
    host.end(worker, 1, ErrorInfo("rate_limited", "no", details, 18.0))
    assert sink.error.retry_after == 18.0
    host.now += 8
    error = refused(host.start, 2)
    assert (error.code, error.retry_after, error.details) == ("rate_limited", 10.0, details)
    host.start(3, "bob")
    host.now += 10
    host.start(4)
    # Other limits refuse nothing, and no wait is longer than a minute.
    host.end(worker, 4, ErrorInfo("rate_limited", "no", {"name": "kv_pages"}, 18.0))
    host.start(5)
    host.end(worker, 5, ErrorInfo("rate_limited", "no", {"name": "tokens_per_minute"}, 1e9))
    assert refused(host.start, 6).retry_after == 60.0
    host.quotas.set_tenant("alice", {"tokens_per_minute": 200})
    host.start(7)


def test_collected_text_is_bounded_over_all_of_a_tenants_runs() -> None:
    host = Host()
    worker = host.worker(1)
    (_, first), (second, last), (_, other) = host.start(1), host.start(2), host.start(3, "bob")
    for sink in (first, last, other):
        sink.collects = True
    host.manager.events(worker, [Output(1, b"x" * 300, 1), Output(3, b"x" * 300, 1), Output(2, b"x" * 201, 1)])
    cancels = [message.run for _, message in host.sent if isinstance(message, CancelRun)]
    assert cancels == [2] and second.cancelled
    host.manager.events(worker, [RunFinished(2, "cancelled", 0, None, Usage())])
    assert last.error.code == "output_limit"
    assert last.error.details == {"name": "collected_bytes", "limit": 500, "used": 501, "unit": "bytes"}
    # What has ended is not kept any more.
    host.end(worker, 1)
    assert [end.outcome for end in first.ends] == ["complete"]
    _, sink = host.start(4)
    sink.collects = True
    host.manager.events(worker, [Output(4, b"x" * 500, 1)])
    assert host.quotas.of("alice").collected == 500 and not sink.ends
    host.end(worker, 4)
    assert host.quotas.of("alice").collected == 0
