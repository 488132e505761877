"""Attacks by number: crowds of guests, starts and cancels, and a client that does not read."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import wasmtime
from websockets.asyncio.client import connect

from realm_sdk import Client, Finished, Output, RealmError
from tests.hostile.performing import content
from tests.hostile.stage import Stage, singing, until_quiet
from tests.wat import guest

HELLO = guest("(call $emit (i32.const 0) (i32.const 5))", "emit", extra='(data (i32.const 0) "hello")')
FORWARD = guest(
    "(call $forward (call $seq_new) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0))", "seq_new", "forward"
)
WAITING = guest(
    """(drop (call $emit (i32.const 0) (i32.const 1)))
    (call $recv (i32.const 0) (i32.const 8) (i32.const -1))""",
    "emit",
    "recv",
)


def wasm(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


@pytest.fixture
def told(request: pytest.FixtureRequest, outcomes: dict[str, str]) -> Iterator[dict[str, str]]:
    """Put ``told["outcome"]`` into the table at the end, under the test's name."""
    found: dict[str, str] = {}
    yield found
    outcomes[request.node.name.removeprefix("test_")] = found.get("outcome", "failed")


async def run_many(client: Client, module: str, count: int) -> Counter[str]:
    """How ``count`` runs at once ended: the result, or the error's code and its limit."""

    async def one() -> str:
        try:
            async for event in client.run(module):
                if isinstance(event, Finished):
                    return f"{event.outcome} {event.code}"
        except RealmError as error:
            limit = error.details.get("name")
            return f"{error.code} ({limit})" if limit else error.code
        raise AssertionError("a run ended without saying how")

    return Counter(await asyncio.gather(*(one() for _ in range(count))))


def test_64_spinning_guests(stage: Stage, told: dict[str, str]) -> None:
    async def attack() -> Counter[str]:
        await stage.add_tenant("spinners", {"fuel_per_run": 30_000_000, "running_guests": 64})
        async with stage.client("spinners") as client:
            await client.push("spin", content("endless_loop"))
            async with singing(stage) as song:
                ends = await run_many(client, "spin", 64)
        song.check(stage)
        await until_quiet(stage)
        return ends

    ends = asyncio.run(attack())
    told["outcome"] = str(dict(ends))
    assert ends == {"fuel_exhausted (fuel_per_run)": 64}


def test_300_runs_at_once_wait_their_turn(stage: Stage, told: dict[str, str]) -> None:
    async def attack() -> Counter[str]:
        await stage.add_tenant("crowd", {"running_guests": 16, "waiting_guests": 300})
        async with stage.client("crowd") as client:
            await client.push("forward", wasm(FORWARD))
            async with singing(stage) as song:
                ends = await run_many(client, "forward", 300)
        song.check(stage)
        await until_quiet(stage)
        return ends

    ends = asyncio.run(attack())
    told["outcome"] = str(dict(ends))
    assert ends == {"complete 0": 300}


def test_more_runs_than_may_wait(stage: Stage, told: dict[str, str]) -> None:
    async def attack() -> None:
        await stage.add_tenant("queue", {"running_guests": 2, "waiting_guests": 3})
        async with stage.client("queue") as client:
            await client.push("waiting", wasm(WAITING))
            async with singing(stage) as song:
                tasks = [asyncio.create_task(run_many(client, "waiting", 1)) for _ in range(9)]
                done: set[asyncio.Task[Counter[str]]] = set()
                while len(done) < 4:
                    more, _ = await asyncio.wait(set(tasks) - done, timeout=60, return_when=asyncio.FIRST_COMPLETED)
                    assert more, "nobody was refused"
                    done |= more
                refused = Counter[str]()
                for task in done:
                    refused += task.result()
                told["outcome"] = f"5 kept; refused: {dict(refused)}"
                (end,) = refused
                assert "waiting_guests" in end and refused[end] == 4
                mine = (await client.ps()).runs
                for run in mine:
                    assert await client.cancel(run.run)
                    assert not await client.cancel(run.run)
                # Cancelled ones make room for those that waited: go on until all have ended.
                while pending := [task for task in tasks if not task.done()]:
                    for run in (await client.ps()).runs:
                        await client.cancel(run.run)
                    await asyncio.wait(pending, timeout=0.05)
        song.check(stage)
        await until_quiet(stage)

    asyncio.run(asyncio.wait_for(attack(), 100))


def test_cancel_storm(stage: Stage, told: dict[str, str]) -> None:
    """Runs cancelled as soon as they are asked for, twice, from two connections, some before they start."""

    async def attack() -> Counter[str]:
        await stage.add_tenant("fickle", {"running_guests": 16, "waiting_guests": 100})
        async with stage.client("fickle") as client, stage.client("fickle") as other:
            await client.push("waiting", wasm(WAITING))

            async def one(number: int) -> str:
                run = client.run("waiting")
                outcome = "nothing"

                async def stop() -> None:
                    await asyncio.sleep(0.01 * (number % 4))
                    await run.cancel()
                    await run.cancel()
                    if run.id is not None:
                        await other.cancel(run.id)

                stopping: asyncio.Task[None] | None = None
                try:
                    async for event in run:
                        if stopping is None:
                            stopping = asyncio.create_task(stop())
                        if isinstance(event, Finished):
                            outcome = event.outcome
                except RealmError as error:
                    outcome = error.code
                if stopping is not None:
                    await stopping
                return outcome

            async with singing(stage) as song:
                ends = Counter(await asyncio.gather(*(one(number) for number in range(80))))
        song.check(stage)
        await until_quiet(stage)
        return ends

    ends = asyncio.run(asyncio.wait_for(attack(), 100))
    told["outcome"] = str(dict(ends))
    assert ends == {"cancelled": 80}


