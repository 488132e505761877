"""A worker outlives its guests: whatever fails while one is started or run is that run's error alone."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from realm.guests import runtime as runtime_module
from realm.guests import starting
from realm.guests.fiber_types import EngineFailure, FiberState
from realm.guests.fibers import Fiber
from realm.guests.run import MESSAGE_BYTES
from realm.run_messages import ClientMessage, RunFinished
from tests.fakes import VOCAB, FakeTokenizer, Host
from tests.wat import GENERATE, SPIN, expected, guest, sampling


def check_neighbour(host: Host, run: int) -> None:
    host.settle()
    assert host.output(run) == expected()
    host.check_empty()


def ended(host: Host, run: int) -> RunFinished:
    end = host.finished(run)
    assert end is not None
    return end


@pytest.mark.parametrize(("error", "code"), [(MemoryError(), "busy"), (EngineFailure("no"), "internal")])
def test_a_fiber_that_cannot_be_made(error: Exception, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    good = host.start(GENERATE, input=sampling())
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        patch.setattr(starting, "Fiber", fail)
        bad = host.start(SPIN)
    host.turn()
    end = ended(host, bad)
    assert end.error is not None
    assert end.error.code == code
    assert (end.error.retry_after is not None) == (code == "busy")
    check_neighbour(host, good)


@pytest.mark.parametrize("error", [MemoryError(), EngineFailure("no"), RuntimeError("a defect")])
def test_a_poll_that_fails(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    bad = host.start(SPIN)
    good = host.start(GENERATE, input=sampling())
    poll = Fiber.poll
    broken = host.runtime._runs[bad].fiber

    def fail(this: Fiber) -> FiberState:
        if this is broken:
            raise error
        return poll(this)

    monkeypatch.setattr(Fiber, "poll", fail)
    check_neighbour(host, good)
    end = ended(host, bad)
    assert end.error is not None
    assert end.error.code == ("busy" if isinstance(error, MemoryError) else "internal")
    assert "a defect" not in end.error.message


def test_an_answer_that_cannot_be_written_is_that_guests_error(caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    bad = host.start(guest("(call $recv (i32.const 0) (i32.const 16) (i32.const 5000))", "recv"))
    good = host.start(GENERATE, input=sampling())
    host.turn()
    run = host.runtime._runs[bad]

    def fail(late: bool) -> int:
        raise ZeroDivisionError("a defect")

    run.on_wake = fail
    host.runtime.close_input(bad)
    check_neighbour(host, good)
    assert ended(host, bad).code == -13
    assert "a defect" in caplog.text


@pytest.mark.parametrize(("error", "lines"), [(MemoryError, 1), (ZeroDivisionError, 64)])
def test_a_guest_that_finds_a_defect_does_not_fill_the_hosts_log(
    error: type[Exception], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FakeTokenizer):
        def encode(self, text: str, special: bool) -> list[int]:
            raise error

    call = "(call $tokenize (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 8) (i32.const 8))"
    body = f"""(loop $l (local.set $c {call})
      (br_if $l (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 500)))) (local.get $c)"""
    host = Host(tokenizer=Broken())
    end = host.run(guest(body, "tokenize"))
    assert end.code == -13
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == lines
    assert len(host.logs(1)) <= 65


def test_there_is_a_most_of_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "MAX_RUNS", 3)
    host = Host()
    runs = [host.start(GENERATE, input=sampling()) for _ in range(5)]
    host.turn(engine=False)
    for run in runs[3:]:
        end = ended(host, run)
        assert end.error is not None
        assert (end.error.code, end.error.retry_after) == ("busy", 1.0)
    again = host.start(GENERATE, input=sampling())
    host.turn(engine=False)
    assert ended(host, again).error is not None
    host.settle()
    last = host.start(GENERATE, input=sampling())
    check_neighbour(host, last)


def test_a_crowded_worker_ends_the_largest_guest_of_the_largest_tenant() -> None:
    host = Host()
    sizes = {"a": (1, 9), "b": (4, 7, 3), "c": (10,)}
    runs = {
        (tenant, size): host.start(guest("(loop $l (br $l)) (i32.const 0)", memory=str(size)), tenant=tenant)
        for tenant, each in sizes.items()
        for size in each
    }
    host.runtime.relieve(1 << 20)
    host.turn()
    while any(run.memory_held == 0 for run in host.runtime._runs.values()):
        host.turn()
    done = [e.run for e in host.events if isinstance(e, RunFinished)]
    # Nothing had begun at the first time: one had to go all the same.
    assert len(done) == 1
    host.runtime.relieve(1 << 20)
    host.turn()
    end = ended(host, runs["b", 7])
    assert end.error is not None
    assert (end.error.code, end.error.retry_after) == ("memory_limit", 1.0)
    assert end.error.details["name"] == "memory_bytes"
    assert (end.error.details["limit"], end.error.details["used"]) == (1 << 20, 14 << 16)
    assert end.error.details["memory_bytes"] == 7 << 16
    host.runtime.close()
    host.runtime.relieve(1)
    host.turn()
    host.check_empty()


def test_what_the_host_keeps_for_a_guest_counts_as_its_memory() -> None:
    """Whoever makes the host hoard goes, not whoever has the largest guest."""
    host = Host()
    forward = """(local.set $a (call $seq_new)) (i32.store (i32.const 512) (i32.const 3))
      (drop (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 0) (i32.const 0)))
      (drop (call $seq_fork (local.get $a)))
      (drop (call $emit (i32.const 0) (i32.const 60000))) (i32.const 0)"""
    hoarder = host.start(
        guest(forward, "seq_new", "forward", "seq_fork", "emit"), tenant="h", credit=1, input=bytes(70_000)
    )
    victim = host.start(
        guest("(drop (call $recv (i32.const 0) (i32.const 16) (i32.const -1))) (i32.const 0)", "recv", memory="4"),
        tenant="v",
    )
    host.settle()
    run = host.runtime._runs[hoarder]
    assert run.fiber is not None
    own = run.fiber.memory_bytes
    # The forks share their logits, and all of the output is kept until its last byte is sent.
    kept = 70_000 + 60_000 + 4 * VOCAB
    assert run.memory_held == own + kept
    for _ in range(2):
        host.runtime.message(ClientMessage(hoarder, bytes(100_000)))
    assert (
        run.memory_held
        == own + kept + 2 * (100_000 + MESSAGE_BYTES)
        > 4 << 16
        == host.runtime._runs[victim].memory_held
    )
    run.unread = 5
    assert run.memory_held == own + kept + 2 * (100_000 + MESSAGE_BYTES) + 5
    host.runtime.relieve(1 << 20)
    host.turn()
    assert host.finished(victim) is None
    end = ended(host, hoarder)
    assert end.error is not None and end.error.code == "memory_limit"
    host.runtime.close()
    host.turn()
    host.check_empty()


NO_ROOM = """
import resource
from tests.fakes import VOCAB, FakeTokenizer, Host
from tests.wat import GENERATE, SPIN, expected, sampling

