"""Compiled modules by the hash of their source: found, or made once however many ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from realm.errors import RealmError


class Compiled(Protocol):
    """What the compiler gives."""

    @property
    def artifact(self) -> Path: ...

    @property
    def sha256(self) -> str: ...

    @property
    def imports(self) -> Sequence[str]: ...


Compiler = Callable[[Path, Path], Awaitable[Compiled]]
"""From a module and the cache's folder to a compiled module; raises RealmError ``module_*``."""


class Artifacts:
    """The compiled modules of one host. ``compiles`` bounds how many are compiled at a time."""

    def __init__(self, cache: Path, compiler: Compiler, compiles: int) -> None:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = cache
        self._compiler = compiler
        self._gate = asyncio.Semaphore(compiles)
        self._known: dict[str, Compiled] = {}
        self._making: dict[str, asyncio.Task[Compiled]] = {}

    def known(self, sha256: str) -> Path | None:
        """The artifact, if it is at hand and still on disk."""
        compiled = self._known.get(sha256)
        return compiled.artifact if compiled is not None and compiled.artifact.exists() else None

    async def make(self, sha256: str, wasm: Path) -> Compiled:
        """Check and compile ``wasm``, whose hash is ``sha256``.

        Raises:
            RealmError: ``module_*`` or ``compile_limit``.
        """
        task = self._making.get(sha256)
        if task is None:
            task = asyncio.create_task(self._make(sha256, wasm), name=f"compile {sha256[:12]}")
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

    async def _make(self, sha256: str, wasm: Path) -> Compiled:
        async with self._gate:
            compiled = await self._compiler(wasm, self._cache)
        if compiled.sha256 != sha256:
            raise RealmError("internal", f"the compiler read {compiled.sha256} where {sha256} was meant")
        self._known[sha256] = compiled
        return compiled

    def _made(self, sha256: str, task: asyncio.Task[Compiled]) -> None:
        del self._making[sha256]
        if not task.cancelled():
            # Looked at here, so that a failure whose callers have all left is not reported as forgotten.
            task.exception()
