"""The client and the command line with the real gateway, registry and checks; only engine and workers are fake."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from realm.cli.terminal import size
from realm.messages import AdapterFile, AdapterGone, AdapterState
from realm_sdk import Adapter, AdapterRefused, Client, LimitExceeded, NotFound, PermissionDenied
from realm_sdk.adapters import CONFIG_FILE, WEIGHTS_FILE
from tests.fake_host import FakeHost, fake_host
from tests.gateway_adapters import CONFIG, weights

ADDED = "legal version 1 for tiny: rank 2 on q, "


@pytest.fixture(name="host")
async def host_fixture(tmp_path: Path) -> AsyncIterator[FakeHost]:
    async with fake_host(tmp_path / "home") as host:
        yield host


def folder(path: Path, data: bytes, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_text(json.dumps(CONFIG | config, indent=2))
    (path / WEIGHTS_FILE).write_bytes(data)
    return path


def told(host: FakeHost) -> list[tuple[str, str]]:
    """Of what the engine heard, the kind and the name."""
    return [(type(message).__name__, message.name) for message in host.engine.adapters]


async def test_the_life_of_an_adapter(host: FakeHost, tmp_path: Path) -> None:
    path, seen = folder(tmp_path / "a", weights(1)), list[tuple[int, int]]()
    total = len(weights(1))
    async with Client(host.url, host.keys["alice"]) as client:
        assert await client.adapters.list() == []
        adapter = await client.adapters.add("legal", path, model="tiny", progress=lambda *counts: seen.append(counts))
        assert (adapter.name, adapter.model, adapter.version, adapter.size) == ("legal", "tiny", 1, total)
        assert (adapter.rank, adapter.alpha, adapter.targets, adapter.parameters) == (2, 4.0, ["q_proj"], 64)
        assert (adapter.own, adapter.pinned, adapter.shared, adapter.state) == (True, False, False, "registered")
        assert seen[-1] == (total, total)
        # The configuration came as it is in the folder.
        assert isinstance(file := host.engine.adapters[0], AdapterFile)
        assert file.config == (path / CONFIG_FILE).read_bytes()
        assert await asyncio.to_thread(Path(file.path).read_bytes) == weights(1)

        assert (await client.adapters.pin("legal")).pinned
        assert not (await client.adapters.unpin("legal")).pinned
        host.engine.states["alice"] = [AdapterState("legal", "failed", 3, 2, "the disk is gone")]
        shown = await client.adapters.show("legal")
        assert (shown.state, shown.sequences, shown.loads, shown.error) == ("failed", 3, 2, "the disk is gone")
        assert await client.adapters.list() == [shown]

        # The same weights are not sent again; others under the same name are the next version.
        seen.clear()
        await client.adapters.add("again", path, progress=lambda *counts: seen.append(counts))
        assert seen == [(total, total)]
        folder(tmp_path / "a", weights(2))
        assert (await client.adapters.add("legal", path)).version == 2

        await client.adapters.remove("legal")
        assert told(host)[-1] == (AdapterGone.__name__, "legal")
        with pytest.raises(NotFound) as caught:
            await client.adapters.show("legal")
        assert (caught.value.code, caught.value.details["available"]) == ("adapter_not_found", ["again"])
        with pytest.raises(NotFound) as caught:
            await client.generate("Hi", adapter="legal")
        assert caught.value.code == "adapter_not_found"


async def test_every_field_that_the_gateway_sends_is_read(host: FakeHost, tmp_path: Path) -> None:
    host.engine.states["alice"] = [AdapterState("legal", "failed", 3, 2, "the disk is gone")]
    async with Client(host.url, host.keys["alice"]) as client, host.client("alice") as raw:
        await client.adapters.add("legal", folder(tmp_path / "a", weights()))
        data = await raw.data("adapters.show", name="legal")
        assert set(data) == set(Adapter.__struct_fields__)
        assert msgspec.to_builtins(await client.adapters.show("legal")) == data


async def test_sharing(host: FakeHost, tmp_path: Path) -> None:
    path = folder(tmp_path / "a", weights())
    async with Client(host.url, host.keys["admin"]) as admin, Client(host.url, host.keys["bob"]) as bob:
        await admin.adapters.add("house", path)
        assert await bob.adapters.list() == []
        assert (await admin.adapters.share("house")).shared
        (given,) = await bob.adapters.list()
        assert (given.name, given.own, given.shared, given.state) == ("house", False, True, "registered")
        assert (given.sequences, given.loads) == (None, None)
        with pytest.raises(PermissionDenied):
            await bob.adapters.remove("house")
        with pytest.raises(PermissionDenied):
            await bob.adapters.share("house")
        assert not (await admin.adapters.unshare("house")).shared
        assert await bob.adapters.list() == []
        with pytest.raises(NotFound):
            await bob.adapters.show("house")


async def test_refusals_name_what_is_wrong(host: FakeHost, tmp_path: Path) -> None:
    path = tmp_path / "a"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    async with Client(host.url, host.keys["alice"]) as client:
        with pytest.raises(AdapterRefused) as refused:
            await client.adapters.add("legal", folder(path, weights(), use_dora=True))
        assert (refused.value.code, refused.value.details) == ("adapter_invalid", {"field": "use_dora"})
        with pytest.raises(AdapterRefused) as refused:
            await client.adapters.add("legal", folder(path, weights(value=float("nan"))))
        assert (refused.value.code, refused.value.details) == ("adapter_invalid", {"tensor": name})
        # A key that is there twice, which a client that read and wrote it again would hide.
        folder(path, weights())
        (path / CONFIG_FILE).write_text(json.dumps(CONFIG)[:-1] + ', "r": 2}')
        with pytest.raises(AdapterRefused, match="twice"):
            await client.adapters.add("legal", path)
        with pytest.raises(NotFound) as missing:
            await client.adapters.add("legal", folder(path, weights()), model="large")
        assert missing.value.code == "model_not_found"
        assert await client.adapters.list() == []
        async with Client(host.url, host.keys["admin"]) as admin:
            await admin.set_limits("alice", {"adapter_bytes": 10})
            with pytest.raises(AdapterRefused) as refused:
                await client.adapters.add("legal", path)
            assert (refused.value.code, refused.value.details["name"]) == ("adapter_too_large", "adapter_bytes")
            await admin.set_limits("alice", {"adapter_bytes": None, "stored_adapters": 0})
            with pytest.raises(LimitExceeded) as limited:
                await client.adapters.add("legal", path)
            assert (limited.value.code, limited.value.details["name"]) == ("limit_exceeded", "stored_adapters")
            await admin.set_limits("alice", {"stored_adapters": None, "pinned_adapters": 0})
            await client.adapters.add("legal", path)
            with pytest.raises(LimitExceeded) as limited:
                await client.adapters.pin("legal")
            assert (limited.value.code, limited.value.details["name"]) == ("limit_exceeded", "pinned_adapters")
            used = await client.show_tenant(client.tenant)
            assert (used["stored_adapters"].used, used["stored_adapter_bytes"].used) == (1, len(weights()))
    assert told(host) == [("AdapterFile", "legal")]


async def test_the_command_line(host: FakeHost, tmp_path: Path) -> None:
    """As its users start it, in a process of its own."""

    async def realm(*arguments: str, tenant: str = "alice") -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "realm.cli", *arguments, "--url", host.url, "--key", host.keys[tenant]),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        written, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, written.decode(), errors.decode()

    path = folder(tmp_path / "a", weights())
    code, written, errors = await realm("adapters", "add", str(path), "--name", "legal", "--model", "tiny")
    assert (code, errors) == (0, "") and written.startswith(ADDED)
    assert await realm("adapters", "pin", "legal") == (0, "pinned legal\n", "")
    code, written, _ = await realm("adapters", "list")
    assert written.splitlines()[1].split() == [
        "legal",
        "2",
        "q",
        *size(len(weights())).split(),
        "tiny",
        "registered",
        "yes",
        "-",
    ]
    code, written, errors = await realm("adapters", "show", "legal", tenant="bob")
    assert (code, written) == (1, "") and errors.startswith("adapter_not_found: ")
    code, written, errors = await realm("adapters", "share", "legal")
    assert (code, written) == (1, "") and errors.startswith("forbidden: ")
    assert await realm("adapters", "remove", "legal") == (0, "removed legal\n", "")
