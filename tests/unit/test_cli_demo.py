"""The demo's judgement and its picture, without a server."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from realm.cli import demo, demo_adapters
from realm.cli.demo import Outcome, Part, Phase, check, parts
from realm.cli.demo_adapters import OWNERS, Asked, check_asked, is_answer, pirate_words
from realm.cli.demo_view import StreamView
from realm.errors import RealmError
from realm_sdk import Adapter, Client, NotFound, Piece, Usage

GRAMMAR = (Path(__file__).parents[2] / "guest_modules" / "constrained" / "grammar.txt").read_text().rstrip("\n")
JSON = '{"name": "Ada", "age": 36, "city": "London", "likes": ["engines", "long walks"]}'
USAGE = Usage(new_tokens=10, fuel=1000, prompt_tokens=5)


def phase(those: list[Part], shared_steps: int) -> Phase:
    outcomes = {
        part.tenant: Outcome(JSON if part.module == "constrained" else "text", USAGE, finished=True) for part in those
    }
    return Phase(2.0, outcomes, steps=10, sequences=25, shared_steps=shared_steps, max_sequences=8)


def test_rates_and_means() -> None:
    made = phase(parts(32), 3)
    assert (made.new_tokens, made.rate, made.mean_sequences) == (30, 15.0, 2.5)
    assert replace(made, steps=0).mean_sequences == 0


def test_all_right() -> None:
    those = parts(32)
    assert len({part.tenant for part in those}) == len({part.module for part in those}) == 3
    assert check(those, phase(those, 5), phase(those, 0), GRAMMAR) == []


def test_what_is_wrong_is_found() -> None:
    those = parts(32)
    together, in_turn = phase(those, 0), phase(those, 2)
    together.outcomes["acme"].finished = False
    together.outcomes["globex"].text = " "
    in_turn.outcomes["initech"].text = JSON + "!"
    problems = check(those, together, in_turn, GRAMMAR)
    expected = ["acme's run did not complete", "globex's run has no text", "does not match its grammar"]
    expected += ["no step merged", "one after another shared steps"]
    assert len(problems) == len(expected)
    for text in expected:
        assert any(text in problem for problem in problems), text


@pytest.mark.parametrize("text", ["", "{}", JSON[:-1], JSON.replace("36", "036"), JSON.replace("Ada", "ada")])
def test_the_grammar_tells_wrong_texts(text: str) -> None:
    assert re.fullmatch(GRAMMAR, JSON)
    assert not re.fullmatch(GRAMMAR, text)


def test_view_without_a_terminal_labels_whole_words(capsys: pytest.CaptureFixture[str]) -> None:
    with StreamView(Console(file=io.StringIO()), {"acme": "chat", "globex": "best"}) as view:
        for word in ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away"]:
            view.add("acme", word + " ")
        view.add("globex", "one\n\ntwo\x1b[2J")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "      acme | the quick brown fox jumps over the lazy dog and",
        "    globex | one",
        "    globex | two\ufffd[2J",
        "      acme | runs away",
    ]


def test_view_on_a_terminal_draws_columns() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=90, height=30, _environ={"TERM": "xterm"})
    titles = {"acme": "chat", "globex": "best", "initech": "json"}
    with StreamView(console, titles) as view:
        view.add("acme", "hello [bold]there[/bold]")
        view.add("initech", JSON * 20)
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for text in ("acme: chat", "globex: best", "initech: json", "hello [bold]there[/bold]"):
        assert text in drawn


ANSWERS = {
    "acme": "The sky is blue because of light.",
    "globex": '{"answer": "Light is scattered.", "confidence": 0.9}',
    "initech": "Arr, matey! The air scatters it. Savvy?",
}
REFUSED = dict.fromkeys(OWNERS.values(), "adapter_not_found")


def test_adapters_all_right() -> None:
    assert OWNERS.keys() < {part.tenant for part in parts(32)} == ANSWERS.keys()
    assert check_asked(Asked(ANSWERS, 5, REFUSED)) == []


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (Asked(ANSWERS | {"acme": " "}, 5, REFUSED), "acme got no answer"),
        (Asked(ANSWERS | {"acme": ANSWERS["globex"]}, 5, REFUSED), "acme's answer, without an adapter"),
        (Asked(ANSWERS | {"acme": "Arr."}, 5, REFUSED), "acme's answer, without an adapter"),
        (Asked(ANSWERS | {"globex": ANSWERS["acme"]}, 5, REFUSED), "globex's answer is not one JSON object"),
        (Asked(ANSWERS | {"initech": ANSWERS["acme"]}, 5, REFUSED), "does not sound like a pirate's"),
        (Asked(ANSWERS, 0, REFUSED), "no step merged"),
        (Asked(ANSWERS, 5, REFUSED | {"json": ""}), "json was not kept from others (an answer came)"),
        (Asked(ANSWERS, 5, REFUSED | {"pirate": "not_found"}), "pirate was not kept from others (not_found)"),
    ],
)
def test_what_is_wrong_with_adapters_is_found(wrong: Asked, problem: str) -> None:
    found = check_asked(wrong)
    assert len(found) == 1
    assert problem in found[0]


def test_styles_are_told_apart() -> None:
    assert is_answer(ANSWERS["globex"])
    for text in ("", "[]", "{}", '{"answer": "x"}', '{"answer": 1, "confidence": 1}', ANSWERS["globex"] + "!"):
        assert not is_answer(text)
    assert not is_answer('{"answer": "x", "confidence": 2}') and not is_answer('{"answer": "x", "confidence": true}')
    assert pirate_words(ANSWERS["initech"]) == 3
    assert pirate_words("The array of yesterday's starry heart, yet averted.") == 0


class Answering:
    """What the demo uses of clients; answers as it should, and as a tenant without adapters is answered."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.added: dict[str, Path] = {}
        self.steps = 0
        self.adapters = self

    async def add(self, name: str, source: Path) -> Adapter:
        self.added[name] = source
        return Adapter(name, rank=8, size=1 << 20)

    async def health(self) -> Answering:
        self.steps += 7
        return self

    @property
    def engine(self) -> dict[str, int]:
        return {"shared_steps": self.steps}

    def _text(self, adapter: str | None) -> str:
        if adapter is not None and adapter not in self.added:
            raise NotFound("adapter_not_found", f"{adapter} is unknown")
        tenant = next((owner for owner, name in OWNERS.items() if name == adapter), "acme")
        return ANSWERS[tenant]

    async def generate(self, prompt: str, *, adapter: str, max_tokens: int) -> str:
        return self._text(adapter)

    async def stream(self, prompt: str, *, max_tokens: int, adapter: str | None = None) -> AsyncIterator[Piece]:
        for index, word in enumerate(self._text(adapter).split(" ")):
            await asyncio.sleep(0)
            yield Piece(word if index == 0 else f" {word}", index, False)


