"""Makes ``memory.fill`` and ``memory.copy`` interruptible, by rewriting a module before it is compiled.

Compiled code looks at its fuel at the start of functions and loops only, so one ``memory.fill`` of a
whole memory would run to its end (64 MiB that were never touched: 25 ms) while every other guest of the
worker waits. :func:`rewrite` adds two functions that do the same work in pieces of :data:`CHUNK` bytes,
in a loop, and puts a call of them in the place of each such instruction that may work on more. It burns
the same fuel: Wasmtime takes one unit for each byte.

What stays as it was, so that traps and backtraces say the same:

* An instruction that is out of bounds traps as such, and nothing is written: the functions check the
  whole range first, and leave one that is too large to the instruction itself.
* The new functions come last, so no index changes; a call has exactly the length of the instruction
  that it replaces, so no body changes its size. All code moves by :data:`CODE_SHIFT` bytes, in every
  module, rewritten or not.
* The functions are named :data:`HELPER_PREFIX` and so on, so that backtraces can leave them out.

``memory.init``, ``table.fill``, ``table.copy`` and ``table.init`` stay: the limits on passive segments
and tables bound them (0.35 ms for 1 MiB; 0.09 ms for 65,536 elements).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import wasmtime

from realm.guests.instructions import MEMORY_FILL, BulkSite, read_number
from realm.guests.module_format import CODE, CUSTOM, FUNCTION, HEADER, TYPE, ModuleFacts, Section, parse_module
from realm.guests.module_limits import ModuleLimits

REWRITER_VERSION: Final = 1
"""Changes whenever a module would be rewritten in another way: part of the key of compiled artifacts."""
CHUNK: Final = 65_536
"""Bytes that one instruction works on at most; 25 us if the memory was never touched."""
CODE_SHIFT: Final = 96
"""Bytes by which code lies further back in the compiled module than in the tenant's file."""
HELPER_PREFIX: Final = b"realm:memory."
"""Begins the names of the added functions, which no backtrace should show."""

_PADDING_NAME: Final = b"realm"
_FILL_NAME: Final = HELPER_PREFIX + b"fill"
_COPY_NAME: Final = HELPER_PREFIX + b"copy"
_HELPER_LIMITS: Final = ModuleLimits(wide_memory=True)
_CALL: Final = 0x10
_NOP: Final = b"\x01"


def rewrite(data: bytes, facts: ModuleFacts) -> bytes:
    """The module to compile in the place of ``data``, which Wasmtime has found to be valid.

    Args:
        facts: what :func:`realm.guests.module_format.parse_module` says of ``data``; at most 16,000
            functions (its limit), so that each call fits.
    """
    sites = [site for site in facts.sites if site.constant is None or site.constant > CHUNK]
    if not sites:
        return b"".join((HEADER, _padding(CODE_SHIFT), data[len(HEADER) :]))
    wide = facts.wide_memory
    parts: list[bytes] = []
    shift = 0
    for section in facts.sections:
        start, first = section.start, _first_item(data, section)
        if section.kind == TYPE:
            parts += _longer_list(data, section, _helper_types(wide))
        elif section.kind == FUNCTION:
            parts += _longer_list(data, section, [_number(facts.types), _number(facts.types + 1)])
        elif section.kind == CODE:
            calls = _with_calls(data, section, sites, facts.functions)
            head, content = _longer_list(data, section, _helper_bodies(wide), calls)
            shift = sum(map(len, parts)) + len(head) - (first - len(HEADER))
            parts += (head, content)
        else:
            parts.append(data[start : section.end])
    return b"".join((HEADER, _padding(CODE_SHIFT - shift), *parts, _names(facts.functions)))


def _first_item(data: bytes, section: Section) -> int:
    """Where a section that is a list has its first item, behind the number of items."""
    return read_number(data, section.content, section.end)[1] if section.kind in (TYPE, FUNCTION, CODE) else 0


def _with_calls(data: bytes, section: Section, sites: list[BulkSite], functions: int) -> bytes:
    """The code section's items with calls in the place of the instructions."""
    first = _first_item(data, section)
    content = bytearray(data[first : section.end])
    for site in sites:
        index = functions if site.opcode == MEMORY_FILL else functions + 1
        # Instructions may be written longer than needed; a number has five bytes at most.
        width = min(site.length - 1, 5)
        call = bytes([_CALL]) + _number(index, width)
        assert len(call) == width + 1, "the index of a function does not fit"
        start = site.offset - first
        content[start : start + site.length] = call.ljust(site.length, _NOP)
    return bytes(content)


