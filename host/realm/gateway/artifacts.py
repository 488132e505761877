"""Compiled modules by the hash of their source: found, or made once however many ask."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from realm.errors import RealmError


class Compiled(Protocol):
    """What the compiler gives. ``artifact_sha256`` is the hash of the file ``artifact``, in hex."""

    @property
    def artifact(self) -> Path: ...

    @property
    def artifact_sha256(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def imports(self) -> Sequence[str]: ...


Compiler = Callable[[Path, Path], Awaitable[Compiled]]
"""From a module and the cache's folder to a compiled module; raises RealmError ``module_*``."""


_KNOWN = 4096
"""Compiled modules that are remembered; others are looked up in the cache's folder again."""
_MARK_SECONDS = 60.0
"""An artifact in use is marked as used this often: a system call less for each other run."""


class _Job:
    """One module being made.

    Attributes:
        file: the module. Unless it is the host's own, a second name that the job has made and removes:
            whoever asked first may be gone, and its file with it, before anybody's turn comes.
        askers: callers that wait, by tenant.
        turns: each asking tenant's, until one of them has come.
        maker: the turn that has.
        result: for all callers.
    """

    __slots__ = ("askers", "builtin", "file", "maker", "result", "sha256", "turns")

    def __init__(self, sha256: str, file: Path, builtin: bool) -> None:
        self.sha256 = sha256
        self.file = file
        self.builtin = builtin
        self.askers: Counter[str] = Counter()
        self.turns: dict[str, asyncio.Task[Compiled]] = {}
        self.maker: asyncio.Task[Compiled] | None = None
        self.result: asyncio.Future[Compiled] = asyncio.get_running_loop().create_future()

    def drop_file(self) -> None:
        """It is needed no more. Once or more often."""
        if not self.builtin:
            self.file.unlink(missing_ok=True)


