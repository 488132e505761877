"""Just enough of the WebAssembly binary format to give a random module the exports and calls that Realm looks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

HEADER = b"\0asm\x01\0\0\0"
TYPE, IMPORT, FUNCTION, EXPORT, CODE, DATA, DATA_COUNT = 1, 2, 3, 7, 10, 11, 12
# Section 12 stands between 9 and 10.
_ORDER = {number: place for place, number in enumerate((1, 2, 3, 4, 5, 13, 6, 7, 8, 9, 12, 10, 11))}
I32, I64 = 0x7F, 0x7E


def unsigned(value: int) -> bytes:
    """LEB128 of a number that is not negative."""
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        out.append(byte | 0x80 if value else byte)
        if not value:
            return bytes(out)


def signed(value: int) -> bytes:
    """Signed LEB128."""
    out = bytearray()
    while True:
        byte, value = value & 0x7F, value >> 7
        if (value == 0 and not byte & 0x40) or (value == -1 and byte & 0x40):
            out.append(byte)
            return bytes(out)
        out.append(byte | 0x80)


def named(text: str) -> bytes:
    data = text.encode()
    return unsigned(len(data)) + data


def i32_const(value: int) -> bytes:
    value &= 0xFFFF_FFFF
    return b"\x41" + signed(value - (1 << 32) if value >> 31 else value)


def i64_const(value: int) -> bytes:
    value &= (1 << 64) - 1
    return b"\x42" + signed(value - (1 << 64) if value >> 63 else value)


class Reader:
    """Reads a section's bytes in order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def take(self, size: int) -> bytes:
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self) -> str:
        return self.take(self.unsigned()).decode()

    @property
    def rest(self) -> bytes:
        return self.data[self.at :]


def sections(module: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each section of a valid module, in order."""
    reader = Reader(module)
    reader.take(8)
    while reader.rest:
        number = reader.byte()
        yield number, reader.take(reader.unsigned())


def join(parts: dict[int, bytes]) -> bytes:
    """A module of these sections."""
    ordered = sorted(parts.items(), key=lambda part: _ORDER[part[0]])
    return HEADER + b"".join(bytes([number]) + unsigned(len(content)) + content for number, content in ordered)


def vector(content: bytes, *more: bytes) -> bytes:
    """A section that counts its entries, with entries added at its end."""
    reader = Reader(content or b"\0")
    count = reader.unsigned()
    return unsigned(count + len(more)) + reader.rest + b"".join(more)


@dataclass
class Export:
    """``kind`` is 0 for a function; ``index`` counts imports too."""

    name: str
    kind: int
    index: int


def exports(content: bytes) -> list[Export]:
    reader = Reader(content)
    return [Export(reader.text(), reader.byte(), reader.unsigned()) for _ in range(reader.unsigned())]


def export_section(entries: list[Export]) -> bytes:
    return unsigned(len(entries)) + b"".join(named(e.name) + bytes([e.kind]) + unsigned(e.index) for e in entries)


def imported_functions(content: bytes) -> list[tuple[str, str]]:
    """(module, name) of each import of a section that imports nothing but functions."""
    reader = Reader(content or b"\0")
    found = []
    for _ in range(reader.unsigned()):
        found.append((reader.text(), reader.text()))
        if reader.byte() != 0:
            raise ValueError("an import that is no function")
        reader.unsigned()
    return found


class Patch:
    """Adds functions to a valid module whose imports are functions only. Custom sections are left out."""

    def __init__(self, module: bytes) -> None:
        self.parts = {number: content for number, content in sections(module) if number}
        self.imports = imported_functions(self.parts.get(IMPORT, b""))
        self.exports = exports(self.parts.get(EXPORT, b"\0"))
        self._functions = len(self.imports) + Reader(self.parts.get(FUNCTION, b"\0")).unsigned()

    def add_type(self, parameters: bytes, results: bytes) -> int:
        content = self.parts.get(TYPE, b"\0")
        number = Reader(content).unsigned()
        entry = b"\x60" + unsigned(len(parameters)) + parameters + unsigned(len(results)) + results
        self.parts[TYPE] = vector(content, entry)
        return number

    def add_function(self, kind: int, body: bytes) -> int:
        """A function of type number ``kind`` without locals; ``body`` lacks its final ``end``."""
        code = b"\0" + body + b"\x0b"
        self.parts[FUNCTION] = vector(self.parts.get(FUNCTION, b""), unsigned(kind))
        self.parts[CODE] = vector(self.parts.get(CODE, b""), unsigned(len(code)) + code)
        self._functions += 1
        return self._functions - 1

    def export_function(self, name: str, index: int) -> None:
        """Export it under this name, which no longer means what it did."""
        self.exports = [e for e in self.exports if e.name != name] + [Export(name, 0, index)]

    def add_data(self, offset: int, data: bytes) -> None:
        """An active segment of memory 0."""
        entry = b"\0" + i32_const(offset) + b"\x0b" + unsigned(len(data)) + data
        self.parts[DATA] = vector(self.parts.get(DATA, b""), entry)
        if DATA_COUNT in self.parts:
            self.parts[DATA_COUNT] = unsigned(Reader(self.parts[DATA_COUNT]).unsigned() + 1)

    def done(self) -> bytes:
        self.parts[EXPORT] = export_section(self.exports)
        return join(self.parts)
