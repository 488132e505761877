"""Guests made from the tables of host functions: every bad pointer, length and handle, each in one run.

Each guest counts the calls whose result is not among the codes that may answer them; the first few it logs
by number, and :func:`describe` says what call that was.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from realm.guests import abi, wasi
from realm.guests.abi import ErrorCode
from tests.probe import valid_arguments
from tests.wat import imports

MEMORY = 65_536
RANGES = [
    (MEMORY, 1),
    (MEMORY - 1, 2),
    (MEMORY - 1, 1 << 20),
    (0xFFFFFFFF, 1),
    (0xFFFFFFF0, 0x20),
    (0x80000000, 0x80000000),
    (0x40000000, 0x40000000),
    (8, 0xFFFFFFFF),
    (1, 0xFFFF),
    (8, 0x3FFFFFFF),
]
"""(pointer, count) that reach outside one page of memory, for elements of a byte or more."""
WIDE_RANGES = [
    *RANGES,
    (1 << 32, 1),
    ((1 << 32) + 512, 4),
    (1 << 63, 1),
    ((1 << 64) - 1, 1),
    ((1 << 64) - 16, 32),
    (8, (1 << 64) - 1),
    (8, 1 << 62),
    (8, 1 << 61),
    (8, 1 << 32),
]
"""The same for 64-bit memories: with products that are 0 in 64 bits, and parts that are good in 32."""
_SHOWN = 8
_LOG_AT = 60_000


@dataclass(frozen=True)
class Call:
    """One call with arguments that are right but for one, and the codes that may answer it."""

    function: str
    parameter: str
    arguments: tuple[int, ...]
    codes: tuple[int, ...]
    blob: tuple[tuple[int, bytes], ...] = ()


def _bad_values(p: abi.Parameter, wide: bool) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(values, codes) that are wrong for a parameter."""
    invalid, pointer, handle = int(ErrorCode.INVALID_ARGUMENT), int(ErrorCode.BAD_POINTER), int(ErrorCode.BAD_HANDLE)
    match p:
        case abi.Scalar():
            if p.low:
                yield (p.low - 1,), (invalid,)
            if p.high is not None:
                for bad in (p.high + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF):
                    yield (bad,), (invalid,)
        case abi.Handle():
            for bad in (0, 0xFFFFFFFF, 2, 3, 1 << 24, 0x7FFFFFFF, 0x80000000):
                yield (bad,), (handle,)
        case abi.Input() | abi.Output() | abi.InOut():
            size = 1 if p.element == "u8" else 4 if isinstance(p.element, str) else p.element.size
            for at, count in WIDE_RANGES if wide else RANGES:
                if at + count * size > MEMORY:
                    yield (at, count), (pointer, invalid)
            if not isinstance(p, abi.Output) and p.low:
                yield (512, p.low - 1), (invalid,)
            yield (512, p.high + 1), (invalid,)
        case abi.StructIn() | abi.StructOut():
            for bad in (MEMORY, MEMORY - p.struct.size + 1, 0xFFFFFFFF, 0x80000000, 0xFFFFFFFF - p.struct.size + 2):
                yield (bad,), (pointer,)
            if wide:
                for bad in (1 << 32, (1 << 32) + 512, 1 << 63, (1 << 64) - 1, (1 << 64) - p.struct.size):
                    yield (bad,), (pointer,)
            if not p.optional:
                yield (0,), (pointer,)


def calls(wide: bool = False) -> list[Call]:
    """Every bad value at every argument of every host function; ``wide`` is for a 64-bit memory."""
    found: list[Call] = []
    for function in abi.FUNCTIONS:
        good, blob = valid_arguments(function)
        at = 0
        for p in function.parameters:
            width = 2 if isinstance(p, abi.Input | abi.Output | abi.InOut) else 1
            for values, codes in _bad_values(p, wide):
                arguments = (*good[:at], *values, *good[at + width :])
                found.append(Call(function.name, p.name, arguments, codes, tuple(blob.items())))
            at += width
    return found


