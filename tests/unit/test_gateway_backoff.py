"""Addresses that try keys: how long they wait, and that nobody else does."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from realm.gateway.backoff import Backoff, client_address
from realm.registry.database import Database
from realm.settings import GatewayLimits
from tests.fake_host import FakeHost, async_test, fake_host
from tests.raw_client import bystander, raw

LIMITS = GatewayLimits(
    auth_failures=3, auth_window=10.0, auth_backoff_first=2.0, auth_backoff_most=16.0, auth_forget=40.0
)


def test_addresses() -> None:
    assert client_address(("192.0.2.7", 1234)) == "192.0.2.7"
    assert client_address(("::ffff:192.0.2.7", 1234, 0, 0)) == "192.0.2.7"
    assert client_address(("2001:db8:1:2:3:4:5:6", 1, 0, 0)) == client_address(("2001:db8:1:2::1", 9, 0, 0))
    assert client_address(("2001:db8:1:3::1", 1, 0, 0)) != client_address(("2001:db8:1:2::1", 1, 0, 0))
    assert client_address(("fe80::1%eth0", 1, 0, 2)) == "fe80::/64"
    assert client_address(None) == client_address("") == client_address(()) == client_address(("?", 1)) == ""


def test_the_wait_doubles_up_to_the_most() -> None:
    backoff, now, waits = Backoff(LIMITS), 100.0, []
    for _ in range(3):
        assert backoff.wait("a", "k", now) == 0
        backoff.failed("a", "k", now)
    for _ in range(6):
        waits.append(backoff.wait("a", "k", now))
        now += waits[-1]
        assert backoff.wait("a", "k", now) == 0
        backoff.failed("a", "k", now)
    assert waits == [2, 4, 8, 16, 16, 16]
    # Much later it is as if nothing had been.
    now += 16 + 40.1
    backoff.failed("a", "k", now)
    assert backoff.wait("a", "k", now) == 0


def test_failures_that_are_far_apart_do_not_count_together() -> None:
    backoff = Backoff(LIMITS)
    for n in range(50):
        backoff.failed("a", "k", n * 5.1)
        assert backoff.wait("a", "k", n * 5.1) == 0


def test_many_looked_up_at_once_are_one_step() -> None:
    backoff = Backoff(LIMITS)
    for _ in range(500):
        backoff.failed("a", "k", 1.0)
    assert backoff.wait("a", "k", 1.0) == 2


def test_known_keys_pass_until_they_fail() -> None:
    backoff = Backoff(LIMITS, keys=2)
    backoff.succeeded("a", "good")
    for _ in range(3):
        backoff.failed("a", "bad", 1.0)
    assert backoff.wait("a", "good", 1.0) == 0
    # Not from elsewhere, and no other key.
    assert backoff.wait("a", "goo", 1.0) == backoff.wait("a", "good ", 1.0) == 2
    backoff.failed("a", "good", 1.0)
    assert backoff.wait("a", "good", 1.0) == 2
    for key in ("k1", "k2", "k3"):
        backoff.succeeded("a", key)
    assert [backoff.wait("a", key, 1.0) for key in ("k1", "k2", "k3")] == [2, 0, 0]


def test_the_table_is_bounded_and_forgets() -> None:
    backoff = Backoff(LIMITS, addresses=10)
    for n in range(1000):
        backoff.failed(str(n), "k", float(n) / 100)
        assert len(backoff) <= 10
    for n in range(20):
        backoff.failed("late", "k", 1000.0 + n)
    assert len(backoff) == 1


ADDRESSES = ["a", "b", "c"]


class BackoffMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: the bounds of a wait, and whom it concerns."""

    def __init__(self) -> None:
        super().__init__()
        self.backoff = Backoff(LIMITS)
        self.now = 1000.0
        self.failures: dict[str, list[float]] = {address: [] for address in ADDRESSES}
        self.good: set[tuple[str, str]] = set()

    @rule(address=st.sampled_from(ADDRESSES), key=st.sampled_from(["x", "y"]), polite=st.booleans())
    def fail(self, address: str, key: str, polite: bool) -> None:
        if polite and self.backoff.wait(address, key, self.now):
            return
        self.backoff.failed(address, key, self.now)
        self.failures[address].append(self.now)
        self.good.discard((address, key))

    @rule(address=st.sampled_from(ADDRESSES), key=st.sampled_from(["x", "y"]))
    def succeed(self, address: str, key: str) -> None:
        before = {where: self.backoff.wait(where, "other", self.now) for where in ADDRESSES}
        self.backoff.succeeded(address, key)
        self.good.add((address, key))
        # A success shortens nobody's wait.
        assert before == {where: self.backoff.wait(where, "other", self.now) for where in ADDRESSES}

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 5.0, 16.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        before = {where: self.backoff.wait(where, "other", self.now) for where in ADDRESSES}
        self.now += seconds
        for where, wait in before.items():
            assert self.backoff.wait(where, "other", self.now) == pytest.approx(max(0.0, wait - seconds))

    @invariant()
    def bounded(self) -> None:
        for address in ADDRESSES:
            wait = self.backoff.wait(address, "other", self.now)
            failures = self.failures[address]
            assert 0 <= wait <= LIMITS.auth_backoff_most
            if wait:
                # Never without as many failures, the last of them within the longest wait.
                assert len(failures) >= LIMITS.auth_failures
                assert failures[-1] > self.now - LIMITS.auth_backoff_most
            if failures[-3:].count(self.now) == 3:
                assert wait > 0
            for key in ("x", "y"):
                assert self.backoff.wait(address, key, self.now) == (0 if (address, key) in self.good else wait)


