"""Frames on the links between processes, as a process that has been taken over might send them.

The rule: only that peer is dropped. A good worker beside it is served as before, and nothing of the
intruder is left once it has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from realm.channel import BlockingChannel, ChannelClosed, connect, frame
from realm.engine.workers import WORKER_SHIFT
from realm.messages import (
    CONTINUE,
    DRAWN,
    NO_LANE,
    AdapterFile,
    AdapterGone,
    AdaptersRequest,
    ApplyAdapter,
    EndRun,
    EngineOp,
    EngineReady,
    EngineReply,
    EngineStats,
    ForkSequence,
    Forward,
    FreeSequence,
    GatewayHello,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    StatsRequest,
    TruncateSequence,
    WorkerHello,
    WorkerLost,
    WorkerTurn,
)
from realm.run_messages import ErrorInfo, Log, Output, RunFinished, StoreGet, StoreSet, Usage, WorkerEvents
from tests.fake_host import FakeClient
from tests.hostile.fuzz.gateway_host import GOOD, Loop
from tests.hostile.fuzz.problems import Problem
from tests.model_files import write_folder

PATIENCE = 20.0
START_SECONDS = 90.0
GOOD_WORKER = 1
GIVEN_RUN = 0x7EADBEEF
"""Stands for the number of a run that the intruder has been given."""
_encode = msgspec.msgpack.Encoder().encode

EDGES = (0, 1, 2, 3, -1, 255, 1 << 31, (1 << 40) + 1, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, 1.0, 0.5, -1.0, 1e30, 1e-30, float("inf"), float("-inf"), float("nan"))


# --- what an intruder sends -------------------------------------------------------------------------


def integer(random: Random) -> int:
    return random.randrange(6) if random.random() < 0.7 else random.choice(EDGES)


def text(random: Random) -> str:
    return random.choice(["", "a", "canary", "subject", "x" * 300, "\0", "caf\u00e9"])


def anything(random: Random, depth: int = 0) -> Any:
    """Any value that MessagePack can carry."""
    kind = random.randrange(9 if depth < 3 else 6)
    simple = (None, True, integer(random), random.choice(FLOATS), text(random), random.randbytes(random.randrange(9)))
    if kind < 6:
        return simple[kind]
    if kind < 8:
        return [anything(random, depth + 1) for _ in range(random.randrange(6))]
    return {text(random): anything(random, depth + 1) for _ in range(random.randrange(4))}


def tokens(random: Random) -> bytes:
    if random.random() < 0.15:
        return random.randbytes(random.randrange(9))
    most = 264 if random.random() < 0.9 else 1 << 32
    return array("I", [random.randrange(most) for _ in range(random.randrange(20))]).tobytes()


def params(random: Random) -> SamplingParams | None:
    if random.random() < 0.2:
        return None

    def number(good: float) -> float:
        return good if random.random() < 0.8 else random.choice(FLOATS)

    biased = random.random() < 0.2
    return SamplingParams(
        temperature=number(1.0),
        top_k=random.randrange(9) if random.random() < 0.8 else random.choice(EDGES),
        top_p=number(0.9),
        min_p=number(0.1),
        repetition_penalty=number(1.1),
        uniform=number(0.3),
        mask=random.randbytes(random.choice([0, 1, 33, 36, 400])) if random.random() < 0.2 else None,
        bias_tokens=tokens(random) if biased else None,
        bias_values=random.randbytes(4 * random.randrange(20)) if biased else None,
        logprob=random.random() < 0.5,
        key=integer(random) if random.random() < 0.3 else random.getrandbits(64),
        number=integer(random),
    )


def continues(random: Random, worker: int) -> bytes:
    """Calls that go on: of its own sequences, or of any; sometimes not in whole rows."""
    if random.random() < 0.3:
        return b""
    rows = b""
    for _ in range(random.randrange(6)):
        range_of = random.choice([worker] * 8 + [GOOD_WORKER, 0])
        seq = (range_of << WORKER_SHIFT) + random.randrange(5)
        lane = random.randrange(4) if random.random() < 0.8 else random.choice([256, 1 << 31, NO_LANE])
        rows += CONTINUE.pack(random.getrandbits(random.choice([3, 64])), seq, lane, random.randrange(264))
    return rows if random.random() < 0.9 else rows + random.randbytes(random.randrange(30))


def operation(random: Random, worker: int, may_save: bool) -> EngineOp:
    """Numbers are small, so that operations meet the same sequences, and the good worker's."""
    # Numbers of its own range, sometimes the good worker's or any.
    range_of = random.choice([worker] * 8 + [GOOD_WORKER, 0])
    base = range_of << WORKER_SHIFT
    a, b = base + random.randrange(5), base + random.randrange(5)
    if random.random() < 0.1:
        a = random.choice(EDGES)
    match random.randrange(13):
        case 0 | 1 | 2:
            return OpenSequence(a, text(random), random.randrange(4))
        case 3:
            return ForkSequence(a, b)
        case 4:
            return TruncateSequence(a, integer(random))
        case 5:
            return FreeSequence(a)
        case 6 if may_save:
            return SaveSequence(integer(random), a, text(random))
        case 7:
            return OpenSaved(integer(random), a, text(random), integer(random), text(random))
        case 8:
            return EndRun(random.randrange(4))
        case 9:
            return ApplyAdapter(integer(random), a, text(random))
        case _:
            return Forward(integer(random), a, tokens(random), params(random), random.random() < 0.3)


