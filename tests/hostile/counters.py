"""The whole host with real processes, scripts of what its clients do, and everything that can be counted.

The gateway is in this process and looked at directly; engine and workers are processes of their own,
seen through their counters and through ``/proc``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import psutil
import wasmtime
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from realm.engine.options import EngineOptions
from realm.gateway.gateway import Gateway
from realm.models.importer import import_model
from realm.serve import running
from realm.settings import GatewayLimits, ServeSettings
from tests.hostile.fuzz import arguments
from tests.hostile.fuzz.neighbourhood import LIMIT_ERRORS, OTHER_ERRORS
from tests.hostile.fuzz.problems import Problem
from tests.model_files import write_folder
from tests.wat import GENERATE, RECEIVE, SPIN, guest

PATIENCE = 60.0
"""Seconds for everything to come to rest; only what never does takes that long."""
WORKERS = 2
MAPPINGS_SLACK = 64
"""Mappings that come and go with the allocator and the libraries; one fiber has about five."""
TENANTS = ("acme", "globex")
LIMITS = {
    "fuel_per_run": 300_000_000,
    "seconds_per_run": 20,
    "seconds_to_first_call": 10,
    "memory_bytes": 4 << 20,
    "running_guests": 6,
    "waiting_guests": 6,
    "tokens_per_run": 60,
    "sequences_per_run": 8,
    "output_bytes_per_run": 128 << 10,
    "uploads": 3,
    "connections": 8,
    "requests_per_minute": 1_000_000,
    "tokens_per_minute": 10_000_000,
    "kv_pages": 40,
    "stored_modules": 40,
}

_FORK = """
    (local.set $a (call $seq_new))
    (i32.store (i32.const 512) (i32.const 5))
    (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0)))
    (loop $l (local.set $c (call $seq_fork (local.get $a)))
      (if (i32.gt_s (local.get $c) (i32.const 0))
        (then (drop (call $forward (local.get $c) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0)))))
      (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 20))))"""
MODULES = {
    "tokens": GENERATE,
    "spin": SPIN,
    "receive": RECEIVE,
    "trap": guest(f"{_FORK} unreachable", "seq_new", "seq_fork", "forward"),
    "forks": guest(
        f"{_FORK} (call $recv (i32.const 0) (i32.const 9) (i32.const 60000))", "seq_new", "seq_fork", "forward", "recv"
    ),
    "limit": guest(
        """(local.set $a (call $seq_new))
        (loop $l (br_if $l (i32.ge_s (local.tee $c
          (call $forward (local.get $a) (i32.const 512) (i32.const 8) (i32.const 0) (i32.const 0))) (i32.const 0))))
        (local.get $c)""",
        "seq_new",
        "forward",
    ),
    "flood": guest(
        """(memory.fill (i32.const 0) (i32.const 97) (i32.const 4096))
        (loop $l (br_if $l (i32.eqz (local.tee $c (call $emit (i32.const 0) (i32.const 4096)))))) (local.get $c)""",
        "emit",
    ),
    "grow": guest("(loop $l (drop (memory.grow (i32.const 7))) (br $l)) (i32.const 0)"),
    "calls": arguments.TEXT_CALLER,
}
BROKEN = "(module)"
ERRORS = LIMIT_ERRORS | OTHER_ERRORS | {"worker_lost"}


@dataclass
class Client:
    """A connection that mostly does not read: so its guests wait for it, and are there when it goes."""

    tenant: str
    socket: ClientConnection
    calls: int = 0
    runs: list[str] = field(default_factory=list)

    async def send(self, function: str, **params: Any) -> int:
        self.calls += 1
        await self.frame(json.dumps({"id": self.calls, "function": function, "params": params}))
        return self.calls

    async def frame(self, data: str | bytes) -> None:
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send(data)

    async def read(self, patience: float) -> dict[str, Any] | None:
        try:
            message = dict(json.loads(await asyncio.wait_for(self.socket.recv(), patience)))
        except (TimeoutError, ConnectionClosed):
            return None
        data = message.get("data")
        if isinstance(data, dict) and isinstance(data.get("run"), str):
            self.runs.append(data["run"])
        return message

    async def ask(self, function: str, **params: Any) -> dict[str, Any]:
        """A call, and its last answer; what else comes is dropped."""
        number = await self.send(function, **params)
        while (message := await self.read(PATIENCE)) is not None:
            if message.get("id") == number and message["status"] != "streaming":
                return message
        raise Problem(f"{function} is not answered")


class WholeHost:
    """``realm serve`` in this process, on a tiny random model, with two tenants."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory(prefix="realm-counters-")
        self.stack = contextlib.AsyncExitStack()
        self.keys: dict[str, str] = {}
        self.wasm = {name: bytes(wasmtime.wat2wasm(text)) for name, text in MODULES.items()}
        self.most: dict[str, int] = {}
        self.ends: Counter[str] = Counter()
        self.last_run = 0
        self.runner.run(self._start())
        self.baseline: dict[str, Any] = {}
        for _ in range(2):
            # What is loaded at first use is loaded now, in every worker.
            self.play(everything(), check=False)
        self.baseline = self.runner.run(self._at_rest())

    async def _start(self) -> None:
        root = Path(self.folder.name)
        self.home = root / "home"
        self.home.mkdir(mode=0o700)
        import_model(write_folder(root / "tiny"), home=self.home, name="tiny", dtype="float32")
        gateways: list[Gateway] = []

        class Seen(Gateway):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                gateways.append(self)

        settings = ServeSettings(
            model="tiny",
            home=self.home,
            port=0,
            workers=WORKERS,
            engine=EngineOptions(dtype="float32", pages=96, threads=1),
            limits=GatewayLimits(credit_bytes=16 << 10, write_high_bytes=32 << 10, write_low_bytes=8 << 10),
            defaults=LIMITS,
        )
        with mock.patch("realm.serve.Gateway", Seen):
            self.info = await self.stack.enter_async_context(running(settings))
        (self.gateway,) = gateways
        assert self.info.admin_key is not None
        self.keys["admin"] = self.info.admin_key
        admin = await self.connect("admin")
        for tenant in TENANTS:
            await admin.ask("tenants.add", name=tenant)
            self.keys[tenant] = (await admin.ask("keys.add", tenant=tenant))["data"]["key"]
        await admin.socket.close()
        for tenant in TENANTS:
            client = await self.connect(tenant)
            for name in self.wasm:
                await self.push(client, name)
            await client.socket.close()

    def close(self) -> None:
        try:
            self.runner.run(self.stack.aclose())
        finally:
            self.runner.close()
            self.folder.cleanup()

    # --- clients ----------------------------------------------------------------------------------

    async def connect(self, tenant: str) -> Client:
        socket = await connect(
            self.info.url,
            additional_headers={"Authorization": f"Bearer {self.keys[tenant]}"},
            compression=None,
            max_size=None,
        )
        return Client(tenant, socket)

    async def push(self, client: Client, name: str) -> None:
        wasm = self.wasm[name]
        sha256 = hashlib.sha256(wasm).hexdigest()
        answer = await client.ask("modules.begin", name=name, size=len(wasm), sha256=sha256)
        if answer["status"] != "complete":
            raise Problem(f"{name} cannot be uploaded: {answer}")
        begun = answer["data"]
        if not begun["exists"]:
            await client.frame(begun["upload"].to_bytes(8, "little") + bytes(8) + wasm)
        answer = await client.ask("modules.commit", upload=begun["upload"])
        if answer["status"] != "complete":
            raise Problem(f"{name} is refused: {answer}")

    # --- scripts ----------------------------------------------------------------------------------

    def play(self, script: list[list[Any]], *, check: bool = True) -> None:
        """Do what the script says, close all connections, and compare everything with what it was before.

        Raises:
            Problem: something is not as it was.
        """
        self.runner.run(self._play(script))
        if check:
            found = self.runner.run(self._at_rest())
            self.runner.run(self._ends())
            if found != self.baseline:
                changed = {
                    name: (self.baseline[name], found[name]) for name in found if found[name] != self.baseline[name]
                }
                raise Problem(f"not as before (before, now): {changed}")

    async def _ends(self) -> None:
        """Each run since the last look ended in a way that has a name, and no host function failed inside."""
        registry = self.gateway.registry
        newest = self.last_run
        for record in await registry.run(lambda database: database.list_runs(None, 500)):
            newest = max(newest, record.number)
            if record.number <= self.last_run:
                break
            code = None if record.error is None else record.error["code"]
            key = f"{record.status} {code}" if code else record.status
            self.ends[key] += 1
            if (record.status == "error") != (code in ERRORS) or record.status not in (
                "complete",
                "error",
                "cancelled",
            ):
                raise Problem(f"a run ended with {record}")
            number = record.number
            lines, _ = await registry.run(lambda database, number=number: database.run_log(None, number))
            if failed := [line.text for line in lines if "the host failed" in line.text]:
                raise Problem(f"a host function failed inside {record.module}: {failed}")
        self.last_run = max(self.last_run, newest)

    async def _play(self, script: list[list[Any]]) -> None:
        clients: dict[int, Client] = {}
        try:
            for operation, who, *rest in script:
                client = clients.get(who)
                if client is None:
                    client = clients[who] = await self.connect(TENANTS[who % len(TENANTS)])
                await getattr(self, f"_{operation}")(client, *rest)
                if operation in ("vanish", "leave"):
                    del clients[who]
        finally:
            for client in clients.values():
                client.socket.transport.abort()

    async def _run(self, client: Client, module: str, seed: int) -> None:
        given: Any = "x" * (seed % 3)
        if module == "calls":
            memory, calls = arguments.program(seed)
            # A saved sequence is meant to stay.
            calls = [call for call in calls if call.name != "seq_save"]
            given = arguments.as_text(arguments.encode(memory, calls))
        await client.send("run", module=module, input=given, seed=seed, stream=seed % 4 != 0)

    async def _generate(self, client: Client, seed: int) -> None:
        await client.send("generate", prompt="once upon", max_tokens=1 + seed % 30, seed=seed, stream=seed % 2 == 0)

    async def _cancel(self, client: Client, back: int) -> None:
        await client.send("cancel", id=client.calls - back)

    async def _message(self, client: Client, size: int) -> None:
        await client.read(0.05)
        if client.runs:
            await client.send("send", run=client.runs[-1], data="m" * size)

    async def _read(self, client: Client, most: int) -> None:
        for _ in range(most):
            if await client.read(0.1) is None:
                return

    async def _wait(self, client: Client, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)

    async def _vanish(self, client: Client) -> None:
        client.socket.transport.abort()

    async def _leave(self, client: Client) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.socket.close(), 0.3)
        client.socket.transport.abort()

    async def _upload(self, client: Client, part: int, commit: bool) -> None:
        """Begin an upload; send a part of it; leave it, or commit what is no module."""
        wasm = bytes(wasmtime.wat2wasm(BROKEN)) + os.urandom(100)
        answer = await client.ask("modules.begin", name="u", size=len(wasm), sha256=hashlib.sha256(wasm).hexdigest())
        if answer["status"] != "complete":
            return
        upload = answer["data"]["upload"]
        await client.frame(upload.to_bytes(8, "little") + bytes(8) + wasm[: len(wasm) * part // 4])
        if commit:
            await client.send("modules.commit", upload=upload)

    async def _store(self, client: Client, seed: int) -> None:
        """A new version of a module, and its removal with all versions."""
        name = f"v{seed % 3}"
        # Few different ones: a worker keeps what it has loaded.
        self.wasm[name] = bytes(wasmtime.wat2wasm(guest(f"(i32.const {seed % 3})")))
        with contextlib.suppress(Problem):
            await self.push(client, name)
        await client.send("run", module=name)
        await client.ask("modules.remove", name=name)

    async def _kill(self, client: Client, which: int) -> None:
        """End a worker as nothing inside it can prevent."""
        workers = self._processes("realm.guests.worker")
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[which % len(workers)].pid, signal.SIGKILL)

    # --- counters ---------------------------------------------------------------------------------

    def _processes(self, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if module in child.cmdline():
                    found.append(child)
        return sorted(found, key=lambda process: process.pid)

    async def _at_rest(self) -> dict[str, Any]:
        """All counters, once they are what they were (or, without that, have stopped changing)."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        before: dict[str, Any] | None = None
        same = 0
        while True:
            found = await self._count()
            if self.baseline and found == self.baseline:
                return found
            same = same + 1 if found == before else 0
            if not self.baseline and same > 20:
                return found
            if loop.time() > deadline:
                return found
            before = found
            await asyncio.sleep(0.02)

    async def _count(self) -> dict[str, Any]:
        gateway = self.gateway
        counters: dict[str, Any] = {
            "connections": len(gateway.connections),
            "runs": len(gateway.runs.runs),
            "workers": len(gateway.runs.workers),
            "runs of workers": sum(len(worker.runs) for worker in gateway.runs.workers.values()),
            "tasks": len(asyncio.all_tasks()),
            "descriptors": _descriptors(os.getpid()),
            "incoming files": len(list((self.home / "incoming").iterdir())),
            "half-made artifacts": len(list((self.home / "cache").glob(".*"))),
        }
        for tenant in TENANTS:
            use = gateway.quotas.of(tenant)
            for name in ("connections", "uploads", "running", "waiting", "waiting_bytes", "collected"):
                counters[f"{tenant}: {name}"] = getattr(use, name)
            stored = await gateway.registry.run(lambda database, tenant=tenant: database.stored(tenant))
            counters[f"{tenant}: stored modules"] = stored.modules
        workers = self._processes("realm.guests.worker")
        counters["worker processes"] = len(workers)
        for number, worker in enumerate(workers):
            with contextlib.suppress(OSError):
                held = {"descriptors": _descriptors(worker.pid), "mappings": _mappings(worker.pid)}
                for name, value in held.items():
                    counters[f"worker {number}: {name}"] = self._few(name, value)
        assert gateway.engine is not None
        stats = await gateway.engine.stats(PATIENCE)
        counters |= {
            "engine: pages used": stats.pages_used,
            "engine: pages lost": stats.pages_total - stats.pages_free - stats.pages_used - stats.pages_cached,
            "engine: sequences": sum(tenant.sequences for tenant in stats.tenants.values()),
            "engine: pages of tenants": sum(tenant.pages for tenant in stats.tenants.values()),
        }
        for engine in self._processes("realm.engine.server"):
            counters["engine: descriptors"] = _descriptors(engine.pid)
        return counters

    def _few(self, name: str, number: int) -> str:
        """`few`, or the number where it is more than any worker has at rest. One that has begun later has less."""
        if not self.baseline:
            self.most[name] = max(self.most.get(name, 0), number)
        slack = MAPPINGS_SLACK if name == "mappings" else 0
        return "few" if number <= self.most[name] + slack else str(number)


def _mappings(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("\n")


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


# --- scripts -------------------------------------------------------------------------------------------


def everything() -> list[list[Any]]:
    """A script that does each thing once or twice, a few times over, so that all workers have done it."""
    script: list[list[Any]] = []
    for seed in range(3):
        for module in MODULES:
            script.append(["run", seed, module, seed])
        script += [["generate", seed, seed], ["store", seed, seed], ["upload", seed, 2, True], ["wait", seed, 300]]
    return script


def random_script(seed: int) -> list[list[Any]]:
    """5 to 30 things that up to four clients of two tenants do."""
    random = Random(seed)
    script: list[list[Any]] = []
    kills = random.random() < 0.4
    for _ in range(random.randrange(5, 31)):
        who = random.randrange(4)
        kind = random.randrange(20)
        number = random.getrandbits(20)
        if kind < 8:
            script.append(["run", who, random.choice(list(MODULES)), number])
        elif kind == 8:
            script.append(["generate", who, number])
        elif kind < 11:
            script.append(["cancel", who, random.randrange(3)])
        elif kind == 11:
            script.append(["message", who, random.choice([0, 1, 5000])])
        elif kind == 12:
            script.append(["read", who, random.randrange(1, 30)])
        elif kind == 13:
            script.append(["wait", who, random.randrange(60)])
        elif kind < 16:
            script.append(["vanish", who])
        elif kind == 16:
            script.append(["leave", who])
        elif kind == 17:
            script.append(["upload", who, random.randrange(5), random.random() < 0.5])
        elif kind == 18:
            script.append(["store", who, number])
        elif kills:
            script.append(["kill", who, random.randrange(WORKERS + 1)])
    return script
