"""The helper: work beside the worker's thread, fair between tenants, and nothing of it for ended runs."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from realm.guests.abi import ErrorCode
from realm.guests.deferral import OFFLOAD_FUEL
from realm.guests.guard import MemoryGuard
from realm.guests.helper import HelperThread, InlineHelper, Queue, Ticket
from realm.run_messages import CancelRun
from tests.fakes import FakeTokenizer, Host
from tests.wat import SPIN, guest

LONG = OFFLOAD_FUEL // 2000 + 1
"""Bytes of text that are too many for the worker's own thread."""
TOKENIZE = guest(
    f"(call $tokenize (i32.const 0) (i32.const {LONG}) (i32.const 0) (i32.const 8192) (i32.const 4096))", "tokenize"
)


@pytest.fixture
def thread() -> Iterator[HelperThread]:
    made = HelperThread()
    yield made
    made.close()


def collected(helper: HelperThread, count: int) -> list[Ticket]:
    done: list[Ticket] = []
    while len(done) < count:
        assert select.select([helper.fileno()], [], [], 30)[0], "nobody wakes the owner"
        done += helper.collect()
    return done


# --- queue ------------------------------------------------------------------------------------------


def test_tenants_take_turns_and_each_is_served_in_order() -> None:
    queue = Queue()
    tickets = [Ticket(tenant, None) for tenant in "aaaabac"]
    for ticket in tickets:
        queue.put(ticket)
    assert len(queue) == 7
    assert queue.remove(tickets[1])
    assert not queue.remove(tickets[1])
    taken = []
    while (found := queue.take()) is not None:
        taken.append(found)
    assert "".join(ticket.tenant for ticket in taken) == "abcaaa"
    assert [ticket for ticket in taken if ticket.tenant == "a"] == [
        t for t in tickets if t.tenant == "a" and t in taken
    ]
    assert not len(queue)


