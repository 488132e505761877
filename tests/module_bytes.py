"""Builds WebAssembly modules byte by byte, well-formed or not: what no assembler would write."""

from __future__ import annotations

from collections.abc import Sequence

HEADER = b"\0asm\1\0\0\0"
CUSTOM, TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT, START, ELEMENT, CODE, DATA, DATA_COUNT, TAG = range(14)
I32 = b"\x7f"
RETURN_0 = b"\x41\0\x0b"
RETURN_1 = b"\x41\1\x0b"


def number(value: int, width: int = 1) -> bytes:
    """Unsigned LEB128 of at least ``width`` bytes."""
    out = bytearray()
    while value > 0x7F or len(out) < width - 1:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def signed(value: int) -> bytes:
    """Signed LEB128."""
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value & 0x7F])


def name(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return number(len(data)) + data


def items(values: Sequence[bytes], count: int | None = None) -> bytes:
    """A list; ``count`` may lie about its length."""
    return number(len(values) if count is None else count) + b"".join(values)


def section(kind: int, content: bytes, size: int | None = None) -> bytes:
    """A section; ``size`` may lie about its size."""
    return bytes([kind]) + number(len(content) if size is None else size) + content


def body(code: bytes, local_runs: Sequence[tuple[int, int]] = ()) -> bytes:
    """A function: runs of locals (length, type), then instructions with their last ``end``."""
    content = items([number(count) + bytes([kind]) for count, kind in local_runs]) + code
    return number(len(content)) + content


def offset(at: int) -> bytes:
    return b"\x41" + signed(at) + b"\x0b"


def active(at: int, data: bytes) -> bytes:
    """A data segment."""
    return b"\0" + offset(at) + number(len(data)) + data


def export(text: str, kind: int, index: int) -> bytes:
    return name(text) + bytes([kind]) + number(index)


def module(
    *,
    bodies: Sequence[bytes] = (),
    types: Sequence[bytes] = (),
    pages: int = 1,
    sections: dict[int, bytes] | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A module with Realm's exports: function 0 gives 0 (``run``), function 1 gives 1, then ``bodies`` () -> i32.

    ``types`` come after type 0, () -> i32. ``sections`` replace whole sections' contents, or add some.
    """
    bodies = (body(RETURN_0), body(RETURN_1), *bodies)
    exports = [export("memory", 2, 0), export("run", 0, 0), export("realm_abi_version", 0, 1)]
    contents = {
        TYPE: items([b"\x60\0\1\x7f", *types]),
        FUNCTION: items([b"\0"] * len(bodies)),
        MEMORY: items([b"\0" + number(pages)]),
        EXPORT: items(exports),
        CODE: items(bodies),
        **(sections or {}),
    }
    order = (TYPE, IMPORT, FUNCTION, TABLE, MEMORY, TAG, GLOBAL, EXPORT, START, ELEMENT, DATA_COUNT, CODE, DATA)
    return HEADER + before + b"".join(section(kind, contents[kind]) for kind in order if kind in contents) + after