def test_run_storm(stage: Stage, told: dict[str, str]) -> None:
    """Runs that are over at once, 400 over one connection, while 20 connections come and go."""

    async def attack() -> Counter[str]:
        await stage.add_tenant("storm", {"waiting_guests": 400})
        async with stage.client("storm") as client:
            await client.push("hello", wasm(HELLO))

            async def visit() -> None:
                async with stage.client("storm") as visitor:
                    async for event in visitor.run("hello"):
                        if isinstance(event, Output):
                            break

            async with singing(stage) as song:
                ends, *_ = await asyncio.gather(run_many(client, "hello", 400), *(visit() for _ in range(20)))
        song.check(stage)
        await until_quiet(stage)
        return ends

    ends = asyncio.run(attack())
    told["outcome"] = str(dict(ends))
    assert ends == {"complete 0": 400}


def test_a_flood_that_nobody_reads(stage: Stage, told: dict[str, str]) -> None:
    """Guests that emit and log all they may to a client that does not read: they wait, and they alone."""

    async def attack() -> None:
        await stage.add_tenant("deaf", {"output_bytes_per_run": 64 << 20, "fuel_per_run": 10_000_000_000})
        async with stage.client("deaf") as client:
            await client.push("flood", content("emit_flood"))
            await client.push("log", content("log_flood"))
        headers = {"Authorization": f"Bearer {stage.keys['deaf']}"}
        async with singing(stage) as song, stage.client("deaf") as client:
            # A queue of one frame and small buffers: what the server sends soon stays with it.
            socket = await connect(
                stage.url, additional_headers=headers, compression=None, max_queue=1, proxy=None, close_timeout=0.1
            )
            for number in range(10):
                call = {
                    "id": number,
                    "function": "run",
                    "params": {"module": ("flood", "log")[number % 2], "stream": True},
                }
                await socket.send(json.dumps(call))
            deadline = time.monotonic() + 60
            taken: list[int] = []
            while len(taken) < 3 or taken[-1] != taken[-3] or not taken[-1]:
                assert time.monotonic() < deadline, "the floods never came to a stop"
                await asyncio.sleep(0.2)
                taken.append(sum(run.usage.output_bytes for run in (await client.ps()).runs))
            # Five runs want 64 MiB each; far less than one of them is all that is ahead of the client.
            assert taken[-1] < 8 << 20
            told["outcome"] = f"held at {taken[-1] >> 10:,} KiB of 320 MiB, until the client is gone"
            assert (await client.ps()).runs
            socket.transport.abort()
        song.check(stage)
        await until_quiet(stage)

    asyncio.run(attack())


def test_hoarders_of_memory(stage: Stage, told: dict[str, str]) -> None:
    """Guests that together want twice a worker's memory, each within its limit: the neighbour goes on and starts."""

    async def attack() -> Counter[str]:
        limits = {"memory_bytes": 64 << 20, "running_guests": 200, "waiting_guests": 200, "fuel_per_run": 1 << 40}
        await stage.add_tenant("hoarders", limits)
        text = guest(
            """(drop (memory.grow (i32.const 1023)))
            (memory.fill (i32.const 0) (i32.const 1) (i32.shl (memory.size) (i32.const 16)))
            (drop (call $recv (i32.const 0) (i32.const 8) (i32.const 3000))) (i32.const 0)""",
            "recv",
        )
        async with stage.client("hoarders") as client:
            await client.push("hoard", wasm(text))
            async with singing(stage) as song:
                ends = await run_many(client, "hoard", 128)
        song.check(stage)
        await until_quiet(stage)
        return ends

    ends = asyncio.run(attack())
    told["outcome"] = str(dict(ends))
    assert ends.total() == 128
    # What the worker has no room for waits, is told to come back, or gets less memory than it asked for.
    assert all(end in ("complete 0", "busy") or "memory" in end for end in ends), ends


def test_uploads_that_take_long_to_compile(stage: Stage, told: dict[str, str]) -> None:
    """Eight different modules at once, each a second of a compiler's work."""

    async def attack() -> Counter[str]:
        await stage.add_tenant("builders", {})
        bomb = content("compile_bomb")
        ends = Counter[str]()
        async with stage.client("builders") as client, singing(stage) as song:

            async def one(number: int) -> None:
                # A custom section makes the content, and so the artifact, another.
                extra = b"\0\x06\x01n" + number.to_bytes(4, "little")
                try:
                    await client.push(f"bomb-{number}", bomb + extra)
                    ends["stored"] += 1
                except RealmError as error:
                    ends[error.code] += 1

            await asyncio.gather(*(one(number) for number in range(8)))
        song.check(stage)
        await until_quiet(stage)
        return ends

    ends = asyncio.run(attack())
    told["outcome"] = str(dict(ends))
    assert ends.keys() <= {"stored", "busy", "limit_exceeded", "rate_limited", "compile_limit"}
    assert ends["stored"] >= 1
