"""The engine process: an :class:`EngineCore` behind a Unix socket.

Run as ``python -m realm.engine.server --socket PATH --model FOLDER``; the gateway and the guest
workers connect. It ends when the gateway's link closes, so it never outlives the host.

While a step is on the device the loop takes in the next calls, and launches the next step before that
one is done. It waits a moment for workers it has just answered, where the step would lack their guests'
rows otherwise (:meth:`EngineServer._awaited`). A worker says with each turn which reply it has handled, so
the wait ends as soon as all have spoken, and never lasts longer than a fraction of a step.
"""

from __future__ import annotations

import argparse
import contextlib
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
from realm.engine.core import EngineCore
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.links import PeerLink
from realm.engine.loading import load_engine
from realm.engine.options import declare, read
from realm.engine.trace import Trace
from realm.engine.workers import MAX_WORKER
from realm.errors import RealmError
from realm.messages import (
    CONTINUE,
    AdapterFile,
    AdapterGone,
    AdaptersRequest,
    AdapterStates,
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


BUSY_FRACTION = 0.5
"""Part of the running step for which the next one may wait for just-answered workers."""

CLAIM_SECONDS = 0.0003
"""Calls that go on are taken in at least so many seconds before a step's end: that takes 50 to 200 us."""

GATHER_PATIENCE = 8
"""Waits in a row that a worker may use up. Then it is waited for again only after it has answered."""

SWITCH_SECONDS = 0.0001
"""How long another thread, such as the one that reads adapters, may keep the interpreter from the engine's on a GPU,
where a step takes no longer than the 5 ms that Python allows."""

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
    vain. ``singly``: whether the last reply was also for sequences that cannot run ahead. ``backlog`` are
    operations, and rows of calls that go on, that came faster than the engine takes them from one worker.
    """

    link: PeerLink
    worker: int | None = None
    sent: int = 0
    answered: int = 0
    missed: int = 0
    singly: bool = False
    allowance: int = MAX_OPERATIONS
    backlog: deque[EngineOp | bytes] = field(default_factory=deque)
    writing: bool = False


class EngineServer:
    """Moves messages between sockets and the core; holds no state of its own beyond the peers.

    A peer that breaks a rule is closed, and nothing else: rules are that the first gateway is the only
    one, that a worker says one hello with a number that is free, and that each sends what is its own.
    """

    def __init__(
        self, core: EngineCore, listener: socket.socket, load_seconds: float, trace: Trace | None = None
    ) -> None:
        self._core = core
        self._listener = listener
        self._load_seconds = load_seconds
        self._poll = select.poll()
        self._poll.register(listener, select.POLLIN)
        self._peers: dict[int, Peer] = {}
        self._workers: dict[int, Peer] = {}
        self._gateway: Peer | None = None
        self._claims: list[tuple[int, bytes]] = []
        self._claimed = 0
        # Guests have at most one call each that goes on.
        self._most_claimed = core.runner.lanes // 2
        self._stopping = False
        self._ran_out = False
        self._trace = core.trace = trace
        self._most_in_flight = 2 if core.run_ahead else 1
        self._began = self._settled_at = 0.0
        self._done = core.runner.fileno()
        # Whether steps go on after launch, and nothing but asking tells when they are done.
        self._asks = False
        if self._done >= 0:
            self._poll.register(self._done, select.POLLIN)
        self._poll.register(core.adapters.fileno(), select.POLLIN)

    def run(self) -> None:
        """Serve until the gateway goes."""
        core = self._core
        while not self._stopping:
            self._receive(self._patience())
            self._submit_backlog()
            core.advance()
            # Calls that go on are taken in all at once, if they can wait for each other.
            if time.perf_counter() >= self._hold_until() or not core.claims_can_wait:
                self._claim()
            while core.settle(False):
                self._settled_at = time.perf_counter()
            # The step may have ended only after it was asked: with a place free nothing waits.
            if core.in_flight < self._most_in_flight:
                self._claim()
            self._reply()
            if self._may_launch() and time.perf_counter() >= self._launch_at():
                self._launch()

    def _hold_until(self) -> float:
        """Until when calls that go on may wait for each other: not into the time between two steps."""
        core = self._core
        if core.in_flight < self._most_in_flight:
            return 0.0
        return max(self._began, self._settled_at) + core.step_seconds - CLAIM_SECONDS

    def _may_launch(self) -> bool:
        core = self._core
        return core.in_flight < self._most_in_flight and (core.due or (core.may_run_ahead and not self._ran_out))

    def _launch(self) -> None:
        core = self._core
        for peer in self._awaited():
            peer.missed += 1
        busy = core.in_flight > 0
        began = time.perf_counter()
        launched = core.launch()
        # What may not run ahead now may do so after the next message at the earliest.
        self._ran_out = not launched
        if launched:
            if not busy:
                self._began = began
            # A runner that computes within launch is done by now.
            while core.settle(False):
                self._settled_at = time.perf_counter()
            self._asks = core.in_flight > 0 and self._done < 0
            self._reply()

    def _patience(self) -> float | None:
        """How long to wait for messages, in seconds: for ever if there is nothing else to do."""
        core = self._core
        if any(peer.backlog for peer in self._workers.values()):
            return 0.0
        if core.in_flight and self._asks:
            # The device has to be asked; nothing else on this thread is worth more than its next step.
            return 0.0
        if not self._may_launch():
            # The last step may have made room for an adapter after that was asked for.
            return 0.0 if not core.in_flight and core.adapters.stands else None
        left = self._launch_at() - time.perf_counter()
        return 0.0 if left <= 0 or self._asks else left

    def _awaited(self) -> list[Peer]:
        """Workers whose guests are about to call again, without which the next step would be much smaller:
        one step with all of them costs much less than two halves.

        Most guests' rows run ahead and are in the step anyway. Guests that cannot, and those who were told so
        late that their rows have run ahead as far as they may, are waited for while the device has work; an
        idle one waits for the latter only where they are the larger half.
        """
        peers = [p for p in self._workers.values() if p.answered < p.sent and p.missed < GATHER_PATIENCE]
        if not peers or not self._core.run_ahead:
            return peers
        ready, held = self._core.outlook()
        late = set(held.tolist()) if self._core.in_flight or len(held) > ready else set()
        return [peer for peer in peers if peer.singly or peer.worker in late]

    def _launch_at(self) -> float:
        """When to launch the next step: at once if nobody is awaited (:meth:`_awaited`).

        While the device has work it may wait until half of that is done; an idle one waits for a part of
        the last step's time.
        """
        if not self._awaited():
            return 0.0
        if self._core.in_flight:
            return max(self._began, self._settled_at) + BUSY_FRACTION * self._core.step_seconds
        longest = min(GATHER_MAXIMUM, max(GATHER_MINIMUM, GATHER_FRACTION * self._core.step_seconds))
        return self._settled_at + longest

    def _reply(self) -> None:
        """Send what has become ready."""
        began = time.perf_counter()
        count = 0
        # A worker that does not read is lost, and what others had said by then is taken in: that gives more.
        while True:
            singly = self._core.answered_singly()
            results = self._core.take()
            if not results:
                break
            count += len(results)
            for worker, (messages, rows) in results.items():
                peer = self._workers.get(worker)
                if peer is not None:
                    peer.sent += 1
                    peer.singly = worker in singly
                    self._send(peer, EngineReply(peer.sent, messages, rows))
        if count and self._trace is not None:
            self._trace.span("send", began, time.perf_counter(), count)

    def _receive(self, timeout: float | None) -> None:
        """Apply what has arrived; waits up to ``timeout`` seconds (None: for ever) for something."""
        began = time.perf_counter()
        ready = self._poll.poll(None if timeout is None else timeout * 1000)
        if self._trace is not None and timeout != 0:
            self._trace.span("wait", began, time.perf_counter())
            began = time.perf_counter()
        for descriptor, events in ready:
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
        if ready and self._trace is not None:
            self._trace.span("receive", began, time.perf_counter(), len(ready))

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
            case AdapterFile():
                self._core.adapters.register(message)
            case AdapterGone():
                self._core.adapters.forget(message.tenant, message.name)
            case AdaptersRequest():
                self._send(peer, AdapterStates(message.call, self._core.adapters.states(message.tenant)))
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
        self._ran_out = False
        if turn.answered > peer.answered:
            peer.answered = min(turn.answered, peer.sent)
            peer.missed = max(0, peer.missed - 1)
        rows, left = divmod(len(turn.continues), CONTINUE.size)
        if left or rows > MAX_OPERATIONS:
            raise _Intruder(f"{len(turn.continues)} bytes of calls that go on")
        count = len(turn.ops) + rows
        if not peer.backlog and count <= peer.allowance:
            peer.allowance -= count
            if rows:
                self._claims.append((peer.worker, turn.continues))
                self._claimed += rows
            if turn.ops or self._claimed > self._most_claimed:
                # What goes on comes before the other operations of its turn and of those that follow.
                self._claim()
            if turn.ops and self._is_there(peer):
                self._core.submit(peer.worker, turn.ops)
            return
        if rows:
            peer.backlog.append(turn.continues)
        peer.backlog.extend(turn.ops)

    def _claim(self) -> None:
        """Take in the calls that go on, of all turns that have just come."""
        if not self._claims:
            return
        claims, self._claims = self._claims, []
        self._claimed = 0
        began = time.perf_counter()
        try:
            self._core.claim(claims)
        except Exception:
            workers = {worker for worker, _ in claims}
            log.exception("calls of workers %s could not be handled; closing their links", sorted(workers))
            for peer in [peer for peer in self._workers.values() if peer.worker in workers]:
                self._lost(peer)
        if self._trace is not None:
            self._trace.span("claim", began, time.perf_counter(), len(claims))

    def _submit_backlog(self) -> None:
        """Take the next portion of what workers have asked; a new one is allowed for each step."""
        for worker, peer in list(self._workers.items()):
            peer.allowance = MAX_OPERATIONS
            if peer.backlog:
                try:
                    self._submit_portion(worker, peer)
                except Exception:
                    log.exception("operations of worker %s could not be handled; closing its link", worker)
                    self._lost(peer)

    def _is_there(self, peer: Peer) -> bool:
        """Whether a worker's link was not closed meanwhile: what it asks for would be nobody's."""
        return peer.worker is not None and self._workers.get(peer.worker) is peer

    def _submit_portion(self, worker: int, peer: Peer) -> None:
        self._claim()
        if not self._is_there(peer):
            return
        portion: list[EngineOp] = []
        while peer.backlog and peer.allowance > 0:
            first = peer.backlog.popleft()
            if isinstance(first, bytes):
                self._core.submit(worker, portion)
                portion = []
                self._core.submit(worker, [], first)
                peer.allowance -= len(first) // CONTINUE.size
            else:
                portion.append(first)
                peer.allowance -= 1
        self._core.submit(worker, portion)

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
        self._claim()
        if peer.link.fileno() < 0:
            return  # one of those whose calls could not be handled
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
    parser.add_argument("--trace", type=Path, help="record what the process does and when, into this file")
    declare(parser)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # The terminal's Ctrl-C goes to the whole group; the supervisor decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    began = time.perf_counter()
    # Bound before the model is loaded, so that peers can connect and wait.
    listener = listen(parsed.socket)
    with Trace(parsed.trace, "engine") if parsed.trace else contextlib.nullcontext() as trace:
        try:
            core = load_engine(parsed.model, read(parsed, threaded=True))
        except RealmError as error:
            log.error("%s", error)
            return 1
        # Weights and code stay for good: keep the collector from walking them in the middle of a step.
        gc.collect()
        gc.freeze()
        if core.runner.fileno() < 0:
            sys.setswitchinterval(SWITCH_SECONDS)
        log.info("pid %d serves %s", os.getpid(), core.name)
        with contextlib.closing(core):
            EngineServer(core, listener, time.perf_counter() - began, trace).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
