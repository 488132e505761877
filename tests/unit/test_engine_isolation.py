"""Nothing of one tenant reaches another: by value, by a poisoned page, by the cache or by a result.

NaN is the sharp poison: a masked position is multiplied by a weight of 0, and 0 * NaN is NaN. So these
tests put NaN wherever a tenant's sequences must not read, and ask for results equal to the bit.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from realm.engine.core import EngineCore
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.workers import WORKER_SHIFT
from realm.guests.abi import ErrorCode
from realm.messages import (
    CallDone,
    CallFailed,
    EndRun,
    ForkSequence,
    Forward,
    ForwardDone,
    FreeSequence,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TruncateSequence,
)
from tests.tiny import Driver, kv_layers, make_engine, make_model, pack

GREEDY = SamplingParams()
POISONS = [float("nan"), float("inf"), -3e38]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]


def poison(engine: EngineCore, value: float, *, but: tuple[str, ...] = ()) -> None:
    """Fill every page that the tenants ``but`` do not hold (cached ones are held, too), in all layers."""
    kept = {p for s in engine.scheduler.sequences if s.tenant.name in but for p in s.pages}
    kept |= {p for tenant in engine.tenants if tenant.name in but for p in tenant.cached}
    pages = [page for page in range(engine.scheduler.pool.total) if page not in kept]
    for layer in kv_layers(engine):
        layer[:, :, pages] = value


class Victim:
    """A tenant's day: prompts, decodes, a fork, truncation. Gives the logits of each call."""

    def __init__(self, driver: Driver, tenant: str = "victim") -> None:
        self.driver, self.tenant = driver, tenant

    def call(self, seq: int, tokens: list[int]) -> bytes:
        (done,) = self.driver.wait(self.driver.ask(seq, tokens, logits=True))
        assert done.logits is not None
        assert np.isfinite(np.frombuffer(done.logits, "<f4")).all()
        return done.logits

    def day(self) -> list[bytes]:
        driver = self.driver
        seq = driver.open(self.tenant, run=5)
        got = [self.call(seq, prompt(37, 1))]
        got += [self.call(seq, [token]) for token in prompt(14, 2)]
        child = driver.fresh()
        driver.op(ForkSequence(seq, child))
        got += [self.call(child, [4]), self.call(seq, [5])]
        driver.op(TruncateSequence(seq, 18))
        got += [self.call(seq, [token]) for token in prompt(20, 3)]
        got.append(self.call(child, prompt(40, 4)))
        driver.op(EndRun(5))
        return got


@pytest.fixture(scope="module")
def want(folder: Path) -> list[bytes]:
    return Victim(Driver(make_engine(folder))).day()


@pytest.mark.parametrize("value", POISONS)
def test_a_recycled_page_is_as_good_as_a_new_one(folder: Path, want: list[bytes], value: float) -> None:
    driver = Driver(make_engine(folder))
    poison(driver.engine, value)
    assert Victim(driver).day() == want


def test_pages_that_another_tenant_has_written_and_freed_leave_no_trace(folder: Path, want: list[bytes]) -> None:
    driver = Driver(make_engine(folder))
    for seed in range(6):
        seq = driver.open("writer")
        driver.wait(driver.ask(seq, prompt(250, 10 + seed)))
        if seed % 2:
            driver.op(FreeSequence(seq))
    assert driver.engine.scheduler.pool.free < 4
    driver.op(EndRun(1))
    poison(driver.engine, float("nan"))
    assert Victim(driver).day() == want


class PoisonedDriver(Driver):
    """Before each step, everything that the victim does not hold becomes NaN."""

    def step(self) -> None:
        poison(self.engine, float("nan"), but=("victim",))
        super().step()


