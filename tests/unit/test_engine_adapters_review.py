"""Adapters in the engine's core where calls could be left unanswered, or the core brought down: by what lies in the
middle of the memory, by who leaves at the wrong moment, by who asks without end."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from realm.channel import listen
from realm.engine.adapter import LEAST_WAITING
from realm.engine.adapter_loader import AdapterLoader
from realm.engine.adapters import LEAST_STEPS, TURNS
from realm.engine.batch import NoAdapterMemory
from realm.engine.server import EngineServer
from realm.guests.abi import ErrorCode
from realm.messages import (
    CallDone,
    CallFailed,
    ForkSequence,
    ForwardDone,
    FreeSequence,
    SamplingParams,
    TenantQuota,
)
from tests.adapter_stage import GREEDY, PLENTY, Stage
from tests.checked_runner import CONFIG, check_result

SINGLE = SamplingParams(repetition_penalty=1.4)
"""A call that gets no lane."""


def free(stage: Stage, seq: int) -> None:
    stage.worker.op(FreeSequence(seq))
    stage.worker.flush()


# --- room beside pinned ones ------------------------------------------------------------------------------


def test_one_that_does_not_fit_beside_a_pinned_one_in_the_middle_comes_in_all_the_same() -> None:
    stage = Stage()
    stage.register("first", 5)
    seq = stage.open()
    stage.applied(seq, "first")
    stage.say(seq, [1], 5)
    stage.register("kept", 6, pinned=True, tenant="b")
    for _ in range(5):
        stage.turn()
    assert stage.state("kept", "b") == "resident"
    # 768 bytes are free or can be freed, 512 of them in a row.
    stage.register("large", 7, 600, tenant="c")
    large = stage.open("c")
    stage.applied(large, "large")
    stage.say(large, [1], 7)
    # The pinned one comes back when it is used, and is kept again.
    theirs = stage.open("b")
    stage.applied(theirs, "kept")
    stage.say(theirs, [1], 6)
    assert [adapter.name for adapter in stage.engine.adapters if adapter.keeps] == ["kept"]


def test_one_that_is_larger_than_pinned_ones_leave_holds_nobody_up() -> None:
    stage = Stage()
    stage.register("kept", 6, 512, pinned=True, tenant="b")
    for _ in range(5):
        stage.turn()
    stage.register("large", 7, 600, tenant="c")
    large = stage.open("c")
    stage.applied(large, "large")
    call = stage.forward(large, [1])
    stage.turn()
    stage.register("small", 8, tenant="d")
    seq = stage.open("d")
    stage.applied(seq, "small")
    stage.say(seq, [1], 8)
    assert isinstance(stage.answer(call), ForwardDone)


def test_two_pinned_ones_beyond_their_part_do_not_take_turns_for_ever() -> None:
    stage = Stage(slots=1, capacity=256)
    stage.register("one", 5, pinned=True)
    stage.register("two", 6, pinned=True)
    for _ in range(40):
        stage.turn()
    assert stage.loader.puts <= 2


# --- who leaves at the wrong moment -----------------------------------------------------------------------


def forgotten_while_it_comes(stage: Stage) -> int:
    """A sequence that has got "z", which the cache gives up before it is brought in."""
    stage.register("x", 5, tenant="a")
    stage.register("y", 6, tenant="b")
    stage.register("z", 7, 500, tenant="c")
    x, y = stage.open("a"), stage.open("b")
    stage.applied(x, "x")
    token = stage.say(x, [1], 5)
    stage.applied(y, "y")
    for _ in range(4):
        token = stage.say(x, [token], 5)
    gone = stage.open("c")
    stage.apply(gone, "z")
    stage.engine.advance()
    free(stage, gone)
    token = stage.say(x, [token], 5)
    assert stage.state("z", "c") == "cached"
    # "y" is to be placed, when "x" has had its steps; then the cache is trimmed.
    stage.forward(y, [1])
    stage.forward(x, [token])
    stage.engine.advance()
    z = stage.open("c")
    stage.applied(z, "z")
    return z


def test_what_the_cache_gave_up_while_it_was_to_come_is_known_when_it_comes() -> None:
    stage = Stage(slots=1, cache=600)
    z = forgotten_while_it_comes(stage)
    for _ in range(20):
        # Each turn checks the core.
        stage.turn()
    assert stage.loader.reads == 4
    stage.say(z, [1], 7)


def test_what_the_cache_gave_up_while_it_was_to_come_can_fail() -> None:
    stage = Stage(slots=1, cache=600)
    z = forgotten_while_it_comes(stage)
    for adapter in stage.engine.adapters:
        adapter.path = "broken" if adapter.name == "z" else adapter.path
    for _ in range(20):
        stage.turn()
    result = stage.answer(stage.forward(z, [1]))
    assert isinstance(result, CallFailed) and result.code == ErrorCode.NOT_FOUND


def test_a_quota_that_shrinks_while_a_call_waits_fails_it_and_leaves_its_sequence_usable() -> None:
    stage = Stage(slots=1)
    stage.register("x", 5)
    stage.register("y", 6, tenant="b")
    seq, other = stage.open(), stage.open("b")
    stage.applied(seq, "x")
    stage.say(seq, [1] * 100, 5)
    stage.applied(other, "y")
    stage.say(other, [1], 6)
    call = stage.forward(seq, [1], SamplingParams(mask=b"\xff" * 125))
    stage.engine.set_quota(TenantQuota("a", 2, PLENTY, 4))
    result = stage.answer(call)
    assert isinstance(result, CallFailed) and result.limit is not None and result.limit.name == "kv_pages"
    # It is not busy: a call that waits for nothing any more would say BAD_HANDLE here.
    stage.engine.set_quota(TenantQuota("a", 200, PLENTY, 4))
    stage.say(seq, [2], 5)


def test_nothing_is_left_of_replaced_ones_that_nobody_waited_for() -> None:
    stage = Stage()
    for contents in range(5, 25):
        stage.register("x", contents)
        seq = stage.open()
        stage.apply(seq, "x")
        free(stage, seq)
        stage.turn()
    for _ in range(10):
        stage.turn()
    assert len(stage.engine.adapters._active) <= 2


# --- nobody waits for ever --------------------------------------------------------------------------------


def test_a_lane_that_is_given_while_its_adapter_is_to_leave_does_not_keep_it() -> None:
    """A prompt that is under way when an adapter has to leave ends in a guest that goes on and on."""
    stage = Stage(slots=1)
    stage.engine.scheduler._budget = 4
    stage.register("x", 5)
    stage.register("y", 6, tenant="b")
    first, long, other = stage.open(), stage.open(), stage.open("b")
    stage.applied(first, "x")
    token = stage.say(first, [1], 5)
    for _ in range(LEAST_STEPS + 2):
        token = stage.say(first, [token], 5)
    stage.applied(long, "x")
    call = stage.forward(long, [1] * 40)
    stage.turn()
    stage.applied(other, "y")
    wanted = stage.forward(other, [1])
    tokens = 0
    for _ in range(200):
        stage.turn()
        if call in stage.worker.answers and tokens < 100:
            result = stage.worker.answers.pop(call)
            assert isinstance(result, ForwardDone)
            tokens += 1
            call = stage.forward(long, [result.token])
        if wanted in stage.worker.answers:
            break
    assert wanted in stage.worker.answers and tokens <= LEAST_STEPS


def test_a_tenant_whose_adapters_fail_does_not_go_first_for_ever() -> None:
    """It holds nothing, so it would go before everybody who does."""
    stage = Stage()
    stage.register("one", 5, tenant="b")
    stage.register("two", 6, tenant="b")
    for name in ("bad", "worse"):
        stage.register(name, 7, path="broken")
    theirs, more = stage.open("b"), stage.open("b")
    stage.applied(theirs, "one")
    stage.say(theirs, [1], 5)
    seqs = {stage.open(): name for name in ("bad", "worse")}
    calls = {stage.apply(seq, name): seq for seq, name in seqs.items()}
    wanted = stage.apply(more, "two")
    for _ in range(2 * TURNS):
        stage.turn()
        if wanted in stage.worker.answers:
            break
        for call in [call for call in calls if call in stage.worker.answers]:
            assert isinstance(stage.worker.answers.pop(call), CallFailed)
            seq = calls.pop(call)
            calls[stage.apply(seq, seqs[seq])] = seq
    assert wanted in stage.worker.answers
    assert stage.loader.reads > 2, "nobody went before it"


def test_one_that_is_given_up_does_not_leave_others_waiting_in_an_idle_engine() -> None:
    """Nothing else happens: so what :meth:`advance` does not begin is never begun."""
    stage = Stage()
    stage.register("kept", 5, 256, pinned=True, tenant="b")
    for _ in range(5):
        stage.turn()
    stage.register("large", 6, 800, tenant="c")
    stage.register("small", 7, 512, tenant="d")
    large, small = stage.open("c"), stage.open("d")
    stage.apply(large, "large")
    stage.engine.advance()
    call = stage.apply(small, "small")
    for _ in range(10):
        stage.loader.work()
        stage.engine.advance()
        if not stage.loader.busy:
            break
    for results, rows in stage.engine.take().values():
        stage.worker.receive(results, rows)
    assert call in stage.worker.answers
    assert not stage.engine.adapters.waiting


@pytest.mark.parametrize("p", [GREEDY, SINGLE])
def test_an_engine_does_not_fall_asleep_when_its_last_step_has_made_room(tmp_path: Path, p: SamplingParams) -> None:
    stage = Stage(slots=1, cache=1024)
    stage.register("x", 5)
    stage.register("y", 6, tenant="b")
    x, y = stage.open(), stage.open("b")
    stage.applied(y, "y")
    stage.say(y, [1], 6)
    stage.applied(x, "x")
    stage.say(x, [1], 5)
    assert (stage.state("x"), stage.state("y", "b")) == ("resident", "cached")
    wake = os.eventfd(0, os.EFD_NONBLOCK)
    stage.loader.fileno = lambda: wake  # type: ignore[method-assign]
    # Its guest never calls again.
    stage.forward(x, [2], p)
    call = stage.forward(y, [2])
    answered: list[int] = []
    with closing(listen(str(tmp_path / "s"))) as listener:
        server = EngineServer(stage.engine, listener, 0.0)
        take = stage.engine.take

        def taken() -> dict[int, object]:
            for results, rows in take().values():
                stage.worker.receive(results, rows)
            answered.extend(stage.worker.answers)
            return {}

        def receive(timeout: float | None) -> None:
            worked = stage.loader.work()
            stage.runner.execute()
            server._stopping = call in answered
            assert timeout is not None or worked or stage.engine.in_flight, "it sleeps, and nothing will wake it"

        stage.engine.take = taken  # type: ignore[assignment, method-assign]
        server._receive = receive  # type: ignore[method-assign]
        server.run()
        stage.engine.take = take  # type: ignore[method-assign]
    os.close(wake)
    check_result([1, 2], GREEDY, stage.worker.answers.pop(call), 6)  # type: ignore[arg-type]
    stage.engine.check()


def test_an_outcome_that_is_taken_before_its_wake_comes_leaves_nothing_readable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine would ask its sockets without pause until the next adapter is loaded."""
    loader = AdapterLoader(NoAdapterMemory(torch.float32), CONFIG)
    write = os.eventfd_write
    taken: list[object] = []
    written: list[int] = []

    def late(descriptor: int, value: int) -> None:
        deadline = time.monotonic() + 20
        while len(taken) <= len(written) and time.monotonic() < deadline:
            time.sleep(0.001)
        written.append(value)
        write(descriptor, value)

    monkeypatch.setattr(os, "eventfd_write", late)
    with closing(loader):
        for _ in range(2):
            loader.read("/nowhere", "", b"")
            deadline = time.monotonic() + 20
            while (outcome := loader.take()) is None:
                assert time.monotonic() < deadline
            taken.append(outcome)
        loader._jobs.put(None)
        loader._thread.join(20)
        assert loader.take() is None
        with pytest.raises(BlockingIOError):
            os.eventfd_read(loader.fileno())


