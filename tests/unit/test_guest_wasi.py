"""The WASI functions: nothing but the log, the seed and the clock is behind them."""

from __future__ import annotations

import pytest

from realm.guests import wasi
from tests.fakes import Host


def guest(name: str, call: str, *, extra: str = "") -> str:
    types = " ".join("i64" if kind == "u64" else "i32" for kind in wasi.parameters(name))
    parameters = f"(param {types})" if types else ""
    result = "" if wasi.result(name) is None else "(result i32)"
    return f"""(module (import "wasi_snapshot_preview1" "{name}" (func $f {parameters} {result}))
      (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
      (memory (export "memory") 1) {extra}
      (func (export "run") (result i32) (local $r i32) {call}))"""


def constant(name: str, *values: int) -> str:
    kinds = wasi.parameters(name)
    arguments = " ".join(
        f"({'i64' if kind == 'u64' else 'i32'}.const {value})" for kind, value in zip(kinds, values, strict=True)
    )
    return f"(call $f {arguments})"


@pytest.mark.parametrize("name", sorted(set(wasi.SIGNATURES) - {"proc_exit"}))
@pytest.mark.parametrize("value", [0, 1, 3, 65_533, -1])
def test_any_argument_is_harmless(name: str, value: int) -> None:
    host = Host()
    end = host.run(guest(name, constant(name, *[value] * len(wasi.parameters(name)))))
    assert end.outcome == "complete"
    assert 0 <= end.code < 80
    host.turn()
    host.check_empty()


@pytest.mark.parametrize(("code", "outcome"), [(0, "complete"), (7, "complete"), (-5, "error")])
def test_proc_exit_ends_the_guest(code: int, outcome: str) -> None:
    end = Host().run(guest("proc_exit", constant("proc_exit", code) + " (i32.const 99)"))
    assert (end.outcome, end.code) == (outcome, code)


def test_prints_go_to_the_log_by_lines() -> None:
    host = Host()
    extra = (
        r'(data (i32.const 0) "\20\00\00\00\09\00\00\00\30\00\00\00\03\00\00\00") (data (i32.const 32) "one\ntwo\nt")'
    )
    extra += '(data (i32.const 48) "hee")'
    call = constant("fd_write", 2, 0, 2, 100) + "drop (i32.load (i32.const 100))"
    assert host.run(guest("fd_write", call, extra=extra)).code == 12
    assert host.logs(1) == [("warning", "one"), ("warning", "two"), ("warning", "thee")]


def test_prints_do_not_flood_the_log() -> None:
    host = Host()
    extra = r'(data (i32.const 0) "\00\00\00\00\00\80\00\00")'
    call = f"(loop $l (drop {constant('fd_write', 1, 0, 1, 100)}) (br $l)) (i32.const 0)"
    end = host.run(guest("fd_write", call, extra=extra), log_bytes=100_000, fuel=50_000_000)
    assert end.error is not None
    assert end.error.code == "fuel_exhausted"
    assert sum(len(text.encode()) for _, text in host.logs(1)) < 101_000


def test_random_numbers_repeat_with_the_seed() -> None:
    call = f"(drop {constant('random_get', 0, 16)}) (call $emit (i32.const 0) (i32.const 16))"

    def output(seed: int) -> bytes:
        host = Host()
        host.run(guest("random_get", call), seed=seed)
        return host.output(1)

    assert output(1) == output(1) != output(2)
    assert len(set(output(1))) > 8


def test_there_are_no_files() -> None:
    for name in ("path_open", "fd_prestat_get", "fd_read", "sock_accept"):
        values = [3] * len(wasi.parameters(name))
        assert Host().run(guest(name, constant(name, *values))).code == wasi.EBADF
