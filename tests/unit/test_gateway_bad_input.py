"""What clients may do wrong, and what happens then: through the real gateway on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close
from websockets.typing import Subprotocol

from realm.gateway import protocol as p
from realm.settings import GatewayLimits
from tests.fake_host import WASM, FakeClient, async_test, eventually, fake_host, hang


async def closing(client: FakeClient) -> Close:
    """How the server closed the connection; frames before that are passed over."""
    try:
        while True:
            await client.socket.recv()
    except ConnectionClosed as error:
        assert error.rcvd is not None
        return error.rcvd


# --- who are you ----------------------------------------------------------------------------------


@async_test
async def test_unknown_and_revoked_keys(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host:
        async with host.client("admin") as admin:
            await admin.data("keys.revoke", id=host.key_ids["bob"])
        for key in ("realm_unknown", "", host.keys["bob"], host.keys["alice"] + "x", host.keys["alice"][:-1]):
            async with host.raw() as client:
                assert (await client.receive())["type"] == "auth_required"
                await client.send({"type": "auth", "api_key": key})
                failed = await client.receive()
                assert failed["type"] == "auth_failed" and failed["error"]
                assert (await closing(client)).code == 4401
            async with host.raw(additional_headers={"Authorization": f"Bearer {key}"}) as client:
                assert (await client.receive())["type"] == "auth_failed"
                assert (await closing(client)).code == 4401


@pytest.mark.parametrize(
    "first",
    [
        b"not json",
        b"[]",
        b'{"type":"auth"}',
        b'{"type":"auth","api_key":5}',
        b'{"type":"hello","api_key":"x"}',
        b'{"id":1,"function":"health"}',
        b"\xff\xfe",
    ],
)
@async_test
async def test_nothing_but_auth_comes_first(tmp_path: Path, first: bytes) -> None:
    async with fake_host(tmp_path) as host, host.raw() as client:
        await client.receive()
        await client.socket.send(first, text=True)
        assert (await client.receive())["type"] == "auth_failed"
        assert (await closing(client)).code == 4401


@async_test
async def test_calls_sent_before_the_key_is_checked_wait_for_it(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host:
        async with host.raw(additional_headers={"Authorization": f"bearer {host.keys['alice']}"}) as client:
            await client.send({"id": 1, "function": "generate", "params": {"prompt": "x"}})
            kinds = [await client.receive() for _ in range(3)]
            assert kinds[0]["type"] == "auth_success" and kinds[1]["status"] == "connected"
            assert kinds[2]["id"] == 1 and kinds[2]["status"] == "complete"
        async with host.raw() as client:
            await client.send({"type": "auth", "api_key": "wrong"})
            await client.send({"id": 1, "function": "generate", "params": {"prompt": "x"}})
            assert (await client.receive())["type"] == "auth_required"
            assert (await client.receive())["type"] == "auth_failed"
            assert (await closing(client)).code == 4401
        assert len(host.worker.starts) == 1


@async_test
async def test_a_client_that_never_authenticates_is_closed(tmp_path: Path) -> None:
    async with fake_host(tmp_path, limits=GatewayLimits(auth_seconds=0.2)) as host:
        async with host.raw() as client:
            assert (await closing(client)).code == 4401
        reader, writer = await asyncio.open_connection("127.0.0.1", host.server.port)
        writer.write(b"GET / HTTP/1.1\r\n")
        assert await reader.read() == b""
        writer.close()
        assert not host.gateway.connections


@async_test
async def test_revoking_a_key_closes_its_connections(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client("admin") as admin, host.client() as alice:
        await alice.start("generate", prompt="x")
        await host.worker.until(lambda worker: bool(worker.starts))
        await admin.data("keys.revoke", id=host.key_ids["alice"])
        assert (await closing(alice)).code == 4401
        await host.worker.until(lambda worker: bool(worker.cancels))


@async_test
async def test_another_tenants_name_and_modules(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as alice, host.client("bob") as bob:
        await alice.send({"id": 1, "function": "health", "tenant_id": "bob"})
        (reply,) = await alice.replies(1)
        assert reply["error"]["code"] == "tenant_mismatch"
        await alice.push("chat", WASM + b"secret")
        assert (await bob.error("run", module="chat"))["code"] == "module_not_found"
        assert (await bob.error("modules.remove", name="chat"))["code"] == "module_not_found"
        assert (await bob.data("modules.list"))["modules"] == []
        # `exists` is about the own content only, so nobody learns what others have stored.
        assert (await alice.begin("other", WASM + b"secret"))["exists"] is True
        assert (await bob.begin("other", WASM + b"secret"))["exists"] is False


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "call"),
    [
        (b"", None),
        (b"not json", None),
        (b"[1]", None),
        (b"null", None),
        (b'"text"', None),
        (b"\xff", None),
        (b'{"id":"\xff","function":"health"}', None),
        (b'{"id":"\\ud800","function":"health"}', None),
        (b'{"function":"health"}', None),
        (b'{"id":null,"function":"health"}', None),
        (b'{"id":1.5,"function":"health"}', None),
        (b'{"id":true,"function":"health"}', None),
        (b'{"id":[1],"function":"health"}', None),
        (b'{"id":99999999999999999999,"function":"health"}', None),
        (b'{"id":"' + b"x" * 129 + b'","function":"health"}', None),
        (b'{"id":7}', 7),
        (b'{"id":"a","function":5}', "a"),
        (b'{"id":7,"function":"health","tenant_id":5}', 7),
        (b'{"id":7,"function":"health"} trailing', None),
        (b"[" * 100_000, None),
        (b'{"id":1,"function":"health","params":' + b"[" * 500_000, None),
        (b'{"id":1,"function":"health","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", None),
    ],
)
@async_test
async def test_malformed_messages(tmp_path: Path, frame: bytes, call: Any) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.socket.send(frame, text=True)
        reply = await client.receive()
        assert reply["status"] == "error" and reply["error"]["code"] == "malformed_message"
        assert reply["id"] == call
        assert (await client.data("health"))["status"] == "healthy"


@async_test
async def test_unknown_functions_are_told_what_exists(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        error = await client.error("nothing")
        assert error["code"] == "unknown_function" and "modules.commit" in error["message"]
        assert "generate" in error["details"]["available"]


@pytest.mark.parametrize(
    ("function", "params", "name"),
    [
        ("generate", {"prompt": 5}, "prompt"),
        ("generate", {}, "prompt"),
        ("generate", {"prompt": "x", "messages": []}, "prompt"),
        ("generate", {"messages": []}, "messages"),
        ("generate", {"messages": [{"role": "user"}]}, "messages"),
        ("generate", {"messages": [{"role": "user", "content": [1]}]}, "messages"),
        ("generate", {"messages": "hi"}, "messages"),
        ("generate", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("generate", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ("generate", {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ("generate", {"prompt": "x", "max_tokens": "12"}, "max_tokens"),
        ("generate", {"prompt": "x", "max_tokens": 10**30}, "max_tokens"),
        ("generate", {"prompt": "x", "temperature": -0.1}, "temperature"),
        ("generate", {"prompt": "x", "temperature": "hot"}, "temperature"),
        ("generate", {"prompt": "x", "top_p": 0}, "top_p"),
        ("generate", {"prompt": "x", "top_p": 1.1}, "top_p"),
        ("generate", {"prompt": "x", "top_k": -1}, "top_k"),
        ("generate", {"prompt": "x", "min_p": 2}, "min_p"),
        ("generate", {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ("generate", {"prompt": "x", "seed": -1}, "seed"),
        ("generate", {"prompt": "x", "seed": 2**64}, "seed"),
        ("generate", {"prompt": "x", "stop": "."}, "stop"),
        ("generate", {"prompt": "x", "stop": [""]}, "stop"),
        ("generate", {"prompt": "x", "stop": ["."] * 9}, "stop"),
        ("generate", {"prompt": "x", "stream": 1}, "stream"),
        ("generate", [], "params"),
        ("run", {}, "module"),
        ("run", {"module": "../x"}, "module"),
        ("run", {"module": ""}, "module"),
        ("run", {"module": "x" * 65}, "module"),
        ("run", {"module": "x\n"}, "module"),
        ("run", {"module": "chat", "seed": "1"}, "seed"),
        ("send", {"run": "r1"}, "data"),
        ("send", {"run": "1", "data": ""}, "run"),
        ("send", {"run": "r0", "data": ""}, "run"),
        ("send", {"run": "r" + "9" * 30, "data": ""}, "run"),
        ("cancel", {}, "run"),
        ("cancel", {"run": "r1", "id": 1}, "run"),
        ("cancel", {"id": []}, "id"),
        ("ps", {"limit": 0}, "limit"),
        ("ps", {"all": "yes"}, "all"),
        ("logs", {"run": 5}, "run"),
        ("modules.begin", {"name": "x", "size": -1, "sha256": "0" * 64}, "size"),
        ("modules.begin", {"name": "x", "size": 1, "sha256": "0" * 63}, "sha256"),
        ("modules.begin", {"name": "x", "size": 1, "sha256": "G" * 64}, "sha256"),
        ("modules.begin", {"name": "generate", "size": 1, "sha256": "0" * 64}, "name"),
        ("modules.begin", {"name": ".hidden", "size": 1, "sha256": "0" * 64}, "name"),
        ("modules.commit", {"upload": "1"}, "upload"),
        ("modules.remove", {}, "name"),
    ],
)
@async_test
async def test_wrong_parameters_are_named(tmp_path: Path, function: str, params: Any, name: str) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.send({"id": "x", "function": function, "params": params})
        (reply,) = await client.replies("x")
        assert reply["error"]["code"] == "invalid_params", reply
        assert reply["error"]["details"]["param"] == name
        assert name in reply["error"]["message"]
        assert not host.worker.starts


@pytest.mark.parametrize(
    ("function", "params", "message"),
    [
        ("logs", {"run": "17"}, "'run': must be a run's id, text such as r17"),
        ("cancel", {"run": "r1\n"}, "'run': must be a run's id, text such as r17"),
        ("tenants.add", {"name": "bad name!"}, "'name': must be 1 to 63 of a-z, 0-9, '_', '.' and '-', and begin"),
        ("keys.list", {"tenant": "A"}, "'tenant': must be 1 to 63 of a-z, 0-9, "),
        ("run", {"module": "a b"}, "'module': must be 1 to 64 of A-Z, a-z, 0-9, "),
        ("modules.begin", {"name": "x", "size": 1, "sha256": "0" * 63}, "'sha256': must be 64 of 0-9 and a-f"),
    ],
)
@async_test
async def test_patterns_are_put_in_words(tmp_path: Path, function: str, params: Any, message: str) -> None:
    async with fake_host(tmp_path) as host, host.client("admin") as client:
        error = await client.error(function, **params)
        assert error["code"] == "invalid_params"
        assert error["message"].startswith(f"{function}: parameter {message}")
        assert "regex" not in error["message"] and "^" not in error["message"]


def test_every_pattern_has_words() -> None:
    def patterns(hint: Any) -> list[str]:
        own = [meta.pattern for meta in getattr(hint, "__metadata__", ()) if getattr(meta, "pattern", None)]
        return own + [pattern for part in get_args(hint) for pattern in patterns(part)]

    found = {
        pattern
        for function in p.FUNCTIONS.values()
        for hint in get_type_hints(function.params, include_extras=True).values()
        for pattern in patterns(hint)
    }
    assert found == p._IN_WORDS.keys()


@async_test
async def test_unknown_parameters_and_nulls_are_ignored(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        data = await client.data("generate", prompt="x", max_tokens=None, seed=None, stop=None, later={"a": [1]})
        assert data["text"] == "x" and json.loads(host.worker.starts[0].input)["max_tokens"] == 128
        assert (await client.error("generate", prompt="x", model="gpt"))["code"] == "model_not_found"
        assert (await client.data("generate", prompt="x", model="tiny"))["text"] == "x"


@async_test
async def test_duplicate_ids_leave_the_call_in_progress_alone(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host, host.client() as client:
        call = {"id": "same", "function": "generate", "params": {"prompt": "x"}}
        await client.send(call)
        await host.worker.until(lambda worker: len(worker.starts) == 1)
        await client.send(call)
        reply = await client.receive()
        assert reply["id"] == "same" and reply["error"]["code"] == "duplicate_id"
        host.worker.finish(1)
        assert (await client.receive())["status"] == "complete"
        # A finished call's id is free again; 1 and "1" differ.
        await client.send(call)
        await client.send({**call, "id": 1})
        await client.send({**call, "id": "1"})
        await host.worker.until(lambda worker: len(worker.starts) == 4)


@async_test
async def test_too_many_calls_and_runs(tmp_path: Path) -> None:
    defaults = {"running_guests": 2, "waiting_guests": 1}
    async with (
        fake_host(tmp_path, script=hang, limits=GatewayLimits(calls=3), defaults=defaults) as host,
        host.client() as client,
        host.client() as second,
        host.client("bob") as other,
    ):
        for _ in range(2):
            await client.start("generate", prompt="x")
            await host.worker.until(lambda worker: bool(worker.starts))
        await host.worker.until(lambda worker: len(worker.starts) == 2)
        # The third waits; it is a call in progress, too.
        await client.start("generate", prompt="x")
        error = await client.error("health")
        assert error["code"] == "busy" and error["retry_after"] > 0 and error["details"]["limit"] == 3
        error = await second.error("generate", prompt="x")
        assert error["code"] == "rate_limited" and error["retry_after"] > 0
        assert error["details"] == {"name": "waiting_guests", "limit": 1, "used": 1, "unit": "runs"}
        await other.start("generate", prompt="x")
        await host.worker.until(lambda worker: len(worker.starts) == 3)


# --- frames ---------------------------------------------------------------------------------------


@async_test
async def test_frames_over_the_limit_close_with_1009(tmp_path: Path) -> None:
    async with fake_host(tmp_path, script=hang) as host:
        async with host.client() as client:
            await client.start("generate", prompt="x")
            await host.worker.until(lambda worker: bool(worker.starts))
            await client.send(b"x" * (1 << 20) + b"x")
            assert (await closing(client)).code == 1009
        await host.worker.until(lambda worker: bool(worker.cancels))
        async with host.client() as client:

            async def pieces() -> Any:
                for _ in range(33):
                    yield "x" * (32 << 10)

            with pytest.raises(ConnectionClosed):
                await client.socket.send(pieces())
                await client.socket.recv()
            assert client.socket.close_code == 1009
        async with host.client() as client:
            assert (await client.data("health"))["status"] == "healthy"


@async_test
async def test_fragments_are_one_message(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.socket.send(['{"id":1,"func', 'tion":"generate","params"', ':{"prompt":"x"}}'])
        (reply,) = await client.replies(1)
        assert reply["data"]["text"] == "x"


@async_test
async def test_short_binary_frames_and_unknown_uploads(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.send(b"short")
        assert (await client.receive())["error"]["code"] == "malformed_message"
        error = await client.chunk(9, 0, b"x")
        assert error["type"] == "upload_error" and error["upload"] == 9
        assert error["error"]["code"] == "upload_not_found"
        assert (await client.error("modules.commit", upload=9))["code"] == "upload_not_found"
        assert (await client.error("modules.abort", upload=9))["code"] == "upload_not_found"


@async_test
async def test_http_and_garbage_on_the_same_port(tmp_path: Path) -> None:
    async def http(port: int, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.read()
        writer.close()
        return answer

    async with fake_host(tmp_path) as host:
        port = host.server.port
        answer = await http(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b'{"status":"healthy"}')
        assert (await http(port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 426 ")
        assert await http(port, b"\x16\x03\x01\x02\x00 this is TLS\r\n\r\n") == b""
        long = b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n"
        assert (await http(port, long)).split(b" ")[1] in (b"414", b"400")
        host.worker.die()
        await host.worker.closed.wait()
        await eventually(lambda: not host.gateway.runs.workers)
        assert (await http(port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
        async with host.raw(subprotocols=[Subprotocol("realm.v9"), Subprotocol("realm.v1")]) as client:
            assert client.socket.subprotocol == "realm.v1"
        async with host.raw(subprotocols=[Subprotocol("realm.v9")]) as client:
            assert client.socket.subprotocol is None


# --- uploads --------------------------------------------------------------------------------------


@async_test
async def test_uploads_out_of_order_too_long_and_too_short(tmp_path: Path) -> None:
    content = WASM + bytes(100)
    async with fake_host(tmp_path) as host, host.client() as client:
        upload = (await client.begin("chat", content))["upload"]
        assert (await client.chunk(upload, 0, content[:50]))["received"] == 50
        for offset in (0, 49, 51, 2**64 - 1):
            error = (await client.chunk(upload, offset, b"x"))["error"]
            assert error["code"] == "upload_out_of_order" and error["details"]["received"] == 50
        error = (await client.chunk(upload, 50, content[50:] + b"x"))["error"]
        assert error["code"] == "upload_size" and error["details"]["limit"] == len(content)
        error = (await client.chunk(upload, 50, bytes((256 << 10) + 1)))["error"]
        assert error["code"] == "upload_size"
        error = await client.error("modules.commit", upload=upload)
        assert error["code"] == "upload_size" and error["details"]["received"] == 50
        # After all that it can still be finished.
        assert (await client.chunk(upload, 50, content[50:]))["received"] == len(content)
        assert (await client.data("modules.commit", upload=upload))["sha256"] == hashlib.sha256(content).hexdigest()
        assert (await client.error("modules.commit", upload=upload))["code"] == "upload_not_found"


@async_test
async def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.push("chat", WASM + b"good")
        upload = (await client.begin("chat", WASM + b"promised"))["upload"]
        await client.chunk(upload, 0, WASM + b"othersss")
        error = await client.error("modules.commit", upload=upload)
        assert error["code"] == "upload_hash_mismatch" and error["details"]["received"] != error["details"]["announced"]
        assert not list((tmp_path / "incoming").iterdir())
        assert (await client.data("modules.list"))["modules"][0]["version"] == 1
        assert len([path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]) == 1


@async_test
async def test_a_refused_module_keeps_the_old_one(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        await client.push("chat")
        upload = (await client.begin("chat", b"not wasm"))["upload"]
        await client.chunk(upload, 0, b"not wasm")
        error = await client.error("modules.commit", upload=upload)
        assert error == {"code": "module_invalid", "message": "not a WebAssembly module", "details": {"offset": 0}}
        assert (await client.data("run", module="chat", stream=False))["code"] == 0
        assert (await client.begin("chat", b"not wasm"))["exists"] is False
        assert len([path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]) == 1


@async_test
async def test_modules_too_large_and_too_many_uploads(tmp_path: Path) -> None:
    defaults = {"module_bytes": 1000, "uploads": 4}
    async with fake_host(tmp_path, defaults=defaults) as host, host.client() as client:
        error = await client.error("modules.begin", name="x", size=1001, sha256="0" * 64)
        assert error["code"] == "module_too_large"
        assert error["details"] == {"name": "module_bytes", "limit": 1000, "used": 1001, "unit": "bytes"}
        uploads = [(await client.begin(f"m{n}", WASM))["upload"] for n in range(4)]
        error = await client.error("modules.begin", name="x", size=1, sha256="0" * 64)
        assert error["code"] == "rate_limited" and error["retry_after"] > 0
        assert error["details"] == {"name": "uploads", "limit": 4, "used": 4, "unit": "uploads"}
        assert await client.data("modules.abort", upload=uploads[0]) == {}
        await client.begin("x", WASM)
        # Stored content is not sent again, and may be named twice.
        await client.data("modules.abort", upload=uploads[1])
        await client.push("first")
        begun = await client.begin("second", WASM)
        assert begun["exists"] is True and begun["received"] == len(WASM)
        committed = await client.data("modules.commit", upload=begun["upload"])
        assert committed["name"] == "second" and committed["version"] == 1
        await client.data("modules.remove", name="first")
        assert (await client.data("run", module="second", stream=False))["code"] == 0


@async_test
async def test_abandoned_uploads_leave_no_files(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host:
        async with host.client() as client:
            upload = (await client.begin("chat", WASM))["upload"]
            await client.chunk(upload, 0, WASM[:4])
            assert len(list((tmp_path / "incoming").iterdir())) == 1
        await eventually(lambda: not host.gateway.connections)
        assert not list((tmp_path / "incoming").iterdir())
        # Gone in the middle of a commit: nothing half-made either.
        async with host.client() as client:
            upload = (await client.begin("chat", WASM))["upload"]
            await client.chunk(upload, 0, WASM)
            host.compiler.gate.clear()
            await client.start("modules.commit", upload=upload)
            await eventually(lambda: host.compiler.calls)
        await eventually(lambda: not host.gateway.connections)
        host.compiler.gate.set()
        async with host.client() as client:
            assert (await client.data("modules.list"))["modules"] == []
        await eventually(lambda: not list((tmp_path / "incoming").iterdir()))
