"""Output that is held for a moment: what each client gets, in which order, and how many frames it is."""

from __future__ import annotations

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.guests.outputs import LONGEST_SECONDS, MOST_BYTES, SECONDS_A_RUN, SLACK_SECONDS
from realm.run_messages import CancelRun, ClientMessage, Credit, Log, Output, RunFinished, StoreGet
from tests.fakes import Host
from tests.wat import GENERATE, expected, guest, sampling

EMIT = "(drop (call $emit (i32.const 0) (i32.const {size})))"
WAIT = "(drop (call $recv (i32.const 64) (i32.const 16) (i32.const 60000)))"
LOG = "(drop (call $log (i32.const 1) (i32.const 64) (i32.const 1)))"
STORE = "(drop (call $kv_get (i32.const 200) (i32.const 1) (i32.const 128) (i32.const 8)))"
COMPANY = 50
NAMES = "emit", "recv", "log", "kv_get"


def outputs(host: Host, run: int) -> list[Output]:
    return [e for e in host.events if isinstance(e, Output) and e.run == run]


def emits(*sizes: int) -> str:
    return "".join(EMIT.format(size=size) for size in sizes)


def program(body: str) -> str:
    return guest(body + "(i32.const 0)", *NAMES)


def company(host: Host) -> None:
    """Other runs, which wait for their clients."""
    for _ in range(COMPANY):
        host.start(program(WAIT))


def begin(host: Host) -> None:
    """Give every guest some slices, at one instant."""
    for _ in range(2 * COMPANY):
        host.turn()


def test_a_guest_alone_streams_token_by_token() -> None:
    host = Host()
    run = host.start(GENERATE, input=sampling())
    while host.finished(run) is None:
        host.now += 0.001
        host.turn()
    assert [e.data for e in outputs(host, run)] == [bytes([token]) for token in expected()]
    assert [e.tokens for e in outputs(host, run)] == list(range(1, 13))


def test_many_guests_send_fewer_frames_and_every_byte() -> None:
    guests, step, tokens = 200, 0.002, 48
    host = Host()
    longer = GENERATE.replace("(i32.const 12)", f"(i32.const {tokens})")
    runs = [host.start(longer, input=sampling()) for _ in range(guests)]
    while len(host.engine.forwards) < guests:
        host.turn(engine=False)
    host.deliver()
    while host.runtime.live:
        host.now += step
        host.turn()
        deadline = host.last.deadline
        held = [r for r in host.runtime._runs.values() if r.held_output]
        # Nothing is held for longer than it may be, and the worker wakes up for it.
        assert all(r.output_due > host.now for r in held)
        assert not held or (deadline is not None and deadline <= min(r.output_due for r in held))
    for run in runs:
        pieces = outputs(host, run)
        assert b"".join(e.data for e in pieces) == expected(tokens)
        assert len(pieces[0].data) == 1, "the first token does not wait"
        assert [e.tokens for e in pieces] == [sum(len(e.data) for e in pieces[: n + 1]) for n in range(len(pieces))]
    # 48 tokens take 96 ms, and an interval is 20 while all are there.
    assert sum(len(outputs(host, run)) for run in runs) <= guests * tokens / 5
    seconds = {len(outputs(host, run)[1].data) for run in runs}
    assert len(seconds) > 4, "all runs send their second frame together"


def test_the_interval_grows_with_the_runs() -> None:
    host = Host()
    company(host)
    run = host.start(program(emits(1, 1) + "(loop $l (br $l))"))
    begin(host)
    (first,) = outputs(host, run)
    assert first.data == b"\0"
    due = host.runtime._runs[run].output_due
    assert host.now < due <= host.now + (COMPANY + 1) * SECONDS_A_RUN
    assert host.last.deadline == due
    host.now = due - 2 * SLACK_SECONDS
    host.turn()
    assert len(outputs(host, run)) == 1
    host.now = due
    host.turn()
    assert len(outputs(host, run)) == 2
    # Now it has sent more than once: the whole interval counts.
    assert host.runtime._runs[run].output_due == pytest.approx(due + (COMPANY + 1) * SECONDS_A_RUN)
    assert (COMPANY + 1) * SECONDS_A_RUN < LONGEST_SECONDS


