"""Running ahead, case by case: what is claimed, what is wasted and who pays, and where nothing may be run ahead."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from realm.engine.core import EngineCore
from realm.engine.scheduler import DECODE_WEIGHT, PREFILL_WEIGHT
from realm.engine.sequence import Tenant
from realm.guests.abi import ErrorCode
from realm.messages import (
    CallFailed,
    EndRun,
    FreeSequence,
    LimitMet,
    SamplingParams,
    TenantQuota,
)
from tests.ahead_chats import GREEDY, Chats
from tests.checked_runner import CONTEXT, VOCAB, checked_engine, state_of
from tests.tiny import kv_layers, make_engine, make_model

PLENTY = 1 << 40


def account(engine: EngineCore, name: str = "a") -> Tenant:
    tenant = engine.tenants.find(name)
    assert tenant is not None
    return tenant


@pytest.fixture(params=[1, 2])
def ahead(request: pytest.FixtureRequest) -> int:
    depth: int = request.param
    return depth


# --- what is run ahead, and what becomes of it ----------------------------------------------------------------


def test_a_guest_that_goes_on_finds_its_step_computed(ahead: int) -> None:
    engine, runner = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    (seq,) = chats.begin([1, 2, 3])
    chats.rest()
    for _ in range(20):
        before = runner.computed
        chats.ask(seq)
        chats.worker.flush()
        chats.take()
        assert chats.asked[seq][0] in chats.worker.answers, "the answer was there before the question"
        chats.answer(seq)
        assert runner.computed == before
        chats.rest()
    assert chats.stats().ahead_tokens == 20
    assert chats.stats().wasted_tokens == 0


def test_no_more_is_run_ahead_than_was_said(ahead: int) -> None:
    """A guest that never answers costs a bounded number of tokens, and then nothing more happens."""
    engine, runner = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    chats.begin([1, 2, 3], [4, 5])
    chats.rest()
    assert runner.computed == 5 + 2 * ahead
    steps = engine.stats().steps
    chats.rest()
    assert engine.stats().steps == steps
    assert not engine.has_work() and not engine.launch() and engine.step() == {}


def test_nothing_is_run_ahead_where_that_is_off() -> None:
    engine, runner = checked_engine(run_ahead=0)
    chats = Chats(engine)
    (seq,) = chats.begin([1, 2, 3])
    for _ in range(5):
        chats.turn(seq)
    chats.rest()
    assert runner.computed == 3 + 5
    assert (chats.stats().ahead_tokens, chats.stats().wasted_tokens) == (0, 0)


def _with(p: SamplingParams) -> Callable[[Chats, int], None]:
    def change(chats: Chats, seq: int) -> None:
        chats.sampling[seq] = p
        chats.ask(seq)

    return change


def _truncated(count: int) -> Callable[[Chats, int], None]:
    def change(chats: Chats, seq: int) -> None:
        chats.truncate(seq, count)
        chats.ask(seq)

    return change


CHANGES: dict[str, Callable[[Chats, int], None]] = {
    "another token": lambda chats, seq: chats.ask(seq, [(chats.given[seq].token + 1) % VOCAB]),
    "two tokens": lambda chats, seq: chats.ask(seq, [chats.given[seq].token, 5]),
    "another temperature": _with(SamplingParams(0.5, key=3, number=4)),
    "a later draw": _with(SamplingParams(0.7, key=3, number=40)),
    "another key": _with(SamplingParams(0.7, key=4, number=16)),
    "a mask": _with(SamplingParams(0.7, key=3, number=16, mask=b"\xf0" * 125)),
    "a penalty": _with(SamplingParams(0.7, key=3, number=16, repetition_penalty=1.3)),
    "a log-probability": _with(SamplingParams(0.7, key=3, number=16, logprob=True)),
    "greedy": _with(GREEDY),
    "logits": lambda chats, seq: chats.ask(seq, logits=True),
    "truncated by one": _truncated(1),
    "truncated to nothing": _truncated(18),
    "by message": lambda chats, seq: chats.ask(seq, row=False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rested", [True, False], ids=["settled", "in flight"])
def test_what_does_not_match_is_computed_anew_and_paid(change: str, rested: bool, ahead: int) -> None:
    engine, _ = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    seq = chats.start([1, 2, 3], SamplingParams(0.7, key=3, number=0))
    chats.answer(seq)
    for _ in range(15):
        chats.turn(seq)
    if rested:
        chats.rest()
    CHANGES[change](chats, seq)
    chats.answer(seq)
    for _ in range(3):
        chats.turn(seq)
    chats.worker.op(EndRun(1))
    chats.rest()
    # The lane was left twice: at the change, and at the end.
    assert (ahead if rested and change != "by message" else 0) <= chats.stats().wasted_tokens <= 2 * ahead
    assert engine.stats().pages_used == 0


def test_a_fork_of_what_runs_ahead_shares_nothing_that_was_not_asked_for(ahead: int) -> None:
    """Row by row through two pages: the page that both share is written by steps on their way."""
    for length in range(1, 36):
        engine, _ = checked_engine(run_ahead=ahead)
        chats = Chats(engine)
        (seq,) = chats.begin(list(range(length)))
        if length % 2:
            chats.rest()
        children = [chats.fork(seq), chats.fork(seq)]
        assert len(set(chats.turn(seq, *children))) == 1
        chats.ask(children[0], [7])
        chats.answer(children[0])
        chats.turn(seq, *children)
        chats.worker.op(FreeSequence(seq))
        for _ in range(2):
            chats.turn(*children)


# --- where it stops ---------------------------------------------------------------------------------------------


def test_the_end_of_the_context_is_the_end(ahead: int) -> None:
    """The runner refuses any position beyond it; the call that would go there fails as it always did."""
    engine, _ = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    (seq,) = chats.begin([3] * (CONTEXT - 5))
    for _ in range(5):
        chats.turn(seq)
    chats.ask(seq)
    failed = chats.failure(seq)
    assert failed.code == ErrorCode.CONTEXT_FULL
    assert failed.message == f"the sequence would have {CONTEXT + 1} tokens; the context is {CONTEXT}"
    # One token back, and it goes on.
    chats.truncate(seq, 1)
    chats.turn(seq)


@pytest.mark.parametrize("limit", ["tenant", "pool"])
def test_a_full_cache_fails_the_same_call_with_the_same_words(limit: str, ahead: int) -> None:
    messages = []
    for depth in (0, ahead):
        engine, _ = checked_engine(run_ahead=depth, pages=2 if limit == "pool" else 64, clock=lambda: 5.0)
        if limit == "tenant":
            engine.set_quota(TenantQuota("a", 2, PLENTY, 1))
        chats = Chats(engine)
        (seq,) = chats.begin([1] * 28)
        for _ in range(4):
            chats.turn(seq)
        chats.ask(seq)
        failed = chats.failure(seq)
        messages.append((failed.code, failed.message, failed.limit, chats.stats().minute_tokens))
        chats.truncate(seq, 3)
        chats.turn(seq)
    assert messages[0] == messages[1]


def test_running_ahead_takes_no_page_that_somebody_uses(ahead: int) -> None:
    """Two sequences fill the cache to the last place; none of them is preempted for a token nobody asked for."""
    engine, _ = checked_engine(run_ahead=ahead, pages=4)
    chats = Chats(engine)
    seqs = chats.begin([1] * 31, [2] * 31)
    chats.rest()
    chats.turn(*seqs)
    chats.rest()
    assert engine.stats().preemptions == 0
    assert engine.stats().pages_used == 4


def test_tokens_a_minute_are_those_that_were_asked_for(ahead: int) -> None:
    now = [100.0]
    engine, _ = checked_engine(run_ahead=ahead, clock=lambda: now[0])
    engine.set_quota(TenantQuota("a", 64, 10, 1))
    chats = Chats(engine)
    (seq,) = chats.begin([1, 2, 3])
    for _ in range(7):
        chats.turn(seq)
    assert chats.stats().minute_tokens == 10
    chats.ask(seq)
    failed = chats.failure(seq)
    assert failed.limit is not None
    assert (failed.limit.name, failed.limit.used) == ("tokens_per_minute", 10)
    now[0] += 60
    chats.turn(seq)


def test_a_limit_that_is_lowered_holds_for_those_that_go_on(ahead: int) -> None:
    engine, _ = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    (seq,) = chats.begin([1] * 40)
    chats.turn(seq)
    chats.rest()
    engine.set_quota(TenantQuota("a", 2, PLENTY, 1))
    chats.ask(seq)
    failed = chats.failure(seq)
    assert (failed.code, failed.limit) == (ErrorCode.LIMIT, LimitMet("kv_pages", 2, 3))


def test_more_sequences_than_lanes_all_go_on(ahead: int) -> None:
    engine, _ = checked_engine(run_ahead=ahead, lanes=3, budget=16)
    chats = Chats(engine)
    seqs = chats.begin(*[[number, 1, 2] for number in range(8)])
    for _ in range(40):
        chats.turn(*seqs)
    assert engine.stats().max_sequences == 3


def test_stalled_guests_do_not_keep_the_lanes_from_others(ahead: int) -> None:
    engine, _ = checked_engine(run_ahead=ahead, lanes=2)
    chats = Chats(engine)
    chats.begin([1], [2])
    chats.rest()
    (seq,) = chats.begin([3])
    for _ in range(100):
        chats.turn(seq)
    chats.rest()
    assert chats.stats().ahead_tokens >= 30


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rested", [True, False], ids=["settled", "in flight"])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_token_that_cannot_be_drawn_fails_its_call_whenever_it_was_computed(
    at: int, rested: bool, ahead: int
) -> None:
    """Also the one that was run ahead, and what was run ahead after it is forgotten."""
    engine, runner = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    prompt = [1, 2, 3]
    want = _greedy(prompt, 8)
    runner.undrawable = lambda state: state == state_of(prompt + want[:at])
    (neighbour,) = chats.begin([9, 9])
    seq = chats.start(prompt)
    for token in want[:at]:
        assert chats.answer(seq) == token
        if rested:
            chats.rest()
        chats.ask(seq)
    call, _ = chats.asked[seq]
    failed = chats.result(call)
    assert isinstance(failed, CallFailed) and failed.code == ErrorCode.INTERNAL
    chats.turn(neighbour)
    # The call changed nothing: it can be made again.
    runner.undrawable = lambda state: False
    last = chats.tokens[seq][-1:] if at else prompt
    chats.tokens[seq] = prompt + want[: at - 1] if at else []
    chats.ask(seq, last)
    assert chats.answer(seq) == want[at]
    chats.turn(seq, neighbour)
    assert engine.stats().pages_used == 2


def _greedy(tokens: list[int], count: int) -> list[int]:
    engine, _ = checked_engine()
    chats = Chats(engine)
    (seq,) = chats.begin(tokens)
    drawn = [chats.given[seq].token]
    while len(drawn) < count:
        drawn += chats.turn(seq)
    return drawn


# --- metering ---------------------------------------------------------------------------------------------------


def test_every_computed_token_is_counted_once_and_charged(ahead: int) -> None:
    """What the device computed is what the tenants' counters say, used or wasted; shares are charged with all."""
    rng = random.Random(ahead)
    engine, runner = checked_engine(run_ahead=ahead, pages=200, lanes=16)
    chats = Chats(engine)
    seqs = chats.begin(*[[rng.randrange(VOCAB) for _ in range(rng.randint(2, 40))] for _ in range(5)])
    for _ in range(60):
        some = rng.sample(seqs, rng.randint(1, 5))
        if rng.random() < 0.3:
            chats.truncate(some[0], rng.randint(1, 2))
            chats.turn(some[0])
        elif rng.random() < 0.3:
            for seq in some:
                chats.ask(seq, [rng.randrange(VOCAB)])
                chats.answer(seq)
        else:
            chats.turn(*some)
        if rng.random() < 0.2:
            chats.rest()
    chats.worker.op(EndRun(1))
    chats.rest()
    stats = chats.stats()
    assert stats.wasted_tokens > 5 and stats.ahead_tokens > 5
    assert runner.computed == stats.prefill_tokens + stats.decode_tokens + stats.wasted_tokens
    charged = PREFILL_WEIGHT * stats.prefill_tokens + DECODE_WEIGHT * (stats.decode_tokens + stats.wasted_tokens)
    assert account(engine).counter == pytest.approx(charged)


