"""What ``make demo`` runs: three tenants, each with another guest, on one model at the same time; then adapters.

The server is the real one, started as ``realm serve`` in a process of its own with an empty registry; only
the imported model is shared with other uses of the data folder. Everything goes over WebSocket.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from realm.cli.demo_adapters import add_adapters, ask, check_asked
from realm.cli.demo_view import StreamView
from realm.cli.models import DEFAULT_MODEL, import_with_progress
from realm.cli.terminal import size, table
from realm.errors import RealmError
from realm.models.store import list_models, models_dir
from realm.settings import default_home
from realm_sdk import Client, Finished, Output, Usage

_START_SECONDS = 180.0
_STOP_SECONDS = 20.0


@dataclass(frozen=True)
class Part:
    """One tenant's part in the demo."""

    tenant: str
    module: str
    title: str
    input: dict[str, Any]
    warm_up: dict[str, Any]
    """The same prompt with as little output as the guest allows."""


@dataclass
class Outcome:
    """How one run went."""

    text: str = ""
    usage: Usage = field(default_factory=Usage)
    finished: bool = False


@dataclass(frozen=True)
class Phase:
    """Several runs and what the engine did meanwhile."""

    seconds: float
    outcomes: dict[str, Outcome]
    steps: int
    sequences: int
    shared_steps: int
    max_sequences: int
    """Of the largest step since the engine started."""

    @property
    def new_tokens(self) -> int:
        return sum(outcome.usage.new_tokens for outcome in self.outcomes.values())

    @property
    def rate(self) -> float:
        """New tokens of all runs, a second."""
        return self.new_tokens / self.seconds

    @property
    def mean_sequences(self) -> float:
        return self.sequences / self.steps if self.steps else 0.0


class ServerReady(msgspec.Struct):
    """The line of ``realm serve --json``."""

    url: str
    admin_key: str


def parts(max_tokens: int) -> list[Part]:
    """Who runs what."""
    story = {"prompt": "Tell me a short story about an otter who learns to read.", "temperature": 0.7}
    name = {"prompt": "Explain in two sentences why the sky is blue.", "n": 6, "temperature": 0.9}
    person: dict[str, Any] = {"temperature": 0.9}
    return [
        Part("acme", "chat", "chat", story | {"max_tokens": max_tokens}, story | {"max_tokens": 1}),
        Part("globex", "best_of_n", "best of 6", name | {"max_tokens": max_tokens // 2}, name | {"max_tokens": 1}),
        Part("initech", "constrained", "JSON by a grammar", person, person),
    ]


def run_demo(guests: Path, max_tokens: int) -> bool:
    """Run it, print what happened; True if all of it was as it should be."""
    console = Console(highlight=False)
    model = _model(console)
    return asyncio.run(_until_terminated(_demo(console, guests, model, max_tokens)))


async def _until_terminated(demo: Coroutine[Any, Any, bool]) -> bool:
    """SIGTERM ends the demo as Ctrl-C does, so that the server it started ends, too."""
    task = asyncio.create_task(demo)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise RealmError("terminated", "the demo was told to end") from None


def _model(console: Console) -> str:
    home = default_home()
    if DEFAULT_MODEL not in {entry.name for entry in list_models(home)}:
        console.print(f"importing {DEFAULT_MODEL} into {home} (once)")
        import_with_progress(DEFAULT_MODEL, home, None, "bfloat16", False)
    return DEFAULT_MODEL


async def _demo(console: Console, guests: Path, model: str, max_tokens: int) -> bool:
    cast = parts(max_tokens)
    grammar = (guests / "constrained" / "grammar.txt").read_text().rstrip("\n")
    began = time.monotonic()
    async with _server(model) as ready, Client(ready.url, ready.admin_key) as admin:
        console.print(f"realm serve is ready at {ready.url} after {time.monotonic() - began:.1f} s")
        async with contextlib.AsyncExitStack() as stack:
            clients: dict[str, Client] = {}
            for part in cast:
                await admin.add_tenant(part.tenant)
                key = (await admin.add_key(part.tenant)).key
                client = clients[part.tenant] = await stack.enter_async_context(Client(ready.url, key))
                module = await client.push(part.module, guests / part.module / f"{part.module}.wasm")
                console.print(f"tenant {part.tenant} pushed {module.name}: {size(module.size)}")
            await add_adapters(console, clients, guests / "adapters")
            # Both ways then find the prompts in the prefix cache, and nobody pays for the first passes.
            for part in cast:
                await _run(clients[part.tenant], part, part.warm_up, None)
            console.print("\nall three at the same time:\n")
            with StreamView(console, {part.tenant: part.title for part in cast}) as view:
                together = await _phase(admin, cast, clients, view, at_once=True)
            console.print("\nthe same, one after another …")
            in_turn = await _phase(admin, cast, clients, None, at_once=False)
            _report(console, cast, together, in_turn)
            asked = await ask(console, admin, clients)
    problems = check(cast, together, in_turn, grammar) + check_asked(asked)
    for problem in problems:
        console.print(Text(f"wrong: {problem}", style="bold red"))
    if not problems:
        said = "all runs completed, the JSON matches its grammar, steps were shared, and each adapter was its tenant's."
        console.print(f"\n{said}", style="green")
    return not problems


# --- the server ----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _server(model: str) -> AsyncIterator[ServerReady]:
    """``realm serve`` on a free port, with an empty registry; stopped at the end, however that comes."""
    with tempfile.TemporaryDirectory(prefix="realm-demo-") as folder:
        home = Path(folder) / "home"
        home.mkdir(mode=0o700)
        models_dir(home).symlink_to(models_dir(default_home()).resolve())
        log = Path(folder) / "serve.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "realm.cli", "serve", "--json", "--port", "0", "--model", model),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=os.environ | {"REALM_HOME": str(home)},
            )
        try:
            yield await _ready(process, log)
        except BaseException:
            # How the server ends adds nothing to what went wrong first.
            await _stop(process)
            raise
        if status := await _stop(process):
            raise RealmError("serve_failed", f"realm serve ended with status {status}. It said:\n{_tail(log)}")


async def _ready(process: asyncio.subprocess.Process, log: Path) -> ServerReady:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
    except TimeoutError:
        line = b""
    try:
        return msgspec.json.decode(line, type=ServerReady)
    except msgspec.MsgspecError:
        raise RealmError("serve_failed", f"realm serve did not start. It said:\n{_tail(log)}") from None


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:].strip() or "(nothing)"


