"""The structure of modules: what is taken apart, counted and refused before the compiler sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st

import realm
from realm.errors import RealmError
from realm.guests.fibers import Engine
from realm.guests.instructions import MEMORY_COPY, MEMORY_FILL, Body, Malformed, read_number
from realm.guests.module_format import parse_module
from realm.guests.module_limits import ModuleLimits
from tests.module_bytes import (
    CODE,
    CUSTOM,
    DATA,
    DATA_COUNT,
    ELEMENT,
    EXPORT,
    FUNCTION,
    GLOBAL,
    HEADER,
    I32,
    IMPORT,
    MEMORY,
    RETURN_0,
    START,
    TABLE,
    TAG,
    TYPE,
    active,
    body,
    export,
    items,
    module,
    name,
    number,
    offset,
    section,
)

ROOT = Path(__file__).parent.parent.parent
REAL = [*ROOT.glob("guest_modules/*/*.wasm"), *(Path(str(realm.__file__)).parent / "guests/builtin").glob("*.wasm")]
LIMITS = ModuleLimits()
ENGINE = Engine()

# A bit of everything that is offered.
ALL = bytes(
    wasmtime.wat2wasm("""(module
  (type $t (func (param i32) (result i32)))
  (import "realm" "now" (func $now (result i64)))
  (memory (export "memory") 1 10) (table $f 4 funcref) (table $x 2 5 funcref)
  (global $g (mut i32) (i32.const -5)) (global f64 (f64.const 1.5)) (global v128 (v128.const i32x4 1 2 3 4))
  (elem (table $f) (i32.const 1) func $one $two) (elem $p func $one) (elem declare func $two)
  (elem $q funcref (ref.func $one) (ref.null func)) (elem (table $f) (i32.const 0) funcref (ref.func $two))
  (data (i32.const 8) "abc") (data $d "passive")
  (start $s) (func $s)
  (func $one (type $t) (local i64 i64 f32)
    (block (loop $l (br_table 0 1 0 (local.get 0))))
    (if (result i32) (local.get 0) (then (i32.const 1)) (else (return_call $two (local.get 0)))))
  (func $two (type $t)
    (memory.copy (i32.const 0) (i32.const 9) (local.get 0)) (memory.fill (i32.const 0) (i32.const 9) (i32.const 64))
    (memory.fill (i32.const 0) (i32.const 9) (i32.const -64))
    (memory.init $d (i32.const 0) (i32.const 0) (i32.const 3)) (data.drop $d)
    (table.init $f $p (i32.const 0) (i32.const 0) (i32.const 1)) (elem.drop $p)
    (table.copy $f $f (i32.const 0) (i32.const 1) (i32.const 1))
    (table.fill $x (i32.const 0) (ref.null func) (i32.const 1)) (drop (table.size $x))
    (drop (table.grow $x (ref.null func) (i32.const 1))) (table.set $x (i32.const 0) (table.get $x (i32.const 1)))
    (drop (ref.is_null (ref.func $one))) (drop (select (result i32) (i32.const 1) (i32.const 2) (i32.const 3)))
    (drop (select (i32.const 1) (i32.const 2) (i32.const 3)))
    (drop (call_indirect $f (type $t) (i32.const 1) (i32.const 2))) (drop (i32.trunc_sat_f64_u (f64.const 2)))
    (drop (i64.extend8_s (i64.const -1))) (drop (memory.grow (memory.size)))
    (i64.store offset=70000 (i32.const 0) (i64.const 0x7fffffffffffffff)) (drop (f32.load (i32.const 4)))
    (v128.store (i32.const 0) (i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15
      (v128.load8_lane offset=300 5 (i32.const 0) (v128.load32_zero (i32.const 0)))
      (i32x4.replace_lane 1 (i32x4.splat (i32.const 1)) (i32.const 2))))
    (drop (i64x2.extmul_high_i32x4_u (f64x2.nearest (v128.const f64x2 0 0)) (i8x16.abs (v128.const i64x2 11 11))))
    (return_call_indirect $f (type $t) (i32.const 1) (i32.const 2)))
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (global.set $g (i32.const 2)) (global.get $g)))""")
)


def refused(data: bytes, limits: ModuleLimits | None = None) -> RealmError:
    with pytest.raises(RealmError) as caught:
        parse_module(data, limits)
    assert caught.value.code in ("module_invalid", "module_too_large")
    assert str(caught.value.message).startswith("the module ")
    return caught.value


def valid(data: bytes) -> bool:
    """What Wasmtime says of it, with Realm's settings."""
    try:
        wasmtime.Module.validate(ENGINE.inner, data)
    except wasmtime.WasmtimeError:
        return False
    return True


