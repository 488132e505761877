"""Runs attacks beside the neighbour, and says how each ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import wasmtime

from realm.limits import LIMITS
from realm_sdk import Client, Finished, Log, Output, RealmError, Usage
from tests.hostile.building import BUILDERS
from tests.hostile.catalogue import Attack
from tests.hostile.stage import Song, Stage, singing, until_quiet

ATTACKS = Path(__file__).parent / "attacks"
COMPANION = "decode_beside"
UPLOADS = 4
"""At a time: what a tenant may have in flight."""


def content(name: str) -> bytes:
    """The module of an attack."""
    if name in BUILDERS:
        return BUILDERS[name]()
    return bytes(wasmtime.wat2wasm((ATTACKS / f"{name}.wat").read_text()))


def tries(name: str) -> str:
    """What an attack tries and what must happen, as its source says."""
    if name in BUILDERS:
        return " ".join((BUILDERS[name].__doc__ or "").split())
    with (ATTACKS / f"{name}.wat").open() as file:
        return file.readline().removeprefix(";;").strip()


@dataclass
class Outcome:
    """How an attack ended. ``pushed`` says that the module was taken."""

    name: str
    pushed: bool = False
    error: RealmError | None = None
    result: int | None = None
    text: str = ""
    logs: list[Log] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    seconds: float = 0.0
    song: Song = field(default_factory=Song)
    left: str = ""

    def __str__(self) -> str:
        if self.error is None:
            return f"completes with {self.result}"
        where = "" if self.pushed else "refused: "
        limit = self.error.details.get("name")
        trap = self.error.details.get("trap")
        more = f" ({limit} {self.error.details.get('limit'):,})" if limit in _NAMES else f" ({trap})" if trap else ""
        return f"{where}{self.error.code}{more}"


_NAMES: set[object] = set(LIMITS)


async def attack_once(client: Client, attack: Attack, pushing: asyncio.Semaphore) -> Outcome:
    """Push the module and run it."""
    outcome = Outcome(attack.name)
    began = time.monotonic()
    try:
        module = await asyncio.to_thread(content, attack.name)
        async with pushing:
            await client.push(attack.module_name, module)
        outcome.pushed = True
        async for event in client.run(attack.module_name, attack.input, seed=1):
            if isinstance(event, Output):
                outcome.text += event.text
            elif isinstance(event, Log):
                outcome.logs.append(event)
            elif isinstance(event, Finished):
                outcome.result, outcome.usage = event.code, event.usage
    except RealmError as error:
        outcome.error = error
    outcome.seconds = time.monotonic() - began
    return outcome


async def perform(stage: Stage, attacks: list[Attack]) -> list[Outcome]:
    """Run attacks at once, beside the neighbour and beside a guest of the attacker in the neighbour's batches."""
    await stage.add_tenant("mallory", {})
    for attack in attacks:
        await stage.add_tenant(attack.tenant, attack.limits)
    clients = {tenant: stage.client(tenant) for tenant in {"mallory", *(attack.tenant for attack in attacks)}}
    try:
        for client in clients.values():
            await client.open()
        await clients["mallory"].push(COMPANION, content(COMPANION))
        before = await stage.engine()
        async with singing(stage) as song, clients["mallory"].run(COMPANION):
            pushing = asyncio.Semaphore(UPLOADS)
            outcomes = await asyncio.gather(
                *(attack_once(clients[attack.tenant], attack, pushing) for attack in attacks)
            )
        after = await stage.engine()
        assert after["shared_steps"] > before["shared_steps"], "the neighbour shared no step with anybody"
    finally:
        for client in clients.values():
            await client.close()
    stage.savers |= {attack.tenant for attack in attacks if attack.saves}
    left = ""
    try:
        await until_quiet(stage)
    except AssertionError as error:
        left = str(error)
    for outcome in outcomes:
        outcome.song, outcome.left = song, left
    return outcomes
