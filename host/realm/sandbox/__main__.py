"""Enters a guest worker's sandbox and prints what is in force, as JSON: what ``realm doctor`` asks."""

from __future__ import annotations

import dataclasses
import json
import sys

from realm import sandbox

sandbox.limit(sandbox.MEMORY_BYTES)
containment = sandbox.enter(sandbox.WORKER)
sys.stdout.write(json.dumps(dataclasses.asdict(containment)))
