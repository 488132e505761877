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
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from realm.channel import ChannelClosed, listen
from realm.engine.core import EngineCore, EngineOptions, load_engine
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.links import PeerLink
from realm.engine.workers import MAX_WORKER
from realm.errors import RealmError
from realm.messages import (
    EngineOp,
    EngineReady,
    EngineReply,
    GatewayHello,
    StatsRequest,
    TenantQuota,
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


GATHER_PATIENCE = 8
"""Waits in a row that a worker may use up. Then it is waited for again only after it has answered."""

MAX_PEERS = 1024
"""Connections at a time; further ones are closed at once."""

MAX_OPERATIONS = 8192
"""Operations of one worker between two steps, some 10 ms of work; the rest waits for the next step."""


class _Intruder(ValueError):
    """A peer sent what is not its to send."""


@dataclass(slots=True)
class Peer:
    """One connected process.

    ``answered`` and ``sent`` count replies handled by it and sent to it, ``missed`` the waits for it in
    vain. ``backlog`` are operations that came faster than the engine takes them from one worker.
    """

    link: PeerLink
    worker: int | None = None
    sent: int = 0
    answered: int = 0
    missed: int = 0
    allowance: int = MAX_OPERATIONS
    backlog: deque[EngineOp] = field(default_factory=deque)
    writing: bool = False


class EngineServer:
    """Moves messages between sockets and the core; holds no state of its own beyond the peers.

    A peer that breaks a rule is closed, and nothing else: rules are that the first gateway is the only
    one, that a worker says one hello with a number that is free, and that each sends what is its own.
    """

    def __init__(self, core: EngineCore, listener: socket.socket, load_seconds: float) -> None:
        self._core = core
        self._listener = listener
        self._load_seconds = load_seconds
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._peers: dict[int, Peer] = {}
        self._workers: dict[int, Peer] = {}
        self._gateway: Peer | None = None
        self._last_step = 0.0
        self._stopping = False

    def run(self) -> None:
        """Serve until the gateway goes."""
        core = self._core
        while not self._stopping:
            backlog = any(peer.backlog for peer in self._workers.values())
            self._receive(0.0 if backlog or core.has_work() else None)
            self._submit_backlog()
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
        while late := [p for p in self._workers.values() if p.answered < p.sent and p.missed < GATHER_PATIENCE]:
            left = deadline - time.perf_counter()
            if left <= 0:
                for peer in late:
                    peer.missed += 1
                return
            self._receive(left)

    def _receive(self, timeout: float | None) -> None:
        """Apply what has arrived; waits up to ``timeout`` seconds (None: for ever) for something."""
        for descriptor, events in self._poll.poll(None if timeout is None else timeout * 1000):
            if descriptor == self._listener.fileno():
                self._accept()
                continue
            peer = self._peers.get(descriptor)
            if peer is None:
                continue  # closed by a message that came before in this turn
            if events & select.POLLOUT:
                peer.link.flush()
                self._watch(peer)
            if events & ~select.POLLOUT and not peer.backlog:
                self._read(peer)

    def _read(self, peer: Peer) -> None:
        try:
            for message in peer.link.receive():
                self._handle(peer, message)
                if peer.link.fileno() < 0:
                    return
        except ChannelClosed:
            self._lost(peer)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            # What the frame holds may be a tenant's: only the kind of fault is logged.
            log.error("peer %s broke a rule (%s); closing its link", peer.worker, error)
            self._lost(peer)
        except Exception:
            # A defect that a worker found. What it has is freed, and the check of that tells whether
            # the engine can go on.
            log.exception("a message of peer %s could not be handled; closing its link", peer.worker)
            self._lost(peer)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            log.exception("a connection could not be accepted")
            return
        if len(self._peers) >= MAX_PEERS:
            sock.close()
            return
        peer = Peer(PeerLink(sock))
        self._peers[peer.link.fileno()] = peer
        self._poll.register(peer.link.fileno(), select.POLLIN)

    def _handle(self, peer: Peer, message: ToEngine) -> None:
        match message:
            case WorkerTurn():
                self._turn(peer, message)
            case WorkerHello():
                self._hello(peer, message.worker)
            case GatewayHello():
                if self._gateway is not None or peer.worker is not None:
                    raise _Intruder("there is a gateway already")
                self._gateway = peer
                config = self._core.config
                pages = self._core.scheduler.pool.total
                self._send(
                    peer, EngineReady(self._core.name, pages, PAGE_SIZE, config.context_length, self._load_seconds)
                )
            case _ if peer is not self._gateway:
                raise _Intruder(f"{type(message).__name__} is the gateway's to send")
            case StatsRequest():
                self._send(peer, self._core.stats(message.call))
            case TenantQuota():
                self._core.set_quota(message)
            case WorkerLost():
                lost = self._workers.get(message.worker)
                if lost is not None:
                    self._lost(lost)

    def _hello(self, peer: Peer, worker: int) -> None:
        if peer.worker is not None or peer is self._gateway:
            raise _Intruder("a second hello")
        if worker in self._workers or not 0 <= worker < MAX_WORKER:
            raise _Intruder(f"worker number {worker} is in use or out of range")
        peer.worker = worker
        self._workers[worker] = peer

    def _turn(self, peer: Peer, turn: WorkerTurn) -> None:
        if peer.worker is None:
            raise _Intruder("a turn before the worker's hello")
        if turn.answered > peer.answered:
            peer.answered = min(turn.answered, peer.sent)
            peer.missed = max(0, peer.missed - 1)
        if not peer.backlog and len(turn.ops) <= peer.allowance:
            peer.allowance -= len(turn.ops)
            self._core.submit(peer.worker, turn.ops)
        else:
            peer.backlog.extend(turn.ops)

    def _submit_backlog(self) -> None:
        """Take the next portion of what workers have asked; a new one is allowed for each step."""
        for worker, peer in list(self._workers.items()):
            peer.allowance = MAX_OPERATIONS
            if peer.backlog:
                count = min(len(peer.backlog), MAX_OPERATIONS)
                peer.allowance -= count
                portion = [peer.backlog.popleft() for _ in range(count)]
                try:
                    self._core.submit(worker, portion)
                except Exception:
                    log.exception("operations of worker %s could not be handled; closing its link", worker)
                    self._lost(peer)

    def _send(self, peer: Peer, message: object) -> None:
        if not peer.link.send(message):
            log.error("worker %s does not read its replies; closing its link", peer.worker)
            self._lost(peer)
            return
        self._watch(peer)

    def _watch(self, peer: Peer) -> None:
        """Be told when a peer can take more, while something waits for it."""
        writing = peer.link.unread > 0
        if writing != peer.writing:
            peer.writing = writing
            self._poll.modify(peer.link.fileno(), select.POLLIN | (select.POLLOUT if writing else 0))

    def _lost(self, peer: Peer) -> None:
        descriptor = peer.link.fileno()
        self._poll.unregister(descriptor)
        del self._peers[descriptor]
        peer.link.close()
        if peer.worker is not None:
            del self._workers[peer.worker]
            self._core.drop_worker(peer.worker)
            self._core.check()
        if peer is self._gateway:
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
