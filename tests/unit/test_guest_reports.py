"""How runs fail: limits with their names and numbers, traps with their places, and nobody else's."""

from __future__ import annotations

from typing import Any

import pytest

from realm.guests.abi import ErrorCode
from realm.messages import CallFailed, LimitMet
from realm.run_messages import StoreReply, StoreSet
from tests.fakes import Host
from tests.wat import GENERATE, RECEIVE, SPIN, expected, guest, sampling


def met(name: str, limit: float, used: float, unit: str) -> dict[str, Any]:
    """What every error of a limit says."""
    return {"name": name, "limit": limit, "used": used, "unit": unit}


# --- limits -----------------------------------------------------------------------------------------


def test_fuel_runs_out() -> None:
    host = Host()
    end = host.run(SPIN, fuel=3_500_000)
    assert end.outcome == "error"
    assert end.error is not None
    assert end.error.code == "fuel_exhausted"
    assert end.error.details == {
        **met("fuel_per_run", 3_500_000, 3_500_000, "fuel"),
        "fuel": 3_500_000,
        "memory_bytes": 65_536,
        "last_call": "",
        "backtrace": end.error.details["backtrace"],
    }
    assert end.error.details["backtrace"][0].startswith("run (0x")
    assert end.usage.fuel == 3_500_000
    host.turn()
    host.check_empty()


def test_wall_time_runs_out_also_while_waiting() -> None:
    for wat in (SPIN, RECEIVE):
        host = Host()
        run = host.start(wat, wall_seconds=2.0)
        turn = host.turn()
        assert turn.deadline == host.now + 2.0
        host.now += 2.0
        host.turn()
        end = host.finished(run)
        assert end is not None
        assert end.error is not None
        assert end.error.code == "wall_time_exceeded"
        assert end.error.details.items() >= met("seconds_per_run", 2.0, 2.0, "s").items()
        assert {"fuel", "memory_bytes", "last_call"} <= end.error.details.keys()
        host.check_empty()


def test_too_much_memory_from_the_start() -> None:
    end = Host().run(guest("(i32.const 0)", memory="100"), memory_bytes=1 << 20)
    assert end.error is not None
    assert end.error.code == "memory_limit"
    assert end.error.details.items() >= met("memory_bytes", 1 << 20, 0, "bytes").items()


def test_growth_beyond_the_limit_is_denied() -> None:
    host = Host()
    body = """(drop (memory.grow (i32.const 10)))
      (if (i32.ne (memory.grow (i32.const 100)) (i32.const -1)) (then unreachable))
      (i32.store (i32.const 700000) (i32.const 65))
      (drop (call $emit (i32.const 700000) (i32.const 1)))
      (memory.size)"""
    end = host.run(guest(body, "emit"), memory_bytes=1 << 20)
    assert (end.outcome, end.code) == ("complete", 11)
    assert end.usage.memory_bytes == 11 << 16
    assert host.output(1) == b"A"


def test_tables_are_bounded() -> None:
    wat = guest("(table.grow $t (ref.null func) (i32.const 1000))", extra="(table $t 1 funcref)")
    assert Host().run(wat, table_elements=100).code == -1
    assert Host().run(wat, table_elements=2000).code == 1


def test_token_limit() -> None:
    host = Host()
    end = host.run(GENERATE, input=sampling(), tokens=5)
    assert end.error is not None
    assert end.error.code == "token_limit"
    assert end.error.details.items() >= met("tokens_per_run", 5, 5, "tokens").items()
    assert end.error.details["last_call"] == "forward"
    assert len(host.output(1)) == 5


def test_output_limit() -> None:
    end = Host().run(GENERATE, input=sampling(), output_bytes=3)
    assert end.error is not None
    assert end.error.code == "output_limit"
    assert end.error.details.items() >= met("output_bytes_per_run", 3, 3, "bytes").items()


def test_sequences_are_limited_and_handles_never_reused() -> None:
    body = """
      (if (i32.ne (call $seq_new) (i32.const 1)) (then unreachable))
      (if (i32.ne (call $seq_fork (i32.const 1)) (i32.const 2)) (then unreachable))
      (if (i32.ne (call $seq_new) (i32.const -6)) (then unreachable))
      (drop (call $seq_free (i32.const 1)))
      (if (i32.ne (call $seq_len (i32.const 1)) (i32.const -3)) (then unreachable))
      (if (i32.ne (call $seq_free (i32.const 1)) (i32.const -3)) (then unreachable))
      (call $seq_new)"""
    host = Host()
    end = host.run(guest(body, "seq_new", "seq_fork", "seq_free", "seq_len"), sequences=2)
    assert (end.outcome, end.code) == ("complete", 3)
    host.turn()
    host.check_empty()