async def _stop(process: asyncio.subprocess.Process) -> int:
    """End it with SIGTERM, as an operator would; its exit status."""
    if process.returncode is None:
        process.terminate()
    try:
        return await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise RealmError("serve_failed", f"realm serve did not end in {_STOP_SECONDS:g} s and was killed") from None


# --- runs ----------------------------------------------------------------------------------------


async def _run(client: Client, part: Part, given: dict[str, Any], view: StreamView | None) -> Outcome:
    outcome = Outcome()
    async for event in client.run(part.module, given, seed=7):
        if isinstance(event, Output):
            outcome.text += event.text
            if view is not None:
                view.add(part.tenant, event.text)
        elif isinstance(event, Finished):
            outcome.usage = event.usage
            outcome.finished = event.outcome == "complete"
            if view is not None:
                view.end(part.tenant)
    return outcome


async def _phase(
    admin: Client, cast: list[Part], clients: dict[str, Client], view: StreamView | None, *, at_once: bool
) -> Phase:
    before = (await admin.health()).engine
    began = time.monotonic()
    if at_once:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_run(clients[part.tenant], part, part.input, view)) for part in cast]
        outcomes = [task.result() for task in tasks]
    else:
        outcomes = [await _run(clients[part.tenant], part, part.input, view) for part in cast]
    seconds = time.monotonic() - began
    after = (await admin.health()).engine
    return Phase(
        seconds=seconds,
        outcomes={part.tenant: outcome for part, outcome in zip(cast, outcomes, strict=True)},
        steps=after["steps"] - before["steps"],
        sequences=after["sequences"] - before["sequences"],
        shared_steps=after["shared_steps"] - before["shared_steps"],
        max_sequences=after["max_sequences"],
    )


# --- the report ----------------------------------------------------------------------------------


def check(cast: list[Part], together: Phase, in_turn: Phase, grammar: str) -> list[str]:
    """What is not as it should be."""
    problems: list[str] = []
    for label, phase in (("together", together), ("one after another", in_turn)):
        for part in cast:
            outcome = phase.outcomes[part.tenant]
            if not outcome.finished:
                problems.append(f"{part.tenant}'s run did not complete ({label})")
            if not outcome.text.strip() or not outcome.usage.new_tokens or not outcome.usage.fuel:
                problems.append(f"{part.tenant}'s run has no text, tokens or fuel ({label})")
            if part.module == "constrained" and not re.fullmatch(grammar, outcome.text.strip()):
                problems.append(f"{part.tenant}'s text does not match its grammar ({label}): {outcome.text!r}")
    if together.shared_steps <= 0:
        problems.append("no step merged calls of several tenants")
    if in_turn.shared_steps > 0:
        problems.append("runs one after another shared steps")
    return problems


def _report(console: Console, cast: list[Part], together: Phase, in_turn: Phase) -> None:
    engine = table("", "TOGETHER", "ONE AFTER ANOTHER", right=("TOGETHER", "ONE AFTER ANOTHER"))
    engine.add_row("engine steps", str(together.steps), str(in_turn.steps))
    engine.add_row("sequences in a step, mean", f"{together.mean_sequences:.2f}", f"{in_turn.mean_sequences:.2f}")
    most = (str(together.max_sequences), str(in_turn.max_sequences))
    engine.add_row("sequences in a step, most (since the start)", *most)
    engine.add_row("steps with calls of several tenants", str(together.shared_steps), str(in_turn.shared_steps))
    engine.add_row("new tokens", str(together.new_tokens), str(in_turn.new_tokens))
    engine.add_row("seconds", f"{together.seconds:.2f}", f"{in_turn.seconds:.2f}")
    engine.add_row("new tokens a second", f"{together.rate:.1f}", f"{in_turn.rate:.1f}")
    console.print()
    console.print(engine)
    numbers = ("NEW TOKENS", "PROMPT", "FUEL", "PEAK MEMORY")
    tenants = table("TENANT", "GUEST", *numbers, right=numbers)
    for part in cast:
        usage = together.outcomes[part.tenant].usage
        tenants.add_row(
            *(part.tenant, part.module, str(usage.new_tokens), str(usage.prompt_tokens)),
            *(f"{usage.fuel:,}", size(usage.memory_bytes)),
        )
    console.print()
    console.print(tenants)
    console.print(f"\ntogether is {together.rate / in_turn.rate:.2f} times as fast as one after another")