# --- good modules -------------------------------------------------------------------------------


def test_all_parts_are_counted() -> None:
    assert valid(ALL)
    facts = parse_module(ALL)
    assert (facts.types, facts.imports, facts.functions, facts.tables, facts.memories) == (4, 1, 6, 2, 1)
    assert (facts.globals, facts.exports, facts.memory_bytes, facts.wide_memory) == (3, 3, 65_536, False)
    assert (facts.element_segments, facts.element_items, facts.data_segments, facts.data_bytes) == (5, 7, 2, 10)
    assert [(site.opcode, site.length, site.constant) for site in facts.sites] == [
        (MEMORY_COPY, 4, None),
        (MEMORY_FILL, 3, 64),
        (MEMORY_FILL, 3, 2**32 - 64),
    ]
    for site in facts.sites:
        assert ALL[site.offset] == 0xFC
    assert [s.kind for s in facts.sections][:3] == [TYPE, IMPORT, FUNCTION]
    assert facts.sections[0].start == 8 and facts.sections[-1].end == len(ALL)


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_guests_fit(path: Path) -> None:
    facts = parse_module(path.read_bytes())
    assert facts.functions > 5 and facts.memories == 1


def test_64_bit_memories() -> None:
    wat = """(module (memory i64 3) (func (i64.store offset=0x100000000 (i64.const 0) (i64.const 1))
      (memory.fill (i64.const 0) (i32.const 1) (i64.const -1))
      (memory.fill (i64.const 0) (i32.const 1) (i64.const 5000000000))))"""
    facts = parse_module(wasmtime.wat2wasm(wat))
    assert facts.wide_memory and facts.memory_bytes == 3 * 65_536
    assert [site.constant for site in facts.sites] == [2**64 - 1, 5_000_000_000]
    assert "memory64" in refused(wasmtime.wat2wasm(wat), ModuleLimits(wide_memory=False)).message


def test_numbers_may_be_longer_than_needed() -> None:
    code = b"\x41\x80\x80\x00\x41\0\x41\xc0\x00\xfc\x8b\x80\x00\x80\x00" + b"\x41\x01\xfd\x8f\x00\xfd\x95\x00\x03\x1a"
    data = module(bodies=[body(code + RETURN_0)])
    assert valid(data)
    (site,) = parse_module(data).sites
    assert (site.opcode, site.length, site.constant) == (MEMORY_FILL, 6, 64)
    assert data[site.offset : site.offset + site.length] == b"\xfc\x8b\x80\x00\x80\x00"


# --- one attack a limit ---------------------------------------------------------------------------

LOOP = b"\x03\x40"
COMPUTED = b"\0\x41\0\x41\0\x6a\x0b"


