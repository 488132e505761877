"""Adapters through the real gateway: what is taken, what is refused, and what it may take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fake_host import async_test, eventually, fake_host
from tests.gateway_adapters import CONFIG, add, begin, blob, files, names, send, untouched, weights

# --- adding --------------------------------------------------------------------------------------


@async_test
async def test_an_adapter_is_added_listed_and_removed(tmp_path: Path) -> None:
    content = weights()
    async with fake_host(tmp_path) as host, host.client() as client:
        assert (await client.data("adapters.list")) == {"adapters": []}
        begun = await begin(client, "legal", content, model="tiny")
        assert begun == {"upload": 1, "received": 0, "exists": False}
        # In pieces, one of which comes twice.
        await client.chunk(1, 0, content[:100])
        refused = await client.chunk(1, 0, content[:100])
        assert refused["type"] == "upload_error" and refused["error"]["details"]["received"] == 100
        await client.chunk(1, 100, content[100:])
        added = await client.data("adapters.commit", upload=1)
        assert added.pop("created") > 1e9
        assert added == {
            "name": "legal",
            "model": "tiny",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "version": 1,
            "rank": 2,
            "alpha": 4.0,
            "targets": ["q_proj"],
            "parameters": 64,
            "pinned": False,
            "shared": False,
            "own": True,
            "state": "registered",
            "sequences": 0,
            "loads": 0,
        }
        shown = await client.data("adapters.show", name="legal")
        assert shown.pop("created") > 1e9 and shown == added
        (listed,) = (await client.data("adapters.list"))["adapters"]
        assert listed.pop("created") > 1e9 and listed == added
        assert blob(host, content).read_bytes() == content and files(host) == [content]
        assert host.gateway.quotas.of("alice").uploads == 0
        limits = {limit["name"]: limit["used"] for limit in (await client.data("tenants.show", name="alice"))["limits"]}
        assert limits["stored_adapters"] == 1 and limits["stored_adapter_bytes"] == len(content)
        assert limits["pinned_adapters"] == 0
        assert await client.data("adapters.remove", name="legal") == {}
        assert await names(client) == []
        await eventually(lambda: files(host) == [])


@async_test
async def test_content_that_is_there_is_not_sent_again(tmp_path: Path) -> None:
    content = weights()
    async with fake_host(tmp_path) as host, host.client() as client:
        first = await add(client, "legal", content)
        begun = await begin(client, "terse", content, config={**CONFIG, "lora_alpha": 6})
        assert begun == {"upload": 2, "received": len(content), "exists": True}
        second = await client.data("adapters.commit", upload=2)
        assert (second["alpha"], second["sha256"], second["version"]) == (6.0, first["sha256"], 1)
        assert files(host) == [content]
        # It is checked again, for it may not fit what is said of it now.
        upload = await send(client, "x", content, config={**CONFIG, "r": 4})
        assert (await client.error("adapters.commit", upload=upload))["code"] == "adapter_invalid"
        assert files(host) == [content]
        # Removed meanwhile: there is nothing to commit.
        begun = await begin(client, "late", content)
        assert begun["exists"]
        await client.data("adapters.remove", name="legal")
        await client.data("adapters.remove", name="terse")
        error = await client.error("adapters.commit", upload=begun["upload"])
        assert error["code"] == "upload_not_found"
        # A wrong size beside a known hash is an upload like any other.
        await add(client, "legal", content)
        assert not (await begin(client, "y", content, size=5))["exists"]


@async_test
async def test_a_name_added_again_stands_for_the_new_one(tmp_path: Path) -> None:
    old, new = weights(1), weights(2)
    async with fake_host(tmp_path) as host, host.client() as client:
        await add(client, "legal", old)
        await client.data("adapters.pin", name="legal", pinned=True)
        again = await add(client, "legal", new)
        assert again["version"] == 2 and again["pinned"] and again["sha256"] == hashlib.sha256(new).hexdigest()
        assert await names(client) == ["legal"]
        await eventually(lambda: files(host) == [new])


@async_test
async def test_adapters_outlive_the_host(tmp_path: Path) -> None:
    content = weights()
    async with fake_host(tmp_path) as host, host.client() as client, host.client("admin") as admin:
        before = await add(client, "legal", content)
        await add(admin, "house", weights(2))
        await admin.data("adapters.share", name="house", shared=True)
        keys = host.keys
    (tmp_path / "incoming" / "left").write_bytes(b"half")
    async with fake_host(tmp_path, keys=keys) as host, host.client() as client:
        assert await client.data("adapters.show", name="legal") == before
        assert await names(client) == ["house", "legal"]
        assert set(files(host)) == {content, weights(2)}
        await client.data("generate", prompt="x", adapter="legal")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "params", "name"),
    [
        ("generate", {"prompt": "x", "adapter": ""}, "adapter"),
        ("generate", {"prompt": "x", "adapter": "../x"}, "adapter"),
        ("generate", {"prompt": "x", "adapter": 5}, "adapter"),
        ("adapters.begin", {"name": "a/b", "size": 1, "sha256": "0" * 64, "config": {}}, "name"),
        ("adapters.begin", {"name": "x", "size": -1, "sha256": "0" * 64, "config": {}}, "size"),
        ("adapters.begin", {"name": "x", "size": 2**60, "sha256": "0" * 64, "config": {}}, "size"),
        ("adapters.begin", {"name": "x", "size": 1, "sha256": "0" * 65, "config": {}}, "sha256"),
        ("adapters.begin", {"name": "x", "size": 1, "sha256": "0" * 64}, "config"),
        ("adapters.begin", {"name": "x", "size": 1, "sha256": "0" * 64, "config": {}, "model": 1}, "model"),
        ("adapters.commit", {"upload": -1}, "upload"),
        ("adapters.abort", {}, "upload"),
        ("adapters.show", {"name": "x" * 65}, "name"),
        ("adapters.pin", {"name": "x"}, "pinned"),
        ("adapters.pin", {"name": "x", "pinned": 1}, "pinned"),
        ("adapters.remove", {"name": "x\n"}, "name"),
    ],
)
@async_test
async def test_wrong_parameters_are_named(tmp_path: Path, function: str, params: Any, name: str) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        error = await client.error(function, **params)
        assert error["code"] == "invalid_params" and error["details"]["param"] == name
        assert not host.worker.starts
        await untouched(host)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "peft_type"),
        ({**CONFIG, "r": 0}, "r"),
        ({**CONFIG, "r": 257}, "r"),
        ({**CONFIG, "use_dora": True}, "use_dora"),
        ({**CONFIG, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({**CONFIG, "rank_pattern": {"(": 1}}, "rank_pattern"),
        ([CONFIG], "adapter_config.json"),
        ("text", "adapter_config.json"),
        (None, "adapter_config.json"),
        (5, "adapter_config.json"),
        ({**CONFIG, "task_type": "x" * (64 << 10)}, "adapter_config.json"),
    ],
)
@async_test
async def test_a_wrong_configuration_is_refused_before_anything_is_sent(
    tmp_path: Path, config: Any, field: str
) -> None:
    content = weights()
    async with fake_host(tmp_path) as host, host.client() as client:
        sha256 = hashlib.sha256(content).hexdigest()
        error = await client.error("adapters.begin", name="x", size=len(content), sha256=sha256, config=config)
        assert error["code"] == "adapter_invalid" and error["details"] == {"field": field}
        await untouched(host)


@pytest.mark.parametrize("depth", [500, 100_000])
@async_test
async def test_deeply_nested_configurations(tmp_path: Path, depth: int) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        config = '{"peft_type":"LORA","r":1,"lora_alpha":1,"auto_mapping":' + "[" * depth + "]" * depth + "}"
        params = f'{{"name":"x","size":1,"sha256":"{"0" * 64}","config":{config}}}'
        await client.send(f'{{"id":1,"function":"adapters.begin","params":{params}}}')
        reply = await client.receive()
        # Little nesting is nothing to refuse; too much ends nothing but the call.
        assert reply["status"] == "complete" if depth == 500 else reply["status"] == "error"
        if depth > 500:
            assert reply["error"]["code"] in ("malformed_message", "adapter_invalid")
        assert (await client.data("health"))["status"] == "healthy"


def changed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The weights with another header."""
    content = weights()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def renamed(header: dict[str, Any]) -> None:
    name = next(iter(header))
    header[name.replace("q_proj", "z_proj")] = header.pop(name)


