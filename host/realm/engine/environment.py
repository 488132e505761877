"""How libgomp and glibc should behave in a process that runs the engine.

Both read their variables when they are loaded, so these are set before torch is imported, or
given to the child process.
"""

from __future__ import annotations

import os

THREADS = {
    # torch's threads meet some 300 times a step. By default each spins for milliseconds while it
    # waits; as soon as any other process wants a core, a waiting thread spins away the time that the
    # one it waits for needs. Beside one busy process on two cores that made 1 token a second; with
    # this it is 33, and nothing is lost on an idle machine.
    "GOMP_SPINCOUNT": "1000",
}

ALLOCATOR = {
    # Keep freed memory rather than give it back and fault it in again: large temporaries are made and
    # freed hundreds of times a step. 12% of prefill's time, and more than half of sampling's.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}

ENGINE_PROCESS = THREADS | ALLOCATOR
"""For a child process that is only the engine. A value in the host's own environment wins."""


def prepare_this_process() -> None:
    """Set what can still be set in a running process; call it before torch is first imported."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
