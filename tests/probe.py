"""A guest that calls one host function with any arguments: for tests of the boundary.

The arguments and the contents of its memory come with its input; it emits the result and then the
start of its memory, so that a test sees what the host wrote.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from realm.guests import abi
from realm.run_messages import RunFinished
from tests.fakes import Host

MEMORY = 65_536
SHOWN = 16_384
INPUT_AT = 512
OUTPUT_AT = 2048
ITEMS_AT = 3072
STRUCT_AT = 4096
ANSWER_AT = 5120
TOKENS_AT = 6144
_RESULT_AT = 256


def _setup(a: str) -> str:
    return f"""
    (drop (call $seq_new))
    (i32.store ({a}.const 8192) (i32.const 5))
    (i32.store ({a}.const 8196) (i32.const 6))
    (drop (call $forward (i32.const 1) ({a}.const 8192) ({a}.const 2) ({a}.const 0) ({a}.const 0)))
    (i64.store ({a}.const 8192) (i64.const 0))"""


def module(name: str, wide: bool = False) -> str:
    """A guest that makes a sequence (handle 1, tokens 5 and 6, logits kept), then calls ``name``.

    ``wide`` gives it a 64-bit memory.
    """
    function = abi.BY_NAME[name]
    types = abi.wasm_parameters(function, wide)
    own = "" if name in ("seq_new", "forward", "input_read", "emit") else _import(name, wide)
    a = "i64" if wide else "i32"
    pushes = "".join(
        f"(i64.load ({a}.const {at * 8}))" if kind == "i64" else f"(i32.wrap_i64 (i64.load ({a}.const {at * 8})))"
        for at, kind in enumerate(types)
    )
    widen = "" if function.result == "i64" else "(i64.extend_i32_s "
    return f"""(module
      {_import("seq_new", wide)} {_import("forward", wide)} {_import("input_read", wide)} {_import("emit", wide)} {own}
      (memory (export "memory") {"i64" if wide else ""} 1)
      (func (export "realm_abi_version") (result i32) (i32.const 1))
      (func (export "run") (result i32)
        {_setup(a)}
        (drop (call $input_read (i32.const 0) ({a}.const 0) ({a}.const {SHOWN})))
        (i64.store ({a}.const {_RESULT_AT}) {widen}(call ${name} {pushes}){")" if widen else ""})
        (drop (call $emit ({a}.const 0) ({a}.const {SHOWN})))
        (i32.const 0)))"""


def _import(name: str, wide: bool) -> str:
    function = abi.BY_NAME[name]
    types = " ".join(abi.wasm_parameters(function, wide))
    parameters = f"(param {types})" if types else ""
    return f'(import "realm" "{name}" (func ${name} {parameters} (result {function.result})))'


@dataclass
class Answer:
    """What one call gave: its result, the guest's memory after it, and how the run ended."""

    result: int
    memory: bytes
    before: bytes
    end: RunFinished
    host: Host
    run: int

    def u32(self, at: int, count: int = 1) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}I", self.memory, at)

    def fields(self, kind: abi.StructType, at: int) -> dict[str, float]:
        values = struct.unpack_from(kind.format, self.memory, at)
        return dict(zip([f.name for f in kind.fields], values, strict=True))

    @property
    def untouched(self) -> bool:
        """Whether the host wrote nothing into the guest's memory."""
        own = slice(_RESULT_AT, _RESULT_AT + 8)
        before, after = bytearray(self.before), bytearray(self.memory)
        before[own] = after[own] = bytes(8)
        return before == after


def call(
    name: str,
    *arguments: int,
    blob: dict[int, bytes] | None = None,
    host: Host | None = None,
    wide: bool = False,
) -> Answer:
    """Run the guest once. ``blob`` puts bytes at addresses (below 8,192) before the call."""
    host = host or Host()
    image = bytearray(SHOWN)
    for at, argument in enumerate(arguments):
        struct.pack_into("<Q", image, at * 8, argument & (1 << 64) - 1)
    for at, data in (blob or {}).items():
        image[at : at + len(data)] = data
    run = host.start(module(name, wide), input=bytes(image))
    for _ in range(1000):
        end = host.finished(run)
        if end is not None:
            break
        if not host.turn().busy and host.last.deadline is not None and not host.engine.results:
            host.now = max(host.now, min(host.last.deadline, host.now + 1))
    assert end is not None
    memory = host.output(run)
    (result,) = struct.unpack_from("<q", memory, _RESULT_AT) if memory else (0,)
    return Answer(result, memory, bytes(image), end, host, run)


def valid_arguments(function: abi.Function) -> tuple[list[int], dict[int, bytes]]:
    """Arguments that pass all checks of the decoder, and the memory they need."""
    arguments: list[int] = []
    blob: dict[int, bytes] = {}
    for p in function.parameters:
        match p:
            case abi.Scalar():
                arguments.append(max(p.low or 0, 0))
            case abi.Handle():
                arguments.append(1)
            case abi.Input():
                arguments += [INPUT_AT, max(p.low, 1)]
                text = b"[]" if function.name == "chat_template" else b"a"
                blob[INPUT_AT] = text if p.element == "u8" else struct.pack("<I", 7)
            case abi.Output():
                arguments += [OUTPUT_AT, 128]
            case abi.InOut():
                arguments += [ITEMS_AT, 1]
                blob[ITEMS_AT] = struct.pack(abi.ITEM.format, 1, 1, TOKENS_AT, 0, 0, 0.0, 0, 0)
                blob[TOKENS_AT] = struct.pack("<I", 9)
            case abi.StructIn():
                arguments.append(STRUCT_AT)
            case abi.StructOut():
                arguments.append(ANSWER_AT)
    return arguments, blob