def reshaped(header: dict[str, Any]) -> None:
    next(iter(header.values()))["shape"] = [8, 2]


def retyped(header: dict[str, Any]) -> None:
    next(iter(header.values()))["dtype"] = "I32"


@pytest.mark.parametrize(
    ("content", "config", "detail"),
    [
        (b"", CONFIG, None),
        (b"not safetensors at all", CONFIG, None),
        (b"\xff" * 64, CONFIG, None),
        (weights()[:-4], CONFIG, None),
        (weights() + b"more", CONFIG, None),
        (b"\x80\x04\x95 pickled", CONFIG, None),
        (changed(renamed), CONFIG, "z_proj"),
        (changed(reshaped), CONFIG, "q_proj.lora_A"),
        (changed(retyped), CONFIG, "q_proj.lora_A"),
        (weights(value=float("nan")), CONFIG, "lora_"),
        (weights(value=float("inf")), CONFIG, "lora_"),
        (weights(rank=4), CONFIG, "lora_"),
        (weights(), {**CONFIG, "r": 16}, "lora_"),
    ],
)
@async_test
async def test_wrong_weights_are_refused(tmp_path: Path, content: bytes, config: Any, detail: str | None) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        upload = await send(client, "legal", content, config=config)
        error = await client.error("adapters.commit", upload=upload)
        assert error["code"] == "adapter_invalid", error
        assert str(tmp_path) not in json.dumps(error)
        if detail is not None:
            assert detail in error["details"]["tensor"]
        await untouched(host)
        # The name is free, the upload is over, and the host goes on.
        assert (await client.error("adapters.commit", upload=upload))["code"] == "upload_not_found"
        await add(client, "legal", weights())