@pytest.mark.parametrize(
    ("limit", "used", "data"),
    [
        ("functions", 100_002, module(bodies=[body(RETURN_0)] * 100_000)),
        ("locals", 1_000_000, module(bodies=[body(RETURN_0, [(1_000_000, 0x7F)])])),
        ("locals", 2**32 - 1, module(bodies=[body(RETURN_0, [(2**32 - 1, 0x7F)])])),
        ("locals", 20_001, module(bodies=[body(RETURN_0, [(1, 0x7F)] * 30_000)])),
        ("parameters", 10_000, module(types=[b"\x60" + items([I32] * 10_000) + b"\0"])),
        ("parameters", 10_000, module(types=[b"\x60\0" + items([I32] * 10_000)])),
        ("types", 100_001, module(types=[b"\x60\0\0"] * 100_000)),
        ("types", 2**32 - 1, module(sections={TYPE: number(2**32 - 1)})),
        ("nesting", 10_001, module(bodies=[body(LOOP * 100_000 + b"\x0b" * 100_000 + RETURN_0)])),
        ("br_table_targets", 65_000, module(bodies=[body(b"\x41\0\x0e" + number(65_000) + bytes(65_001) + b"\x0b")])),
        ("br_table_targets", 2**32 - 1, module(bodies=[body(b"\x41\0\x0e" + number(2**32 - 1) + b"\x0b")])),
        ("body_bytes", 2_000_002, module(bodies=[body(b"\x01" * 1_999_998 + RETURN_0)])),
        ("imports", 100_000, module(sections={IMPORT: items([name("a") + name("b") + b"\0\0"] * 100_000)})),
        ("exports", 100_000, module(sections={EXPORT: items([export(f"{i}", 0, 0) for i in range(100_000)])})),
        ("name_bytes", 5000, module(sections={EXPORT: items([export("x" * 5000, 0, 0)])})),
        ("name_bytes", 2**32 - 1, module(sections={EXPORT: b"\1" + number(2**32 - 1)})),
        ("globals", 100_000, module(sections={GLOBAL: items([b"\x7f\0\x41\0\x0b"] * 100_000)})),
        ("tables", 17, module(sections={TABLE: items([b"\x70\0\0"] * 17)})),
        ("table_elements", 10_000_000, module(sections={TABLE: items([b"\x70\0" + number(10_000_000)])})),
        ("memory_bytes", 1 << 32, module(pages=65_536)),
        ("data_segments", 100_001, module(sections={DATA: items([active(0, b"x")] * 100_001)})),
        (
            "scattered_segments",
            100_000,
            module(pages=1024, sections={DATA: items([active(i * 600, b"x") for i in range(100_000)])}),
        ),
        (
            "scattered_segments",
            2000,
            module(pages=1024, sections={DATA: items([active(i * 32_000, b"x") for i in range(2000)])}),
        ),
        ("scattered_segments", 2000, module(sections={DATA: items([b"\0\x41\0\x41\0\x6a\x0b\1x"] * 2000)})),
        (
            "scattered_bytes",
            (5 << 20) + 1,
            module(pages=1024, sections={DATA: items([active(0, bytes(5 << 20)), active(60 << 20, b"x")])}),
        ),
        ("passive_bytes", 2 << 20, module(sections={DATA: items([b"\1" + number(2 << 20) + bytes(2 << 20)])})),
        ("element_segments", 5000, module(sections={ELEMENT: items([b"\1\0" + items([b"\0"])] * 5000)})),
        ("element_items", 10_000_000, module(sections={ELEMENT: items([b"\1\0" + items([b"\0"] * 10_000_000)])})),
        (
            "element_items",
            120_000,
            module(sections={ELEMENT: items([b"\0" + offset(0) + items([b"\0"] * 60_000)] * 2)}),
        ),
        ("element_expressions", 10_001, module(sections={ELEMENT: items([b"\1\0" + items([b"\0"] * 10_001)])})),
        ("element_expressions", 10_001, module(sections={ELEMENT: items([COMPUTED + items([b"\0"] * 10_001)])})),
        (
            "element_expressions",
            20_000,
            module(sections={ELEMENT: items([b"\5\x70" + items([b"\xd2\0\x0b"] * 20_000)])}),
        ),
        ("custom_sections", 101, module(after=section(CUSTOM, name("a")) * 100_000)),
        ("custom_bytes", (9 << 20) + 2, module(after=section(CUSTOM, name("a") + bytes(9 << 20)))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_limit(limit: str, used: int, data: bytes) -> None:
    error = refused(data)
    assert error.code == "module_invalid"
    assert error.details == {"name": limit, "limit": getattr(LIMITS, limit), "used": used}
    assert f"{getattr(LIMITS, limit):,}" in error.message


def test_every_limit_is_attacked() -> None:
    attacked = {mark.args[1][i][0] for mark in test_each_limit.pytestmark for i in range(len(mark.args[1]))}
    assert attacked | {"module_bytes", "image_bytes", "wide_memory"} == set(ModuleLimits.__dataclass_fields__)


def test_the_size_of_the_file() -> None:
    error = refused(HEADER + bytes(1000), ModuleLimits(module_bytes=1000))
    assert error.code == "module_too_large"
    assert error.details == {"name": "module_bytes", "limit": 1000, "used": 1008}
    assert LIMITS.module_bytes == 256 << 20  # the most that the tenants' limit can be


def test_large_data_that_is_close_together_is_taken() -> None:
    data = module(pages=256, sections={DATA: items([active(0, bytes(15 << 20)), active(255 << 16, b"x")])})
    assert parse_module(data).data_bytes == (15 << 20) + 1
    pieces = module(pages=256, sections={DATA: items([active(i * 100, b"x") for i in range(100_000)])})
    assert parse_module(pieces).data_segments == 100_000


@pytest.mark.parametrize(
    ("limit", "most"),
    [("functions", 3), ("exports", 3), ("types", 1), ("memory_bytes", 65_536), ("body_bytes", 7), ("nesting", 2)],
)
def test_exactly_at_the_limit(limit: str, most: int) -> None:
    data = module(bodies=[body(b"\x02\x40\x0b" + RETURN_0)])
    parse_module(data, ModuleLimits(**{limit: most}))  # type: ignore[arg-type]
    error = refused(data, ModuleLimits(**{limit: most - 1}))  # type: ignore[arg-type]
    assert error.details == {"name": limit, "limit": most - 1, "used": most}


# --- features that are off ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "feature"),
    [
        (module(sections={MEMORY: items([b"\0\1", b"\0\1"])}), "multi-memory"),
        (module(sections={IMPORT: items([name("a") + name("b") + b"\2\0\1"])}), "multi-memory"),
        (module(sections={MEMORY: items([b"\3\1\1"])}), "threads"),
        (module(sections={MEMORY: items([b"\x08\1\0"])}), "custom page sizes"),
        (module(sections={TAG: items([b"\0\0"])}), "exceptions"),
        (module(sections={IMPORT: items([name("a") + name("b") + b"\4\0\0"])}), "exceptions"),
        (module(sections={EXPORT: items([export("a", 4, 0)])}), "exceptions"),
        (module(types=[b"\x5f\0"]), "gc"),
        (module(types=[b"\x4e\1\x60\0\0"]), "gc"),
        (module(types=[b"\x50\0\x60\0\0"]), "gc"),
        (module(types=[b"\x5d\0"]), "stack switching"),
        (module(types=[b"\x60\1\x63\0\0"]), "gc or typed references"),
        (module(sections={TABLE: items([b"\x6e\0\1"])}), "gc or typed references"),
        (module(sections={TABLE: items([b"\x6f\0\1"])}), "gc or typed references"),
        (module(types=[b"\x60\1\x6f\0"]), "gc or typed references"),
        (module(sections={TABLE: items([b"\x40\0\x70\0\1\xd0\x70\x0b"])}), "typed function references"),
        (module(bodies=[body(b"\xfe\x03\x00\x0b")]), "threads"),
        (module(bodies=[body(b"\xfb\x00\x00\x0b")]), "gc"),
        (module(bodies=[body(b"\x06\x40\x0b\x0b")]), "exceptions"),
        (module(bodies=[body(b"\x1f\x40\0\x0b\x0b")]), "exceptions"),
        (module(bodies=[body(b"\x08\x00\x0b")]), "exceptions"),
        (module(bodies=[body(b"\x14\x00\x0b")]), "typed function references"),
        (module(bodies=[body(b"\x02\x63\x00\x0b\x0b")]), "typed function references"),
        (module(bodies=[body(b"\xe0\x00\x0b")]), "stack switching"),
        (module(bodies=[body(b"\xfd\x80\x02\x0b")]), "relaxed SIMD"),
        (module(bodies=[body(b"\xfc\x13\x0b")]), "wide arithmetic"),
        (module(bodies=[body(b"\xfc\x12\x00\x0b")]), "memory control"),
    ],
)
def test_features_that_are_off_are_named(data: bytes, feature: str) -> None:
    error = refused(data)
    assert error.details == {"feature": feature}
    assert feature in error.message


# --- what is malformed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "does not begin"),
        (b"\0asm\x0d\0\1\0", "does not begin"),
        (b"\x7fELF" + bytes(100), "does not begin"),
        (HEADER + b"\x0e\0", "no section 14"),
        (HEADER + b"\xff\0", "no section 255"),
        (HEADER + b"\1\x05\0", "behind the file's end"),
        (HEADER + b"\1" + number(2**32 - 1), "behind the file's end"),
        (HEADER + b"\1\xff\xff\xff\xff\xff\x01", "longer than 32 bits"),
        (HEADER + b"\1\xff\xff\xff\xff\x1f", "does not fit in 32 bits"),
        (HEADER + b"\1\x80\x80\x80\x80\x80\x00", "longer than 32 bits"),
        (HEADER + b"\1", "within a number"),
        (HEADER + section(TYPE, b"\0") * 2, "out of order or not the only one"),
        (HEADER + section(CODE, b"\0") + section(FUNCTION, b"\0"), "out of order"),
        (HEADER + section(CODE, b"\0") + section(DATA_COUNT, b"\0"), "out of order"),
        (HEADER + section(TYPE, b"\0\0"), "longer than its content"),
        (HEADER + section(TYPE, b"\1"), "longer than its section"),
        (HEADER + section(TYPE, b"\1\x61"), "no form of types"),
        (HEADER + section(TYPE, b"\1\x60\1\x05\0"), "no value type"),
        (HEADER + section(CUSTOM, b""), "within a number"),
        (HEADER + section(CUSTOM, b"\x05a"), "ends too early"),
        (HEADER + section(CUSTOM, b"\1\xff"), "not UTF-8"),
        (module(sections={EXPORT: items([export("a", 0, 0), export("a", 0, 1)])}), "the name 'a'"),
        (module(sections={EXPORT: items([name(b"\xed\xa0\x80") + b"\0\0"])}), "not UTF-8"),
        (module(sections={EXPORT: items([export("a", 5, 0)])}), "no kind of exports"),
        (module(sections={IMPORT: items([name("a") + name("b") + b"\5\0"])}), "no kind of imports"),
        (module(sections={FUNCTION: items([b"\0"])}), "declares 1 functions and has code for 2"),
        (module(sections={FUNCTION: items([b"\0"] * 3)}), "declares 3 functions and has code for 2"),
        (HEADER + section(FUNCTION, b"\1\0"), "declares 1 functions and has code for 0"),
        (module(sections={DATA_COUNT: b"\1"}), "data count"),
        (module(sections={START: b"\0\0"}), "longer than its content"),
        (module(sections={DATA: items([b"\3\0"])}), "unknown flags"),
        (module(sections={ELEMENT: items([b"\x08\0"])}), "unknown flags"),
        (module(sections={MEMORY: items([b"\x10\1"])}), "unknown flags"),
        (module(sections={DATA: items([b"\0\x41\0\x0b\x7f"])}), "ends too early"),
        (module(sections={DATA: items([b"\0\x20\0\x0b\0"])}), "no constant expression"),
        (module(sections={GLOBAL: items([b"\x7f\0" + b"\x41\0" * 100 + b"\x0b"])}), "no constant expression"),
        (module(bodies=[body(b"\x41\0")]), "ends within a block"),
        (module(bodies=[body(b"\x41\0\x0b\x0b")]), "goes on behind its end"),
        (module(bodies=[body(b"\x27\0\x0b")]), "no instruction 0x27"),
        (module(bodies=[body(b"\xfc\x20\x0b")]), "no instruction 0xfc 32"),
        (module(bodies=[body(b"\xfd\x80\x10\x0b")]), "no instruction 0xfd 2048"),
        (module(bodies=[body(b"\x0e\3\0")]), "within a number"),
        (module(bodies=[number(50) + b"\0\x0b"]), "behind its section"),
        (module(bodies=[b"\0"]), "within a number"),
    ],
)
def test_what_is_malformed(data: bytes, says: str) -> None:
    error = refused(data)
    assert error.code == "module_invalid"
    assert "is not valid WebAssembly: " in error.message and says in error.message
    assert not valid(data)


