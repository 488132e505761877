"""The Python that README.md shows, as it stands, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from realm_sdk import SyncClient
from tests.e2e.conftest import Stack

ROOT = Path(__file__).resolve().parents[2]


def test_the_shown_program_works(stack: Stack) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    shown = found[1].replace("ws://127.0.0.1:8765", stack.url).replace("realm_…", stack.key)
    with SyncClient(stack.url, stack.key) as client:
        client.push("hello", ROOT / "guest_modules" / "chat" / "chat.wasm")
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "otter" in done.stdout.lower()
    assert "Finished(" in done.stdout
    assert "outcome='complete'" in done.stdout
