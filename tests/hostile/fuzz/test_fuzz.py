"""A short part of each target, the same inputs each time, and everything that was ever found.

``FUZZ_SEED`` chooses other inputs, ``FUZZ_FINDINGS`` the folder for failing ones. ``make fuzz`` is the long run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.fuzz.campaign import failure, first_number, load, run_campaign
from tests.hostile.fuzz.modules import corpus
from tests.hostile.fuzz.targets import TARGETS, Target

SEED = int(os.environ.get("FUZZ_SEED", "1"))
FINDINGS = Path(os.environ.get("FUZZ_FINDINGS", ".cache/fuzz"))
FOUND = sorted((Path(__file__).parent / "found").glob("*.json"))
INPUTS = {
    "smith": 70,
    "mutate": 50,
    "corpus": len(corpus()),
    "rewriting": 120,
    "arguments": 150,
    "parser": 3000,
    "wire": 2,
    "uploads": 1,
    "engine link": 60,
    "gateway link": 60,
}


@pytest.mark.parametrize("name", INPUTS)
def test_short(name: str) -> None:
    target = TARGETS[name]()
    report = run_campaign(target, 100.0, first_number(SEED), FINDINGS, most=INPUTS[name], shrink=5.0)
    assert not report.findings, f"see {FINDINGS}: {report.findings}"
    # Tools make nothing of a few numbers.
    assert report.inputs >= INPUTS[name] * 3 // 4, report


@pytest.fixture(scope="module")
def targets() -> Iterator[Callable[[str], Target]]:
    """Targets by their names, each made once."""
    made: dict[str, Target] = {}

    def target(name: str) -> Target:
        if name not in made:
            made[name] = TARGETS[name]()
        return made[name]

    yield target
    for used in made.values():
        used.close()


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_found_before(file: Path, targets: Callable[[str], Target]) -> None:
    """Inputs that once broke something."""
    name, data = load(file)
    error = failure(targets(name), data)
    if error is not None:
        raise error
