"""The child process that checks and compiles one module, and what it does there.

Run as ``python -m realm.guests.compile_child MODULE SHA256 OUTPUT MAX_BYTES MEMORY_BYTES CPU_SECONDS``. It
limits and contains itself before it looks at a byte of the module, and answers with one JSON object on
standard output.
"""

from __future__ import annotations

import hashlib
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import wasmtime

from realm import sandbox
from realm.errors import RealmError
from realm.guests.bulk_memory import rewrite
from realm.guests.check import MAX_MODULE_BYTES, check_bytes, check_module
from realm.guests.fibers import Engine
from realm.guests.module_format import parse_module
from realm.guests.module_limits import ModuleLimits

ARTIFACT_BYTES = 512 << 20
"""Most bytes that the child may write. Native code has two to five times the size of its module."""


class Refusal(msgspec.Struct, frozen=True):
    """A :class:`RealmError` on its way to the parent."""

    code: str
    message: str
    details: dict[str, Any]


class Answer(msgspec.Struct, frozen=True):
    """What the child writes: an ``error``, or the imports and the hash of what is in the output file."""

    error: Refusal | None = None
    artifact_sha256: str = ""
    imports: list[str] = []


def compile_bytes(engine: Engine, data: bytes, max_bytes: int = MAX_MODULE_BYTES) -> tuple[bytes, list[str]]:
    """Check a module and make native code of it; gives the artifact and the module's imports.

    Raises:
        RealmError: ``module_*``.
    """
    check_bytes(data[:64], len(data), max_bytes)
    facts = parse_module(data, replace(ModuleLimits(), module_bytes=max_bytes))
    try:
        # First as the tenant wrote it, so that errors name offsets in the tenant's file.
        wasmtime.Module.validate(engine.inner, data)
        module = wasmtime.Module(engine.inner, rewrite(data, facts))
    except wasmtime.WasmtimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = "; ".join(lines)[:500]
        raise RealmError("module_invalid", f"the module is not valid WebAssembly for Realm: {text}") from None
    imports = check_module(engine, module)
    return bytes(module.serialize()), imports


def _limit_self(memory_bytes: int, cpu_seconds: int) -> None:
    sandbox.give_way()
    sandbox.limit(memory_bytes)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (ARTIFACT_BYTES, ARTIFACT_BYTES))


def main(arguments: list[str]) -> int:
    """Entry of the child: module, its hash, output file, size limit, bytes of memory, processor seconds."""
    wasm, sha256, output = arguments[:3]
    max_bytes, memory_bytes, cpu_seconds = map(int, arguments[3:])
    try:
        _limit_self(memory_bytes, cpu_seconds)
        with Path(wasm).open("rb") as source, Path(output).open("wb") as target:
            sandbox.enter(sandbox.COMPILER)
            # One byte more than is allowed: that is how a file that grew is seen.
            data = source.read(max_bytes + 1)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise RealmError("module_invalid", "the module changed while it was being read")
            artifact, imports = compile_bytes(Engine(), data, max_bytes)
            target.write(artifact)
        answer = Answer(artifact_sha256=hashlib.sha256(artifact).hexdigest(), imports=imports)
    except RealmError as error:
        answer = Answer(error=Refusal(error.code, error.message, error.details))
    except OSError as error:
        text = f"the compiler's files cannot be used: {error.strerror}"
        answer = Answer(error=Refusal("internal", text, {}))
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
