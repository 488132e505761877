"""Tenants' limits through the real gateway: shown, set, met, and given back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from realm.errors import RealmError
from realm.limits import LIMITS
from realm.messages import TenantQuota
from realm.run_messages import ErrorInfo, Output, StartRun
from realm.settings import GatewayLimits
from tests.fake_host import WASM, FakeClient, FakeHost, FakeWorker, async_test, echo, eventually, fake_host, hang


async def shown(client: FakeClient, tenant: str | None) -> dict[str, dict[str, Any]]:
    """The limits by their names."""
    reply = await client.data("tenants.show", name=tenant)
    assert reply["name"] == tenant
    return {limit.pop("name"): limit for limit in reply["limits"]}


# --- the operator's view -------------------------------------------------------------------------


@async_test
async def test_every_limit_is_shown_with_its_source_and_use(tmp_path: Path) -> None:
    async with (
        fake_host(tmp_path, script=hang, defaults={"uploads": 3, "running_guests": 1}) as host,
        host.client("admin") as admin,
        host.client() as alice,
    ):
        await alice.push("m", WASM + b"12")
        for _ in range(3):
            await alice.start("generate", prompt="x")
        await host.worker.until(lambda worker: len(worker.starts) == 1)
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 2)
        await admin.data("tenants.set", name="alice", limits={"kv_pages": 77})
        limits = await shown(admin, "alice")
        assert list(limits) == list(LIMITS)
        for name, limit in limits.items():
            assert limit["unit"] == LIMITS[name].unit and limit["doc"] == LIMITS[name].doc
        used = {name: limit["used"] for name, limit in limits.items() if limit["used"] is not None}
        # Five calls, less what has come back since.
        assert 0 <= used.pop("requests_per_minute") <= 5
        assert used == {
            "running_guests": 1,
            "waiting_guests": 2,
            "connections": 1,
            "uploads": 0,
            "stored_modules": 1,
            "stored_bytes": len(WASM) + 2,
            "store_bytes": 0,
            "stored_adapters": 0,
            "stored_adapter_bytes": 0,
            "pinned_adapters": 0,
            "kv_pages": 4,
            "tokens_per_minute": 6,
            "saved_sequences": 7,
        }
        sources = {name: limit["from"] for name, limit in limits.items() if limit["from"] != "built-in"}
        assert sources == {"uploads": "default", "running_guests": "default", "kv_pages": "tenant"}
        assert limits["kv_pages"]["value"] == 77 and limits["uploads"]["value"] == 3
        assert limits["fuel_per_run"]["value"] == LIMITS["fuel_per_run"].default
        whole = await admin.data("tenants.show", name="alice")
        assert whole["keys"] == 1 and whole["created"] > 0
        # Without a name: what counts for all, in use by nobody.
        everybody = await shown(admin, None)
        assert everybody["kv_pages"]["value"] == LIMITS["kv_pages"].default
        assert all(limit["used"] is None for limit in everybody.values())


@async_test
async def test_use_is_shown_while_the_engine_is_away(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client("admin") as admin:
        engine = host.gateway.engine
        assert engine is not None
        host.engine.die()
        await engine.lost.wait()
        limits = await shown(admin, "alice")
        assert limits["kv_pages"]["used"] is None and limits["connections"]["used"] == 0


@async_test
async def test_a_tenant_sees_itself_and_sets_nothing(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as alice, host.client("admin") as admin:
        assert (await shown(alice, "alice"))["connections"]["used"] == 1
        # Whether there is such a tenant must not show either.
        errors = [await alice.error("tenants.show", name=name) for name in ("bob", "nobody", None)]
        assert errors[0]["code"] == "forbidden" and errors[0] == errors[1] == errors[2]
        assert (await alice.error("tenants.set", name="alice", limits={"uploads": 9}))["code"] == "forbidden"
        assert (await admin.error("tenants.show", name="nobody"))["code"] == "tenant_not_found"
        assert (await admin.error("tenants.set", name="nobody", limits={}))["code"] == "tenant_not_found"


@pytest.mark.parametrize(
    "limits",
    [{"warp": 1}, {"warp": None}, {"uploads": -1}, {"uploads": 2000}, {"uploads": 1.5}, {"uploads": True}, [], 1, "x"],
)
def test_bad_limits_change_nothing(tmp_path: Path, limits: Any) -> None:
    @async_test
    async def check() -> None:
        async with fake_host(tmp_path) as host, host.client("admin") as admin:
            given = {**limits, "connections": 3} if isinstance(limits, dict) else limits
            for name in ("alice", None):
                error = await admin.error("tenants.set", name=name, limits=given)
                assert error["code"] == "invalid_params"
                assert (await shown(admin, name))["connections"]["from"] == "built-in"
            assert await host.registry.run(lambda database: database.load_limits()) == ({}, {})

    check()


@async_test
async def test_limits_that_are_set_count_at_once_and_after_a_restart(tmp_path: Path) -> None:
    async with fake_host(tmp_path, defaults={"uploads": 1, "connections": 50}) as host, host.client("admin") as admin:
        reply = await admin.data("tenants.set", limits={"uploads": 2, "kv_pages": 5})
        assert {limit["name"]: limit["value"] for limit in reply["limits"]}["uploads"] == 2
        await admin.data("tenants.set", name="alice", limits={"uploads": 3, "saved_sequences": 1})
        quotas = host.gateway.quotas
        assert (quotas.of("alice").limits.uploads, quotas.of("bob").limits.uploads) == (3, 2)
        keys = host.keys
    async with fake_host(tmp_path, defaults={"uploads": 1, "connections": 50}) as host:
        host.keys = keys
        quotas = host.gateway.quotas
        assert (quotas.of("alice").limits.uploads, quotas.of("bob").limits.uploads) == (3, 2)
        assert quotas.of("bob").limits.connections == 50
        # The engine hears of all of them when it is ready ...
        await eventually(lambda: len(host.engine.quotas) == 2)
        tokens = LIMITS["tokens_per_minute"].default
        assert host.engine.quotas == {
            "": TenantQuota("", 5, tokens, 64),
            "alice": TenantQuota("alice", 5, tokens, 1),
        }
        async with host.client("admin") as admin:
            # ... and of every change: one of the default changes those that build on it.
            await admin.data("tenants.set", limits={"kv_pages": 6, "uploads": None})
            await eventually(lambda: host.engine.quotas["alice"].kv_pages == 6)
            assert host.engine.quotas[""].kv_pages == 6
            await admin.data("tenants.set", name="bob", limits={"kv_pages": 7})
            await eventually(lambda: host.engine.quotas["bob"].kv_pages == 7 if "bob" in host.engine.quotas else False)
            assert (quotas.of("alice").limits.uploads, quotas.of("bob").limits.uploads) == (3, 1)
            await admin.data("tenants.set", name="alice", limits={"uploads": None, "saved_sequences": None})
            assert quotas.of("alice").limits.uploads == 1 and "alice" not in {
                tenant for tenant, values in quotas.chosen.items() if values
            }


@async_test
async def test_settings_out_of_range_end_the_start(tmp_path: Path) -> None:
    with pytest.raises(RealmError, match="uploads"):
        async with fake_host(tmp_path, defaults={"uploads": -1}):
            pass


# --- runs ----------------------------------------------------------------------------------------


@async_test
async def test_a_waiting_run_is_seen_cancelled_and_started(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang, defaults={"running_guests": 1}) as host, host.client() as client:
        await client.push("m")
        calls = [await client.start("run", module="m") for _ in range(4)]
        kinds = [await client.receive() for _ in calls]
        assert [(reply["id"], reply["data"]["kind"], reply["data"]["run"]) for reply in kinds] == [
            (calls[0], "started", "r1"),
            *((call, "waiting", f"r{number}") for number, call in enumerate(calls[1:], 2)),
        ]
        listed = (await client.data("ps"))["runs"]
        assert [(run["run"], run["status"]) for run in listed] == [
            *((f"r{number}", "waiting") for number in (4, 3, 2)),
            ("r1", "running"),
        ]
        assert await client.data("send", run="r4", data="early") == {}
        # By the run's id and by the call's: the run ends before the cancelling call is answered.
        for call, named in ((calls[1], {"run": "r2"}), (calls[2], {"id": calls[2]})):
            cancel = await client.start("cancel", **named)
            messages = [await client.receive(), await client.receive()]
            assert (messages[0]["id"], messages[0]["status"]) == (call, "cancelled")
            assert messages[0]["data"]["usage"]["wall_seconds"] == 0
            assert messages[1] == {"id": cancel, "status": "complete", "data": {"cancelled": True}}
        host.worker.finish(1)
        messages = [await client.receive(), await client.receive()]
        assert messages[0]["id"] == calls[0] and messages[0]["status"] == "complete"
        assert messages[1]["id"] == calls[3] and messages[1]["data"] == {"kind": "started", "run": "r4"}
        await host.worker.until(lambda worker: bool(worker.messages))
        assert host.worker.messages[0].data == b"early" and [start.run for start in host.worker.starts] == [1, 4]
        records = (await client.data("ps", all=True))["runs"]
        assert {run["run"]: run["status"] for run in records} == {
            "r1": "complete",
            "r2": "cancelled",
            "r3": "cancelled",
            "r4": "running",
        }


@async_test
async def test_waiting_runs_go_with_their_client(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang, defaults={"running_guests": 1}) as host:
        async with host.client() as client:
            for _ in range(5):
                await client.start("generate", prompt="x", stream=True)
            await eventually(lambda: len(host.gateway.runs.runs) == 5)
        await host.worker.until(lambda worker: len(worker.cancels) == 1)
        await eventually(lambda: not host.gateway.runs.runs)
        assert [start.run for start in host.worker.starts] == [1]
        await eventually(lambda: not host.gateway.quotas.in_use)


@async_test
async def test_too_many_runs_are_told_what_is_full(tmp_path: Path) -> None:
    defaults = {"running_guests": 1, "waiting_guests": 2}
    async with (
        fake_host(tmp_path, script=hang, defaults=defaults) as host,
        host.client() as client,
        host.client("bob") as other,
    ):
        await client.push("m")
        for _ in range(3):
            await client.start("run", module="m")
            await client.receive()
        error = await client.error("run", module="m")
        assert error["code"] == "rate_limited" and error["retry_after"] > 0
        assert error["details"] == {"name": "waiting_guests", "limit": 2, "used": 2, "unit": "runs"}
        assert "waiting_guests is 2 runs, used 2" in error["message"]
        await other.start("generate", prompt="x")
        await host.worker.until(lambda worker: len(worker.starts) == 2)


@async_test
async def test_calls_that_wait_for_the_compiler_hold_places(tmp_path: Path) -> None:
    async with (
        fake_host(tmp_path, defaults={"waiting_guests": 1, "running_guests": 1}) as host,
        host.client() as client,
    ):
        host.compiler.gate.clear()
        for _ in range(2):
            await client.start("generate", prompt="x")
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 2)
        assert (await client.error("generate", prompt="x"))["details"]["name"] == "waiting_guests"
        host.compiler.gate.set()
        assert {(await client.receive())["status"] for _ in range(2)} == {"complete"}
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 0)


@async_test
async def test_runs_wait_while_a_worker_is_replaced(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.data("generate", prompt="warm")
        host.worker.die()
        await eventually(lambda: not host.gateway.runs.workers)
        call = await client.start("generate", prompt="still here")
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 1)
        await host.add_worker(2)
        (reply,) = await client.replies(call)
        assert reply["data"]["text"] == "still here"


@async_test
async def test_a_run_in_vain_ends_in_time_with_its_place_given_back(tmp_path: Path) -> None:
    limits = GatewayLimits(worker_wait_seconds=0.3)
    async with fake_host(tmp_path, limits=limits, workers=0) as host, host.client() as client:
        calls = []
        for _ in range(3):
            calls.append(await client.start("generate", prompt="x"))
            await asyncio.sleep(0.1)
        errors = [await client.receive() for _ in calls]
        assert [error["id"] for error in errors] == calls
        assert {error["error"]["code"] for error in errors} == {"worker_lost"}
        assert all(error["error"]["retry_after"] > 0 for error in errors)
        assert host.gateway.quotas.of("alice").idle is False  # its connection
        assert host.gateway.quotas.of("alice").waiting == 0


@async_test
async def test_workers_are_told_their_share_before_the_run(tmp_path: Path) -> None:
    defaults = {"fuel_per_second": 8_000_000}
    async with (
        fake_host(tmp_path, script=hang, workers=2, defaults=defaults) as host,
        host.client() as client,
        host.client("admin") as admin,
    ):
        seen: list[str] = []
        host.workers[0].script = lambda worker, start: seen.append(f"start after {len(worker.shares)}")
        await client.start("generate", prompt="x")
        await host.workers[0].until(lambda worker: bool(seen))
        assert seen == ["start after 1"]
        await client.start("generate", prompt="x")
        await host.workers[0].until(lambda worker: len(worker.shares) == 2)
        await admin.data("tenants.set", name="alice", limits={"fuel_per_second": 4_000_000})
        await host.workers[0].until(lambda worker: len(worker.shares) == 3)
        await host.workers[1].until(lambda worker: len(worker.shares) == 2)
        assert [share.fuel_per_second for share in host.workers[0].shares] == [8e6, 4e6, 2e6]
        assert [share.fuel_per_second for share in host.workers[1].shares] == [4e6, 2e6]


@async_test
async def test_runs_get_their_tenants_limits(tmp_path: Path) -> None:
    async with (
        fake_host(tmp_path, defaults={"fuel_per_run": 1000}) as host,
        host.client() as client,
        host.client("admin") as admin,
    ):
        await admin.data("tenants.set", name="alice", limits={"seconds_to_first_call": 3, "memory_bytes": 1 << 20})
        await client.data("generate", prompt="x")
        limits = host.worker.starts[0].limits
        assert (limits.fuel, limits.first_call_seconds, limits.memory_bytes) == (1000, 3.0, 1 << 20)
        assert limits.table_elements == LIMITS["table_elements"].default


@async_test
async def test_tokens_that_are_used_up_refuse_the_next_run(tmp_path: Path) -> None:
    details = {"name": "tokens_per_minute", "limit": 5, "used": 9, "unit": "tokens/min"}

    def script(worker: FakeWorker, start: StartRun) -> None:
        if start.tenant == "alice":
            worker.finish(start.run, outcome="error", error=ErrorInfo("rate_limited", "no", details, 30.0))
        else:
            echo(worker, start)

    async with (
        fake_host(tmp_path, script=script, defaults={"tokens_per_minute": 5}) as host,
        host.client() as client,
        host.client("bob") as other,
        host.client("admin") as admin,
    ):
        first = await client.error("generate", prompt="x")
        assert first["code"] == "rate_limited" and first["retry_after"] == 30
        second = await client.error("generate", prompt="x")
        assert second["details"] == details and 0 < second["retry_after"] <= 30
        assert len(host.worker.starts) == 1
        assert (await other.data("generate", prompt="x"))["text"] == "x"
        await admin.data("tenants.set", name="alice", limits={"tokens_per_minute": 50})
        await client.error("generate", prompt="x")
        assert len(host.worker.starts) == 3


@async_test
async def test_texts_that_are_collected_are_bounded(tmp_path: Path) -> None:
    def script(worker: FakeWorker, start: StartRun) -> None:
        worker.say(*(Output(start.run, b"x" * 4096, 1) for _ in range(20)))

    limits = GatewayLimits(collected_bytes=100_000)
    async with fake_host(tmp_path, script=script, limits=limits) as host, host.client() as client:
        await client.push("m")
        first = await client.start("run", module="m", stream=False)
        await host.worker.until(lambda worker: bool(worker.starts))
        error = await client.error("run", module="m", stream=False)
        assert error["code"] == "output_limit" and "stream" in error["message"]
        assert error["details"]["name"] == "collected_bytes" and error["details"]["limit"] == 100_000
        assert [cancel.run for cancel in host.worker.cancels] == [2]
        # What is streamed is not collected.
        streamed = await client.start("run", module="m")
        pieces = [await client.receive() for _ in range(21)]
        assert {piece["id"] for piece in pieces} == {streamed}
        host.worker.finish(1)
        (reply,) = await client.replies(first)
        assert len(reply["data"]["text"]) == 20 * 4096


@async_test
async def test_a_worker_that_does_not_read_holds_up_its_own_messages_only(tmp_path: Path) -> None:
    limits = GatewayLimits(link_bytes=300_000)
    async with (
        fake_host(tmp_path, script=hang, limits=limits, defaults={"running_guests": 1}) as host,
        host.client() as client,
        host.client("bob") as other,
    ):
        await client.push("m")
        first = await client.start("run", module="m", stream=False)
        await host.worker.until(lambda worker: bool(worker.starts))
        second = await client.start("run", module="m", stream=False)
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 1)
        host.worker.read(False)
        # The socket holds some, then the gateway does, then nobody.
        sent = 0
        while (reply := await client.call("send", run="r1", data="x" * 100_000))["status"] == "complete":
            sent += 1
            assert sent < 100, "messages pile up"
        error = reply["error"]
        assert error["code"] == "busy" and error["retry_after"] > 0
        assert (await other.error("generate", prompt="x"))["code"] == "busy"
        # Room for the second run there is, but not yet on the way to it.
        host.worker.finish(1)
        (reply,) = await client.replies(first)
        assert reply["status"] == "complete" and host.gateway.quotas.of("alice").waiting == 1
        host.worker.read(True)
        await host.worker.until(lambda worker: len(worker.starts) == 2)
        assert len(host.worker.messages) == sent
        host.worker.finish(2)
        (reply,) = await client.replies(second)
        assert reply["status"] == "complete"


@async_test
async def test_nothing_is_left_in_use(tmp_path: Path) -> None:
    async def busy(host: FakeHost) -> None:
        async with host.client() as client:
            await client.push("m")
            await client.begin("n", WASM + b"n")
            for _ in range(6):
                await client.start("run", module="m")
            await eventually(lambda: len(host.gateway.runs.runs) == 6)
            use = host.gateway.quotas.of("alice")
            assert (use.running, use.waiting, use.uploads, use.connections) == (2, 4, 1, 1)

    async with fake_host(tmp_path, script=hang, defaults={"running_guests": 2}) as host:
        for _ in range(3):
            await busy(host)
            await eventually(lambda: not host.gateway.quotas.in_use)
        assert not host.gateway.runs.runs and not host.worker.messages
