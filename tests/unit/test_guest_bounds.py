"""What one call may take of the host: time by being cut into steps, memory by being refused."""

from __future__ import annotations

import struct
from array import array

import pytest

from realm.guests import abi, calls_batch, calls_model, calls_session, calls_text, sampling_arguments, wasi, worker
from realm.guests.abi import ErrorCode
from realm.guests.draws import random_bits, random_block
from realm.guests.worker import split
from realm.messages import Forward
from realm.run_messages import CancelRun, Log, Output, StoreSet
from tests.fakes import FACTS, Host
from tests.probe import INPUT_AT, ITEMS_AT, OUTPUT_AT, TOKENS_AT, call
from tests.wat import guest


def u32(*values: int) -> bytes:
    return array("I", values).tobytes()


# --- steps ------------------------------------------------------------------------------------------


def many_items(count: int, extra: str = "") -> str:
    """Makes ``count`` sequences, then one batch with a token for each; its result is the run's."""
    size = abi.ITEM.size
    return guest(
        f"""(i32.store (i32.const 512) (i32.const 5)) {extra}
        (loop $l
          (local.set $a (i32.add (i32.const 4096) (i32.mul (local.get $b) (i32.const {size}))))
          (i32.store (local.get $a) (call $seq_new))
          (i32.store offset=4 (local.get $a) (i32.const 1))
          (i64.store offset=8 (local.get $a) (i64.const 512))
          (i64.store offset=16 (local.get $a) (i64.const 600))
          (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const {count}))))
        (call $batch_forward (i32.const 4096) (i32.const {count}))""",
        "seq_new",
        "batch_forward",
        memory="2",
    )


def test_a_large_batch_is_prepared_in_slices_and_sent_as_one() -> None:
    host = Host()
    run = host.start(many_items(1000), sequences=1000)
    neighbour = host.start(guest("(loop $l (br $l)) (i32.const 0)"), tenant="b")
    turns = 0
    while not host.engine.forwards:
        host.turn(engine=False)
        turns += 1
    # All of them in one turn, after several slices.
    assert len(host.engine.forwards) == 1000
    assert turns > 1
    while host.finished(run) is None:
        host.turn()
    end = host.finished(run)
    assert end is not None
    assert (end.outcome, end.code) == ("complete", 1000)
    assert end.usage.fuel > 1000 * calls_batch.ITEM_FUEL
    assert host.finished(neighbour) is None


def test_a_cancelled_batch_leaves_nothing() -> None:
    host = Host()
    run = host.start(many_items(1000), sequences=1000)
    while host.runtime._runs[run].job is None:
        host.turn()
    host.runtime.cancel(CancelRun(run, "enough"))
    host.turn()
    assert not host.engine.forwards
    host.check_empty()


def test_a_batch_that_fails_in_the_middle_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def broken(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError

    monkeypatch.setattr(calls_batch, "check_room", broken)
    host = Host()
    end = host.run(many_items(5))
    assert end.code == ErrorCode.INTERNAL
    assert not host.engine.forwards
    host.turn()
    host.check_empty()


def test_a_long_input_is_copied_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_session, "COPY_STEP", 1000)
    data = bytes(range(256)) * 20
    host = Host()
    body = """(local.set $a (call $input_read (i32.const 7) (i32.const 100) (i32.const 4500)))
      (drop (call $emit (i32.const 100) (local.get $a))) (local.get $a)"""
    end = host.run(guest(body, "input_read", "emit"), input=data)
    assert end.code == 4500
    assert host.output(1) == data[7:4507]


# --- memory of the host -----------------------------------------------------------------------------


def test_a_batch_may_not_carry_more_than_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_batch, "MAX_BATCH_BYTES", 4 * 30 + 3 * 48)
    mask = struct.pack(abi.SAMPLING.format, *[0] * 7, OUTPUT_AT, INPUT_AT, 4, 4)
    items = [(handle, 1, TOKENS_AT, 4096, 0, 0.0, 0, 0) for handle in (1, 9)]
    blob = {
        ITEMS_AT: b"".join(struct.pack(abi.ITEM.format, *item) for item in items),
        TOKENS_AT: u32(9),
        4096: mask,
        OUTPUT_AT: b"\xff" * 16,
        INPUT_AT: struct.pack("<IfIfIfIf", 1, 1, 2, 1, 3, 1, 4, 1),
    }
    # 4 bytes of tokens, 16 of mask and 32 of biases: five times that is too much, once is not.
    assert call("batch_forward", ITEMS_AT, 2, blob=blob).result == 1
    monkeypatch.setattr(calls_batch, "MAX_BATCH_BYTES", 51)
    answer = call("batch_forward", ITEMS_AT, 2, blob=blob)
    assert answer.result == 0
    assert answer.fields(abi.ITEM, ITEMS_AT)["token"] == ErrorCode.INVALID_ARGUMENT
    assert "51 bytes" in answer.host.logs(answer.run)[0][1]


def test_items_that_share_their_sampling_share_its_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    real = sampling_arguments.decode_sampling

    def counted(*args: object) -> object:
        nonlocal decoded
        decoded += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(calls_batch, "decode_sampling", counted)
    host = Host()
    assert host.run(many_items(50)).code == 50
    assert decoded == 1
    assert [op.sampling is not None for op in host.engine.forwards] == [True] * 50