class Artifacts:
    """The compiled modules of one host.

    ``compiles`` bounds how many are compiled at a time. A tenant has one turn at a time, so however many
    of its modules wait, another tenant's is behind one of them only. Content that several tenants ask for
    is made once, in whichever turn comes first.

    ``in_use`` gives the hashes of modules that runs have: they are marked as used before each compilation,
    which may remove the artifacts that were not used for the longest time. The host's own are, too.
    """

    def __init__(
        self,
        cache: Path,
        compiler: Compiler,
        compiles: int,
        *,
        in_use: Callable[[], Iterable[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = cache
        self._compiler = compiler
        self._in_use = in_use
        self._clock = clock
        self._gate = asyncio.Semaphore(compiles)
        self._turns: dict[str, asyncio.Lock] = {}
        self._known: OrderedDict[str, Compiled] = OrderedDict()
        self._builtin: set[str] = set()
        self._marked: dict[str, float] = {}
        self._making: dict[str, _Job] = {}

    def known(self, sha256: str) -> Compiled | None:
        """The compiled module, if it is at hand and still on disk; then it counts as used."""
        compiled = self._known.get(sha256)
        if compiled is None or not compiled.artifact.exists():
            return None
        self._known.move_to_end(sha256)
        self._mark(compiled)
        return compiled

    def forget(self, sha256: str, artifact_sha256: str) -> None:
        """An artifact is not what was compiled: check it and make it anew when it is next asked for.

        One that has been made anew since (it has another hash) stays.
        """
        compiled = self._known.get(sha256)
        if compiled is not None and compiled.artifact_sha256 == artifact_sha256:
            self._drop(sha256)

    async def make(self, sha256: str, wasm: Path, tenant: str, *, builtin: bool = False) -> Compiled:
        """Check and compile ``wasm``, whose hash is ``sha256``, in the turn of ``tenant`` or of another that asks.

        The caller may remove ``wasm`` at any time. ``builtin`` says that it is the host's own, which stays.
        What nobody waits for any more is given up, unless it has begun.

        Raises:
            RealmError: ``module_*`` or ``compile_limit``.
            OSError: the file is gone, or cannot be linked to.
        """
        job = self._making.get(sha256)
        if job is None:
            job = _Job(sha256, wasm if builtin else _second_name(wasm), builtin)
            self._making[sha256] = job
        if job.maker is None and tenant not in job.turns:
            turn = asyncio.create_task(self._turn(job, tenant), name=f"compile {sha256[:12]}")
            job.turns[tenant] = turn
            turn.add_done_callback(lambda done: self._turn_over(job, done))
        job.askers[tenant] += 1
        try:
            # One caller that leaves must not take the result from the others.
            return await asyncio.shield(job.result)
        finally:
            job.askers[tenant] -= 1
            if not job.askers[tenant] and job.maker is None and tenant in job.turns:
                # Others go on waiting, in their own turns.
                job.turns.pop(tenant).cancel()
                if not job.turns:
                    self._end(job)

    async def close(self) -> None:
        """Stop compiling."""
        tasks: list[asyncio.Task[Compiled]] = []
        for job in list(self._making.values()):
            tasks += job.turns.values()
            if job.maker is not None:
                tasks.append(job.maker)
            else:
                self._end(job)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _turn(self, job: _Job, tenant: str) -> Compiled:
        async with self._turns.setdefault(tenant, asyncio.Lock()), self._gate:
            # Two turns may come in the same round of the loop.
            if job.maker is not None or job.turns.get(tenant) is not asyncio.current_task():
                raise asyncio.CancelledError
            job.maker = job.turns.pop(tenant)
            for turn in job.turns.values():
                turn.cancel()
            job.turns.clear()
            for sha256 in {*self._builtin, *self._in_use()}:
                used = self._known.get(sha256)
                if used is not None:
                    self._mark(used)
            try:
                compiled = await self._compiler(job.file, self._cache)
            finally:
                job.drop_file()
        if compiled.sha256 != job.sha256:
            raise RealmError("internal", f"the compiler read {compiled.sha256} where {job.sha256} was meant")
        return compiled

    def _turn_over(self, job: _Job, turn: asyncio.Task[Compiled]) -> None:
        error = None if turn.cancelled() else turn.exception()
        if turn is not job.maker:
            return
        if not turn.cancelled() and not job.result.done():
            if error is None:
                self._remember(job, turn.result())
                job.result.set_result(turn.result())
            else:
                job.result.set_exception(error)
                # Looked at here, so that a failure whose callers have all left is not reported as forgotten.
                job.result.exception()
        self._end(job)

    def _end(self, job: _Job) -> None:
        """Nobody makes it any more; callers that are left without a result are cancelled."""
        if self._making.get(job.sha256) is job:
            del self._making[job.sha256]
        job.result.cancel()
        job.drop_file()

    def _remember(self, job: _Job, compiled: Compiled) -> None:
        self._known[job.sha256] = compiled
        if job.builtin:
            self._builtin.add(job.sha256)
        while len(self._known) > _KNOWN:
            self._drop(next(iter(self._known)))

    def _drop(self, sha256: str) -> None:
        del self._known[sha256]
        self._marked.pop(sha256, None)
        self._builtin.discard(sha256)

    def _mark(self, compiled: Compiled) -> None:
        """Tell the cache that an artifact is in use; see :meth:`realm.guests.artifact_cache.ArtifactCache.sweep`."""
        now = self._clock()
        last = self._marked.get(compiled.sha256)
        if last is None or now - last >= _MARK_SECONDS:
            self._marked[compiled.sha256] = now
            # The file system's own clock has steps of milliseconds; two uses within one would look alike.
            at = time.time_ns()
            # One that is gone is made anew when it is next asked for.
            with contextlib.suppress(OSError):
                os.utime(compiled.artifact, ns=(at, at), follow_symlinks=False)


def _second_name(file: Path) -> Path:
    name = file.with_name(f"{file.name}.compile")
    name.hardlink_to(file)
    return name
