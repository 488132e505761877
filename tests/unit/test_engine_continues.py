"""Rows of CONTINUE that no honest worker sends: none raises, and none reaches what is another's."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.engine.core import EngineCore
from realm.engine.workers import WORKER_SHIFT
from realm.guests.abi import ErrorCode
from realm.messages import (
    CONTINUE,
    DRAWN,
    NO_LANE,
    CallFailed,
    EndRun,
    EngineOp,
    EngineResult,
    ForkSequence,
    Forward,
    ForwardDone,
    FreeSequence,
    OpenSequence,
    SamplingParams,
    TenantQuota,
    TruncateSequence,
)
from tests.ahead_worker import AheadWorker
from tests.checked_runner import VOCAB, check_result, checked_engine
from tests.tiny import pack

GREEDY = SamplingParams()
HOSTILE, VICTIM = 3, 7


@dataclass
class Drawn:
    """A row of :data:`DRAWN`."""

    call: int
    token: int
    logprob: float
    cached: int
    lane: int


def run(engine: EngineCore, worker: int) -> tuple[list[EngineResult], list[Drawn]]:
    """All that a worker gets until there is nothing left to do."""
    results: list[EngineResult] = []
    rows: list[Drawn] = []
    for _ in range(300):
        went_on = engine.launch()
        went_on |= engine.settle(True)
        for number, (messages, drawn) in engine.take().items():
            assert number == worker
            results += messages
            rows += [Drawn(*row) for row in DRAWN.iter_unpack(drawn)]
        engine.check()
        if not went_on and not engine.has_work():
            return results, rows
    raise AssertionError("the engine does not come to rest")


def opened(engine: EngineCore, worker: int, number: int = 1, tenant: str = "a") -> tuple[int, Drawn]:
    """A sequence of tokens 1, 2, 3 that has drawn its first token."""
    seq = (worker << WORKER_SHIFT) + number
    engine.submit(worker, [OpenSequence(seq, tenant, 1), Forward(100 + number, seq, pack([1, 2, 3]), GREEDY, False)])
    results, (row,) = run(engine, worker)
    assert not results and row.lane != NO_LANE
    return seq, row


def failures(results: list[EngineResult]) -> dict[int, int]:
    assert all(isinstance(result, CallFailed) for result in results)
    return {result.call: result.code for result in results if isinstance(result, CallFailed)}


@pytest.mark.parametrize("depth", [1, 2])
def test_a_row_for_anothers_sequence_fails_and_changes_nothing(depth: int) -> None:
    engine, _ = checked_engine(run_ahead=depth)
    seq, row = opened(engine, VICTIM, tenant="b")
    engine.submit(HOSTILE, [], CONTINUE.pack(1, seq, row.lane, row.token))
    results, rows = run(engine, HOSTILE)
    assert failures(results) == {1: ErrorCode.BAD_HANDLE} and not rows
    engine.submit(VICTIM, [], CONTINUE.pack(2, seq, row.lane, row.token))
    results, (answer,) = run(engine, VICTIM)
    assert not results and answer.call == 2
    check_result([1, 2, 3, row.token], GREEDY, ForwardDone(2, answer.token, answer.logprob, 0))


def test_a_wrong_lane_is_no_way_into_another_sequence() -> None:
    """The sequence's number decides: the row is then an ordinary call of that sequence."""
    engine, _ = checked_engine(run_ahead=2)
    theirs, their_row = opened(engine, VICTIM, tenant="b")
    mine, row = opened(engine, HOSTILE)
    token = row.token
    tokens = [1, 2, 3]
    for call, lane in enumerate([their_row.lane, NO_LANE, 5, 8, 15, 16, 17, 1 << 31, NO_LANE - 1], 1):
        engine.submit(HOSTILE, [], CONTINUE.pack(call, mine, lane, token))
        results, (answer,) = run(engine, HOSTILE)
        assert not results and answer.call == call
        tokens.append(token)
        check_result(tokens, GREEDY, ForwardDone(call, answer.token, answer.logprob, 0))
        token = answer.token
    engine.submit(VICTIM, [], CONTINUE.pack(2, theirs, their_row.lane, their_row.token))
    _, (answer,) = run(engine, VICTIM)
    check_result([1, 2, 3, their_row.token], GREEDY, ForwardDone(2, answer.token, answer.logprob, 0))