def test_poisoned_neighbours_in_one_step_change_nothing(folder: Path) -> None:
    """Sequences of very different lengths decode in one group; the shorter one is padded."""

    def day(driver: Driver, neighbours: list[int]) -> list[bytes]:
        got = []
        seq = driver.open("victim", run=5)
        others = [driver.open(f"n{i}", run=5) for i in range(len(neighbours))]
        driver.wait(*[driver.ask(o, prompt(n, n)) for o, n in zip(others, neighbours, strict=True)])
        driver.wait(driver.ask(seq, prompt(40, 1)))
        for turn in range(30):
            calls = [driver.ask(o, [turn]) for o in others]
            mine = driver.ask(seq, [turn + 1], logits=True)
            (done, *_) = driver.wait(mine, *calls)
            assert done.logits is not None and np.isfinite(np.frombuffer(done.logits, "<f4")).all()
            got.append(done.logits)
        return got

    # Page counts 3 for the victim, then 1 to 7 for the others: one decode group with padding on both sides.
    lengths = [3, 20, 55, 90, 100]
    assert day(PoisonedDriver(make_engine(folder)), lengths) == day(Driver(make_engine(folder)), lengths)


def test_preemption_under_poison_changes_nothing(folder: Path) -> None:
    def day(driver: Driver) -> list[list[bytes]]:
        seqs = [driver.open("victim", run=5) for _ in range(3)]
        other = driver.open("other", run=5)
        calls = [driver.ask(seq, prompt(30 + 9 * i, i), logits=True) for i, seq in enumerate(seqs)]
        calls.append(driver.ask(other, prompt(30, 9), logits=True))
        got: list[list[bytes]] = [[] for _ in seqs]
        for turn in range(24):
            for i, done in enumerate(driver.wait(*calls)[:3]):
                assert done.logits is not None
                got[i].append(done.logits)
            calls = [driver.ask(seq, [turn + i], logits=True) for i, seq in enumerate([*seqs, other])]
        driver.wait(*calls)
        return got

    class Recycling(Driver):
        """Free pages become NaN before each step; sequences keep their own."""

        def step(self) -> None:
            poison(self.engine, float("nan"), but=("victim", "other"))
            super().step()

    clean, tight = Driver(make_engine(folder, pages=10)), Recycling(make_engine(folder, pages=10))
    assert day(tight) == day(clean)
    assert tight.engine.stats().preemptions > 0


def test_a_copy_on_write_page_holds_only_what_its_tenant_wrote(folder: Path) -> None:
    driver = Driver(make_engine(folder))
    poison(driver.engine, float("nan"))
    seq, child = driver.open("victim"), driver.fresh()
    driver.wait(driver.ask(seq, prompt(20)))
    driver.op(ForkSequence(seq, child))
    driver.wait(driver.ask(child, [1]), driver.ask(seq, [2]))
    pages = {p for s in driver.engine.scheduler.sequences for p in s.pages}
    assert len(pages) == 3
    for layer in kv_layers(driver.engine):
        assert bool(torch.isfinite(layer[:, :, sorted(pages)]).all())


def test_the_page_that_pads_is_never_written(folder: Path) -> None:
    driver = Driver(make_engine(folder, pages=8))
    Victim(driver).day()
    for layer in kv_layers(driver.engine):
        assert layer.shape[2] == 9
        assert not layer[:, :, 8].any()


# --- the prefix cache -------------------------------------------------------------------------------


def computed_tokens(driver: Driver, tenant: str, text: list[int]) -> tuple[int, int]:
    """How many tokens a prompt made the engine compute, and how many it says were cached."""
    before = driver.engine.stats()
    seq = driver.open(tenant, run=9)
    (done,) = driver.wait(driver.ask(seq, text, GREEDY))
    driver.op(EndRun(9))
    after = driver.engine.stats()
    spent = after.prefill_tokens + after.decode_tokens - before.prefill_tokens - before.decode_tokens
    return spent, done.cached


