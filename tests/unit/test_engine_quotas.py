"""What one tenant may take from the engine: pages, tokens a minute, saved sequences, memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from realm.engine import workers as workers_module
from realm.engine.core import EngineCore
from realm.engine.kv_cache import PROTECTED_SECONDS
from realm.engine.sequence import BYTES_PER_PAGE, SEQUENCE_BYTES
from realm.engine.tenants import MAX_NAME, MAX_TENANTS, Tenants
from realm.guests.abi import ErrorCode
from realm.limits import TenantLimits
from realm.messages import (
    CallDone,
    EndRun,
    ForkSequence,
    FreeSequence,
    LimitMet,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TenantQuota,
    TenantStats,
    TruncateSequence,
)
from tests.tiny import Driver, make_engine, make_model

GREEDY = SamplingParams()
PLENTY = 1 << 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def driver(folder: Path, clock: Clock) -> Driver:
    return Driver(make_engine(folder, clock=clock))


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]


def quota(driver: Driver, tenant: str, **values: int) -> None:
    defaults = {"kv_pages": 8192, "tokens_per_minute": PLENTY, "saved_sequences": 64}
    driver.engine.set_quota(TenantQuota(tenant, **{**defaults, **values}))


def stats(engine: EngineCore, tenant: str) -> TenantStats:
    return engine.stats().tenants[tenant]


# --- pages ----------------------------------------------------------------------------------------


def test_pages_are_counted_once_however_many_forks_share_them(driver: Driver) -> None:
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(40)))
    children = [driver.fresh() for _ in range(5)]
    for child in children:
        driver.op(ForkSequence(seq, child))
    assert stats(driver.engine, "a").pages == 3
    driver.wait(*[driver.ask(child, [1]) for child in children])
    # Each fork wrote into a copy of the third page.
    assert stats(driver.engine, "a").pages == 2 + 1 + len(children)
    driver.op(EndRun(1))
    assert (stats(driver.engine, "a").pages, stats(driver.engine, "a").sequences) == (0, 0)


def test_a_tenant_at_its_limit_loses_its_own_idle_pages_and_nobody_elses(folder: Path) -> None:
    driver = Driver(make_engine(folder, pages=64))
    quota(driver, "a", kv_pages=6)
    idle, busy = driver.open("b"), driver.open("b")
    driver.wait(driver.ask(idle, prompt(200, 9)))
    first, second = driver.open("a"), driver.open("a")
    driver.wait(driver.ask(first, prompt(60, 1)))
    for _ in range(3):
        driver.wait(driver.ask(busy, [5]))  # the others become idle
    driver.wait(driver.ask(second, prompt(60, 2), GREEDY))
    assert stats(driver.engine, "a").pages <= 6
    assert driver.engine.stats().preemptions == 1
    assert stats(driver.engine, "b").pages == 14
    assert driver.engine.scheduler.pool.free > 40
    # What lost its pages is computed again when it is used.
    (done,) = driver.wait(driver.ask(first, [3], GREEDY))
    assert [done.token] == driver.greedy([*prompt(60, 1), 3], 1, tenant="fresh")


def test_younger_calls_of_a_tenant_at_its_limit_wait_and_every_one_finishes(folder: Path) -> None:
    roomy = Driver(make_engine(folder))
    want = {i: roomy.greedy(prompt(50, i), 12, tenant=f"t{i}") for i in range(5)}
    driver = Driver(make_engine(folder))
    quota(driver, "a", kv_pages=5)
    seqs = {i: driver.open("a") for i in range(5)}
    got: dict[int, list[int]] = {i: [] for i in seqs}
    calls = {i: driver.ask(seqs[i], prompt(50, i), GREEDY) for i in seqs}
    while calls:
        assert driver.engine.has_work()
        driver.step()
        assert stats(driver.engine, "a").pages <= 5
        for i, call in list(calls.items()):
            if call in driver.answers:
                (done,) = driver.wait(call)
                got[i].append(done.token)
                del calls[i]
                if len(got[i]) < 12:
                    calls[i] = driver.ask(seqs[i], [done.token], GREEDY)
    assert got == want


def test_a_sequence_that_alone_needs_more_than_the_limit_fails_and_says_so(driver: Driver) -> None:
    quota(driver, "a", kv_pages=4)
    seq = driver.open("a")
    failed = driver.wait_failed(driver.ask(seq, prompt(65), GREEDY))
    assert (failed.code, failed.limit) == (ErrorCode.LIMIT, LimitMet("kv_pages", 4, 5))
    assert "kv_pages" in failed.message
    driver.wait(driver.ask(seq, prompt(64), GREEDY))
    driver.wait(driver.ask(driver.open("b"), prompt(65), GREEDY))


def test_a_limit_that_falls_below_a_pending_call_fails_it_and_takes_its_tokens_back(folder: Path) -> None:
    driver = Driver(make_engine(folder, token_budget=16))
    seq, small = driver.open("a"), driver.open("a")
    driver.wait(driver.ask(seq, prompt(20)))
    long, short = driver.ask(seq, prompt(100, 1), GREEDY), driver.ask(small, prompt(30), GREEDY)
    driver.step()
    quota(driver, "a", kv_pages=3)
    assert driver.wait_failed(long).limit == LimitMet("kv_pages", 3, 8)
    driver.wait(short)
    (done,) = driver.wait(driver.ask(seq, [7], GREEDY))
    assert [done.token] == driver.greedy([*prompt(20), 7], 1, tenant="fresh")


def test_one_sequence_may_fill_the_limit_and_write_into_a_shared_page(driver: Driver) -> None:
    quota(driver, "a", kv_pages=4)
    seq, child = driver.open("a"), driver.fresh()
    driver.wait(driver.ask(seq, prompt(60)))
    driver.op(ForkSequence(seq, child))
    driver.wait(*[driver.ask(s, [i], GREEDY) for i, s in enumerate((seq, child))])
    assert stats(driver.engine, "a").pages <= 4


def test_a_prompt_that_is_cached_obeys_the_limit(driver: Driver) -> None:
    quota(driver, "a", kv_pages=5)
    text = prompt(70)
    want = driver.greedy(text, 1, tenant="a")
    driver.op(EndRun(1))
    held = driver.open("a", run=2)
    driver.wait(driver.ask(held, prompt(40, 5)))
    calls = [driver.ask(driver.open("a", run=2), text, GREEDY) for _ in range(3)]
    while any(call not in driver.answers for call in calls):
        driver.step()
        assert stats(driver.engine, "a").pages <= 5
    assert [driver.wait(call)[0].token for call in calls] == want * 3


def test_a_call_that_waits_for_pages_is_not_starved_by_younger_decodes(folder: Path) -> None:
    """A younger sequence decodes without end; the older one's prompt needs nearly all pages."""
    driver = Driver(make_engine(folder, token_budget=512))
    quota(driver, "a", kv_pages=8)
    old, young = driver.open("a"), driver.open("a")
    driver.wait(driver.ask(old, [1]))
    (done,) = driver.wait(driver.ask(young, prompt(20), GREEDY))
    wanted = driver.ask(old, prompt(110), GREEDY)
    turn = driver.ask(young, [done.token], GREEDY)
    for _ in range(100):
        driver.step()
        if wanted in driver.answers:
            break
        if turn in driver.answers:
            (done,) = driver.wait(turn)
            turn = driver.ask(young, [done.token], GREEDY)
    driver.wait(wanted, turn)


