"""The engine process through its real socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from realm.channel import BlockingChannel, ChannelClosed
from realm.engine import links
from realm.engine.answers import as_messages
from realm.engine.links import PeerLink
from realm.messages import (
    CallFailed,
    EngineReply,
    ForwardDone,
    FreeSequence,
    GatewayHello,
    LimitMet,
    OpenSequence,
    StatsRequest,
    TenantQuota,
    TruncateSequence,
    WorkerHello,
    WorkerLost,
    WorkerTurn,
)
from tests.engine_link import FROM_ENGINE
from tests.engine_process import Engine, running
from tests.tiny import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-served")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One engine for the tests that leave nothing behind, and check that."""
    yield from running(folder, tmp_path_factory.mktemp("shared"))


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Iterator[Engine]:
    yield from running(folder, tmp_path)


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
            (done,) = as_messages(reply.results, reply.drawn)
            assert isinstance(done, ForwardDone)
            link.channel.send(WorkerTurn([link.forward(turn + 1, seq, [done.token])], reply.number))
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
    good.channel.send(WorkerTurn([good.forward(2, 20, [1])], 1))
    assert isinstance(good.results()[0], ForwardDone)


def rubbish(kind: str) -> bytes:
    """Bytes that a worker never sends."""
    encode = msgspec.msgpack.Encoder().encode
    payloads: dict[str, Any] = {
        "not MessagePack": b"\xc1" * 20,
        "another type": encode({"a": 1}),
        "unknown message": encode(["nothing", 1]),
        "too few fields": encode(["fwd", 1]),
        "wrong types": encode(["turn", "ops", 0]),
        "an operation of wrong types": encode(["turn", [["new", "x", 1, []]], 0]),
        "a number beyond 64 bits": encode(["turn", [["free"]], 0])[:-1] + b"\xcf" + b"\xff" * 8 + b"\x00",
        "deep nesting": encode(["turn", []])[:-1] + b"\x91" * 200_000 + b"\x90",
        "text that is not UTF-8": b"\x93\xa5hello\xa2\xff\xff\x01",
        "empty": b"",
    }
    payload: bytes = payloads[kind]
    return len(payload).to_bytes(4, "little") + payload


@pytest.mark.parametrize(
    "kind",
    [
        "not MessagePack",
        "another type",
        "unknown message",
        "too few fields",
        "wrong types",
        "an operation of wrong types",
        "a number beyond 64 bits",
        "deep nesting",
        "text that is not UTF-8",
        "empty",
    ],
)
def test_a_frame_that_is_no_message_closes_that_peer_only(shared: Engine, kind: str) -> None:
    bad, good = shared.worker(1), shared.worker(2)
    bad.channel.send(WorkerTurn(bad.call(1, 10)))
    bad.next()
    bad.sock.setblocking(True)
    bad.sock.sendall(rubbish(kind))
    assert bad.gone()
    good.channel.send(WorkerTurn(good.call(1, 20)))
    assert isinstance(good.results()[0], ForwardDone)
    good.channel.close()
    shared.until(lambda stats: stats.pages_used == 0)


@pytest.mark.parametrize(
    "message",
    [
        GatewayHello(1),
        StatsRequest(1),
        WorkerLost(2),
        TenantQuota("t20", 1, 1, 1),
        WorkerHello(1, 1),
        WorkerHello(2, 1),
        WorkerHello(3, 1),
    ],
    ids=str,
)
def test_a_worker_that_claims_to_be_somebody_else_is_closed_and_nobody_else_is(shared: Engine, message: Any) -> None:
    bad, good = shared.worker(1), shared.worker(2)
    bad.channel.send(WorkerTurn(bad.call(1, 10)))
    bad.next()
    good.channel.send(WorkerTurn(good.call(1, 20)))
    good.next()
    bad.channel.send(message)
    assert bad.gone()
    stranger = shared.link()
    stranger.channel.send(WorkerHello(2, 1) if isinstance(message, WorkerHello) else message)
    assert stranger.gone()
    good.channel.send(WorkerTurn([good.forward(2, 20, [1])], 1))
    assert isinstance(good.results()[0], ForwardDone)
    assert shared.stats().pages_used == 1
    good.channel.close()
    shared.until(lambda stats: stats.pages_used == 0)