def test_a_tenant_that_wastes_without_end_is_no_longer_run_ahead_for(ahead: int) -> None:
    engine, _ = checked_engine(run_ahead=ahead, lanes=16, pages=200)
    chats = Chats(engine)
    (fickle,), (steady,) = chats.begin([1, 2]), chats.begin([3, 4], tenant="b")
    calls = 1000
    for turn in range(calls):
        if turn % 50 == 49:
            for seq in (fickle, steady):
                chats.truncate(seq, len(chats.tokens[seq]))
        chats.ask(fickle, [turn % VOCAB])
        chats.ask(steady)
        chats.answer(fickle)
        chats.answer(steady)
        chats.rest()
    wasted, spared = chats.stats("a").wasted_tokens, chats.stats("b").wasted_tokens
    assert wasted <= 0.35 * calls
    assert chats.stats("b").ahead_tokens >= 0.8 * calls > 10 * spared


def test_a_tenant_that_comes_back_by_going_on_has_saved_nothing_up(ahead: int) -> None:
    """Its counter is lifted to that of the others, as by any other call: idle time buys no later share."""
    engine, _ = checked_engine(run_ahead=ahead, pages=200)
    chats = Chats(engine)
    (seq,) = chats.begin([1, 2])
    chats.rest()
    for number in range(20):
        chats.begin([number] * 48, tenant="b")
    before = account(engine, "b").counter
    assert account(engine).counter < 20 < before
    chats.turn(seq)
    assert account(engine).counter >= before