def test_a_thousand_forks_of_one_page_are_preempted_in_one_plan(folder: Path) -> None:
    """Preempting a fork frees nothing before the last one: each look-up must be cheap, and progress sure."""
    driver = Driver(make_engine(folder, pages=8, token_budget=512))
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(16)))
    for _ in range(1000):
        driver.op(ForkSequence(seq, driver.fresh()))
    other = driver.open("b")
    for _ in range(4):
        driver.wait(driver.ask(other, [3]))
    driver.wait(driver.ask(driver.open("b"), prompt(100, 1), GREEDY))
    assert stats(driver.engine, "a").pages == 0
    assert driver.engine.stats().preemptions == 1001


# --- cached pages ---------------------------------------------------------------------------------


def cached_of(driver: Driver, tenant: str, text: list[int]) -> int:
    seq = driver.open(tenant, run=77)
    (done,) = driver.wait(driver.ask(seq, text, GREEDY))
    driver.op(FreeSequence(seq))
    return done.cached


def test_cycling_through_prompts_flushes_ones_own_cache_first(folder: Path, clock: Clock) -> None:
    driver = Driver(make_engine(folder, pages=32, clock=clock))
    text = prompt(100)
    cached_of(driver, "modest", text)
    for seed in range(40):
        cached_of(driver, "cycling", prompt(100, seed + 1))
    assert cached_of(driver, "modest", text) == 96
    # Nor does it help the cycling one to be many tenants' worth: its cache stays within its share.
    shares = {t.name: len(t.cached) for t in driver.engine.tenants}
    assert shares["cycling"] <= 32 - shares["modest"]