def for_the_gateway_only(random: Random) -> list[Any]:
    """What only the gateway may say. Adapters would be for the good worker's tenant, and for all."""
    path, config = random.choice(["", "/dev/zero", "/proc/self/mem"]), random.choice([b"", b"{}", random.randbytes(9)])
    return [
        StatsRequest(integer(random)),
        WorkerLost(GOOD_WORKER),
        AdapterFile(random.choice(["", "canary"]), text(random), path, "0" * 64, config, True),
        AdapterGone(random.choice(["", "canary"]), text(random)),
        AdaptersRequest(integer(random), random.choice(["", "canary"])),
    ]


def to_engine(random: Random, worker: int, may_save: bool = False) -> Any:
    match random.randrange(20):
        case 0:
            return anything(random)
        case 1:
            return WorkerHello(random.choice([worker, GOOD_WORKER, *EDGES]), integer(random))
        case 2:
            return random.choice([GatewayHello(1), *for_the_gateway_only(random)])
        case 3:
            return random.choice([EngineReady("x", 1, 1, 1, 0.0), EngineReply(1, []), Output(1, b"x", 1)])
        case _:
            ops = [operation(random, worker, may_save) for _ in range(random.randrange(12))]
            return WorkerTurn(ops, integer(random), continues(random, worker))


def event(random: Random) -> Any:
    run = GIVEN_RUN if random.random() < 0.7 else random.choice([1, 2, *EDGES])
    match random.randrange(6):
        case 0:
            return Output(run, random.choice([b"", b"x", b"\xff\xc3", b"y" * 9000]), integer(random))
        case 1:
            return Log(run, text(random), text(random))
        case 2:
            return StoreGet(integer(random), run, text(random))
        case 3:
            return StoreSet(integer(random), run, text(random), random.randbytes(20))
        case 4:
            error = ErrorInfo(text(random), text(random), {text(random): anything(random)}, random.choice(FLOATS))
            return RunFinished(run, random.choice(["complete", "error", "?"]), integer(random), error, Usage())
        case _:
            return RunFinished(run, "complete", 0, None, Usage(integer(random), integer(random)))


def to_gateway(random: Random, worker: int) -> Any:
    match random.randrange(10):
        case 0:
            return anything(random)
        case 1:
            return WorkerHello(random.choice([worker, GOOD_WORKER, *EDGES]), integer(random))
        case 2:
            return random.choice([GatewayHello(1), EngineReply(1, []), WorkerTurn([], 0)])
        case _:
            return WorkerEvents([event(random) for _ in range(random.randrange(8))])


def stream(random: Random, make: Any, worker: int) -> bytes:
    """What one intruder sends: mostly whole messages, mostly after a proper hello."""
    parts = []
    if random.random() < 0.8:
        parts.append(frame(_encode(WorkerHello(worker, os.getpid()))))
    for _ in range(random.randrange(1, 12)):
        data = frame(_encode(make(random, worker)))
        kind = random.randrange(16)
        if kind == 0:
            data = random.randbytes(random.randrange(60))
        elif kind == 1:
            data = frame(random.randbytes(random.randrange(60)))
        elif kind == 2 and len(data) > 4:
            at = random.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        elif kind == 3:
            data = data[: random.randrange(len(data))]
        parts.append(data)
    return b"".join(parts)


