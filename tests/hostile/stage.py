"""The stack that is attacked, a neighbour that must not notice, and what must be gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from realm_sdk import Client, RealmError
from tests.e2e.conftest import start_serve, stop_serve

PROMPT = "Tell me about the marmalade-lighthouse at Ultima Thule."
"""What the neighbour asks; no other text of these tests has its words, so that they can be looked for."""
NEW_TOKENS = 32
QUIET_SECONDS = 30.0
TIGHT: dict[str, int] = {
    "fuel_per_run": 600_000_000,
    "fuel_per_second": 20_000_000_000,
    "seconds_per_run": 60,
    "seconds_to_first_call": 20,
    "memory_bytes": 4 << 20,
    "table_elements": 1000,
    "running_guests": 64,
    "waiting_guests": 64,
    "kv_pages": 256,
    "tokens_per_run": 5000,
    "sequences_per_run": 64,
    "saved_sequences": 4,
    "output_bytes_per_run": 256 << 10,
    "log_bytes_per_run": 16 << 10,
    "store_bytes": 8192,
    "stored_modules": 400,
}
"""Limits of a tenant that attacks, unless an attack asks for others."""


class _Nothing(msgspec.Struct):
    pass


@dataclass
class Stage:
    """A running ``realm serve`` and its tenants.

    Attributes:
        log: what the server writes to its standard error.
        keys: of every tenant made so far.
        reference: the neighbour's pieces of text, one a token, when it was alone.
        processes: of the engine and the workers, by process id.
        savers: tenants that have saved sequences, which outlive their runs.
    """

    url: str
    admin_key: str
    home: Path
    log: Path
    pid: int
    keys: dict[str, str] = field(default_factory=dict)
    reference: list[str] = field(default_factory=list)
    processes: dict[int, str] = field(default_factory=dict)
    savers: set[str] = field(default_factory=set)

    def admin(self) -> Client:
        return Client(self.url, self.admin_key)

    def client(self, tenant: str) -> Client:
        return Client(self.url, self.keys[tenant])

    async def add_tenant(self, name: str, limits: dict[str, int] | None = None) -> None:
        """Make a tenant, with the tight limits changed by ``limits``; None leaves it the host's."""
        if name in self.keys:
            return
        async with self.admin() as admin:
            await admin.add_tenant(name)
            self.keys[name] = (await admin.add_key(name)).key
            if limits is not None:
                await admin.call("tenants.set", {"name": name, "limits": TIGHT | limits}, _Nothing)

    def children(self) -> dict[int, str]:
        """The engine and the workers that are alive; what compiles comes and goes, and is left out."""
        found = {}
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                for role in ("realm.guests.worker", "realm.engine"):
                    if role in command:
                        found[process.pid] = role
        return found

    async def engine(self) -> dict[str, Any]:
        async with self.admin() as admin:
            engine = (await admin.health()).engine
        assert engine["available"], "the engine is gone"
        return engine


@contextlib.contextmanager
def staged(home: Path, *arguments: str) -> Iterator[Stage]:
    """Start the stack in float32, because in bf16 another batch may give other tokens; end it and check its end."""
    log = home.parent / "serve.log"
    process, ready = start_serve(home, log, "--dtype", "float32", *arguments)
    try:
        assert ready.admin_key is not None
        stage = Stage(ready.url, ready.admin_key, home, log, process.pid)
        asyncio.run(_rehearse(stage))
        yield stage
        status = stop_serve(process)
        assert status == 0, f"realm serve ended with {status}:\n{log.read_text()[-4000:]}"
    finally:
        stop_serve(process)


async def _rehearse(stage: Stage) -> None:
    await stage.add_tenant("canary")
    async with stage.client("canary") as client:
        for _ in range(2):
            # The second has its prompt from the prefix cache: the text must be the same.
            stage.reference, before = await sing(client), stage.reference
            assert before in ([], stage.reference)
    assert len(stage.reference) > NEW_TOKENS // 2
    stage.processes = stage.children()
    assert len(set(stage.processes.values())) == 2


async def sing(client: Client) -> list[str]:
    """The neighbour's generation once: greedy, piece by piece."""
    return [piece.text async for piece in client.stream(PROMPT, max_tokens=NEW_TOKENS, temperature=0)]


@dataclass
class Song:
    """What a neighbour has generated while it was being disturbed.

    Attributes:
        takes: the pieces of each generation. error: what ended it.
    """

    takes: list[list[str]] = field(default_factory=list)
    error: RealmError | None = None

    def check(self, stage: Stage) -> None:
        """It was heard at least once, and every time as if it were alone."""
        assert self.error is None, f"the neighbour's generation failed: {self.error}"
        assert self.takes
        for take in self.takes:
            assert take == stage.reference, "the neighbour's text is not what it is alone"


@contextlib.asynccontextmanager
async def singing(stage: Stage) -> AsyncIterator[Song]:
    """The neighbour generates, again and again, until the context ends; the first token is there when it begins."""
    song = Song()
    begun = asyncio.Event()
    over = False

    async def perform() -> None:
        try:
            async with stage.client("canary") as client:
                while not over:
                    take: list[str] = []
                    async for piece in client.stream(PROMPT, max_tokens=NEW_TOKENS, temperature=0):
                        take.append(piece.text)
                        begun.set()
                    song.takes.append(take)
        except RealmError as error:
            song.error = error
        finally:
            begun.set()

    task = asyncio.create_task(perform())
    try:
        await begun.wait()
        yield song
    finally:
        over = True
        await task


async def until_quiet(stage: Stage) -> dict[str, Any]:
    """Wait until nothing is left of any run but saved sequences; the engine's counters then."""
    savers = stage.savers
    deadline = time.monotonic() + QUIET_SECONDS
    async with stage.admin() as admin:
        while True:
            runs = (await admin.ps()).runs
            engine = (await admin.health()).engine
            held = {name: used for name, used in engine["tenants"].items() if used["pages"] or used["sequences"]}
            saved = sum(used["pages"] for name, used in held.items() if name in savers)
            if not runs and held.keys() <= savers and engine["pages_used"] <= saved:
                break
            assert time.monotonic() < deadline, f"something is left: runs {runs}, tenants {held}, engine {engine}"
            await asyncio.sleep(0.02)
    assert engine["pages_free"] + engine["pages_used"] + engine["pages_cached"] == engine["pages_total"]
    there, stage.processes = stage.processes, stage.children()
    assert stage.processes == there, "a process of the host was replaced"
    assert psutil.pid_exists(stage.pid)
    return engine