# --- memory and reading -----------------------------------------------------------------------------------


def test_calls_of_freed_sequences_are_not_kept_while_the_loader_works() -> None:
    """A worker that was taken over can make and free as many as it likes; each has its tokens."""
    stage = Stage(slots=1)
    stage.register("x", 5)
    stage.register("y", 6)
    seq, other = stage.open(), stage.open()
    stage.applied(seq, "x")
    stage.say(seq, [1] * 100, 5)
    stage.applied(other, "y")
    stage.say(other, [1], 6)
    live = stage.forward(seq, [1])
    stage.engine.advance()
    adapter = next(adapter for adapter in stage.engine.adapters if adapter.name == "x")
    for _ in range(1000):
        child = stage.worker.fresh()
        stage.worker.op(ForkSequence(seq, child))
        call = stage.forward(child, [2])
        free(stage, child)
        del stage.worker.asked[call]
    assert len(adapter.calls) <= 2 * LEAST_WAITING
    assert isinstance(stage.answer(live), ForwardDone)


@pytest.mark.parametrize("known", [False, True])
def test_without_a_cache_an_adapter_is_read_once_for_each_stay(known: bool) -> None:
    """Not once for the application and again for the first call: in between it is given up for lack of room, and may
    have been forgotten by then."""
    stage = Stage(slots=1)
    stage.register("x", 5)
    stage.register("y", 6, tenant="b")
    x, y = stage.open(), stage.open("b")
    if known:
        stage.applied(y, "y")
        stage.say(y, [1], 6)
        stage.applied(y, "")
    stage.applied(x, "x")
    call = stage.forward(x, [1])
    adapter = next(adapter for adapter in stage.engine.adapters if adapter.name == "y")
    loads = adapter.loads
    wanted, applied = stage.apply(y, "y"), False
    for _ in range(100):
        stage.turn()
        if call in stage.worker.answers:
            # "x" is in use all the time.
            result = stage.worker.answers.pop(call)
            assert isinstance(result, ForwardDone)
            call = stage.forward(x, [result.token])
        if wanted in stage.worker.answers:
            if applied:
                break
            assert stage.worker.answers.pop(wanted) == CallDone(wanted, 4)
            wanted, applied = stage.forward(y, [2]), True
    assert isinstance(stage.worker.answers[wanted], ForwardDone)
    assert adapter.loads - loads == 1


def test_who_has_many_sequences_does_not_make_others_loads_dear() -> None:
    """While there is no room, that is looked at before each step: so not through all sequences."""
    stage = Stage(slots=1)
    stage.register("x", 5)
    stage.register("y", 6, tenant="b")
    x, y = stage.open(), stage.open("b")
    stage.applied(x, "x")
    call = stage.forward(x, [1] * 20)
    stage.apply(y, "y")
    asked: list[str] = []

    class Watched(dict[int, object]):
        def values(self) -> object:  # type: ignore[override]
            asked.append("values")
            return super().values()

    scheduler = stage.engine.scheduler
    scheduler._sequences = Watched(scheduler._sequences)  # type: ignore[assignment]
    for _ in range(30):
        stage.loader.work()
        stage.engine.advance()
        stage.engine.launch()
        stage.engine.settle(True)
    assert not asked and stage.loader.reads == 2
    for results, rows in stage.engine.take().values():
        stage.worker.receive(results, rows)
    assert isinstance(stage.answer(call), ForwardDone)