class _Text:
    """Writes calls as text; ``kind`` is the type of an address."""

    def __init__(self, wide: bool) -> None:
        self.wide = wide
        self.kind = "i64" if wide else "i32"

    def _push(self, call: Call) -> str:
        types = abi.wasm_parameters(abi.BY_NAME[call.function], self.wide)
        return " ".join(f"({kind}.const {value})" for kind, value in zip(types, call.arguments, strict=True))

    def _store(self, at: int, data: bytes) -> str:
        data = data.ljust(-(-len(data) // 4) * 4, b"\0")
        words = struct.unpack(f"<{len(data) // 4}I", data)
        return " ".join(f"(i32.store ({self.kind}.const {at + 4 * n}) (i32.const {w}))" for n, w in enumerate(words))

    def _checked(self, number: int, call: Call) -> str:
        result = f"(call ${call.function} {self._push(call)})"
        if abi.BY_NAME[call.function].result == "i64":
            result = f"(i32.wrap_i64 {result})"
        wanted = " ".join(f"(i32.ne (local.get $c) (i32.const {code}))" for code in call.codes)
        if len(call.codes) == 2:
            wanted = f"(i32.and {wanted})"
        return f"""{" ".join(self._store(at, data) for at, data in call.blob)}
          (local.set $c {result})
          (if {wanted} (then
            (call $wrong (i32.const {number}))
            (local.set $b (i32.add (local.get $b) (i32.const 1)))))"""

    def _imports(self, names: set[str]) -> str:
        lines = []
        for name in sorted(names):
            function = abi.BY_NAME[name]
            types = " ".join(abi.wasm_parameters(function, self.wide))
            parameters = f"(param {types})" if types else ""
            lines.append(f'(import "realm" "{name}" (func ${name} {parameters} (result {function.result})))')
        return "\n".join(lines)

    def _wrong(self) -> str:
        address, k = "(i64.extend_i32_u (local.get $at))" if self.wide else "(local.get $at)", self.kind
        size = f"(i32.sub (i32.const {_LOG_AT}) (local.get $at))"
        return f"""(global $shown (mut i32) (i32.const 0))
          (func $wrong (param i32) (local $at i32)
            (global.set $shown (i32.add (global.get $shown) (i32.const 1)))
            (br_if 0 (i32.gt_u (global.get $shown) (i32.const {_SHOWN})))
            (local.set $at (i32.const {_LOG_AT}))
            (loop $digit
              (i32.store8 {address} (i32.add (i32.const 48) (i32.rem_u (local.get 0) (i32.const 10))))
              (local.set $at (i32.sub (local.get $at) (i32.const 1)))
              (br_if $digit (local.tee 0 (i32.div_u (local.get 0) (i32.const 10)))))
            (drop (call $log
              (i32.const 2)
              ({k}.add {address} ({k}.const 1))
              {f"(i64.extend_i32_u {size})" if self.wide else size})))"""

    def module(self, todo: list[Call], setup: str = "") -> str:
        """A guest that makes a sequence (handle 1, tokens 5 and 6, logits kept), then all the calls."""
        groups = [list(enumerate(todo))[at : at + 25] for at in range(0, len(todo), 25)]
        # Functions of a moderate size each, as a compiler would make them.
        functions = "\n".join(
            f"(func $part{number} (param $b i32) (result i32) (local $c i32)\n"
            + "\n".join(self._checked(index, call) for index, call in group)
            + "\n(local.get $b))"
            for number, group in enumerate(groups)
        )
        parts = "\n".join(f"(local.set $b (call $part{number} (local.get $b)))" for number in range(len(groups)))
        forward = " ".join(f"({self.kind}.const {value})" for value in (8192, 2, 0, 0))
        names = {"seq_new", "forward", "log", "seq_free"} | {call.function for call in todo}
        return f"""(module {self._imports(names)}
          (memory (export "memory") {"i64" if self.wide else ""} 1)
          {self._wrong()}
          {functions}
          (func (export "realm_abi_version") (result i32) (i32.const 1))
          (func (export "run") (result i32) (local $b i32)
            (if (i32.ne (call $seq_new) (i32.const 1)) (then (unreachable)))
            {self._store(8192, struct.pack("<2I", 5, 6))}
            (if (call $forward (i32.const 1) {forward}) (then (unreachable)))
            {setup}
            {parts}
            (local.get $b)))"""


def bad_pointers() -> str:
    """Gives every host function every bad pointer, length and value at every argument, from its table. All are
    refused with the right code; returns how many were not."""
    return _Text(False).module(calls())


def bad_pointers_64() -> str:
    """Does the same with a 64-bit memory, with pointers and lengths beyond 32 bits. All are refused with the right
    code; returns how many were not."""
    return _Text(True).module(calls(wide=True))


def stale_calls() -> list[Call]:
    """Every function with a handle, with handle 2: made and freed before."""
    found: list[Call] = []
    for function in abi.FUNCTIONS:
        good, blob = valid_arguments(function)
        at = 0
        for p in function.parameters:
            if isinstance(p, abi.Handle):
                arguments = (*good[:at], 2, *good[at + 1 :])
                found.append(Call(function.name, p.name, arguments, (int(ErrorCode.BAD_HANDLE),), tuple(blob.items())))
            at += 2 if isinstance(p, abi.Input | abi.Output | abi.InOut) else 1
    return found


def stale_handles() -> str:
    """Gives every host function a handle that was freed. All refuse it; returns how many did not."""
    freed = "(if (i32.ne (call $seq_new) (i32.const 2)) (then (unreachable)))\n(drop (call $seq_free (i32.const 2)))"
    return _Text(False).module(stale_calls(), freed)


def describe(number: int, wide: bool = False) -> Call:
    """The call that :func:`bad_pointers` logged as ``number``."""
    return calls(wide)[number]


# --- WASI ---------------------------------------------------------------------------------------------

_WASI_OK = {0, 8, 21, 28, 52, 70}
_EXTREMES = (0xFFFFFFFF, 0x80000000, MEMORY - 1, 0xFFFFFFF0)


def wasi_import(name: str) -> str:
    types = " ".join("i64" if kind == "U" else "i32" for kind in wasi.SIGNATURES[name])
    result = "" if wasi.result(name) is None else " (result i32)"
    return f'(import "wasi_snapshot_preview1" "{name}" (func ${name} (param {types}){result}))'


def wasi_bad_pointers() -> str:
    """Gives every WASI function the same extreme value at every argument. None succeeds at writing outside or traps;
    returns how many answers are no error number."""
    checks = []
    for name, kinds in wasi.SIGNATURES.items():
        if wasi.result(name) is None:
            continue
        for value in _EXTREMES:
            pushes = " ".join(f"({'i64' if kind == 'U' else 'i32'}.const {value})" for kind in kinds)
            checks.append(f"(call $check (call ${name} {pushes}))")
    known = " ".join(f"(br_if 0 (i32.eq (local.get 0) (i32.const {code})))" for code in sorted(_WASI_OK))
    bad = "(global.set $bad (i32.add (global.get $bad) (i32.const 1)))"
    names = "\n".join(wasi_import(name) for name in wasi.SIGNATURES if wasi.result(name) is not None)
    return f"""(module {names}
      (memory (export "memory") 1) (global $bad (mut i32) (i32.const 0))
      (func $check (param i32) {known} {bad})
      (func (export "realm_abi_version") (result i32) (i32.const 1))
      (func (export "run") (result i32) {" ".join(checks)} (global.get $bad)))"""


def import_everything() -> str:
    """Imports everything there is, of realm and of WASI. Allowed."""
    everything = imports(*abi.BY_NAME) + "\n".join(wasi_import(name) for name in wasi.SIGNATURES)
    return f"""(module {everything}
      (memory (export "memory") 1)
      (func (export "realm_abi_version") (result i32) (i32.const 1))
      (func (export "run") (result i32) (i32.const 0)))"""
