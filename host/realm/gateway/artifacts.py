"""Compiled modules by the hash of their source: found, or made once however many ask."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
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


class Artifacts:
    """The compiled modules of one host.

    ``compiles`` bounds how many are compiled at a time. A tenant has one turn at a time, so however many
    of its modules wait, another tenant's is behind one of them only.
    """

    def __init__(self, cache: Path, compiler: Compiler, compiles: int) -> None:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = cache
        self._compiler = compiler
        self._gate = asyncio.Semaphore(compiles)
        self._turns: dict[str, asyncio.Lock] = {}
        self._known: OrderedDict[str, Compiled] = OrderedDict()
        self._making: dict[str, asyncio.Task[Compiled]] = {}

    def known(self, sha256: str) -> Compiled | None:
        """The compiled module, if it is at hand and still on disk."""
        compiled = self._known.get(sha256)
        if compiled is None or not compiled.artifact.exists():
            return None
        self._known.move_to_end(sha256)
        return compiled

    def forget(self, sha256: str, artifact_sha256: str) -> None:
        """An artifact is not what was compiled: check it and make it anew when it is next asked for.

        One that has been made anew since (it has another hash) stays.
        """
        compiled = self._known.get(sha256)
        if compiled is not None and compiled.artifact_sha256 == artifact_sha256:
            del self._known[sha256]

    async def make(self, sha256: str, wasm: Path, tenant: str) -> Compiled:
        """Check and compile ``wasm``, whose hash is ``sha256``, in the turn of ``tenant``.

        Raises:
            RealmError: ``module_*`` or ``compile_limit``.
        """
        task = self._making.get(sha256)
        if task is None:
            task = asyncio.create_task(self._make(sha256, wasm, tenant), name=f"compile {sha256[:12]}")
            self._making[sha256] = task
            task.add_done_callback(lambda done: self._made(sha256, done))
        # One caller that leaves must not take the result from the others.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Stop compiling."""
        tasks = list(self._making.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, sha256: str, wasm: Path, tenant: str) -> Compiled:
        async with self._turns.setdefault(tenant, asyncio.Lock()), self._gate:
            compiled = await self._compiler(wasm, self._cache)
        if compiled.sha256 != sha256:
            raise RealmError("internal", f"the compiler read {compiled.sha256} where {sha256} was meant")
        self._known[sha256] = compiled
        while len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return compiled

    def _made(self, sha256: str, task: asyncio.Task[Compiled]) -> None:
        del self._making[sha256]
        if not task.cancelled():
            # Looked at here, so that a failure whose callers have all left is not reported as forgotten.
            task.exception()