def test_a_lane_of_another_sequence_of_the_same_worker_is_not_taken_for_its_own() -> None:
    """The token is right for the lane, and the lane is the worker's: the sequence still decides."""
    engine, _ = checked_engine(run_ahead=2)
    one, mine = opened(engine, HOSTILE)
    two, other = opened(engine, HOSTILE, 2)
    engine.submit(HOSTILE, [], CONTINUE.pack(1, one, mine.lane, mine.token))
    _, (moved,) = run(engine, HOSTILE)
    engine.submit(HOSTILE, [], CONTINUE.pack(2, two, mine.lane, moved.token))
    _, (answer,) = run(engine, HOSTILE)
    check_result([1, 2, 3, moved.token], GREEDY, ForwardDone(2, answer.token, answer.logprob, 0))
    engine.submit(HOSTILE, [], CONTINUE.pack(3, one, mine.lane, moved.token))
    _, (answer,) = run(engine, HOSTILE)
    assert answer.call == 3 and other.lane != mine.lane
    check_result([1, 2, 3, mine.token, moved.token], GREEDY, ForwardDone(3, answer.token, answer.logprob, 0))


def test_a_token_that_was_not_drawn_is_computed_as_it_is() -> None:
    engine, _ = checked_engine(run_ahead=2)
    seq, row = opened(engine, HOSTILE)
    other = (row.token + 1) % VOCAB
    engine.submit(HOSTILE, [], CONTINUE.pack(1, seq, row.lane, other))
    _, (answer,) = run(engine, HOSTILE)
    check_result([1, 2, 3, other], GREEDY, ForwardDone(1, answer.token, answer.logprob, 0))
    for call, token in enumerate([VOCAB, 1 << 31, (1 << 32) - 1], 2):
        engine.submit(HOSTILE, [], CONTINUE.pack(call, seq, answer.lane, token))
        results, rows = run(engine, HOSTILE)
        assert failures(results) == {call: ErrorCode.INVALID_ARGUMENT} and not rows


@pytest.mark.parametrize("copies", [2, 5])
@pytest.mark.parametrize("apart", [False, True], ids=["one turn", "turns"])
def test_of_rows_for_one_sequence_one_is_served(copies: int, apart: bool) -> None:
    engine, _ = checked_engine(run_ahead=1)
    seq, row = opened(engine, HOSTILE)
    # A step in flight, so that no answer is there yet.
    engine.submit(HOSTILE, [Forward(1, seq, pack([row.token]), GREEDY, False)])
    engine.launch()
    rows = [CONTINUE.pack(call, seq, row.lane, row.token) for call in range(2, 2 + copies)]
    for part in rows if apart else [b"".join(rows)]:
        engine.submit(HOSTILE, [], part)
    results, answers = run(engine, HOSTILE)
    assert failures(results) == dict.fromkeys(range(2, 2 + copies), ErrorCode.BAD_HANDLE)
    (answer,) = answers
    assert answer.call == 1
    check_result([1, 2, 3, row.token], GREEDY, ForwardDone(1, answer.token, answer.logprob, 0))


@pytest.mark.parametrize("size", range(1, 24))
def test_what_is_no_whole_row_is_not_looked_at(size: int) -> None:
    engine, _ = checked_engine(run_ahead=1)
    seq, row = opened(engine, HOSTILE)
    whole = CONTINUE.pack(1, seq, row.lane, row.token)
    engine.submit(HOSTILE, [], whole[:size])
    assert run(engine, HOSTILE) == ([], [])
    engine.submit(HOSTILE, [], whole + whole[:size])
    results, (answer,) = run(engine, HOSTILE)
    assert not results and answer.call == 1


def test_a_row_for_what_never_drew_or_is_gone_fails() -> None:
    engine, _ = checked_engine(run_ahead=1)
    seq, row = opened(engine, HOSTILE)
    fresh = (HOSTILE << WORKER_SHIFT) + 50
    engine.submit(HOSTILE, [OpenSequence(fresh, "a", 1), Forward(1, fresh, pack([4]), None, False)])
    run(engine, HOSTILE)
    engine.submit(HOSTILE, [FreeSequence(seq)])
    rows = [CONTINUE.pack(call, number, row.lane, row.token) for call, number in enumerate([fresh, seq, 0, -1], 2)]
    engine.submit(HOSTILE, [], b"".join(rows))
    results, drawn = run(engine, HOSTILE)
    codes = failures(results)
    assert codes.pop(2) == ErrorCode.INVALID_ARGUMENT
    assert codes == dict.fromkeys((3, 4, 5), ErrorCode.BAD_HANDLE) and not drawn


# --- anything at all --------------------------------------------------------------------------------------------

EDGES = [0, 1, 2**31, 2**32 - 1, 2**63 - 1]