# --- the engine's socket ----------------------------------------------------------------------------


class EngineHost:
    """A real engine process of a tiny model, with a gateway and a good worker connected to it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="realm-fuzz-"))
        model = write_folder(self.folder / "tiny")
        path = self.path = str(self.folder / "engine")
        self.log = (self.folder / "log").open("w+b")
        options = ["--socket", path, "--model", str(model), "--dtype", "float32", "--kv-pages", "96", "--threads", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "realm.engine.server", *options], stdout=self.log, stderr=self.log
        )
        self.gateway: BlockingChannel[Any] = BlockingChannel(self._connect(), EngineReady | EngineStats)
        self.gateway.send(GatewayHello(os.getpid()))
        self._answer(self.gateway)
        self.worker: BlockingChannel[Any] = BlockingChannel(connect(path), EngineReply)
        self.worker.send(WorkerHello(GOOD_WORKER, os.getpid()))
        self._number = GOOD_WORKER << WORKER_SHIFT
        self._answered = 0
        self.expected = self.generate()

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return connect(self.path)
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise Problem(f"the engine does not start: {self._output()}") from None
                time.sleep(0.02)

    def _output(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-3000:]

    def _answer(self, channel: BlockingChannel[Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            if messages := channel.receive():
                return messages
            left = deadline - time.monotonic()
            if left <= 0 or self.process.poll() is not None:
                raise Problem(f"the engine does not answer (status {self.process.poll()}): {self._output()}")
            select.select([channel], [], [], min(left, 0.5))

    def generate(self) -> list[int]:
        """What a good worker's guest gets: five greedy tokens of a sequence of its own, going on as before."""
        self._number += 1
        seq, given = self._number, []
        token, lane = 5, NO_LANE
        for call in range(5):
            ops: list[EngineOp] = [] if call else [OpenSequence(seq, "canary", 1)]
            rows = b""
            if lane == NO_LANE:
                ops.append(Forward(call, seq, token.to_bytes(4, "little"), SamplingParams(), False))
            else:
                rows = CONTINUE.pack(call, seq, lane, token)
            self.worker.send(WorkerTurn(ops, self._answered, rows))
            (reply,) = self._answer(self.worker)
            self._answered = reply.number
            if reply.results or len(reply.drawn) != DRAWN.size:
                raise Problem(f"the good worker got {reply}")
            answered, token, _, _, lane = DRAWN.unpack(reply.drawn)
            if answered != call:
                raise Problem(f"the good worker asked {call} and was answered {answered}")
            given.append(token)
        self.worker.send(WorkerTurn([FreeSequence(seq)], self._answered))
        return given

    def stats(self) -> EngineStats:
        self.gateway.send(StatsRequest(7))
        (stats,) = self._answer(self.gateway)
        return stats

    def attack(self, data: bytes, *, deaf: bool = False, may_save: bool = False) -> None:
        """Let one intruder send all this, serve the good worker meanwhile, and let it go.

        Raises:
            Problem: an invariant does not hold.
        """
        before = self.held()
        intruder = connect(self.path)
        try:
            intruder.setblocking(False)
            sent = 0
            deadline = time.monotonic() + PATIENCE
            with contextlib.suppress(ConnectionError):
                while sent < len(data):
                    if time.monotonic() > deadline:
                        raise Problem("the engine reads no more")
                    _, writable, _ = select.select([], [intruder], [], 0.5)
                    if writable:
                        sent += intruder.send(data[sent : sent + 65_536])
                    with contextlib.suppress(BlockingIOError):
                        while not deaf and intruder.recv(1 << 16):
                            pass
            if self.generate() != self.expected:
                raise Problem("the good worker got other tokens")
        finally:
            intruder.close()
        try:
            self._left(before, may_save)
            if self.generate() != self.expected:
                raise Problem("the good worker got other tokens after the intruder had gone")
        except ChannelClosed as closed:
            raise Problem(f"a good peer lost its link: {closed}") from None

    def held(self) -> int:
        """Sequences that the engine has, saved ones included."""
        stats = self.stats()
        if stats.pages_total != stats.pages_free + stats.pages_used + stats.pages_cached:
            raise Problem(f"pages do not add up: {stats}")
        return sum(tenant.sequences for tenant in stats.tenants.values())

    def _left(self, before: int, may_save: bool) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.held() > before:
            if may_save and time.monotonic() > deadline - PATIENCE + 0.1:
                # Copies saved under a name stay, and only those: the next intruders may not add to them.
                return
            if time.monotonic() > deadline:
                raise Problem(f"something of the intruder is left: {self.stats().tenants}")
            time.sleep(0.001)

    def close(self) -> None:
        self.worker.close()
        self.gateway.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Problem("the engine does not end with its gateway") from None
        finally:
            self.log.close()
            shutil.rmtree(self.folder)


