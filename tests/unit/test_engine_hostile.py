"""A worker that was taken over sends anything: the engine goes on, and others get what they always got."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm.engine.workers import MAX_REFUSED, WORKER_SHIFT
from realm.guests.abi import ErrorCode
from realm.messages import (
    CallFailed,
    EndRun,
    EngineOp,
    ForkSequence,
    Forward,
    ForwardDone,
    FreeSequence,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TenantQuota,
    TruncateSequence,
)
from tests.checked_runner import VOCAB, checked_engine
from tests.tiny import Driver, make_engine, make_model, pack

GREEDY = SamplingParams()
HOSTILE = 3
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


# --- numbers that are not the worker's ---------------------------------------------------------------


def own(number: int, worker: int = HOSTILE) -> int:
    return (worker << WORKER_SHIFT) + number


@pytest.mark.parametrize("seq", [0, -1, -2, -(1 << 63), (1 << 63) - 1, 5, own(0) - 1, own(0, HOSTILE + 1)])
def test_numbers_outside_the_workers_range_open_nothing(folder: Path, seq: int) -> None:
    driver = Driver(make_engine(folder))
    mine = driver.open("a")
    driver.wait(driver.ask(mine, [1, 2]))
    driver.op(SaveSequence(900, mine, "x"))
    driver.step()
    engine = driver.engine
    before = engine.scheduler.bytes
    ops: list[EngineOp] = [
        OpenSequence(seq, "a", 1),
        ForkSequence(mine, seq),
        OpenSequence(own(1), "a", 1),
        ForkSequence(own(1), seq),
        OpenSaved(1, seq, "a", 1, "x"),
        Forward(2, seq, pack([1]), GREEDY, False),
        SaveSequence(3, seq, "y"),
        FreeSequence(seq),
        FreeSequence(own(1)),
    ]
    engine.submit(HOSTILE, ops)
    failed = engine.step()[HOSTILE]
    assert [f.code for f in failed if isinstance(f, CallFailed)] == [ErrorCode.BAD_HANDLE] * 3
    assert engine.scheduler.bytes == before
    engine.check()


def test_nothing_reaches_into_another_workers_sequences(folder: Path) -> None:
    driver = Driver(make_engine(folder))
    seq, pending = driver.open("a"), driver.open("a")
    driver.wait(driver.ask(seq, [1, 2, 3]))
    call = driver.ask(pending, [1, 2, 3], GREEDY)
    driver.engine.submit(
        HOSTILE,
        [
            Forward(1, seq, pack([9]), GREEDY, True),
            ForkSequence(seq, own(1)),
            SaveSequence(2, seq, "stolen"),
            TruncateSequence(seq, 0),
            FreeSequence(seq),
            FreeSequence(pending),
            EndRun(1),
            OpenSequence(seq, "b", 1),
            Forward(3, own(1), pack([9]), GREEDY, True),
        ],
    )
    driver.engine.drop_worker(99)
    failed = driver.engine.step()
    assert [result.code for result in failed[HOSTILE]] == [ErrorCode.BAD_HANDLE] * 3  # type: ignore[union-attr]
    (want,) = failed[Driver.WORKER]
    assert isinstance(want, ForwardDone) and want.call == call
    (done,) = driver.wait(driver.ask(seq, [4], GREEDY))
    assert [done.token] == driver.greedy([1, 2, 3, 4], 1, tenant="fresh")


def test_refused_sequences_are_remembered_up_to_a_bound(folder: Path) -> None:
    engine = make_engine(folder)
    engine.set_quota(TenantQuota("a", 1, 1 << 40, 64))
    engine.submit(HOSTILE, [OpenSequence(own(n), "a", n) for n in range(MAX_REFUSED + 500)])
    state = engine._workers.of(HOSTILE)
    assert len(state.refused) == MAX_REFUSED
    assert len(state.sequences) == 8
    engine.submit(HOSTILE, [Forward(n, own(n), pack([1]), None, False) for n in (20, MAX_REFUSED + 400)])
    codes = [result.code for result in engine.step()[HOSTILE]]  # type: ignore[union-attr]
    assert codes == [ErrorCode.LIMIT, ErrorCode.BAD_HANDLE]
    engine.submit(HOSTILE, [EndRun(n) for n in range(MAX_REFUSED + 500)])
    assert not state.refused and not state.sequences and not state.runs
    engine.check()


# --- anything at all ------------------------------------------------------------------------------------

EDGES = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), own(0), own(0) - 1]


def random_op(rng: random.Random, victim: int) -> EngineOp:
    def seq() -> int:
        return rng.choice([own(rng.randrange(6))] * 8 + [victim, rng.choice(EDGES)])

    def number() -> int:
        return rng.choice([rng.randrange(4), rng.choice(EDGES)])

    def name() -> str:
        return rng.choice(["", "a", "b", "victim", "x" * 300, "\0", "é"])

    def real() -> float:
        return rng.choice([0.0, 0.5, 1.0, 1.0, 1.0, 100.0, 1e-45, NAN, INF, -1.0, rng.random()])

    def tokens() -> bytes:
        size = rng.choice([1, 1, 1, 3, 20, 100, 257, 4000])
        return rng.choice([pack([rng.randrange(VOCAB)] * size)] * 9 + [rng.randbytes(size), b""])

    def sampling() -> SamplingParams | None:
        if rng.random() < 0.2:
            return None
        if rng.random() < 0.3:
            return GREEDY
        biased = rng.random() < 0.2
        return SamplingParams(
            real(),
            rng.choice([0, 0, 5, 90, rng.choice(EDGES)]),
            real(),
            rng.choice([0.0, 0.0, real()]),
            rng.choice([1.0, 1.0, 1.3, real()]),
            rng.choice([0.3, 0.3, real()]),
            rng.choice([None, None, rng.randbytes(rng.choice([125, 128, 13]))]),
            pack([rng.randrange(100)] * 2) if biased else None,
            rng.randbytes(8) if biased else None,
            rng.random() < 0.5,
            rng.choice([1, 2**64 - 1, rng.choice(EDGES)]),
            rng.choice([-1, -1, 0, rng.choice(EDGES)]),
        )

    match rng.randrange(12):
        case 0 | 1:
            return OpenSequence(seq(), name(), number())
        case 2:
            return ForkSequence(seq(), seq())
        case 3:
            return TruncateSequence(seq(), number())
        case 4:
            return FreeSequence(seq())
        case 5:
            return SaveSequence(number(), seq(), name())
        case 6:
            return OpenSaved(number(), seq(), name(), number(), name())
        case 7 if rng.random() < 0.3:
            return EndRun(number())
        case _:
            return Forward(number(), seq(), tokens(), sampling(), rng.random() < 0.3)


@pytest.fixture(scope="module")
def day() -> list[int]:
    """What the victim gets where nobody else is."""
    return Driver(checked_engine()[0]).greedy(list(range(20)), 20, tenant="victim")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_no_operation_raises_and_no_other_result_changes(day: list[int], seed: int) -> None:
    rng = random.Random(seed)
    pages, budget, ahead = rng.choice([10, 24, 64]), rng.choice([16, 64, 512]), rng.choice([0, 1, 2])
    engine, _ = checked_engine(pages=pages, budget=budget, run_ahead=ahead)
    driver = Driver(engine)
    seq, asked, got = driver.open("victim"), list(range(20)), []
    for _ in range(20):
        call = driver.ask(seq, asked, GREEDY)
        while call not in driver.answers:
            engine.submit(HOSTILE, [random_op(rng, seq) for _ in range(rng.choice([0, 3, 30]))])
            assert engine.has_work()
            driver.step()
        (done,) = driver.wait(call)
        got.append(done.token)
        asked = [done.token]
    assert got == day
    engine.drop_worker(HOSTILE)
    engine.check()
    driver.op(EndRun(1))
    assert engine.stats().pages_used == sum(len({p for s in t.saved.values() for p in s.pages}) for t in engine.tenants)