def test_log_limit() -> None:
    body = """(loop $l (local.set $c (call $log (i32.const 1) (i32.const 0) (i32.const 100)))
      (br_if $l (i32.ge_s (local.get $c) (i32.const 0)))) (local.get $c)"""
    host = Host()
    end = host.run(guest(body, "log"), log_bytes=1000)
    assert end.code == ErrorCode.LIMIT
    # Each line takes 64 bytes besides its own.
    assert len(host.logs(1)) == 7
    assert "the log is full" in host.logs(1)[-1][1]
    assert end.error is not None
    assert end.error.code == "limit_exceeded"
    assert end.error.details.items() >= met("log_bytes_per_run", 1000, 984, "bytes").items()


def test_empty_lines_fill_the_log_too() -> None:
    body = """(loop $l (br_if $l (i32.ge_s (call $log (i32.const 1) (i32.const 0) (i32.const 0)) (i32.const 0))))
      (i32.const 0)"""
    host = Host()
    assert host.run(guest(body, "log"), log_bytes=6400).outcome == "complete"
    assert len(host.logs(1)) == 101


def test_returning_an_error_code() -> None:
    end = Host().run(guest("(call $seq_len (i32.const 77))", "seq_len"))
    assert end.error is not None
    assert end.error.code == "guest_error"
    assert end.error.details["name"] == "bad_handle"
    assert "77 is no sequence" in end.error.details["last_error"]
    end = Host().run(guest("(i32.const -999)"))
    assert end.error is not None
    assert end.error.details["name"] == "unknown"


def test_what_a_guest_says_of_its_failure_is_kept_short() -> None:
    log = "(drop (call $log (i32.const 3) (i32.const 0) (i32.const 65000)))"
    host = Host()
    end = host.run(guest(f"{log} (i32.const -1)", "log"))
    assert end.error is not None
    assert end.error.details["last_error"] == "\0" * 497 + "..."
    assert len(end.error.message) < 600
    # The log itself is not cut.
    assert [len(text) for _, text in host.logs(1)] == [65_000]
    end = Host().run(guest(f"{log} unreachable", "log"))
    assert end.error is not None
    assert len(end.error.details["last_error"]) == 500


def test_a_backtrace_is_kept_short() -> None:
    name = "n" * 5_000
    end = Host().run(guest(f"(call ${name})", extra=f"(func ${name} (result i32) (call ${name}))"))
    assert end.error is not None
    frames = end.error.details["backtrace"]
    assert 1 < len(frames) <= 20 and all(len(frame) <= 100 for frame in frames)
    assert frames[0] == "n" * 97 + "..."


# --- traps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("unreachable", "unreachable_code_reached"),
        ("(i32.load (i32.const 65536))", "memory_out_of_bounds"),
        ("(i32.div_s (i32.const 1) (local.get $a))", "integer_division_by_zero"),
        ("(call $run)", "stack_overflow"),
        ("(i32.trunc_f32_s (f32.const nan))", "bad_conversion_to_integer"),
    ],
)
def test_traps_are_reported_with_a_backtrace(body: str, kind: str) -> None:
    host = Host()
    end = host.run(
        guest(
            f"(drop (call $now)) (call $inner {body})",
            "now",
            extra="""
      (func $inner (param i32) (result i32) (local.get 0))""",
        )
    )
    assert end.outcome == "error"
    assert end.error is not None
    assert end.error.code == "guest_trap"
    assert end.error.details["trap"] == kind
    assert end.error.details["message"] in end.error.message
    assert end.error.details["memory_bytes"] == 65_536
    assert end.error.details["fuel"] == end.usage.fuel > 0
    assert end.error.details["last_call"] == "now"
    assert end.error.details["backtrace"][0].startswith("run (0x")
    host.turn()
    host.check_empty()


def test_a_trap_is_nobody_elses() -> None:
    host = Host()
    bad = [host.start(guest("unreachable")) for _ in range(5)]
    good = host.start(GENERATE, input=sampling())
    host.settle()
    assert all(host.finished(run).error.code == "guest_trap" for run in bad)  # type: ignore[union-attr]
    assert host.output(good) == expected()


def test_frames_without_a_name_have_their_number_and_the_called_one_its_export() -> None:
    text = """(module (memory (export "memory") 1)
      (func (param i32) (result i32) unreachable)
      (func (param i32) (result i32) (call 0 (local.get 0)))
      (func (export "run") (result i32) (call 1 (i32.const 1))))"""
    end = Host().run(text)
    assert end.error is not None
    names = [frame.split(" (0x")[0] for frame in end.error.details["backtrace"]]
    assert names == ["function 0", "function 1", "run"]


