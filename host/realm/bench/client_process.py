"""Runs guests through the SDK, for :mod:`realm.bench.clients`, and says when their output came.

Lines of JSON on standard input: the server's URL and a key, then for each case an order and, when it has
been answered, the word to begin; the answer to that is a report.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import msgspec

from realm.bench.clients import Order, Report
from realm_sdk import Client


async def _run_one(client: Client, text: str, new: int) -> float:
    """Run one guest to its end; when its first output came."""
    first: float | None = None
    async for event in client.run("bench", text):
        if event.kind == "output":
            first = first or time.perf_counter()
        elif event.kind == "finished" and event.usage.new_tokens != new:
            raise SystemExit(f"a run drew {event.usage.new_tokens} tokens, not {new}")
    return first or time.perf_counter()


async def serve() -> None:
    """Carry out orders until standard input ends."""

    async def line() -> Any:
        data = await asyncio.to_thread(sys.stdin.buffer.readline)
        return msgspec.json.decode(data) if data else None

    def answer(message: Any) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
        sys.stdout.buffer.flush()

    server = await line()
    async with Client(server["url"], server["key"]) as client:
        while (order := await line()) is not None:
            wanted = msgspec.convert(order, Order)
            answer("ready")
            await line()
            first = await asyncio.gather(*(_run_one(client, text, wanted.new) for text in wanted.inputs))
            answer(Report(first=first, ended=time.perf_counter()))


if __name__ == "__main__":
    asyncio.run(serve())
