"""Modules put together byte by byte: for what text cannot say, or would say in megabytes."""

from __future__ import annotations

from collections.abc import Iterable

TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT, START, ELEMENT, CODE, DATA = range(1, 12)
CUSTOM = 0
HEADER = b"\0asm\1\0\0\0"
I32, FUNCREF = b"\x7f", b"\x70"
NOTHING_TO_NOTHING = b"\x60\0\0"
TO_I32 = b"\x60\0\1\x7f"

Sections = dict[int, list[bytes]]


def leb(value: int) -> bytes:
    """An unsigned integer as LEB128."""
    out = bytearray()
    while True:
        low, value = value & 0x7F, value >> 7
        if not value:
            return bytes([*out, low])
        out.append(low | 0x80)


def sized(content: bytes) -> bytes:
    return leb(len(content)) + content


def name(text: str | bytes) -> bytes:
    return sized(text.encode() if isinstance(text, str) else text)


def body(code: bytes, declared: bytes = b"\0") -> bytes:
    """A function's body; ``declared`` are its locals."""
    return sized(declared + code + b"\x0b")


def constant(value: int) -> bytes:
    """``i32.const`` of a small number."""
    assert 0 <= value < 64
    return b"\x41" + bytes([value])


def export(label: str | bytes, kind: int, index: int) -> bytes:
    return name(label) + bytes([kind]) + leb(index)


def section(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + sized(content)


def custom(label: str, content: bytes) -> bytes:
    return section(CUSTOM, name(label) + content)


def good() -> Sections:
    """The parts of a guest that does nothing: functions 0 (its version) and 1 (run), one page of memory."""
    return {
        TYPE: [TO_I32],
        FUNCTION: [leb(0), leb(0)],
        MEMORY: [b"\0\1"],
        EXPORT: [export("memory", 2, 0), export("realm_abi_version", 0, 0), export("run", 0, 1)],
        CODE: [body(constant(1)), body(constant(0))],
    }


def encode(sections: Sections, after: Iterable[bytes] = ()) -> bytes:
    """A module of these sections in their order, with raw ones after them."""
    parts = [section(kind, leb(len(entries)) + b"".join(entries)) for kind, entries in sorted(sections.items())]
    return HEADER + b"".join([*parts, *after])


def grown(kind: int, entries: Iterable[bytes], **more: Iterable[bytes]) -> bytes:
    """The good guest with further entries of one section; ``more`` names others in lower case."""
    sections = good()
    for number, extra in [(kind, entries), *((globals()[key.upper()], value) for key, value in more.items())]:
        sections.setdefault(number, []).extend(extra)
    return encode(sections)
