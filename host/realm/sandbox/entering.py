"""Containing the calling process, in layers that do not depend on each other.

1. Resource limits and attributes of the process (:func:`limit`): every Linux has them.
2. Landlock: which files can be read. No file can be written, whatever the user may do.
3. seccomp: which system calls there are.

A platform without 2 or 3 is no error, because the guests' own sandbox is WebAssembly: these layers are
for the day when that has a hole. What is missing is reported, and ``realm doctor`` shows it.

The gateway and the engine are not contained: neither runs a tenant's code.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from realm.errors import RealmError
from realm.sandbox import kernel
from realm.sandbox.filter import ARCHES, assemble, build
from realm.sandbox.kernel import KernelRefused, Lacking
from realm.sandbox.profiles import Profile

MEMORY_BYTES = 4 << 30
"""Private memory of one guest worker that can be written, in bytes: of all its guests and itself."""
NICENESS = 10
"""Weighs about a tenth of what does not give way."""
_FILES = 4096
"""Open files. Wasmtime keeps one for every loaded module."""


@dataclass(frozen=True)
class Containment:
    """What is in force.

    Attributes:
        seccomp: system calls are filtered.
        landlock: ABI of the Landlock that is in force, 0 for none.
        lacking: what is not in force, each with the reason.
    """

    seccomp: bool = False
    landlock: int = 0
    lacking: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = (["seccomp"] if self.seccomp else []) + ([f"Landlock ABI {self.landlock}"] if self.landlock else [])
        return ", ".join(parts) or "resource limits only"


def give_way() -> None:
    """Let everything else of the host run first where processors are short: for what can wait, as compiling can.

    Not for guest workers, though a guest that spins at full rate on one of two processors makes a token take
    42 to 52 ms instead of 15, and 19 to 21 with this: a flood of calls, which keeps the gateway busy, would
    then starve all guests. ``fuel_per_second`` bounds what spinning takes. Call it before :func:`limit`.
    """
    os.nice(NICENESS)
    # Each child has a session of its own, and where the kernel groups sessions, niceness counts only within
    # one: it is the group's that counts between them.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def limit(memory_bytes: int) -> None:
    """Set limits that no later code can raise, close what was inherited, and end with the parent.

    Call it before anything is opened. A guest's memory that would go over ``memory_bytes`` cannot
    grow; address space alone is not counted.

    Raises:
        RealmError: ``sandbox_failed``.
    """
    try:
        kernel.close_from(3)
        kernel.set_parent_death_signal(signal.SIGKILL)
        kernel.set_not_dumpable()
        for kind, most in (
            (resource.RLIMIT_DATA, memory_bytes),
            (resource.RLIMIT_NOFILE, _FILES),
            (resource.RLIMIT_CORE, 0),
        ):
            _, hard = resource.getrlimit(kind)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    except Lacking:
        # Not Linux; what that lacks is said by enter().
        pass
    except (KernelRefused, OSError, ValueError) as error:
        raise _failed(error) from error


def enter(profile: Profile, *, reads: Iterable[Path] = ()) -> Containment:
    """Contain this process from now on, for good.

    Python goes on working: imports, tracebacks, threads, signals, clocks. Files can be read below
    ``reads`` and the folders of ``sys.path`` only.

    Raises:
        RealmError: ``sandbox_failed`` if a mechanism that this platform has does not take what we ask.
    """
    seccomp, landlock = False, 0
    lacking: list[str] = []
    try:
        try:
            kernel.set_no_new_privileges()
            landlock = _restrict_files(reads)
        except Lacking as error:
            lacking.append(str(error))
        try:
            kernel.seccomp_number()
            kernel.install_filter(assemble(build(profile.rules(os.getpid()), ARCHES[platform.machine()])))
            seccomp = True
        except Lacking as error:
            lacking.append(str(error))
    except (KernelRefused, OSError, ValueError) as error:
        raise _failed(error) from error
    return Containment(seccomp, landlock, tuple(lacking))


def _restrict_files(reads: Iterable[Path]) -> int:
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        # Landlock binds the calling thread and those it starts: another one would be a way out.
        raise Lacking("landlock", "the process had other threads already")
    folders = (Path(entry) for entry in sys.path if entry)
    return kernel.restrict_files({path for path in (*folders, *reads) if path.exists()})


def _failed(error: Exception) -> RealmError:
    text = f"the process cannot be contained: {error}; please report this, with what `realm doctor` says"
    return RealmError("sandbox_failed", text)
