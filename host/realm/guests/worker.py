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
from pathlib import Path
from typing import Any

import msgspec

from realm.channel import BlockingChannel, ChannelClosed, connect
from realm.errors import RealmError
from realm.guests.facts import ModelFacts
from realm.guests.runtime import GuestRuntime, Turn, tune_collector
from realm.messages import (
    CancelRun,
    ClientMessage,
    Credit,
    EngineToWorker,
    GatewayToWorker,
    Shutdown,
    StartRun,
    StoreReply,
    WorkerEvents,
    WorkerHello,
    WorkerTurn,
)
from realm.models.tokenizer import Tokenizer

log = logging.getLogger("realm.worker")


class GuestWorker:
    """Moves messages between the sockets and the runtime; has no state of its own beyond the links."""

    def __init__(self, runtime: GuestRuntime, engine: BlockingChannel[Any], gateway: BlockingChannel[Any]) -> None:
        self._runtime = runtime
        self._engine = engine
        self._gateway = gateway
        self._answered = 0
        self._stopping = False
        self._poll = select.poll()
        self._poll.register(engine.fileno(), select.POLLIN)
        self._poll.register(gateway.fileno(), select.POLLIN)

    def run(self) -> None:
        """Serve until told to stop. Raises :class:`ChannelClosed` when a link is gone."""
        turn = Turn()
        while not self._stopping:
            self._wait(turn)
            replied = self._receive()
            turn = self._runtime.turn(time.monotonic())
            self._send(turn, replied)
        self._runtime.close()
        self._send(self._runtime.turn(time.monotonic()), False)

    def _wait(self, turn: Turn) -> None:
        if turn.busy:
            return
        timeout = None
        if turn.deadline is not None:
            # Rounded up: a wait that ends just before its time-out would only be repeated.
            timeout = max(0, int((turn.deadline - time.monotonic()) * 1000) + 1)
        self._poll.poll(timeout)

    def _receive(self) -> bool:
        """Apply what has arrived; True if the engine has replied."""
        for message in self._gateway.receive():
            self._apply(message)
        replies = self._engine.receive()
        for reply in replies:
            self._runtime.deliver(reply)
            self._answered = reply.number
        return bool(replies)

    def _apply(self, message: GatewayToWorker) -> None:
        match message:
            case StartRun():
                self._runtime.start(message)
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

    def _send(self, turn: Turn, replied: bool) -> None:
        if turn.ops or replied:
            self._engine.send(WorkerTurn(turn.ops, self._answered))
        if turn.events:
            self._gateway.send(WorkerEvents(turn.events))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="realm.guests.worker", description="Realm's guest worker process")
    parser.add_argument("--engine", required=True, help="Unix socket of the engine")
    parser.add_argument("--gateway", required=True, help="Unix socket of the gateway")
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--worker", required=True, type=int, help="number of this worker, never used before")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # The terminal's Ctrl-C goes to the whole group; the supervisor decides when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        tokenizer = Tokenizer(options.model)
        facts = ModelFacts.load(options.model, bos=tokenizer.bos, eos=tokenizer.eos)
    except RealmError as error:
        log.error("%s", error)
        return 1
    runtime = GuestRuntime(options.worker, tokenizer, facts)
    hello = WorkerHello(options.worker, os.getpid())
    try:
        engine: BlockingChannel[Any] = BlockingChannel(connect(options.engine), EngineToWorker)
        engine.send(hello)
        gateway: BlockingChannel[Any] = BlockingChannel(connect(options.gateway), GatewayToWorker)
        gateway.send(hello)
        tune_collector()
        GuestWorker(runtime, engine, gateway).run()
    except (ChannelClosed, OSError) as error:
        log.info("worker %d ends: %s", options.worker, error)
    except (ValueError, msgspec.MsgspecError):
        log.exception("a process of the host sent a frame that is not ours")
        return 1
    finally:
        runtime.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
