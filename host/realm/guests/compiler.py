"""Has guest modules checked and compiled by a child process, and keeps the results.

Compiling a tenant's module is not bounded by the compiler, so a child does it (:mod:`compile_child`):
with limits on memory and processor time, killed when it takes too long, and with next to nothing in its
environment. Native code comes only from our own children; the cache folder is private to the host's user.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

import realm
from realm.errors import RealmError
from realm.guests.artifact_cache import ArtifactCache, Entry, Facts
from realm.guests.check import MAX_MODULE_BYTES, check_bytes
from realm.guests.compile_child import Answer, compile_bytes

__all__ = ["COMPILE_MEMORY", "COMPILE_SECONDS", "CompiledModule", "compile_bytes", "compile_module"]

log = logging.getLogger("realm.compiler")

COMPILE_SECONDS = 30.0
"""Wall time for one module."""
COMPILE_MEMORY = 2 << 30
"""Bytes of memory (private, writable) that the child may have."""
COMPILE_THREADS = 2
_MAX_ANSWER = 4 << 20
"""Bytes of a child's answer; a thousand imports with long names have less."""
_MAX_COMPLAINT = 4096
"""Bytes of a child's standard error that are kept, its last ones."""


@dataclass(frozen=True)
class CompiledModule:
    """A checked module and its native code.

    Attributes:
        sha256: of the ``.wasm``, in hex. size: of the ``.wasm``, in bytes.
        artifact: the compiled file in the cache, for :class:`realm.run_messages.StartRun`.
        artifact_sha256: of that file, in hex.
        imports: what it imports, each ``module.name``.
    """

    sha256: str
    size: int
    artifact: Path
    artifact_sha256: str
    imports: list[str]


@dataclass(frozen=True)
class _Job:
    """One compilation: the module, and where its results go."""

    wasm: Path
    sha256: str
    size: int
    cache: ArtifactCache
    entry: Entry

    def compiled(self, facts: Facts) -> CompiledModule:
        return CompiledModule(self.sha256, self.size, self.entry.artifact, facts.artifact_sha256, facts.imports)


def _prepare(wasm: Path, cache: Path, max_bytes: int) -> tuple[_Job, CompiledModule | None]:
    """Hash the module and look it up."""
    try:
        with wasm.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            check_bytes(file.read(64), size, max_bytes)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RealmError("module_invalid", f"the module cannot be read: {error.strerror}") from error
    artifacts = ArtifactCache(cache)
    job = _Job(wasm, sha256, size, artifacts, artifacts.entry(sha256))
    facts = artifacts.find(job.entry)
    if facts is not None:
        return job, job.compiled(facts)
    artifacts.sweep()
    return job, None


