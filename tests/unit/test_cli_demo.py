"""The demo's judgement and its picture, without a server."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from realm.cli import demo
from realm.cli.demo import Outcome, Part, Phase, check, parts
from realm.cli.demo_view import StreamView
from realm.errors import RealmError
from realm_sdk import Usage

GRAMMAR = (Path(__file__).parents[2] / "guest_modules" / "constrained" / "grammar.txt").read_text().rstrip("\n")
JSON = '{"name": "Ada", "age": 36, "city": "London", "likes": ["engines", "long walks"]}'
USAGE = Usage(new_tokens=10, fuel=1000, prompt_tokens=5)


def phase(cast: list[Part], shared_steps: int) -> Phase:
    outcomes = {
        part.tenant: Outcome(JSON if part.module == "constrained" else "text", USAGE, finished=True) for part in cast
    }
    return Phase(2.0, outcomes, steps=10, sequences=25, shared_steps=shared_steps, max_sequences=8)


def test_rates_and_means() -> None:
    made = phase(parts(32), 3)
    assert (made.new_tokens, made.rate, made.mean_sequences) == (30, 15.0, 2.5)
    assert replace(made, steps=0).mean_sequences == 0


def test_all_right() -> None:
    cast = parts(32)
    assert len({part.tenant for part in cast}) == len({part.module for part in cast}) == 3
    assert check(cast, phase(cast, 5), phase(cast, 0), GRAMMAR) == []


def test_what_is_wrong_is_found() -> None:
    cast = parts(32)
    together, in_turn = phase(cast, 0), phase(cast, 2)
    together.outcomes["acme"].finished = False
    together.outcomes["globex"].text = " "
    in_turn.outcomes["initech"].text = JSON + "!"
    problems = check(cast, together, in_turn, GRAMMAR)
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
