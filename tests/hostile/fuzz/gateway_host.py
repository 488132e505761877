"""A gateway that lasts for many examples, and clients that keep account of what they are owed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State

from realm.run_messages import ErrorInfo, Output, RunFinished, StartRun, StoreGet, StoreSet, Usage
from realm.settings import GatewayLimits
from tests.fake_host import FakeHost, FakeWorker, fake_host
from tests.hostile.fuzz.problems import Problem

T = TypeVar("T")

LIMITS = GatewayLimits(frame_bytes=64 << 10, chunk_bytes=4 << 10, calls=12, credit_bytes=4 << 10)
DEFAULTS = {"requests_per_minute": 1 << 40}
"""The rate of calls has tests of its own; here it would only be in the way."""
CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1013})
PATIENCE = 20.0
"""Seconds for an answer; only something that never comes takes that long."""
ATTACKER, GOOD = "127.0.0.2", "127.0.0.1"
"""A gateway that turns an address away must not turn away its neighbour."""


def script(worker: FakeWorker, start: StartRun) -> None:
    """A worker whose guests do what their input says, and some things that are nobody's promise."""
    data = start.input
    if b"hang" in data:
        return
    if b"fail" in data:
        error = ErrorInfo("guest_trap", "it trapped", {"trap": "unreachable"})
        worker.finish(start.run, outcome="error", error=error)
    elif b"flood" in data:
        pieces = [Output(start.run, b"\xc3" if n % 7 == 0 else b"x" * 100, n) for n in range(60)]
        worker.say(*pieces, RunFinished(start.run, "complete", 0, None, Usage(new_tokens=60)))
    elif b"store" in data:
        worker.say(
            StoreSet(start.run * 2, start.run, "key", data[:64]),
            StoreGet(start.run * 2 + 1, start.run, "key"),
            RunFinished(start.run, "complete", 0, None, Usage()),
        )
    elif b"late" in data:
        worker.finish(start.run)
        worker.say(Output(start.run, b"after the end", 1))
        worker.finish(start.run)
    else:
        # Whatever it is: a guest never fails the worker.
        worker.say(Output(start.run, data, 1), RunFinished(start.run, "complete", 0, None, Usage(new_tokens=1)))


class Loop:
    """A host that lasts for many examples, in an event loop that runs while a rule does."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory(prefix="realm-fuzz-")
        self.stack = contextlib.AsyncExitStack()
        home = Path(self.folder.name) / "home"
        home.mkdir(mode=0o700)
        self.host: FakeHost = self.runner.run(
            self.stack.enter_async_context(fake_host(home, script=script, limits=LIMITS, defaults=DEFAULTS, workers=2))
        )
        self.runner.run(self._prepare())
        self.tasks = len(self.runner.run(tasks()))
        self.frames = 0

    async def _prepare(self) -> None:
        for tenant in ("alice", "bob"):
            async with self.host.client(tenant) as client:
                await client.push("echo")
                await client.data("generate", prompt="warm up")

    def run(self, work: Awaitable[T]) -> T:
        async def limited() -> T:
            async with asyncio.timeout(PATIENCE):
                return await work

        return self.runner.run(limited())

    def close(self) -> None:
        try:
            self.runner.run(self.stack.aclose())
        finally:
            self.runner.close()
            self.folder.cleanup()


async def tasks() -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


@dataclass
class Client:
    """One connection, and what is owed to it.

    Attributes:
        open: it has proved who it is, so each text frame is owed one last answer.
        spoilt: it has sent what is no WebSocket frame: the answer is a close code.
        sent: frames that call for an answer, by id (None where the gateway cannot know it).
    """

    socket: ClientConnection
    tenant: str
    open: bool = False
    spoilt: bool = False
    sent: Counter[str] = field(default_factory=Counter)
    got: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    acks: int = 0
    next_seq: dict[str, int] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    uploads: list[int] = field(default_factory=list)
    close_code: int | None = None
    ended: bool = False

    async def send(self, data: str | bytes) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send(data)

    async def read(self, patience: float) -> bool:
        """Take one message in; False when none came in time or the connection is at its end."""
        try:
            raw = await asyncio.wait_for(self.socket.recv(), patience)
        except (TimeoutError, ConnectionClosed):
            # A host that has closed waits for a hostile client's own close; we need not.
            closed = self.socket.protocol.close_rcvd
            self.ended = closed is not None or self.socket.state is State.CLOSED
            self.close_code = None if closed is None else closed.code
            return False
        self._take(json.loads(raw))
        return True

    async def end(self) -> None:
        """Wait for the host's close."""
        while not self.ended:
            await self.read(0.01)

    def _take(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind in ("upload_ack", "upload_error"):
            self.acks += 1
            return
        if kind is not None or message.get("status") == "connected":
            self.open = self.open or kind is None
            return
        key = json.dumps(message["id"])
        status = message["status"]
        if status == "streaming":
            expected = self.next_seq.get(key, 0)
            if message["seq"] != expected:
                raise Problem(f"stream of {key}: {message['seq']} came, {expected} is next")
            self.next_seq[key] = expected + 1
        elif status in ("complete", "error", "cancelled"):
            self.got[key] += 1
            error = message.get("error")
            if (status == "error") != (error is not None):
                raise Problem(f"no proper answer: {message}")
            if error is not None:
                if error["code"] == "internal":
                    raise Problem(f"internal: {message}")
                # These may bear the id of a call that goes on.
                if error["code"] not in ("duplicate_id", "malformed_message"):
                    self.next_seq.pop(key, None)
            else:
                self.next_seq.pop(key, None)
        else:
            raise Problem(f"no such status: {message}")
        data = message.get("data")
        if isinstance(data, dict):
            if isinstance(data.get("run"), str):
                self.runs.append(data["run"])
            if isinstance(data.get("upload"), int):
                self.uploads.append(data["upload"])

    @property
    def settled(self) -> bool:
        return self.ended or (self.got.total() >= self.sent.total() and self.acks >= self.chunks)
