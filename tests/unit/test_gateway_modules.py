"""Modules through the real gateway: how much a tenant may store, whose turn the compiler is, damaged artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from realm.run_messages import ErrorInfo, RunFinished, StartRun, Usage
from realm.settings import GatewayLimits
from tests.fake_host import WASM, FakeWorker, async_test, echo, eventually, fake_host

# --- damaged artifacts ---------------------------------------------------------------------------


def refusing(times: int) -> Any:
    """A worker that finds another content in the first ``times`` artifacts."""
    left = [times]

    def script(worker: FakeWorker, start: StartRun) -> None:
        if left[0]:
            left[0] -= 1
            error = ErrorInfo("artifact_damaged", "another content", {"expected": start.artifact_sha256})
            worker.say(RunFinished(start.run, "error", 0, error, Usage()))
        else:
            echo(worker, start)

    return script


@async_test
async def test_a_damaged_artifact_is_made_anew_without_the_client(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=refusing(1)) as host, host.client() as client:
        await client.push("m")
        assert host.compiler.calls == 1
        replies = await client.replies(await client.start("run", module="m", input="one two"))
        assert [reply["data"].get("kind") for reply in replies] == ["started", "output", "output", None]
        assert replies[-1]["status"] == "complete" and host.compiler.calls == 2
        assert [start.run for start in host.worker.starts] == [1, 1]
        assert all(start.artifact_sha256 for start in host.worker.starts)
        await client.data("run", module="m", stream=False)
        assert host.compiler.calls == 2


@async_test
async def test_an_artifact_that_stays_damaged_is_an_error(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=refusing(2)) as host, host.client() as client:
        error = await client.error("generate", prompt="x")
        assert error["code"] == "artifact_damaged" and error["retry_after"] > 0
        assert (await client.data("generate", prompt="x"))["text"] == "x"
        assert host.compiler.calls == 3 and [start.run for start in host.worker.starts] == [1, 1, 2]


@async_test
async def test_many_runs_with_one_damaged_artifact_make_it_once(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.push("m")
        host.worker.script = refusing(5)
        host.compiler.gate.clear()
        for _ in range(5):
            await client.start("run", module="m", input="x", stream=False)
        await host.worker.until(lambda worker: len(worker.starts) == 5)
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 5)
        host.compiler.gate.set()
        assert {(await client.receive())["status"] for _ in range(5)} == {"complete"}
        assert host.compiler.calls == 2


@async_test
async def test_a_module_that_cannot_be_made_anew_fails_its_run(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.push("m")
        host.worker.script = refusing(1)
        host.compiler.gate.clear()
        call = await client.start("run", module="m", stream=False)
        await eventually(lambda: host.gateway.quotas.of("alice").waiting == 1)
        # Its content goes while the compiler has it: that one still counts.
        await client.data("modules.remove", name="m")
        host.compiler.gate.set()
        (reply,) = await client.replies(call)
        assert reply["status"] == "complete"
        await client.push("m", WASM + b"2")
        host.worker.script = refusing(1)
        host.compiler.broken = True
        error = await client.error("run", module="m")
        assert error["code"] == "compile_limit" and error["details"]["run"] == "r2"
        # A failure that nobody has thought of ends it, too.
        host.compiler.broken = False
        await client.push("m", WASM + b"3")
        host.worker.script = refusing(1)
        host.gateway.artifacts.make = lambda *given: 1 // 0  # type: ignore[method-assign]
        error = await client.error("run", module="m")
        assert error["code"] == "internal" and error["details"]["correlation"]
        assert not host.gateway.runs.runs and host.gateway.quotas.of("alice").waiting == 0


# --- modules -------------------------------------------------------------------------------------


@async_test
async def test_modules_are_bounded_where_they_begin(tmp_path: Path) -> None:
    defaults = {"module_bytes": 100, "stored_modules": 3, "stored_bytes": 60}
    async with fake_host(tmp_path, defaults=defaults) as host, host.client() as client, host.client("bob") as other:
        sha256 = "0" * 64
        error = await client.error("modules.begin", name="m", size=101, sha256=sha256)
        assert error["code"] == "module_too_large"
        assert error["details"] == {"name": "module_bytes", "limit": 100, "used": 101, "unit": "bytes"}
        await client.push("m", WASM + b"1" * 30)
        error = await client.error("modules.begin", name="n", size=60, sha256=sha256)
        assert error["code"] == "limit_exceeded"
        assert error["details"] == {"name": "stored_bytes", "limit": 60, "used": 38, "unit": "bytes"}
        # The same content again takes a version, no bytes.
        await client.push("m", WASM + b"1" * 30)
        await client.push("n", WASM)
        error = await client.error("modules.begin", name="o", size=1, sha256=sha256)
        assert error["code"] == "limit_exceeded" and error["details"]["name"] == "stored_modules"
        assert error["details"]["used"] == 3 and "remove" in error["message"]
        await other.push("m", WASM + b"1" * 30)
        await client.data("modules.remove", name="m")
        await client.push("o", WASM + b"2" * 30)


@async_test
async def test_a_tenants_modules_hold_up_no_others(tmp_path: Path) -> None:
    """One compiler, three modules of alice's before bob's: his is the second to be compiled."""
    async with (
        fake_host(tmp_path, limits=GatewayLimits(compiles=1)) as host,
        host.client() as alice,
        host.client("bob") as bob,
    ):
        host.compiler.gate.clear()
        for number in range(3):
            content = WASM + str(number).encode()
            begun = await alice.begin("m", content)
            await alice.chunk(begun["upload"], 0, content)
            await alice.start("modules.commit", upload=begun["upload"])
        await eventually(lambda: len(host.gateway.artifacts._making) == 3)
        begun = await bob.begin("m", WASM + b"bob")
        await bob.chunk(begun["upload"], 0, WASM + b"bob")
        call = await bob.start("modules.commit", upload=begun["upload"])
        await eventually(lambda: len(host.gateway.artifacts._making) == 4)
        host.compiler.gate.set()
        assert (await bob.replies(call))[-1]["status"] == "complete"
        assert [done[len(WASM) :] for done in host.compiler.done].index(b"bob") == 1


@async_test
async def test_modules_are_bounded_where_they_are_kept(tmp_path: Path) -> None:
    """Uploads that began side by side fitted one by one."""
    async with fake_host(tmp_path, defaults={"stored_modules": 1}) as host, host.client() as client:
        uploads = []
        for name in ("a", "b"):
            begun = await client.begin(name, WASM + name.encode())
            await client.chunk(begun["upload"], 0, WASM + name.encode())
            uploads.append(begun["upload"])
        await client.data("modules.commit", upload=uploads[0])
        error = await client.error("modules.commit", upload=uploads[1])
        assert error["code"] == "limit_exceeded" and error["details"]["name"] == "stored_modules"
        assert [module["name"] for module in (await client.data("modules.list"))["modules"]] == ["a"]
        assert not list((tmp_path / "incoming").iterdir())
        await eventually(lambda: host.gateway.quotas.of("alice").uploads == 0)
