"""``client.adapters`` against a scripted server: PEFT folders, and each function."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realm_sdk import (
    Adapter,
    AdapterRefused,
    Adapters,
    Client,
    LimitExceeded,
    NotFound,
    PermissionDenied,
    ProtocolError,
    SyncAdapters,
    SyncClient,
)
from realm_sdk.adapters import CONFIG_FILE, MAX_CONFIG, PICKLE_FILE, WEIGHTS_FILE
from tests.unit.sdk_adapters import DATA, folder
from tests.unit.sdk_fake_server import Peer, fake_server, idle

# --- folders that are none -----------------------------------------------------------------------


def _no_folder(path: Path) -> None:
    (path / CONFIG_FILE).unlink()
    (path / WEIGHTS_FILE).unlink()
    path.rmdir()


def _a_file(path: Path) -> None:
    _no_folder(path)
    path.write_bytes(b"")


def _no_config(path: Path) -> None:
    (path / CONFIG_FILE).unlink()


def _one_further_down(path: Path) -> None:
    _no_config(path)
    for number in range(5):
        folder(path / f"checkpoint-{number}")


def _in_the_only_subfolder(path: Path) -> None:
    _no_config(path)
    folder(path / "default")


def _no_weights(path: Path) -> None:
    (path / WEIGHTS_FILE).unlink()


def _pickle(path: Path) -> None:
    (path / WEIGHTS_FILE).rename(path / PICKLE_FILE)


def _weights_are_a_folder(path: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).mkdir()


def _config_is_a_folder(path: Path) -> None:
    (path / CONFIG_FILE).unlink()
    (path / CONFIG_FILE).mkdir()


def _config(raw: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / CONFIG_FILE).write_bytes(raw)

    return write


BAD_FOLDERS: list[tuple[Callable[[Path], None], str, str]] = [
    (_no_folder, "a", "is no folder"),
    (_a_file, "a", "give the folder that it is in"),
    (_no_config, CONFIG_FILE, f"has no {CONFIG_FILE}: an adapter is a folder as PEFT's save_pretrained writes it$"),
    (_one_further_down, CONFIG_FILE, "in it, checkpoint-0, checkpoint-1, checkpoint-2, … have one$"),
    (_in_the_only_subfolder, CONFIG_FILE, "in it, default has one$"),
    (_no_weights, WEIGHTS_FILE, f"has no {WEIGHTS_FILE}: an adapter is"),
    (_pickle, PICKLE_FILE, "safe_serialization=True"),
    (_weights_are_a_folder, WEIGHTS_FILE, "cannot be read: Is a directory"),
    (_config_is_a_folder, CONFIG_FILE, "cannot be read: Is a directory"),
    (_config(b" " * (MAX_CONFIG + 1)), CONFIG_FILE, "has more than 65,536 bytes"),
    (_config(b""), CONFIG_FILE, "no JSON object"),
    (_config(b"{"), CONFIG_FILE, "no JSON object"),
    (_config(b"[1]"), CONFIG_FILE, "no JSON object"),
    (_config(b'{"r": NaN}'), CONFIG_FILE, "no JSON object"),
    (_config(b'{"r": "\xff"}'), CONFIG_FILE, "no JSON object"),
    (_config(b"[" * MAX_CONFIG), CONFIG_FILE, "no JSON object"),
    (_config(b'{"r":' * 8000), CONFIG_FILE, "no JSON object"),
]


@pytest.mark.parametrize(("spoil", "file", "text"), BAD_FOLDERS, ids=range(len(BAD_FOLDERS)))
async def test_a_folder_that_is_no_adapter_sends_nothing(
    tmp_path: Path, spoil: Callable[[Path], None], file: str, text: str
) -> None:
    path = folder(tmp_path / "a")
    spoil(path)

    async def script(peer: Peer) -> None:
        # The first that the server hears is what comes after the refusal.
        await peer.complete(await peer.expect("adapters.list"), adapters=[])
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(AdapterRefused, match=text) as caught:
            await client.adapters.add("legal", path)
        assert await client.adapters.list() == []
    assert (caught.value.code, caught.value.details) == ("adapter_invalid", {"file": file})
    assert str(path) in caught.value.message


async def test_the_configuration_is_sent_as_it_is(tmp_path: Path) -> None:
    """The server refuses what readers may take in two ways; so it must see it."""
    raw = '{ "r": 1,\n\t"r": 2, "note": "\\u00e9 é", "big": 123456789012345678901234567890, "small": 1e-400 }\n'

    async def script(peer: Peer) -> None:
        frame = await peer.socket.recv()
        assert isinstance(frame, str) and f'"config":{raw}' in frame
        call = json.loads(frame)
        assert call["params"]["size"] == 3
        await peer.fail(call, "adapter_invalid", details={"field": "r"})
        await idle(peer)

    path = folder(tmp_path / "a", config=raw.encode())
    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(AdapterRefused):
            await client.adapters.add("legal", path)


async def test_the_largest_configuration_is_sent(tmp_path: Path) -> None:
    config = {"note": "x" * (MAX_CONFIG - 12)}
    path = folder(tmp_path / "a", config=config)
    (path / CONFIG_FILE).write_text(json.dumps(config))
    assert (path / CONFIG_FILE).stat().st_size == MAX_CONFIG

    async def script(peer: Peer) -> None:
        params, _ = await peer.take_upload(3, kind="adapters")
        assert params["config"] == config
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        await client.adapters.add("legal", path)


# --- the other functions -------------------------------------------------------------------------


async def use_all(client: Client) -> None:
    adapters = client.adapters
    mine, given = await adapters.list()
    assert mine == Adapter(**DATA) and (given.own, given.shared) == (False, True)
    # While the engine restarts, nobody knows.
    assert (given.state, given.sequences, given.loads, given.error) == (None, None, None, None)
    failed = await adapters.show("legal")
    assert (failed.state, failed.error) == ("failed", "the file is gone")
    assert (await adapters.pin("legal")).pinned
    assert not (await adapters.unpin("legal")).pinned
    assert (await adapters.share("legal")).shared
    assert not (await adapters.unshare("legal")).shared
    await adapters.remove("legal")


ALL_CALLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "adapters.list",
        {},
        # Fields of a newer server are ignored; those that an answer lacks have defaults.
        {"adapters": [DATA | {"warmth": 3}, {"name": "json", "own": False, "shared": True}], "more": True},
    ),
    ("adapters.show", {"name": "legal"}, DATA | {"state": "failed", "error": "the file is gone"}),
    ("adapters.pin", {"name": "legal", "pinned": True}, DATA),
    ("adapters.pin", {"name": "legal", "pinned": False}, DATA | {"pinned": False}),
    ("adapters.share", {"name": "legal", "shared": True}, DATA | {"shared": True}),
    ("adapters.share", {"name": "legal", "shared": False}, DATA),
    ("adapters.remove", {"name": "legal"}, {}),
]


async def all_calls(peer: Peer) -> None:
    for function, params, data in ALL_CALLS:
        call = await peer.expect(function)
        assert call["params"] == params
        await peer.complete(call, **data)
    await idle(peer)


async def test_each_function_sends_what_the_protocol_says() -> None:
    async with fake_server(all_calls) as server, Client(server.url, "k") as client:
        await use_all(client)


@pytest.mark.parametrize("code", ["adapter_not_found", "limit_exceeded", "forbidden"])
async def test_errors_of_each_function_keep_their_class_and_details(code: str) -> None:
    kind = {"adapter_not_found": NotFound, "limit_exceeded": LimitExceeded, "forbidden": PermissionDenied}[code]

    async def script(peer: Peer) -> None:
        for function in ("show", "pin", "pin", "share", "share", "remove"):
            await peer.fail(await peer.expect(f"adapters.{function}"), code, details={"available": ["json"]})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        adapters = client.adapters
        for method in (
            *(adapters.show, adapters.pin, adapters.unpin, adapters.share, adapters.unshare, adapters.remove),
        ):
            with pytest.raises(kind) as caught:
                await method("legal")
            assert (caught.value.code, caught.value.details) == (code, {"available": ["json"]})


async def test_an_answer_of_the_wrong_shape(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.complete(await peer.expect("adapters.list"), adapters=[{"rank": 3}])
        await peer.complete(await peer.expect("adapters.show"), **DATA | {"rank": "sixteen"})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        with pytest.raises(ProtocolError, match=r"adapters\.list"):
            await client.adapters.list()
        with pytest.raises(ProtocolError, match=r"adapters\.show"):
            await client.adapters.show("legal")


async def test_generate_and_stream_name_the_adapter() -> None:
    async def script(peer: Peer) -> None:
        call = await peer.expect("generate")
        assert call["params"] == {"prompt": "Hi", "stream": False, "adapter": "legal", "seed": 1}
        await peer.complete(call, text="whole")
        call = await peer.expect("generate")
        assert call["params"] == {"prompt": "Hi", "stream": True, "adapter": "legal"}
        await peer.stream(call, 0, text="a", index=0, is_final=True)
        await peer.complete(call, text="a")
        call = await peer.expect("generate")
        await peer.fail(call, "adapter_not_found", "no adapter legal", details={"available": ["json"]})
        await idle(peer)

    async with fake_server(script) as server, Client(server.url, "k") as client:
        assert (await client.generate("Hi", adapter="legal", seed=1)).text == "whole"
        assert await client.stream("Hi", adapter="legal").text() == "a"
        with pytest.raises(NotFound) as caught:
            await client.generate("Hi", adapter="legal")
        assert caught.value.details == {"available": ["json"]}


# --- without async -------------------------------------------------------------------------------


async def test_the_blocking_adapters_do_the_same(tmp_path: Path) -> None:
    path = folder(tmp_path / "a")

    async def script(peer: Peer) -> None:
        params, data = await peer.take_upload(3, kind="adapters")
        assert (params["model"], data) == ("tiny", b"abc")
        await peer.complete(await peer.expect("adapters.commit"), **DATA)
        await peer.complete(await peer.expect("generate"), text="whole")
        await all_calls(peer)

    def use(url: str) -> None:
        seen: list[tuple[int, int]] = []
        with SyncClient(url, "k") as client:
            with pytest.raises(AdapterRefused):
                client.adapters.add("legal", tmp_path / "none")
            added = client.adapters.add("legal", path, model="tiny", progress=lambda *counts: seen.append(counts))
            assert added == Adapter(**DATA) and seen[-1] == (3, 3)
            assert client.generate("Hi", adapter="legal").text == "whole"
            adapters = client.adapters
            assert [adapter.name for adapter in adapters.list()] == ["legal", "json"]
            assert adapters.show("legal").state == "failed"
            assert adapters.pin("legal").pinned and not adapters.unpin("legal").pinned
            assert adapters.share("legal").shared and not adapters.unshare("legal").shared
            adapters.remove("legal")
        with pytest.raises(RuntimeError, match="not open"):
            _ = client.adapters

    async with fake_server(script) as server:
        await asyncio.to_thread(use, server.url)


def test_both_have_the_same_methods_and_parameters() -> None:
    names = {name for name in dir(Adapters) if not name.startswith("_")}
    assert names == {"add", "list", "show", "pin", "unpin", "share", "unshare", "remove"}
    assert names == {name for name in dir(SyncAdapters) if not name.startswith("_")}
    for name in names:
        assert (
            inspect.signature(getattr(Adapters, name)).parameters
            == inspect.signature(getattr(SyncAdapters, name)).parameters
        ), name
