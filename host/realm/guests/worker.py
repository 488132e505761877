"""The guest worker process: a :class:`GuestRuntime` between two Unix sockets.

Run as ``python -m realm.guests.worker --engine PATH --gateway PATH --model FOLDER --worker N``.
It ends when one of its links closes, so it never outlives the host.
"""

from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from realm import sandbox
from realm.channel import BlockingChannel, ChannelClosed, connect
from realm.engine.trace import Trace
from realm.errors import RealmError
from realm.guests.facts import ModelFacts
from realm.guests.guard import MemoryGuard
from realm.guests.helper import HelperThread
from realm.guests.runtime import GuestRuntime, Turn, tune_collector, tune_switching
from realm.messages import CONTINUE, EngineToWorker, Forward, WorkerHello, WorkerTurn
from realm.models.tokenizer import Tokenizer
from realm.run_messages import (
    CancelRun,
    ClientMessage,
    Credit,
    GatewayToWorker,
    Log,
    Output,
    Ping,
    Shutdown,
    StartRun,
    StoreReply,
    StoreSet,
    TenantShare,
    WorkerEvents,
)

log = logging.getLogger("realm.worker")

FRAME_BYTES = 32 << 20
"""A frame is ended once it has as much; one guest's call adds 4 MiB at most, and a link takes 256."""
FRAME_ITEMS = 16
"""So few messages need not be measured."""
CROWDED_SECONDS = 0.05
"""How often it is looked whether guests have used up their memory: reading that takes 3 us."""