def test_a_module_cut_anywhere_is_refused() -> None:
    facts = parse_module(ALL)
    ends = {8, *(section.end for section in facts.sections)}
    functions, data = facts.section(FUNCTION), facts.section(DATA)
    assert functions is not None and data is not None
    for at in range(len(ALL)):
        # Between sections a shorter module may end, if no function lacks its code and nothing its data.
        if at in ends and (at <= functions.start or at >= data.end):
            parse_module(ALL[:at])
        else:
            refused(ALL[:at])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_byte_is_trusted(data: st.DataObject) -> None:
    """Changed anywhere, a module is refused with a typed error, or whatever Wasmtime says of it."""
    changed = bytearray(ALL)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, len(ALL) - 1))
        changed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    try:
        parse_module(bytes(changed))
    except RealmError as error:
        assert error.code == "module_invalid"
        # Nothing that Wasmtime takes is called malformed: only limits and features go further than it does.
        assert error.details or not valid(bytes(changed))


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(RealmError):
        parse_module(b"\1" + data)
    with_header = HEADER + data
    try:
        parse_module(with_header)
    except RealmError as error:
        assert error.details or not valid(with_header)


# --- instructions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 499, 500, 501, 1000, 4999])
def test_long_runs_of_plain_instructions(size: int) -> None:
    code = b"\x20\x00\x1a" * size + b"\x41\x05\xfc\x0b\x00" + b"\x01" * size + b"\x0b"
    (site,) = Body(code, 0, len(code), 10, 10).sites
    assert (site.offset, site.constant) == (3 * size + 2, 5)


