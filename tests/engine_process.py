"""An engine process, and the gateway's and workers' ends of its socket."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from realm.messages import EngineReady, EngineStats, GatewayHello, StatsRequest, WorkerHello
from tests.engine_link import Link


class Ends:
    """Other processes' ends of an engine's socket."""

    gateway: Link

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.links: list[Link] = []

    def link(self, worker: int = 0) -> Link:
        self.links.append(Link(self.path, worker))
        return self.links[-1]

    def worker(self, number: int) -> Link:
        link = self.link(number)
        link.channel.send(WorkerHello(number, 1))
        return link

    def stats(self) -> EngineStats:
        self.gateway.channel.send(StatsRequest(1))
        stats = self.gateway.next()
        assert isinstance(stats, EngineStats)
        return stats


class Engine(Ends):
    def __init__(self, folder: Path, path: Path, *options: str) -> None:
        super().__init__(path)
        command = [sys.executable, "-m", "realm.engine.server", "--socket", self.path, "--model", str(folder)]
        self.process = subprocess.Popen([*command, "--dtype", "float32", "--kv-pages", "64", *options])
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self.gateway = Link(self.path)
                break
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        self.gateway.channel.send(GatewayHello(1))

    def until(self, holds: Callable[[EngineStats], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not holds(self.stats()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def running(folder: Path, place: Path, *options: str) -> Iterator[Engine]:
    started = Engine(folder, place / "engine", *options)
    assert isinstance(started.gateway.next(), EngineReady)
    yield started
    for link in (started.gateway, *started.links):
        link.channel.close()
    assert started.process.wait(10) == 0
