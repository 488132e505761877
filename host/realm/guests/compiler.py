"""Checks and compiles guest modules in a child process, and keeps the results.

Compiling a tenant's module is not bounded by the compiler, so a child does it: with limits on memory
and processor time, killed when it takes too long, and with next to nothing in its environment. Native
code comes only from our own children; the cache folder is private to the host's user.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wasmtime

import realm
from realm.errors import RealmError
from realm.guests import abi
from realm.guests.check import MAX_MODULE_BYTES, check_bytes, check_module
from realm.guests.fiber_types import settings_fingerprint
from realm.guests.fibers import Engine

COMPILE_SECONDS = 30.0
"""Wall time for one module."""
COMPILE_MEMORY = 2 << 30
"""Bytes of memory (private, writable) that the child may have."""
COMPILE_THREADS = 2
_FORMAT = 1


@dataclass(frozen=True)
class CompiledModule:
    """A checked module and its native code.

    Attributes:
        sha256: of the ``.wasm``, in hex. size: of the ``.wasm``, in bytes.
        artifact: the compiled file in the cache, for :class:`realm.messages.StartRun`.
        imports: what it imports, each ``module.name``.
    """

    sha256: str
    size: int
    artifact: Path
    imports: list[str]


@dataclass(frozen=True)
class _Job:
    """One compilation: where the module is and where its results go."""

    wasm: Path
    sha256: str
    size: int
    artifact: Path
    facts: Path


def cache_key(sha256: str) -> str:
    """Name of a module's artifact: changes with content, Wasmtime's version, settings and ABI."""
    text = f"{_FORMAT};{abi.ABI_VERSION};{sha256};{settings_fingerprint()}"
    return hashlib.sha256(text.encode()).hexdigest()


def _prepare(wasm: Path, cache: Path, max_bytes: int) -> tuple[_Job, CompiledModule | None]:
    """Hash the module and look it up."""
    try:
        size = wasm.stat().st_size
        with wasm.open("rb") as file:
            check_bytes(file.read(64), size, max_bytes)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RealmError("module_invalid", f"the module cannot be read: {error.strerror}") from error
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    cache.chmod(0o700)
    key = cache_key(sha256)
    job = _Job(wasm, sha256, size, cache / f"{key}.cwasm", cache / f"{key}.json")
    return job, _cached(job)


def _cached(job: _Job) -> CompiledModule | None:
    """The module of an earlier compilation, if its artifact is still what was written then."""
    try:
        facts = json.loads(job.facts.read_bytes())
        with job.artifact.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if facts["artifact_sha256"] != digest:
            return None
        return CompiledModule(job.sha256, job.size, job.artifact, [str(name) for name in facts["imports"]])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        # A damaged entry is made again.
        return None


def _command(job: _Job, output: Path, max_bytes: int) -> tuple[list[str], dict[str, str]]:
    roots = [str(Path(realm.__file__).parent.parent), *(p for p in sys.path if p)]
    environment = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(roots)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAYON_NUM_THREADS": str(COMPILE_THREADS),
        "LC_ALL": "C.UTF-8",
    }
    arguments = [str(job.wasm), job.sha256, str(output), str(max_bytes)]
    return [sys.executable, "-m", "realm.guests.compiler", *arguments], environment


def _temporary(job: _Job) -> Path:
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=job.artifact.parent)
    os.close(descriptor)
    return Path(name)


def _install(job: _Job, output: Path, status: int, answer: bytes) -> CompiledModule:
    """Take a child's result in: its error, or the artifact under its final name."""
    try:
        result: dict[str, Any] = json.loads(answer)
    except ValueError:
        result = {}
    error = result.get("error")
    if error:
        raise RealmError(error["code"], error["message"], details=error["details"])
    if status != 0 or "imports" not in result:
        how = f"was ended by signal {-status}" if status < 0 else f"failed with status {status}"
        raise RealmError(
            "compile_limit",
            f"compiling the module {how}; it may use {COMPILE_MEMORY >> 20} MiB of memory and "
            f"{COMPILE_SECONDS:g} seconds",
            details={"memory_bytes": COMPILE_MEMORY, "seconds": COMPILE_SECONDS},
        )
    facts = {"artifact_sha256": result["artifact_sha256"], "imports": result["imports"]}
    facts_file = _temporary(job)
    facts_file.write_text(json.dumps(facts))
    # The artifact is in place before the facts that vouch for it.
    output.replace(job.artifact)
    facts_file.replace(job.facts)
    return CompiledModule(job.sha256, job.size, job.artifact, list(result["imports"]))


