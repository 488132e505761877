"""Where the instructions of a WebAssembly function body begin and end.

Nothing is checked that Wasmtime's validator checks better (types, indices, alignment): what matters here
is the exact length of every instruction, how deep blocks nest, and where the instructions are that work
on a whole range of memory. Source: WebAssembly core specification, binary format of instructions; the
proposals that :data:`realm.guests.fiber_types.SETTINGS` enables and no others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from realm.errors import RealmError

MEMORY_COPY = 10
MEMORY_FILL = 11
_PREFIX_BULK = 0xFC
_PREFIX_SIMD = 0xFD

# An LEB128 number of at most 32 and of at most 64 bits. Longer ones are invalid; a value too large for
# its bytes is found by Wasmtime.
_N32 = rb"[\x80-\xff]{0,4}[\x00-\x7f]"
_N64 = rb"[\x80-\xff]{0,9}[\x00-\x7f]"

# What most bodies consist of, each with its operands. The bounded repeat keeps the matcher's stack
# small. One match takes hundreds of instructions: 60 MB a second, which no loop over single ones reaches.
_PLAIN = re.compile(
    rb"(?:"
    + rb"|".join(
        (
            rb"[\x20-\x26\x0c\x0d\x10\x12\x3f\x40\xd0\xd2]" + _N32,  # variables, branches, calls, sizes, references
            rb"[\x00\x01\x0f\x1a\x1b\x45-\xc4\xd1]",  # no operands
            # A constant in front of a bulk instruction is looked at by itself.
            rb"\x41" + _N32 + rb"(?!\xfc)",
            rb"[\x28-\x3e]" + _N32 + _N64,  # loads and stores: alignment and offset
            rb"\x42" + _N64 + rb"(?!\xfc)",
            rb"[\x11\x13]" + _N32 + _N32,  # indirect calls
            rb"\x43.{4}",
            rb"\x44.{8}",
            rb"\x1c\x01[\x70\x7b-\x7f]",  # select of one type
            rb"\xfc[\x00-\x07]",  # saturating conversions
            rb"\xfd[\x00-\x0b\x5c\x5d]" + _N32 + _N64,
            rb"\xfd[\x0c\x0d].{16}",  # v128.const, i8x16.shuffle
            rb"\xfd[\x15-\x22].",  # lanes
            rb"\xfd[\x54-\x5b]" + _N32 + _N64 + rb".",
            rb"\xfd(?:[\x0e-\x14\x23-\x53\x5e-\x7f]|[\x80-\xff]\x01)",
        )
    )
    + rb"){0,500}",
    re.DOTALL,
)
_BLOCK = re.compile(rb"[\x02-\x04]" + _N32)

_REFUSED = {
    0x06: "exceptions (try)",
    0x07: "exceptions (catch)",
    0x08: "exceptions (throw)",
    0x09: "exceptions (rethrow)",
    0x0A: "exceptions (throw_ref)",
    0x18: "exceptions (delegate)",
    0x19: "exceptions (catch_all)",
    0x1F: "exceptions (try_table)",
    0x14: "typed function references (call_ref)",
    0x15: "typed function references (return_call_ref)",
    0xD3: "gc (ref.eq)",
    0xD4: "typed function references (ref.as_non_null)",
    0xD5: "typed function references (br_on_null)",
    0xD6: "typed function references (br_on_non_null)",
    0xE0: "stack switching (cont.new)",
    0xE1: "stack switching (cont.bind)",
    0xE2: "stack switching (suspend)",
    0xE3: "stack switching (resume)",
    0xE4: "stack switching (resume_throw)",
    0xE5: "stack switching (switch)",
    0xFB: "gc",
    0xFE: "threads (an atomic instruction)",
}
# Operands of the instructions behind the prefix 0xFC, each a 32-bit number.
_BULK_OPERANDS = {**dict.fromkeys(range(8), 0), 8: 2, 9: 1, 10: 2, 11: 1, 12: 2, 13: 1, 14: 2, 15: 1, 16: 1, 17: 1}


class Malformed(Exception):
    """The bytes are no instructions; the text says what and where."""


@dataclass(frozen=True, slots=True)
class BulkSite:
    """A ``memory.copy`` or ``memory.fill``.

    Attributes:
        offset: of its first byte in the module. length: in bytes.
        opcode: :data:`MEMORY_COPY` or :data:`MEMORY_FILL`.
        constant: how many bytes it works on, where an instruction right before says so.
    """

    offset: int
    length: int
    opcode: int
    constant: int | None


def read_number(data: bytes, at: int, end: int, bits: int = 32) -> tuple[int, int]:
    """An unsigned LEB128 number and the offset behind it. Raises :class:`Malformed`."""
    value = shift = 0
    while True:
        if at >= end:
            raise Malformed(f"it ends within a number at offset {at:#x}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift >= bits:
            raise Malformed(f"a number at offset {at:#x} is longer than {bits} bits take")
    if value >> bits:
        raise Malformed(f"a number at offset {at:#x} does not fit in {bits} bits")
    return value, at


def _read_integer(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The value (as unsigned) of the ``i32.const`` or ``i64.const`` at ``at``, and the offset behind it."""
    bits = 32 if data[at] == 0x41 else 64
    value, behind = read_number(data, at + 1, end, 70 if bits == 64 else 35)
    # Signed numbers are written without their upper bits: n bytes hold 7 n of them.
    written = 7 * (behind - at - 1)
    if written < bits and value >> (written - 1):
        value -= 1 << written
    return value & (1 << bits) - 1, behind


