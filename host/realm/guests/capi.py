"""Wasmtime's C API as plain Python calls: addresses in, addresses out. Used by :mod:`fibers` alone.

Here are the bindings, the texts of errors and traps, and the few questions about a loaded module.
Nothing here knows about guests, and nothing keeps state.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_bool, c_char_p, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from typing import Any, Final

from wasmtime import _bindings as raw
from wasmtime import _ffi as ffi

from realm.guests.bulk_memory import CODE_SHIFT, HELPER_PREFIX
from realm.guests.fiber_types import EngineFailure, TrapInfo

# All addresses of the process as one buffer: copying through it costs 0.1 us, a third of what
# ctypes' own functions take. Every use is with an address from Wasmtime and checked bounds.
WINDOW: Final = memoryview((c_uint8 * (1 << 47)).from_address(0)).cast("B")

_P, _V = c_void_p, None


def _bind(name: str, result: Any, *arguments: Any, quick: bool = False) -> Any:
    """A C function that takes plain addresses: ctypes makes no object for each, as with typed pointers.

    ``quick`` keeps the interpreter lock: for calls that take nanoseconds.
    """
    prototype = (ctypes.PYFUNCTYPE if quick else ctypes.CFUNCTYPE)(result, *arguments)
    return prototype((name, ffi.dll))


# A poll keeps the lock too, for at most a slice: giving it up each time would hand it to the helper
# thread, if that is busy in Python, and every wake of every guest would wait to have it back.
poll = _bind("wasmtime_call_future_poll", c_bool, _P, quick=True)
delete_future = _bind("wasmtime_call_future_delete", _V, _P)
memory_data = _bind("wasmtime_memory_data", _P, _P, _P, quick=True)
memory_size = _bind("wasmtime_memory_data_size", c_size_t, _P, _P, quick=True)
store_new = _bind("wasmtime_store_new", _P, _P, _P, _P)
store_context = _bind("wasmtime_store_context", _P, _P, quick=True)
store_delete = _bind("wasmtime_store_delete", _V, _P)
store_limiter = _bind("wasmtime_store_limiter", _V, _P, *[c_int64] * 5, quick=True)
set_fuel = _bind("wasmtime_context_set_fuel", _P, _P, c_uint64, quick=True)
get_fuel = _bind("wasmtime_context_get_fuel", _P, _P, _P, quick=True)
yield_interval = _bind("wasmtime_context_fuel_async_yield_interval", _P, _P, c_uint64, quick=True)
instantiate = _bind("wasmtime_instance_pre_instantiate_async", _P, *[_P] * 5)
instantiate_pre = _bind("wasmtime_linker_instantiate_pre", _P, _P, _P, _P)
pre_delete = _bind("wasmtime_instance_pre_delete", _V, _P)
module_delete = _bind("wasmtime_module_delete", _V, _P)
deserialize = _bind("wasmtime_module_deserialize", _P, _P, c_char_p, c_size_t, _P)
call = _bind("wasmtime_func_call_async", _P, _P, _P, _P, c_size_t, _P, c_size_t, _P, _P)
export_get = _bind("wasmtime_instance_export_get", c_bool, _P, _P, c_char_p, c_size_t, _P)
caller_export_get = _bind("wasmtime_caller_export_get", c_bool, _P, c_char_p, c_size_t, _P)
define_async = _bind("wasmtime_linker_define_async_func", _P, _P, *[c_char_p, c_size_t] * 2, *[_P] * 4)
trap_new = _bind("wasmtime_trap_new", _P, c_char_p, c_size_t)
trap_delete = _bind("wasm_trap_delete", _V, _P)
HostCallback = ctypes.CFUNCTYPE(_V, _P, _P, _P, c_size_t, _P, c_size_t, _P, _P)
ResumeCallback = ctypes.CFUNCTYPE(c_bool, _P)


# --- errors ---------------------------------------------------------------------------------------


def error_text(error: int) -> str:
    """The message of a ``wasmtime_error_t``, which is then freed."""
    pointer = ctypes.cast(error, ctypes.POINTER(raw.wasmtime_error_t))
    text = ffi.wasm_byte_vec_t()
    raw.wasmtime_error_message(pointer, byref(text))
    raw.wasmtime_error_delete(pointer)
    return _take_text(text)


def _take_text(text: Any) -> str:
    value: str = ctypes.string_at(text.data, text.size).decode("utf-8", "replace") if text.size else ""
    raw.wasm_byte_vec_delete(byref(text))
    return value.rstrip("\0")


def check(error: int | None) -> None:
    """Raise :class:`EngineFailure` if a call gave an error."""
    if error:
        raise EngineFailure(error_text(error))


# --- modules --------------------------------------------------------------------------------------


def has_wide_memory(module: c_void_p) -> bool:
    """Whether the memory that a module exports as ``memory`` is a 64-bit one."""
    exports = ffi.wasm_exporttype_vec_t()
    raw.wasmtime_module_exports(ctypes.cast(module, ctypes.POINTER(raw.wasmtime_module_t)), byref(exports))
    try:
        for at in range(exports.size):
            export = exports.data[at]
            name = raw.wasm_exporttype_name(export).contents
            if name.size != 6 or ctypes.string_at(name.data, 6) != b"memory":
                continue
            memory = raw.wasm_externtype_as_memorytype_const(raw.wasm_exporttype_type(export))
            return bool(memory) and bool(raw.wasmtime_memorytype_is64(memory))
        return False
    finally:
        raw.wasm_exporttype_vec_delete(byref(exports))


# --- traps ----------------------------------------------------------------------------------------

_MAX_FRAMES: Final = 32
_MAX_NAME: Final = 200
_TRAP_KINDS: Final[dict[int, str]] = {
    code.value: code.name.removeprefix("WASMTIME_TRAP_CODE_").removeprefix("WASMTIME_TRAP_").lower()
    for code in raw.wasmtime_trap_code_enum
}


def trap_info(address: int, outermost: str) -> TrapInfo:
    """What a trap says. ``outermost`` names the function that the host called, if it has no name."""
    trap = ctypes.cast(address, ctypes.POINTER(raw.wasm_trap_t))
    code = c_uint8()
    kind = _TRAP_KINDS.get(code.value, "unknown") if raw.wasmtime_trap_code(trap, byref(code)) else "host"
    text = ffi.wasm_byte_vec_t()
    raw.wasm_trap_message(trap, byref(text))
    message = _take_text(text).strip()
    # Wasmtime writes a backtrace in front of the cause; the frames are given separately.
    message = message.rpartition("Caused by:")[2].strip() or message
    frames = raw.wasm_frame_vec_t()
    raw.wasm_trap_trace(trap, byref(frames))
    names: list[str] = []
    for at in range(frames.size):
        label = _frame_text(frames.data[at], outermost if at == frames.size - 1 else None)
        if label is not None:
            names.append(label)
        if len(names) == _MAX_FRAMES:
            break
    raw.wasm_frame_vec_delete(byref(frames))
    return TrapInfo(kind, message.removeprefix("wasm trap: ")[:500], tuple(names))


def _frame_text(frame: Any, known: str | None) -> str | None:
    """A line of a backtrace, or None for a function that the host's compiler put into the module."""
    name = raw.wasmtime_frame_func_name(frame)
    if name:
        text = ctypes.string_at(name.contents.data, min(name.contents.size, 4 * _MAX_NAME))
        if text.startswith(HELPER_PREFIX):
            return None
        # Printable, and one line: the name is the guest's choice and ends up in terminals and logs.
        label = "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace")[:_MAX_NAME])
    else:
        label = known or f"function {raw.wasm_frame_func_index(frame)}"
    # The compiled code is that of the module as rewritten; the offset is that of the one uploaded.
    return f"{label} (0x{max(0, raw.wasm_frame_module_offset(frame) - CODE_SHIFT):x})"
