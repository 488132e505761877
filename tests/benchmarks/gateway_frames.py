"""What a streamed frame costs the gateway: CPU of its process for each, alone and coalesced.

``python -m tests.benchmarks.gateway_frames CONNECTIONS RUNS_EACH TURNS``, with ``host`` on the path. The
worker and the clients are processes of their own; every turn of the worker has a piece for every run.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from realm.channel import BlockingChannel
from realm.channel import connect as connect_unix
from realm.messages import WorkerHello
from realm.run_messages import GatewayToWorker, Output, RunFinished, StartRun, Usage, WorkerEvents
from tests.fake_host import eventually, fake_host


def clients(url: str, key: str, connections: int, each: int, result: Any) -> None:
    """Start all runs and count the frames that come."""

    async def read(socket: ClientConnection) -> int:
        frames = ended = 0
        while ended < each:
            frame = await socket.recv(decode=False)
            frames += 1
            ended += b'"complete"' in frame
        return frames

    async def main() -> None:
        header = {"Authorization": f"Bearer {key}"}
        sockets = [await connect(url, compression=None, additional_headers=header) for _ in range(connections)]
        for socket in sockets:
            await socket.recv()
            await socket.recv()
            for call in range(each):
                params = {"prompt": "x", "stream": True}
                await socket.send(json.dumps({"id": f"call-{call}", "function": "generate", "params": params}))
        result.put(sum(await asyncio.gather(*(read(socket) for socket in sockets))))
        for socket in sockets:
            socket.transport.abort()

    asyncio.run(main())


def worker(path: str, count: int, turns: int, go: Any) -> None:
    """A piece for every run in each turn of 2 ms."""
    channel: BlockingChannel[Any] = BlockingChannel(connect_unix(path), GatewayToWorker)
    channel.send(WorkerHello(50, os.getpid()))
    runs: list[int] = []
    while len(runs) < count:
        runs += [message.run for message in channel.receive() if isinstance(message, StartRun)]
        time.sleep(0.001)
    go.get()
    for turn in range(turns):
        channel.send(WorkerEvents([Output(run, b" token", turn + 1) for run in runs]))
        time.sleep(0.002)
        channel.receive()
    channel.send(WorkerEvents([RunFinished(run, "complete", 0, None, Usage()) for run in runs]))
    go.get()


async def measure(connections: int, each: int, turns: int) -> None:
    context = multiprocessing.get_context("spawn")
    result, go = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as home:
        async with fake_host(Path(home), workers=0) as host:
            path = str(host.sockets / "gateway")
            processes = [
                context.Process(target=worker, args=(path, connections * each, turns, go)),
                context.Process(target=clients, args=(host.url, host.keys["alice"], connections, each, result)),
            ]
            processes[0].start()
            await host.gateway.worker_joined.wait()
            await host.gateway.prepare_module("", "generate")
            processes[1].start()
            await eventually(lambda: len(host.gateway.runs.runs) == connections * each)
            await asyncio.sleep(1)
            before = time.process_time()
            go.put(None)
            frames = await asyncio.to_thread(result.get)
            spent = time.process_time() - before
            go.put(None)
            for process in processes:
                await asyncio.to_thread(process.join)
    print(
        f"{connections} connections, {each} runs each, {turns} turns: {frames} frames, "
        f"{1e6 * spent / frames:.1f} µs of the gateway's CPU for each"
    )


if __name__ == "__main__":
    asyncio.run(measure(*map(int, sys.argv[1:4])))
