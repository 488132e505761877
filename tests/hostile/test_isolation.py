"""What tenants can see of each other: nothing, neither by asking, nor by guessing, nor by time."""

from __future__ import annotations

import asyncio
import uuid

import wasmtime

from realm_sdk import Finished, Log, NotFound, Output, RealmError
from tests.hostile.performing import content
from tests.hostile.stage import NEW_TOKENS, PROMPT, Stage, until_quiet
from tests.wat import guest

SECRET = "the-otter-keeps-its-ledger-in-the-boathouse"
"""In the neighbour's store, input and log; looked for in everything that others see."""


def test_stores_and_saved_sequences_of_others(stage: Stage, outcomes: dict[str, str]) -> None:
    async def attack() -> list[int]:
        await stage.add_tenant("keeper")
        await stage.add_tenant("thief", {})
        results = []
        async with stage.client("keeper") as keeper, stage.client("thief") as thief:
            await keeper.push("keep", content("keep_secret"))
            await keeper.push("steal", content("steal_from_the_store"))
            await thief.push("steal", content("steal_from_the_store"))
            for client, module in ((keeper, "keep"), (thief, "steal"), (keeper, "steal")):
                async for event in client.run(module, SECRET):
                    if isinstance(event, Finished):
                        results.append(event.code)
        stage.savers.add("keeper")
        await until_quiet(stage)
        return results

    kept, stolen, own = asyncio.run(attack())
    outcomes["stores_and_saved_sequences_of_others"] = f"found {stolen} of 2"
    # The same guest finds both in its own tenant: so it looks in the right place.
    assert (kept, stolen, own) == (0, 0, 2)


def test_runs_of_others_by_guessing_their_ids(stage: Stage, outcomes: dict[str, str]) -> None:
    async def attack() -> int:
        await stage.add_tenant("thief", {})
        refused = 0
        async with stage.client("canary") as canary, stage.client("thief") as thief:
            pieces: list[str] = []
            async with canary.stream(PROMPT, max_tokens=NEW_TOKENS, temperature=0) as stream:
                listed = (await canary.ps()).runs
                while not listed:
                    listed = (await canary.ps()).runs
                number = int(listed[0].run[1:])

                async def guess(run: str) -> int:
                    assert not await thief.cancel(run)
                    for asked in (thief.send(run, "stop"), thief.logs(run)):
                        try:
                            await asked
                        except NotFound as error:
                            assert error.code == "run_not_found"
                    return 3

                for run in (f"r{n}" for n in range(max(1, number - 20), number + 4)):
                    refused += await guess(run)
                seen = await thief.ps(all=True)
                assert not {run.tenant for run in seen.runs} - {"thief"}
                assert seen.engine["tenants"].keys() <= {"thief"}
                assert (await thief.health()).engine["tenants"].keys() <= {"thief"}
                assert listed[0].run not in [run.run for run in seen.runs]
                pieces = [piece.text async for piece in stream]
            assert pieces == stage.reference
            logs = await canary.logs(listed[0].run)
            assert not logs
        await until_quiet(stage)
        return refused

    outcomes["runs_of_others_by_guessing_their_ids"] = f"{asyncio.run(attack())} guesses refused"


def test_logs_by_id_of_runs_that_have_ended(stage: Stage) -> None:
    text = guest(
        f"(call $log (i32.const 1) (i32.const 0) (i32.const {len(SECRET)}))",
        "log",
        extra=f'(data (i32.const 0) "{SECRET}")',
    )

    async def attack() -> None:
        await stage.add_tenant("keeper")
        await stage.add_tenant("thief", {})
        async with stage.client("keeper") as keeper, stage.client("thief") as thief:
            await keeper.push("logger", bytes(wasmtime.wat2wasm(text)))
            run = keeper.run("logger")
            assert [event.text async for event in run if isinstance(event, Log)] == [SECRET]
            assert run.id is not None
            assert [line.text for line in await keeper.logs(run.id)] == [SECRET]
            try:
                lines = await thief.logs(run.id)
            except NotFound:
                lines = []
            assert not lines

    asyncio.run(attack())


def test_an_error_is_told_to_its_own_tenant_alone(stage: Stage) -> None:
    """A guest that dies with a text in its report, beside a neighbour that logs and emits."""
    marker = f"doom-{uuid.uuid4().hex}"
    dying = guest(
        f"(drop (call $log (i32.const 3) (i32.const 0) (i32.const {len(marker)}))) (unreachable)",
        "log",
        extra=f'(data (i32.const 0) "{marker}")',
    )

    async def attack() -> None:
        await stage.add_tenant("thief", {})
        await stage.add_tenant("keeper")
        async with stage.client("canary") as canary, stage.client("thief") as thief, stage.client("keeper") as keeper:
            await thief.push("dying", bytes(wasmtime.wat2wasm(dying)))
            await keeper.push("quiet", content("guess_to_forward"))
            stream = canary.stream(PROMPT, max_tokens=NEW_TOKENS, temperature=0)
            pieces = [await anext(aiter(stream))]
            told: list[str] = []
            seen: list[str] = []

            async def die() -> None:
                try:
                    await thief.run("dying").text()
                except RealmError as error:
                    told.append(str(error) + str(error.details))

            async def listen() -> None:
                async for event in keeper.run("quiet"):
                    if isinstance(event, Log | Output):
                        seen.append(event.text)

            await asyncio.gather(*(die() for _ in range(8)), listen())
            assert len(told) == 8 and all(marker in text for text in told)
            assert seen and not any(marker in text for text in seen)
            assert pieces
            everybody = [*(await keeper.ps(all=True)).runs, *(await canary.ps(all=True)).runs]
            assert marker not in str(everybody)
        await until_quiet(stage)

    asyncio.run(attack())


def test_the_prefix_cache_is_each_tenants_own(stage: Stage, outcomes: dict[str, str]) -> None:
    """A prompt that another has just used costs as if nobody had; the same tenant's second use does not."""
    prompt = f"Count the {uuid.uuid4().hex} lanterns along the northern quay and describe each of them in turn."

    async def attack() -> tuple[int, int, int]:
        await stage.add_tenant("thief", {})
        async with stage.client("thief") as thief, stage.client("canary") as canary:
            results = []
            for client in (thief, thief, canary):
                generated = await client.generate(prompt, max_tokens=2, temperature=0)
                results.append(generated.usage.cached_tokens)
        await until_quiet(stage)
        return results[0], results[1], results[2]

    first, second, other = asyncio.run(attack())
    outcomes["prefix_cache_of_others"] = f"cached tokens: own second use {second}, another tenant's {other}"
    assert first < 16 <= second
    # The chat template's own beginning may be there from the neighbour's earlier prompts, which are its own.
    assert other <= first + 16
