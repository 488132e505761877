"""The asynchronous client against a scripted server: order, errors, loss, cancellation."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from pathlib import Path
from typing import Any

import pytest

import realm_sdk.calls
from realm_sdk import (
    AuthenticationError,
    Client,
    ConnectionLost,
    Finished,
    InvalidRequest,
    Log,
    ModuleRefused,
    NotFound,
    Output,
    ProtocolError,
    RealmError,
    Started,
    Unavailable,
    WaitTimeout,
)
from tests.unit.sdk_fake_server import Peer, fake_server

USAGE = {"fuel": 5, "new_tokens": 2, "prompt_tokens": 3}


async def idle(peer: Peer) -> None:
    await peer.socket.wait_closed()


# --- opening -------------------------------------------------------------------------------------


async def test_opening_with_the_key_in_the_header() -> None:
    async def script(peer: Peer) -> None:
        assert peer.headers["Authorization"] == "Bearer k-7"
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k-7") as client:
        assert (client.tenant, client.server_version) == ("acme", "9.9")


async def test_opening_with_the_key_asked_for() -> None:
    async def script(peer: Peer) -> None:
        await peer.say(type="auth_required", message="key?")
        assert await peer.hear() == {"type": "auth", "api_key": "k-7"}
        await peer.greet("other")
        await idle(peer)

    async with fake_server(script, greet=False) as server, Client(server.url, "k-7") as client:
        assert client.tenant == "other"


async def test_wrong_key() -> None:
    async def script(peer: Peer) -> None:
        await peer.say(type="auth_failed", error="unknown key")
        await peer.socket.close(4401, "auth")

    async with fake_server(script, greet=False) as server:
        with pytest.raises(AuthenticationError, match="unknown key"):
            await Client(server.url, "k").open()


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [(4401, AuthenticationError, "bye"), (1013, Unavailable, "bye"), (1001, ConnectionLost, "shuts down")],
)
async def test_closed_during_the_opening(code: int, kind: type[RealmError], text: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.socket.close(code, "bye")

    async with fake_server(script, greet=False) as server:
        with pytest.raises(kind, match=text) as caught:
            await Client(server.url, "k").open()
    assert caught.value.details == {"close_code": code}


async def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionLost) as caught:
        await Client(f"ws://127.0.0.1:{port}", "k").open()
    assert caught.value.code == "connect_failed"


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "http://127.0.0.1", "nonsense", ""])
async def test_bad_url(url: str) -> None:
    with pytest.raises(ConnectionLost, match="ws://"):
        await Client(url, "k").open()


async def test_silent_server() -> None:
    async with fake_server(idle, greet=False) as server:
        with pytest.raises(ConnectionLost, match="did not answer"):
            await Client(server.url, "k", open_timeout=0.2).open()


async def test_redirect_is_not_followed() -> None:
    """A redirect would carry the key to another server."""
    hits: list[bytes] = []

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hits.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionLost, match="302"):
            await Client(f"ws://127.0.0.1:{port}", "k").open()
    assert len(hits) == 1


async def test_a_client_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        await Client("ws://127.0.0.1:1", "k").ps()


# --- plain calls ---------------------------------------------------------------------------------


async def test_answers_in_another_order_reach_their_callers() -> None:
    async def script(peer: Peer) -> None:
        calls = [await peer.hear() for _ in range(3)]
        by_run = {call["params"]["run"]: call for call in calls}
        await peer.complete(by_run["r3"], lines=[{"level": "info", "text": "three"}])
        await peer.fail(by_run["r1"], "run_not_found", "no r1")
        await peer.complete(by_run["r2"], lines=[])
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        one, two, three = await asyncio.gather(
            client.logs("r1"), client.logs("r2"), client.logs("r3"), return_exceptions=True
        )
    assert isinstance(one, NotFound) and str(one) == "run_not_found: no r1"
    assert two == []
    assert isinstance(three, list) and three[0].text == "three"


async def test_each_function_sends_what_the_protocol_says() -> None:
    answers: dict[str, dict[str, Any]] = {
        "ps": {"runs": [{"run": "r1", "module": "m", "status": "running"}], "engine": {"steps": 3}},
        "modules.list": {"modules": [{"name": "m", "sha256": "00", "size": 3, "version": 2, "created": 1.5}]},
        "modules.remove": {},
        "models.list": {"models": [{"name": "x", "served": True, "context_length": 8, "parameters": 9}]},
        "health": {"status": "healthy", "model": "x", "uptime_seconds": 1, "workers": 2, "engine": {}},
        "metadata": {"version": "1", "functions": [{"name": "ps", "doc": "d", "params": []}]},
        "tenants.add": {"name": "t"},
        "tenants.list": {"tenants": [{"name": "t", "created": 1.0, "keys": 1}]},
        "keys.add": {"key": "secret", "id": "k1", "tenant": "t"},
        "keys.list": {"keys": [{"id": "k1", "tenant": "t", "created": 1.0, "revoked": None}]},
        "keys.revoke": {},
        "send": {},
        "cancel": {"cancelled": True},
    }
    heard: list[tuple[str, dict[str, Any]]] = []

    async def script(peer: Peer) -> None:
        while True:
            call = await peer.hear()
            heard.append((call["function"], call["params"]))
            await peer.complete(call, **answers[call["function"]])

    async with fake_server(script) as server, Client(server.url, "k") as client:
        processes = await client.ps(all=True, limit=7)
        assert (processes.runs[0].run, processes.engine["steps"]) == ("r1", 3)
        assert (await client.modules())[0].version == 2
        await client.remove("m")
        assert (await client.models())[0].served
        assert (await client.health()).workers == 2
        assert (await client.metadata()).functions[0].name == "ps"
        assert await client.add_tenant("t") == "t"
        assert (await client.tenants())[0].keys == 1
        assert (await client.add_key("t")).key == "secret"
        assert (await client.keys())[0].revoked is None
        await client.keys("t")
        await client.revoke_key("k1")
        await client.send("r1", {"a": 1})
        assert await client.cancel("r1")
    assert heard == [
        ("ps", {"all": True, "limit": 7}),
        ("modules.list", {}),
        ("modules.remove", {"name": "m"}),
        ("models.list", {}),
        ("health", {}),
        ("metadata", {}),
        ("tenants.add", {"name": "t"}),
        ("tenants.list", {}),
        ("keys.add", {"tenant": "t"}),
        ("keys.list", {}),
        ("keys.list", {"tenant": "t"}),
        ("keys.revoke", {"id": "k1"}),
        ("send", {"run": "r1", "data": {"a": 1}}),
        ("cancel", {"run": "r1"}),
    ]


async def test_one_wait_times_out_and_the_connection_goes_on() -> None:
    async def script(peer: Peer) -> None:
        late = await peer.expect("ps")
        health = await peer.expect("health")
        await peer.complete(late, runs=[], engine={})
        await peer.complete(health, status="healthy")
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k", wait_timeout=0.1) as client:
        with pytest.raises(WaitTimeout) as caught:
            await client.ps()
        assert isinstance(caught.value, TimeoutError)
        assert (await client.health()).status == "healthy"


async def test_data_of_the_wrong_shape_is_an_error_of_its_call() -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("ps"), runs="none")
        await peer.complete(await peer.expect("modules.list"), modules=[])
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ProtocolError, match="ps"):
            await client.ps()
        assert await client.modules() == []


async def test_parameters_that_are_not_json_send_nothing() -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("modules.list"), modules=[])
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(InvalidRequest):
            await client.run("m", object()).text()
        assert await client.modules() == []


# --- loss ----------------------------------------------------------------------------------------


async def test_lost_connection_ends_every_call() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.expect("ps")
        await peer.stream(run, 0, kind="started", run="r1")
        await peer.stream(run, 1, kind="output", text="half")
        peer.socket.transport.abort()

    async with fake_server(script) as server, Client(server.url, "k") as client:
        events: list[Any] = []

        async def consume() -> None:
            async for event in client.run("m"):
                events.append(event)

        consumed, listed = await asyncio.gather(consume(), client.ps(), return_exceptions=True)
        assert isinstance(consumed, ConnectionLost) and consumed.code == "connection_lost"
        assert isinstance(listed, ConnectionLost)
        # What had arrived was given first.
        assert events == [Started("r1"), Output("half")]
        with pytest.raises(ConnectionLost):
            await client.ps()


@pytest.mark.parametrize("frame", ["{", '{"id":77,"status":"complete"}', b"\x01"])
async def test_frame_outside_the_protocol_ends_the_connection(frame: str | bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.expect("ps")
        await peer.socket.send(frame)
        await peer.socket.wait_closed()
        assert peer.socket.close_code == 1002

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ProtocolError):
            await client.ps()


async def test_closing_the_client_ends_what_waits() -> None:
    async with fake_server(idle) as server:
        client = Client(server.url, "k")
        await client.open()
        waiting = asyncio.create_task(client.ps())
        await asyncio.sleep(0.05)
        await client.close()
        await client.close()
        with pytest.raises(ConnectionLost, match="closed"):
            await waiting


async def test_messages_that_arrive_while_the_client_closes_are_dropped() -> None:
    """The server may be in the middle of a stream, or be reporting the cancellation."""

    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r1")
        for seq in range(1, 100_000):
            await peer.stream(run, seq, kind="output", text="x")

    async with fake_server(script) as server:
        client = Client(server.url, "k")
        await client.open()
        run = await client.run("m")
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(ConnectionLost):
            await run.text()


# --- runs ----------------------------------------------------------------------------------------


async def answer_run(peer: Peer, *, cancel: bool = False) -> dict[str, Any]:
    run = await peer.expect("run")
    await peer.stream(run, 0, kind="started", run="r5")
    await peer.stream(run, 1, kind="output", text="Hel")
    await peer.stream(run, 2, kind="log", level="warning", text="careful")
    await peer.stream(run, 3, kind="later_kind", text="?")
    await peer.stream(run, 4, kind="output", text="lo")
    if not cancel:
        await peer.complete(run, run="r5", code=3, usage=USAGE)
    return run


async def test_run_gives_typed_events_in_order() -> None:
    async def script(peer: Peer) -> None:
        run = await answer_run(peer)
        assert run["params"] == {"module": "chat", "input": {"q": 1}, "stream": True, "seed": 9}
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        run = client.run("chat", {"q": 1}, seed=9)
        assert run.id is None
        events = [event async for event in run]
        assert run.id == "r5"
        with pytest.raises(RuntimeError, match="already iterated"):
            await run.text()
    assert events[:4] == [Started("r5"), Output("Hel"), Log("warning", "careful"), Output("lo")]
    last = events[4]
    assert isinstance(last, Finished)
    assert (last.code, last.outcome, last.usage.fuel) == (3, "complete", 5)
    assert [event.kind for event in events] == ["started", "output", "log", "output", "finished"]


async def test_text_of_a_streamed_and_of_a_whole_run() -> None:
    async def script(peer: Peer) -> None:
        await answer_run(peer)
        whole = await peer.expect("run")
        assert whole["params"]["stream"] is False
        await peer.complete(whole, run="r6", code=0, text="all of it", usage=USAGE)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        assert await client.run("chat").text() == "Hello"
        run = client.run("chat", stream=False)
        assert await run.text() == "all of it"
        assert run.id == "r6"


async def test_awaiting_a_run_waits_for_its_start_and_loses_nothing() -> None:
    async def script(peer: Peer) -> None:
        await answer_run(peer)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        run = await client.run("chat")
        assert run.id == "r5"
        kinds = [event.kind async for event in run]
        assert kinds == ["started", "output", "log", "output", "finished"]


async def test_failed_run() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.fail(run, "guest_trap", "unreachable", details={"trap": "unreachable"})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(RealmError) as caught:
            await client.run("chat").text()
    assert (caught.value.code, caught.value.details["trap"]) == ("guest_trap", "unreachable")


async def test_messages_to_the_guest() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r5")
        send = await peer.expect("send")
        assert send["params"] == {"run": "r5", "data": "hi"}
        await peer.complete(send)
        await peer.stream(run, 1, kind="output", text="you said hi")
        await peer.complete(run, run="r5", code=0)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        run = client.run("chat")
        await run.send("hi")
        assert await run.text() == "you said hi"


async def expect_cancel(peer: Peer, run: dict[str, Any]) -> None:
    cancel = await asyncio.wait_for(peer.expect("cancel"), 5)
    assert cancel["params"] == {"id": run["id"]}
    await peer.complete(cancel, cancelled=True)
    await peer.say(id=run["id"], status="cancelled", data={"run": "r5"})


async def cancel_then_health(peer: Peer) -> None:
    """The run must be cancelled while the connection is still in use."""
    run = await answer_run(peer, cancel=True)
    await expect_cancel(peer, run)
    await peer.complete(await peer.expect("health"), status="healthy")
    await idle(peer)


async def test_break_cancels_the_run() -> None:
    async with fake_server(cancel_then_health) as server, Client(server.url, "k") as client:
        async for event in client.run("chat"):
            if event.kind == "output":
                break
        await asyncio.sleep(0.05)
        assert (await client.health()).status == "healthy"


async def test_exception_in_the_loop_cancels_the_run() -> None:
    async with fake_server(cancel_then_health) as server, Client(server.url, "k") as client:
        with pytest.raises(KeyError):
            async for _ in client.run("chat"):
                raise KeyError
        await asyncio.sleep(0.05)
        assert (await client.health()).status == "healthy"


async def test_leaving_the_context_cancels_the_run() -> None:
    async with fake_server(cancel_then_health) as server, Client(server.url, "k") as client:
        async with client.run("chat") as run:
            assert run.id == "r5"
        await asyncio.sleep(0.05)
        assert (await client.health()).status == "healthy"


async def test_cancelled_task_cancels_the_run() -> None:
    async with fake_server(cancel_then_health) as server, Client(server.url, "k") as client:
        task = asyncio.create_task(client.run("chat").text())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.05)
        assert (await client.health()).status == "healthy"


async def test_wait_timeout_cancels_the_run() -> None:
    async with fake_server(cancel_then_health) as server, Client(server.url, "k") as client:
        with pytest.raises(WaitTimeout):
            await client.run("chat", wait_timeout=0.1).text()
        await asyncio.sleep(0.05)
        assert (await client.health()).status == "healthy"


async def test_cancel_ends_the_iterator_with_the_outcome() -> None:
    async def script(peer: Peer) -> None:
        run = await answer_run(peer, cancel=True)
        await expect_cancel(peer, run)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        run = await client.run("chat")
        assert await run.cancel()
        events = [event async for event in run]
        assert isinstance(events[-1], Finished)
        assert events[-1].outcome == "cancelled"
        assert not await run.cancel()


async def test_text_of_a_cancelled_run_is_an_error() -> None:
    async def script(peer: Peer) -> None:
        run = await answer_run(peer, cancel=True)
        await peer.say(id=run["id"], status="cancelled", data={"run": "r5"})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(RealmError, match="cancelled"):
            await client.run("chat").text()


async def test_unread_stream_does_not_stop_other_calls() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r5")
        for seq in range(1, 201):
            await peer.stream(run, seq, kind="output", text="x" * 10_000)
        await peer.complete(run, run="r5", code=0)
        await peer.complete(await peer.expect("health"), status="healthy")
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        run = await client.run("chat")
        assert (await client.health()).status == "healthy"
        assert len(await run.text()) == 2_000_000


async def test_consumer_too_far_behind_loses_only_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realm_sdk.calls, "MAX_BUFFERED", 1000)

    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r5")
        for seq in range(1, 10):
            await peer.stream(run, seq, kind="output", text="x" * 200)
        await expect_cancel(peer, run)
        await peer.complete(await peer.expect("health"), status="healthy")
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        run = await client.run("chat")
        await asyncio.sleep(0.1)
        assert (await client.health()).status == "healthy"
        with pytest.raises(RealmError) as caught:
            await run.text()
        assert caught.value.code == "slow_consumer"


# --- generation ----------------------------------------------------------------------------------


async def test_generate_whole_and_streamed() -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("generate")
        assert call["params"] == {"prompt": "Hi", "stream": False, "max_tokens": 4}
        await peer.complete(
            call, text="there", tokens_generated=2, prompt_tokens=3, finish_reason="stop", run="r1", usage=USAGE
        )
        call = await peer.expect("generate")
        assert call["params"] == {"messages": [{"role": "user", "content": "Hi"}], "stream": True, "seed": 1}
        for seq, piece in enumerate(["the", "re"]):
            await peer.stream(call, seq, text=piece, token=piece, index=seq, is_final=False)
        await peer.stream(call, 2, text="", token="", index=2, is_final=True)
        await peer.complete(call, text="there", tokens_generated=2, prompt_tokens=3, finish_reason="length", run="r2")
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        whole = await client.generate("Hi", max_tokens=4)
        assert (whole.text, whole.finish_reason, whole.usage.fuel) == ("there", "stop", 5)
        stream = client.stream([{"role": "user", "content": "Hi"}], seed=1)
        pieces = [piece async for piece in stream]
        assert [piece.text for piece in pieces] == ["the", "re", ""]
        assert [piece.is_final for piece in pieces] == [False, False, True]
        assert stream.result is not None and stream.result.finish_reason == "length"


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelled_generation_is_cancelled_on_the_server(streamed: bool) -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("generate")
        await expect_cancel(peer, call)
        await peer.complete(await peer.expect("health"), status="healthy")
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        work = client.stream("Hi").text() if streamed else client.generate("Hi")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(work, 0.1)
        await asyncio.sleep(0.05)
        assert (await client.health()).status == "healthy"


# --- uploads -------------------------------------------------------------------------------------

CHUNK = 256 << 10


async def take_upload(peer: Peer, size: int, *, received: int = 0) -> bytes:
    """Answer ``modules.begin``; then take chunks and acknowledge each."""
    begin = await peer.expect("modules.begin")
    assert begin["params"]["size"] == size
    await peer.complete(begin, upload=4, received=received, exists=False)
    taken = b""
    while received + len(taken) < size:
        upload, offset, data = await peer.hear_chunk()
        assert (upload, offset) == (4, received + len(taken))
        assert 0 < len(data) <= CHUNK
        taken += data
        await peer.say(type="upload_ack", upload=4, received=offset + len(data))
    return taken


async def test_push_sends_chunks_and_reports_progress(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096 + b"end"
    path = tmp_path / "m.wasm"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()

    async def script(peer: Peer) -> None:
        assert await take_upload(peer, len(data)) == data
        commit = await peer.expect("modules.commit")
        assert commit["params"] == {"upload": 4}
        await peer.complete(commit, name="m", sha256=digest, size=len(data), version=1, imports=["forward"])
        await idle(peer)

    seen: list[tuple[int, int]] = []
    async with fake_server(script) as server, Client(server.url, "k") as client:
        module = await client.push("m", path, lambda done, total: seen.append((done, total)))
    assert (module.version, module.imports) == (1, ["forward"])
    assert seen[-1] == (len(data), len(data))
    assert seen == sorted(seen)


async def test_push_goes_on_from_what_the_server_has() -> None:
    data = b"0123456789" * 60_000

    async def script(peer: Peer) -> None:
        assert await take_upload(peer, len(data), received=400_000) == data[400_000:]
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=len(data))
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.push("m", data)


async def test_push_of_known_content_sends_nothing() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=1, received=0, exists=True)
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=3)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        assert (await client.push("m", b"abc")).name == "m"


async def test_push_keeps_at_most_a_window_in_flight() -> None:
    data = bytes(20 * CHUNK)

    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        for _ in range(8):
            await peer.hear_chunk()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.socket.recv(), 0.2)
        await peer.say(type="upload_ack", upload=4, received=8 * CHUNK)
        for number in range(9, 21):
            await peer.hear_chunk()
            await peer.say(type="upload_ack", upload=4, received=number * CHUNK)
        await peer.complete(await peer.expect("modules.commit"), name="m", sha256="", size=len(data))
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.push("m", data)


async def test_refused_chunk_aborts_the_upload() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        await peer.hear_chunk()
        error = {"code": "upload_size", "message": "too much"}
        await peer.say(type="upload_error", upload=4, error=error)
        abort = await peer.expect("modules.abort")
        assert abort["params"] == {"upload": 4}
        await peer.complete(abort)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ModuleRefused, match="upload_size"):
            await client.push("m", b"abc")
        await asyncio.sleep(0.05)


async def test_server_that_acknowledges_nothing() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        await peer.hear_chunk()
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k", wait_timeout=0.2) as client:
        with pytest.raises(WaitTimeout, match="acknowledgement"):
            await client.push("m", b"abc")


async def test_lost_connection_during_an_upload() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=0, exists=False)
        await peer.hear_chunk()
        peer.socket.transport.abort()

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ConnectionLost):
            await client.push("m", bytes(3 * CHUNK))


async def test_server_that_claims_more_than_there_is() -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("modules.begin")
        await peer.complete(begin, upload=4, received=99, exists=False)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ProtocolError, match="99 of 3"):
            await client.push("m", b"abc")


async def test_push_of_a_missing_file() -> None:
    async with fake_server(idle) as server, Client(server.url, "k") as client:
        with pytest.raises(FileNotFoundError):
            await client.push("m", Path("no-such.wasm"))
