"""The host rewrites modules before it compiles them: the rewritten one must do what the tenant's does.

Both run with the same answers of the same imports; results, traps and all of memory are compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import wasmtime

from realm.errors import RealmError
from realm.guests.bulk_memory import CHUNK, rewrite
from realm.guests.fibers import Engine
from realm.guests.module_format import parse_module
from tests.hostile.fuzz import modules
from tests.hostile.fuzz.problems import Problem

PAGE = 65_536
PAGES = 10
FUEL = 50_000_000
MEMORY_BYTES = 8 << 20
_engine: Engine | None = None


def engine() -> Engine:
    global _engine
    _engine = _engine or Engine()
    return _engine


# --- modules full of such instructions -----------------------------------------------------------------


def make(seed: int) -> bytes | None:
    """A module: one of ours, or another target's."""
    random = Random(seed)
    kind = random.randrange(10)
    try:
        if kind == 0:
            return modules.smith(seed)
        if kind == 1:
            return modules.mutated(seed)
    except modules.NoModule:
        return None
    return bytes(wasmtime.wat2wasm(_Writer(random).module()))


class _Writer:
    """Writes a module as text: nested blocks of fills and copies with sizes around those that are split."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.wide = random.random() < 0.2
        self.kind = "i64" if self.wide else "i32"
        self.functions = random.randrange(1, 5)

    def module(self) -> str:
        functions = [
            f"""(func $f{n} (param $p {self.kind}) (param $v i32) (result i32) (local $n i32)
                {self.block(2)} {self.end(n)})"""
            for n in range(self.functions)
        ]
        data = "".join(rf"\{byte:02x}" for byte in self.random.randbytes(300))
        segments = "".join(
            f'(data ({self.kind}.const {at}) "{data}")' for at in (0, CHUNK - 100, 3 * CHUNK + 7, PAGES * PAGE - 300)
        )
        calls = " ".join(
            f"(drop (call $f{n} ({self.kind}.const {self.random.randrange(2) * CHUNK}) (i32.const {n})))"
            for n in range(self.functions)
        )
        exported = '(export "f0" (func $f0))' if self.random.random() < 0.5 else ""
        return f"""(module (memory (export "memory") {"i64" if self.wide else ""} {PAGES} {PAGES + 2})
            (global $g (mut i32) (i32.const 3)) {exported} {" ".join(functions)} {segments}
            (func (export "realm_abi_version") (result i32) (i32.const 1))
            (func (export "run") (result i32) {calls} (global.get $g)))"""

    def end(self, number: int) -> str:
        if number + 1 < self.functions and self.random.random() < 0.3:
            call = self.random.choice(["call", "return_call"])
            return f"({call} $f{number + 1} (local.get $p) (i32.const {self.random.randrange(256)}))"
        return "(global.get $g)"

    def block(self, depth: int) -> str:
        return " ".join(self.statement(depth) for _ in range(self.random.randrange(1, 5)))

    def statement(self, depth: int) -> str:
        random = self.random
        match random.randrange(10):
            case 0 if depth:
                return f"(block {self.block(depth - 1)})"
            case 1 if depth:
                return f"(if (local.get $v) (then {self.block(depth - 1)}) (else {self.block(depth - 1)}))"
            case 2 if depth:
                return f"""(local.set $n (i32.const {random.randrange(1, 4)})) (loop $l {self.block(depth - 1)}
                    (br_if $l (i32.gt_s (local.tee $n (i32.sub (local.get $n) (i32.const 1))) (i32.const 0))))"""
            case 3:
                return f"(drop (memory.grow ({self.kind}.const {random.randrange(3)})))"
            case 4:
                return "(global.set $g (i32.mul (global.get $g) (i32.const 31)))"
            case 5 | 6 | 7:
                return f"(memory.copy {self.place()} {self.place()} {self.size()})"
            case _:
                return f"(memory.fill {self.place()} (i32.const {random.randrange(-3, 300)}) {self.size()})"

    def number(self, value: int) -> str:
        """A constant, or the same where the rewriter cannot see it."""
        most = 1 << (64 if self.wide else 32)
        text = f"({self.kind}.const {value % most})"
        return text if self.random.random() < 0.5 else f"({self.kind}.add (local.get $p) {text})"

    def place(self) -> str:
        random = self.random
        if random.random() < 0.95:
            return self.number(random.randrange(3) * CHUNK + random.choice([0, 1, 7, 100, random.randrange(CHUNK)]))
        base = random.choice([0, CHUNK, PAGES * PAGE - CHUNK, PAGES * PAGE, PAGES * PAGE - 2 * CHUNK])
        return self.number(base + random.choice([0, 0, 1, -1, 7, 100, -100, random.randrange(CHUNK)]))

    def size(self) -> str:
        random = self.random
        if random.random() < 0.02:
            return self.number(random.choice([-1, 1 << 31, (1 << 32) - CHUNK, 1 << 40, PAGES * PAGE]))
        base = random.choice([0, 0, CHUNK, CHUNK, 2 * CHUNK, 3 * CHUNK])
        return self.number(max(0, base + random.choice([0, 1, -1, 5, random.randrange(CHUNK)])))


# --- running one ---------------------------------------------------------------------------------------


def _stub(kind: Any, random: Random) -> Callable[..., Any]:
    results = [str(result) for result in kind.results]

    def call(*_arguments: Any) -> Any:
        values = [random.choice([0, 1, -1, random.getrandbits(31)]) for _ in results]
        return values[0] if len(values) == 1 else values or None

    return call


def outcome(data: bytes) -> tuple[str, str] | None:
    """(how the module ended, hash of its memory); None where its fuel was not enough to tell."""
    module = wasmtime.Module(engine().inner, data)
    store = wasmtime.Store(engine().inner)
    store.set_limits(memory_size=MEMORY_BYTES, table_elements=10_000, instances=1, memories=1)
    store.set_fuel(FUEL)
    random = Random(7)
    memory = None
    try:
        imports = [wasmtime.Func(store, item.type, _stub(item.type, random)) for item in module.imports]
        exports = wasmtime.Instance(store, module, imports).exports(store)
        found, run = exports.get("memory"), exports.get("run")
        memory = found if isinstance(found, wasmtime.Memory) else None
        ended = f"returned {run(store)}" if isinstance(run, wasmtime.Func) else "has no run"
    except wasmtime.Trap as trap:
        # The offsets are those of the rewritten file; the frames are the same ones.
        frames = [(frame.func_index, frame.func_name) for frame in trap.frames]
        frames = [frame for frame in frames if not (frame[1] or "").startswith("realm:")]
        ended = f"{trap.message.splitlines()[-1]} in {frames}"
    except wasmtime.WasmtimeError as error:
        ended = str(error).splitlines()[0]
    if store.get_fuel() == 0 or "fuel" in ended or "stack" in ended:
        return None
    digest = "none" if memory is None else hashlib.sha256(bytes(memory.read(store))).hexdigest()
    return ended, digest


def check(data: bytes, counts: Counter[str]) -> None:
    """Raises :class:`Problem` when the rewritten module does something else."""
    try:
        facts = parse_module(data)
        before = outcome(data)
    except (RealmError, wasmtime.WasmtimeError):
        # Refused before it would be rewritten.
        return
    rewritten = rewrite(data, facts)
    try:
        after = outcome(rewritten)
    except wasmtime.WasmtimeError as error:
        raise Problem(f"the rewritten module does not compile: {error}") from None
    counts["instructions"] += len(facts.sites)
    if before is None or after is None:
        counts["out of fuel"] += 1
        return
    counts["compared"] += 1
    counts["traps"] += "returned" not in before[0]
    if before != after:
        raise Problem(f"the module: {before}; rewritten: {after}")