def _longer_list(data: bytes, section: Section, more: list[bytes], items: bytes | None = None) -> tuple[bytes, bytes]:
    """A section that is a list with ``more`` items at its end, as its head and its items.

    Numbers never become shorter than they were (linkers write them longer than needed), so that
    everything only moves back.
    """
    count, first = read_number(data, section.content, section.end)
    number = _number(count + len(more), first - section.content)
    body = b"".join((data[first : section.end] if items is None else items, *more))
    size = _number(len(number) + len(body), section.content - section.start - 1)
    return bytes([section.kind]) + size + number, body


def _number(value: int, width: int = 1) -> bytes:
    """``value`` as an unsigned LEB128 number of at least ``width`` bytes."""
    out = bytearray()
    while value > 0x7F or len(out) < width - 1:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _custom(name: bytes, content: bytes) -> bytes:
    body = _number(len(name)) + name + content
    return bytes([CUSTOM]) + _number(len(body)) + body


def _padding(size: int) -> bytes:
    """A custom section of ``size`` bytes."""
    section = _custom(_PADDING_NAME, bytes(size - len(_custom(_PADDING_NAME, b""))))
    assert len(section) == size, "the shift of the code is too small"
    return section


def _names(functions: int) -> bytes:
    """A name section for the two added functions; names of the others are in the module's own, if any."""
    names = ((functions, _FILL_NAME), (functions + 1, _COPY_NAME))
    entries = b"".join(_number(index) + _number(len(name)) + name for index, name in names)
    return _custom(b"name", b"\x01" + _number(len(entries) + 1) + b"\x02" + entries)


# --- the added functions --------------------------------------------------------------------------


def _text(wide: bool) -> str:
    """The functions as text, for a memory with 32- or 64-bit addresses."""
    kind = "i64" if wide else "i32"

    def long(value: str) -> str:
        # Compared as 64-bit numbers, since the 65,536 pages of a 32-bit memory are 2**32 bytes.
        return value if wide else f"(i64.extend_i32_u {value})"

    def step(name: str, sign: str) -> str:
        return f"(local.set {name} ({kind}.{sign} (local.get {name}) ({kind}.const {CHUNK})))"

    to, source, size = (f"(local.get {name})" for name in ("$to", "$from", "$size"))
    small = f"({kind}.le_u {size} ({kind}.const {CHUNK}))"
    large = f"({kind}.gt_u {size} ({kind}.const {CHUNK}))"
    piece = f"({kind}.const {CHUNK})"
    all_bytes = f"(local.set $bytes (i64.shl {long('(memory.size)')} (i64.const 16)))"
    room = f"(i64.sub (local.get $bytes) {long(size)})"
    too_large = f"(i64.gt_u {long(size)} (local.get $bytes))"
    fill = f"(memory.fill {to} (local.get $value) {size})"
    copy = f"(memory.copy {to} {source} {size})"
    return f"""(module (memory {kind if wide else ""} 0)
      (func (param $to {kind}) (param $value i32) (param $size {kind}) (local $bytes i64)
        (if {small} (then {fill} (return)))
        {all_bytes}
        (if (i32.or {too_large} (i64.gt_u {long(to)} {room})) (then {fill} (return)))
        (loop $next
          (memory.fill {to} (local.get $value) {piece})
          {step("$to", "add")} {step("$size", "sub")}
          (br_if $next {large}))
        {fill})
      (func (param $to {kind}) (param $from {kind}) (param $size {kind}) (local $bytes i64)
        (if {small} (then {copy} (return)))
        {all_bytes}
        (if (i32.or {too_large} (i32.or (i64.gt_u {long(to)} {room}) (i64.gt_u {long(source)} {room})))
          (then {copy} (return)))
        (if ({kind}.gt_u {to} {source})
          (then ;; from the end, so that nothing is overwritten before it is read
            (loop $back
              {step("$size", "sub")}
              (memory.copy ({kind}.add {to} {size}) ({kind}.add {source} {size}) {piece})
              (br_if $back {large})))
          (else
            (loop $next
              (memory.copy {to} {source} {piece})
              {step("$to", "add")} {step("$from", "add")} {step("$size", "sub")}
              (br_if $next {large}))))
        {copy}))"""


def _helper_types(wide: bool) -> list[bytes]:
    address = 0x7E if wide else 0x7F
    return [bytes([0x60, 3, address, 0x7F, address, 0]), bytes([0x60, 3, address, address, address, 0])]


@cache
def _helper_bodies(wide: bool) -> list[bytes]:
    """The code of both functions, each with its size in front."""
    data = bytes(wasmtime.wat2wasm(_text(wide)))
    section = parse_module(data, _HELPER_LIMITS).section(CODE)
    assert section is not None
    bodies = []
    count, at = read_number(data, section.content, section.end)
    for _ in range(count):
        size, content = read_number(data, at, section.end)
        bodies.append(data[at : content + size])
        at = content + size
    return bodies