def test_numbers_of_workers_that_would_not_fit_are_refused(shared: Engine) -> None:
    for number in (-1, 1 << 23, (1 << 63) - 1, -(1 << 63)):
        link = shared.link()
        link.channel.send(WorkerHello(number, 1))
        assert link.gone()


def test_limits_come_from_the_gateway(engine: Engine) -> None:
    engine.gateway.channel.send(TenantQuota("", 2, 1000, 1))
    link = engine.worker(1)
    engine.stats()
    link.channel.send(WorkerTurn(link.call(1, 10, count=40)))
    (failed,) = link.results()
    assert isinstance(failed, CallFailed)
    assert failed.limit == LimitMet("kv_pages", 2, 3)


def test_a_worker_that_does_not_read_keeps_nobody_waiting(engine: Engine) -> None:
    """It asks for logits for ever, and its socket fills; a good worker is served, and the deaf one's end
    leaves nothing."""
    deaf, good = engine.worker(1), engine.worker(2)
    deaf.channel.send(WorkerTurn([OpenSequence(deaf.seq(1), "deaf", 1)]))
    for call in range(3000):
        deaf.channel.send(WorkerTurn([deaf.forward(call, 1, [1], logits=True), TruncateSequence(deaf.seq(1), 0)]))
        if call % 100 == 0:
            engine.stats()
    good.channel.send(WorkerTurn(good.call(1, 20)))
    token, answered = 0, 0
    for turn in range(2, 12):
        reply = good.next()
        answered = reply.number
        (done,) = as_messages(reply.results, reply.drawn)
        assert isinstance(done, ForwardDone)
        token = done.token
        good.channel.send(WorkerTurn([good.forward(turn, 20, [token])], answered))
    good.next()
    deaf.channel.close()
    engine.until(lambda stats: stats.pages_used == 1)


def test_a_flood_of_operations_is_taken_in_portions_and_in_order(engine: Engine) -> None:
    flood, good = engine.worker(1), engine.worker(2)
    good.channel.send(WorkerTurn(good.call(1, 20)))
    good.next()
    ops: list[Any] = [FreeSequence(flood.seq(number)) for number in range(100_000)]
    flood.channel.send(WorkerTurn([*flood.call(1, 1), *ops, *flood.call(2, 100_001)]))
    good.channel.send(WorkerTurn([good.forward(2, 20, [1])], 1))
    assert isinstance(good.results()[0], ForwardDone)
    results = flood.results()
    while len(results) < 1:
        results += flood.results()
    # The sequence of the first call is freed by the flood before or after its step; the last call is served.
    while results[-1].call != 2:
        results += flood.results()
    assert isinstance(results[-1], ForwardDone)


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


# --- the parts, without a process -------------------------------------------------------------------


def pair() -> tuple[PeerLink, socket.socket]:
    ours, theirs = socket.socketpair()
    return PeerLink(ours), theirs


def test_what_a_peer_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_UNREAD", 1 << 20)
    link, theirs = pair()
    with theirs:
        reply = EngineReply(1, [CallFailed(1, -1, "x" * 100_000)])
        sent = 0
        while link.send(reply):
            sent += 1
            assert sent < 100
        assert link.unread > 1 << 20
        # What it reads after all arrives whole and in order.
        channel: BlockingChannel[Any] = BlockingChannel(theirs, FROM_ENGINE)
        got: list[Any] = []
        while len(got) <= sent:
            link.flush()
            got += channel.receive()
        assert got == [reply] * (sent + 1)
        assert link.unread == 0
    link.close()


def test_a_frame_longer_than_a_turn_may_be_is_refused_before_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_TURN", 1 << 16)
    link, theirs = pair()
    with theirs:
        theirs.sendall((1 << 20).to_bytes(4, "little") + bytes(1 << 16))
        assert link.receive() == []
        theirs.sendall(bytes(8))
        with pytest.raises(ValueError, match="longer"):
            link.receive()
    link.close()


def test_a_flood_is_read_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "READ_PORTION", 1000)
    monkeypatch.setattr(links, "_READ_SIZE", 500)
    link, theirs = pair()
    with theirs:
        data = msgspec.msgpack.encode(StatsRequest(1))
        theirs.sendall((len(data).to_bytes(4, "little") + data) * 1000)
        total, reads = 0, 0
        while total < 1000:
            got = len(link.receive())
            assert 0 < got <= 1500 // len(data)
            total, reads = total + got, reads + 1
        assert reads > 5
    with pytest.raises(ChannelClosed):
        link.receive()
    link.close()