@pytest.mark.parametrize("then", [WAIT, LOG, STORE, ""])
def test_held_output_goes_before_whatever_the_guest_does_next(then: str) -> None:
    host = Host()
    host.answer_store = False
    company(host)
    run = host.start(program(emits(1, 2, 3) + then))
    host.events.clear()
    begin(host)
    events = [e for e in host.events if getattr(e, "run", 0) == run]
    assert sum(len(e.data) for e in events if isinstance(e, Output)) == 6
    order = [type(e) for e in events]
    assert len(order) == (2 if then == WAIT else 4 if then == LOG else 3)
    assert order == sorted(order, key=lambda kind: kind is not Output), "something overtook output"


def test_no_credit_is_no_reason_to_hold_what_was_emitted() -> None:
    host = Host()
    run = host.start(program(emits(4, 4, 4)), credit=10)
    host.turn()
    assert sum(len(e.data) for e in outputs(host, run)) == 10
    host.runtime.credit(Credit(run, 2))
    host.settle()
    assert sum(len(e.data) for e in outputs(host, run)) == 12
    assert host.finished(run) is not None


def test_much_output_is_not_held() -> None:
    host = Host()
    company(host)
    run = host.start(program(emits(1, 1, MOST_BYTES, 1) + "(loop $l (br $l))"))
    begin(host)
    # What follows is held.
    assert [len(e.data) for e in outputs(host, run)] == [1, MOST_BYTES + 1]


def test_what_is_held_counts_as_the_runs_memory() -> None:
    host = Host()
    company(host)
    run = host.start(program(emits(1, 500) + "(loop $l (br $l))"))
    begin(host)
    kept = host.runtime._runs[run]
    assert bytes(kept.held_output) == bytes(500)
    before = kept.memory_held
    host.now += LONGEST_SECONDS
    host.turn()
    assert kept.memory_held == before - 500


def test_a_cancelled_run_gives_what_it_had_emitted() -> None:
    host = Host()
    company(host)
    run = host.start(program(emits(1, 2) + "(loop $l (br $l))"))
    begin(host)
    assert sum(len(e.data) for e in outputs(host, run)) == 1
    host.runtime.cancel(CancelRun(run, "client gone"))
    host.turn()
    assert sum(len(e.data) for e in outputs(host, run)) == 3
    assert isinstance(host.last.events[-1], RunFinished)
    assert host.runtime.outputs.next is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["e1", "e3", "log", "wait", "store"]), max_size=12), st.floats(0, 0.01))
def test_order_and_bytes_are_the_guests(actions: list[str], step: float) -> None:
    texts = {"e1": emits(1), "e3": emits(3), "log": LOG, "wait": WAIT, "store": STORE}
    host = Host()
    host.store["\0"] = b"value"
    run = host.start(program("".join(texts[a] for a in actions)))
    for _ in range(5):
        host.start(program(WAIT))
    for _ in range(60):
        host.now += step
        host.turn()
        host.runtime.message(ClientMessage(run, b"m"))
        if host.finished(run) is not None:
            break
    assert host.finished(run) is not None
    said = [(a[0], int(a[1]) if a[0] == "e" else 1) for a in actions if a != "wait"]
    seen = [
        ("e", len(e.data)) if isinstance(e, Output) else ("l" if isinstance(e, Log) else "s", 1)
        for e in host.events
        if isinstance(e, Output | Log | StoreGet) and e.run == run
    ]
    assert merged(seen) == merged(said)


def merged(parts: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Neighbours of one kind as one."""
    return [(kind, sum(n for _, n in part)) for kind, part in groupby(parts, key=lambda pair: pair[0])]
