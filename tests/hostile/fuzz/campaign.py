"""Runs one target for a while, and keeps every input that breaks an invariant.

``python -m tests.hostile.fuzz.campaign TARGET`` is what ``make fuzz`` starts for each target. Before
each check the input is written down, so one that ends the whole process is not lost either.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging
import re
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.fuzz.targets import CAMPAIGN, TARGETS, Target

SAME_KEPT = 3
"""Findings that look alike are kept so many times."""
SHRINK_SECONDS = 60.0
MISSING = 50
"""So many numbers in a row that make no input mean that there are no more."""


def first_number(seed: int) -> int:
    """Where the numbers of a campaign's inputs begin; campaigns do not overlap."""
    return seed * CAMPAIGN


@dataclass
class Report:
    """What one campaign did. ``findings`` are file names, by what the problem looks like."""

    target: str
    next_number: int
    inputs: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    findings: dict[str, list[str]] = field(default_factory=dict)


def looks_like(error: BaseException) -> str:
    """The same for problems that come from one place and differ in numbers only."""
    places = traceback.extract_tb(error.__traceback__)
    text = re.sub(r"0x[0-9a-f]+|[0-9a-f]{12,}|\d+", "N", str(error).strip().partition("\n")[0])[:60]
    return f"{type(error).__name__} in {places[-1].name if places else '?'}: {text}"


def save(folder: Path, target: str, data: bytes, problem: str) -> Path:
    """Write a finding, to be given to ``tests.hostile.fuzz.replay``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{target.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    file = folder / f"{name}.json"
    content = {"target": target, "problem": problem[:8000], "data": base64.b64encode(data).decode()}
    file.write_text(json.dumps(content, indent=1) + "\n")
    if data.startswith(b"\0asm"):
        (folder / f"{name}.wasm").write_bytes(data)
    return file


def load(file: Path) -> tuple[str, bytes]:
    """Target and input of a finding; a bare ``.wasm`` is an input of ``corpus``."""
    if file.suffix == ".wasm":
        return "corpus", file.read_bytes()
    found = json.loads(file.read_text())
    return str(found["target"]), base64.b64decode(found["data"])


def failure(target: Target, data: bytes) -> Exception | None:
    """What is wrong with this input, if anything."""
    try:
        target.check(data)
    except Exception as error:
        return error
    return None


def shrunk(target: Target, data: bytes, error: Exception, seconds: float) -> tuple[bytes, Exception]:
    """The smallest input found in this time that fails in the same way, and how it does."""
    like = looks_like(error)
    end = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for candidate in target.smaller(data):
            if time.monotonic() > end:
                break
            if candidate == data:
                continue
            found = failure(target, candidate)
            if found is not None and looks_like(found) == like:
                data, error, progress = candidate, found, True
                break
    return data, error


def run_campaign(
    target: Target, seconds: float, first: int, folder: Path, *, most: int | None = None, shrink: float = SHRINK_SECONDS
) -> Report:
    """Check inputs from number ``first`` on, until the time is over or ``most`` have been checked."""
    report = Report(target.name, first)
    kinds: Counter[str] = Counter()
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / f"current-{target.name.replace(' ', '-')}"
    progress = folder / f"progress-{target.name.replace(' ', '-')}.json"
    written, missing = 0.0, 0
    while (most is None or report.next_number < first + most) and time.monotonic() - began < seconds:
        data = target.make(report.next_number)
        report.next_number += 1
        if data is None:
            missing += 1
            if missing > MISSING:
                break
            continue
        missing = 0
        current.write_bytes(data)
        report.inputs += 1
        error = failure(target, data)
        if error is not None:
            like = looks_like(error)
            kinds[like] += 1
            if kinds[like] <= SAME_KEPT:
                small, error = shrunk(target, data, error, shrink)
                text = "".join(traceback.format_exception(error))
                file = save(folder, target.name, small, text)
                report.findings.setdefault(like, []).append(file.name)
        report.counts = dict(target.counts) | {"findings": kinds.total()}
        report.seconds = time.monotonic() - began
        if time.monotonic() - written > 1:
            written = time.monotonic()
            progress.write_text(json.dumps(vars(report)))
    try:
        target.close()
    except Exception as error:
        report.findings.setdefault(looks_like(error), []).append("(at the end)")
    current.unlink(missing_ok=True)
    progress.write_text(json.dumps(vars(report)))
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz.campaign", description="Fuzz one target")
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz"), help="folder for failing inputs")
    parser.add_argument("--most", type=int, help="most inputs")
    parser.add_argument("--shrink", type=float, default=SHRINK_SECONDS, help="most seconds to make a finding smaller")
    options = parser.parse_args(arguments)
    # What the checks look at is kept by them; the rest would only hide the report.
    logging.getLogger("realm").propagate = False
    logging.getLogger("realm").addHandler(logging.NullHandler())
    report = run_campaign(
        TARGETS[options.target](),
        options.seconds,
        options.first,
        options.findings,
        most=options.most,
        shrink=options.shrink,
    )
    described: dict[str, Any] = vars(report)
    sys.stdout.write(json.dumps(described) + "\n")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
