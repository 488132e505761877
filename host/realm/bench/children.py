"""The processes that a benchmark starts, and what they say when one of them fails."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from realm.child import ENVIRONMENT
from realm.errors import RealmError

END_SECONDS = 20.0
"""How long processes may take to end by themselves. With traces they have something to write."""

_LAST_LINES = 30


class Children:
    """Processes started as :class:`realm.child.Child` starts them; a context manager that ends them all."""

    def __init__(self, *, quiet: bool) -> None:
        """``quiet``: keep what they log for the case that one fails."""
        self._quiet = quiet
        # Closed when all have ended: their last words may be what an error says.
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.end(0.0 if kind else END_SECONDS)
        self._log.close()

    def spawn(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        variables: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Start ``python -m module arguments``.

        Args:
            environment: defaults for environment variables. variables: what they are, whatever is inherited.
            talks: its standard input and output are pipes.
        """
        defaults = environment or {}
        inherited = {name: os.environ[name] for name in (*ENVIRONMENT, *defaults) if name in os.environ}
        log = self._log if self._quiet else sys.stderr
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else log,
            stderr=log,
            env={**defaults, **inherited, **(variables or {})},
            # A Ctrl-C in the terminal is for this process, which ends the others.
            start_new_session=True,
        )
        self._running.append(child)
        return child

    def check(self) -> None:
        """Raises RealmError ``bench_failed`` if any has ended."""
        for child in self._running:
            if child.poll() is not None:
                raise self.failure(f"process {child.pid} ended with status {child.returncode}")

    def failure(self, text: str) -> RealmError:
        """An error with the last lines that the processes have logged."""
        if self._quiet:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
            text = "\n  ".join([f"{text}; the last lines of the log:" if lines else text, *lines])
        return RealmError("bench_failed", text)

    def end(self, patience: float) -> None:
        """Wait for their end, and kill them after ``patience`` seconds."""
        deadline = time.monotonic() + patience
        for child in self._running:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.terminate()
        for child in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5.0)
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
        self._running.clear()


def thread_seconds(pid: int, thread: int) -> float:
    """Processor time of one thread. Raises OSError when it is gone."""
    task = Path(f"/proc/{pid}/task/{thread}")
    try:
        return int((task / "schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        # Some kernels count in ticks only.
        fields = (task / "stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """Processor time of the threads that a process has now. Raises OSError when it is gone."""
    return sum(thread_seconds(pid, int(task.name)) for task in Path(f"/proc/{pid}/task").iterdir())


def children_of(pid: int) -> dict[int, str]:
    """Command lines of a process's children, by their ids."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return found
