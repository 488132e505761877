"""One child process of the host, for :mod:`realm.supervisor`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping

log = logging.getLogger("realm.serve")

ENVIRONMENT = (
    "PATH",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
"""What children inherit: nothing in it is secret."""


class Child:
    """One child process whose output goes to stderr, line by line, with its name in front.

    ``began`` is when it took up its work (:func:`time.monotonic`).
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.began = time.monotonic()
        self._process = process
        self._output = asyncio.create_task(self._forward(), name=f"output of {name}")

    @classmethod
    async def spawn(
        cls,
        name: str,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        waits: bool = False,
    ) -> Child:
        """Start ``python -m module arguments``.

        Args:
            environment: defaults for environment variables.
            waits: it waits for :meth:`go` before it takes up its work.
        """
        defaults = environment or {}
        inherited = {name: os.environ[name] for name in (*ENVIRONMENT, *defaults) if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # Keeps the current folder off the path: what lies there is no part of the host.
            "-P",
            "-m",
            module,
            *arguments,
            stdin=asyncio.subprocess.PIPE if waits else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**defaults, **inherited},
            # A Ctrl-C in the terminal is for the supervisor, which ends the children in order.
            start_new_session=True,
        )
        log.info("%s is process %d", name, process.pid)
        return cls(name, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def go(self) -> None:
        """Let a child that waits take up its work."""
        stdin = self._process.stdin
        assert stdin is not None
        self.began = time.monotonic()
        # One that has died meanwhile is noticed by whoever waits for its end.
        stdin.write(b"go\n")

    async def wait(self) -> int:
        """The exit status, after all output has been passed on."""
        status = await self._process.wait()
        # A waiter that is cancelled must not take the output with it.
        await asyncio.shield(self._output)
        return status

    def terminate(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def end(self, seconds: float) -> None:
        """Wait for its end, and kill it after ``seconds``."""
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            log.warning("%s does not end; killing it", self.name)
            self.kill()
            await self._process.wait()
        await asyncio.wait([self._output], timeout=1.0)

    async def _forward(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        while True:
            try:
                line = await stream.readline()
            except ValueError:
                # A line longer than the reader's limit; what came of it is dropped with it.
                line = b"(a very long line was left out)\n"
            if not line:
                return
            sys.stderr.write(f"{self.name}: {line.decode(errors='replace').rstrip()}\n")
            sys.stderr.flush()


def how_it_ended(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name if -status in {*signal.Signals} else f"signal {-status}"
    if -status == signal.SIGSYS:
        return f"was ended by {name}: it made a system call that its sandbox forbids"
    return f"was ended by {name}"
