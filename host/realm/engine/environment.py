"""How libgomp should behave in a process that runs the engine.

It reads its variables when it is loaded, so these are set before torch is imported, or
given to the child process.
"""

from __future__ import annotations

import os

THREADS = {
    # torch's threads meet some 300 times a step. By default each spins for milliseconds while it
    # waits; when another process wants a core, a waiting thread spins away the time that the one it
    # waits for needs. Measured on two cores, 32 sequences: two engines side by side 112 rather than 77
    # tokens/s each, beside one busy process 116 rather than 98, alone no difference beyond the noise.
    "GOMP_SPINCOUNT": "3000",
}
"""Environment variables; a value that is set already wins."""


def prepare_this_process() -> None:
    """Set what can still be set in a running process; call it before torch is first imported."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