host = Host()
good = host.start(GENERATE, input=sampling())
while not host.engine.forwards:
    host.turn(engine=False)
# Room for the stack of another guest, but not for its memory.
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), resource.RLIM_INFINITY))
bad = [host.start(SPIN) for _ in range(10)]
for _ in range(10):
    host.turn(engine=False)
for run in bad:
    end = host.finished(run)
    assert end.error.code == "busy", end
    assert end.error.retry_after == 1.0
host.settle()
assert host.output(good) == expected()
host.check_empty()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
after = host.start(GENERATE, input=sampling())
host.settle()
assert host.output(after) == expected()
host.check_empty()
print("survived")
"""


def test_a_process_without_room_for_another_guest_says_so_and_goes_on() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["host", *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM], env=environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout.strip()) == (0, "survived"), done.stderr


@pytest.mark.parametrize("width", ["i32", "i64"])
def test_a_trap_in_a_rewritten_instruction_names_the_guests_function(width: str) -> None:
    """The compiler puts functions of its own into modules; reports do not show them."""
    end = Host().run(
        f"""(module (memory (export "memory") {width.removeprefix("i32")} 1)
        (func $wipe (param {width} {width}) (memory.fill (local.get 0) (i32.const 1) (local.get 1)))
        (func $run (export "run") (result i32)
          (call $wipe ({width}.const 60000) ({width}.const 100000)) (i32.const 0)))"""
    )
    assert end.error is not None
    assert end.error.details["trap"] == "memory_out_of_bounds"
    names = [frame.split(" (0x")[0] for frame in end.error.details["backtrace"]]
    assert names == ["wipe", "run"]