def _command(job: _Job, output: Path, max_bytes: int, seconds: float) -> tuple[list[str], dict[str, str]]:
    roots = [str(Path(realm.__file__).parent.parent), *(p for p in sys.path if p)]
    environment = {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(roots)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "RAYON_NUM_THREADS": str(COMPILE_THREADS),
        # A thread of NumPy's would be there before the process is contained, and not be contained.
        "OPENBLAS_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }
    cpu_seconds = math.ceil(seconds * COMPILE_THREADS)
    limits = [str(value) for value in (max_bytes, COMPILE_MEMORY, cpu_seconds)]
    arguments = [str(job.wasm), job.sha256, str(output), *limits]
    # -P: nothing is imported from the folder in which the host was started.
    return [sys.executable, "-P", "-m", "realm.guests.compile_child", *arguments], environment


def _decode(status: int, answer: bytes, complaint: bytes) -> Answer:
    """What a child that has ended says. Raises its error, or one that says how it ended."""
    if status == 0:
        with suppress(msgspec.MsgspecError):
            result = msgspec.json.decode(answer, type=Answer)
            if result.error is not None:
                raise RealmError(result.error.code, result.error.message, details=result.error.details)
            if result.artifact_sha256:
                return result
    if status == -signal.SIGSYS:
        how = "was ended by the sandbox"
    elif status < 0:
        how = f"was ended by signal {-status}"
    else:
        how = f"failed with status {status}"
    log.warning("compiling a module %s: %s", how, complaint.decode("utf-8", "replace").strip() or "no message")
    raise RealmError(
        "compile_limit",
        f"compiling the module {how}; it may use {COMPILE_MEMORY >> 20} MiB of memory and "
        f"{COMPILE_SECONDS * COMPILE_THREADS:g} seconds of processor time; smaller functions compile faster",
        details={"memory_bytes": COMPILE_MEMORY, "seconds": COMPILE_SECONDS},
    )


def _too_slow(seconds: float) -> RealmError:
    return RealmError(
        "compile_limit",
        f"compiling the module took longer than {seconds:g} seconds; smaller functions compile faster",
        details={"seconds": seconds},
    )


async def _read_start(stream: asyncio.StreamReader, most: int) -> bytes | None:
    """All that comes; None as soon as it is more than ``most`` bytes."""
    kept = bytearray()
    while piece := await stream.read(65_536):
        kept += piece
        if len(kept) > most:
            return None
    return bytes(kept)


async def _read_end(stream: asyncio.StreamReader, most: int) -> bytes:
    """The last ``most`` bytes of all that comes."""
    kept = b""
    while piece := await stream.read(65_536):
        kept = (kept + piece)[-most:]
    return kept


async def _run(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int, bytes, bytes]:
    """Run a child to its end: its status, its answer, and the end of what it complained about."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    complaint = asyncio.create_task(_read_end(process.stderr, _MAX_COMPLAINT))
    try:
        async with asyncio.timeout(seconds):
            answer = await _read_start(process.stdout, _MAX_ANSWER)
            if answer is None:
                # More than any answer of ours: nothing it says counts any more.
                process.kill()
            status = await process.wait()
            return status, answer or b"", await complaint
    except TimeoutError:
        raise _too_slow(seconds) from None
    finally:
        complaint.cancel()
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def compile_module(
    wasm: Path, cache: Path, *, max_bytes: int = MAX_MODULE_BYTES, seconds: float = COMPILE_SECONDS
) -> CompiledModule:
    """Check and compile a module, or find it in the cache.

    Args:
        wasm: the module's file, which must not change meanwhile.
        cache: folder for artifacts; made, and private to this user.

    Raises:
        RealmError: ``module_*`` or ``compile_limit``; ``internal`` if the cache cannot be used.
    """
    job, found = await asyncio.to_thread(_prepare, wasm, cache, max_bytes)
    if found is not None:
        return found
    compiled = await _compile(job, max_bytes, seconds)
    if compiled is None:
        # Somebody removed the folder meanwhile. It is only a cache: once more, in a new one.
        compiled = await _compile(job, max_bytes, seconds)
    if compiled is None:
        raise RealmError("internal", f"the cache {cache} is removed while it is in use")
    return compiled


async def _compile(job: _Job, max_bytes: int, seconds: float) -> CompiledModule | None:
    """Compile in a child; None if the folder for the result is gone."""
    output = await asyncio.to_thread(job.cache.temporary)
    try:
        command, environment = _command(job, output, max_bytes, seconds)
        status, answer, complaint = await _run(command, environment, seconds)
        if not await asyncio.to_thread(output.exists):
            return None
        result = _decode(status, answer, complaint)
        facts = Facts(job.entry.key, result.artifact_sha256, result.imports)
        await asyncio.to_thread(_install, job, output, facts)
        return job.compiled(facts)
    finally:
        output.unlink(missing_ok=True)


def _install(job: _Job, output: Path, facts: Facts) -> None:
    try:
        job.cache.install(job.entry, output, facts)
    except OSError as error:
        raise RealmError("internal", f"the compiled module cannot be kept: {error.strerror}") from error
    job.cache.sweep(job.entry)


def compile_module_sync(
    wasm: Path, cache: Path, *, max_bytes: int = MAX_MODULE_BYTES, seconds: float = COMPILE_SECONDS
) -> CompiledModule:
    """:func:`compile_module` for callers without an event loop."""
    return asyncio.run(compile_module(wasm, cache, max_bytes=max_bytes, seconds=seconds))