TestBackoff = BackoffMachine.TestCase
TestBackoff.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_is_an_address_or_a_key(address: str, key: str) -> None:
    backoff = Backoff(LIMITS)
    client_address((address, 1))
    backoff.failed(address, key, 1.0)
    backoff.succeeded(address, key)
    assert backoff.wait(address, key, 1.0) == 0


# --- through the gateway --------------------------------------------------------------------------


async def tried(host: FakeHost, key: str, *, source: str = "127.0.0.1", header: bool = True) -> dict[str, object]:
    """The answer to a key, and that the connection ends accordingly."""
    async with raw(host, source=source) as client:
        if header:
            await client.upgrade(f"Authorization: Bearer {key}")
        else:
            await client.upgrade()
            assert (await client.message())["type"] == "auth_required"
            client.send(b"\x81\xfe" + len(text := f'{{"type":"auth","api_key":"{key}"}}').to_bytes(2, "big"))
            client.send(bytes(4) + text.encode())
        answer = await client.message()
        if answer["type"] == "auth_failed":
            assert await client.closing() == 4401
        return answer


@async_test
async def test_brute_force_is_refused_without_a_look_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other:
        looked_up: list[str] = []
        authenticate = Database.authenticate

        def counted(database: Database, key: str) -> object:
            looked_up.append(key)
            return authenticate(database, key)

        monkeypatch.setattr(Database, "authenticate", counted)
        # From another address than bob's; the whole of 127/8 is this machine's.
        for n in range(5):
            answer = await tried(host, f"guess{n}", source="127.0.0.9", header=n % 2 == 0)
            assert answer["type"] == "auth_failed" and "retry_after" not in answer
        assert len(looked_up) == 5
        for n in range(5):
            answer = await tried(host, f"guess{n}", source="127.0.0.9", header=n % 2 == 0)
            assert answer["type"] == "auth_failed" and 0 < float(str(answer["retry_after"])) <= 5
        # A good key that this address has never shown waits, too: it could be the next guess.
        assert "retry_after" in await tried(host, host.keys["alice"], source="127.0.0.9")
        assert looked_up == [f"guess{n}" for n in range(5)]
        assert (await tried(host, host.keys["alice"]))["type"] == "auth_success"
        assert (await tried(host, "guess"))["error"] == "the key is unknown or revoked"
        await other.works()


@async_test
async def test_tenants_behind_the_attackers_address_go_on(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, bystander(host) as other, host.client("admin") as admin:
        await tried(host, host.keys["alice"])
        for n in range(6):
            await tried(host, f"guess{n}")
        assert "retry_after" in await tried(host, "guess")
        # bob and alice have been here before.
        for tenant in ("alice", "bob", "alice"):
            assert (await tried(host, host.keys[tenant]))["type"] == "auth_success"
        await other.works()
        # A revoked key has no such right.
        await admin.data("keys.revoke", id=host.key_ids["alice"])
        assert (await tried(host, host.keys["alice"]))["error"] == "the key is unknown or revoked"
        assert "retry_after" in await tried(host, host.keys["alice"])
