"""A slice ends with the host calls that have cost a slice's fuel, whatever they answered."""

from __future__ import annotations

import pytest

from realm.guests import slices
from realm.guests.fiber_types import FUEL_SLICE
from realm.guests.run import GuestRun
from tests.fakes import Host
from tests.wat import guest

BAD = "(memory.fill (i32.const 65536) (i32.const 0xff) (i32.const 4194304))"
SEQ = "(local.set $a (call $seq_new))"
FORWARD = "(call $forward (local.get $a) (i32.const 65536) (i32.const 1048576) (i32.const 0) (i32.const 0))"
LOG = "(call $log (i32.const 1) (i32.const 65536) (i32.const 65536))"
TOKENIZE = "(call $tokenize (i32.const 65536) (i32.const 262144) (i32.const 0) (i32.const 0) (i32.const 0))"
DETOKENIZE = (
    "(call $detokenize (i32.const 0) (i32.const 65536) (i32.const 65536) (i32.const 0) (i32.const 0) (i32.const 0))"
)
SMALL = "(call $tokenize (i32.const 16) (i32.const 300) (i32.const 0) (i32.const 0) (i32.const 0))"
DRAFT = "(call $speculative_step (local.get $a) (i32.const 512) (i32.const 0) (i32.const 0))"
DRAFTED = "(i32.store (i32.const 512) (i32.const 2)) (i32.store (i32.const 528) (i32.const 4096))"
READ = "(call $input_read (i32.const 0) (i32.const 65536) (i32.const 262144))"
WASI = """(module
  (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (loop $l (drop {call}) (br $l)) (i32.const 0)))"""


def _slices(wat: str, monkeypatch: pytest.MonkeyPatch, input: bytes = b"") -> list[int]:
    """The host calls of each slice of a guest that calls on and on."""
    counts: list[int] = []
    advance = slices.Slices.advance

    def noted(this: slices.Slices, run: GuestRun) -> bool:
        before = run.usage.host_calls
        more = advance(this, run)
        counts.append(run.usage.host_calls - before)
        return more

    monkeypatch.setattr(slices.Slices, "advance", noted)
    host = Host()
    run = host.start(wat, input=input, fuel=200_000_000)
    host.settle()
    end = host.finished(run)
    assert end is not None
    assert end.error is not None
    assert end.error.code == "fuel_exhausted"
    return counts


@pytest.mark.parametrize(
    ("prepare", "call", "names", "most"),
    [
        (BAD + SEQ, FORWARD, "seq_new forward", 1),
        # Until the log is full its text is made good, which is dearer.
        (BAD, LOG, "log", 4),
        ("(i32.store8 (i32.const 327679) (i32.const 0xff))", TOKENIZE, "tokenize", 1),
        (BAD, DETOKENIZE, "detokenize", 1),
        (SEQ + DRAFTED, DRAFT, "seq_new speculative_step", 15),
        ("", READ, "input_read", 1),
        ("", SMALL, "tokenize", 2),
    ],
    ids=["forward", "log", "tokenize", "detokenize", "speculative_step", "input_read", "jobs"],
)
def test_dear_calls_end_the_slice(
    prepare: str, call: str, names: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wat = guest(f"{prepare} (loop $l (drop {call}) (br $l)) (i32.const 0)", *names.split(), memory="80")
    counts = _slices(wat, monkeypatch, input=b"x" * 262_144)
    # One more where the guest's first call is another.
    assert max(counts) <= most + 1
    assert sum(counts) >= 10
    assert sorted(counts)[len(counts) // 2] <= most


@pytest.mark.parametrize(
    "call",
    [
        "(call $random (i32.const 0) (i32.const 65536))",
        "(call $write (i32.const 1) (i32.const 65536) (i32.const 1024) (i32.const 8))",
    ],
    ids=["random_get", "fd_write"],
)
def test_dear_wasi_calls_end_the_slice(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _slices(WASI.format(call=call), monkeypatch)
    assert max(counts) == 1
    assert sum(counts) >= 10


def test_cheap_calls_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _slices(guest("(loop $l (drop (call $now)) (br $l)) (i32.const 0)", "now"), monkeypatch)
    assert max(counts) > FUEL_SLICE // 10_000