@async_test
async def test_what_came_must_be_what_was_announced(tmp_path: Path) -> None:
    content = weights()
    async with fake_host(tmp_path) as host, host.client() as client:
        upload = await send(client, "legal", content, sha256="0" * 64)
        error = await client.error("adapters.commit", upload=upload)
        assert error["code"] == "upload_hash_mismatch" and error["details"]["announced"] == "0" * 64
        begun = await begin(client, "legal", content)
        await client.chunk(begun["upload"], 0, content[:50])
        error = await client.error("adapters.commit", upload=begun["upload"])
        assert error["code"] == "upload_size" and error["details"]["received"] == 50
        refused = await client.chunk(begun["upload"], 50, content)
        assert refused["error"]["code"] == "upload_size"
        await client.data("adapters.abort", upload=begun["upload"])
        await untouched(host)


@async_test
async def test_a_refused_adapter_keeps_the_old_one(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        before = await add(client, "legal", weights())
        upload = await send(client, "legal", weights(value=float("nan")))
        await client.error("adapters.commit", upload=upload)
        assert await client.data("adapters.show", name="legal") == before
        assert len(host.engine.adapters) == 1 and files(host) == [weights()]


@async_test
async def test_an_upload_is_of_one_kind(tmp_path: Path) -> None:
    async with fake_host(tmp_path) as host, host.client() as client:
        adapter = await send(client, "legal", weights())
        module = (await client.begin("m", b"\0asm\x01\0\0\0"))["upload"]
        await client.chunk(module, 0, b"\0asm\x01\0\0\0")
        for function, upload, kind in (
            ("modules.commit", adapter, "adapter"),
            ("modules.abort", adapter, "adapter"),
            ("adapters.commit", module, "module"),
            ("adapters.abort", module, "module"),
        ):
            error = await client.error(function, upload=upload)
            assert error["code"] == "upload_not_found"
            assert error["details"] == {"upload": upload, "kind": kind} and f"{kind}s.commit" in error["message"]
        # Both go on.
        assert (await client.data("modules.commit", upload=module))["name"] == "m"
        assert (await client.data("adapters.commit", upload=adapter))["name"] == "legal"
        assert host.compiler.calls == 1


# --- limits --------------------------------------------------------------------------------------


@async_test
async def test_adapters_are_bounded_where_they_begin(tmp_path: Path) -> None:
    size = len(weights())
    defaults = {"adapter_bytes": size, "stored_adapters": 2, "stored_adapter_bytes": 2 * size}
    async with fake_host(tmp_path, defaults=defaults) as host, host.client() as client, host.client("bob") as bob:
        params = {"sha256": "0" * 64, "config": CONFIG}
        error = await client.error("adapters.begin", name="x", size=size + 1, **params)
        assert error["code"] == "adapter_too_large"
        assert error["details"] == {"name": "adapter_bytes", "limit": size, "used": size + 1, "unit": "bytes"}
        await untouched(host)
        await add(client, "one", weights(1))
        await add(client, "two", weights(2))
        error = await client.error("adapters.begin", name="three", size=1, **params)
        assert error["code"] == "limit_exceeded"
        assert error["details"] == {"name": "stored_adapters", "limit": 2, "used": 2, "unit": "adapters"}
        # One that replaces another takes its place.
        await add(client, "two", weights(3))
        await host.gateway.change_limits("alice", {"stored_adapters": 3})
        error = await client.error("adapters.begin", name="three", size=1, **params)
        details = {"name": "stored_adapter_bytes", "limit": 2 * size, "used": 2 * size, "unit": "bytes"}
        assert error["code"] == "limit_exceeded" and error["details"] == details
        await add(client, "three", weights(1))
        await add(bob, "one", weights(1))
        await client.data("adapters.remove", name="two")
        await add(client, "two", weights(4))


@async_test
async def test_adapters_are_bounded_where_they_are_kept(tmp_path: Path) -> None:
    """Uploads that began side by side fitted one by one."""
    async with fake_host(tmp_path, defaults={"stored_adapters": 1}) as host, host.client() as client:
        uploads = [await send(client, name, weights(seed)) for seed, name in enumerate("ab")]
        await client.data("adapters.commit", upload=uploads[0])
        error = await client.error("adapters.commit", upload=uploads[1])
        assert error["code"] == "limit_exceeded" and error["details"]["name"] == "stored_adapters"
        assert await names(client) == ["a"] and files(host) == [weights(0)]
        assert len(host.engine.adapters) == 1


@async_test
async def test_uploads_of_both_kinds_share_their_places(tmp_path: Path) -> None:
    async with fake_host(tmp_path, defaults={"uploads": 2}) as host, host.client() as client:
        await begin(client, "a", weights())
        await client.begin("m", b"x")
        sha256 = "0" * 64
        error = await client.error("adapters.begin", name="b", size=1, sha256=sha256, config=CONFIG)
        assert error["code"] == "rate_limited" and error["details"]["name"] == "uploads"
        assert host.gateway.quotas.of("alice").uploads == 2


@async_test
async def test_pins_are_bounded(tmp_path: Path) -> None:
    async with fake_host(tmp_path, defaults={"pinned_adapters": 1}) as host, host.client() as client:
        for seed, name in enumerate("ab"):
            await add(client, name, weights(seed))
        assert (await client.data("adapters.pin", name="a", pinned=True))["pinned"] is True
        error = await client.error("adapters.pin", name="b", pinned=True)
        assert error["code"] == "limit_exceeded"
        assert error["details"] == {"name": "pinned_adapters", "limit": 1, "used": 1, "unit": "adapters"}
        assert (await client.data("adapters.pin", name="a", pinned=False))["pinned"] is False
        assert (await client.data("adapters.pin", name="b", pinned=True))["pinned"] is True
        assert [file.pinned for file in host.engine.adapters if hasattr(file, "pinned")] == [
            False,
            False,
            True,
            False,
            True,
        ]
        assert (await client.error("adapters.pin", name="c", pinned=True))["code"] == "adapter_not_found"