def _too_slow(seconds: float) -> RealmError:
    return RealmError(
        "compile_limit",
        f"compiling the module took longer than {seconds:g} seconds",
        details={"seconds": seconds},
    )


async def compile_module(
    wasm: Path, cache: Path, *, max_bytes: int = MAX_MODULE_BYTES, seconds: float = COMPILE_SECONDS
) -> CompiledModule:
    """Check and compile a module, or find it in the cache.

    Args:
        wasm: the module's file, which must not change meanwhile.
        cache: folder for artifacts; made, and private to this user.

    Raises:
        RealmError: ``module_*`` or ``compile_limit``.
    """
    job, found = await asyncio.to_thread(_prepare, wasm, cache, max_bytes)
    if found is not None:
        return found
    output = _temporary(job)
    try:
        command, environment = _command(job, output, max_bytes)
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            answer, _ = await asyncio.wait_for(process.communicate(), seconds)
        except TimeoutError:
            raise _too_slow(seconds) from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        return await asyncio.to_thread(_install, job, output, process.returncode or 0, answer)
    finally:
        output.unlink(missing_ok=True)


def compile_module_sync(
    wasm: Path, cache: Path, *, max_bytes: int = MAX_MODULE_BYTES, seconds: float = COMPILE_SECONDS
) -> CompiledModule:
    """:func:`compile_module` for callers without an event loop."""
    job, found = _prepare(wasm, cache, max_bytes)
    if found is not None:
        return found
    output = _temporary(job)
    try:
        command, environment = _command(job, output, max_bytes)
        try:
            done = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=seconds,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _too_slow(seconds) from None
        return _install(job, output, done.returncode, done.stdout)
    finally:
        output.unlink(missing_ok=True)


# --- the child ------------------------------------------------------------------------------------


def _limit_self() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # DATA counts what is really writable; address space alone is cheap and used for guard regions.
    resource.setrlimit(resource.RLIMIT_DATA, (COMPILE_MEMORY, COMPILE_MEMORY))
    cpu = int(COMPILE_SECONDS * COMPILE_THREADS)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def _compile(wasm: Path, sha256: str, output: Path, max_bytes: int) -> dict[str, Any]:
    data = wasm.read_bytes()
    check_bytes(data[:64], len(data), max_bytes)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RealmError("module_invalid", "the module changed while it was being read")
    engine = Engine()
    try:
        module = wasmtime.Module(engine.inner, data)
    except wasmtime.WasmtimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = "; ".join(lines)[:500]
        raise RealmError("module_invalid", f"the module is not valid WebAssembly for Realm: {text}") from None
    imports = check_module(engine, module)
    artifact = module.serialize()
    output.write_bytes(artifact)
    return {"imports": imports, "artifact_sha256": hashlib.sha256(artifact).hexdigest()}


def main(arguments: list[str]) -> int:
    """Entry of the child: module, its hash, output file, size limit. Answers one JSON object."""
    _limit_self()
    wasm, sha256, output, max_bytes = arguments
    try:
        result = _compile(Path(wasm), sha256, Path(output), int(max_bytes))
    except RealmError as error:
        result = {"error": {"code": error.code, "message": error.message, "details": error.details}}
    sys.stdout.write(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
