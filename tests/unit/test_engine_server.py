"""The engine process through its real socket."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from realm.channel import BlockingChannel, ChannelClosed, connect
from realm.messages import (
    EngineReady,
    EngineReply,
    EngineStats,
    Forward,
    ForwardDone,
    GatewayHello,
    OpenSequence,
    SamplingParams,
    StatsRequest,
    WorkerHello,
    WorkerLost,
    WorkerTurn,
)
from tests.tiny import make_model, pack

FROM_ENGINE = EngineReply | EngineReady | EngineStats


class Link:
    """A worker's or the gateway's end."""

    def __init__(self, path: str) -> None:
        self.sock = connect(path)
        self.channel: BlockingChannel[Any] = BlockingChannel(self.sock, FROM_ENGINE)
        self.inbox: list[Any] = []

    def next(self, seconds: float = 20) -> Any:
        deadline = time.monotonic() + seconds
        while not self.inbox:
            assert time.monotonic() < deadline, "the engine does not answer"
            select.select([self.channel], [], [], 0.2)
            self.inbox += self.channel.receive()
        return self.inbox.pop(0)

    def call(self, number: int, seq: int, count: int = 3) -> list[Any]:
        return [OpenSequence(seq, f"t{seq}", 1), Forward(number, seq, pack([5] * count), SamplingParams(), False)]


class Engine:
    def __init__(self, folder: Path, path: Path, *options: str) -> None:
        self.path = str(path)
        self.links: list[Link] = []
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

    def link(self) -> Link:
        self.links.append(Link(self.path))
        return self.links[-1]

    def worker(self, number: int) -> Link:
        link = self.link()
        link.channel.send(WorkerHello(number, 1))
        return link

    def stats(self) -> EngineStats:
        self.gateway.channel.send(StatsRequest(1))
        stats = self.gateway.next()
        assert isinstance(stats, EngineStats)
        return stats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-served")
    make_model(path)
    return path


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    started = Engine(folder, tmp_path / "engine")
    assert isinstance(started.gateway.next(), EngineReady)
    yield started
    for link in (started.gateway, *started.links):
        link.channel.close()
    assert started.process.wait(10) == 0


def test_two_workers_share_a_step_after_the_first_round(engine: Engine) -> None:
    links = [engine.worker(1), engine.worker(2)]
    asked = [link.call(1, seq) for seq, link in enumerate(links, 10)]
    for link, ops in zip(links, asked, strict=True):
        link.channel.send(WorkerTurn(ops))
    before = None
    for turn in range(1, 6):
        for seq, link in enumerate(links, 10):
            reply = link.next()
            assert isinstance(reply, EngineReply) and reply.number == turn
            (done,) = reply.results
            assert isinstance(done, ForwardDone)
            link.channel.send(
                WorkerTurn([Forward(turn + 1, seq, pack([done.token]), SamplingParams(), False)], reply.number)
            )
        if turn == 2:
            before = engine.stats()
    after = engine.stats()
    assert before is not None
    assert after.shared_steps > before.shared_steps


@pytest.mark.parametrize("how", ["closes", "is reported lost", "sends rubbish", "speaks before its hello"])
def test_a_worker_that_fails_leaves_no_page_and_hurts_no_other(engine: Engine, how: str) -> None:
    bad, good = engine.worker(1), engine.worker(2)
    bad.channel.send(WorkerTurn(bad.call(1, 10, count=40)))
    bad.next()
    good.channel.send(WorkerTurn(good.call(1, 20)))
    good.next()
    assert engine.stats().pages_used == 4
    if how == "closes":
        bad.channel.close()
    elif how == "is reported lost":
        engine.gateway.channel.send(WorkerLost(1))
    elif how == "sends rubbish":
        socket.socket.sendall(bad.sock, b"\xff\xff\xff\xff")
    else:
        stranger = engine.link()
        stranger.channel.send(WorkerTurn([]))
        with pytest.raises(ChannelClosed):
            stranger.next()
        bad.channel.close()
    deadline = time.monotonic() + 5
    while engine.stats().pages_used > 1:
        assert time.monotonic() < deadline
    good.channel.send(WorkerTurn([Forward(2, 20, pack([1]), SamplingParams(), False)], 1))
    assert isinstance(good.next().results[0], ForwardDone)


def test_a_model_that_cannot_be_loaded_ends_the_process_with_its_reason(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "realm.engine.server", "--socket", str(tmp_path / "s"), "--model", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "model_invalid: config.json cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
