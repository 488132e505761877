"""The engine as its callers see it: forks, truncation, prefixes and preemption never change a token."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from realm.engine.core import EngineCore
from realm.guests.abi import ErrorCode
from realm.messages import (
    CallDone,
    EndRun,
    ForkSequence,
    Forward,
    FreeSequence,
    OpenSaved,
    SamplingParams,
    SaveSequence,
    TruncateSequence,
)
from tests.tiny import Driver, make_engine, make_model, pack

GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


@pytest.fixture
def driver(folder: Path) -> Driver:
    return Driver(make_engine(folder))


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]


def test_one_step_serves_all_pending_calls(driver: Driver) -> None:
    seqs = [driver.open(tenant) for tenant in ("a", "b", "c")]
    driver.wait(*[driver.ask(seq, prompt(4, seq), GREEDY) for seq in seqs])
    calls = [driver.ask(seq, [3], GREEDY) for seq in seqs]
    before = driver.engine.stats()
    driver.step()
    assert all(call in driver.answers for call in calls)
    after = driver.engine.stats()
    assert after.steps == before.steps + 1
    assert after.shared_steps == before.shared_steps + 1
    assert after.max_sequences == 3


def test_a_fork_goes_its_own_way(driver: Driver) -> None:
    text = prompt(21)
    alone = {token: driver.greedy([*text, token], 8) for token in (5, 6)}
    parent = driver.open()
    driver.wait(driver.ask(parent, text))
    child = driver.fresh()
    driver.op(ForkSequence(parent, child))
    got: dict[int, list[int]] = {5: [], 6: []}
    asked = {parent: [5], child: [6]}
    for _ in range(8):
        calls = [driver.ask(seq, asked[seq], GREEDY) for seq in (parent, child)]
        for seq, first, done in zip((parent, child), (5, 6), driver.wait(*calls), strict=True):
            got[first].append(done.token)
            asked[seq] = [done.token]
    assert got == alone


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 32, 39])
def test_truncation_forgets_what_it_drops(driver: Driver, length: int) -> None:
    seq, text = driver.open(), prompt(40)
    driver.wait(driver.ask(seq, text, GREEDY))
    driver.op(TruncateSequence(seq, length))
    (done,) = driver.wait(driver.ask(seq, [11, 12], GREEDY))
    assert [done.token] == driver.greedy([*text[:length], 11, 12], 1, tenant="other")


def test_truncating_a_fork_leaves_its_parent_alone(driver: Driver) -> None:
    text = prompt(40)
    want = driver.greedy(text, 4, tenant="other")
    seq, child = driver.open(), driver.fresh()
    driver.wait(driver.ask(seq, text[:-1]))
    driver.op(ForkSequence(seq, child))
    driver.op(TruncateSequence(child, 20))
    driver.wait(driver.ask(child, [1] * 30))
    asked, got = text[-1:], []
    for _ in range(4):
        (done,) = driver.wait(driver.ask(seq, asked, GREEDY))
        got.append(done.token)
        asked = [done.token]
    assert got == want


def test_a_cached_prefix_gives_the_same_tokens_and_says_so(driver: Driver) -> None:
    text = prompt(70)
    first = driver.greedy(text, 6)
    seq = driver.open()
    (done,) = driver.wait(driver.ask(seq, text, GREEDY))
    assert done.cached == 64
    assert done.token == first[0]
    other = driver.open("b")
    (done,) = driver.wait(driver.ask(other, text, GREEDY))
    assert done.cached == 0
    assert done.token == first[0]


def test_preemption_changes_no_token(folder: Path) -> None:
    texts = {f"t{i}": prompt(20 + 7 * i, i) for i in range(6)}
    roomy = Driver(make_engine(folder))
    want = {name: roomy.greedy(text, 25) for name, text in texts.items()}
    tight = Driver(make_engine(folder, pages=7, token_budget=16))
    seqs = {name: tight.open(name) for name in texts}
    got: dict[str, list[int]] = {name: [] for name in texts}
    calls = {name: tight.ask(seqs[name], texts[name], GREEDY) for name in texts}
    while any(len(tokens) < 25 for tokens in got.values()):
        tight.step()
        for name, call in list(calls.items()):
            if call in tight.answers:
                (done,) = tight.wait(call)
                got[name].append(done.token)
                if len(got[name]) < 25:
                    calls[name] = tight.ask(seqs[name], [done.token], GREEDY)
                else:
                    del calls[name]
    assert got == want
    assert tight.engine.stats().preemptions > 0


def test_saved_sequences_are_the_tenants_own(driver: Driver) -> None:
    text = prompt(33)
    want = driver.greedy([*text, 4], 1)
    seq = driver.open("a")
    driver.wait(driver.ask(seq, text))
    driver.op(SaveSequence(900, seq, "chat"))
    driver.op(EndRun(1))
    mine = driver.fresh()
    driver.op(OpenSaved(901, mine, "a", 2, "chat"))
    driver.op(OpenSaved(902, driver.fresh(), "b", 3, "chat"))
    driver.step()
    assert driver.answers.pop(900) == CallDone(900, 33)
    assert driver.answers.pop(901) == CallDone(901, 33)
    assert driver.wait_failed(902).code == ErrorCode.NOT_FOUND
    (done,) = driver.wait(driver.ask(mine, [4], GREEDY))
    assert [done.token] == want


def test_logits_come_with_the_draw_when_both_are_wanted(driver: Driver) -> None:
    seq = driver.open()
    (done,) = driver.wait(driver.ask(seq, prompt(5), SamplingParams(logprob=True), logits=True))
    assert done.logits is not None
    logits = np.frombuffer(done.logits, "<f4").astype(np.float64)
    assert done.token == int(logits.argmax())
    assert done.logprob == pytest.approx(logits.max() - np.log(np.exp(logits).sum()), abs=1e-5)


def test_ending_a_run_in_mid_prompt_frees_every_page(folder: Path) -> None:
    driver = Driver(make_engine(folder, token_budget=16))
    driver.ask(driver.open(), prompt(100), GREEDY)
    driver.ask(driver.open(), prompt(90, 1), GREEDY)
    driver.step()
    assert driver.engine.stats().pages_used > 0
    driver.op(EndRun(1))
    driver.engine.check()
    assert driver.engine.stats().pages_used == 0
    assert not driver.engine.has_work()
    assert driver.engine.step() == {}


def test_a_dead_worker_leaves_nothing(driver: Driver) -> None:
    driver.ask(driver.open(), prompt(30), GREEDY)
    driver.step()
    driver.engine.drop_worker(Driver.WORKER)
    driver.engine.check()
    stats = driver.engine.stats()
    assert (stats.pages_used, sum(t.sequences for t in stats.tenants.values())) == (0, 0)


def bad_forward(handle: int, **changes: object) -> Forward:
    fields: dict[str, object] = {"call": 77, "seq": handle, "tokens": pack([1]), "sampling": None, "want_logits": False}
    return Forward(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"tokens": b""}, ErrorCode.INVALID_ARGUMENT),
        ({"tokens": b"abc"}, ErrorCode.INVALID_ARGUMENT),
        ({"tokens": pack([97])}, ErrorCode.INVALID_ARGUMENT),
        ({"tokens": pack([2**32 - 1])}, ErrorCode.INVALID_ARGUMENT),
        ({"tokens": pack([1] * 257)}, ErrorCode.CONTEXT_FULL),
        ({"sampling": SamplingParams(mask=bytes(13))}, ErrorCode.INVALID_ARGUMENT),
        ({"sampling": SamplingParams(mask=b"\xff")}, ErrorCode.INVALID_ARGUMENT),
        # Only a bit beyond the vocabulary of 97 is set.
        ({"sampling": SamplingParams(mask=bytes(12) + b"\x80")}, ErrorCode.INVALID_ARGUMENT),
        ({"seq": 424242}, ErrorCode.BAD_HANDLE),
    ],
)
def test_bad_calls_fail_and_change_nothing(driver: Driver, changes: dict[str, object], code: ErrorCode) -> None:
    seq = driver.open()
    driver.op(bad_forward(seq, **changes))
    assert driver.wait_failed(77).code == code
    (done,) = driver.wait(driver.ask(seq, [1, 2], GREEDY))
    assert [done.token] == driver.greedy([1, 2], 1)


def test_a_sequence_that_never_fits_is_refused(folder: Path) -> None:
    driver = Driver(make_engine(folder, pages=3))
    call = driver.ask(driver.open(), prompt(49), GREEDY)
    assert driver.wait_failed(call).code == ErrorCode.OUT_OF_MEMORY
    driver.wait(driver.ask(driver.open(), prompt(48), GREEDY))


def test_another_worker_cannot_touch_a_sequence(driver: Driver) -> None:
    seq = driver.open()
    driver.wait(driver.ask(seq, prompt(20)))
    engine: EngineCore = driver.engine
    engine.submit(8, [FreeSequence(seq), TruncateSequence(seq, 0), EndRun(1), bad_forward(seq)])
    results = engine.step()
    assert results[8][0].code == ErrorCode.BAD_HANDLE  # type: ignore[union-attr]
    (done,) = driver.wait(driver.ask(seq, [9], GREEDY))
    assert [done.token] == driver.greedy([*prompt(20), 9], 1, tenant="other")


def test_a_second_call_on_a_busy_sequence_is_refused(driver: Driver) -> None:
    seq = driver.open()
    first = driver.ask(seq, [1], GREEDY)
    second = driver.ask(seq, [2], GREEDY)
    assert driver.wait_failed(second).code == ErrorCode.BAD_HANDLE
    driver.wait(first)
