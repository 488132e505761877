"""The way of a call through the real gateway: the original protocol's frames, runs, modules, administration."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from realm.run_messages import ErrorInfo, Output, RunFinished, StartRun, StoreSet, Usage
from tests.fake_host import WASM, FakeWorker, async_test, echo, eventually, fake_host, hang, log_line


def artifacts(worker: FakeWorker) -> list[bytes]:
    """The compiled module of each run that was started."""
    return [Path(start.artifact).read_bytes() for start in worker.starts]


@async_test
async def test_frames_of_the_original_protocol(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.raw() as client:
        required = await client.receive()
        assert required["type"] == "auth_required" and required["message"]
        await client.send({"type": "auth", "api_key": host.keys["alice"]})
        assert await client.receive() == {"type": "auth_success", "tenant_id": "alice"}
        connected = await client.receive()
        assert connected == {"status": "connected", "version": "0.1.0", "tenant_id": "alice", "protocol": "realm.v1"}

        await client.send(
            {
                "id": "req-1",
                "function": "generate",
                "params": {"prompt": "one two", "max_tokens": 10, "temperature": 0.7, "stream": True, "top_p": None},
                "tenant_id": "alice",
            }
        )
        replies = await client.replies("req-1")
        assert [(r["status"], r.get("seq"), r["data"].get("text")) for r in replies] == [
            ("streaming", 0, "one "),
            ("streaming", 1, "two"),
            ("streaming", 2, ""),
            ("complete", None, "one two"),
        ]
        pieces = [reply["data"] for reply in replies[:-1]]
        assert all(piece["token"] == piece["text"] for piece in pieces)
        assert [piece["index"] for piece in pieces] == [0, 1, 2]
        assert [piece["is_final"] for piece in pieces] == [False, False, True]

        await client.send({"id": "req-2", "function": "generate", "params": {"prompt": "a b c"}, "tenant_id": "alice"})
        (last,) = await client.replies("req-2")
        data = last["data"]
        assert data["text"] == "a b c" and data["tokens_generated"] == 3 and data["prompt_tokens"] == 5
        assert data["finish_reason"] == "stop" and data["run"] == "r2"
        assert set(data["usage"]) >= {"prompt_tokens", "new_tokens", "cached_tokens", "fuel", "first_call_seconds"}

        await client.send({"id": "req-3", "function": "health"})
        (last,) = await client.replies("req-3")
        assert last["data"]["status"] == "healthy" and last["data"]["model"] == "tiny"
        await client.send({"id": "req-4", "function": "metadata", "params": None})
        (last,) = await client.replies("req-4")
        functions = {function["name"]: function for function in last["data"]["functions"]}
        assert functions["run"]["params"][0] == {
            "name": "module",
            "type": "string",
            "required": True,
            "doc": "name of a module of this tenant",
        }


@async_test
async def test_the_generate_guest_gets_all_parameters(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        messages = [{"role": "user", "content": "hi"}]
        await client.data(
            "generate", messages=messages, max_tokens=7, temperature=1, top_k=3, seed=2**64 - 1, stop=["."]
        )
        start = host.worker.starts[0]
        assert start.module == "generate" and start.tenant == "alice" and start.seed == 2**64 - 1
        assert json.loads(start.input) == {
            "messages": messages,
            "max_tokens": 7,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 3,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop": ["."],
        }
        await client.data("generate", prompt="hi")
        await client.data("generate", prompt="hi")
        assert host.worker.starts[1].seed != host.worker.starts[2].seed
        assert host.compiler.calls == 1


@async_test
async def test_generate_names_its_ends(tmp_path: Path) -> None:
    ends = {
        "long": RunFinished(0, "complete", 1, None, Usage()),
        "full": RunFinished(
            0,
            "error",
            -5,
            ErrorInfo("guest_error", "it returned -5", {"code": -5, "name": "CONTEXT_FULL", "last_error": "9 > 8"}),
            Usage(),
        ),
        "odd": RunFinished(0, "complete", 7, None, Usage()),
        "trap": RunFinished(0, "error", 0, ErrorInfo("guest_trap", "unreachable", {"trap": "unreachable"}), Usage(7)),
    }

    def script(worker: FakeWorker, start: StartRun) -> None:
        end = ends[json.loads(start.input)["prompt"]]
        end.run = start.run
        worker.say(end)

    async with fake_host(tmp_path, script=script) as host, host.client() as client:
        assert (await client.data("generate", prompt="long"))["finish_reason"] == "length"
        full = await client.error("generate", prompt="full")
        assert full["code"] == "context_length_exceeded" and full["message"] == "9 > 8"
        assert full["details"].keys() == {"run", "usage"} and full["details"]["run"] == "r2"
        assert (await client.error("generate", prompt="odd"))["code"] == "internal"
        trap = await client.error("generate", prompt="trap", stream=True)
        assert trap["code"] == "guest_trap"
        assert trap["details"]["trap"] == "unreachable" and trap["details"]["run"] == "r4"
        # A run that fails has taken something, too.
        assert trap["details"]["usage"]["fuel"] == 7


@async_test
async def test_a_pushed_module_runs_and_streams(tmp_path: Path) -> None:
    def script(worker: FakeWorker, start: StartRun) -> None:
        worker.say(log_line(start.run, "hello", "warning"))
        echo(worker, start)

    async with fake_host(tmp_path, script=script) as host, host.client() as client:
        pushed = await client.push("chat")
        assert pushed["version"] == 1 and pushed["size"] == len(WASM) and pushed["imports"]
        listed = (await client.data("modules.list"))["modules"]
        assert [(m["name"], m["version"], m["sha256"]) for m in listed] == [("chat", 1, pushed["sha256"])]

        call = await client.start("run", module="chat", input="héllo wörld", seed=5)
        replies = await client.replies(call)
        assert [reply["data"] for reply in replies[:-1]] == [
            {"kind": "started", "run": "r1"},
            {"kind": "log", "level": "warning", "text": "hello"},
            {"kind": "output", "text": "héllo "},
            {"kind": "output", "text": "wörld"},
        ]
        last = replies[-1]["data"]
        assert last["run"] == "r1" and last["code"] == 0 and "text" not in last
        assert host.worker.starts[0].input == "héllo wörld".encode() and host.worker.starts[0].seed == 5
        assert artifacts(host.worker) == [WASM]

        whole = await client.data("run", module="chat", input={"a": [1, "é"]}, stream=False)
        assert json.loads(host.worker.starts[1].input) == {"a": [1, "é"]}
        assert json.loads(whole["text"]) == {"a": [1, "é"]}
        assert (await client.data("logs", run="r1"))["lines"] == [{"level": "warning", "text": "hello"}]
        await client.data("modules.remove", name="chat")
        missing = await client.error("run", module="chat")
        assert missing["code"] == "module_not_found" and missing["details"] == {"available": []}
        assert not [p for p in (tmp_path / "blobs").rglob("*") if p.is_file()]


@async_test
async def test_a_new_version_is_used_at_once(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.push("chat", WASM + b"1")
        await client.data("run", module="chat", stream=False)
        assert (await client.push("chat", WASM + b"2"))["version"] == 2
        await client.data("run", module="chat", stream=False)
        assert artifacts(host.worker) == [WASM + b"1", WASM + b"2"]


@async_test
async def test_characters_split_over_pieces_are_joined(tmp_path: Path) -> None:
    def script(worker: FakeWorker, start: StartRun) -> None:
        text = "a😀é".encode()
        worker.say(*(Output(start.run, text[i : i + 1], 1) for i in range(len(text))))
        worker.say(Output(start.run, b"\xf0\x9f", 1), RunFinished(start.run, "complete", 0, None, Usage()))

    async with fake_host(tmp_path, script=script) as host, host.client() as client:
        await client.push("chat")
        replies = await client.replies(await client.start("run", module="chat"))
        assert [reply["data"].get("text") for reply in replies[1:-1]] == ["a", "😀", "é", "\ufffd"]


@async_test
async def test_calls_of_one_connection_run_concurrently(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client:
        await client.data("metadata")
        calls = [await client.start("generate", prompt=str(n)) for n in range(20)]
        await host.worker.until(lambda worker: len(worker.starts) == 20)
        assert (await client.data("health"))["workers"] == 1
        for start in reversed(host.worker.starts):
            worker = host.worker
            worker.say(Output(start.run, json.loads(start.input)["prompt"].encode(), 1))
            worker.finish(start.run)
        # Answers come in the order in which the guests ended, each to its own call.
        answers = [await client.receive() for _ in calls]
        prompts = [json.loads(start.input)["prompt"] for start in reversed(host.worker.starts)]
        assert [answer["data"]["text"] for answer in answers] == prompts
        assert {answer["id"]: answer["data"]["text"] for answer in answers} == {
            call: str(n) for n, call in enumerate(calls)
        }


@async_test
async def test_send_cancel_and_ps(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client, host.client("bob") as other:
        await client.push("chat")
        call = await client.start("run", module="chat")
        assert (await client.receive())["data"] == {"kind": "started", "run": "r1"}
        assert await client.data("send", run="r1", data="text") == {}
        assert await client.data("send", run="r1", data={"answer": 42}) == {}
        await host.worker.until(lambda worker: len(worker.messages) == 2)
        assert [message.data for message in host.worker.messages] == [b"text", b'{"answer": 42}']

        listed = await client.data("ps")
        (run,) = listed["runs"]
        assert run["run"] == "r1" and run["module"] == "chat" and run["status"] == "running"
        assert listed["engine"]["steps"] == 10 and set(listed["engine"]["tenants"]) == {"alice"}

        # Another tenant sees none of it and can do nothing to it.
        foreign = await other.data("ps", all=True)
        assert foreign["runs"] == [] and set(foreign["engine"]["tenants"]) == {"bob"}
        assert (await other.error("send", run="r1", data="x"))["code"] == "run_not_found"
        assert (await other.error("logs", run="r1"))["code"] == "run_not_found"
        assert await other.data("cancel", run="r1") == {"cancelled": False}
        assert not host.worker.cancels

        cancel = await client.start("cancel", run="r1")
        messages = [await client.receive(), await client.receive()]
        assert messages[0] == {"id": cancel, "status": "complete", "data": {"cancelled": True}}
        assert messages[1]["id"] == call and messages[1]["status"] == "cancelled"
        assert messages[1]["data"]["run"] == "r1"
        assert await client.data("cancel", run="r1") == {"cancelled": False}
        finished = (await client.data("ps", all=True))["runs"]
        assert [(run["run"], run["status"]) for run in finished] == [("r1", "cancelled")]
        assert (await client.data("ps"))["runs"] == []


@async_test
async def test_cancel_by_the_calls_id_stops_a_compile_too(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client:
        begun = await client.begin("chat", WASM)
        await client.chunk(begun["upload"], 0, WASM)
        host.compiler.gate.clear()
        commit = await client.start("modules.commit", upload=begun["upload"])
        await eventually(lambda: host.compiler.calls)
        cancel = await client.start("cancel", id=commit)
        messages = [await client.receive(), await client.receive()]
        assert messages[0] == {"id": cancel, "status": "complete", "data": {"cancelled": True}}
        assert messages[1] == {"id": commit, "status": "cancelled", "data": {}}
        host.compiler.gate.set()
        assert (await client.data("modules.list"))["modules"] == []
        # What has begun is finished, in case it is asked for again; its file goes with it.
        await eventually(lambda: not list((tmp_path / "incoming").iterdir()))
        assert await client.data("cancel", id="nothing") == {"cancelled": False}

        call = await client.start("generate", prompt="x")
        await host.worker.until(lambda worker: len(worker.starts) == 1)
        await client.start("cancel", id=call)
        assert {(await client.receive())["status"] for _ in range(2)} == {"complete", "cancelled"}


@async_test
async def test_runs_go_to_the_least_loaded_worker(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang, workers=3) as host, host.client() as client:
        for n in range(9):
            await client.start("generate", prompt=str(n))
        for worker in host.workers:
            await worker.until(lambda worker: len(worker.starts) == 3)


@async_test
async def test_administration(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client("admin") as admin, host.client() as alice:
        assert (await alice.error("tenants.add", name="x"))["code"] == "forbidden"
        assert (await alice.error("keys.list"))["code"] == "forbidden"
        assert await admin.data("tenants.add", name="carol") == {"name": "carol"}
        assert (await admin.error("tenants.add", name="carol"))["code"] == "already_exists"
        tenants = (await admin.data("tenants.list"))["tenants"]
        assert [(t["name"], t["keys"]) for t in tenants] == [("admin", 1), ("alice", 1), ("bob", 1), ("carol", 0)]
        made = await admin.data("keys.add", tenant="carol")
        assert made["key"].startswith("realm_") and made["tenant"] == "carol" and len(made["key"]) > 40
        assert (await admin.error("keys.add", tenant="dave"))["code"] == "tenant_not_found"
        host.keys["carol"] = made["key"]
        async with host.client("carol") as carol:
            assert (await carol.data("health"))["status"] == "healthy"
        keys = (await admin.data("keys.list", tenant="carol"))["keys"]
        assert [(key["id"], key["revoked"]) for key in keys] == [(made["id"], None)] and "key" not in keys[0]
        await admin.data("keys.revoke", id=made["id"])
        assert (await admin.data("keys.list", tenant="carol"))["keys"][0]["revoked"] is not None
        assert (await admin.error("keys.revoke", id="k0"))["code"] == "key_not_found"
        assert (await admin.data("models.list"))["models"][0]["name"] == "tiny"
        # The admin sees all runs and all tenants' counters.
        await alice.data("generate", prompt="x")
        seen = await admin.data("ps", all=True)
        assert [run["tenant"] for run in seen["runs"]] == ["alice"]
        assert set(seen["engine"]["tenants"]) == {"alice", "bob"}


@async_test
async def test_nothing_private_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not at the finest level, and not when something fails."""
    caplog.set_level(logging.DEBUG)

    def script(worker: FakeWorker, start: StartRun) -> None:
        worker.say(log_line(start.run, "SECRET-log"), StoreSet(1, start.run, "SECRET-name", b"SECRET-value"))
        if start.module == "generate":
            worker.finish(start.run, outcome="error", error=ErrorInfo("guest_trap", "SECRET-end", {"a": "SECRET"}))

    async with fake_host(tmp_path, script=script, defaults={"store_bytes": 1}) as host, host.client() as client:
        await client.push("chat")
        await client.error("generate", prompt="SECRET-prompt")
        await client.start("run", module="chat", input="SECRET-input")
        assert (await client.receive())["data"] == {"kind": "started", "run": "r2"}
        await client.receive()
        await client.data("send", run="r2", data={"SECRET-message": 1})
        await client.error("generate", prompt=["SECRET-type"])
        await client.send('{"id": 7, "function": "SECRET-function", "params": {"SECRET": "SECRET"')
        await client.receive()
        handlers = host.gateway.functions.handlers
        handlers["ps"] = lambda caller, call, params: 1 // 0
        assert (await client.error("ps", all=True))["code"] == "internal"
        host.worker.say(RunFinished(2, "SECRET-outcome", 0, None, Usage()))
        await client.receive()
        async with host.raw(additional_headers={"Authorization": "Bearer SECRET-key"}) as stranger:
            assert (await stranger.receive())["type"] == "auth_failed"
    formatter = logging.Formatter("%(name)s %(message)s")
    # The test's own client says everything.
    logged = "\n".join(formatter.format(r) for r in caplog.records if not r.name.startswith("websockets.client"))
    assert "ZeroDivisionError" in logged and "not ours" in logged
    assert "SECRET" not in logged
    assert all(key not in logged for key in host.keys.values())
