"""Interruptible fills and copies: the rewritten module does what the original does, in short slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.guests.bulk_memory import CHUNK, CODE_SHIFT, HELPER_PREFIX, rewrite
from realm.guests.fibers import Engine
from realm.guests.module_format import CODE, CUSTOM, parse_module
from realm.guests.module_limits import ModuleLimits
from tests.guest_harness import run_guest
from tests.module_bytes import CODE as CODE_SECTION
from tests.module_bytes import (
    EXPORT,
    FUNCTION,
    HEADER,
    MEMORY,
    TYPE,
    body,
    export,
    items,
    module,
    name,
    number,
    section,
)
from tests.unit.test_module_format import ALL, REAL
from tests.unit.test_modules_guests import noise

PAGES = 5
SIZE = PAGES * 65_536
ENGINE = Engine()

# A module of one function for each operation; the memory begins with a pattern, so that copies show.
TEXT = """(module (memory (export "memory") {wide} 5)
  (func (export "fill") (param {kind} i32 {kind}) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
  (func (export "copy") (param {kind} {kind} {kind}) (memory.copy (local.get 0) (local.get 1) (local.get 2)))
  (func (export "pattern") (local $i {kind})
    (loop $l ({kind}.store (local.get $i)
        ({kind}.xor (local.get $i) ({kind}.shr_u (local.get $i) ({kind}.const 9))))
      (br_if $l ({kind}.lt_u
        (local.tee $i ({kind}.add (local.get $i) ({kind}.const 4))) ({kind}.const 327680))))))"""


def source(wide: bool) -> bytes:
    text = TEXT.format(wide="i64" if wide else "", kind="i64" if wide else "i32")
    return bytes(wasmtime.wat2wasm(text.replace("327680", "327672")))


def rewritten(data: bytes) -> bytes:
    wasmtime.Module.validate(ENGINE.inner, data)
    return rewrite(data, parse_module(data))


@dataclass
class Outcome:
    results: list[object]
    memory: bytes
    fuel: int


class Machine:
    """One instance whose exports are called with any arguments."""

    def __init__(self, data: bytes, fuel: int = 10**9) -> None:
        self.store = wasmtime.Store(ENGINE.inner)
        self.store.set_fuel(fuel)
        self.fuel = fuel
        instance = wasmtime.Instance(self.store, wasmtime.Module(ENGINE.inner, data), [])
        self.exports = instance.exports(self.store)

    def call(self, name: str, *arguments: int) -> object:
        """The result, or the kind of trap."""
        function = self.exports[name]
        assert isinstance(function, wasmtime.Func)
        try:
            return function(self.store, *arguments)
        except wasmtime.Trap as trap:
            return trap.trap_code

    @property
    def memory(self) -> bytes:
        memory = self.exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        return bytes(memory.read(self.store))

    @property
    def used(self) -> int:
        return self.fuel - self.store.get_fuel()


Call = tuple[str, tuple[int, int, int]]
COMPILED = {wide: (source(wide), rewritten(source(wide))) for wide in (False, True)}


def play(data: bytes, calls: Sequence[Call]) -> Outcome:
    machine = Machine(data)
    machine.call("pattern")
    results = [machine.call(name, *arguments) for name, arguments in calls]
    return Outcome(results, machine.memory, machine.used)


def edges(wide: bool) -> st.SearchStrategy[int]:
    top = 1 << (64 if wide else 32)
    middle = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, SIZE - CHUNK, SIZE - 1, SIZE, SIZE + 1, top // 2]
    special = [*middle, top // 2 - 1, top - 1, top - CHUNK, top - SIZE, (1 << 32) - 1]
    return st.one_of(st.sampled_from(special), st.integers(0, SIZE + 10), st.integers(0, top - 1)).map(
        # Wasmtime's Python interface takes signed numbers.
        lambda value: value - top if value >= top // 2 else value
    )


def programs(wide: bool) -> st.SearchStrategy[list[Call]]:
    edge = edges(wide)
    fill = st.tuples(st.just("fill"), st.tuples(edge, st.integers(-1, 300), edge))
    copy = st.tuples(st.just("copy"), st.tuples(edge, edge, edge))
    return st.lists(st.one_of(fill, copy), max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.booleans().flatmap(lambda wide: st.tuples(st.just(wide), programs(wide))))
def test_memory_and_traps_are_the_same(case: tuple[bool, list[Call]]) -> None:
    wide, calls = case
    original, changed = COMPILED[wide]
    expected, actual = play(original, calls), play(changed, calls)
    assert actual.results == expected.results
    assert actual.memory == expected.memory


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        # Overlapping both ways, by less than, exactly and more than a piece.
        ("copy", (100, 0, 3 * CHUNK)),
        ("copy", (0, 100, 3 * CHUNK)),
        ("copy", (CHUNK, 0, 3 * CHUNK)),
        ("copy", (0, CHUNK, 3 * CHUNK + 7)),
        ("copy", (CHUNK + 1, 0, 3 * CHUNK + 7)),
        ("copy", (0, CHUNK + 1, 3 * CHUNK)),
        ("copy", (5, 5, 4 * CHUNK)),
        ("copy", (0, 0, SIZE)),
        ("fill", (0, 0x1FE, SIZE)),
        ("fill", (1, 7, CHUNK)),
        ("fill", (1, 7, CHUNK + 1)),
        ("fill", (3, 7, SIZE - 3)),
        # One byte too far: a trap, and nothing is written.
        ("fill", (4, 7, SIZE - 3)),
        ("copy", (4, 0, SIZE - 3)),
        ("copy", (0, 4, SIZE - 3)),
        ("fill", (SIZE, 7, 0)),
        ("fill", (SIZE + 1, 7, 0)),
        ("fill", (-1, 7, CHUNK * 2)),
        ("fill", (CHUNK, 7, -1)),
        ("copy", (CHUNK, 0, -CHUNK)),
        ("copy", (0, -1, CHUNK * 2)),
    ],
)
def test_edges(wide: bool, call: Call) -> None:
    original, changed = COMPILED[wide]
    expected, actual = play(original, [call]), play(changed, [call])
    assert actual.results == expected.results
    assert actual.memory == expected.memory
    traps = [result for result in actual.results if result is not None]
    assert traps in ([], [wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS])
    if traps:
        assert actual.memory == play(original, []).memory
    # The work is paid for as before: a unit a byte, and little for the pieces.
    assert 0 <= actual.fuel - expected.fuel < 500


def test_a_full_32_bit_memory_has_a_size_that_does_not_fit_in_32_bits() -> None:
    # Never filled: fuel ends after a piece. What could go wrong is the check of bounds.
    data = bytes(wasmtime.wat2wasm(TEXT.format(wide="", kind="i32").replace("5)", "65536)", 1)))
    machine = Machine(rewrite(data, parse_module(data, ModuleLimits(memory_bytes=1 << 32))), fuel=CHUNK)
    assert machine.call("fill", -1, 0, 2) == wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS
    assert machine.call("copy", 2, 0, -1) == wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS
    assert machine.call("fill", 2, 7, -2) == wasmtime.TrapCode.OUT_OF_FUEL
    memory = machine.exports["memory"]
    assert isinstance(memory, wasmtime.Memory)
    assert memory.read(machine.store, 0, 4) == b"\0\0\7\7"


def test_a_guest_out_of_fuel_stops_within_a_piece() -> None:
    # The original writes everything before it looks at its fuel.
    for data, written in zip(COMPILED[False], (4 * CHUNK, 2 * CHUNK), strict=True):
        filling = Machine(data, fuel=CHUNK + 1000)
        assert filling.call("fill", 0, 1, 4 * CHUNK) == wasmtime.TrapCode.OUT_OF_FUEL
        assert filling.memory.count(1) == written
        copying = Machine(data, fuel=CHUNK + 1000)
        memory = copying.exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        memory.write(copying.store, b"\1" * CHUNK, 4 * CHUNK)
        # One piece down: only the last one that is read has anything but zeros.
        assert copying.call("copy", 1, 1 + CHUNK, 4 * CHUNK - 1) == wasmtime.TrapCode.OUT_OF_FUEL
        assert copying.memory.count(1) == (2 * CHUNK if written == 4 * CHUNK else CHUNK)


# --- the file -----------------------------------------------------------------------------------


def code_start(data: bytes) -> int:
    part = parse_module(data).section(CODE)
    assert part is not None
    _, first = _number_at(data, part.content)
    return first


def _number_at(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_guests_keep_their_code(path: Path) -> None:
    data = path.read_bytes()
    changed = rewritten(data)
    wasmtime.Module.validate(ENGINE.inner, changed)
    before, after = parse_module(data), parse_module(changed)
    first = code_start(data)
    assert code_start(changed) == first + CODE_SHIFT
    part = before.section(CODE)
    assert part is not None
    mine, theirs = bytearray(data[first : part.end]), bytearray(changed[first + CODE_SHIFT : part.end + CODE_SHIFT])
    replaced = [site for site in before.sites if site.constant is None or site.constant > CHUNK]
    assert after.functions == before.functions + (2 if replaced else 0)
    for site in replaced:
        at = slice(site.offset - first, site.offset - first + site.length)
        assert theirs[at][0] == 0x10
        mine[at] = theirs[at] = bytes(site.length)
    assert mine == theirs
    # Small constant sizes stay what they were; the others are in the added functions only.
    kept = [s for s in after.sites if s.offset < part.end + CODE_SHIFT]
    assert len(kept) == len(before.sites) - len(replaced)


def test_a_module_without_large_operations_only_moves() -> None:
    data = module()
    changed = rewritten(data)
    assert changed[:8] == HEADER and changed[8 + CODE_SHIFT :] == data[8:]
    assert parse_module(changed).sections[0].kind == CUSTOM
    small = module(bodies=[body(b"\x41\0\x41\0\x41\x20\xfc\x0b\0\x41\0\x0b")])
    assert rewritten(small)[8 + CODE_SHIFT :] == small[8:]


def test_instructions_and_numbers_longer_than_needed() -> None:
    """As linkers write them; all lengths up to the longest, between traps that would show a wrong boundary."""
    bodies = []
    for opcode in (b"\x8b", b"\x8a"):
        for longer in range(4):
            instruction = b"\xfc" + opcode + b"\x80" * longer + b"\0" + b"\x80" * longer + b"\0"
            if opcode == b"\x8a":
                instruction += b"\x80" * longer + b"\0"
            arguments = b"\x41\x0a\x41\x07\x20\0"
            bodies.append(body(b"\x41\x05\x21\0" + arguments + instruction + b"\x41\0\x0b", [(1, 0x7F)]))
    exports = [export("memory", 2, 0), *(export(f"f{i}", 0, 2 + i) for i in range(len(bodies)))]
    plain = module(bodies=bodies, sections={EXPORT: items(exports)})
    facts = parse_module(plain)
    assert [site.length for site in facts.sites] == [4, 6, 8, 10, 5, 8, 11, 14]
    for data in (plain, _padded(plain)):
        changed = rewritten(data)
        assert code_start(changed) == code_start(data) + CODE_SHIFT
        original, other = Machine(data), Machine(changed)
        for at in range(len(bodies)):
            assert other.call(f"f{at}") == original.call(f"f{at}") == 0
            assert original.memory[10:16] == (b"\7" * 5 + b"\0" if at < 4 else other.memory[10:16])
        assert other.memory == original.memory


def _padded(data: bytes) -> bytes:
    """The same module with five bytes for each section's size and each list's length."""
    parts = [HEADER]
    for part in parse_module(data).sections:
        count, first = _number_at(data, part.content)
        content = number(count, 5) + data[first : part.end]
        parts.append(bytes([part.kind]) + number(len(content), 5) + content)
    return b"".join(parts)


def test_the_most_functions_that_are_allowed() -> None:
    fill = body(b"\x20\0\x41\x07\x20\1\xfc\x0b\0\x0b")
    spare = 16_000 - 1
    data = module(
        types=[b"\x60\2\x7f\x7f\0"],
        bodies=(),
        sections={
            TYPE: items([b"\x60\2\x7f\x7f\0", b"\x60\0\0"]),
            FUNCTION: items([b"\0", *[b"\1"] * spare]),
            MEMORY: items([b"\0\5"]),
            EXPORT: items([export("memory", 2, 0), export("fill", 0, 0)]),
            CODE_SECTION: items([fill, *[body(b"\x0b")] * spare]),
        },
    )
    machine = Machine(rewritten(data))
    assert machine.call("fill", 3, 4 * CHUNK) is None
    assert machine.memory.count(7) == 4 * CHUNK


@pytest.mark.parametrize("named", [True, False])
def test_backtraces_leave_out_one_frame_and_one_shift(named: bool) -> None:
    text = """(module (import "realm" "now" (func $now (result i64))) (memory (export "memory") 1)
      (func $inner (param i32) (memory.fill (local.get 0) (i32.const 1) (local.get 0)))
      (func (export "go") (call $inner (i32.const 0x7fff0000))))"""
    data = bytes(wasmtime.wat2wasm(text if named else text.replace("$inner", "1").replace("(func 1", "(func")))
    frames = []
    for binary in (data, rewritten(data)):
        store = wasmtime.Store(ENGINE.inner)
        store.set_fuel(10**6)
        linker = wasmtime.Linker(ENGINE.inner)
        binary_module = wasmtime.Module(ENGINE.inner, binary)
        linker.define_unknown_imports_as_traps(binary_module)
        go = linker.instantiate(store, binary_module).exports(store)["go"]
        assert isinstance(go, wasmtime.Func)
        with pytest.raises(wasmtime.Trap) as caught:
            go(store)
        assert caught.value.trap_code == wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS
        frames.append([(f.func_index, f.func_name, f.module_offset) for f in caught.value.frames])
    original, (helper, *changed) = frames
    assert helper[1] is not None and helper[1].encode().startswith(HELPER_PREFIX)
    assert [(i, n, offset - CODE_SHIFT) for i, n, offset in changed] == original
    assert original[0][1] == ("inner" if named else None)


def test_everything_else_survives() -> None:
    changed = rewritten(ALL)
    wasmtime.Module.validate(ENGINE.inner, changed)
    before, after = wasmtime.Module(ENGINE.inner, ALL), wasmtime.Module(ENGINE.inner, changed)
    assert [(e.name, str(type(e.type))) for e in after.exports] == [(e.name, str(type(e.type))) for e in before.exports]
    assert [(e.module, e.name) for e in after.imports] == [(e.module, e.name) for e in before.imports]
    twice = rewritten(ALL + section(0, name("extra") + b"abc"))
    assert b"extra" in twice


@pytest.mark.parametrize("seed", range(3))
def test_a_real_guest_says_the_same(tmp_path: Path, seed: int) -> None:
    """The one with the most fills and copies, in the real runtime: same text, log and calls of the engine."""
    original = next(path for path in REAL if path.name == "constrained.wasm")
    changed = tmp_path / "rewritten.wasm"
    changed.write_bytes(rewritten(original.read_bytes()))
    assert HELPER_PREFIX in changed.read_bytes()
    options = {"temperature": 0.8, "grammar": "[a-f]{1,40}(x|yy)"}
    first, second = (run_guest(path, options, noise, seed=seed) for path in (original, changed))
    assert (first.outcome, first.code) == ("complete", 0)
    assert (second.pieces, second.logs, second.code) == (first.pieces, first.logs, first.code)
    assert second.engine.forwards == first.engine.forwards
