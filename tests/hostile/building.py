"""Attacks that are built by a program, by their names: too large to write down, or no text at all.

The first line of each function's description says what it tries and what must happen, as the first line
of a file in ``attacks/`` does.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable

import wasmtime

from realm.guests.fibers import Engine
from tests.hostile import assembler as a
from tests.hostile.boundary import bad_pointers, bad_pointers_64, import_everything, stale_handles, wasi_bad_pointers
from tests.wat import guest

BUILDERS: dict[str, Callable[[], bytes]] = {}


def built(make: Callable[[], bytes | str]) -> Callable[[], bytes | str]:
    """Registers an attack under the function's name."""

    def content() -> bytes:
        made = make()
        return bytes(wasmtime.wat2wasm(made)) if isinstance(made, str) else made

    content.__doc__ = make.__doc__
    BUILDERS[make.__name__] = content
    return make


for _make in (bad_pointers, bad_pointers_64, wasi_bad_pointers, stale_handles, import_everything):
    built(_make)

# --- many of everything -----------------------------------------------------------------------------


@built
def functions_100000() -> bytes:
    """Has 100,000 functions. Refused before it is compiled."""
    count = 100_000
    return a.grown(a.FUNCTION, [a.leb(0)] * count, code=[a.body(a.constant(0))] * count)


@built
def types_100000() -> bytes:
    """Has 100,000 types. Refused before it is compiled."""
    return a.grown(a.TYPE, [a.NOTHING_TO_NOTHING] * 100_000)


@built
def parameters_10000() -> bytes:
    """Has a function of 10,000 parameters. Refused."""
    return a.grown(a.TYPE, [b"\x60" + a.leb(10_000) + a.I32 * 10_000 + b"\0"])


@built
def results_10000() -> bytes:
    """Has a function of 10,000 results. Refused."""
    return a.grown(a.TYPE, [b"\x60\0" + a.leb(10_000) + a.I32 * 10_000])


@built
def locals_1000000() -> bytes:
    """Has a function of 1,000,000 locals, declared in six bytes. Refused."""
    declared = b"\1" + a.leb(1_000_000) + a.I32
    return a.grown(a.FUNCTION, [a.leb(0)], code=[a.body(a.constant(0), declared)])


@built
def locals_that_wrap() -> bytes:
    """Has a function whose locals add up to 2^32 and one. Refused."""
    declared = b"\2" + a.leb(2**32 - 1) + a.I32 + a.leb(2) + a.I32
    return a.grown(a.FUNCTION, [a.leb(0)], code=[a.body(a.constant(0), declared)])


@built
def blocks_100000() -> bytes:
    """Nests blocks 100,000 deep. Refused, or compiled within the compiler's limits."""
    code = b"\x02\x40" * 100_000 + b"\x0b" * 100_000 + a.constant(0)
    return a.grown(a.FUNCTION, [a.leb(0)], code=[a.body(code)])


@built
def globals_65536() -> bytes:
    """Has 65,536 globals. Refused before it is compiled."""
    return a.grown(a.GLOBAL, [a.I32 + b"\1" + a.constant(0) + b"\x0b"] * 65_536)


@built
def exports_100000() -> bytes:
    """Exports one function under 100,000 names. Refused."""
    return a.grown(a.EXPORT, [a.export(f"e{number}", 0, 1) for number in range(100_000)])


@built
def imports_100000() -> bytes:
    """Imports one host function 100,000 times. Refused."""
    sections = a.good()
    sections[a.IMPORT] = [a.name("realm") + a.name("seq_new") + b"\0\0"] * 100_000
    return a.encode(sections)


@built
def tables_1000() -> bytes:
    """Has 1,000 tables. Refused."""
    return a.grown(a.TABLE, [a.FUNCREF + b"\0\1"] * 1000)


@built
def data_segments_200000() -> bytes:
    """Has 200,000 data segments. Refused before it is compiled."""
    return a.grown(a.DATA, [b"\0" + a.constant(0) + b"\x0b" + a.name("x")] * 200_000)