def test_a_name_in_a_backtrace_is_one_printable_line() -> None:
    text = guest("unreachable").replace("$run", '$"a\\1b[2J\\nb"')
    end = Host().run(text)
    assert end.error is not None
    assert end.error.details["backtrace"][0].startswith("a?[2J?b (0x")


@pytest.mark.parametrize("body", ["unreachable", "(drop (call $now)) unreachable"])
def test_guests_that_trap_in_one_turn_have_each_their_own_report(body: str) -> None:
    host = Host()
    one = host.start(guest(body, "now"))
    two = host.start(guest("(drop (call $seq_new)) (i32.div_s (i32.const 1) (local.get $a))", "seq_new"))
    good = host.start(GENERATE, input=sampling())
    host.settle()
    ends = [host.finished(run) for run in (one, two)]
    errors = [end.error for end in ends if end is not None and end.error is not None]
    assert [e.details["trap"] for e in errors] == ["unreachable_code_reached", "integer_division_by_zero"]
    assert errors[1].details["last_call"] == "seq_new"
    assert host.output(good) == expected()


# --- limits met elsewhere ---------------------------------------------------------------------------


RETURNS_FORWARD = guest(
    "(call $forward (call $seq_new) (i32.const 0) (i32.const 1) (i32.const 600) (i32.const 0))", "seq_new", "forward"
)


@pytest.mark.parametrize(("retry", "code"), [(None, "limit_exceeded"), (12.5, "rate_limited")])
def test_a_limit_met_in_the_engine_is_the_runs_error(retry: float | None, code: str) -> None:
    host = Host()
    host.engine.fail = lambda op: CallFailed(
        op.call, ErrorCode.LIMIT, "too many tokens", LimitMet("tokens_per_minute", 100, 101, retry)
    )
    end = host.run(RETURNS_FORWARD)
    assert end.error is not None
    assert (end.error.code, end.error.retry_after) == (code, retry)
    assert end.error.details.items() >= met("tokens_per_minute", 100, 101, "tokens/min").items()
    assert "too many tokens" in end.error.details["last_error"]


def test_a_limit_met_in_the_store_is_the_runs_error() -> None:
    host = Host()
    host.answer_store = False
    run = host.start(guest("(call $kv_set (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 4))", "kv_set"))
    host.turn()
    (asked,) = [e for e in host.events if isinstance(e, StoreSet)]
    limit = LimitMet("store_bytes", 1000, 990)
    host.runtime.store_reply(StoreReply(asked.call, int(ErrorCode.LIMIT), message="the store is full", limit=limit))
    host.settle()
    end = host.finished(run)
    assert end is not None and end.error is not None
    assert end.error.code == "limit_exceeded"
    assert end.error.details.items() >= met("store_bytes", 1000, 990, "bytes").items()


def test_a_limit_that_nobody_knows_is_still_an_error() -> None:
    host = Host()
    host.engine.fail = lambda op: CallFailed(op.call, ErrorCode.LIMIT, "odd", LimitMet("nonsense", 1, 2))
    end = host.run(RETURNS_FORWARD)
    assert end.error is not None
    assert end.error.code == "guest_error"


# --- time to the first call -------------------------------------------------------------------------


@pytest.mark.parametrize("wat", [SPIN, guest("(i32.const 0)", extra="(func $s (loop $l (br $l))) (start $s)")])
def test_a_guest_must_call_the_host_in_time(wat: str) -> None:
    host = Host()
    run = host.start(wat, first_call_seconds=3.0)
    assert host.turn().deadline == host.now + 3.0
    host.now += 2.9
    assert host.turn().busy
    host.now += 0.1
    host.turn()
    end = host.finished(run)
    assert end is not None and end.error is not None
    assert end.error.code == "first_call_timeout"
    assert end.error.details.items() >= met("seconds_to_first_call", 3.0, 3.0, "s").items()
    host.turn()
    host.check_empty()


def test_a_guest_that_has_called_may_take_its_time() -> None:
    host = Host()
    run = host.start(guest("(drop (call $now)) (loop $l (br $l)) (i32.const 0)", "now"), first_call_seconds=3.0)
    host.turn()
    host.now += 100.0
    assert host.turn().busy
    assert host.finished(run) is None
    receiver = host.start(RECEIVE, first_call_seconds=1.0)
    host.turn()
    host.now += 4.0
    host.turn()
    assert host.finished(receiver) is None
