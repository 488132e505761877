"""Attacks on the boundary, made from the tables: no argument gets past its checks, at either width."""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Callable, Iterator

import pytest

from realm.guests import abi
from realm.guests.abi import ErrorCode
from realm.run_messages import ClientMessage
from tests import probe
from tests.fakes import Host, greedy
from tests.probe import ANSWER_AT, INPUT_AT, ITEMS_AT, MEMORY, OUTPUT_AT, STRUCT_AT, TOKENS_AT, call


def u32(*values: int) -> bytes:
    return array("I", values).tobytes()


# --- attacks made from the table ------------------------------------------------------------------

BAD_RANGES = [(MEMORY, 1), (MEMORY - 1, 2**20), (0xFFFFFFFF, 1), (0xFFFFFFF0, 0x20), (2**31, 2**31), (8, 0xFFFFFFFF)]
WIDE_RANGES = [
    *BAD_RANGES,
    (2**32, 1),
    (2**32 + 8, 1),
    (2**63, 1),
    (2**63, 2**63),
    (2**64 - 1, 1),
    (2**64 - 8, 16),
    (2**64 - 1, 2**64 - 1),
    (8, 2**32),
    (8, 2**63),
    (8, 2**64 - 8),
]
WIDTHS = (False, True)


def attacks(wide: bool) -> Iterator[tuple[bool, str, str, int, tuple[int, ...], tuple[ErrorCode, ...]]]:
    """(64-bit memory, function, parameter, position, bad values, error codes that may answer them)."""
    for attack in narrow_attacks(WIDE_RANGES if wide else BAD_RANGES, (2**32, 2**63, 2**64 - 1) if wide else ()):
        yield (wide, *attack)


def narrow_attacks(
    ranges: list[tuple[int, int]], pointers: tuple[int, ...]
) -> Iterator[tuple[str, str, int, tuple[int, ...], tuple[ErrorCode, ...]]]:
    for function in abi.FUNCTIONS:
        at = 0
        for p in function.parameters:
            match p:
                case abi.Scalar():
                    if p.low:
                        yield function.name, p.name, at, (p.low - 1,), (ErrorCode.INVALID_ARGUMENT,)
                    if p.high is not None:
                        for bad in (p.high + 1, 0xFFFFFFFF):
                            yield function.name, p.name, at, (bad,), (ErrorCode.INVALID_ARGUMENT,)
                case abi.Handle():
                    for bad in (0, -1, 2, 7, 2**31 - 1, -(2**31)):
                        yield function.name, p.name, at, (bad,), (ErrorCode.BAD_HANDLE,)
                case abi.Input() | abi.Output() | abi.InOut():
                    for pair in ranges:
                        yield function.name, p.name, at, pair, (ErrorCode.BAD_POINTER, ErrorCode.INVALID_ARGUMENT)
                    if isinstance(p, abi.Input) and p.low:
                        yield function.name, p.name, at, (INPUT_AT, p.low - 1), (ErrorCode.INVALID_ARGUMENT,)
                    if not isinstance(p, abi.Output):
                        yield function.name, p.name, at, (INPUT_AT, p.high + 1), (ErrorCode.INVALID_ARGUMENT,)
                case abi.StructIn() | abi.StructOut():
                    size = p.struct.size
                    for bad in (MEMORY, MEMORY - size + 1, 0xFFFFFFFF, 2**31, *pointers):
                        yield function.name, p.name, at, (bad,), (ErrorCode.BAD_POINTER,)
                    if not p.optional:
                        yield function.name, p.name, at, (0,), (ErrorCode.BAD_POINTER,)
            at += 2 if isinstance(p, abi.Input | abi.Output | abi.InOut) else 1


ATTACKS = [attack for wide in WIDTHS for attack in attacks(wide)]


