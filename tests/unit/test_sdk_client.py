"""The asynchronous client against a scripted server: opening, order, errors, loss."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest

from realm_sdk import (
    AuthenticationError,
    Client,
    ConnectionLost,
    InvalidRequest,
    Limit,
    NotFound,
    Output,
    ProtocolError,
    RateLimited,
    RealmError,
    Started,
    Unavailable,
    WaitTimeout,
)
from tests.unit.sdk_fake_server import Peer, fake_server, idle

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


async def test_too_many_wrong_keys_say_when_to_try_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.say(type="auth_failed", error="too many wrong keys", retry_after=20.0)
        await peer.socket.close(4401, "auth")

    async with fake_server(script, greet=False) as server:
        with pytest.raises(AuthenticationError, match="too many") as caught:
            await Client(server.url, "k").open()
    assert caught.value.retry_after == 20.0


async def test_a_good_key_without_a_place() -> None:
    details = {"name": "connections", "limit": 2, "used": 2, "unit": "connections"}

    async def script(peer: Peer) -> None:
        error = {"code": "rate_limited", "message": "full", "details": details, "retry_after": 1.0}
        await peer.say(type="refused", error=error)
        await peer.socket.close(1013, "full")

    async with fake_server(script, greet=False) as server:
        with pytest.raises(RateLimited) as caught:
            await Client(server.url, "k").open()
    assert (caught.value.details, caught.value.retry_after) == (details, 1.0)


async def test_no_place_for_anybody() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Full\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Unavailable) as caught:
            await Client(f"ws://127.0.0.1:{port}", "k").open()
    assert (caught.value.code, caught.value.retry_after) == ("busy", 7.0)


async def test_a_context_for_tls_is_for_wss_only() -> None:
    with pytest.raises(ConnectionLost, match="ssl"):
        await Client("ws://127.0.0.1:1", "k", ssl=ssl.create_default_context()).open()


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (4401, AuthenticationError, "bye"),
        (1013, Unavailable, "bye"),
        (1001, ConnectionLost, "shuts down"),
        (1008, ProtocolError, "bye"),
        (1009, ProtocolError, "bye"),
    ],
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


# --- limits --------------------------------------------------------------------------------------


async def test_limits_are_typed_and_set() -> None:
    entry = {"name": "uploads", "value": 4, "unit": "uploads", "from": "tenant", "used": 1, "doc": "in flight"}
    answer = {"name": "bob", "created": 5.0, "keys": 2, "limits": [entry, {"name": "warp", "value": 1, "used": None}]}
    heard: list[Any] = []

    async def script(peer: Peer) -> None:
        for function in ("tenants.show", "tenants.show", "tenants.set", "tenants.set"):
            call = await peer.expect(function)
            heard.append(call["params"])
            await peer.complete(call, **answer)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        tenant = await client.show_tenant("bob")
        assert tenant["uploads"] == Limit("uploads", 4, "uploads", "tenant", 1, "in flight")
        assert tenant["warp"].used is None and (tenant.name, tenant.keys) == ("bob", 2)
        with pytest.raises(KeyError):
            tenant["nothing"]
        await client.show_tenant()
        await client.set_limits("bob", {"uploads": 3, "warp": None})
        await client.set_limits(None, {"uploads": 3})
    assert heard == [
        {"name": "bob"},
        {},
        {"limits": {"uploads": 3, "warp": None}, "name": "bob"},
        {"limits": {"uploads": 3}},
    ]


async def test_a_run_log_has_the_error_that_ended_the_run() -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("logs")
        lines = [{"level": "info", "text": "one"}]
        await peer.complete(call, run="r1", lines=lines, error={"code": "guest_trap", "message": "m"})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        log = await client.run_log("r1")
    assert [line.text for line in log.lines] == ["one"] and log.error == {"code": "guest_trap", "message": "m"}