@built
def data_scattered() -> str:
    """Has 2,000 data segments far from each other, which are written one by one at each start. Refused."""
    segments = "\n".join(f'(data (i32.const {number << 14}) "x")' for number in range(2000))
    return guest("(i32.const 0)", memory="512", extra=segments)


@built
def data_16mib() -> bytes:
    """Has a data segment of 16 MiB, so that the module is over its size. Refused."""
    return a.grown(a.DATA, [b"\1" + a.sized(bytes(16 << 20))])


@built
def data_8mib() -> bytes:
    """Has a passive data segment of 8 MiB, more than its memory. Refused, or runs without it."""
    return a.grown(a.DATA, [b"\1" + a.sized(random.Random(8).randbytes(8 << 20))])


@built
def elements_10000000() -> bytes:
    """Has an element segment of 10,000,000 functions. Refused before it is compiled."""
    segment = b"\1\0" + a.leb(10_000_000) + a.leb(1) * 10_000_000
    return a.grown(a.ELEMENT, [segment], table=[a.FUNCREF + b"\0\1"])


@built
def branch_table_1000000() -> bytes:
    """Has a branch table of 1,000,000 targets. Refused."""
    table = b"\x02\x40" + a.constant(0) + b"\x0e" + a.leb(1_000_000) + b"\0" * 1_000_001 + b"\x0b" + a.constant(0)
    return a.grown(a.FUNCTION, [a.leb(0)], code=[a.body(table)])


@built
def big_function() -> bytes:
    """Has one function of 24 MiB, over the size of a module. Refused."""
    return a.grown(a.FUNCTION, [a.leb(0)], code=[a.body((a.constant(0) + b"\x1a") * (8 << 20) + a.constant(0))])


@built
def body_of_2mib() -> bytes:
    """Has one function of 2 MiB. Refused."""
    return a.grown(a.FUNCTION, [a.leb(0)], code=[a.body((a.constant(0) + b"\x1a") * 700_000 + a.constant(0))])


@built
def compile_bomb() -> str:
    """Has functions that take a compiler long: thousands of live values over thousands of blocks. Within its limits."""
    count = 300
    names = " ".join(f"(local $l{n} i64)" for n in range(count))
    step = " ".join(
        f"(if (i64.eqz (local.get $l{n % count})) (then (local.set $l{(n * 7 + 1) % count} "
        f"(i64.mul (local.get $l{(n * 13) % count}) (local.get $l{(n * 31) % count})))))"
        for n in range(2000)
    )
    total = " ".join(f"(i64.add (local.get $l{n}))" for n in range(count))
    functions = "\n".join(
        f"(func $f{number} (result i64) {names} (loop $l {step} (br_if $l (i64.eqz (local.get $l0)))) "
        f"(local.get $l0) {total})"
        for number in range(3)
    )
    return guest("(i32.const 0)", extra=functions)


@built
def big_frames() -> str:
    """Recurses with 2,000 live values in each frame. Traps: its stack is used up."""
    count = 2000
    sets = "\n".join(f"(local.set $l{n} (i64.mul (local.get 0) (i64.const {n + 3})))" for n in range(count))
    adds = "\n".join(f"(i64.add (local.get $l{n}))" for n in range(count))
    names = " ".join(f"(local $l{n} i64)" for n in range(count))
    down = f"(func $down (param i64) (result i64) {names} {sets} (call $down (local.get $l0)) {adds})"
    return guest("(drop (call $down (i64.const 1))) (i32.const 0)", extra=down)


# --- names --------------------------------------------------------------------------------------------


@built
def export_name_of_1mib() -> bytes:
    """Exports run under a name of 1 MiB too. Refused."""
    return a.grown(a.EXPORT, [a.export(b"n" * (1 << 20), 0, 1)])