def test_a_prompt_that_another_tenant_has_cached_costs_the_same_as_any_other(folder: Path) -> None:
    driver = Driver(make_engine(folder))
    text = prompt(100)
    assert computed_tokens(driver, "a", text) == (100, 0)
    assert computed_tokens(driver, "a", text) == (4, 96)
    steps = driver.engine.stats().steps
    assert computed_tokens(driver, "b", text) == (100, 0)
    known = driver.engine.stats().steps - steps
    assert computed_tokens(driver, "b", prompt(100, 1)) == (100, 0)
    assert driver.engine.stats().steps - steps == 2 * known
    stats = driver.engine.stats().tenants
    assert (stats["a"].cached_tokens, stats["b"].cached_tokens) == (96, 0)


def test_the_salt_is_new_with_each_engine_and_each_tenant(folder: Path) -> None:
    roots = set()
    for engine in (make_engine(folder), make_engine(folder)):
        for tenant in ("a", "b"):
            account = engine.tenants.of(tenant)
            assert account is not None
            roots.add(account.root)
    assert len(roots) == 4


def test_what_is_found_in_the_cache_is_equal_to_what_is_computed(folder: Path) -> None:
    """A page found again is the tenant's own, whatever has been written everywhere else since."""
    driver = Driver(make_engine(folder))
    seq = driver.open("victim")
    first = Victim(driver).call(seq, prompt(70))
    driver.op(FreeSequence(seq))
    cached = {page for t in driver.engine.tenants for page in t.cached}
    assert len(cached) == 70 // PAGE_SIZE
    for layer in kv_layers(driver.engine):
        layer[:, :, [page for page in range(64) if page not in cached]] = float("nan")
    (done,) = driver.wait(driver.ask(driver.open("victim"), prompt(70), logits=True))
    assert done.cached == 64
    assert done.logits is not None
    np.testing.assert_allclose(np.frombuffer(done.logits, "<f4"), np.frombuffer(first, "<f4"), rtol=1e-5, atol=1e-5)


# --- names and results --------------------------------------------------------------------------------


def test_saved_names_are_each_tenants_own(folder: Path) -> None:
    driver = Driver(make_engine(folder))
    for call, (tenant, length) in enumerate([("a", 20), ("b", 30)]):
        seq = driver.open(tenant)
        driver.wait(driver.ask(seq, prompt(length)))
        driver.op(SaveSequence(900 + call, seq, "same"))
    for call, tenant in enumerate("abc"):
        driver.op(OpenSaved(910 + call, driver.fresh(), tenant, 2, "same"))
    driver.step()
    assert driver.answers[910] == CallDone(910, 20)
    assert driver.answers[911] == CallDone(911, 30)
    failed = driver.answers[912]
    assert isinstance(failed, CallFailed) and failed.code == ErrorCode.NOT_FOUND


def test_each_result_goes_to_the_worker_and_call_that_asked_and_logits_only_to_who_wanted_them(folder: Path) -> None:
    engine = make_engine(folder)
    texts = {worker: prompt(10 + worker, worker) for worker in (1, 2, 3)}
    # The same call numbers, in one step.
    for worker, text in texts.items():
        seq = worker << WORKER_SHIFT
        sampling = GREEDY if worker != 2 else None
        engine.submit(worker, [OpenSequence(seq, "t", 1), Forward(7, seq, pack(text), sampling, worker != 1)])
    results = engine.step()
    assert sorted(results) == [1, 2, 3]
    for worker, text in texts.items():
        (done,) = results[worker]
        assert isinstance(done, ForwardDone) and done.call == 7
        assert (done.logits is None) == (worker == 1)
        alone = Driver(make_engine(folder))
        (want,) = alone.wait(alone.ask(alone.open(), text, GREEDY, logits=True))
        if done.logits is not None and want.logits is not None:
            ours, theirs = np.frombuffer(done.logits, "<f4"), np.frombuffer(want.logits, "<f4")
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert done.token == (-1 if worker == 2 else want.token)