def test_what_a_call_was_masked_with_is_not_kept(ahead: int) -> None:
    engine, _ = checked_engine(run_ahead=ahead)
    chats = Chats(engine)
    bias = {"bias_tokens": b"\1\0\0\0" * 1000, "bias_values": b"\0\0\0\0" * 1000}
    for p in (SamplingParams(mask=b"\xff" * 125), SamplingParams(**bias)):
        chats.answer(chats.start([1, 2], p))
    for sequence in engine.scheduler.sequences:
        kept = sequence.sampling
        assert kept is None or (kept.mask is None and kept.bias_tokens is None)


def test_many_guests_that_end_together_do_not_end_running_ahead(ahead: int) -> None:
    """Each run ends with rows that nobody claims: that is no reason to stop for the runs that follow."""
    engine, _ = checked_engine(run_ahead=ahead, lanes=128, pages=600, budget=1024)
    chats = Chats(engine)
    for run in range(3):
        before = chats.stats().ahead_tokens if run else 0
        seqs = chats.begin(*[[run, number] for number in range(128)])
        for _ in range(20):
            chats.turn(*seqs)
        chats.worker.op(EndRun(1))
        chats.rest()
        assert chats.stats().ahead_tokens - before >= 0.8 * 20 * 128, f"in round {run}"


# --- a real model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


def test_a_page_taken_for_a_row_run_ahead_shows_nothing_of_its_last_holder(folder: Path, ahead: int) -> None:
    """All that the tenant does not hold is NaN before each step: a masked place is multiplied by 0."""
    engine = make_engine(folder, run_ahead=ahead)
    chats = Chats(engine, checked=False)
    seqs = [chats.start([1] * 5, SamplingParams(logprob=True)), chats.start([2] * 30, SamplingParams(logprob=True))]
    for seq in seqs:
        chats.answer(seq)
    for _ in range(60):
        held = {page for sequence in engine.scheduler.sequences for page in sequence.pages}
        for layer in kv_layers(engine):
            layer[:, :, [page for page in range(64) if page not in held]] = float("nan")
        chats.turn(*seqs)
        assert all(np.isfinite(chats.given[seq].logprob) for seq in seqs)
    assert chats.stats().ahead_tokens > 50
