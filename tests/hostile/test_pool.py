"""A KV pool that is smaller than what a tenant wants of it: the neighbour's text stays what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import wasmtime

from realm_sdk import Client, Log, RealmError
from tests.hostile.stage import Stage, singing, staged, until_quiet
from tests.wat import guest

PAGES = 48
HOG = guest(
    """(loop $open
      (local.set $c (call $forward (call $seq_new) (i32.const 0) (i32.const 20) (i32.const 64) (i32.const 0)))
      (br_if $open (i32.lt_u (local.tee $a (i32.add (local.get $a) (i32.const 1))) (i32.const 30))))
    (drop (call $log (i32.const 1) (i32.const 512) (i32.const 4)))
    (loop $again
      (local.set $a (i32.const 1))
      (loop $each
        (drop (call $forward (local.get $a) (i32.const 0) (i32.const 1) (i32.const 64) (i32.const 0)))
        (br_if $each (i32.le_u (local.tee $a (i32.add (local.get $a) (i32.const 1))) (i32.const 30))))
      (br $again))
    (i32.const 0)""",
    "seq_new",
    "forward",
    "log",
    extra='(data (i32.const 512) "full")',
)
"""Holds 30 sequences of two pages and more, and goes on with each in turn, so that all are wanted always."""


@pytest.fixture(scope="module")
def small_pool(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    home = tmp_path_factory.mktemp("pool") / "home"
    home.mkdir(mode=0o700)
    (home / "models").symlink_to(model_folder.parent)
    with staged(home, "--model", model_folder.name, "--workers", "1", "--kv-pages", str(PAGES)) as stage:
        yield stage


async def hog(client: Client, full: asyncio.Event) -> str:
    try:
        async for event in client.run("hog"):
            if isinstance(event, Log) and event.text == "full":
                full.set()
    except RealmError as error:
        return error.code
    return "ended"


def test_a_tenant_that_wants_the_whole_pool(small_pool: Stage, outcomes: dict[str, str]) -> None:
    stage = small_pool

    async def attack() -> tuple[int, int]:
        await stage.add_tenant("hog", {"kv_pages": 1 << 40, "fuel_per_run": 1 << 50, "tokens_per_run": 1 << 40})
        async with stage.client("hog") as client:
            await client.push("hog", bytes(wasmtime.wat2wasm(HOG)))
            full = asyncio.Event()
            hogging = asyncio.create_task(hog(client, full))
            # The neighbour begins in a pool that is full.
            await asyncio.wait_for(full.wait(), 60)
            async with singing(stage) as song:
                pass
            after = await stage.engine()
            assert not hogging.done(), hogging.result()
            for entry in (await client.ps()).runs:
                await client.cancel(entry.run)
            await hogging
        song.check(stage)
        await until_quiet(stage)
        held = after["tenants"]["hog"]
        assert held["sequences"] == 30 and held["pages"] < 60, "the pool holds all: the test does not test"
        return len(song.takes), held["pages"]

    takes, pages = asyncio.run(asyncio.wait_for(attack(), 110))
    outcomes["a_tenant_that_wants_the_whole_pool"] = (
        f"the neighbour's text unchanged {takes} times; it holds {pages} pages of the 60 that it wants, of {PAGES}"
    )
    assert takes
