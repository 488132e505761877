"""The stack under attack, started once for all of these tests, and the table of what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.stage import Stage, staged
from tests.hostile.table import RESULTS, lines

_TITLE = "attacks of guests beside a neighbour"


@pytest.fixture(scope="session")
def stage(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One worker, so that all guests share a process and a thread: the hardest case."""
    home = tmp_path_factory.mktemp("hostile") / "home"
    home.mkdir(mode=0o700)
    (home / "models").symlink_to(model_folder.parent)
    with staged(home, "--model", model_folder.name, "--workers", "1") as stage:
        yield stage


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes: dict[str, str] = config.stash.get(OUTCOMES, {})
    if not outcomes:
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(outcomes, indent=1))
    terminalreporter.section(_TITLE)
    for line in lines(outcomes):
        terminalreporter.line(line)


OUTCOMES: pytest.StashKey[dict[str, str]] = pytest.StashKey()


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> dict[str, str]:
    """What came of each attack, in words, for the table at the end."""
    return request.config.stash.setdefault(OUTCOMES, {})