class GuestWorker:
    """Moves messages between the sockets and the runtime; has no state of its own beyond the links."""

    def __init__(
        self,
        runtime: GuestRuntime,
        engine: BlockingChannel[Any],
        gateway: BlockingChannel[Any],
        helper: HelperThread | None = None,
        ceiling: sandbox.Ceiling | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._runtime = runtime
        self._trace = trace
        self._engine = engine
        self._gateway = gateway
        self._ceiling: sandbox.Ceiling = ceiling or sandbox.NoCeiling()
        self._look_at = 0.0
        self._answered = self._told = 0
        self._stopping = False
        self._pinged = False
        self._ready: list[int] = []
        self._poll = select.poll()
        self._poll.register(engine.fileno(), select.POLLIN)
        self._poll.register(gateway.fileno(), select.POLLIN)
        runtime.guard = MemoryGuard(ceiling, helper)
        if helper is not None:
            runtime.helper = helper
            self._poll.register(helper.fileno(), select.POLLIN)

    def run(self) -> None:
        """Serve until told to stop. Raises :class:`ChannelClosed` when a link is gone."""
        serve = self._serve if self._trace is None else partial(self._serve_traced, self._trace)
        turn = Turn()
        while not self._stopping:
            turn = serve(turn)
        self._runtime.close()
        self._send(self._runtime.turn(time.monotonic()), False)

    def _serve(self, turn: Turn) -> Turn:
        """Once around, after ``turn``; the next one."""
        self._wait(turn)
        replied = self._receive()
        turn = self._turn(time.monotonic())
        self._send(turn, replied)
        return turn

    def _serve_traced(self, trace: Trace, turn: Turn) -> Turn:
        """The same with spans of its parts. Their values: calls that wait, guests, calls and other operations."""
        clock = time.perf_counter
        began = clock()
        waits = not turn.busy
        self._wait(turn)
        waited = clock()
        if waits:
            trace.span("wait", began, waited)
        replied = self._receive()
        received = clock()
        trace.span("receive", waited, received, self._runtime.pending_calls)
        turn = self._turn(time.monotonic())
        turned = clock()
        trace.span("turn", received, turned, self._runtime.live)
        self._send(turn, replied)
        trace.span("send", turned, clock(), len(turn.ops) + len(turn.continues) // CONTINUE.size)
        return turn

    def _turn(self, now: float) -> Turn:
        """Let guests run. Messages of the host's own need memory that guests do not get."""
        self._runtime.guard.enter()
        try:
            return self._runtime.turn(now)
        except MemoryError:
            # Not in a guest's own slice, which would have been that guest's end.
            log.error("memory is short: guests have used up their part")
            return Turn(busy=True)
        finally:
            self._runtime.guard.leave()
            if now >= self._look_at:
                self._look_at = now + CROWDED_SECONDS
                if self._ceiling.crowded():
                    self._runtime.relieve(self._ceiling.most)

    def _wait(self, turn: Turn) -> None:
        """Wait until something has arrived or is due. Not at all when guests want to run on."""
        timeout = None
        if turn.busy or self._engine.waiting or self._gateway.waiting:
            timeout = 0
        elif turn.deadline is not None:
            # Rounded up: a wait that ends just before its time-out would only be repeated.
            timeout = max(0, int((turn.deadline - time.monotonic()) * 1000) + 1)
        self._ready = [descriptor for descriptor, _ in self._poll.poll(timeout)]

    def _receive(self) -> bool:
        """Apply what has arrived; True if the engine has replied."""
        # A read of a link that has nothing costs more than all that asks whether it has.
        if self._gateway.waiting or self._gateway.fileno() in self._ready:
            for message in self._gateway.receive():
                self._apply(message)
        if not (self._engine.waiting or self._engine.fileno() in self._ready):
            return False
        replies = self._engine.receive()
        for reply in replies:
            self._runtime.deliver(reply)
            self._answered = reply.number
        return bool(replies)

    def _apply(self, message: GatewayToWorker) -> None:
        match message:
            case StartRun():
                self._runtime.guard.enter()
                try:
                    self._runtime.start(message)
                finally:
                    self._runtime.guard.leave()
            case TenantShare():
                self._runtime.share(message)
            case CancelRun():
                self._runtime.cancel(message)
            case ClientMessage():
                self._runtime.message(message)
            case Credit():
                self._runtime.credit(message)
            case StoreReply():
                self._runtime.store_reply(message)
            case Shutdown():
                self._stopping = True
            case Ping():
                self._pinged = True

    def _send(self, turn: Turn, replied: bool) -> None:
        if turn.ops or turn.continues or replied:
            *parts, last = split(turn.ops)
            continues = turn.continues
            for part in parts:
                # Only the last part says that the guests of this reply have had their chance.
                self._engine.send(WorkerTurn(part, self._told, continues))
                continues = b""
            self._engine.send(WorkerTurn(last, self._answered, continues))
            self._told = self._answered
        if turn.events or self._pinged:
            self._pinged = False
            for part in split(turn.events):
                self._gateway.send(WorkerEvents(part))


def split(items: list[Any]) -> list[list[Any]]:
    """In order, in parts whose frames are not too long, whatever a thousand guests say in one turn."""
    if len(items) <= FRAME_ITEMS:
        return [items]
    parts: list[list[Any]] = []
    part: list[Any] = []
    size = 0
    for item in items:
        part.append(item)
        size += _size(item)
        if size > FRAME_BYTES:
            parts.append(part)
            part, size = [], 0
    if part or not parts:
        parts.append(part)
    return parts


def _size(item: Any) -> int:
    """Bytes that a message carries besides its numbers and names."""
    if isinstance(item, Forward):
        sampling = item.sampling
        more = 0 if sampling is None else len(sampling.mask or b"") + 2 * len(sampling.bias_tokens or b"")
        return len(item.tokens) + more + 200
    if isinstance(item, Output):
        return len(item.data)
    if isinstance(item, StoreSet):
        return len(item.value)
    return 4 * len(item.text) if isinstance(item, Log) else 200


def _contain(reads: list[Path]) -> None:
    """Give up all rights that serving guests does not need. The links are connected, all is loaded."""
    containment = sandbox.enter(sandbox.WORKER, reads=reads)
    log.info("contained by %s", containment)
    for lacking in containment.lacking:
        log.warning("not in force: %s", lacking)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="realm.guests.worker", description="Realm's guest worker process")
    parser.add_argument("--engine", required=True, help="Unix socket of the engine")
    parser.add_argument("--gateway", required=True, help="Unix socket of the gateway")
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--worker", required=True, type=int, help="number of this worker, never used before")
    parser.add_argument("--cache", required=True, type=Path, help="folder with the compiled modules that it may load")
    parser.add_argument(
        "--memory-limit", type=int, default=sandbox.MEMORY_BYTES, help="bytes for itself and all its guests together"
    )
    parser.add_argument("--trace", type=Path, help="file for the spans of its time (realm.engine.trace)")
    parser.add_argument("--standby", action="store_true", help="load all, then connect when a line comes on stdin")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # The terminal's Ctrl-C goes to the whole group; the supervisor decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sandbox.limit(options.memory_limit)
        ceiling = sandbox.DataCeiling()
        tokenizer = Tokenizer(options.model)
        facts = ModelFacts.load(options.model, bos=tokenizer.bos, eos=tokenizer.eos)
    except RealmError as error:
        log.error("%s", error)
        return 1
    try:
        trace = Trace(options.trace, f"worker {options.worker}") if options.trace else None
    except OSError as error:
        log.error("the trace cannot be written: %s", error)
        return 1
    runtime = GuestRuntime(options.worker, tokenizer, facts)
    hello = WorkerHello(options.worker, os.getpid())
    if options.standby and not sys.stdin.buffer.readline():
        return 0
    try:
        engine: BlockingChannel[Any] = BlockingChannel(connect(options.engine), EngineToWorker)
        engine.send(hello)
        gateway: BlockingChannel[Any] = BlockingChannel(connect(options.gateway), GatewayToWorker)
        _contain([options.model, options.cache])
        gateway.send(hello)
        tune_collector()
        tune_switching()
        # One text at a time: threads of the tokenizer would compete with the guests.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        helper = HelperThread()
        try:
            GuestWorker(runtime, engine, gateway, helper, ceiling, trace).run()
        finally:
            helper.close()
    except (ChannelClosed, OSError) as error:
        log.info("worker %d ends: %s", options.worker, error)
    except RealmError as error:
        log.error("%s", error)
        return 1
    except (ValueError, msgspec.MsgspecError):
        log.exception("a process of the host sent a frame that is not ours")
        return 1
    finally:
        runtime.close()
        if trace is not None:
            trace.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
