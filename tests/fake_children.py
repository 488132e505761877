"""An engine and a guest worker without a model: real processes for the supervisor's tests.

Run as ``-m tests.fake_engine`` and ``-m tests.fake_worker``, with the arguments of the real ones.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
from typing import Any

from realm.channel import BlockingChannel, ChannelClosed, connect, listen
from realm.engine.options import declare
from realm.messages import (
    AdaptersRequest,
    AdapterStates,
    EngineReady,
    EngineReply,
    EngineStats,
    GatewayHello,
    StatsRequest,
    ToEngine,
    WorkerHello,
)
from realm.run_messages import (
    CancelRun,
    GatewayToWorker,
    Output,
    Ping,
    RunFinished,
    Shutdown,
    StartRun,
    Usage,
    WorkerEvents,
)

ENDS = {b"die": 3, b"quit": 0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    declare(parser)
    for name in ("socket", "model", "engine", "gateway", "worker", "cache"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--standby", action="store_true")
    return parser.parse_args()


def engine() -> int:
    """Answers hellos and counters; ends with the gateway's link, as the real one does."""
    options = arguments()
    listener = listen(options.socket)
    peers: dict[int, BlockingChannel[Any]] = {}
    gateway = -1
    while True:
        readable, _, _ = select.select([listener, *peers], [], [])
        for ready in readable:
            if isinstance(ready, socket.socket):
                channel: BlockingChannel[Any] = BlockingChannel(ready.accept()[0], ToEngine)
                peers[channel.fileno()] = channel
                continue
            try:
                for message in peers[ready].receive():
                    if isinstance(message, GatewayHello):
                        gateway = ready
                        peers[ready].send(EngineReady("tiny", 10, 16, 2048, 0.0))
                    elif isinstance(message, StatsRequest):
                        counters = (0,) * 8
                        peers[ready].send(EngineStats(message.call, "tiny", *counters, 0.0, 10, 10, 0, 0, {}))
                    elif isinstance(message, AdaptersRequest):
                        peers[ready].send(AdapterStates(message.call, []))
            except ChannelClosed:
                if ready == gateway:
                    return 0
                peers.pop(ready).close()


def worker() -> int:
    """Echoes its input; ``hang`` never ends by itself, ``die`` ends the process, ``quit`` does so in order."""
    options = arguments()
    if options.standby and not sys.stdin.readline():
        return 0
    gateway: BlockingChannel[Any] = BlockingChannel(connect(options.gateway), GatewayToWorker)
    link: BlockingChannel[Any] = BlockingChannel(connect(options.engine), EngineReply)
    hello = WorkerHello(int(options.worker), os.getpid())
    link.send(hello)
    gateway.send(hello)
    while True:
        select.select([gateway, link], [], [])
        try:
            link.receive()
            for message in gateway.receive():
                match message:
                    case StartRun() if message.input in ENDS:
                        os._exit(ENDS[message.input])
                    case StartRun() if message.input != b"hang":
                        output = Output(message.run, message.input, 1)
                        gateway.send(WorkerEvents([output, RunFinished(message.run, "complete", 0, None, Usage())]))
                    case CancelRun():
                        gateway.send(WorkerEvents([RunFinished(message.run, "cancelled", 0, None, Usage())]))
                    case Ping():
                        gateway.send(WorkerEvents([]))
                    case Shutdown():
                        return 0
        except ChannelClosed:
            return 0