@pytest.mark.parametrize("make", [InlineHelper, HelperThread])
def test_results_and_errors_come_back(make: Callable[[], Any]) -> None:
    helper = make()
    good, bad = helper.submit("a", lambda: 7), helper.submit("a", lambda: 1 // 0)
    done: list[Ticket] = []
    while len(done) < 2:
        if not helper.immediate:
            assert select.select([helper.fileno()], [], [], 30)[0]
        done += helper.collect()
    assert done == [good, bad]
    assert (good.value, good.error) == (7, None)
    assert isinstance(bad.error, ZeroDivisionError)
    assert helper.collect() == []
    helper.close()
    helper.close()


def test_the_work_is_done_in_another_thread_and_the_owner_is_woken(thread: HelperThread) -> None:
    ticket = thread.submit("a", threading.get_ident)
    assert collected(thread, 1) == [ticket]
    assert ticket.value not in (None, threading.get_ident())
    assert not select.select([thread.fileno()], [], [], 0)[0]


def test_cancelled_work_is_not_done(thread: HelperThread) -> None:
    gate, ran = threading.Event(), []
    first = thread.submit("a", gate.wait)
    second = thread.submit("a", lambda: ran.append(2))
    third = thread.submit("a", lambda: ran.append(3))
    thread.cancel(second)
    gate.set()
    assert collected(thread, 2) == [first, third]
    assert ran == [3]


# --- in the runtime ---------------------------------------------------------------------------------


def test_a_long_text_is_tokenized_in_the_helper() -> None:
    class Noting(FakeTokenizer):
        def __init__(self) -> None:
            self.threads: list[int] = []

        def encode(self, text: str, special: bool) -> list[int]:
            self.threads.append(threading.get_ident())
            return super().encode(text, special)

    tokenizer, helper = Noting(), HelperThread()
    host = Host(tokenizer=tokenizer, helper=helper)
    run = host.start(TOKENIZE)
    assert not host.turn().busy
    while host.finished(run) is None:
        assert select.select([helper.fileno()], [], [], 30)[0]
        host.turn()
    end = host.finished(run)
    assert end is not None
    assert end.code == LONG
    assert tokenizer.threads != [threading.get_ident()] and len(tokenizer.threads) == 1
    host.turn()
    host.check_empty()
    helper.close()


def test_others_run_while_the_helper_works_and_a_cancelled_runs_result_is_dropped() -> None:
    gate, begun = threading.Event(), threading.Event()

    class Slow(FakeTokenizer):
        def encode(self, text: str, special: bool) -> list[int]:
            begun.set()
            assert gate.wait(30)
            return super().encode(text, special)

    helper = HelperThread()
    host = Host(tokenizer=Slow(), helper=helper)
    run = host.start(TOKENIZE)
    other = host.start(guest("(i32.const 5)"))
    host.settle()
    assert begun.wait(30)
    assert host.finished(other) is not None
    host.runtime.cancel(CancelRun(run, "enough"))
    host.turn()
    host.check_empty()
    gate.set()
    marker = helper.submit("a", lambda: None)
    while marker not in helper.collect():
        select.select([helper.fileno()], [], [], 30)
    host.settle()
    host.check_empty()
    helper.close()


def test_a_failure_in_the_helper_is_an_error_code_with_a_correlation_id(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeTokenizer):
        def encode(self, text: str, special: bool) -> list[int]:
            raise ZeroDivisionError("a defect")

    host = Host(tokenizer=Broken())
    end = host.run(TOKENIZE)
    assert end.code == ErrorCode.INTERNAL
    correlation = host.logs(1)[0][1].rsplit(" ", 1)[1]
    assert any(correlation in record.getMessage() for record in caplog.records)
    assert "a defect" in caplog.text and "defect" not in host.logs(1)[0][1]


def test_work_that_the_fuel_does_not_pay_is_not_done() -> None:
    class Never(FakeTokenizer):
        def encode(self, text: str, special: bool) -> list[int]:
            raise AssertionError("not paid")

    end = Host(tokenizer=Never()).run(TOKENIZE, fuel=OFFLOAD_FUEL)
    assert end.error is not None
    assert end.error.code == "fuel_exhausted"


def test_jobs_of_every_run_are_gone_with_it() -> None:
    host = Host()
    for _ in range(5):
        host.start(TOKENIZE)
    host.start(SPIN)
    host.turn()
    assert host.runtime.slices.jobs
    host.runtime.close()
    host.turn()
    host.check_empty()
    assert not host.runtime.slices.jobs


# --- held back while the ceiling is lowered ---------------------------------------------------------


def test_a_held_helper_begins_nothing(thread: HelperThread) -> None:
    assert thread.hold()
    ticket = thread.submit("a", lambda: 7)
    assert not select.select([thread.fileno()], [], [], 0.05)[0] and thread.collect() == []
    thread.let_go()
    assert collected(thread, 1) == [ticket]


def test_a_helper_with_work_is_held_only_after_one_piece_of_it(thread: HelperThread) -> None:
    gate = threading.Event()
    tickets = [thread.submit("a", gate.wait), *(thread.submit("a", lambda: 7) for _ in range(3))]
    assert not thread.hold()
    threading.Timer(0.05, gate.set).start()
    for ticket in tickets:
        # However often it is held, its work goes on; and it never works while it is held.
        assert thread.hold(wait=True)
        assert collected(thread, 1) == [ticket]
        assert thread.collect() == []
        thread.let_go()
    assert thread.hold()


class Room:
    """A ceiling that only notes what is done to it."""

    most = 100 << 20

    def __init__(self) -> None:
        self.left = float(100 << 20)
        self.low = False

    def lower(self) -> None:
        self.low = True

    def lift(self) -> None:
        self.low = False

    def room(self) -> float:
        return self.left

    def crowded(self) -> bool:
        return False


def test_the_ceiling_is_never_lowered_while_the_helper_works(thread: HelperThread) -> None:
    ceiling, host = Room(), Host()
    guard = host.runtime.guard = MemoryGuard(ceiling, thread)
    small, large = host.start(SPIN, memory_bytes=30 << 20), host.start(SPIN, memory_bytes=40 << 20)
    runs = host.runtime._runs
    guard.enter()
    assert ceiling.low
    # Work of the host has what guests do not get.
    assert guard.around(lambda: ceiling.low) is False
    assert ceiling.low
    guard.leave()
    assert not ceiling.low

    gate, seen = threading.Event(), []

    def work() -> None:
        gate.wait()
        seen.append(ceiling.low)

    thread.submit("a", work)
    guard.enter()
    guard.admit(runs[small])
    guard.admit(runs[large])
    assert not ceiling.low and not seen
    # 30 + 40 of 100 MiB could be taken by now: for 40 more it is measured, and nothing was taken.
    guard.admit(runs[large])
    guard.admit(runs[large])
    assert not ceiling.low and not seen
    ceiling.left = 20 << 20
    threading.Timer(0.05, gate.set).start()
    guard.admit(runs[large])
    assert ceiling.low and seen == [False]
    guard.leave()
    assert not ceiling.low
    host.runtime.close()
