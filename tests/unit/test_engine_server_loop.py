"""The engine's loop over a device that takes its time: nothing waits for the device but its own results."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from realm.channel import listen
from realm.engine.pipeline import Pipeline
from realm.engine.server import CLAIM_SECONDS, GATHER_PATIENCE, MAX_OPERATIONS, EngineServer, Peer
from realm.messages import (
    CONTINUE,
    DRAWN,
    NO_LANE,
    EngineReady,
    EngineReply,
    ForwardDone,
    FreeSequence,
    GatewayHello,
    OpenSequence,
    SamplingParams,
    WorkerTurn,
)
from tests.checked_runner import check_result, checked_engine
from tests.engine_link import Link
from tests.engine_process import Ends

GREEDY = SamplingParams()


class Served(Ends):
    """An engine's loop in a thread. Its device computes a step only when :meth:`execute` says so."""

    def __init__(self, place: Path, run_ahead: int) -> None:
        super().__init__(place / "engine")
        self.engine, self.runner = checked_engine(run_ahead=run_ahead, pages=200)
        self.listener = listen(self.path)
        self.server = EngineServer(self.engine, self.listener, 0.0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.gateway = self.link()
        self.gateway.channel.send(GatewayHello(1))
        assert isinstance(self.gateway.next(), EngineReady)

    def launched(self, count: int) -> None:
        """Wait until so many steps were launched."""
        self.until(lambda: self.runner.launched >= count)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not holds():
            assert time.monotonic() < deadline and self.thread.is_alive()
            time.sleep(0.001)

    def execute(self, count: int = 1) -> None:
        """Let the device compute the next steps, once they are there."""
        for _ in range(count):
            self.launched(self.runner.executed + 1)
            self.runner.execute()

    def close(self) -> None:
        for link in self.links:
            link.channel.close()
        self.thread.join(10)
        self.listener.close()
        assert not self.thread.is_alive(), "the loop does not end with its gateway"
        for peer in list(self.server._peers.values()):
            peer.link.close()


@pytest.fixture(params=[0, 1, 2])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    with closing(Served(tmp_path, request.param)) as served:
        yield served


@pytest.fixture
def ahead(tmp_path: Path) -> Iterator[Served]:
    with closing(Served(tmp_path, 1)) as served:
        yield served


class Chat:
    """One sequence of a worker that goes on by rows where it may."""

    def __init__(self, link: Link, number: int) -> None:
        self.link, self.seq = link, link.seq(number)
        self.tokens = [number % 7, 2, 3]
        self.lane = self.token = self.call = self.answered = 0
        link.channel.send(WorkerTurn([OpenSequence(self.seq, "a", 1), self._forward(self.tokens)]))

    def _forward(self, tokens: list[int]) -> object:
        self.call += 1
        return self.link.forward(self.call, self.seq & 0xFFFFFFFFFF, tokens)

    def receive(self) -> None:
        reply = self.link.next()
        assert isinstance(reply, EngineReply) and not reply.results
        ((call, token, logprob, cached, lane),) = DRAWN.iter_unpack(reply.drawn)
        assert call == self.call and reply.number == self.answered + 1
        check_result(self.tokens, GREEDY, ForwardDone(call, token, logprob, cached))
        self.answered, self.token, self.lane = reply.number, token, lane

    def go_on(self) -> None:
        self.tokens.append(self.token)
        if self.lane == NO_LANE:
            turn = WorkerTurn([self._forward([self.token])], self.answered)
        else:
            self.call += 1
            turn = WorkerTurn([], self.answered, CONTINUE.pack(self.call, self.seq, self.lane, self.token))
        self.link.channel.send(turn)


def test_tokens_come_one_by_one_however_slow_the_device(served: Served) -> None:
    chat = Chat(served.worker(1), 10)
    for turn in range(20):
        served.until(lambda: served.runner.launched > served.runner.executed)
        if turn % 3 == 0:
            served.stats()
        served.execute()
        chat.receive()
        chat.go_on()


def test_the_next_step_is_launched_while_one_is_on_the_device(ahead: Served) -> None:
    chat = Chat(ahead.worker(1), 10)
    ahead.launched(2)
    assert ahead.runner.executed == 0
    # Nor more of them than that.
    for _ in range(20):
        ahead.stats()
    assert ahead.runner.launched == 2
    ahead.execute()
    chat.receive()
    chat.go_on()
    ahead.launched(3)
    ahead.execute()
    chat.receive()
    assert ahead.stats().tenants["a"].ahead_tokens == 1


def test_nothing_is_launched_ahead_where_that_is_off(tmp_path: Path) -> None:
    with closing(Served(tmp_path, 0)) as served:
        chat = Chat(served.worker(1), 10)
        served.execute()
        chat.receive()
        for _ in range(20):
            served.stats()
        assert served.runner.launched == 1


def test_a_guest_that_does_not_answer_leaves_the_loop_at_rest(ahead: Served) -> None:
    chat = Chat(ahead.worker(1), 10)
    ahead.execute()
    chat.receive()
    ahead.execute()
    for _ in range(20):
        ahead.stats()
    assert (ahead.runner.launched, ahead.runner.executed) == (2, 2)


def test_a_worker_that_dies_with_steps_in_flight_leaves_nothing(ahead: Served) -> None:
    dying, good = ahead.worker(1), ahead.worker(2)
    Chat(dying, 10)
    ahead.launched(2)
    chat = Chat(good, 20)
    dying.channel.close()
    ahead.until(lambda: ahead.stats().tenants["a"].sequences == 1)
    # The good one's first step comes after what is in flight, and gets pages that those still write.
    while not good.inbox:
        if ahead.runner.launched > ahead.runner.executed:
            ahead.runner.execute()
        good.poll()
    chat.receive()
    for _ in range(5):
        chat.go_on()
        while not good.inbox:
            if ahead.runner.launched > ahead.runner.executed:
                ahead.runner.execute()
            good.poll()
        chat.receive()
    assert ahead.stats().pages_used == 1


def test_the_gateway_is_heard_and_may_go_while_the_device_is_at_work(served: Served) -> None:
    Chat(served.worker(1), 10)
    served.launched(1)
    assert served.stats().tenants["a"].sequences == 1
    served.gateway.channel.close()
    served.thread.join(10)
    assert not served.thread.is_alive() and served.runner.executed == 0


@pytest.mark.parametrize("size", [1, 23, 25, 24 * (MAX_OPERATIONS + 1)])
def test_rows_that_are_not_whole_or_too_many_close_that_worker_only(ahead: Served, size: int) -> None:
    bad, good = ahead.worker(1), ahead.worker(2)
    chat = Chat(good, 20)
    ahead.execute()
    chat.receive()
    bad.channel.send(WorkerTurn([], 0, bytes(size)))
    assert bad.gone()
    chat.go_on()
    ahead.execute(2)
    chat.receive()


def test_rows_wait_behind_the_operations_of_turns_before(ahead: Served) -> None:
    link = ahead.worker(1)
    chat = Chat(link, 10)
    ahead.execute()
    chat.receive()
    # What the row asks for is drawn already, so its answer comes before the sequence goes.
    ahead.execute()
    ahead.stats()
    link.channel.send(WorkerTurn([FreeSequence(link.seq(number)) for number in range(1000, 1000 + 3 * MAX_OPERATIONS)]))
    chat.go_on()
    link.channel.send(WorkerTurn([FreeSequence(chat.seq)]))
    reply = None
    while reply is None:
        if ahead.runner.launched > ahead.runner.executed:
            ahead.runner.execute()
        link.poll()
        reply = link.inbox.pop(0) if link.inbox else None
    # The row came after the flood and before its sequence was freed, or it would have failed.
    assert isinstance(reply, EngineReply) and not reply.results and len(reply.drawn) == DRAWN.size


class NoAdapters:
    """Nothing is ever loaded."""

    stands = False
    _never = os.eventfd(0, os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._never


class Script:
    """An engine with two steps in flight, of which the first is done in its third round of the loop."""

    run_ahead, in_flight, due, may_run_ahead, trace, lanes = 2, 2, False, False, None, 32
    adapters = NoAdapters()

    def __init__(self, step_seconds: float) -> None:
        self.runner, self.step_seconds = self, step_seconds
        self.rounds = 0
        self.done: list[object] = []

    @property
    def claims_can_wait(self) -> bool:
        return self.rounds < 3

    def advance(self) -> None:
        pass

    def claim(self, turns: list[tuple[int, bytes]]) -> None:
        self.done.append([worker for worker, _ in turns])

    def submit(self, worker: int, ops: object) -> None:
        self.done.append(ops)

    def settle(self, wait: bool) -> bool:
        if self.rounds == 3 and self.done[-1] != "settled":
            self.done.append("settled")
            return True
        return False

    def answered_singly(self) -> set[int]:
        return set()

    def take(self) -> dict[int, object]:
        return {}

    def fileno(self) -> int:
        return -1


@pytest.mark.parametrize(
    ("step_seconds", "ops", "done"),
    [
        (1e9, False, [[1, 2, 3]]),
        # A worker's other operations come after what it said before, so that is not kept waiting for them.
        (1e9, True, [[1, 2], [FreeSequence(7)], [3]]),
        # What comes when the step should end soon is taken in at once.
        (CLAIM_SECONDS, False, [[1], [2], [3]]),
    ],
)
def test_rows_of_all_workers_are_taken_in_at_once_before_their_step_is_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float, ops: bool, done: list[object]
) -> None:
    script = Script(step_seconds)
    with closing(listen(str(tmp_path / "s"))) as listener:
        server = EngineServer(script, listener, 0.0)  # type: ignore[arg-type]
        peers = [Peer(link=None, worker=number) for number in (1, 2, 3)]  # type: ignore[arg-type]
        server._workers.update({peer.worker: peer for peer in peers if peer.worker is not None})

        def receive(timeout: float | None) -> None:
            peer = peers[script.rounds]
            script.rounds += 1
            server._turn(
                peer, WorkerTurn([FreeSequence(7)] if ops and peer.worker == 2 else [], 0, bytes(CONTINUE.size))
            )
            server._stopping = script.rounds == 3

        monkeypatch.setattr(server, "_receive", receive)
        server.run()
    assert script.done == [*done, "settled"]


def test_rows_that_were_held_when_all_steps_ended_at_once_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both steps end after the loop has found that calls can wait: then no device and no timer wakes it."""
    with closing(Served(tmp_path, 2)) as served:
        chat = Chat(served.worker(1), 10)
        served.execute()
        chat.receive()
        served.launched(3)
        held: list[bool] = []
        wait = Pipeline.claims_can_wait.fget
        assert wait is not None

        def can_wait(pipeline: Pipeline) -> bool:
            found: bool = wait(pipeline) if not served.server._claims else True
            if served.server._claims and not held:
                held.append(found)
                served.runner.execute()
                served.runner.execute()
            return found

        monkeypatch.setattr(Pipeline, "claims_can_wait", property(can_wait))
        monkeypatch.setattr(served.server, "_hold_until", lambda: float("inf"))
        chat.go_on()
        chat.receive()
        assert held == [True]


def test_rows_do_not_pile_up_while_a_step_takes_long(ahead: Served) -> None:
    link = ahead.worker(1)
    Chat(link, 10)
    ahead.launched(2)
    junk = bytes(CONTINUE.size) * (MAX_OPERATIONS // 2)
    for _ in range(20):
        link.channel.send(WorkerTurn([], 0, junk))
        ahead.stats()
        assert ahead.server._claimed <= ahead.runner.lanes // 2
    # All are heard, at the latest when the step is done: each is a call on no sequence.
    ahead.runner.execute()
    failed = 0
    while failed < 20 * (MAX_OPERATIONS // 2):
        reply = link.next()
        assert isinstance(reply, EngineReply)
        failed += len(reply.results)


class Outlook:
    """An engine of which only matters who could be in its next step."""

    adapters = NoAdapters()

    def __init__(self, in_flight: int, ready: int, held: list[int]) -> None:
        self.run_ahead, self.in_flight, self.trace, self.lanes = 2, in_flight, None, 32
        self.runner = self
        self._outlook = ready, np.array(held, np.int64)

    def outlook(self) -> tuple[int, np.ndarray]:
        return self._outlook

    def fileno(self) -> int:
        return -1


@pytest.mark.parametrize(
    ("in_flight", "ready", "held", "singly", "awaited"),
    [
        (0, 8, [], False, False),  # all of its guests' rows run ahead
        (1, 8, [], False, False),
        (1, 8, [1], False, True),  # one of them has run ahead as far as it may, and there is time
        (0, 8, [1], False, False),  # there is none, and most can go
        (0, 1, [1, 1], False, True),  # most cannot
        (1, 8, [2], False, False),  # another worker's
        (0, 8, [], True, True),  # a guest that cannot run ahead was answered
    ],
)
def test_a_worker_is_awaited_only_if_the_step_would_lack_its_guests(
    tmp_path: Path, in_flight: int, ready: int, held: list[int], singly: bool, awaited: bool
) -> None:
    with closing(listen(str(tmp_path / "s"))) as listener:
        server = EngineServer(Outlook(in_flight, ready, held), listener, 0.0)  # type: ignore[arg-type]
        for number in (1, 2):
            server._workers[number] = Peer(link=None, worker=number, sent=1)  # type: ignore[arg-type]
        server._workers[2].answered = 1
        server._workers[1].singly = singly
        assert [peer.worker for peer in server._awaited()] == ([1] if awaited else [])


def test_a_worker_that_never_answers_is_soon_not_waited_for(tmp_path: Path) -> None:
    engine, _ = checked_engine()
    with closing(listen(str(tmp_path / "s"))) as listener:
        server = EngineServer(engine, listener, 0.0)
        peer = Peer(link=None, worker=1, sent=1)  # type: ignore[arg-type]
        server._workers[1] = peer
        for _ in range(GATHER_PATIENCE):
            assert server._launch_at() > 0
            server._launch()
        assert server._launch_at() == 0
        server._turn(peer, WorkerTurn([], 1))
        peer.sent += 1
        assert server._launch_at() > 0
