"""``make fuzz``: every target in turn, each in a process of its own, and a report of what was done and found."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.hostile.fuzz.binaryen import tool
from tests.hostile.fuzz.campaign import first_number, save
from tests.hostile.fuzz.targets import TARGETS

_STOP_SECONDS = 480.0
"""How long a target may go on after its time (Hypothesis shrinks for up to 300); then it hangs, which is a finding."""


def _run(name: str, seconds: float, first: int, findings: Path) -> list[dict[str, Any]]:
    """A campaign, begun again after the input that ends its process. Gives the reports of all of them."""
    reports: list[dict[str, Any]] = []
    end = time.monotonic() + seconds
    slug = name.replace(" ", "-")
    progress, current = findings / f"progress-{slug}.json", findings / f"current-{slug}"
    while (left := end - time.monotonic()) > 1:
        progress.unlink(missing_ok=True)
        current.unlink(missing_ok=True)
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.hostile.fuzz.campaign", name]
        command += ["--seconds", str(left), "--first", str(first), "--findings", str(findings)]
        log = findings / f"output-{slug}.txt"
        with log.open("w") as output:
            try:
                status = subprocess.run(
                    command, stdout=subprocess.DEVNULL, stderr=output, timeout=left + _STOP_SECONDS, check=False
                ).returncode
                how = f"the process ended with status {status}"
            except subprocess.TimeoutExpired:
                status, how = -1, "the process did not come to its end"
        report = json.loads(progress.read_text()) if progress.exists() else {}
        report = {"target": name, "inputs": 0, "counts": {}, "findings": {}, "next_number": first} | report
        reports.append(report)
        if status in (0, 1) and not current.exists():
            break
        data = current.read_bytes() if current.exists() else b""
        file = save(findings, name, data, f"{how}\n{log.read_text()[-6000:]}")
        report["findings"].setdefault(how, []).append(file.name)
        # At most a second's worth of inputs is repeated.
        first = int(report["next_number"]) + 1
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz", description="Fuzz everything for a while")
    parser.add_argument("--seconds", type=float, default=600.0, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz"), help="folder for failing inputs")
    parser.add_argument("--only", default="", help=f"targets, separated by commas: {', '.join(TARGETS)}")
    options = parser.parse_args()
    options.findings.mkdir(parents=True, exist_ok=True)
    names = [name.strip() for name in options.only.split(",") if name.strip()] or list(TARGETS)
    if "binaryen" in names and tool() is None:
        print("binaryen: left out, because FUZZ_BINARYEN names no folder with it (npm install --prefix DIR binaryen)")
        names.remove("binaryen")
    whole = sum(TARGETS[name].weight for name in names)
    found = 0
    for name in names:
        seconds = options.seconds * TARGETS[name].weight / whole
        for report in _run(name, seconds, first_number(options.seed), options.findings):
            counts = ", ".join(f"{value:,} {key}" for key, value in sorted(report["counts"].items()))
            print(f"{name}: {report['inputs']:,} inputs in {report.get('seconds', 0):.0f} s; {counts}", flush=True)
            for like, files in report["findings"].items():
                found += 1
                print(f"  FOUND {like}\n    {', '.join(files)}", flush=True)
    print(f"seed {options.seed}: {found} kinds of findings, in {options.findings}" if found else "nothing was found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
