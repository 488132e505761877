"""Runs from start to end: suspending, slices, limits, cancelling, back-pressure, many at once."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm.guests import abi
from realm.guests.abi import ErrorCode
from realm.messages import CallDone, EngineReply
from realm.run_messages import CancelRun, ClientMessage, Credit, StoreGet, TenantShare
from tests.fakes import Host, greedy
from tests.wat import GENERATE, RECEIVE, expected, guest, sampling


def test_a_guest_generates() -> None:
    host = Host()
    end = host.run(GENERATE, input=sampling())
    assert (end.outcome, end.code, end.error) == ("complete", 0, None)
    assert host.output(1) == expected()
    assert (end.usage.prompt_tokens, end.usage.new_tokens) == (1, 12)
    assert end.usage.output_bytes == 12
    assert end.usage.memory_bytes == 65_536
    assert end.usage.host_calls == 26
    assert end.usage.fuel > 26_000
    host.turn()
    host.check_empty()


def test_the_last_thing_the_engine_hears_is_the_end() -> None:
    host = Host()
    host.start(GENERATE, input=sampling())
    host.settle()
    assert host.engine.ended == [1]


def test_a_thousand_guests_at_once() -> None:
    host = Host()
    runs = [host.start(GENERATE, input=sampling()) for _ in range(1000)]
    while host.last.ops == []:
        host.turn(engine=False)
    host.settle()
    for run in runs:
        end = host.finished(run)
        assert end is not None
        assert end.outcome == "complete"
        assert host.output(run) == expected()
    host.check_empty()


def test_the_same_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    def outputs(seed: int, company: int) -> bytes:
        host = Host()
        run = host.start(GENERATE, input=sampling(1.0), seed=seed)
        for other in range(company):
            host.start(GENERATE, input=sampling(0.7), seed=other)
        host.settle()
        return host.output(run)

    first = outputs(7, 0)
    assert outputs(7, 0) == outputs(7, 9) == first
    assert outputs(8, 0) != first


def test_an_explicit_seed_replaces_the_runs() -> None:
    def output(seed: int, explicit: int) -> bytes:
        host = Host()
        host.run(GENERATE, input=sampling(1.0, flags=4, seed=explicit), seed=seed)
        return host.output(1)

    assert output(1, 42) == output(2, 42)
    assert output(1, 42) != output(1, 43)


def test_forks_draw_differently_but_repeatably() -> None:
    body = """
      (i32.store (i32.const 512) (i32.const 5))
      (f32.store (i32.const 600) (f32.const 2))
      (local.set $a (call $seq_new))
      (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0)))
      (loop $again
        (i32.store8 (i32.add (i32.const 100) (local.get $b))
          (call $sample (call $seq_fork (local.get $a)) (i32.const 600) (i32.const 0)))
        (br_if $again (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 20))))
      (call $emit (i32.const 100) (i32.const 20))"""
    wat = guest(body, "seq_new", "seq_fork", "forward", "sample", "emit")
    outputs = []
    for _ in range(2):
        host = Host()
        assert host.run(wat).outcome == "complete"
        outputs.append(host.output(1))
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) > 3


def test_batch_forward_is_one_suspension() -> None:
    item = abi.ITEM.size
    body = f"""
      (local.set $a (call $seq_new)) (local.set $b (call $seq_new))
      (i32.store (i32.const 512) (i32.const 5)) (i32.store (i32.const 516) (i32.const 6))
      (i32.store (i32.const 1024) (local.get $a)) (i32.store (i32.const 1028) (i32.const 1))
      (i64.store (i32.const 1032) (i64.const 512)) (i64.store (i32.const 1040) (i64.const 600))
      (i32.store (i32.const {1024 + item}) (local.get $b)) (i32.store (i32.const {1028 + item}) (i32.const 1))
      (i64.store (i32.const {1032 + item}) (i64.const 516)) (i64.store (i32.const {1040 + item}) (i64.const 600))
      (local.set $c (call $batch_forward (i32.const 1024) (i32.const 2)))
      (drop (call $emit (i32.const 1048) (i32.const 1)))
      (drop (call $emit (i32.const {1048 + item}) (i32.const 1)))
      (local.get $c)"""
    host = Host()
    run = host.start(guest(body, "seq_new", "batch_forward", "emit"))
    host.turn(engine=False)
    assert len(host.engine.results) == 2
    host.deliver(1)
    host.turn(engine=False)
    assert host.output(run) == b""
    host.deliver(1)
    host.settle()
    end = host.finished(run)
    assert end is not None
    assert end.code == 2
    assert host.output(run) == bytes([greedy([5]), greedy([6])])


def test_an_answer_of_the_wrong_kind_ends_the_call_not_the_worker() -> None:
    body = """
      (i32.store (i32.const 1024) (call $seq_new)) (i32.store (i32.const 1028) (i32.const 1))
      (i32.store (i32.const 1064) (call $seq_new)) (i32.store (i32.const 1068) (i32.const 1))
      (call $batch_forward (i32.const 1024) (i32.const 2))"""
    host = Host()
    run = host.start(guest(body, "seq_new", "batch_forward"))
    host.turn(engine=False)
    first, second = host.engine.results
    host.runtime.deliver(EngineReply(1, [CallDone(first.call, 1), second]))
    host.turn()
    end = host.finished(run)
    assert end is not None
    assert end.code == ErrorCode.INTERNAL
    host.turn()
    host.check_empty()


# --- giving way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        "(drop (call $now))",
        "(drop (call $seq_len (i32.const 9)))",
        "(drop (call $logits_topk (i32.const 1) (i32.const 0) (i32.const 0)))",
        "(drop (call $emit (i32.const 0) (i32.const 0)))",
    ],
    ids=["now", "bad-handle", "topk", "emit"],
)
def test_a_guest_that_only_calls_the_host_gives_way_and_pays(call: str) -> None:
    host = Host()
    wat = guest(f"(loop $l {call} (br $l)) (i32.const 0)", "now", "seq_len", "logits_topk", "emit")
    run = host.start(wat, fuel=25_000_000)
    assert host.turn().busy
    host.settle()
    end = host.finished(run)
    assert end is not None
    assert end.error is not None
    assert end.error.code == "fuel_exhausted"
    assert end.usage.host_calls <= 5_500
    assert len(host.logs(run)) <= 70


# --- starting ---------------------------------------------------------------------------------------


def test_initialize_and_start_functions_run_first_and_may_call_the_host() -> None:
    wat = guest(
        "(i32.load (i32.const 8))",
        "input_read",
        "log",
        extra="""
      (data (i32.const 100) "starting")
      (func $start (drop (call $log (i32.const 1) (i32.const 100) (i32.const 8)))) (start $start)
      (func (export "_initialize") (drop (call $input_read (i32.const 0) (i32.const 8) (i32.const 4))))""",
    )
    host = Host()
    end = host.run(wat, input=(1234).to_bytes(4, "little"))
    assert (end.outcome, end.code) == ("complete", 1234)
    assert host.logs(1) == [("info", "starting")]


def test_a_spinning_start_function_is_cut() -> None:
    wat = guest("(i32.const 0)", extra="(func $s (loop $l (br $l))) (start $s)")
    host = Host()
    run = host.start(wat)
    assert host.turn().busy
    host.runtime.cancel(CancelRun(run, "enough"))
    host.turn()
    host.check_empty()


def test_a_start_function_may_wait_for_the_engine() -> None:
    extra = """(func $s (drop (call $forward (call $seq_new) (i32.const 0) (i32.const 1) (i32.const 0)
      (i32.const 0)))) (start $s)"""
    host = Host()
    assert host.run(guest("(i32.const 3)", "seq_new", "forward", extra=extra)).code == 3


# --- everything in any order ------------------------------------------------------------------------

MIXED: dict[str, Any] = {
    "generate": GENERATE,
    "spin": guest(
        "(loop $l (br_if $l (i32.lt_u (local.tee $a (i32.add (local.get $a) (i32.const 1)))"
        " (i32.const 900000)))) (i32.const 0)"
    ),
    "trap": guest("(drop (call $seq_new)) unreachable", "seq_new"),
    "receive": RECEIVE,
    "store": guest(
        """(drop (call $kv_set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 4)))
        (call $kv_get (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 8))""",
        "kv_set",
        "kv_get",
    ),
    "tokenize": guest(
        "(call $tokenize (i32.const 0) (i32.const 5000) (i32.const 0) (i32.const 8192) (i32.const 9000))", "tokenize"
    ),
    "compute": guest(
        """(local.set $a (call $seq_new))
        (loop $again
          (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 0)))
          (local.set $c (i32.const 0))
          (loop $l (br_if $l (i32.lt_u (local.tee $c (i32.add (local.get $c) (i32.const 1))) (i32.const 700000))))
          (br_if $again (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 5))))
        (i32.const 0)""",
        "seq_new",
        "forward",
    ),
    "forks": guest(
        """(local.set $a (call $seq_new))
        (loop $l (drop (call $seq_fork (local.get $a)))
          (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 9))))
        (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0))""",
        "seq_new",
        "seq_fork",
        "forward",
    ),
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.lists(st.sampled_from(sorted(MIXED)), min_size=1, max_size=12))
def test_any_interleaving_leaves_nothing_behind(seed: int, kinds: list[str]) -> None:
    numbers = random.Random(seed)
    host = Host()
    waiting = list(kinds)
    canary = host.start(GENERATE, input=sampling())
    steps = 0
    while waiting or host.runtime.live:
        steps += 1
        assert steps < 5000
        action = numbers.randrange(9)
        run = numbers.randint(2, host.runs + 1)
        if action <= 1 and waiting:
            credit, tenant = numbers.choice([0, 3, 1000]), numbers.choice("bc")
            host.start(MIXED[waiting.pop()], input=sampling(1.0), credit=credit, tenant=tenant)
        elif action == 2 and run != canary:
            host.runtime.cancel(CancelRun(run, "any"))
        elif action == 3:
            host.runtime.message(ClientMessage(run, numbers.randbytes(numbers.randrange(20))))
        elif action == 4:
            host.runtime.credit(Credit(run, numbers.randrange(100)))
        elif action == 5:
            host.now += numbers.random() * 3
        elif action == 6:
            host.deliver(numbers.randint(1, 3))
        elif action == 7:
            host.runtime.share(TenantShare(numbers.choice("bc"), numbers.choice([2e6, 5e7, 2e9])))
        else:
            host.turn(engine=False)
        host.runtime.check()
    host.deliver()
    host.settle()
    host.check_empty()
    assert host.output(canary) == expected()
    assert not [e for e in host.events if isinstance(e, StoreGet) and not e.key]
