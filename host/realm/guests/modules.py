"""Loaded modules: read once, compared with their hash, kept for their next run.

A worker trusts native code only by the hash that came with the order to run it: the very bytes that
were hashed are the ones that are loaded, so a file that is damaged or swapped at any moment never runs.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

from realm.errors import RealmError
from realm.guests.fiber_types import EngineFailure
from realm.guests.fibers import Code, LinkedModule
from realm.guests.hostcalls import HostLinkers

MODULES_KEPT = 64
KEPT_BYTES = 1 << 30
"""How many loaded modules, and how much native code, are kept for their next run."""
INLINE_BYTES = 512 << 10
"""Larger artifacts are loaded by the helper thread: reading and hashing a MiB takes about 2 ms."""
MAX_ARTIFACT = 1 << 30

Key = tuple[str, str]
"""Path and hash of an artifact."""


def _damaged(key: Key, found: str, problem: str) -> RealmError:
    path, expected = key
    return RealmError(
        "artifact_damaged",
        f"the compiled module {problem}; it is not run and has to be compiled again",
        details={"artifact": Path(path).name, "expected": expected, "found": found},
    )


def read_artifact(key: Key) -> bytes:
    """The artifact's content, which has the hash.

    Raises:
        RealmError: ``artifact_damaged`` if it is not there, or not what it was.
    """
    path, expected = key
    if not expected:
        raise _damaged(key, "", "came without its hash")
    try:
        with Path(path).open("rb") as file:
            # The size first: room for what is read counts against the worker's memory.
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= MAX_ARTIFACT else b""
    except OSError as error:
        raise _damaged(key, "", f"cannot be read ({error.strerror})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise _damaged(key, found, "is not the one that was compiled")
    return data


def load_code(linkers: HostLinkers, key: Key) -> tuple[Code, int]:
    """Read, check and map an artifact; the second is its size. Any thread may do it.

    Raises:
        RealmError: ``artifact_damaged``, also if Wasmtime does not take it.
    """
    data = read_artifact(key)
    try:
        return Code(linkers.engine, data), len(data)
    except EngineFailure as error:
        raise _damaged(key, key[1], "is of another version or setting of the runtime") from error


class Modules:
    """The modules of one worker that are ready to be started."""

    def __init__(self, linkers: HostLinkers) -> None:
        self.linkers = linkers
        self._kept: OrderedDict[Key, tuple[LinkedModule, int]] = OrderedDict()
        self._bytes = 0

    def find(self, key: Key) -> LinkedModule | None:
        """The module, if it is loaded."""
        entry = self._kept.get(key)
        if entry is None:
            return None
        self._kept.move_to_end(key)
        return entry[0]

    def is_small(self, key: Key) -> bool:
        """Whether loading it is quick enough for the worker's own thread."""
        try:
            return Path(key[0]).stat().st_size <= INLINE_BYTES
        except OSError:
            return True

    def add(self, key: Key, code: Code, size: int) -> LinkedModule:
        """Link a module and keep it; the code is closed.

        Raises:
            EngineFailure: its imports are not ours.
        """
        try:
            module = self.linkers.link(code)
        finally:
            code.close()
        old = self._kept.pop(key, None)
        if old is not None:
            self._drop(*old)
        self._kept[key] = (module, size)
        self._bytes += size
        while len(self._kept) > MODULES_KEPT or (self._bytes > KEPT_BYTES and len(self._kept) > 1):
            self._drop(*self._kept.popitem(last=False)[1])
        return module

    def _drop(self, module: LinkedModule, size: int) -> None:
        self._bytes -= size
        module.close()

    def close(self) -> None:
        while self._kept:
            self._drop(*self._kept.popitem()[1])
