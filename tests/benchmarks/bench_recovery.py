"""How long after ``kill -9`` of a guest worker its successor has served a run.

    python -m tests.benchmarks.bench_recovery [--model NAME] [--workers 1,2] [--repeats 20] [--json FILE]

A real ``realm serve``. Each time one worker is killed, and the clock runs until

* ``back``: the gateway counts as many workers as before;
* ``served``: as many runs at a time as there are workers have made a token each. The gateway gives a
  run to the least loaded worker, so one of them is the new one's.

Two cases: ``reserve``, with the worker in reserve ready, as it is a second or two after the last death; and
``none``, where the reserve is killed in the same moment, so that a process has to be started.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from realm.models.store import choose_model
from realm.settings import default_home
from realm_sdk import Client, RealmError
from tests.benchmarks.host import server

SETTLE_SECONDS = 2.5
"""Longer than what counts as an early death, which is followed by a pause."""
CASES = ("reserve", "none")


def guest_workers(host: int) -> list[psutil.Process]:
    """All worker processes by their numbers. The last is the one in reserve, once there is one."""
    found = []
    for child in psutil.Process(host).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            if "realm.guests.worker" in line:
                found.append((int(line[line.index("--worker") + 1]), child))
    return [child for _, child in sorted(found, key=lambda entry: entry[0])]


async def settled(client: Client, host: int, workers: int) -> list[psutil.Process]:
    """Wait until all workers serve and one more is in reserve, and has had the time to load everything."""
    while True:
        found = guest_workers(host)
        if len(found) == workers + 1 and (await client.health()).workers == workers:
            await asyncio.sleep(SETTLE_SECONDS)
            return found
        await asyncio.sleep(0.05)


async def one_token(client: Client) -> None:
    """A run, begun again for as long as it meets the dead worker."""
    while True:
        try:
            await client.generate("The capital of France is", max_tokens=1)
            return
        except RealmError as error:
            if error.code != "worker_lost":
                raise
            await asyncio.sleep(0.002)


async def measure(client: Client, host: int, workers: int, case: str) -> dict[str, float]:
    found = await settled(client, host, workers)
    victims = found[:1] + (found[-1:] if case == "none" else [])
    dead = victims[0].pid
    began = time.perf_counter()
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)
    if workers == 1:
        await one_token(client)
        served = back = time.perf_counter() - began
    else:
        # Until the gateway has noticed the death it still counts the old one.
        while True:
            if not psutil.pid_exists(dead) and (await client.health()).workers >= workers:
                break
            await asyncio.sleep(0.002)
        back = time.perf_counter() - began
        await asyncio.gather(*(one_token(client) for _ in range(workers)))
        served = time.perf_counter() - began
    return {"back": back, "served": served}


async def drive(url: str, key: str, host: int, workers: int, repeats: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with Client(url, key) as client:
        await one_token(client)
        for case in CASES:
            times = [await measure(client, host, workers, case) for _ in range(repeats)]
            found[case] = {name: [time[name] for time in times] for name in ("back", "served")}
        memory = (await settled(client, host, workers))[-1].memory_full_info()
        found["reserve_mb"] = {"rss": memory.rss / 1e6, "unique": memory.uss / 1e6}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="a model in the store; the only one by default")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = choose_model(default_home(), options.model).resolve()
    results: dict[str, Any] = {"load_before": os.getloadavg()[0], "processors": len(os.sched_getaffinity(0))}
    print(f"{'workers':>7} {'case':8} {'back, median':>13} {'worst':>8} {'served, median':>15} {'worst':>8}  (ms)")
    for workers in map(int, options.workers.split(",")):
        with tempfile.TemporaryDirectory() as home, server(Path(home) / "realm", model, workers=workers) as where:
            url, key, host = where
            found = asyncio.run(drive(url, key, host, workers, options.repeats))
        results[str(workers)] = found
        for case in CASES:
            row = [1000 * of(found[case][name]) for name in ("back", "served") for of in (statistics.median, max)]
            print(f"{workers:7} {case:8} {row[0]:13.0f} {row[1]:8.0f} {row[2]:15.0f} {row[3]:8.0f}")
    idle = found["reserve_mb"]
    print(f"the worker in reserve holds {idle['rss']:.0f} MB, {idle['unique']:.0f} MB of them its own")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
