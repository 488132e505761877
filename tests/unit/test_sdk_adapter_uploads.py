"""Uploads of ``client.adapters.add`` against a scripted server: chunks, window, resumption, refusal, loss."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from realm_sdk import (
    Adapter,
    AdapterRefused,
    Client,
    ConnectionLost,
    LimitExceeded,
    ModuleRefused,
    NotFound,
    ProtocolError,
    RealmError,
    WaitTimeout,
)
from realm_sdk.adapters import WEIGHTS_FILE
from realm_sdk.upload import PIECE
from tests.unit.sdk_adapters import CONFIG, DATA, folder
from tests.unit.sdk_fake_server import CHUNK, Peer, fake_server, idle

# --- adding --------------------------------------------------------------------------------------


async def test_add_sends_configuration_and_weights_and_reports_progress(tmp_path: Path) -> None:
    # More than one piece of the file, and an odd end.
    weights = bytes(range(256)) * ((PIECE + 3 * CHUNK) // 256) + b"end"
    path = folder(tmp_path / "a", weights)

    async def script(peer: Peer) -> None:
        params, data = await peer.take_upload(len(weights), kind="adapters")
        assert data == weights
        assert params == {
            "name": "legal",
            "size": len(weights),
            "sha256": hashlib.sha256(weights).hexdigest(),
            "config": CONFIG,
            "model": "tiny",
        }
        commit = await peer.expect("adapters.commit")
        assert commit["params"] == {"upload": 4}
        await peer.complete(commit, **DATA)
        await idle(peer)

    seen: list[tuple[int, int]] = []
    async with fake_server(script) as server, Client(server.url, "k") as client:
        adapter = await client.adapters.add("legal", path, model="tiny", progress=lambda *counts: seen.append(counts))
    assert adapter == Adapter(**DATA)
    assert seen[-1] == (len(weights), len(weights))
    assert seen == sorted(seen) and len(seen) > 8


async def test_add_without_a_model_names_none_and_goes_on_from_what_the_server_has(tmp_path: Path) -> None:
    weights = b"0123456789" * 60_000

    async def script(peer: Peer) -> None:
        params, data = await peer.take_upload(len(weights), received=400_001, kind="adapters")
        assert data == weights[400_001:]
        assert "model" not in params
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.adapters.add("legal", str(folder(tmp_path / "a", weights)))


async def test_add_of_known_weights_sends_nothing(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        begin = await peer.expect("adapters.begin")
        await peer.complete(begin, upload=1, received=0, exists=True)
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    seen: list[tuple[int, int]] = []
    async with fake_server(script) as server, Client(server.url, "k") as client:
        path = folder(tmp_path / "a")
        assert (await client.adapters.add("legal", path, progress=lambda *counts: seen.append(counts))).version == 2
    assert seen == [(3, 3)]


async def test_add_keeps_at_most_a_window_in_flight(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", bytes(20 * CHUNK))

    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=0, exists=False)
        for _ in range(8):
            await peer.hear_chunk()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(peer.socket.recv(), 0.2)
        await peer.say(type="upload_ack", upload=4, received=8 * CHUNK)
        for number in range(9, 21):
            await peer.hear_chunk()
            await peer.say(type="upload_ack", upload=4, received=number * CHUNK)
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.adapters.add("legal", path)


async def test_other_calls_go_on_beside_an_upload(tmp_path: Path) -> None:
    sent = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=0, exists=False)
        await peer.hear_chunk()
        sent.set()
        await peer.complete(await peer.expect("adapters.list"), adapters=[])
        await peer.say(type="upload_ack", upload=4, received=3)
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        adding = asyncio.create_task(client.adapters.add("legal", folder(tmp_path / "a")))
        await asyncio.wait_for(sent.wait(), 20)
        assert await client.adapters.list() == []
        assert (await adding).name == "legal"


# --- uploads that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("adapter_invalid", {"field": "use_dora"}, AdapterRefused),
        ("adapter_too_large", {"name": "adapter_bytes", "limit": 2, "used": 3, "unit": "bytes"}, AdapterRefused),
        ("limit_exceeded", {"name": "stored_adapters", "limit": 1, "used": 1, "unit": "adapters"}, LimitExceeded),
        ("model_not_found", {"available": ["tiny"]}, NotFound),
    ],
)
async def test_a_refusal_at_the_beginning_sends_no_byte(
    tmp_path: Path, code: str, details: dict[str, Any], kind: type[RealmError]
) -> None:
    async def script(peer: Peer) -> None:
        await peer.fail(await peer.expect("adapters.begin"), code, details=details)
        await peer.complete(await peer.expect("adapters.list"), adapters=[])
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(RealmError) as caught:
            await client.adapters.add("legal", folder(tmp_path / "a"), model="other")
        assert await client.adapters.list() == []
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.details) == (code, details)


async def test_a_refusal_of_the_whole_aborts_the_upload(tmp_path: Path) -> None:
    details = {"tensor": "base_model.model.lm_head.lora_A.weight"}

    async def script(peer: Peer) -> None:
        await peer.take_upload(3, kind="adapters")
        await peer.fail(await peer.expect("adapters.commit"), "adapter_invalid", "no such module", details=details)
        assert (await peer.expect("adapters.abort"))["params"] == {"upload": 4}
        done.set()
        await idle(peer)

    done = asyncio.Event()
    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(AdapterRefused, match="no such module") as caught:
            await client.adapters.add("legal", folder(tmp_path / "a"))
        await asyncio.wait_for(done.wait(), 10)
    assert caught.value.details == details


async def test_a_refused_chunk_aborts_the_upload(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=0, exists=False)
        await peer.hear_chunk()
        await peer.say(type="upload_error", upload=4, error={"code": "upload_size", "message": "too much"})
        assert (await peer.expect("adapters.abort"))["params"] == {"upload": 4}
        done.set()
        await idle(peer)

    done = asyncio.Event()
    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ModuleRefused, match="upload_size"):
            await client.adapters.add("legal", folder(tmp_path / "a"))
        await asyncio.wait_for(done.wait(), 10)


async def test_a_cancelled_task_aborts_the_upload(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=0, exists=False)
        await peer.hear_chunk()
        adding.cancel()
        assert (await peer.expect("adapters.abort"))["params"] == {"upload": 4}
        done.set()
        await idle(peer)

    done = asyncio.Event()
    async with fake_server(script) as server, Client(server.url, "k") as client:
        adding = asyncio.create_task(client.adapters.add("legal", folder(tmp_path / "a")))
        with pytest.raises(asyncio.CancelledError):
            await adding
        await asyncio.wait_for(done.wait(), 10)


async def test_a_file_that_shrinks_while_it_is_sent(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", bytes(PIECE + CHUNK))

    async def script(peer: Peer) -> None:
        begin = await peer.expect("adapters.begin")
        # It was hashed; nothing of it has been read to be sent.
        with (path / WEIGHTS_FILE).open("r+b") as file:
            file.truncate(PIECE)
        await peer.complete(begin, upload=4, received=0, exists=False)
        for number in range(1, 9):
            await peer.hear_chunk()
            await peer.say(type="upload_ack", upload=4, received=number * CHUNK)
        assert (await peer.expect("adapters.abort"))["params"] == {"upload": 4}
        done.set()
        await idle(peer)

    done = asyncio.Event()
    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ModuleRefused, match="was changed") as caught:
            await client.adapters.add("legal", path)
        await asyncio.wait_for(done.wait(), 10)
    assert caught.value.code == "upload_size"


async def test_a_file_that_is_replaced_while_it_is_sent(tmp_path: Path) -> None:
    """What was hashed is what is sent."""
    weights = bytes(range(256)) * 4096
    path = folder(tmp_path / "a", weights)

    async def script(peer: Peer) -> None:
        begin = await peer.expect("adapters.begin")
        (tmp_path / "other").write_bytes(b"z" * len(weights))
        (tmp_path / "other").rename(path / WEIGHTS_FILE)
        await peer.complete(begin, upload=4, received=0, exists=False)
        data = b""
        while len(data) < len(weights):
            data += (await peer.hear_chunk())[2]
            await peer.say(type="upload_ack", upload=4, received=len(data))
        assert hashlib.sha256(data).hexdigest() == begin["params"]["sha256"]
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.adapters.add("legal", path)


async def test_a_server_that_acknowledges_nothing(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=0, exists=False)
        await peer.hear_chunk()
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k", wait_timeout=1.0) as client:
        with pytest.raises(WaitTimeout, match="acknowledgement"):
            await client.adapters.add("legal", folder(tmp_path / "a"))


async def test_only_the_check_of_the_whole_may_take_as_long_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: dict[str, float | None] = {}
    call_within = Client.call_within

    async def spied(self: Client, wait: float | None, function: str, *rest: Any) -> Any:
        waits[function] = wait
        return await call_within(self, wait, function, *rest)

    async def script(peer: Peer) -> None:
        await peer.take_upload(3, kind="adapters")
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    monkeypatch.setattr(Client, "call_within", spied)
    async with fake_server(script) as server, Client(server.url, "k", wait_timeout=77.0) as client:
        await client.adapters.add("legal", folder(tmp_path / "a"))
    assert waits == {"adapters.begin": 77.0, "adapters.commit": None}


async def test_a_connection_lost_during_an_upload(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=0, exists=False)
        await peer.hear_chunk()
        peer.socket.transport.abort()

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ConnectionLost):
            await client.adapters.add("legal", folder(tmp_path / "a", bytes(3 * CHUNK)))


async def test_a_server_that_claims_more_than_there_is(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.begin"), upload=4, received=99, exists=False)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ProtocolError, match="99 of 3"):
            await client.adapters.add("legal", folder(tmp_path / "a"))
