"""Adapters through the real gateway while their check takes its time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from realm.adapters.peft import check_adapter
from realm.gateway import adapters as gateway_adapters
from realm.settings import GatewayLimits
from tests.fake_host import FakeClient, async_test, eventually, fake_host
from tests.gateway_adapters import names, send, untouched, weights

# --- checks take time ----------------------------------------------------------------------------


class SlowCheck:
    """In place of the check: waits in its thread until it is let go, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.running = 0
        self.most = 0
        self.seen: list[Path] = []
        self._lock = threading.Lock()
        monkeypatch.setattr(gateway_adapters, "check_adapter", self)

    def __call__(self, file: Path, *given: Any) -> Any:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
            self.seen.append(file)
        try:
            assert self.go.wait(8)
            return check_adapter(file, *given)
        finally:
            with self._lock:
                self.running -= 1


async def go_round(client: FakeClient) -> None:
    """Give what has begun time to go as far as it can; everything else goes on meanwhile."""
    for _ in range(20):
        health = await client.start("health")
        assert (await client.receive())["id"] == health
        await asyncio.sleep(0.005)


def test_nobodys_checks_hold_up_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowCheck(monkeypatch)

    @async_test
    async def test() -> None:
        async with (
            fake_host(tmp_path, limits=GatewayLimits(checks=2)) as host,
            host.client() as alice,
            host.client("bob") as bob,
            host.client("admin") as admin,
        ):
            uploads = [await send(alice, f"a{seed}", weights(seed)) for seed in range(4)]
            calls = [await alice.start("adapters.commit", upload=upload) for upload in uploads]
            await eventually(lambda: slow.running == 1)
            # Alice has one turn; bob's is beside it, though three of hers wait.
            upload = await send(bob, "b", weights(9))
            theirs = await bob.start("adapters.commit", upload=upload)
            await eventually(lambda: slow.running == 2)
            upload = await send(admin, "c", weights(10))
            third = await admin.start("adapters.commit", upload=upload)
            # Meanwhile everything else goes on.
            await go_round(admin)
            assert slow.running == 2
            slow.go.set()
            assert (await bob.replies(theirs))[-1]["status"] == "complete"
            assert (await admin.replies(third))[-1]["status"] == "complete"
            done = {(await alice.receive())["id"] for _ in calls}
            assert done == set(calls) and slow.most == 2
            assert sorted(await names(alice)) == ["a0", "a1", "a2", "a3"]

    test()


def test_a_client_that_leaves_keeps_its_turn_until_the_check_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one could have as many checks at a time as it has patience for."""
    slow = SlowCheck(monkeypatch)

    @async_test
    async def test() -> None:
        async with fake_host(tmp_path) as host:
            for seed in range(3):
                async with host.client() as client:
                    upload = await send(client, "legal", weights(seed))
                    await client.start("adapters.commit", upload=upload)
                    if seed == 0:
                        await eventually(lambda: slow.running == 1)
                await eventually(lambda: host.gateway.quotas.of("alice").uploads == 0)
            assert not any(file.exists() for file in slow.seen)
            await untouched(host)
            async with host.client() as client:
                upload = await send(client, "legal", weights())
                call = await client.start("adapters.commit", upload=upload)
                await go_round(client)
                assert slow.running == 1 and len(slow.seen) == 1
                slow.go.set()
                assert (await client.replies(call))[-1]["status"] == "complete"
                assert slow.most == 1 and len(slow.seen) == 2

    test()


def test_a_cancelled_commit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowCheck(monkeypatch)

    @async_test
    async def test() -> None:
        async with fake_host(tmp_path) as host, host.client() as client:
            upload = await send(client, "legal", weights())
            call = await client.start("adapters.commit", upload=upload)
            await eventually(lambda: slow.running == 1)
            for function in ("adapters.abort", "adapters.commit"):
                assert (await client.error(function, upload=upload))["code"] == "upload_out_of_order"
            await client.send({"id": "c", "function": "cancel", "params": {"id": call}})
            replies = {reply["id"]: reply for reply in [await client.receive(), await client.receive()]}
            assert replies["c"]["data"] == {"cancelled": True} and replies[call]["status"] == "cancelled"
            slow.go.set()
            await eventually(lambda: slow.running == 0)
            await untouched(host)

    test()