def test_everybody_asks_and_brings_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clients = {tenant: Answering(tenant) for tenant in ANSWERS}
    given = cast("dict[str, Client]", clients)
    console = Console(file=io.StringIO(), width=120)

    async def play() -> Asked:
        await demo_adapters.add_adapters(console, given, tmp_path)
        return await demo_adapters.ask(console, given["acme"], given)

    asked = asyncio.run(play())
    assert asked == Asked(ANSWERS, 7, REFUSED)
    assert {tenant: client.added for tenant, client in clients.items()} == {
        tenant: {OWNERS[tenant]: tmp_path / OWNERS[tenant]} if tenant in OWNERS else {} for tenant in ANSWERS
    }
    assert "   initech | Arr, matey!" in capsys.readouterr().out
    said = cast("io.StringIO", console.file).getvalue()
    assert "globex added the adapter json: rank 8, 1.0 MiB" in said
    assert "acme asks for the adapter pirate, which is another's: adapter_not_found" in said


STAND_IN = """
import signal, sys, time
def end(number, frame):
    print("the end", file=sys.stderr)
    sys.exit({status})
signal.signal(signal.SIGTERM, end)
print('{{"url": "ws://127.0.0.1:1", "admin_key": "k"}}', flush=True)
while True:
    time.sleep(10)
"""
"""A server that says it is ready and ends with a given status."""


def stand_in(status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-in where the demo looks for Python."""
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{STAND_IN.format(status=status)}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("REALM_HOME", str(tmp_path / "home"))


async def serve_and_end() -> str:
    async with demo._server("m") as ready:
        return ready.url


def test_a_server_that_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(0, tmp_path, monkeypatch)
    assert asyncio.run(serve_and_end()) == "ws://127.0.0.1:1"


def test_a_server_that_ends_badly_fails_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(3, tmp_path, monkeypatch)
    with pytest.raises(RealmError) as caught:
        asyncio.run(serve_and_end())
    assert caught.value.code == "serve_failed"
    assert "status 3" in caught.value.message and "the end" in caught.value.message
