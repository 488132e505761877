"""``python -m tests.hostile.fuzz.replay FILE``: check a finding again, and say what is wrong with it now."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from tests.hostile.fuzz.campaign import failure, load, save, shrunk
from tests.hostile.fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz.replay", description=__doc__)
    parser.add_argument("file", type=Path, help="a finding (.json), or a module (.wasm)")
    parser.add_argument("--shrink", type=float, default=0.0, metavar="SECONDS", help="look for a smaller one")
    options = parser.parse_args()
    name, data = load(options.file)
    target = TARGETS[name]()
    error = failure(target, data)
    if error is None:
        print(f"{name}: nothing is wrong with it: {dict(target.counts)}")
        target.close()
        return 0
    traceback.print_exception(error)
    if options.shrink:
        small, error = shrunk(target, data, error, options.shrink)
        traceback.print_exception(error)
        print(f"{len(data)} bytes, shrunk to {len(small)}: {save(options.file.parent, name, small, str(error))}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
