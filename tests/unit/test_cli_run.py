"""``realm run`` of a file with adapters: what it passes on, and what it refuses."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from realm import run_messages
from tests.cli_harness import Invoke, invoke_fixture

__all__ = ["invoke_fixture"]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Path]]:
    """The adapters of each local run, which does nothing else."""
    calls: list[dict[str, Path]] = []

    def run_local(*arguments: object, adapters: dict[str, Path], **named: object) -> Iterator[run_messages.RunFinished]:
        calls.append(adapters)
        yield run_messages.RunFinished(1, "complete", 0, None, run_messages.Usage())

    module = types.ModuleType("realm.local")
    module.run_local = run_local  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "realm.local", module)
    monkeypatch.setattr("realm.local", module, raising=False)
    (tmp_path / "home" / "models" / "one").mkdir(parents=True)
    (tmp_path / "home" / "models" / "one" / "realm.json").write_text("{}")
    (tmp_path / "chat.wasm").write_bytes(b"")
    return calls


def test_adapters_of_a_local_run(invoke: Invoke, tmp_path: Path, given: list[dict[str, Path]]) -> None:
    wasm = str(tmp_path / "chat.wasm")
    assert invoke("run", wasm).exit_code == 0
    assert invoke("run", wasm, "--adapter", "legal=./a", "--adapter", "poet=b=c").exit_code == 0
    assert given == [{}, {"legal": Path("a"), "poet": Path("b=c")}]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--adapter", "legal"], "NAME=FOLDER"),
        (["--adapter", "=folder"], "NAME=FOLDER"),
        (["--adapter", "legal="], "NAME=FOLDER"),
        (["--adapter", "legal=a", "--adapter", "legal=b"], "twice"),
    ],
)
def test_adapters_that_are_given_wrongly(
    invoke: Invoke, tmp_path: Path, given: list[dict[str, Path]], arguments: list[str], says: str
) -> None:
    result = invoke("run", str(tmp_path / "chat.wasm"), *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert given == []


def test_a_servers_adapters_are_added_to_it(invoke: Invoke, given: list[dict[str, Path]]) -> None:
    result = invoke("run", "chat", "--adapter", "legal=./a")
    assert result.exit_code == 2
    assert "realm adapters add" in result.stderr
    assert given == []