@pytest.mark.parametrize(
    ("wide", "name", "parameter", "at", "bad", "codes"),
    ATTACKS,
    ids=[f"{64 if a[0] else 32}-{a[1]}-{a[2]}-{a[4]}" for a in ATTACKS],
)
def test_a_bad_argument_is_an_error_code(
    wide: bool, name: str, parameter: str, at: int, bad: tuple[int, ...], codes: tuple[ErrorCode, ...]
) -> None:
    arguments, blob = probe.valid_arguments(abi.BY_NAME[name])
    arguments[at : at + len(bad)] = bad
    answer = call(name, *arguments, blob=blob, wide=wide)
    assert answer.end.outcome == "complete"
    assert answer.result in codes
    assert answer.untouched
    warnings = [text for level, text in answer.host.logs(answer.run) if level == "warning"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{name}: ")
    answer.host.turn()
    answer.host.check_empty()


def handles() -> Iterator[tuple[str, int]]:
    """(function, position) of each handle parameter."""
    for function in abi.FUNCTIONS:
        at = 0
        for p in function.parameters:
            if isinstance(p, abi.Handle):
                yield function.name, at
            at += 2 if isinstance(p, abi.Input | abi.Output | abi.InOut) else 1


HANDLES = list(handles())
STALE = 2
"""The handle that a guest of :func:`stale_module` made and freed."""

HOLDER = """(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "seq_len" (func $seq_len (param i32) (result i32)))
  (import "realm" "recv" (func $recv (param i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32)
    (drop (call $seq_new)) (drop (call $seq_new)) (drop (call $seq_new))
    (drop (call $recv (i32.const 0) (i32.const 8) (i32.const 60000)))
    (i32.add (call $seq_len (i32.const 1)) (i32.add (call $seq_len (i32.const 2)) (call $seq_len (i32.const 3))))))"""
"""Has sequences 1 to 3, all empty, until a message comes; returns what their lengths add up to."""


def stale_module(name: str, wide: bool = False, made: Callable[[str, bool], str] = probe.module) -> str:
    """The probe, with a second sequence made and freed before the call."""
    text = made(name, wide)
    if name != "seq_free":
        text = text.replace(
            "(memory ", '(import "realm" "seq_free" (func $seq_free (param i32) (result i32))) (memory ', 1
        )
    begin = "(drop (call $input_read "
    assert text.count(begin) == 1
    setup = f"""
        (if (i32.ne (call $seq_new) (i32.const {STALE})) (then (unreachable)))
        (if (call $seq_free (i32.const {STALE})) (then (unreachable)))"""
    return text.replace(begin, f"{setup} {begin}")


def check_bad_handle(answer: probe.Answer, name: str) -> None:
    assert answer.end.outcome == "complete"
    if name == "batch_forward":
        assert answer.fields(abi.ITEM, ITEMS_AT)["token"] == ErrorCode.BAD_HANDLE
    else:
        assert answer.result == ErrorCode.BAD_HANDLE
        assert answer.untouched
        warnings = [text for level, text in answer.host.logs(answer.run) if level == "warning"]
        assert len(warnings) == 1 and warnings[0].startswith(f"{name}: ")


def with_handle(name: str, at: int, handle: int) -> tuple[list[int], dict[int, bytes]]:
    """Arguments that are right but for a handle; ``batch_forward`` has it in its item."""
    arguments, blob = probe.valid_arguments(abi.BY_NAME[name])
    if name == "batch_forward":
        blob[ITEMS_AT] = struct.pack(abi.ITEM.format, handle, 1, TOKENS_AT, 0, 0, 0.0, 0, 0)
    else:
        arguments[at] = handle
    return arguments, blob


def test_there_are_handles_to_attack() -> None:
    assert {"forward", "sample", "score", "seq_fork", "seq_free", "seq_len", "seq_save"} <= {
        name for name, _ in HANDLES
    }


@pytest.mark.parametrize(("name", "at"), [*HANDLES, ("batch_forward", 0)])
def test_a_stale_handle_is_refused(name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "module", stale_module)
    arguments, blob = with_handle(name, at, STALE)
    answer = call(name, *arguments, blob=blob)
    check_bad_handle(answer, name)
    answer.host.turn()
    answer.host.check_empty()


@pytest.mark.parametrize(("name", "at"), [*HANDLES, ("batch_forward", 0)])
def test_another_guests_handle_is_refused(name: str, at: int) -> None:
    host = Host()
    holder = host.start(HOLDER)
    host.settle()
    theirs = dict(host.engine.sequences)
    assert len(theirs) == 3
    arguments, blob = with_handle(name, at, 3)
    answer = call(name, *arguments, blob=blob, host=host)
    check_bad_handle(answer, name)
    host.turn()
    assert host.engine.sequences == theirs
    # The holder lost nothing: its three sequences are there, and as empty as they were.
    host.runtime.message(ClientMessage(holder, b"go"))
    host.settle()
    end = host.finished(holder)
    assert end is not None and (end.outcome, end.code) == ("complete", 0)
    host.check_empty()


@pytest.mark.parametrize("wide", WIDTHS)
@pytest.mark.parametrize("name", [f.name for f in abi.FUNCTIONS])
def test_valid_arguments_pass_the_decoder(name: str, wide: bool) -> None:
    arguments, blob = probe.valid_arguments(abi.BY_NAME[name])
    answer = call(name, *arguments, blob=blob, wide=wide)
    assert answer.end.outcome == "complete"
    assert answer.result not in (ErrorCode.BAD_POINTER, ErrorCode.BAD_HANDLE, ErrorCode.INTERNAL)


UTF8 = [(f.name, p.name) for f in abi.FUNCTIONS for p in f.parameters if isinstance(p, abi.Input) and p.utf8]


@pytest.mark.parametrize(("name", "parameter"), UTF8)
def test_text_must_be_utf8(name: str, parameter: str) -> None:
    arguments, blob = probe.valid_arguments(abi.BY_NAME[name])
    blob[INPUT_AT] = b"\xc3\x28"
    position = arguments.index(INPUT_AT)
    arguments[position + 1] = 2
    answer = call(name, *arguments, blob=blob)
    assert answer.result == ErrorCode.BAD_UTF8
    assert answer.host.logs(answer.run)[0][1].startswith(f"{name}: {parameter} is not UTF-8 at byte 0")


@pytest.mark.parametrize("wide", WIDTHS)
@pytest.mark.parametrize("name", [f.name for f in abi.FUNCTIONS])
def test_random_arguments_never_do_worse_than_an_error_code(name: str, wide: bool) -> None:
    function = abi.BY_NAME[name]
    numbers = random.Random(name)
    edges = [0, 1, 2, 3, 5, 64, 512, 4096, MEMORY - 1, MEMORY, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
    host = Host()
    for _ in range(60):
        arguments, blob = probe.valid_arguments(function)
        for at in range(len(arguments)):
            if numbers.random() < 0.5:
                arguments[at] = numbers.choice(edges) if numbers.random() < 0.7 else numbers.getrandbits(32)
        blob[STRUCT_AT] = numbers.randbytes(64) if numbers.random() < 0.5 else bytes(64)
        blob.setdefault(ITEMS_AT, numbers.randbytes(48))
        answer = call(name, *arguments, blob=blob, host=host, wide=wide)
        if answer.end.outcome != "complete":
            # A long wait for a message that does not come: the run's own time ends it.
            assert name == "recv"
            assert answer.end.error is not None
            assert answer.end.error.code == "wall_time_exceeded"
        assert answer.result != ErrorCode.INTERNAL
    host.turn()
    host.check_empty()


# --- placement --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", WIDTHS)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_pointers_need_no_alignment(shift: int, wide: bool) -> None:
    tokens, out = TOKENS_AT + shift, ANSWER_AT + shift
    answer = call("forward", 1, tokens, 2, 0, out, blob={tokens: u32(7, 8)}, wide=wide)
    assert answer.result == 0
    assert answer.fields(abi.TOKEN, out)["length"] == 4
    assert answer.host.engine.sequences == {} and answer.host.engine.forwards[-1].tokens == u32(7, 8)


@pytest.mark.parametrize("wide", WIDTHS)
@pytest.mark.parametrize("shift", [-4, 0, 4])
def test_overlapping_buffers_are_read_before_they_are_written(shift: int, wide: bool) -> None:
    tokens = (1, 50, 99, 3)
    apart = call("score", 1, TOKENS_AT, 4, OUTPUT_AT, 4, blob={TOKENS_AT: u32(*tokens)}, wide=wide)
    over = call("score", 1, TOKENS_AT, 4, TOKENS_AT + shift, 4, blob={TOKENS_AT: u32(*tokens)}, wide=wide)
    assert apart.result == over.result == 4
    at = TOKENS_AT + shift
    assert over.memory[at : at + 16] == apart.memory[OUTPUT_AT : OUTPUT_AT + 16]


def test_a_call_may_overwrite_the_struct_it_was_told_by() -> None:
    answer = call("forward", 1, TOKENS_AT, 1, STRUCT_AT, STRUCT_AT, blob={TOKENS_AT: u32(7), STRUCT_AT: bytes(48)})
    assert answer.result == greedy([5, 6, 7])
    assert answer.fields(abi.TOKEN, STRUCT_AT)["token"] == answer.result


def test_a_64_bit_guest_cannot_have_32_bit_functions() -> None:
    text = probe.module("seq_len", wide=True).replace(
        '(import "realm" "emit" (func $emit (param i64 i64)', '(import "realm" "emit" (func $emit (param i32 i32)'
    )
    shown = f"(i64.const 0) (i64.const {probe.SHOWN})"
    text = text.replace(f"(call $emit {shown})", f"(call $emit {shown.replace('i64', 'i32')})")
    host = Host()
    end = host.run(text)
    assert end.error is not None
    assert end.error.code == "internal"
    host.turn()
    host.check_empty()
