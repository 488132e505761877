"""The engine process: an :class:`EngineCore` behind a Unix socket.

Run as ``python -m realm.engine.server --socket PATH --model FOLDER``; the gateway and the guest
workers connect. It ends when the gateway's link closes, so it never outlives the host.

Between two steps the loop waits a moment for the workers it has just answered
(:meth:`EngineServer._gather`): their guests are about to call again, and one merged step costs
much less than two halves. A worker says with each turn which reply it has handled, so the wait ends
as soon as all have spoken, and never lasts longer than a fraction of the last step.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from realm.channel import BlockingChannel, ChannelClosed, listen
from realm.engine.core import EngineCore, EngineOptions, load_engine
from realm.engine.kv_cache import PAGE_SIZE
from realm.errors import RealmError
from realm.messages import (
    EngineReady,
    EngineReply,
    GatewayHello,
    StatsRequest,
    ToEngine,
    WorkerHello,
    WorkerLost,
    WorkerTurn,
)

log = logging.getLogger("realm.engine")

GATHER_FRACTION = 0.15
"""Longest wait for just-answered workers, as a part of the last step's time ..."""
GATHER_MINIMUM = 0.002
"""... but at least this many seconds: a guest's turn is mostly under 1 ms ..."""
GATHER_MAXIMUM = 0.010
"""... and at most this many, so that one worker full of busy guests cannot slow the others down."""


@dataclass(slots=True)
class Peer:
    """One connected process. ``answered`` and ``sent`` count replies handled by it and sent to it."""

    channel: BlockingChannel[ToEngine]
    worker: int | None = None
    gateway: bool = False
    sent: int = 0
    answered: int = 0


class EngineServer:
    """Moves messages between sockets and the core; holds no state of its own beyond the peers."""

    def __init__(self, core: EngineCore, listener: socket.socket, load_seconds: float) -> None:
        self._core = core
        self._listener = listener
        self._load_seconds = load_seconds
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._peers: dict[int, Peer] = {}
        self._workers: dict[int, Peer] = {}
        self._last_step = 0.0
        self._stopping = False

    def run(self) -> None:
        """Serve until the gateway goes."""
        core = self._core
        while not self._stopping:
            self._receive(0.0 if core.has_work() else None)
            if not core.has_work():
                continue
            self._gather()
            began = time.perf_counter()
            results = core.step()
            self._last_step = time.perf_counter() - began
            for worker, ready in results.items():
                peer = self._workers.get(worker)
                if peer is not None:
                    peer.sent += 1
                    self._send(peer, EngineReply(peer.sent, ready))

    def _gather(self) -> None:
        """Wait until every worker has handled its last reply, or its time is over."""
        longest = min(GATHER_MAXIMUM, max(GATHER_MINIMUM, GATHER_FRACTION * self._last_step))
        deadline = time.perf_counter() + longest
        while any(peer.answered < peer.sent for peer in self._workers.values()):
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            self._receive(left)

    def _receive(self, timeout: float | None) -> None:
        """Apply what has arrived; waits up to ``timeout`` seconds (None: for ever) for something."""
        for descriptor, _ in self._poll.poll(None if timeout is None else timeout * 1000):
            if descriptor == self._listener.fileno():
                self._accept()
                continue
            peer = self._peers[descriptor]
            try:
                for message in peer.channel.receive():
                    self._handle(peer, message)
            except ChannelClosed:
                self._lost(descriptor, peer)
            except (ValueError, msgspec.MsgspecError):
                log.exception("a peer sent a frame that is not ours; closing its link")
                self._lost(descriptor, peer)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        channel: BlockingChannel[ToEngine] = BlockingChannel(sock, ToEngine)
        self._peers[channel.fileno()] = Peer(channel)
        self._poll.register(channel.fileno(), select.POLLIN)

    def _handle(self, peer: Peer, message: ToEngine) -> None:
        match message:
            case WorkerTurn():
                if peer.worker is None:
                    raise ValueError("a turn before the worker's hello")
                peer.answered = max(peer.answered, message.answered)
                self._core.submit(peer.worker, message.ops)
            case WorkerHello():
                peer.worker = message.worker
                self._workers[message.worker] = peer
            case GatewayHello():
                peer.gateway = True
                config = self._core.config
                pages = self._core.scheduler.pool.total
                self._send(
                    peer, EngineReady(self._core.name, pages, PAGE_SIZE, config.context_length, self._load_seconds)
                )
            case StatsRequest():
                self._send(peer, self._core.stats(message.call))
            case WorkerLost():
                self._core.drop_worker(message.worker)

    def _send(self, peer: Peer, message: object) -> None:
        try:
            peer.channel.send(message)
        except ChannelClosed:
            # Its pages are freed when the poll reports the closed link, in one place.
            log.warning("worker %s went while being answered", peer.worker)

    def _lost(self, descriptor: int, peer: Peer) -> None:
        self._poll.unregister(descriptor)
        del self._peers[descriptor]
        peer.channel.close()
        if peer.worker is not None:
            self._workers.pop(peer.worker, None)
            self._core.drop_worker(peer.worker)
            self._core.check()
        if peer.gateway:
            self._stopping = True


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process; returns its exit status."""
    parser = argparse.ArgumentParser(prog="realm.engine.server", description="Realm's engine process")
    parser.add_argument("--socket", required=True, help="Unix socket to listen on, in a private folder")
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--kv-pages", type=int, default=0, help="pages of 16 tokens; 0 sizes from free memory")
    parser.add_argument("--token-budget", type=int, default=512, help="most tokens a step")
    parser.add_argument("--max-sequences", type=int, default=256, help="most sequences a step")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 is torch's default")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # The terminal's Ctrl-C goes to the whole group; the supervisor decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.perf_counter()
    # Bound before the model is loaded, so that peers can connect and wait.
    listener = listen(options.socket)
    try:
        core = load_engine(
            options.model,
            EngineOptions(
                dtype=options.dtype,
                pages=options.kv_pages,
                token_budget=options.token_budget,
                max_sequences=options.max_sequences,
                threads=options.threads,
            ),
        )
    except RealmError as error:
        log.error("%s", error)
        return 1
    # Weights and code stay for good: keep the collector from walking them in the middle of a step.
    gc.collect()
    gc.freeze()
    log.info("pid %d serves %s", os.getpid(), core.name)
    EngineServer(core, listener, time.perf_counter() - began).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