@pytest.mark.parametrize("between", [b"\x01", b"\x1a", b"\x45", b"\x02\x40", b"\x05", b"\x0b", b"\x41\x07\x1a"])
def test_a_constant_counts_only_right_before(between: bytes) -> None:
    ends = 2 + (between == b"\x02\x40") - (between == b"\x0b")
    code = b"\x02\x40\x41\x05" + between + b"\xfc\x0b\x00" + b"\x0b" * ends
    (site,) = Body(code, 0, len(code), 10, 10).sites
    assert site.constant is None


@given(st.integers(0, 2**64 - 1), st.integers(1, 10))
def test_numbers(value: int, width: int) -> None:
    data = number(value, width) + b"\x7f"
    if len(data) - 1 <= 10:
        assert read_number(data, 0, len(data), 64) == (value, len(data) - 1)
    if value >> 32 or len(data) - 1 > 5:
        with pytest.raises(Malformed):
            read_number(data, 0, len(data))


def test_offsets_of_segments_are_signed() -> None:
    for at in (0, 63, 64, 8191, 8192, 2**31 - 1, -1, -(2**31)):
        wide = module(sections={DATA: items([b"\0" + offset(at) + b"\0"])})
        assert parse_module(wide).data_segments == 1
    # -1 is the last byte of 4 GiB: far from the first segment.
    spread = module(sections={DATA: items([active(0, b"x"), active(-1, bytes(5 << 20))])})
    assert refused(spread).details["name"] == "scattered_bytes"
