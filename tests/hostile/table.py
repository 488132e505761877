"""The table of attacks and outcomes of the last test run, as Markdown: ``python -m tests.hostile.table``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULTS = Path(__file__).parents[2] / ".cache" / "attacks.json"
"""Written at the end of a test run."""


def lines(outcomes: dict[str, str]) -> Iterable[str]:
    """The table's lines; attacks in the catalogue's order, then the others."""
    from tests.hostile.catalogue import CATALOGUE
    from tests.hostile.performing import tries

    yield "| attack | tries | came of it |"
    yield "|---|---|---|"
    known = {attack.module_name: attack for attack in CATALOGUE}
    for name in [*(name for name in known if name in outcomes), *(name for name in outcomes if name not in known)]:
        what = tries(known[name].name) if name in known else ""
        yield f"| {name} | {what} | {outcomes[name]} |".replace("|  |", "| |")


def main() -> None:
    try:
        outcomes = json.loads(RESULTS.read_text())
    except FileNotFoundError:
        raise SystemExit("there are no outcomes: run pytest tests/hostile first") from None
    print("\n".join(lines(outcomes)))


if __name__ == "__main__":
    main()
