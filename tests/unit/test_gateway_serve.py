"""The supervisor with real child processes (fake inside): starts, deaths, restarts, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import realm.serve
import realm.supervisor
from realm.errors import RealmError
from realm.serve import bind, running
from realm.settings import ServeSettings
from tests.fake_host import async_test
from tests.gateway_adapters import add, weights
from tests.serve_harness import PYTHONPATH, ROOT, children, client_of, healthy, prepare, serving


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServeSettings:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("REALM_SECRET", "not for children")
    return prepare(tmp_path, monkeypatch.setattr)


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
            await serving(2)
            workers = children("fake_worker")
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
        await add(client, "legal", weights())
        before = {process.pid for process in children("tests.fake_")}
        call = await client.start("run", module="echo", input="hang")
        await client.receive()
        (engine,) = children("fake_engine")
        engine.kill()
        reply = await client.receive()
        assert reply["id"] == call and reply["error"]["code"] == "engine_lost" and reply["error"]["retry_after"]
        await healthy(client)
        assert (await client.data("run", module="echo", input="x", stream=False))["text"] == "x"
        assert (await client.data("adapters.show", name="legal"))["state"] == "registered"
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
    monkeypatch.setattr(realm.supervisor, "WORKER_MODULE", "tests.no_such_worker")
    with pytest.raises(RealmError, match="engine_start"):
        async with running(settings):
            pass
    monkeypatch.setattr(realm.supervisor, "ENGINE_MODULE", "tests.no_such_engine")
    with pytest.raises(RealmError, match="engine_start"):
        async with running(settings):
            pass
    assert not children("tests.")


PROGRAM = """
import asyncio, sys
from pathlib import Path
import realm.serve, realm.supervisor
from tests.serve_harness import prepare

def ready(info):
    print(info.url, flush=True)

settings = prepare(Path(sys.argv[1]), setattr)
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
        supervisor = psutil.Process(process.pid)
        # The engine, two workers and, a moment later, one in reserve.
        while len(family := supervisor.children()) < 4:
            time.sleep(0.02)
        process.send_signal(number)
        rest = process.stdout.read()
        status = process.wait(5)
    assert (rest, status) == (("", -signal.SIGKILL) if number is signal.SIGKILL else ("ended\n", 0))
    # Even when the host is killed, its children notice.
    gone, alive = psutil.wait_procs(family, timeout=5)
    assert len(gone) == 4 and not alive


def test_a_signal_while_starting(tmp_path: Path) -> None:
    program = PROGRAM.replace("asyncio.run", "realm.supervisor.ENGINE_MODULE = 'tests.fake_stall'\nasyncio.run")
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
