"""The supervisor with real child processes (fake inside): starts, deaths, restarts, ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest
from websockets.asyncio.client import connect

import realm.serve
from realm.errors import RealmError
from realm.serve import ServeInfo, bind, running
from realm.settings import ServeSettings
from tests.fake_host import WASM, FakeClient, FakeCompiled, async_test

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT / "host"), str(ROOT)])


def prepare(home: Path, patch: Callable[[str, object], None]) -> ServeSettings:
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
    patch("ENGINE_MODULE", "tests.fake_engine")
    patch("WORKER_MODULE", "tests.fake_worker")

    async def compile_module(wasm: Path, cache: Path) -> FakeCompiled:
        artifact = cache / "artifact"
        await asyncio.to_thread(artifact.write_bytes, WASM)
        import hashlib

        return FakeCompiled(artifact, hashlib.sha256(await asyncio.to_thread(wasm.read_bytes)).hexdigest())

    patch("_compile", compile_module)
    return ServeSettings(home=home, port=0, workers=2)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("REALM_SECRET", "not for children")
    return prepare(tmp_path, lambda name, value: monkeypatch.setattr(realm.serve, name, value))


@contextlib.asynccontextmanager
async def client_of(info: ServeInfo) -> AsyncIterator[FakeClient]:
    """A client of the admin tenant with a module called echo."""
    async with connect(info.url, additional_headers={"Authorization": f"Bearer {info.admin_key}"}) as socket:
        client = FakeClient(socket)
        assert (await client.receive())["type"] == "auth_success"
        await client.receive()
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


@async_test
async def test_a_whole_host_starts_and_ends(settings: ServeSettings, capfd: pytest.CaptureFixture[str]) -> None:
    async with running(settings) as info:
        assert info.model == "tiny" and info.url.startswith("ws://127.0.0.1:") and info.admin_key is not None
        async with client_of(info) as client:
            answer = await client.data("run", module="echo", input="hello", stream=False)
            assert answer["text"] == "hello"
            assert (await client.data("health"))["workers"] == 2
            assert (await client.data("models.list"))["models"] == [
                {"name": "tiny", "served": True, "context_length": 2048, "parameters": 1000}
            ]
            (engine,) = children("fake_engine")
            workers = children("fake_worker")
            assert len(workers) == 2
            for child in (engine, *workers):
                assert "REALM_SECRET" not in child.environ()
                # Standard streams and its own sockets: nothing inherited.
                assert child.num_fds() <= 8
            with pytest.raises(RealmError, match="already_running"):
                async with running(settings):
                    pass
            sockets = Path(next(part for part in engine.cmdline() if part.endswith("engine1"))).parent
            assert sockets.stat().st_mode & 0o777 == 0o700
            await client.start("run", module="echo", input="hang")
            assert (await client.receive())["data"]["kind"] == "started"
        began = time.monotonic()
    assert time.monotonic() - began < 3
    assert not children("tests.fake_") and not sockets.exists()
    async with running(settings) as info:
        assert info.admin_key is None


@async_test
async def test_a_killed_worker_is_replaced(settings: ServeSettings) -> None:
    async with running(settings) as info, client_of(info) as client:
        error = await client.error("run", module="echo", input="die", stream=False)
        assert error["code"] == "worker_lost"
        for worker in children("fake_worker"):
            worker.kill()
        began = time.monotonic()
        await healthy(client)
        assert time.monotonic() - began < 4
        assert (await client.data("run", module="echo", input="x", stream=False))["text"] == "x"


@async_test
async def test_a_killed_engine_is_replaced_with_its_workers(settings: ServeSettings) -> None:
    async with running(settings) as info, client_of(info) as client:
        before = {process.pid for process in children("tests.fake_")}
        call = await client.start("run", module="echo", input="hang")
        await client.receive()
        (engine,) = children("fake_engine")
        engine.kill()
        reply = await client.receive()
        assert reply["id"] == call and reply["error"]["code"] == "engine_lost" and reply["error"]["retry_after"]
        await healthy(client)
        assert (await client.data("run", module="echo", input="x", stream=False))["text"] == "x"
        assert not before & {process.pid for process in children("tests.fake_")}


@async_test
async def test_starts_that_cannot_succeed_say_why(settings: ServeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RealmError, match="address_in_use"):
            async with running(ServeSettings(home=settings.home, port=port)):
                pass
    with pytest.raises(RealmError, match="model_not_found"):
        async with running(ServeSettings(home=settings.home, port=0, model="other")):
            pass
    monkeypatch.setattr(realm.serve, "WORKER_MODULE", "tests.no_such_worker")
    with pytest.raises(RealmError, match="engine_start"):
        async with running(settings):
            pass
    monkeypatch.setattr(realm.serve, "ENGINE_MODULE", "tests.no_such_engine")
    with pytest.raises(RealmError, match="engine_start"):
        async with running(settings):
            pass
    assert not children("tests.")


PROGRAM = """
import asyncio, sys
from pathlib import Path
import realm.serve
from tests.unit.test_gateway_serve import prepare

def ready(info):
    print(info.url, flush=True)

settings = prepare(Path(sys.argv[1]), lambda name, value: setattr(realm.serve, name, value))
asyncio.run(realm.serve.serve(settings, on_ready=ready))
print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_end_everything(tmp_path: Path, number: signal.Signals) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "host"), str(ROOT), str(ROOT / "sdk/python")]),
    }
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ws://")
        family = psutil.Process(process.pid).children()
        assert len(family) == 3
        process.send_signal(number)
        rest = process.stdout.read()
        status = process.wait(5)
    assert (rest, status) == (("", -signal.SIGKILL) if number is signal.SIGKILL else ("ended\n", 0))
    # Even when the host is killed, its children notice.
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert len(gone) == 3 and not alive


def test_a_signal_while_starting(tmp_path: Path) -> None:
    program = PROGRAM.replace("asyncio.run", "realm.serve.ENGINE_MODULE = 'tests.fake_stall'\nasyncio.run")
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        # What children print arrives with their name in front.
        assert process.stderr.readline() == "engine: loading for ever\n"
        (engine,) = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "ended\n" and process.stderr.read() == ""
        assert process.wait(5) == 0
    assert not engine.is_running()
