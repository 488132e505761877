"""The worker process, between an engine and a gateway played by the test."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from realm.channel import BlockingChannel, listen
from realm.engine.trace import Recorded
from realm.guests.runtime import Turn
from realm.guests.worker import GuestWorker
from realm.messages import EngineReply, Forward, ToEngine, WorkerHello, WorkerTurn
from realm.run_messages import Output, RunFinished, RunLimits, Shutdown, StartRun, WorkerEvents, WorkerToGateway
from tests.fakes import CONTEXT, FakeEngine, artifacts_folder, compiled, digest, greedy
from tests.model_files import write_folder
from tests.wat import GENERATE, SPIN, sampling


class Peers:
    """Both other ends of one worker."""

    def __init__(self, folder: Path, model: Path, *more: str) -> None:
        self._listeners = [listen(str(folder / name)) for name in ("engine", "gateway")]
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "realm.guests.worker",
                *("--engine", str(folder / "engine"), "--gateway", str(folder / "gateway")),
                *("--model", str(model), "--worker", "5", "--cache", str(artifacts_folder())),
                *more,
            ],
            # Threads of numpy's BLAS would be outside the sandbox.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(["host", *sys.path]), "OPENBLAS_NUM_THREADS": "1"},
        )
        self.engine: BlockingChannel[Any] = BlockingChannel(self._accept(0), ToEngine)
        self.gateway: BlockingChannel[Any] = BlockingChannel(self._accept(1), WorkerToGateway)
        self.core = FakeEngine()
        self.turns: list[WorkerTurn] = []
        self.events: list[Any] = []
        self.hellos: list[WorkerHello] = []
        self.replies = 0

    def _accept(self, which: int) -> socket.socket:
        listener = self._listeners[which]
        assert select.select([listener], [], [], 30)[0], "the worker does not connect"
        return listener.accept()[0]

    def step(self) -> None:
        """Take what the worker sent and answer its calls."""
        select.select([self.engine, self.gateway], [], [], 10)
        for message in self.gateway.receive():
            if isinstance(message, WorkerEvents):
                self.events += message.events
            else:
                self.hellos.append(message)
        for message in self.engine.receive():
            if isinstance(message, WorkerTurn):
                self.turns.append(message)
                self.core.submit(message.ops, message.continues)
            else:
                self.hellos.append(message)
        if self.core.results:
            self.replies += 1
            self.engine.send(EngineReply(self.replies, *self.core.take()))

    def until_finished(self, run: int) -> RunFinished:
        for _ in range(5000):
            for event in self.events:
                if isinstance(event, RunFinished) and event.run == run:
                    return event
            self.step()
        raise AssertionError("the run does not finish")

    def close(self) -> None:
        self.engine.close()
        self.gateway.close()
        for listener in self._listeners:
            listener.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Peers]:
    model = tmp_path / "model"
    write_folder(model)
    made = Peers(tmp_path, model)
    yield made
    made.close()


def start(run: int, wat: str, **limits: Any) -> StartRun:
    path = compiled(wat)
    return StartRun(run, "a", "m", path, sampling(), 7, RunLimits(**limits), artifact_sha256=digest(path))


def test_a_run_through_the_process(peers: Peers) -> None:
    peers.gateway.send(start(1, GENERATE))
    end = peers.until_finished(1)
    assert end.error is None
    tokens = [5]
    for _ in range(12):
        tokens.append(greedy(tokens))
    assert b"".join(e.data for e in peers.events if isinstance(e, Output)) == bytes(tokens[1:])
    assert [hello.worker for hello in peers.hellos] == [5, 5]
    assert {hello.pid for hello in peers.hellos} == {peers.process.pid}
    # Every reply is acknowledged by the turn that follows it.
    assert [turn.answered for turn in peers.turns] == list(range(len(peers.turns)))
    # A call that goes on as before is a row, and no message besides.
    assert peers.core.continues == 12 - 1 - 2
    assert sum(bool(turn.ops) for turn in peers.turns) == 1 + 2 + 1
    assert 0 < end.usage.first_call_seconds < 1
    assert CONTEXT > 12


def test_it_records_where_its_time_goes(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    peers = Peers(tmp_path, tmp_path / "model", "--trace", str(tmp_path / "spans"))
    try:
        peers.gateway.send(start(1, GENERATE))
        peers.until_finished(1)
    finally:
        peers.close()
    head, columns = (tmp_path / "spans").read_bytes().split(b"\n", 1)
    spans = msgspec.json.decode(head, type=Recorded)
    assert (spans.process, spans.lost) == ("worker 5", 0)
    assert sorted(spans.names) == ["receive", "send", "turn", "wait"]
    assert spans.count >= 4 * 12
    began, ended = (array("d", columns[8 * spans.count * n :][: 8 * spans.count]) for n in range(2))
    assert all(0 < a <= b for a, b in zip(began, ended, strict=True))


def test_rows_go_once_and_before_all_operations() -> None:
    sent: list[WorkerTurn] = []

    class Link:
        def send(self, message: WorkerTurn) -> None:
            sent.append(message)

        def fileno(self) -> int:
            return 0

    link: Any = Link()
    runtime: Any = SimpleNamespace()
    worker = GuestWorker(runtime, link, link)
    ops: list[Any] = [Forward(n, 1, bytes(8 << 20), None, False) for n in range(20)]
    worker._send(Turn(ops, continues=b"rows"), True)
    assert len(sent) > 1
    assert [turn.continues for turn in sent] == [b"rows"] + [b""] * (len(sent) - 1)
    assert [op.call for turn in sent for op in turn.ops] == list(range(20))
    worker._send(Turn(continues=b"more"), False)
    assert (sent[-1].ops, sent[-1].continues) == ([], b"more")


def test_a_spinning_neighbour_does_not_stop_the_others(peers: Peers) -> None:
    peers.gateway.send(start(1, SPIN, wall_seconds=30.0))
    peers.gateway.send(start(2, GENERATE))
    assert peers.until_finished(2).outcome == "complete"


def test_it_ignores_the_terminals_interrupt_and_ends_on_shutdown(peers: Peers) -> None:
    peers.gateway.send(start(1, SPIN))
    os.kill(peers.process.pid, signal.SIGINT)
    peers.gateway.send(Shutdown())
    assert peers.until_finished(1).outcome == "cancelled"
    assert peers.process.wait(10) == 0
    assert peers.core.ended == [1] or (peers.step() is None and peers.core.ended == [1])


@pytest.mark.parametrize("side", ["engine", "gateway"])
def test_it_ends_with_its_links(peers: Peers, side: str) -> None:
    peers.gateway.send(start(1, SPIN))
    peers.step()
    getattr(peers, side).close()
    assert peers.process.wait(10) == 0


def test_it_does_not_load_torch() -> None:
    code = "import sys, realm.guests.worker; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["host", *sys.path])},
        check=False,
    )
    assert done.returncode == 0
