"""Compiled modules by hash: in whose turn they are made, with which file, and when they count as used."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from realm.errors import RealmError
from realm.gateway.artifacts import Artifacts
from tests.fake_host import FakeCompiled, async_test, eventually


class Compiler:
    """Reads the module when it begins, and is done with it when told."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.held: dict[bytes, asyncio.Event] = {}
        self.on_begin: Callable[[], None] | None = None

    def hold(self, content: bytes) -> asyncio.Event:
        event = self.held[content] = asyncio.Event()
        return event

    async def __call__(self, wasm: Path, cache: Path) -> FakeCompiled:
        try:
            content = await asyncio.to_thread(wasm.read_bytes)
        except OSError as error:
            raise RealmError("module_invalid", "the module cannot be read") from error
        self.begun.append(content)
        if self.on_begin is not None:
            self.on_begin()
        if content in self.held:
            await self.held[content].wait()
        sha256 = hashlib.sha256(content).hexdigest()
        artifact = cache / f"{sha256}.cwasm"
        artifact.write_bytes(content)
        return FakeCompiled(artifact, sha256, sha256)


class Bench:
    def __init__(self, folder: Path, compiles: int = 2) -> None:
        self.folder = folder
        self.compiler = Compiler()
        self.now = 1000.0
        self.running: list[str] = []
        self.artifacts = Artifacts(
            folder / "cache", self.compiler, compiles, in_use=lambda: self.running, clock=lambda: self.now
        )
        self.number = 0

    def commit(self, tenant: str, content: bytes, *, builtin: bool = False) -> asyncio.Task[FakeCompiled]:
        """As a client's call does: its file goes when the call ends."""

        async def call() -> FakeCompiled:
            self.number += 1
            file = self.folder / f"file-{self.number}"
            file.write_bytes(content)
            try:
                made = await self.artifacts.make(hashlib.sha256(content).hexdigest(), file, tenant, builtin=builtin)
                assert isinstance(made, FakeCompiled)
                return made
            finally:
                if not builtin:
                    file.unlink()

        return asyncio.create_task(call())

    def files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_file()]


async def until_asked(bench: Bench, count: int) -> None:
    await eventually(lambda: sum(sum(job.askers.values()) for job in bench.artifacts._making.values()) == count)


async def leave(*calls: asyncio.Task[FakeCompiled]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


@async_test
async def test_content_of_one_who_left_is_made_for_the_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path, compiles=1)
    slow = bench.compiler.hold(b"slow")
    first = bench.commit("alice", b"slow")
    await eventually(lambda: bench.compiler.begun == [b"slow"])
    second = bench.commit("alice", b"shared")
    await until_asked(bench, 2)
    other = bench.commit("bob", b"shared")
    await until_asked(bench, 3)
    # Her file is gone, and what it was made for is not.
    await leave(first, second)
    slow.set()
    assert (await other).sha256 == hashlib.sha256(b"shared").hexdigest()
    assert bench.compiler.begun == [b"slow", b"shared"]
    await eventually(lambda: not bench.artifacts._making)
    assert not bench.files()


@async_test
async def test_shared_content_is_made_in_whichever_turn_comes_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    slow = bench.compiler.hold(b"slow")
    first = bench.commit("alice", b"slow")
    await eventually(lambda: bench.compiler.begun == [b"slow"])
    second = bench.commit("alice", b"shared")
    await until_asked(bench, 2)
    # Bob is not behind what alice has queued before; and she gets it, too.
    made = await bench.commit("bob", b"shared")
    assert await second is made and not first.done()
    assert bench.compiler.begun == [b"slow", b"shared"]
    slow.set()
    await first
    # Her turn is free again.
    await bench.commit("alice", b"third")
    assert not bench.artifacts._making and not bench.files()


@async_test
async def test_what_nobody_waits_for_is_given_up_before_it_begins(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    slow = bench.compiler.hold(b"slow")
    first = bench.commit("alice", b"slow")
    await eventually(lambda: bench.compiler.begun == [b"slow"])
    calls = [bench.commit("alice", b"%d" % number) for number in range(20)]
    twice = bench.commit("alice", b"0")
    await until_asked(bench, 22)
    await leave(*calls)
    # One of two who asked for the same left.
    assert len(bench.artifacts._making) == 2
    await leave(first)
    # What has begun is finished: it may well be asked for again.
    slow.set()
    await twice
    assert bench.compiler.begun == [b"slow", b"0"] and not bench.files()
    assert bench.artifacts.known(hashlib.sha256(b"slow").hexdigest()) is not None


@async_test
async def test_a_failure_reaches_all_and_is_not_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def fail() -> None:
        raise RealmError("compile_limit", "too much")

    slow = bench.compiler.hold(b"slow")
    first = bench.commit("alice", b"slow")
    await eventually(lambda: bench.compiler.begun == [b"slow"])
    bench.compiler.on_begin = fail
    calls = [bench.commit("alice", b"x"), bench.commit("bob", b"x")]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, RealmError) and error.code == "compile_limit"
    bench.compiler.on_begin = None
    slow.set()
    await first
    await bench.commit("alice", b"x")
    assert not bench.files()


@async_test
async def test_closing_ends_everything(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.compiler.hold(b"slow")
    calls = [bench.commit("alice", b"slow")]
    await eventually(lambda: bench.compiler.begun == [b"slow"])
    calls += [bench.commit("alice", b"x"), bench.commit("alice", b"y"), bench.commit("bob", b"slow")]
    await until_asked(bench, 4)
    await bench.artifacts.close()
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended)
    assert not bench.artifacts._making and not bench.files()


def mtime(made: FakeCompiled) -> float:
    return made.artifact.stat().st_mtime


@async_test
async def test_a_used_artifact_is_marked_once_a_minute(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    made = await bench.commit("alice", b"x")
    for seconds, marked in [(0.0, True), (1.0, False), (58.0, False), (1.0, True), (59.0, False), (61.0, True)]:
        bench.now += seconds
        os.utime(made.artifact, (1000, 1000))
        assert bench.artifacts.known(made.sha256) is made
        assert (mtime(made) > 1000) is marked, seconds


@pytest.mark.parametrize("why", ["builtin", "running", "neither"])
@async_test
async def test_what_is_in_use_counts_as_used_when_another_is_compiled(tmp_path: Path, why: str) -> None:
    bench = Bench(tmp_path)
    made = await bench.commit("alice", b"x", builtin=why == "builtin")
    os.utime(made.artifact, (1000, 1000))
    if why == "running":
        bench.running.append(made.sha256)
    bench.running.append("0" * 64)
    seen: list[float] = []
    # Before the compiler begins, since it begins by sweeping.
    bench.compiler.on_begin = lambda: seen.append(mtime(made))
    await bench.commit("bob", b"y")
    assert (seen[0] > 1000) is (why != "neither")


@async_test
async def test_an_artifact_that_is_gone_is_not_known(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    made = await bench.commit("alice", b"x", builtin=True)
    made.artifact.unlink()
    assert bench.artifacts.known(made.sha256) is None
    assert (await bench.commit("bob", b"y")).artifact.exists()