@built
def import_name_of_90kb() -> bytes:
    """Imports a function with a name of 90 KB. Refused, with the name cut."""
    sections = a.good()
    sections[a.IMPORT] = [a.name("realm") + a.name(b"n" * 90_000) + b"\0\0"]
    return a.encode(sections)


@built
def export_name_not_utf8() -> bytes:
    """Exports run under a name that is no UTF-8. Refused."""
    return a.grown(a.EXPORT, [a.export(b"\xff\xfe\xed\xa0\x80", 0, 1)])


def _trapping(*after: bytes) -> bytes:
    sections = a.good()
    sections[a.CODE][1] = a.body(b"\0")
    return a.encode(sections, after)


@built
def name_section_lies() -> bytes:
    """Has a name section whose lengths and indices are lies, and traps. Traps, without a name."""
    lies = b"\1" + a.leb(9) + a.leb(2**32 - 1) + a.leb(1) + a.leb(2**31) + b"\2" + a.leb(2**30) + b"\xff" * 4
    return _trapping(a.custom("name", lies))


@built
def name_section_of_terminal_escapes() -> bytes:
    """Names its function with terminal escapes and newlines, and traps. Traps, with none of them in the report."""
    names = a.leb(1) + a.leb(1) + a.name("\x1b[2J\r\nERROR the host is lost\x07\x9b")
    return _trapping(a.custom("name", b"\1" + a.sized(names)))


@built
def name_of_4mib() -> bytes:
    """Names its function with 4 MiB, and traps. Refused, or traps with the name cut."""
    names = a.leb(1) + a.leb(1) + a.name(b"n" * (4 << 20))
    return _trapping(a.custom("name", b"\1" + a.sized(names)))


@built
def custom_sections_100000() -> bytes:
    """Has 100,000 custom sections. Refused before it is compiled."""
    return a.encode(a.good(), [a.custom("c", b"")] * 100_000)


# --- what is no module -----------------------------------------------------------------------------


@built
def empty_file() -> bytes:
    """Is empty. Refused."""
    return b""


@built
def native_library() -> bytes:
    """Is native code. Refused."""
    return b"\x7fELF\2\1\1" + bytes(1 << 12)


@built
def precompiled_here() -> bytes:
    """Is a module that this very host's compiler has compiled. Refused: native code comes from the host alone."""
    return bytes(wasmtime.Module(Engine().inner, a.encode(a.good())).serialize())


@built
def compressed() -> bytes:
    """Is a good module, compressed. Refused."""
    return gzip.compress(a.encode(a.good()))


@built
def text_format() -> bytes:
    """Is a good module as text. Refused."""
    return guest("(i32.const 0)").encode()


@built
def header_only() -> bytes:
    """Is a module's header and nothing else. Refused."""
    return a.HEADER


@built
def cut_in_the_middle() -> bytes:
    """Is a good module's first half. Refused."""
    whole = a.encode(a.good())
    return whole[: len(whole) // 2]


@built
def section_of_4gib() -> bytes:
    """Has a section that says it is 4 GiB long. Refused."""
    return a.HEADER + bytes([a.TYPE]) + a.leb(2**32 - 1) + b"\1"


@built
def count_of_4_billion() -> bytes:
    """Has a type section that says it has 2^32 - 1 types. Refused."""
    return a.HEADER + a.section(a.TYPE, a.leb(2**32 - 1) + a.TO_I32)


@built
def sections_out_of_order() -> bytes:
    """Has its sections backwards. Refused."""
    parts = [a.section(k, a.leb(len(e)) + b"".join(e)) for k, e in sorted(a.good().items(), reverse=True)]
    return a.HEADER + b"".join(parts)


@built
def number_too_long() -> bytes:
    """Has a number of twenty bytes where five are most. Refused."""
    return a.HEADER + bytes([a.TYPE]) + b"\x80" * 19 + b"\0"


@built
def junk_at_the_end() -> bytes:
    """Is a good module with 1 MiB of noise behind it. Refused."""
    return a.encode(a.good()) + random.Random(3).randbytes(1 << 20)
