"""How libgomp should behave in a process that runs the engine.

It reads its variables when it is loaded, so these are set before torch is imported, or
given to the child process.
"""

from __future__ import annotations

import os

THREADS = {
    # torch's threads meet some 300 times a step. By default each spins for milliseconds while it
    # waits; as soon as any other process wants a core, a waiting thread spins away the time that the
    # one it waits for needs. Beside one busy process on two cores that made 1 token a second; with
    # this it is 17 (177 rather than 27 with 32 sequences), and nothing is lost on an idle machine.
    "GOMP_SPINCOUNT": "3000",
}
"""Environment variables; a value that is set already wins."""


def prepare_this_process() -> None:
    """Set what can still be set in a running process; call it before torch is first imported."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
