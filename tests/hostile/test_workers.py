"""A worker process that is killed: its runs end and say so, and nothing else notices."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from realm_sdk import Client, Finished, Output, RealmError
from tests.e2e.test_stack import until
from tests.hostile.performing import content
from tests.hostile.stage import NEW_TOKENS, PROMPT, Stage, staged, until_quiet

SPINNER = {"fuel_per_run": 1 << 50, "seconds_to_first_call": 60}


@pytest.fixture(scope="module")
def two_workers(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("workers") / "home"
    home.mkdir(mode=0o700)
    (home / "models").symlink_to(model_folder.parent)
    with staged(home, "--model", model_folder.name, "--workers", "2") as stage:
        yield stage


async def busiest_worker(stage: Stage) -> int:
    """The worker that computes most: the one with the spinning guest, where there is one."""
    workers = [psutil.Process(pid) for pid, role in stage.children().items() if role == "realm.guests.worker"]
    before = [sum(process.cpu_times()[:2]) for process in workers]
    while True:
        await asyncio.sleep(0.2)
        spent = [sum(p.cpu_times()[:2]) - was for p, was in zip(workers, before, strict=True)]
        if max(spent) > 0.3:
            return workers[spent.index(max(spent))].pid


async def _running(client: Client, count: int) -> bool:
    return len((await client.ps()).runs) == count


async def _workers(client: Client, count: int) -> bool:
    return (await client.health()).workers == count


async def _processes(stage: Stage, count: int) -> bool:
    return len(stage.children()) == count


async def spin(client: Client) -> RealmError | None:
    try:
        await client.run("spin").text()
    except RealmError as error:
        return error
    return None


def test_kill_a_worker(two_workers: Stage, outcomes: dict[str, str]) -> None:
    stage = two_workers

    async def attack() -> float:
        await stage.add_tenant("mallory", SPINNER)
        before = stage.children()
        async with stage.client("canary") as canary, stage.client("mallory") as mallory:
            await mallory.push("spin", content("endless_loop"))
            await mallory.push("simd", content("simd"))
            spinning = asyncio.create_task(spin(mallory))
            # The spinner has a worker by now, so what is started next gets the other, idle one.
            victim = await asyncio.wait_for(busiest_worker(stage), 30)
            stream = canary.stream(PROMPT, max_tokens=NEW_TOKENS, temperature=0)
            pieces: list[str] = []
            killed = 0.0
            async for piece in stream:
                pieces.append(piece.text)
                if len(pieces) == 3:
                    os.kill(victim, signal.SIGKILL)
                    killed = time.monotonic()
            error = await asyncio.wait_for(spinning, 30)
            assert error is not None and error.code == "worker_lost", error
            assert error.retry_after is not None
            assert pieces == stage.reference
            await until(lambda: _processes(stage, len(before)), 60)
            seconds = time.monotonic() - killed
            after = stage.children()
            # One process is another; the rest, the engine among them, are as they were.
            assert before.keys() - after.keys() == {victim}
            await until(lambda: _workers(mallory, 2), 60)
            joined = time.monotonic() - killed
            async for event in mallory.run("simd"):
                assert not isinstance(event, Output)
        stage.processes = after
        await until_quiet(stage)
        outcomes["worker_killed"] = (
            f"its run: worker_lost; the neighbour's text unchanged; a new process after {seconds:.2f} s, "
            f"serving after {joined:.2f} s"
        )
        return joined

    assert asyncio.run(attack()) > 0


def test_kill_a_worker_with_many_runs(two_workers: Stage, outcomes: dict[str, str]) -> None:
    """Forty runs on both workers, half of them lost: each ends, typed, and pages and places come back."""
    stage = two_workers

    async def attack() -> tuple[int, int]:
        await stage.add_tenant("mallory", SPINNER)
        await stage.add_tenant("many", {"running_guests": 64})
        async with stage.client("many") as client, stage.client("mallory") as mallory:
            await client.push("decode", content("decode_beside"))
            await mallory.push("spin", content("endless_loop"))
            # One for each worker: runs go to the one that has the fewest.
            spinning = [asyncio.create_task(spin(mallory)) for _ in range(2)]
            await until(lambda: _running(mallory, 2), 30)

            async def one() -> str:
                try:
                    async for event in client.run("decode"):
                        if isinstance(event, Finished):
                            return event.outcome
                except RealmError as error:
                    return error.code
                return "nothing"

            runs = [asyncio.create_task(one()) for _ in range(40)]
            await until(lambda: _running(client, 40), 30)
            os.kill(await asyncio.wait_for(busiest_worker(stage), 30), signal.SIGKILL)
            await asyncio.wait(spinning, return_when=asyncio.FIRST_COMPLETED)
            await until(lambda: _running(client, 20), 30)
            for caller in (client, mallory):
                for entry in (await caller.ps()).runs:
                    assert await caller.cancel(entry.run)
            ends = Counter(await asyncio.gather(*runs))
            errors = await asyncio.gather(*spinning)
            assert sorted(error.code for error in errors if error) == ["cancelled", "worker_lost"]
            await until(lambda: _workers(client, 2), 60)
        stage.processes = stage.children()
        await until_quiet(stage)
        assert ends.keys() == {"worker_lost", "cancelled"}, ends
        return ends["worker_lost"], ends["cancelled"]

    lost, left = asyncio.run(asyncio.wait_for(attack(), 100))
    outcomes["worker_killed_with_40_runs"] = f"{lost} runs worker_lost, {left} went on"
    assert lost == left == 20
