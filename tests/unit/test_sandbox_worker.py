"""The real worker process, contained: what it holds, what it may, and its ceiling of memory.

Its engine and gateway are played by the test.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wasmtime

from realm.channel import BlockingChannel, listen
from realm.guests.fibers import Engine
from realm.messages import EngineReply, ToEngine, WorkerTurn
from realm.run_messages import Output, Ping, RunFinished, RunLimits, StartRun, WorkerEvents, WorkerToGateway
from realm.sandbox import kernel
from realm.sandbox.kernel import Lacking
from tests.fakes import FakeEngine, greedy
from tests.model_files import write_folder
from tests.wat import GENERATE, SPIN, guest, sampling

HOST = Path(__file__).parents[2] / "host"
CEILING = 700 << 20
ENGINE = Engine()
# Grows in steps of 1 MiB for as long as it can, and keeps it for a while; its code is the number of pages.
GROW = guest(
    """
    (loop $l (br_if $l (i32.ge_s (memory.grow (i32.const 16)) (i32.const 0))))
    (drop (call $recv (i32.const 0) (i32.const 16) (i32.const 1000)))
    (memory.size)""",
    "recv",
)
# Page by page, and then tables until there is nothing left for those either.
HOARD = guest(
    """
    (loop $l (br_if $l (i32.ge_s (memory.grow (i32.const 1)) (i32.const 0))))
    (loop $t (br_if $t (i32.ge_s (table.grow (ref.null func) (i32.const 64)) (i32.const 0))))
    (loop $w
      (call $log (i32.const 1) (i32.const 0) (i32.const 60000)) (drop)
      (br_if $w (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 200))))
    (drop (call $recv (i32.const 0) (i32.const 16) (i32.const 1000)))
    (memory.size)""",
    "log",
    "recv",
    extra="(table 1 funcref)",
)
BIG = guest("(memory.size)", memory="1000")


class Worker:
    """A worker in its process, with both other ends of its links."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        model, self.cache = folder / "model", folder / "cache"
        write_folder(model)
        self.cache.mkdir()
        self._listeners = [listen(str(folder / name)) for name in ("engine", "gateway")]
        self._started = 0
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "realm.guests.worker"),
                    *("--engine", str(folder / "engine"), "--gateway", str(folder / "gateway")),
                    *("--model", str(model), "--worker", "5", "--cache", str(self.cache)),
                    *arguments,
                ],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HOST), "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stderr=log,
            )
        self.core = FakeEngine()
        self.events: list[Any] = []
        self.messages = 0
        self._replies = 0
        self._channels: list[BlockingChannel[Any]] = []

    def connect(self) -> None:
        ends = []
        for listener in self._listeners:
            while not select.select([listener], [], [], 0.1)[0]:
                assert self.process.poll() is None, self.log.read_text()
            ends.append(listener.accept()[0])
        self.engine: BlockingChannel[Any] = BlockingChannel(ends[0], ToEngine)
        self.gateway: BlockingChannel[Any] = BlockingChannel(ends[1], WorkerToGateway)
        self._channels += [self.engine, self.gateway]

    def waits(self) -> bool:
        """Whether it has connected nothing."""
        return not select.select(self._listeners, [], [], 0)[0]

    def start(self, wat: str, **limits: Any) -> int:
        """Start a run; its number."""
        self._started += 1
        artifact = self.cache / f"{zlib.crc32(wat.encode())}.cwasm"
        if not artifact.exists():
            artifact.write_bytes(wasmtime.Module(ENGINE.inner, wasmtime.wat2wasm(wat)).serialize())
        digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
        message = StartRun(self._started, "a", "m", str(artifact), sampling(), 7, RunLimits(**limits))
        message.artifact_sha256 = digest
        self.gateway.send(message)
        return self._started

    def step(self) -> None:
        """Take what the worker says, and be its engine."""
        select.select([self.engine, self.gateway], [], [], 10)
        for message in self.gateway.receive():
            self.messages += 1
            if isinstance(message, WorkerEvents):
                self.events += message.events
        for message in self.engine.receive():
            if isinstance(message, WorkerTurn):
                self.core.submit(message.ops, message.continues)
        if self.core.results:
            self._replies += 1
            self.engine.send(EngineReply(self._replies, *self.core.take()))

    def finished(self, run: int) -> RunFinished:
        """How a run ends, once it does."""
        while True:
            for event in self.events:
                if isinstance(event, RunFinished) and event.run == run:
                    return event
            self.step()

    def output(self, run: int) -> bytes:
        return b"".join(event.data for event in self.events if isinstance(event, Output) and event.run == run)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        for listener in self._listeners:
            listener.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def start(*arguments: str) -> Worker:
        made.append(Worker(tmp_path, *arguments))
        return made[-1]

    yield start
    for worker in made:
        worker.close()


