"""After any interleaving of runs, cancels, disconnects, limits, traps and worker deaths, all counters are as before."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.hostile.counters import WholeHost, everything, random_script

SEED = int(os.environ.get("FUZZ_SEED", "1"))
GROUPS, SCRIPTS = 6, 5


@pytest.fixture(scope="module")
def host() -> Iterator[WholeHost]:
    host = WholeHost()
    yield host
    host.close()


def test_each_thing_once(host: WholeHost) -> None:
    host.play(everything())


@pytest.mark.parametrize("group", range(GROUPS))
def test_any_order(host: WholeHost, group: int) -> None:
    for number in range(SCRIPTS):
        script = random_script(SEED * 1000 + group * SCRIPTS + number)
        try:
            host.play(script)
        except Exception as error:
            error.add_note(f"the script: {script}")
            raise


def test_many_deaths(host: WholeHost) -> None:
    """Workers killed while runs of both tenants are in them, one after the other."""
    script = []
    for which in range(3):
        script += [["run", 0, "forks", 1], ["run", 1, "receive", 1], ["run", 2, "spin", 1], ["run", 3, "flood", 1]]
        script += [["wait", 0, 50], ["kill", 0, which], ["run", 0, "tokens", 1]]
    host.play(script)
