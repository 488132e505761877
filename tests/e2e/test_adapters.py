"""Adapters through the whole stack, with the real model: added, used in shared steps, replaced, removed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from realm.cli.demo_adapters import is_answer, pirate_words
from realm_sdk import AdapterRefused, Client, GuestFailed, NotFound, SyncClient
from tests.e2e.conftest import Stack, running

GUESTS = Path(__file__).parents[2] / "guest_modules"
ADAPTERS = GUESTS / "adapters"
QUESTION = "What does a doctor do?"


@pytest.fixture(scope="module")
def stack(serve_home: Path, model_folder: Path) -> Iterator[Stack]:
    """In float32, because in bf16 another batch may give other tokens."""
    with running(serve_home, model_folder.name, "--dtype", "float32") as stack:
        yield stack


@pytest.fixture
async def acme(stack: Stack) -> AsyncIterator[Client]:
    async with Client(stack.url, stack.key) as client:
        yield client
        for adapter in await client.adapters.list():
            await client.adapters.remove(adapter.name)


@pytest.fixture
async def globex(stack: Stack) -> AsyncIterator[Client]:
    async with Client(stack.url, stack.other_key) as client:
        yield client
        for adapter in await client.adapters.list():
            await client.adapters.remove(adapter.name)


async def answer(client: Client, adapter: str | None = None, tokens: int = 64) -> str:
    chosen = {} if adapter is None else {"adapter": adapter}
    return (await client.generate(QUESTION, max_tokens=tokens, wait_timeout=None, **chosen)).text


async def test_each_tenants_adapter_in_shared_steps(acme: Client, globex: Client) -> None:
    alone = await answer(acme)
    added = await acme.adapters.add("mine", ADAPTERS / "json")
    assert (added.name, added.rank, added.parameters, added.own) == ("mine", 8, 921_600, True)
    # The same name is another adapter to another tenant.
    await globex.adapters.add("mine", ADAPTERS / "pirate")
    before = (await acme.health()).engine
    texts = await asyncio.gather(answer(acme, "mine"), answer(globex, "mine"), answer(acme), answer(globex))
    after = (await acme.health()).engine
    assert is_answer(texts[0]), texts
    assert pirate_words(texts[1]) > 1, texts
    assert texts[2] == texts[3] == alone
    assert after["shared_steps"] - before["shared_steps"] > 5
    shown = await acme.adapters.show("mine")
    assert (shown.state, shown.loads) == ("resident", 1)
    assert [adapter.name for adapter in await globex.adapters.list()] == ["mine"]


async def test_an_adapter_is_its_tenants_alone(acme: Client, globex: Client) -> None:
    await acme.adapters.add("secret", ADAPTERS / "json")
    for call in (globex.adapters.show("secret"), globex.adapters.remove("secret"), answer(globex, "secret", 1)):
        with pytest.raises(NotFound) as caught:
            await call
        assert caught.value.code == "adapter_not_found"
        assert "secret" not in caught.value.details["available"]
    assert await globex.adapters.list() == []
    # A guest that asks the engine for it is told the same as for a name that nobody has.
    await globex.push("ab_test", GUESTS / "ab_test" / "ab_test.wasm")
    told = []
    for name in ("secret", "nobody"):
        with pytest.raises(GuestFailed) as failed:
            await globex.run("ab_test", {"prompt": QUESTION, "a": name, "b": name}).text()
        assert failed.value.details["name"] == "not_found"
        told.append(failed.value.message.replace(name, "…"))
    assert told[0] == told[1]
    assert is_answer(await answer(acme, "secret"))


async def test_an_adapter_is_replaced_and_removed_under_a_run(acme: Client) -> None:
    await acme.adapters.add("voice", ADAPTERS / "json")
    whole = await answer(acme, "voice")
    text, pieces = "", 0
    async for piece in acme.stream(QUESTION, max_tokens=64, adapter="voice"):
        text += piece.text
        pieces += 1
        if pieces == 2:
            await acme.adapters.add("voice", ADAPTERS / "pirate")
            assert pirate_words(await answer(acme, "voice")) > 1
            await acme.adapters.remove("voice")
            with pytest.raises(NotFound):
                await answer(acme, "voice", 1)
    # What had the first one goes on with it to the end.
    assert text == whole and is_answer(text)


async def test_a_broken_adapter_is_refused(acme: Client, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((ADAPTERS / "json" / name).read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    # A bfloat16 that is not a number, as the last element of the last tensor.
    weights.write_bytes(content[:-2] + b"\xc0\x7f")
    with pytest.raises(AdapterRefused) as caught:
        await acme.adapters.add("broken", tmp_path)
    assert caught.value.code == "adapter_invalid"
    assert caught.value.details["tensor"].endswith(".weight")
    weights.write_bytes(content[:-2])
    with pytest.raises(AdapterRefused):
        await acme.adapters.add("broken", tmp_path)
    assert await acme.adapters.list() == []


def test_the_synchronous_client(stack: Stack) -> None:
    with SyncClient(stack.url, stack.key) as client:
        client.adapters.add("sync", ADAPTERS / "pirate")
        assert pirate_words(client.generate(QUESTION, max_tokens=48, adapter="sync").text) > 1
        client.adapters.remove("sync")
        assert client.adapters.list() == []
