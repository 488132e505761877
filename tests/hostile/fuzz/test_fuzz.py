"""A short part of each target, the same inputs each time, and everything that was ever found.

``FUZZ_SEED`` chooses other inputs, ``FUZZ_FINDINGS`` the folder for failing ones. ``make fuzz`` is the long run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hostile.fuzz.campaign import failure, first_number, load
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
    """In a process of its own: one of the invariants is that descriptors and mappings do not grow."""
    command = [sys.executable, "-m", "tests.hostile.fuzz.campaign", name, "--findings", str(FINDINGS)]
    command += ["--first", str(first_number(SEED)), "--most", str(INPUTS[name]), "--seconds", "90", "--shrink", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["findings"], f"see {FINDINGS}: {report['findings']}"
    assert done.returncode == 0, done.stderr
    # Tools make nothing of a few numbers.
    assert report["inputs"] >= INPUTS[name] * 3 // 4, report


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
