"""The command line against a scripted server, in the test's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from realm.cli.app import app
from tests.unit.sdk_fake_server import Peer, Script, fake_server

Invoke = Callable[..., Result]


@pytest.fixture(name="invoke")
def invoke_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Runs ``realm`` with no configuration but the test's."""
    for name in ("REALM_URL", "REALM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("REALM_HOME", str(tmp_path / "home"))
    runner = CliRunner()

    def run(*arguments: str, input: str | bytes | None = None) -> Result:
        return runner.invoke(app, list(arguments), input=input)

    return run


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """A scripted server in a thread of its own: the command line blocks the test's. Gives the URL."""
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    url: list[str] = []
    failed: list[BaseException] = []

    async def main() -> None:
        async with fake_server(script) as server:
            url.append(server.url)
            started.set()
            await stop.wait()

    def run() -> None:
        try:
            loop.run_until_complete(main())
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()
            loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
    if failed:
        raise failed[0]


def answering(answers: dict[str, dict[str, object]], heard: list[tuple[str, object]] | None = None) -> Script:
    """Answers each call with what is listed for its function."""

    async def script(peer: Peer) -> None:
        while True:
            call = await peer.hear()
            if heard is not None:
                heard.append((call["function"], call["params"]))
            await peer.complete(call, **answers[call["function"]])

    return script