def test_a_tenant_below_its_share_takes_from_whoever_holds_most(folder: Path, clock: Clock) -> None:
    driver = Driver(make_engine(folder, pages=32, clock=clock))
    for seed in range(10):
        cached_of(driver, "full", prompt(64, seed))
    assert driver.engine.scheduler.pool.free == 0
    cached_of(driver, "b", prompt(64, 50))
    assert cached_of(driver, "b", prompt(64, 50)) == 48
    cached_of(driver, "c", prompt(64, 60))
    assert cached_of(driver, "b", prompt(64, 50)) == 48


def test_the_cache_of_a_tenant_that_has_gone_is_no_longer_protected(folder: Path, clock: Clock) -> None:
    driver = Driver(make_engine(folder, pages=32, clock=clock))
    cached_of(driver, "gone", prompt(200))
    clock.now += PROTECTED_SECONDS + 1
    for seed in range(12):
        cached_of(driver, "active", prompt(100, seed))
    held = {t.name: len(t.cached) for t in driver.engine.tenants}
    assert held["gone"] == 0
    assert held["active"] >= 30


# --- tokens a minute ------------------------------------------------------------------------------


def test_tokens_a_minute_are_spent_by_prompts_and_decodes_and_come_back(driver: Driver, clock: Clock) -> None:
    quota(driver, "a", tokens_per_minute=60)
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(58), GREEDY))
    driver.wait(driver.ask(seq, [1], GREEDY))
    assert stats(driver.engine, "a").minute_tokens == 59
    driver.wait(driver.ask(seq, [1], GREEDY))
    failed = driver.wait_failed(driver.ask(seq, [1], GREEDY))
    assert failed.code == ErrorCode.LIMIT
    assert failed.limit == LimitMet("tokens_per_minute", 60, 60, 1.0)
    driver.wait(driver.ask(driver.open("b"), prompt(58), GREEDY))
    clock.now += 1.0
    (done,) = driver.wait(driver.ask(seq, [1], GREEDY))
    assert [done.token] == driver.greedy([*prompt(58), 1, 1, 1], 1, tenant="fresh")


def test_a_prompt_longer_than_what_is_left_goes_into_debt_that_the_next_call_waits_for(
    driver: Driver, clock: Clock
) -> None:
    quota(driver, "a", tokens_per_minute=60)
    driver.wait(driver.ask(driver.open("a"), prompt(180), GREEDY))
    failed = driver.wait_failed(driver.ask(driver.open("a"), [1], GREEDY))
    assert failed.limit == LimitMet("tokens_per_minute", 60, 180, 121.0)
    clock.now += 121.0
    driver.wait(driver.ask(driver.open("a"), [1], GREEDY))


