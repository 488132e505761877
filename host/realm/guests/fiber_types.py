"""Settings, states and failures of fibers: what :mod:`fibers` and its users share, without ctypes."""

from __future__ import annotations

import enum
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

WASM_STACK: Final = 512 << 10
"""Most stack of WASM frames in bytes; more is a trap of the guest."""
HOST_STACK: Final = 512 << 10
"""Stack left for host functions above the WASM frames, in bytes."""
FUEL_SLICE: Final = 1_000_000
"""Fuel after which a guest that only computes gives way: about 0.26 ms of ordinary code.

Instructions that the kernel makes slow are dearer: touching fresh memory page by page takes some 22 ms
a slice, until the guest has all the memory it may have.
"""
CALLS_A_SLICE: Final = 256
"""Host calls after which a guest that only calls the host gives way (some 0.5 ms)."""

# A 4 GiB reservation lets the compiler drop bounds checks; 47 bits of addresses hold some 30,000
# of them, more than the kernel's default number of mappings allows.
_MEMORY_RESERVATION: Final = 4 << 30
_MEMORY_GUARD: Final = 32 << 20

# What the compiled code and the store depend on. Part of the key of cached artifacts.
SETTINGS: Final[dict[str, int | bool]] = {
    "consume_fuel": True,
    "max_wasm_stack": WASM_STACK,
    "async_stack_size": WASM_STACK + HOST_STACK,
    "memory_reservation": _MEMORY_RESERVATION,
    "memory_guard_size": _MEMORY_GUARD,
    "memory_may_move": False,
    "wasm_simd": True,
    "wasm_bulk_memory": True,
    "wasm_multi_value": True,
    "wasm_reference_types": True,
    "wasm_tail_call": True,
    "wasm_relaxed_simd": False,
    "wasm_threads": False,
    "shared_memory": False,
    "wasm_multi_memory": False,
    "wasm_memory64": True,
    "wasm_function_references": False,
    "wasm_gc": False,
    "gc_support": False,
    "wasm_exceptions": False,
    "wasm_stack_switching": False,
    "wasm_custom_page_sizes": False,
    "wasm_wide_arithmetic": False,
    "wasm_component_model": False,
}

ValueType = Literal["i32", "u32", "i64", "u64"]
"""How a WASM value is read: the signedness is the host function's choice."""

Handler = Callable[[Any, tuple[int, ...]], "int | None"]
"""Serves one host function: (the fiber's guest, arguments) -> result, or None to keep it waiting."""


class OutOfBounds(Exception):
    """A pointer and length reach outside the guest's memory."""


class GuestExit(Exception):
    """Raised by a handler to end the guest at once, as ``proc_exit`` does."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class FiberState(enum.Enum):
    DONE = "done"
    """``run`` returned, or the guest left by :class:`GuestExit`: see :attr:`Fiber.result`."""
    WAITING = "waiting"
    """Inside a host function whose handler gave no result yet: see :meth:`Fiber.resume`."""
    YIELDED = "yielded"
    """The slice is used up; poll again."""
    TRAPPED = "trapped"
    """See :attr:`Fiber.trap`."""


@dataclass(frozen=True)
class TrapInfo:
    """Why a guest died. ``kind`` is a stable name such as ``unreachable``; frames are innermost first."""

    kind: str
    message: str
    frames: tuple[str, ...] = ()


class EngineFailure(Exception):
    """Wasmtime refused something that the host asked for; the message is Wasmtime's."""


def settings_fingerprint() -> str:
    """Text that changes whenever compiled artifacts would: version and settings."""
    return (
        importlib.metadata.version("wasmtime")
        + ";"
        + ";".join(f"{name}={int(value)}" for name, value in SETTINGS.items())
    )
