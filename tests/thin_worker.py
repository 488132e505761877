"""``-m tests.thin_worker``: the real guest worker, but its host functions have no stack of their own.

A guest that recurses as deep as it may and then calls the host so really overruns its fiber's stack,
where Wasmtime can only abort the process. With the stack that workers have this cannot happen: see
``HOST_STACK``.
"""

from __future__ import annotations

import sys

from realm.guests import fiber_types

fiber_types.SETTINGS["async_stack_size"] = fiber_types.WASM_STACK

if __name__ == "__main__":
    from realm.guests.worker import main

    sys.exit(main())