def test_kept_logits_count_like_the_guests_memory() -> None:
    assert 4 * FACTS.vocab_size == 400
    body = """(i32.store (i32.const 512) (i32.const 5))
      (loop $l
        (local.set $c (call $forward (call $seq_new) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0)))
        (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))
        (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 400))))
      (i32.const 0)"""
    wat = guest(body, "seq_new", "forward")
    host = Host()
    end = host.run(wat, memory_bytes=65_536, sequences=1000)
    assert end.error is not None
    assert end.error.code == "limit_exceeded"
    assert end.error.details["name"] == "memory_bytes"
    # 400 bytes each: 163 fit, and what they use is said.
    assert end.error.details["used"] == 163 * 400
    assert len(host.engine.forwards) == 163
    assert Host().run(wat, memory_bytes=4 * 65_536, sequences=1000).outcome == "complete"


def test_forks_share_what_they_keep() -> None:
    body = """(i32.store (i32.const 512) (i32.const 5))
      (local.set $a (call $seq_new))
      (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0)))
      (loop $l
        (drop (call $seq_fork (local.get $a)))
        (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 400))))
      (call $forward (call $seq_new) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0))"""
    end = Host().run(guest(body, "seq_new", "seq_fork", "forward"), memory_bytes=65_536, sequences=1000)
    assert end.outcome == "complete"
    assert calls_model.KEPT_LOGITS > 1


def test_streams_do_not_hoard_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_text, "MAX_WAITING", 1000)
    body = """(local.set $b (i32.const 512))
      (loop $l
        (i32.store (i32.const 512) (i32.add (i32.const 40) (i32.and (local.get $a) (i32.const 31))))
        (local.set $c (call $detokenize (i32.and (local.get $a) (i32.const 7)) (i32.const 512) (i32.const 100)
          (i32.const 0) (i32.const 0) (i32.const 0)))
        (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))
        (br_if $l (i32.lt_u (local.tee $a (i32.add (local.get $a) (i32.const 1))) (i32.const 1000))))
      (i32.const 0)"""
    host = Host()
    run = host.start(guest(body, "detokenize"))
    while host.finished(run) is None:
        host.turn()
        for live in host.runtime._runs.values():
            kept = sum(len(s.unread) + len(s.unread_tokens or b"") for s in live.streams.values())
            assert kept == live.unread <= 1000 + 600
    end = host.finished(run)
    assert end is not None
    assert end.code == ErrorCode.LIMIT


def test_text_that_waited_is_given_and_makes_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_text, "MAX_WAITING", 8)
    body = """
      (i32.store (i32.const 512) (i32.const 97)) (i32.store (i32.const 516) (i32.const 98))
      (if (i32.ne (call $detokenize (i32.const 3) (i32.const 512) (i32.const 2) (i32.const 0) (i32.const 0)
        (i32.const 1)) (i32.const 2)) (then unreachable))
      (if (i32.ne (call $detokenize (i32.const 3) (i32.const 516) (i32.const 1) (i32.const 0) (i32.const 0)
        (i32.const 9)) (i32.const -6)) (then unreachable))
      (if (i32.ne (call $detokenize (i32.const 3) (i32.const 512) (i32.const 2) (i32.const 0) (i32.const 0)
        (i32.const 9)) (i32.const 2)) (then unreachable))
      (call $detokenize (i32.const 3) (i32.const 516) (i32.const 1) (i32.const 0) (i32.const 0) (i32.const 9))"""
    assert Host().run(guest(body, "detokenize")).code == 1


# --- prints and random numbers ----------------------------------------------------------------------


def prints(extra: str, calls: int, memory: str = "1") -> str:
    return f"""(module
      (import "wasi_snapshot_preview1" "fd_write" (func $w (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") {memory}) {extra}
      (func (export "run") (result i32) (local $n i32)
        (loop $l (drop (call $w (i32.const 1) (i32.const 0) (i32.const {calls}) (i32.const 60000)))
          (br_if $l (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 3))))
        (i32.load (i32.const 60000))))"""


def test_one_print_takes_so_many_lines_and_says_how_far_it_came() -> None:
    newlines = "\\n" * 2000
    vector = struct.pack("<II", 1024, 2000)
    escaped = "".join(f"\\{byte:02x}" for byte in vector)
    host = Host()
    end = host.run(prints(f'(data (i32.const 0) "{escaped}") (data (i32.const 1024) "{newlines}")', 1))
    assert end.code == wasi.MAX_LINES
    assert len(host.logs(1)) == 3 * wasi.MAX_LINES


def test_one_print_takes_so_many_bytes() -> None:
    vectors = b"".join(struct.pack("<II", 0, 65_536) for _ in range(1000))
    escaped = "".join(f"\\{byte:02x}" for byte in vectors)
    host = Host()
    end = host.run(prints(f'(data (i32.const 0) "{escaped}")', 1000), log_bytes=64 << 20)
    assert end.code == wasi.MAX_WRITE
    assert sum(len(text) for _, text in host.logs(1)) <= 3 * wasi.MAX_WRITE


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_a_block_of_random_bytes_is_what_single_numbers_give(count: int) -> None:
    for seed in (0, 1, 2**64 - 1, 12345):
        single = b"".join((random_bits(seed, n) >> 7).to_bytes(7, "little") for n in range(5, 5 + count))
        assert random_block(seed, 5, count) == single


# --- frames -----------------------------------------------------------------------------------------


def test_long_turns_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FRAME_BYTES", 1000)
    items = [Output(1, bytes(300), 0), StoreSet(1, 1, "k", bytes(300)), Log(1, "info", "x" * 75)] * 10
    parts = split(items)
    assert [item for part in parts for item in part] == items
    assert all(len(part) <= 4 for part in parts)
    forwards = [Forward(n, 1, bytes(400), None, False) for n in range(40)]
    assert [op for part in split(forwards) for op in part] == forwards
    assert len(split(forwards)) > 10
    assert split([]) == [[]]
    assert split(items[:3]) == [items[:3]]
