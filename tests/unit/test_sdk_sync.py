"""The blocking façade: the scripted server runs in the test's loop, the client in a thread."""

from __future__ import annotations

import asyncio
import inspect
import threading

import pytest

from realm_sdk import Client, ConnectionLost, NotFound, SyncClient
from tests.unit.sdk_fake_server import Peer, fake_server


async def test_calls_runs_and_streams_block() -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("health"), status="healthy")
        await peer.fail(await peer.expect("logs"), "run_not_found")
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r1")
        await peer.stream(run, 1, kind="output", text="Hi")
        await peer.complete(run, run="r1", code=0)
        stream = await peer.expect("generate")
        await peer.stream(stream, 0, text="a", index=0, is_final=False)
        await peer.complete(stream, text="a", tokens_generated=1, prompt_tokens=1, finish_reason="stop")
        await peer.complete(await peer.expect("generate"), text="whole")
        await peer.socket.wait_closed()

    def use(url: str) -> None:
        with SyncClient(url, "k") as client:
            assert client.tenant == "acme"
            assert client.health().status == "healthy"
            with pytest.raises(NotFound):
                client.logs("r9")
            run = client.run("chat", "x")
            assert [event.kind for event in run] == ["started", "output", "finished"]
            assert run.id == "r1"
            stream = client.stream("p")
            assert [piece.text for piece in stream] == ["a"]
            assert stream.result is not None and stream.result.finish_reason == "stop"
            assert client.generate("p").text == "whole"
        with pytest.raises(RuntimeError, match="not open"):
            client.health()

    async with fake_server(script) as server:
        await asyncio.to_thread(use, server.url)
    assert not [thread for thread in threading.enumerate() if thread.name == "realm-sdk"]


async def test_break_cancels_the_run() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r1")
        await peer.stream(run, 1, kind="output", text="Hi")
        cancel = await asyncio.wait_for(peer.expect("cancel"), 5)
        assert cancel["params"] == {"id": run["id"]}
        await peer.complete(cancel, cancelled=True)
        await peer.say(id=run["id"], status="cancelled", data={})
        await peer.complete(await peer.expect("modules.list"), modules=[])
        await peer.socket.wait_closed()

    def use(url: str) -> None:
        with SyncClient(url, "k") as client:
            for event in client.run("chat"):
                if event.kind == "output":
                    break
            assert client.modules() == []

    async with fake_server(script) as server:
        await asyncio.to_thread(use, server.url)


async def test_iterator_that_outlives_its_client() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="started", run="r1")
        await peer.socket.wait_closed()

    def use(url: str) -> None:
        client = SyncClient(url, "k")
        client.open()
        events = iter(client.run("chat"))
        assert next(events).kind == "started"
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            next(events)

    async with fake_server(script) as server:
        await asyncio.to_thread(use, server.url)


def test_failed_opening_leaves_no_thread() -> None:
    with pytest.raises(ConnectionLost):
        SyncClient("nonsense", "k").open()
    assert not [thread for thread in threading.enumerate() if thread.name == "realm-sdk"]


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    inner = {
        "call",
        "call_within",
        "post",
        "abandon",
        "open_call",
        "send_call",
        "send_frame",
        "cancel_call",
        "uploading",
    }
    names = {name for name in dir(Client) if not name.startswith("_")} - inner
    assert names == {name for name in dir(SyncClient) if not name.startswith("_")}
    for name in names:
        method, blocking = getattr(Client, name), getattr(SyncClient, name)
        if callable(method):
            assert list(inspect.signature(method).parameters) == list(inspect.signature(blocking).parameters), name
