"""Every attack of the catalogue through the real stack: how it ends, that the neighbour's tokens stay as they are,
and that nothing is left."""

from __future__ import annotations

import asyncio
import re

import pytest

from realm.limits import LIMITS
from tests.hostile.catalogue import CATALOGUE, GROUPS, Attack
from tests.hostile.performing import ATTACKS, COMPANION, Outcome, perform
from tests.hostile.stage import Stage

_OTHER_FILES = {COMPANION, "keep_secret", "steal_from_the_store"}


@pytest.fixture(scope="module")
def performed(stage: Stage) -> dict[str, Outcome | BaseException]:
    """What came of attacks, filled group by group."""
    return {}


def outcome_of(attack: Attack, stage: Stage, performed: dict[str, Outcome | BaseException]) -> Outcome:
    if attack.module_name not in performed:
        group = [other for other in CATALOGUE if other.group == attack.group]
        try:
            found: list[Outcome] = asyncio.run(perform(stage, group))
        except Exception as error:
            # Each attack of the group fails with it, rather than try the group again.
            performed.update({other.module_name: error for other in group})
        else:
            performed.update({other.module_name: outcome for other, outcome in zip(group, found, strict=True)})
    outcome = performed[attack.module_name]
    if isinstance(outcome, BaseException):
        raise AssertionError(f"the group {attack.group!r} could not be run") from outcome
    return outcome


@pytest.mark.parametrize("attack", CATALOGUE, ids=[f"{attack.module_name}" for attack in CATALOGUE])
def test_attack(
    attack: Attack, stage: Stage, performed: dict[str, Outcome | BaseException], outcomes: dict[str, str]
) -> None:
    outcome = outcome_of(attack, stage, performed)
    outcomes[attack.module_name] = str(outcome)
    outcome.song.check(stage)
    assert not outcome.left
    check_end(attack, outcome)
    assert len(outcome.logs) <= attack.lines
    assert sum(len(line.text) for line in outcome.logs) <= 64 << 10
    if isinstance(attack.text, str):
        assert outcome.text == attack.text
    elif attack.text is not None:
        assert attack.text(outcome.text), outcome.text[:200]


def check_end(attack: Attack, outcome: Outcome) -> None:
    error = outcome.error
    if error is None:
        assert attack.completes or not (attack.error or attack.refused), f"it {outcome}; wanted {attack.expected}"
        assert attack.result in (None, outcome.result), [line.text for line in outcome.logs][:8]
        return
    assert error.code in (attack.error or attack.refused), f"it ends with {error}; wanted {attack.expected}"
    assert outcome.pushed == (not attack.refused)
    assert attack.message in error.message
    for name, value in attack.details.items():
        assert error.details.get(name) == value, error.details
    if outcome.pushed and error.details.get("name") in LIMITS:
        assert error.details.keys() >= {"name", "limit", "used", "unit"}
        assert error.details["unit"] == LIMITS[error.details["name"]].unit
        assert error.details["name"] in error.message or f"{error.details['limit']:,}" in error.message
    if attack.waits:
        assert error.retry_after is not None and error.retry_after > 0
    if error.code == "guest_trap":
        assert error.details.keys() >= {"trap", "backtrace", "last_call", "memory_bytes"}
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]", "".join(error.details["backtrace"]))
        assert all(len(frame) < 300 for frame in error.details["backtrace"])


def test_every_source_has_its_row() -> None:
    rows = {attack.name for attack in CATALOGUE}
    assert {path.stem for path in ATTACKS.glob("*.wat")} <= rows | _OTHER_FILES
    assert len({attack.module_name for attack in CATALOGUE}) == len(CATALOGUE)
    assert sum(map(len, GROUPS.values())) == len(CATALOGUE)


def test_a_trap_names_its_function(stage: Stage, performed: dict[str, Outcome | BaseException]) -> None:
    (attack,) = [attack for attack in CATALOGUE if attack.name == "unreachable"]
    error = outcome_of(attack, stage, performed).error
    assert error is not None
    assert error.details["backtrace"][0].startswith("culprit")
