"""What is asked for by anybody at any time is found out once a while."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from realm.gateway import protocol
from realm.gateway.recent import Recent
from tests.fake_host import async_test, fake_host


class Source:
    def __init__(self) -> None:
        self.now = 0.0
        self.reads = 0
        self.broken = False

    def read(self) -> int:
        self.reads += 1
        if self.broken:
            raise ValueError("no disk")
        return self.reads


@async_test
async def test_it_is_read_once_a_second(tmp_path: Path) -> None:
    source = Source()
    recent = Recent(source.read, 1.0, lambda: source.now)
    assert await asyncio.gather(*(recent.get() for _ in range(50))) == [1] * 50
    source.now = 0.9
    assert await recent.get() == 1
    source.now = 1.0
    assert await recent.get() == 2
    source.broken, source.now = True, 2.0
    with pytest.raises(ValueError, match="no disk"):
        await recent.get()
    source.broken, source.now = False, 3.0
    assert await recent.get() == 4


@async_test
async def test_one_who_leaves_takes_nothing_from_the_others(tmp_path: Path) -> None:
    source = Source()
    recent = Recent(source.read, 1.0, lambda: source.now)
    calls = [asyncio.create_task(recent.get()) for _ in range(2)]
    await asyncio.sleep(0)
    calls[0].cancel()
    assert await calls[1] == 1 and source.reads == 1


@async_test
async def test_the_description_of_the_host_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_host(tmp_path) as host, host.client() as alice:
        expected = json.loads(protocol.encode([function.describe() for function in protocol.FUNCTIONS.values()]))

        def describe(function: protocol.Function) -> object:
            raise AssertionError("described again")

        monkeypatch.setattr(protocol.Function, "describe", describe)
        for _ in range(2):
            data = await alice.data("metadata")
            assert data["functions"] == expected and data["protocol"] == protocol.PROTOCOL
