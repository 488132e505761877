"""Small guests in text form, for tests."""

from __future__ import annotations

import struct

from realm.guests import abi
from tests.fakes import greedy


def imports(*names: str) -> str:
    lines = []
    for name in names:
        function = abi.BY_NAME[name]
        types = " ".join(abi.wasm_parameters(function))
        parameters = f"(param {types})" if types else ""
        lines.append(f'(import "realm" "{name}" (func ${name} {parameters} (result {function.result})))')
    return "\n".join(lines)


def guest(body: str, *names: str, memory: str = "1", extra: str = "") -> str:
    """A module whose ``run`` is ``body``, with locals $a, $b and $c."""
    return f"""(module {imports(*names)}
      (memory (export "memory") {memory}) {extra}
      (func (export "realm_abi_version") (result i32) (i32.const 1))
      (func $run (export "run") (result i32) (local $a i32) (local $b i32) (local $c i32) {body}))"""


# Forwards STEPS tokens, each answered by the next, and emits each; samples as the struct at 600 says.
GENERATE = guest(
    """
    (drop (call $input_read (i32.const 0) (i32.const 600) (i32.const 64)))
    (local.set $a (call $seq_new))
    (i32.store (i32.const 512) (i32.const 5))
    (loop $again
      (local.set $c (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 700)))
      (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))
      (i32.store (i32.const 512) (local.get $c))
      (local.set $c (call $emit (i32.const 512) (i32.const 1)))
      (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))
      (br_if $again (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 12))))
    (i32.const 0)""",
    "seq_new",
    "forward",
    "emit",
    "input_read",
)
SPIN = guest("(loop $l (br $l)) (i32.const 0)")
RECEIVE = guest(
    "(call $recv (i32.const 0) (i32.const 16) (i32.const 5000))",
    "recv",
)


def sampling(temperature: float = 0.0, **values: int) -> bytes:
    names = [f.name for f in abi.SAMPLING.fields]
    return struct.pack(abi.SAMPLING.format, *[values.get(n, temperature if n == "temperature" else 0) for n in names])


def expected(steps: int = 12) -> bytes:
    tokens = [5]
    for _ in range(steps):
        tokens.append(greedy(tokens))
    return bytes(tokens[1:])