def test_a_refused_call_spends_nothing(driver: Driver) -> None:
    quota(driver, "a", tokens_per_minute=60)
    seq = driver.open("a")
    driver.wait_failed(driver.ask(seq, [97], GREEDY))
    driver.wait_failed(driver.ask(seq, prompt(30), SamplingParams(mask=b"")))
    assert stats(driver.engine, "a").minute_tokens == 0


def test_a_rate_of_nothing_refuses_for_good(driver: Driver) -> None:
    quota(driver, "a", tokens_per_minute=0)
    failed = driver.wait_failed(driver.ask(driver.open("a"), [1], GREEDY))
    assert failed.limit == LimitMet("tokens_per_minute", 0, 0, None)


def test_a_new_rate_counts_at_once_and_full_buckets_go(driver: Driver, clock: Clock) -> None:
    quota(driver, "a", tokens_per_minute=600)
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(100), GREEDY))
    quota(driver, "a", tokens_per_minute=60)
    failed = driver.wait_failed(driver.ask(seq, [1], GREEDY))
    assert failed.limit == LimitMet("tokens_per_minute", 60, 100, 41.0)
    clock.now += 120
    assert stats(driver.engine, "a").minute_tokens == 0
    assert all(tenant.bucket is None for tenant in driver.engine.tenants)


# --- defaults, saved sequences, memory --------------------------------------------------------------


def test_limits_before_any_quota_are_the_defaults_and_the_unnamed_one_is_for_the_others(driver: Driver) -> None:
    limits = TenantLimits()
    account = driver.engine.tenants.of("a")
    assert account is not None
    assert account.quota == TenantQuota("", limits.kv_pages, limits.tokens_per_minute, limits.saved_sequences)
    quota(driver, "named", kv_pages=2)
    quota(driver, "", kv_pages=3)
    for tenant, pages in (("named", 2), ("a", 3), ("later", 3)):
        failed = driver.wait_failed(driver.ask(driver.open(tenant), prompt(100), GREEDY))
        assert failed.limit == LimitMet("kv_pages", pages, 7)


def save(driver: Driver, seq: int, name: str, call: int = 900) -> None:
    driver.op(SaveSequence(call, seq, name))


def test_saved_sequences_have_a_limit_and_replacing_one_is_no_more(driver: Driver) -> None:
    quota(driver, "a", saved_sequences=2)
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(20)))
    for call, name in enumerate(("x", "y", "x", "z")):
        save(driver, seq, name, 900 + call)
    driver.step()
    assert [driver.answers.pop(900 + call) for call in range(3)] == [CallDone(900 + call, 20) for call in range(3)]
    failed = driver.wait_failed(903)
    assert (failed.code, failed.limit) == (ErrorCode.LIMIT, LimitMet("saved_sequences", 2, 2))
    assert stats(driver.engine, "a").saved == 2
    other = driver.open("b")
    save(driver, other, "z", 904)
    driver.step()
    assert driver.answers.pop(904) == CallDone(904, 0)


def test_saved_copies_are_the_first_to_lose_their_pages_and_keep_their_tokens(driver: Driver) -> None:
    quota(driver, "a", kv_pages=5)
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(60)))
    save(driver, seq, "x")
    driver.op(FreeSequence(seq))
    driver.step()
    for _ in range(3):
        driver.wait(driver.ask(driver.open("b"), [1]))
    driver.wait(driver.ask(driver.open("a"), prompt(70, 1), GREEDY))
    opened = driver.fresh()
    driver.op(OpenSaved(901, opened, "a", 5, "x"))
    (done,) = driver.wait(driver.ask(opened, [2], GREEDY))
    assert driver.answers.pop(901) == CallDone(901, 60)
    assert [done.token] == driver.greedy([*prompt(60), 2], 1, tenant="fresh")


