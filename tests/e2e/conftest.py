"""The real stack: ``realm serve`` with the real model in processes of its own, an empty registry each module."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from threading import Thread

import msgspec
import pytest

from realm_sdk import SyncClient

START_SECONDS = 90.0


@dataclass(frozen=True)
class Stack:
    """A running server.

    Attributes:
        key: of an ordinary tenant, ``acme``. other_key: of another one, ``globex``.
        pid: the supervisor's process.
    """

    url: str
    admin_key: str
    key: str
    other_key: str
    home: Path
    pid: int


class Ready(msgspec.Struct):
    """The line of ``realm serve --json``."""

    url: str
    admin_key: str | None


def start_serve(home: Path, log: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], Ready]:
    """Start ``realm serve`` on a free port and wait until it is ready."""
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "realm.cli", "serve", "--json", "--port", "0", "--verbose", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | {"REALM_HOME": str(home)},
        )
    lines: Queue[bytes] = Queue()
    assert process.stdout is not None
    Thread(target=lambda stdout=process.stdout: lines.put(stdout.readline()), daemon=True).start()
    try:
        line = lines.get(timeout=START_SECONDS)
        return process, msgspec.json.decode(line, type=Ready)
    except (Empty, msgspec.MsgspecError):
        stop_serve(process)
        pytest.fail(f"realm serve did not start:\n{log.read_text()[-4000:]}")


def stop_serve(process: subprocess.Popen[bytes]) -> int:
    """End it as an operator would; its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def serve_home(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty data folder that shares the imported model."""
    home = tmp_path_factory.mktemp("serve") / "home"
    home.mkdir(mode=0o700)
    (home / "models").symlink_to(model_folder.parent)
    return home


@contextlib.contextmanager
def running(home: Path, model: str, *arguments: str) -> Iterator[Stack]:
    """A server with two tenants, in an empty data folder; its end is checked."""
    log = home.parent / "serve.log"
    process, ready = start_serve(home, log, "--model", model, *arguments)
    try:
        assert ready.admin_key is not None
        with SyncClient(ready.url, ready.admin_key) as admin:
            keys = []
            for tenant in ("acme", "globex"):
                admin.add_tenant(tenant)
                keys.append(admin.add_key(tenant).key)
        yield Stack(ready.url, ready.admin_key, keys[0], keys[1], home, process.pid)
        status = stop_serve(process)
        assert status == 0, f"realm serve ended with {status}:\n{log.read_text()[-4000:]}"
    finally:
        stop_serve(process)


@pytest.fixture(scope="module")
def stack(serve_home: Path, model_folder: Path) -> Iterator[Stack]:
    """The server, with two tenants."""
    with running(serve_home, model_folder.name) as stack:
        yield stack
