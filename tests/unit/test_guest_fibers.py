"""Fibers by themselves: memory bounds, closing in every state, host functions that fail."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.guests.fiber_types import EngineFailure, FiberState, GuestExit, OutOfBounds
from realm.guests.fibers import Code, Engine, Fiber, LinkedModule, Linker
from tests.fakes import compiled

ENGINE = Engine()
PAGE = 65_536


def guest(body: str) -> str:
    return f"""(module (import "t" "call" (func $call (param i32 i64) (result i64)))
      (memory (export "memory") 1) (func (export "run") (result i32) {body}))"""


WAITS = guest("(i32.wrap_i64 (call $call (i32.const -1) (i64.const -2)))")


def load(wat: str, handler: Any) -> LinkedModule:
    linker = Linker(ENGINE)
    linker.define("t", "call", ("u32", "i64"), "i64", handler)
    return linker.link(artifact(wat))


def artifact(wat: str) -> Code:
    return Code(ENGINE, Path(compiled(wat)).read_bytes())


def fiber(wat: str, handler: Any = lambda guest, values: None, **limits: int) -> Fiber:
    sizes = {"fuel": 10**9, "memory_bytes": 1 << 20, "table_elements": 100, **limits}
    return Fiber(load(wat, handler), "me", **sizes)


def test_a_guest_waits_and_goes_on() -> None:
    seen: list[Any] = []
    one = fiber(WAITS, lambda guest, values: seen.append((guest, values)))
    assert one.poll() is FiberState.WAITING
    assert one.poll() is FiberState.WAITING
    assert seen == [("me", (2**32 - 1, -2))]
    one.resume(41)
    with pytest.raises(EngineFailure):
        one.resume(42)
    assert one.poll() is FiberState.DONE
    assert one.result == 41
    with pytest.raises(EngineFailure):
        one.poll()
    one.close()


@pytest.mark.parametrize("state", ["new", "waiting", "answered", "spinning", "done", "trapped"])
def test_closing_in_every_state_twice(state: str) -> None:
    wat = {"spinning": guest("(loop $l (br $l)) (i32.const 0)"), "trapped": guest("unreachable")}.get(state, WAITS)
    one = fiber(wat)
    if state != "new":
        one.poll()
    if state in ("answered", "done"):
        one.resume(1)
    if state == "done":
        one.poll()
    one.close()
    one.close()
    assert one.closed
    assert one.memory.size == 0
    assert one.memory_bytes == (0 if state == "new" else PAGE)
    with pytest.raises(OutOfBounds):
        one.memory.read(0, 1)
    for use in (one.poll, lambda: one.fuel, lambda: one.resume(1)):
        with pytest.raises(EngineFailure):
            use()


def test_closed_guests_give_their_memory_back() -> None:
    module = load(WAITS, lambda guest, values: None)

    def many() -> None:
        fibers = [Fiber(module, None, fuel=10**9, memory_bytes=1 << 20, table_elements=1) for _ in range(500)]
        assert all(one.poll() is FiberState.WAITING for one in fibers)
        for one in fibers:
            one.close()

    many()
    process = psutil.Process()
    mappings = len(process.memory_maps(grouped=False))
    grown = []
    for _ in range(3):
        before = process.memory_info().rss
        for _ in range(4):
            many()
        grown.append(process.memory_info().rss - before)
    # What other tests have left in this process may move once; what guests leak grows each time.
    assert min(grown) < 8 << 20, grown
    assert len(process.memory_maps(grouped=False)) - mappings < 200


@given(st.integers(-(2**33), 2**65), st.integers(-5, 2**65))
def test_no_access_leaves_the_memory(pointer: int, length: int) -> None:
    memory = _waiting.memory
    inside = pointer >= 0 and length >= 0 and pointer + length <= PAGE
    for use in (lambda: memory.check(pointer, length), lambda: memory.read(pointer, length)):
        if inside:
            use()
        else:
            with pytest.raises(OutOfBounds):
                use()
    layout = struct.Struct("<QI")
    if not 0 <= pointer <= PAGE - layout.size:
        with pytest.raises(OutOfBounds):
            memory.pack(layout, pointer, 1, 2)
        with pytest.raises(OutOfBounds):
            memory.write(pointer, bytes(layout.size))
    else:
        memory.pack(layout, pointer, 2**64 - 1, 7)
        assert layout.unpack(memory.read(pointer, layout.size)) == (2**64 - 1, 7)


_waiting = fiber(WAITS)
_waiting.poll()


def test_an_exception_in_a_host_function_ends_that_guest_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken(guest: object, values: tuple[int, ...]) -> int:
        raise ZeroDivisionError("a defect")

    with caplog.at_level(logging.ERROR):
        one = fiber(WAITS, broken)
        assert one.poll() is FiberState.TRAPPED
    assert one.host_failed
    assert "a defect" in caplog.text
    one.close()
    other = fiber(WAITS, lambda guest, values: 5)
    assert other.poll() is FiberState.DONE
    assert other.result == 5
    other.close()


def test_an_interrupt_in_a_host_function_reaches_the_caller() -> None:
    def interrupted(guest: object, values: tuple[int, ...]) -> int:
        raise KeyboardInterrupt

    one = fiber(WAITS, interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.poll()
    one.close()


def test_a_handler_can_end_its_guest() -> None:
    def leave(guest: object, values: tuple[int, ...]) -> int:
        raise GuestExit(-3)

    one = fiber(WAITS, leave)
    assert one.poll() is FiberState.DONE
    assert one.result == -3
    one.close()


def test_a_fiber_cannot_be_closed_from_inside() -> None:
    def close(guest: object, values: tuple[int, ...]) -> int:
        with pytest.raises(EngineFailure):
            one.close()
        return 8

    one = fiber(WAITS, close)
    assert one.poll() is FiberState.DONE
    assert one.result == 8
    one.close()


def test_bulk_memory_is_cut_within_a_slice() -> None:
    fill = "(memory.fill (i32.const 0) (i32.const 1) (i32.const 65536))"
    one = fiber(guest(f"(loop $l {fill} (br $l)) (i32.const 0)"))
    before = one.fuel
    assert one.poll() is FiberState.YIELDED
    # Bulk operations cost a unit a byte, so a slice ends after about a million of them.
    assert 1_000_000 <= before - one.fuel <= 1_000_000 + 2 * PAGE
    one.close()


def test_fuel_is_exact_and_repeatable() -> None:
    def burnt() -> int:
        one = fiber(WAITS, lambda guest, values: 1)
        one.poll()
        left = one.fuel
        one.close()
        return 10**9 - left

    assert burnt() == burnt() > 0


def test_artifacts_of_other_kinds_are_refused() -> None:
    whole = Path(compiled(WAITS)).read_bytes()
    for data in (b"", b"not native code", whole[:-200]):
        with pytest.raises(EngineFailure):
            Code(ENGINE, data)
    with pytest.raises(EngineFailure, match="unknown import"):
        Linker(ENGINE).link(Code(ENGINE, whole))
    code = Code(ENGINE, whole)
    code.close()
    code.close()
    with pytest.raises(EngineFailure):
        Linker(ENGINE).link(code)


def test_a_guest_cannot_be_run_from_inside_another() -> None:
    other = fiber(WAITS)

    def again(guest: object, values: tuple[int, ...]) -> int:
        for one in (inside, other):
            with pytest.raises(EngineFailure, match="inside a host function"):
                one.poll()
        return 4

    inside = fiber(WAITS, again)
    assert inside.poll() is FiberState.DONE
    assert inside.result == 4
    assert other.poll() is FiberState.WAITING
    inside.close()
    other.close()


def test_a_closed_module_cannot_be_started() -> None:
    module = load(WAITS, lambda guest, values: None)
    module.close()
    module.close()
    with pytest.raises(EngineFailure):
        Fiber(module, None, fuel=1, memory_bytes=1, table_elements=1)