def test_a_tenants_sequences_and_tokens_are_bounded_by_what_comes_with_its_pages(driver: Driver) -> None:
    quota(driver, "a", kv_pages=16)
    room = 16 * BYTES_PER_PAGE
    seq = driver.open("a")
    driver.wait(driver.ask(seq, prompt(250)))
    children = [driver.fresh() for _ in range(100)]
    for child in children:
        driver.op(ForkSequence(seq, child))
    account = driver.engine.tenants.find("a")
    assert account is not None
    each = SEQUENCE_BYTES + 4 * 250
    assert room - each < account.bytes <= room
    assert account.open == room // each
    refused = children[-1]
    failed = driver.wait_failed(driver.ask(refused, [1], GREEDY))
    assert failed.code == ErrorCode.LIMIT
    assert failed.limit is not None and failed.limit.name == "kv_pages"
    # A fork of what was refused, and a copy under a name, are refused for the same reason.
    grandchild = driver.fresh()
    driver.op(ForkSequence(refused, grandchild))
    assert driver.wait_failed(driver.ask(grandchild, [1], GREEDY)).code == ErrorCode.LIMIT
    save(driver, seq, "x")
    assert driver.wait_failed(900).code == ErrorCode.LIMIT
    driver.wait(driver.ask(driver.open("b"), [1], GREEDY))
    for child in children:
        driver.op(FreeSequence(child))
    again = driver.fresh()
    driver.op(ForkSequence(seq, again))
    driver.wait(driver.ask(again, [1], GREEDY))


def test_masks_and_biases_of_pending_calls_count(driver: Driver) -> None:
    quota(driver, "a", kv_pages=4)
    bias = SamplingParams(bias_tokens=bytes(4 * 1024), bias_values=bytes(4 * 1024))
    calls = [driver.ask(driver.open("a"), [1], bias) for _ in range(3)]
    assert driver.wait_failed(calls[2]).code == ErrorCode.LIMIT
    driver.wait(calls[0])
    driver.wait(driver.ask(driver.open("a"), [1], bias))


def test_all_tenants_together_are_bounded_too(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "MAX_BYTES", 10 * SEQUENCE_BYTES)
    seqs = [driver.open(f"t{i}") for i in range(12)]
    assert driver.engine.scheduler.bytes == 10 * SEQUENCE_BYTES
    assert driver.wait_failed(driver.ask(seqs[11], [1])).code == ErrorCode.OUT_OF_MEMORY
    driver.op(TruncateSequence(seqs[0], 0))


def test_invented_tenants_fill_nothing() -> None:
    tenants = Tenants("m")
    assert tenants.of("x" * (MAX_NAME + 1)) is None
    for number in range(MAX_TENANTS + 1000):
        account = tenants.of(f"t{number}")
        assert account is not None
        account.stats.decode_tokens = 1
    assert len(list(tenants)) == MAX_TENANTS
    assert tenants.forgotten.decode_tokens == 1000
    for account in tenants:
        account.open = 1
    assert tenants.of("one more") is None


def test_a_name_that_is_forgotten_and_comes_back_finds_nothing_cached_of_another() -> None:
    tenants = Tenants("m", secret=bytes(32))
    a, b = tenants.of("a"), tenants.of("b")
    assert a is not None and b is not None
    assert a.root != b.root
    again, elsewhere = Tenants("m", secret=bytes(32)).of("a"), Tenants("m").of("a")
    assert again is not None and elsewhere is not None
    assert again.root == a.root != elsewhere.root


def test_opening_too_many_with_a_name_that_is_too_long_changes_nothing(driver: Driver) -> None:
    seq = driver.fresh()
    driver.op(OpenSequence(seq, "x" * (MAX_NAME + 1), 1))
    assert driver.wait_failed(driver.ask(seq, [1])).code == ErrorCode.BAD_HANDLE
    mine = driver.open()
    save(driver, mine, "n" * (MAX_NAME + 1))
    assert driver.wait_failed(900).code == ErrorCode.INVALID_ARGUMENT