class Body:
    """The instructions of one function, from ``start`` to ``end`` in ``data`` (its locals left out).

    Args:
        depth_limit: the deepest nesting of blocks. targets_limit: the most targets of one ``br_table``.

    Attributes:
        sites: its bulk instructions, in order.
    """

    def __init__(self, data: bytes, start: int, end: int, depth_limit: int, targets_limit: int) -> None:
        self._data = data
        self._end = end
        self._depth_limit = depth_limit
        self._targets_limit = targets_limit
        self._constant: int | None = None
        self.sites: list[BulkSite] = []
        self._scan(start)

    def _scan(self, at: int) -> None:
        data, end, limit = self._data, self._end, self._depth_limit
        plain, block = _PLAIN.match, _BLOCK.match
        depth = 1
        while depth:
            if at >= end:
                raise Malformed("a function's body ends within a block")
            match = plain(data, at, end)
            if match is not None and match.end() > at:
                at = match.end()
                self._constant = None
                continue
            opcode = data[at]
            if opcode == 0x0B:
                depth -= 1
                at += 1
            elif 0x02 <= opcode <= 0x04:
                match = block(data, at, end)
                if match is None:
                    raise Malformed(f"a block at offset {at:#x} has no type")
                if data[at + 1] in (0x63, 0x64):
                    raise feature("typed function references (a block's type)")
                at = match.end()
                depth += 1
                if depth > limit:
                    raise over("nesting", limit, depth, "blocks inside one another in a function")
            elif opcode == 0x05:
                at += 1
            else:
                at = self._other(opcode, at)
                continue
            self._constant = None
        if at != end:
            raise Malformed(f"a function's body goes on behind its end at offset {at:#x}")

    def _other(self, opcode: int, at: int) -> int:
        """An instruction that is rare or has operands of no fixed number; gives the offset behind it."""
        constant, self._constant = self._constant, None
        if opcode in (0x41, 0x42):
            # A bulk instruction follows.
            self._constant, at = _read_integer(self._data, at, self._end)
            return at
        if opcode == 0x0E:
            return self._br_table(at)
        if opcode == 0x1C:
            count, at = read_number(self._data, at + 1, self._end)
            return at + count
        if opcode == _PREFIX_BULK:
            return self._bulk(at, constant)
        if opcode == _PREFIX_SIMD:
            return self._simd(at)
        if opcode in _REFUSED:
            raise feature(_REFUSED[opcode])
        raise Malformed(f"there is no instruction {opcode:#04x} (offset {at:#x})")

    def _br_table(self, at: int) -> int:
        count, at = read_number(self._data, at + 1, self._end)
        if count > self._targets_limit:
            raise over("br_table_targets", self._targets_limit, count, "targets of one br_table")
        for _ in range(count + 1):
            _, at = read_number(self._data, at, self._end)
        return at

    def _bulk(self, start: int, constant: int | None) -> int:
        opcode, at = read_number(self._data, start + 1, self._end)
        operands = _BULK_OPERANDS.get(opcode)
        if operands is None:
            if opcode == 18:
                raise feature("memory control (memory.discard)")
            if 19 <= opcode <= 22:
                raise feature("wide arithmetic")
            raise Malformed(f"there is no instruction 0xfc {opcode} (offset {start:#x})")
        for _ in range(operands):
            _, at = read_number(self._data, at, self._end)
        if opcode in (MEMORY_COPY, MEMORY_FILL):
            self.sites.append(BulkSite(start, at - start, opcode, constant))
        return at

    def _simd(self, start: int) -> int:
        """A SIMD instruction whose number is written in more bytes than needed, or that is refused."""
        opcode, at = read_number(self._data, start + 1, self._end)
        if opcode > 0xFF:
            if opcode <= 0x12F:
                raise feature("relaxed SIMD")
            raise Malformed(f"there is no instruction 0xfd {opcode} (offset {start:#x})")
        if opcode <= 0x0B or 0x54 <= opcode <= 0x5D:
            _, at = read_number(self._data, at, self._end)
            _, at = read_number(self._data, at, self._end, 64)
        if opcode in (0x0C, 0x0D):
            at += 16
        elif 0x15 <= opcode <= 0x22 or 0x54 <= opcode <= 0x5B:
            at += 1
        return at


