"""A whole host with fake children, for the tests of ``serve`` and its supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
from websockets.asyncio.client import connect

import realm.serve
import realm.supervisor
from realm.serve import ServeInfo
from realm.settings import ServeSettings
from tests.fake_host import WASM, FakeClient, FakeCompiled
from tests.gateway_adapters import MODEL

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join([str(ROOT / "host"), str(ROOT)])


def prepare(home: Path, patch: Callable[[object, str, object], None]) -> ServeSettings:
    """A home with a model's record, and children that need no model."""
    folder = home / "models" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "name": "tiny",
        "source": "test",
        "sha256": "0" * 64,
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "dtype": "float32",
        "context_length": 2048,
        "created": "2025-01-01T00:00:00Z",
    }
    (folder / "realm.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(MODEL))
    patch(realm.supervisor, "ENGINE_MODULE", "tests.fake_engine")
    patch(realm.supervisor, "WORKER_MODULE", "tests.fake_worker")

    async def compile_module(wasm: Path, cache: Path) -> FakeCompiled:
        artifact = cache / "artifact"
        await asyncio.to_thread(artifact.write_bytes, WASM)
        sha256 = hashlib.sha256(await asyncio.to_thread(wasm.read_bytes)).hexdigest()
        return FakeCompiled(artifact, hashlib.sha256(WASM).hexdigest(), sha256)

    patch(realm.serve, "_compile", compile_module)
    return ServeSettings(home=home, port=0, workers=2)


@contextlib.asynccontextmanager
async def client_of(info: ServeInfo, *, echo: bool = True) -> AsyncIterator[FakeClient]:
    """A client of the admin tenant, with a module called echo."""
    async with connect(info.url, additional_headers={"Authorization": f"Bearer {info.admin_key}"}) as socket:
        client = FakeClient(socket)
        assert (await client.receive())["type"] == "auth_success"
        await client.receive()
        if echo:
            await client.push("echo")
        yield client


async def healthy(client: FakeClient) -> None:
    """Wait until engine and both workers are up."""
    while True:
        health = await client.data("health")
        if health["workers"] == 2 and health["status"] == "healthy":
            return
        await asyncio.sleep(0.02)


def children(word: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word in part for part in child.cmdline()):
                found.append(child)
    return sorted(found, key=lambda process: process.pid)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in other processes; the test's time limit ends it."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.02)


def is_serving(worker: psutil.Process) -> bool:
    """Whether both links of a fake worker are connected; the reserve has none. A real one cannot be looked into."""
    links = []
    for entry in Path(f"/proc/{worker.pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    return sum(link.startswith("socket:") for link in links) == 2


async def serving(count: int) -> list[psutil.Process]:
    """The workers that serve, once there are so many, and once there is one in reserve."""
    while True:
        workers = children("fake_worker")
        found = [worker for worker in workers if is_serving(worker)]
        if len(found) == count and len(workers) == count + 1:
            return found
        await asyncio.sleep(0.02)