def deaf(worker: int) -> bytes:
    """An intruder that asks for more answers than a socket holds and never reads."""
    ask: list[EngineOp] = [Forward(number, (worker << WORKER_SHIFT) + 1, bytes(4), None, True) for number in range(500)]
    turns = [frame(_encode(WorkerTurn(ask, 0)))] * 100
    return b"".join([frame(_encode(WorkerHello(worker, 1))), *turns])


# --- the gateway's socket -----------------------------------------------------------------------------


async def attack_gateway(shared: Loop, data: bytes, pieces: list[int]) -> None:
    """Let one intruder send all this to the gateway's socket for workers, and go; then all must be as before.

    What follows its first frame comes when it may have been given a run, whose number stands where
    :data:`GIVEN_RUN` did.

    Raises:
        Problem: an invariant does not hold.
    """
    host = shared.host
    gateway = host.gateway
    before = set(gateway.runs.workers)
    async with (
        host.client("alice", local_addr=(GOOD, 0)) as alice,
        host.client("bob", local_addr=(GOOD, 0)) as bob,
    ):
        waiting = await alice.start("run", module="echo", input="hang")
        run = (await alice.receive())["data"]["run"]
        reader, writer = await asyncio.open_unix_connection(str(host.sockets / "gateway"))
        first = 4 + int.from_bytes(data[:4], "little")
        victim = 0
        with contextlib.suppress(ConnectionError):
            writer.write(data[:first])
            await asyncio.sleep(0.002)
            victim = await bob.start("run", module="echo", input="hang")
            given = int((await bob.receive())["data"]["run"][1:])
            rest = data[first:].replace(_encode(GIVEN_RUN), b"\xce" + given.to_bytes(4, "big"))
            at = 0
            for size in [*pieces, len(rest)]:
                writer.write(rest[at : at + size])
                await writer.drain()
                await asyncio.sleep(0)
                at += size
            if writer.can_write_eof():
                writer.write_eof()
            # The gateway closes its end when it has read everything, or before.
            while await reader.read(1 << 16):
                pass
        writer.close()
        await _as_before(shared, before)
        # A run of a good worker goes on, and its client alone can end it.
        await alice.send({"id": "end", "function": "cancel", "params": {"run": run}})
        seen = {}
        while len(seen) < 2:
            message = await alice.receive()
            seen[message["id"]] = message
        if seen["end"].get("data") != {"cancelled": True} or seen[waiting]["status"] != "cancelled":
            raise Problem(f"a good worker's run was touched: {seen}")
        await _victim_ends(bob, victim, given)
        answer = await alice.data("run", module="echo", input="a b c", stream=False)
        if answer["text"] != "a b c":
            raise Problem(f"a good worker's guest said {answer}")


async def _as_before(shared: Loop, before: set[int]) -> None:
    workers = shared.host.gateway.runs.workers
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while set(workers) != before:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    if set(workers) != before:
        raise Problem(f"workers were {before} and are {set(workers)}")


async def _victim_ends(client: FakeClient, call: int, run: int) -> None:
    """A run that may have been the intruder's has one last answer, or is with a good worker and can be cancelled."""
    await client.send({"id": "end", "function": "cancel", "params": {"run": f"r{run}"}})
    ended: list[str] = []
    cancelled = False
    while not ended or not cancelled:
        message = await client.receive()
        if message["id"] == "end":
            cancelled = True
        elif message["id"] == call and message["status"] != "streaming":
            ended.append(message["status"])
    await client.data("models.list")
    if len(ended) != 1:
        raise Problem(f"the intruder's run ended with {ended}")