def may_trace() -> bool:
    """Whether this process has CAP_SYS_PTRACE."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.split("CapEff:")[1].split()[0], 16) >> 19 & 1)


def greedy_text(steps: int = 12) -> bytes:
    """What GENERATE emits."""
    tokens = [5]
    for _ in range(steps):
        tokens.append(greedy(tokens))
    return bytes(tokens[1:])


def test_it_is_contained_and_serves(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.connect()
    run = worker.start(GENERATE)
    assert worker.finished(run).error is None
    assert worker.output(run) == greedy_text()
    log = worker.log.read_text()
    for name, word, probe in (
        ("seccomp", "seccomp", kernel.seccomp_number),
        ("landlock", "Landlock", kernel.landlock_abi),
    ):
        try:
            probe()
        except Lacking as lacking:
            assert f"not in force: {lacking}" in log
        else:
            assert f"not in force: {name}" not in log
            assert word in next(line for line in log.splitlines() if "contained by" in line)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines())
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == ("2" if "seccomp" in log else "0")


def test_it_holds_its_streams_and_links_only(make: Callable[..., Worker]) -> None:
    """Even if the host's process hands it more."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    worker = make()
    worker.connect()
    worker.finished(worker.start(GENERATE))
    os.close(reader)
    os.close(writer)
    folder = Path(f"/proc/{worker.process.pid}/fd")
    try:
        links = {int(entry.name): str(entry.readlink()) for entry in folder.iterdir()}
    except PermissionError:
        # It is not dumpable: only who may trace every process can look into it.
        assert not may_trace()
        return
    assert [at for at in links if at <= 2] == [0, 1, 2]
    rest = [link for at, link in links.items() if at > 2]
    assert sum(link.startswith("socket:") for link in rest) == 2
    # Of anything else only nameless memory, pipes between its own threads, and a count of its own pages.
    for link in rest:
        own = f"/proc/{worker.process.pid}/statm"
        assert link.startswith(("socket:", "pipe:", "/memfd:")) or link == own, links


def test_a_worker_in_reserve_connects_nothing_until_it_is_told(make: Callable[..., Worker]) -> None:
    worker = make("--standby")
    assert worker.process.stdin is not None
    # It reads its standard input once everything is loaded.
    while psutil.Process(worker.process.pid).memory_info().rss < 30 << 20:
        time.sleep(0.05)
    assert worker.waits()
    worker.process.stdin.write(b"go\n")
    worker.process.stdin.flush()
    worker.connect()
    assert worker.finished(worker.start(GENERATE)).error is None


def test_a_worker_in_reserve_ends_with_its_host(make: Callable[..., Worker]) -> None:
    worker = make("--standby")
    assert worker.process.stdin is not None
    worker.process.stdin.close()
    assert worker.process.wait(60) == 0
    assert worker.waits()


def test_it_answers_a_ping_while_a_guest_computes(make: Callable[..., Worker]) -> None:
    worker = make()
    worker.connect()
    worker.start(SPIN)
    for _ in range(3):
        before = worker.messages
        worker.gateway.send(Ping())
        while worker.messages == before:
            worker.step()
    assert not worker.events


def test_it_reads_only_modules_of_the_cache(make: Callable[..., Worker], tmp_path: Path) -> None:
    worker = make()
    worker.connect()
    assert worker.finished(worker.start(GENERATE)).error is None
    (inside,) = worker.cache.iterdir()
    outside = tmp_path / "elsewhere.cwasm"
    outside.write_bytes(inside.read_bytes())
    linked = worker.cache / "linked.cwasm"
    linked.symlink_to(outside)
    try:
        kernel.landlock_abi()
    except Lacking:
        assert "not in force: landlock" in worker.log.read_text()
        return
    for number, path in ((1001, outside), (1002, linked), (1003, Path("/etc/passwd"))):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        message = StartRun(number, "a", "m", str(path), sampling(), 7, RunLimits())
        message.artifact_sha256 = digest
        worker.gateway.send(message)
        error = worker.finished(number).error
        assert error is not None, path
    assert worker.finished(worker.start(GENERATE)).error is None


