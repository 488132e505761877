"""The demo's part about adapters: one question, asked by three tenants at once, two of whom brought their own."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from realm.cli.demo_view import StreamView
from realm.cli.terminal import size
from realm_sdk import Client, NotFound

QUESTION = "Why is the sky blue?"
"""None of the adapters was trained on it."""

OWNERS = {"globex": "json", "initech": "pirate"}
"""The tenants that bring an adapter, and which. All others ask the model as it is."""

_MOST_TOKENS = 64
_PIRATE = re.compile(
    r"(?<!\w)(?:arr|ahoy|avast|aye|mateys?|heart(?:y|ies)|ye|yer|savvy|grog|timbers|scallywags?|landlubbers?|davy jones"
    r"|cap'n|o'|an'|fer)(?!\w)",
    re.IGNORECASE,
)


@dataclass
class Asked:
    """What came of the question.

    Attributes:
        texts: each tenant's answer.
        shared_steps: engine steps that had calls of several tenants.
        refused: the error's code for each adapter that a tenant without one asked for, though it is another's.
    """

    texts: dict[str, str]
    shared_steps: int
    refused: dict[str, str]


async def add_adapters(console: Console, clients: dict[str, Client], folder: Path) -> None:
    """Upload each owner's adapter. ``folder`` has one folder for each, as PEFT writes them."""
    for tenant, name in OWNERS.items():
        added = await clients[tenant].adapters.add(name, folder / name)
        console.print(f"tenant {tenant} added the adapter {name}: rank {added.rank}, {size(added.size)}")


async def ask(console: Console, admin: Client, clients: dict[str, Client]) -> Asked:
    """Ask everybody's question at the same time and show the answers as they come."""
    console.print(f"\nall three ask at the same time: {QUESTION}\n")
    before = (await admin.health()).engine
    titles = {tenant: f"adapter {OWNERS[tenant]}" if tenant in OWNERS else "the model alone" for tenant in clients}
    with StreamView(console, titles) as view:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(_answer(client, name, view)) for name, client in clients.items()}
    after = (await admin.health()).engine
    console.print()
    refused = {}
    other = next(client for tenant, client in clients.items() if tenant not in OWNERS)
    for name in OWNERS.values():
        refused[name] = await _refused(other, name)
        console.print(f"{other.tenant} asks for the adapter {name}, which is another's: {refused[name] or 'given'}")
    texts = {tenant: task.result() for tenant, task in tasks.items()}
    return Asked(texts, after["shared_steps"] - before["shared_steps"], refused)


async def _answer(client: Client, tenant: str, view: StreamView) -> str:
    text = ""
    # A tenant without an adapter leaves the parameter out, as any client of this server did before there were any.
    chosen: dict[str, Any] = {"adapter": OWNERS[tenant]} if tenant in OWNERS else {}
    async for piece in client.stream(QUESTION, max_tokens=_MOST_TOKENS, **chosen):
        text += piece.text
        view.add(tenant, piece.text)
    view.end(tenant)
    return text


async def _refused(client: Client, adapter: str) -> str:
    """The code of the error that the client gets; "" if it gets an answer."""
    try:
        await client.generate(QUESTION, adapter=adapter, max_tokens=1)
    except NotFound as error:
        return error.code
    return ""


def check_asked(asked: Asked) -> list[str]:
    """What is not as it should be."""
    problems: list[str] = []
    for tenant, text in asked.texts.items():
        adapter = OWNERS.get(tenant)
        if not text.strip():
            problems.append(f"{tenant} got no answer")
        elif adapter == "json" and not is_answer(text):
            problems.append(f"{tenant}'s answer is not one JSON object with an answer and a confidence: {text!r}")
        elif adapter == "pirate" and pirate_words(text) < 2:
            problems.append(f"{tenant}'s answer does not sound like a pirate's: {text!r}")
        elif adapter is None and (is_answer(text) or pirate_words(text)):
            problems.append(f"{tenant}'s answer, without an adapter, is in the style of another's: {text!r}")
    for name, code in asked.refused.items():
        if code != "adapter_not_found":
            problems.append(f"the adapter {name} was not kept from others ({code or 'an answer came'})")
    if asked.shared_steps <= 0:
        problems.append("no step merged calls with and without adapters")
    return problems


def is_answer(text: str) -> bool:
    """Whether it is a JSON object with an answer and a confidence from 0 to 1, and nothing else."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    if not isinstance(value, dict) or value.keys() != {"answer", "confidence"}:
        return False
    confidence = value["confidence"]
    return isinstance(value["answer"], str) and type(confidence) in (int, float) and 0 <= confidence <= 1


def pirate_words(text: str) -> int:
    """How many words in it are a pirate's."""
    return len(_PIRATE.findall(text))
