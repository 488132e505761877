"""A worker that was taken over sends anything: the engine goes on, and others get what they always got."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from realm.engine.checking import sampling_fault
from realm.engine.core import EngineCore
from realm.engine.sampling import draw
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
from tests.tiny import Driver, make_engine, make_model, pack

VOCAB = 97
GREEDY = SamplingParams()
HOSTILE = 3
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


# --- sampling parameters ----------------------------------------------------------------------------

BAD_SAMPLING: list[dict[str, Any]] = [
    *[{"temperature": value} for value in (NAN, INF, -INF, -1.0, -1e-30, 100.1, 1e308)],
    *[{"uniform": value} for value in (NAN, -0.1, 1.0, INF)],
    *[{"top_k": value} for value in (-1, -(1 << 63), 1 << 32, (1 << 64) - 1)],
    *[{"top_p": value} for value in (NAN, 0.0, -0.5, 1.1, INF)],
    *[{"min_p": value} for value in (NAN, -0.1, 1.1)],
    *[{"repetition_penalty": value} for value in (NAN, 0.0, -1.0, INF, 101.0)],
    *[{"mask": value} for value in (b"", b"\xff", bytes(13), b"\xff" * 12, b"\xff" * 400, bytes(12) + b"\x80")],
    {"bias_tokens": pack([1])},
    {"bias_values": floats(1)},
    {"bias_tokens": b"", "bias_values": b""},
    {"bias_tokens": pack([1, 2]), "bias_values": floats(1)},
    {"bias_tokens": b"abc", "bias_values": b"abc"},
    {"bias_tokens": pack([VOCAB]), "bias_values": floats(1)},
    {"bias_tokens": pack([2**32 - 1]), "bias_values": floats(1)},
    *[{"bias_tokens": pack([1]), "bias_values": floats(value)} for value in (NAN, INF, -INF)],
    {"bias_tokens": bytes(4 * 4097), "bias_values": bytes(4 * 4097)},
]


@pytest.mark.parametrize("changes", BAD_SAMPLING, ids=str)
def test_sampling_out_of_range_is_a_fault(changes: dict[str, Any]) -> None:
    assert sampling_fault(SamplingParams(**changes), VOCAB) is not None
    assert sampling_fault(SamplingParams(), VOCAB) is None


def test_sampling_out_of_range_fails_its_call_and_nothing_else(folder: Path) -> None:
    driver = Driver(make_engine(folder))
    want = driver.greedy([1, 2], 1)
    bad = driver.open("a")
    for changes in BAD_SAMPLING:
        failing = driver.ask(bad, [1, 2], SamplingParams(**changes))
        call = driver.ask(driver.open("b"), [1, 2], GREEDY)
        assert driver.wait_failed(failing).code == ErrorCode.INVALID_ARGUMENT
        (done,) = driver.wait(call)
        assert [done.token] == want
    (again,) = driver.wait(driver.ask(bad, [1, 2], GREEDY))
    assert [again.token] == want


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-45},
    {"temperature": 5e-324},
    {"temperature": 1e-45, "top_p": 0.5},
    {"temperature": 1e-8, "top_k": 3},
    {"temperature": 100.0, "top_p": 1e-45, "top_k": 96},
    {"temperature": 1.0, "top_p": 5e-324, "min_p": 1.0},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "top_k": (1 << 32) - 1},
    {"temperature": 1.0, "uniform": math.nextafter(1.0, 0.0)},
    {"temperature": 1.0, "top_p": 0.99, "uniform": math.nextafter(1.0, 0.0)},
    {"repetition_penalty": 1e-45},
    {"temperature": 1.0, "repetition_penalty": 1e-45},
    {"temperature": 1.0, "repetition_penalty": 5e-324, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 100.0},
    {"temperature": 1.0, "bias_tokens": pack([3, 3]), "bias_values": floats(3.4e38, 3.4e38)},
    {"temperature": 1e-45, "bias_tokens": pack([3, 3, 4]), "bias_values": floats(3.4e38, 3.4e38, 3.4e38)},
    {"temperature": 1.0, "bias_tokens": pack(list(range(VOCAB)) * 2), "bias_values": floats(*[-3.4e38] * 2 * VOCAB)},
    {
        "temperature": 0.5,
        "mask": b"\x08" + bytes(12),
        "bias_tokens": pack([3, 3]),
        "bias_values": floats(-3.4e38, -3.4e38),
    },
]


@pytest.mark.parametrize("changes", EXTREMES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 0.0])
def test_arithmetic_that_overflows_still_draws_a_token(changes: dict[str, Any], scale: float) -> None:
    """Parameters in range, but at its ends: a token comes, and a mask is kept to."""
    params = SamplingParams(**changes, logprob=True)
    assert sampling_fault(params, VOCAB) is None
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)) * scale
    plain = SamplingParams(1.0, top_p=0.9, uniform=0.5)
    history = np.arange(50, dtype=np.uint32)
    drawn = draw(logits, [plain, params, plain], [None, history, None])
    assert all(0 <= token < VOCAB for token in drawn.tokens)
    if params.mask is not None:
        assert drawn.tokens[1] == 3
    if params.bias_tokens == pack([3, 3]):
        assert drawn.tokens[1] == 3
    alone = draw(logits[[0, 2]], [plain, plain], [None, None])
    assert [drawn.tokens[0], drawn.tokens[2]] == alone.tokens


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("changes", [{}, *EXTREMES, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_logits_that_are_no_numbers_hurt_only_their_own_row(changes: dict[str, Any], value: float) -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(size=(3, 600)).astype(np.float32))
    plain = [SamplingParams(1.0, top_p=0.9, uniform=0.5), SamplingParams(100.0, top_p=0.99, uniform=0.2)]
    want = draw(logits[[0, 2]], plain, [None, None]).tokens
    logits[1] = value
    changes = {name: item for name, item in changes.items() if name != "mask"}
    hurt = SamplingParams(**changes)
    drawn = draw(logits, [plain[0], hurt, plain[1]], [None, np.arange(9, dtype=np.uint32), None])
    assert [drawn.tokens[0], drawn.tokens[2]] == want
    assert 0 <= drawn.tokens[1] < 600


def test_a_draw_that_raises_fails_its_own_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net below the checks: should one row still raise, the others of the step are drawn."""
    monkeypatch.setattr("realm.engine.core.sampling_fault", lambda params, vocab: None)
    driver = Driver(make_engine(folder))
    bad, good = driver.open("a"), driver.open("b")
    wrong = SamplingParams(bias_tokens=pack([5000]), bias_values=floats(1))
    failing, call = driver.ask(bad, [1, 2], wrong), driver.ask(good, [1, 2], GREEDY)
    assert driver.wait_failed(failing).code == ErrorCode.INTERNAL
    (done,) = driver.wait(call)
    (again,) = driver.wait(driver.ask(bad, [1, 2], GREEDY))
    assert again.token == done.token