def test_memory_beyond_the_ceiling_is_the_guests_trouble(make: Callable[..., Worker]) -> None:
    worker = make("--memory-limit", str(CEILING))
    worker.connect()
    quiet = worker.start(GENERATE)
    growing = [worker.start(GROW, memory_bytes=256 << 20) for _ in range(8)]
    ends = [worker.finished(run) for run in growing]
    # All together get no more than there is. Those that come when it is used up are told to come again, and
    # the largest may have to go.
    assert sum(end.code for end in ends) << 16 < CEILING
    errors = {end.error.code for end in ends if end.error is not None}
    assert errors and errors <= {"busy", "memory_limit"}
    assert all(end.error.retry_after for end in ends if end.error is not None)
    assert worker.finished(quiet).error is None and worker.output(quiet) == greedy_text()
    after = worker.start(GENERATE)
    assert worker.finished(after).error is None and worker.output(after) == greedy_text()


@pytest.mark.parametrize("size", [1000, 100_000])
def test_no_memory_for_guests_is_memory_for_the_tokenizer(make: Callable[..., Worker], size: int) -> None:
    """Native code that gets no memory aborts its process: a text is tokenized here, or in the helper if it is long."""
    cram = guest(
        f"""
        (memory.fill (i32.const 65536) (i32.const 97) (i32.const {size}))
        (loop $g (br_if $g (i32.ge_s (memory.grow (i32.const 16)) (i32.const 0))))
        (loop $h (br_if $h (i32.ge_s (memory.grow (i32.const 1)) (i32.const 0))))
        (loop $l
          (drop (call $tokenize (i32.const 65536) (i32.const {size}) (i32.const 0) (i32.const 400000)
            (i32.const 100000)))
          (br_if $l (i32.lt_u (local.tee $a (i32.add (local.get $a) (i32.const 1))) (i32.const 12))))
        (i32.const 0)""",
        "tokenize",
        memory="16",
    )
    worker = make("--memory-limit", str(CEILING))
    worker.connect()
    ends = [worker.finished(run) for run in [worker.start(cram, memory_bytes=256 << 20) for _ in range(8)]]
    errors = {end.error.code for end in ends if end.error is not None}
    assert errors and errors <= {"busy", "memory_limit"}
    assert worker.process.poll() is None
    after = worker.start(GENERATE)
    assert worker.finished(after).error is None and worker.output(after) == greedy_text()


def test_guests_that_take_the_last_byte(make: Callable[..., Worker]) -> None:
    worker = make("--memory-limit", str(CEILING))
    worker.connect()
    quiet = [worker.start(GENERATE) for _ in range(8)]
    hoarding = [worker.start(HOARD, memory_bytes=64 << 20, log_bytes=16 << 20) for _ in range(24)]
    big = [worker.start(BIG) for _ in range(4)]
    ends = [worker.finished(run) for run in (*hoarding, *big)]
    errors = {end.error.code for end in ends if end.error is not None}
    assert errors & {"busy", "memory_limit"} and errors <= {"busy", "memory_limit", "guest_trap", "internal"}
    # Who asks for nothing more is not hurt.
    for run in quiet:
        assert worker.finished(run).error is None and worker.output(run) == greedy_text()
    # The worker is alive, and as good as new once they are gone.
    assert worker.process.poll() is None
    after = worker.start(GROW, memory_bytes=256 << 20)
    # From 1 in steps of 16 to the last below its own limit.
    assert worker.finished(after).code == 4081


def test_no_signal_of_a_dead_parent_is_needed(make: Callable[..., Worker]) -> None:
    """A worker ends with its links, in order."""
    worker = make()
    worker.connect()
    worker.start(SPIN)
    worker.step()
    worker.engine.close()
    assert worker.process.wait(20) == 0
