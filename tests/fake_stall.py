"""``-m tests.fake_stall``: an engine that never gets ready."""

from __future__ import annotations

import time

print("loading for ever", flush=True)
time.sleep(60)