_CONSTANT_EXPRESSION = re.compile(
    rb"(?:"
    + rb"|".join(
        (
            rb"[\x23\x41\xd0\xd2]" + _N32,
            rb"\x42" + _N64,
            rb"\x43.{4}",
            rb"\x44.{8}",
            rb"\xfd\x0c.{16}",
            rb"[\x6a-\x6c\x7c-\x7e]",
        )
    )
    + rb"){1,64}\x0b",
    re.DOTALL,
)
_PLAIN_CONSTANT = re.compile(rb"(?:\x41" + _N32 + rb"|\x42" + _N64 + rb")\x0b")


def constant_expression(data: bytes, at: int, end: int) -> tuple[int | None, int]:
    """The value of a constant expression if it is one integer, and the offset behind the expression.

    At most 64 instructions: what computes more is no address that a compiler wrote.
    """
    match = _CONSTANT_EXPRESSION.match(data, at, end)
    if match is None:
        raise Malformed(f"there is no constant expression of up to 64 instructions at offset {at:#x}")
    if _PLAIN_CONSTANT.fullmatch(data, at, match.end()) is None:
        return None, match.end()
    return _read_integer(data, at, match.end())[0], match.end()


# --- refusals -----------------------------------------------------------------------------------


def over(name: str, limit: int, used: int, what: str, code: str = "module_invalid") -> RealmError:
    """The error of a module that is larger than a :class:`realm.guests.module_limits.ModuleLimits` allows."""
    return RealmError(
        code,
        f"the module has {used:,} {what}; at most {limit:,} are taken ({name})",
        details={"name": name, "limit": limit, "used": used},
    )


def feature(name: str) -> RealmError:
    """The error of a module that needs a feature of WebAssembly that is off."""
    return RealmError(
        "module_invalid",
        f"the module uses {name}, a feature of WebAssembly that Realm does not offer; build without it",
        details={"feature": name.partition(" (")[0]},
    )