# --- flat draws ---------------------------------------------------------------------------------------


def test_flat_rows_of_one_tenant_come_a_few_a_step_and_draw_the_same_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realm.engine.sampling.CANDIDATES", 8)
    monkeypatch.setattr("realm.engine.scheduler.COSTLY_ROWS", 4)
    flat = [SamplingParams(100.0, top_p=0.99, uniform=i / 40) for i in range(40)]

    def turn(driver: Driver, seqs: list[int]) -> list[int]:
        calls = [driver.ask(seq, [i], p) for i, (seq, p) in enumerate(zip(seqs, flat, strict=True))]
        return [done.token for done in driver.wait(*calls)]

    alone = Driver(make_engine(folder, token_budget=512))
    mine = [alone.open("flat") for _ in flat]
    want = [turn(alone, mine) for _ in range(3)]
    assert alone.engine.steps == 3

    driver = Driver(make_engine(folder, token_budget=512))
    seqs, quiet = [driver.open("flat") for _ in flat], driver.open("quiet")
    driver.wait(driver.ask(quiet, [1], GREEDY))
    got = [turn(driver, seqs)]
    for _ in range(2):
        calls = [driver.ask(seq, [i], p) for i, (seq, p) in enumerate(zip(seqs, flat, strict=True))]
        steps = 0
        while not all(call in driver.answers for call in calls):
            before = sum(call in driver.answers for call in calls)
            served = driver.ask(quiet, [1], GREEDY)
            driver.step()
            assert served in driver.answers, "a quiet tenant's token waited for another's draws"
            assert sum(call in driver.answers for call in calls) - before <= 4
            steps += 1
        assert steps == 10
        got.append([done.token for done in driver.wait(*calls)])
    assert got == want


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
            rng.choice([None, None, rng.randbytes(rng.choice([13, 16, 5]))]),
            pack([rng.randrange(100)] * 2) if biased else None,
            rng.randbytes(8) if biased else None,
            rng.random() < 0.5,
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
def day(folder: Path) -> list[int]:
    """What the victim gets where nobody else is."""
    return Driver(make_engine(folder)).greedy(list(range(20)), 20, tenant="victim")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_no_operation_raises_and_no_other_result_changes(folder: Path, day: list[int], seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(make_engine(folder, pages=rng.choice([17, 24, 64]), token_budget=rng.choice([16, 64, 512])))
    engine = driver.engine
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


# --- every counter returns ----------------------------------------------------------------------------


class CountersMachine(RuleBasedStateMachine):
    """Two workers, three tenants with limits, all operations; then everything ends in some way."""

    folder: Path
    tokens = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60)
    tenants = st.sampled_from("abc")
    workers = st.sampled_from([1, 2])

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.engine: EngineCore = make_engine(self.folder, clock=lambda: self.now, pages=14, token_budget=32)
        for tenant, pages in (("a", 5), ("b", 14), ("c", 9)):
            self.engine.set_quota(TenantQuota(tenant, pages, 600, 2))
        self.sequences: dict[int, int] = {}
        self.waiting: dict[int, set[int]] = {1: set(), 2: set()}
        self.number = 0

    def fresh(self, worker: int) -> int:
        self.number += 1
        return own(self.number, worker)

    def submit(self, worker: int, *ops: EngineOp) -> None:
        self.waiting[worker] |= {op.call for op in ops if isinstance(op, Forward | SaveSequence | OpenSaved)}
        self.engine.submit(worker, list(ops))

    def pick(self, data: st.DataObject) -> tuple[int, int]:
        seq = data.draw(st.sampled_from(sorted(self.sequences)))
        return self.sequences[seq], seq

    @rule(worker=workers, tenant=tenants, run=st.integers(1, 3))
    def open(self, worker: int, tenant: str, run: int) -> None:
        seq = self.fresh(worker)
        self.sequences[seq] = worker
        self.submit(worker, OpenSequence(seq, tenant, run))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=tokens, flat=st.booleans(), logits=st.booleans())
    def forward(self, data: st.DataObject, tokens: list[int], flat: bool, logits: bool) -> None:
        worker, seq = self.pick(data)
        self.number += 1
        sampling = SamplingParams(100.0, top_p=0.99, uniform=0.5) if flat else GREEDY
        self.submit(worker, Forward(self.number, seq, pack(tokens), sampling, logits))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        worker, seq = self.pick(data)
        child = self.fresh(worker)
        self.sequences[child] = worker
        self.submit(worker, ForkSequence(seq, child))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), length=st.integers(0, 40))
    def truncate(self, data: st.DataObject, length: int) -> None:
        worker, seq = self.pick(data)
        self.submit(worker, TruncateSequence(seq, length))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        worker, seq = self.pick(data)
        if self.engine._workers.of(worker).sequences.get(seq) is not None:
            self.forget(worker, self.engine._workers.of(worker).sequences[seq].call)
        self.submit(worker, FreeSequence(seq))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), name=st.sampled_from("xyz"))
    def save(self, data: st.DataObject, name: str) -> None:
        worker, seq = self.pick(data)
        self.number += 1
        self.submit(worker, SaveSequence(self.number, seq, name))

    @rule(worker=workers, tenant=tenants, name=st.sampled_from("xyz"))
    def open_saved(self, worker: int, tenant: str, name: str) -> None:
        self.number += 1
        seq = self.fresh(worker)
        self.sequences[seq] = worker
        self.submit(worker, OpenSaved(self.number, seq, tenant, 1, name))

    def forget(self, worker: int, call: Any) -> None:
        """A call that ends with its sequence is not answered."""
        if call is not None:
            self.waiting[worker].discard(call.number)

    @rule(worker=workers, run=st.integers(1, 3))
    def end_run(self, worker: int, run: int) -> None:
        for sequence in self.engine._workers.of(worker).sequences.values():
            if sequence.run == run:
                self.forget(worker, sequence.call)
        self.submit(worker, EndRun(run))

    @rule(worker=workers)
    def lose_worker(self, worker: int) -> None:
        self.engine.drop_worker(worker)
        self.waiting[worker].clear()
        self.sequences = {seq: owner for seq, owner in self.sequences.items() if owner != worker}

    @rule(tenant=tenants, pages=st.integers(1, 14), tokens=st.integers(0, 900))
    def change_limits(self, tenant: str, pages: int, tokens: int) -> None:
        self.engine.set_quota(TenantQuota(tenant, pages, tokens, 1))

    @rule(seconds=st.sampled_from([0.1, 5.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def step(self) -> None:
        for worker, results in self.engine.step().items():
            for result in results:
                assert result.call in self.waiting[worker], "a result that nobody waits for"
                self.waiting[worker].discard(result.call)

    @rule()
    def drain(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work():
                assert self.waiting == {1: set(), 2: set()}, "calls were never answered"
                return
            self.step()
        raise AssertionError("pending calls do not finish")

    @invariant()
    def sums(self) -> None:
        self.engine.check()

    def teardown(self) -> None:
        engine = self.engine
        self.drain()
        engine.submit(1, [EndRun(run) for run in (1, 2, 3)])
        engine.drop_worker(2)
        self.now += 1e6
        for tenant in engine.tenants:  # what is saved outlives its worker; the engine's end is its end
            for name in list(tenant.saved):
                engine.scheduler.remove(tenant.saved.pop(name))
        engine.check()
        stats = engine.stats()
        assert (stats.pages_used, stats.pages_free + stats.pages_cached) == (0, stats.pages_total)
        assert (engine.scheduler.bytes, list(engine.scheduler.sequences)) == (0, [])
        assert not engine.has_work() and engine.step() == {}
        state = engine._workers.of(1)
        assert not state.sequences and not state.runs and not state.refused
        for tenant in engine.tenants:
            assert (tenant.used, tenant.open, tenant.tokens, tenant.pending, tenant.bucket) == (0, 0, 0, 0, None)
            assert not tenant.idle and tenant.blocked is None
            assert tenant.stats.minute_tokens == 0


@pytest.fixture(scope="module", autouse=True)
def _machine_folder(folder: Path) -> None:
    CountersMachine.folder = folder


CountersMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCounters = CountersMachine.TestCase
