"""Runs and generations of the asynchronous client against a scripted server: events, cancellation, back-pressure."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import realm_sdk.calls
from realm_sdk import (
    Client,
    Finished,
    Log,
    Output,
    RealmError,
    Started,
    Waiting,
    WaitTimeout,
)
from tests.unit.sdk_fake_server import Peer, fake_server, idle

USAGE = {"fuel": 5, "new_tokens": 2, "prompt_tokens": 3}


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


async def test_a_run_that_waits_says_so_and_has_its_id() -> None:
    async def script(peer: Peer) -> None:
        run = await peer.expect("run")
        await peer.stream(run, 0, kind="waiting", run="r5")
        send = await peer.expect("send")
        assert send["params"] == {"run": "r5", "data": "early"}
        await peer.complete(send)
        await peer.stream(run, 1, kind="started", run="r5")
        await peer.complete(run, run="r5", code=0, usage=USAGE | {"throttled_seconds": 1.5})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client, client.run("chat") as run:
        assert run.id == "r5"
        await run.send("early")
        events = [event async for event in run]
    assert events[:2] == [Waiting("r5"), Started("r5")]
    assert isinstance(events[2], Finished) and events[2].usage.throttled_seconds == 1.5


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