def random_rows(rng: random.Random, victims: list[int], seen: list[Drawn], asked: list[int]) -> bytes:
    rows = b""
    for _ in range(rng.choice([0, 1, 1, 2, 9])):
        row = rng.choice(seen) if seen else Drawn(0, 0, 0.0, 0, 0)
        seq = rng.choice([(HOSTILE << WORKER_SHIFT) + rng.randrange(5)] * 6 + [rng.choice(victims), rng.choice(EDGES)])
        lane = rng.choice([row.lane] * 4 + [rng.randrange(9), rng.choice(EDGES[:4])])
        token = rng.choice([row.token] * 4 + [rng.randrange(VOCAB), rng.choice(EDGES[:4])])
        call = rng.choice([rng.randrange(1 << 62)] * 4 + [rng.choice(EDGES), 2**64 - 1])
        asked.append(call)
        rows += CONTINUE.pack(call, seq, lane, token)
    return rows + rng.randbytes(rng.choice([0, 0, 3, 23]))


def random_ops(rng: random.Random, victims: list[int], asked: list[int]) -> list[EngineOp]:
    ops: list[EngineOp] = []
    for _ in range(rng.choice([0, 1, 2])):
        seq = rng.choice([(HOSTILE << WORKER_SHIFT) + rng.randrange(5)] * 9 + victims)
        other = (HOSTILE << WORKER_SHIFT) + rng.randrange(5)
        asked.append(rng.randrange(1 << 62))
        p = rng.choice([GREEDY, GREEDY, SamplingParams(0.7, key=5, number=2**63 - 2), SamplingParams(1.0, uniform=0.3)])
        forward = Forward(asked[-1], seq, pack([1] * rng.choice([1, 14, 40])), p, rng.random() < 0.1)
        ops.append(
            rng.choice(
                [
                    OpenSequence(seq, "abv"[rng.randrange(3)], rng.randrange(3)),
                    forward,
                    forward,
                    forward,
                    ForkSequence(seq, other),
                    TruncateSequence(seq, rng.randrange(30)),
                    FreeSequence(seq),
                    EndRun(rng.randrange(3)),
                ]
            )
        )
    return ops


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.sampled_from([1, 2]),
    lanes=st.sampled_from([1, 2, 8]),
    pages=st.sampled_from([12, 64]),
)
def test_no_rows_raise_and_others_get_what_they_always_got(seed: int, depth: int, lanes: int, pages: int) -> None:
    rng = random.Random(seed)
    engine, _ = checked_engine(run_ahead=depth, lanes=lanes, pages=pages)
    victim = AheadWorker(engine, VICTIM)
    texts: dict[int, list[int]] = {}
    waiting: dict[int, tuple[int, SamplingParams]] = {}
    next_of: dict[int, int] = {}
    for number, tenant in enumerate("vw"):
        seq = victim.fresh()
        victim.op(OpenSequence(seq, tenant, 1))
        texts[seq] = [number] * 14
        p = SamplingParams(0.7 * number, key=seq, number=0 if number else -1)
        waiting[seq] = (victim.forward(seq, texts[seq], p), p)
        next_of[seq] = 1
    seen: list[Drawn] = []
    asked: list[int] = []
    for _ in range(2000):
        if all(count > 40 for count in next_of.values()):
            break
        victim.flush()
        rows = random_rows(rng, list(texts), seen, asked)
        engine.submit(HOSTILE, random_ops(rng, list(texts), asked), rows)
        if rng.random() < 0.02:
            engine.set_quota(TenantQuota("a", rng.choice([4, 64]), 1 << 40, 4))
        if engine.in_flight < 3:
            engine.launch()
        engine.settle(rng.random() < 0.7)
        for worker, (messages, drawn) in engine.take().items():
            if worker == HOSTILE:
                seen += [Drawn(*row) for row in DRAWN.iter_unpack(drawn)]
                calls = [result.call for result in messages] + [row.call for row in seen[-(len(drawn) // 24) :]]
                assert not drawn or set(calls) <= set(asked), "a result of somebody else"
            else:
                victim.receive(messages, drawn)
        engine.check()
        for seq, (call, p) in list(waiting.items()):
            answer = victim.answers.pop(call, None)
            if answer is None:
                continue
            assert isinstance(answer, ForwardDone), answer
            check_result(texts[seq], p, answer)
            texts[seq].append(answer.token)
            after = SamplingParams(p.temperature, key=seq, number=next_of[seq] if p.number >= 0 else -1)
            next_of[seq] += 1
            waiting[seq] = (victim.forward(seq, [answer.token], after), after)
    else:
        raise AssertionError("the victim is not served")
    engine.drop_worker(HOSTILE)
    engine.drop_worker(VICTIM)
    while engine.launch() or engine.settle(True):
        pass
    engine.check()
    assert engine.stats().pages_used == 0 and not engine.has_work()
