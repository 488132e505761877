"""WASM guests as fibers: Wasmtime's async C API in a few small classes. With :mod:`capi` the only ctypes.

A :class:`Fiber` is one store, one instance and at most one call in flight. :meth:`Fiber.poll` runs
the guest until it ends, waits inside a host function, or has used up its slice. Nothing here
blocks, and no OS thread belongs to a guest.

Rules that the C API leaves to its caller, and how they are kept:

* One thread drives all fibers of a process, so ``_running`` (set around each poll) says which
  guest a host function serves.
* Host functions run on the guest's own stack of :data:`HOST_STACK` bytes: they decode, enqueue and
  return. Deep or slow work is done by the caller of ``poll`` while the guest waits.
* No exception may pass through C frames. A handler's exception ends that guest alone.
* A memory's base is fixed by the engine's settings (it grows in place inside its reservation), and
  its size is fetched again before any access is refused; see :class:`Memory`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
from ctypes import byref, c_uint64, c_void_p
from typing import Any, Final, Literal

import wasmtime
from wasmtime import _bindings as raw
from wasmtime import _ffi as ffi

from realm.guests import capi
from realm.guests.capi import WINDOW, check
from realm.guests.fiber_types import (
    CALLS_A_SLICE,
    FUEL_SLICE,
    SETTINGS,
    EngineFailure,
    FiberState,
    GuestExit,
    Handler,
    TrapInfo,
    ValueType,
)
from realm.guests.memory import Memory

log = logging.getLogger("realm.guests")

_CONTINUATION: Final = struct.Struct("<QQQ")
_I32_RESULT: Final = struct.Struct("<qi")
_I64_RESULT: Final = struct.Struct("<qq")
_POINTER: Final = struct.Struct("<Q")
_VALUE_FORMAT: Final[dict[str, str]] = {"i32": "8xi20x", "u32": "8xI20x", "i64": "8xq16x", "u64": "8xQ16x"}

_running: Fiber | None = None
# KeyboardInterrupt and the like that struck inside a host function: raised again after the poll.
_struck: BaseException | None = None


def _may_resume(_env: int | None) -> bool:
    """Asked by Wasmtime in each poll of a guest inside a host function: may it go on?"""
    fiber = _running
    if fiber is None or fiber.waiting:
        return False
    if fiber._held:
        fiber._held = False
        return False
    return True


_resume: Final = capi.ResumeCallback(_may_resume)
_RESUME_ADDRESS: Final = ctypes.cast(_resume, c_void_p).value


# --- engine, linker, module ---------------------------------------------------------------------


class Engine:
    """Wasmtime's engine with Realm's settings. One per process is enough."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        for name, value in SETTINGS.items():
            getattr(raw, f"wasmtime_config_{name}_set")(config.ptr(), value)
        self.inner = wasmtime.Engine(config)
        self.address = ctypes.cast(self.inner.ptr(), c_void_p).value


class Linker:
    """The host functions, defined once per process and shared by all modules."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inner = wasmtime.Linker(engine.inner)
        self.address = ctypes.cast(self._inner.ptr(), c_void_p).value
        self._kept: list[Any] = []

    def define(
        self,
        module: str,
        name: str,
        parameters: tuple[ValueType, ...],
        result: Literal["i32", "i64"] | None,
        handler: Handler,
    ) -> None:
        """Make ``handler`` importable as ``module.name``."""
        types = {"32": wasmtime.ValType.i32, "64": wasmtime.ValType.i64}
        kind = wasmtime.FuncType([types[p[1:]]() for p in parameters], [types[result[1:]]()] if result else [])
        callback = capi.HostCallback(_host_function(f"{module}.{name}", parameters, result, handler))
        self._kept.append(callback)
        module_name, function_name = module.encode(), name.encode()
        names = (module_name, len(module_name), function_name, len(function_name))
        code = (ctypes.cast(kind.ptr(), c_void_p), ctypes.cast(callback, c_void_p))
        check(capi.define_async(self.address, *names, *code, None, None))

    def link(self, code: Code) -> LinkedModule:
        """Resolve a module's imports."""
        pre = c_void_p()
        check(capi.instantiate_pre(self.address, code.address, byref(pre)))
        return LinkedModule(self._engine, self, pre)


class Code:
    """Native code that this host's own compiler wrote; never give it a tenant's bytes.

    Made from bytes, not from a file, so that what was checked is what runs. Any thread may make one.

    Attributes:
        wide: the module's memory is a 64-bit one.
    """

    def __init__(self, engine: Engine, artifact: bytes) -> None:
        self._module = c_void_p()
        check(capi.deserialize(engine.address, artifact, len(artifact), byref(self._module)))
        self.wide = capi.has_wide_memory(self._module)

    @property
    def address(self) -> c_void_p:
        if not self._module:
            raise EngineFailure("the code is closed")
        return self._module

    def close(self) -> None:
        """Free it; modules that were linked keep what they need. Idempotent."""
        module, self._module = self._module, c_void_p()
        if module:
            capi.module_delete(module)


class LinkedModule:
    """A compiled module with its imports resolved: ready to be started any number of times."""

    def __init__(self, engine: Engine, linker: Linker, pre: c_void_p) -> None:
        self.engine = engine
        self._linker = linker  # its callbacks must outlive every instance
        self._pre = pre

    @property
    def address(self) -> c_void_p:
        if not self._pre:
            raise EngineFailure("the module is closed")
        return self._pre

    def close(self) -> None:
        """Free it; running guests keep what they need. Idempotent."""
        pre, self._pre = self._pre, c_void_p()
        if pre:
            capi.pre_delete(pre)


def _host_function(name: str, parameters: tuple[ValueType, ...], result: str | None, handler: Handler) -> Any:
    """The C callback of one host function: as little as possible, because every token passes here."""
    unpack_from = struct.Struct("<" + "".join(_VALUE_FORMAT[p] for p in parameters)).unpack_from
    some = bool(parameters)
    layout = None if result is None else _I64_RESULT if result == "i64" else _I32_RESULT
    kind = 1 if result == "i64" else 0

    def callback(_e: Any, caller: int, args: int, _a: int, results: int, _r: int, trap: int, continuation: int) -> None:
        global _struck
        fiber = _running
        assert fiber is not None
        try:
            _CONTINUATION.pack_into(WINDOW, continuation, _RESUME_ADDRESS, 0, 0)
            if not fiber._memory_at:
                fiber._find_memory(caller)
            value = handler(fiber.guest, unpack_from(WINDOW, args) if some else ())
            if value is None:
                fiber.waiting = True
                fiber._result_at, fiber._result_layout, fiber._result_kind = results, layout, kind
                return
            if layout is not None:
                layout.pack_into(WINDOW, results, kind, value)
            fiber._calls -= 1
            if fiber._calls <= 0:
                fiber._held = True
        except GuestExit as leaving:
            fiber.exit_code = leaving.code
            _set_trap(trap, "the guest has left")
        except BaseException as error:
            if not isinstance(error, Exception):
                _struck = error
            else:
                log.exception("host function %s failed; its guest is ended", name)
            fiber.host_failed = True
            _set_trap(trap, "the host function failed")

    return callback


def _set_trap(slot: int, text: str) -> None:
    message = text.encode()
    _POINTER.pack_into(WINDOW, slot, capi.trap_new(message, len(message)))


# --- fibers -------------------------------------------------------------------------------------


class Fiber:
    """One guest.

    Args:
        module: what to run.
        guest: given to the handlers of host functions.
        fuel: units the guest may burn. memory_bytes, table_elements: the most it may have.

    Attributes:
        waiting: inside a host function, without a result so far.
        result: what ``run`` returned, once done.
        trap: why it died, once trapped.
        host_failed: it died because a handler raised.
    """

    # fmt: off
    __slots__ = (
        "_calls", "_context", "_error", "_export", "_final_bytes", "_future", "_held", "_instance", "_memory_at",
        "_memory_export", "_phase", "_result_at", "_result_kind", "_result_layout", "_results", "_store", "_trap",
        "exit_code", "guest", "host_failed", "memory", "result", "trap", "waiting",
    )
    # fmt: on

    def __init__(
        self, module: LinkedModule, guest: object, *, fuel: int, memory_bytes: int, table_elements: int
    ) -> None:
        self.guest = guest
        self.memory = Memory(WINDOW)
        self.waiting = False
        self.result = 0
        self.exit_code: int | None = None
        self.trap: TrapInfo | None = None
        self.host_failed = self._held = False
        self._calls = self._result_at = self._result_kind = self._memory_at = self._final_bytes = 0
        self._result_layout: struct.Struct | None = None
        self._phase = "instantiate"
        self._memory_export: Any = None
        self._export: Any = None
        self._trap, self._error = c_void_p(), c_void_p()
        self._instance = raw.wasmtime_instance_t()
        self._results = (ffi.wasmtime_val_t * 1)()
        self._future: int | None = None
        address = module.address
        self._store: int | None = capi.store_new(module.engine.address, None, None)
        self._context: int = capi.store_context(self._store)
        try:
            capi.store_limiter(self._store, memory_bytes, table_elements, 1, 16, 1)
            check(capi.set_fuel(self._context, fuel))
            check(capi.yield_interval(self._context, FUEL_SLICE))
            self._future = capi.instantiate(
                address, self._context, byref(self._instance), byref(self._trap), byref(self._error)
            )
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return self._store is None

    def poll(self) -> FiberState:
        """Run the guest for at most one slice.

        Raises:
            EngineFailure: the fiber is closed or has ended.
        """
        global _running, _struck
        if self.waiting:
            return FiberState.WAITING
        if self._future is None:
            raise EngineFailure("the fiber has ended")
        if _running is not None:
            raise EngineFailure("a guest cannot be run from inside a host function")
        self._calls = CALLS_A_SLICE
        while True:
            _running = self
            try:
                done = capi.poll(self._future)
            finally:
                _running = None
            if _struck is not None:
                error, _struck = _struck, None
                raise error
            if not done:
                return FiberState.WAITING if self.waiting else FiberState.YIELDED
            state = self._phase_over()
            if state is not None:
                return state

    def resume(self, value: int) -> None:
        """Give the host function that the guest waits in its result; the next poll continues."""
        if not self.waiting:
            raise EngineFailure("the fiber is not waiting")
        if self._result_layout is not None:
            self._result_layout.pack_into(WINDOW, self._result_at, self._result_kind, value)
        self.waiting = False

    def give_way(self) -> None:
        """For handlers: their guest's slice is over with this call, however many it may still make."""
        self._calls = 0

    @property
    def fuel(self) -> int:
        """Fuel that is left."""
        fuel = c_uint64()
        check(capi.get_fuel(self._open(), byref(fuel)))
        return fuel.value

    @fuel.setter
    def fuel(self, value: int) -> None:
        check(capi.set_fuel(self._open(), value))

    def _open(self) -> int:
        if self._store is None:
            raise EngineFailure("the fiber is closed")
        return self._context

    @property
    def memory_bytes(self) -> int:
        """Size of the guest's memory, which never shrinks."""
        return self._final_bytes if self._store is None else self.memory.size

    def close(self) -> None:
        """End the guest wherever it is and free all it has. Idempotent; never inside a poll."""
        if _running is self:
            raise EngineFailure("a fiber cannot be closed from inside")
        future, self._future = self._future, None
        if future:
            # Unwinds a suspended guest's stack.
            capi.delete_future(future)
        store, self._store = self._store, None
        if store:
            self._final_bytes = self.memory.size
            self.memory.detach()
            capi.store_delete(store)
        self.waiting = False
        self._drop_trap()

    # --- inside -----------------------------------------------------------------------------------

    def _find_memory(self, caller: int) -> None:
        """A start function calls the host before the instance is known out here."""
        export = raw.wasmtime_extern_t()
        if capi.caller_export_get(caller, b"memory", 6, byref(export)):
            self._keep_memory(export)

    def _keep_memory(self, export: Any) -> None:
        if export.kind != ffi.WASMTIME_EXTERN_MEMORY.value:
            raw.wasmtime_extern_delete(byref(export))
            return
        self._memory_export = export
        self._memory_at = ctypes.addressof(export.of)
        base = capi.memory_data(self._context, self._memory_at) or 0
        self.memory.attach(base, functools.partial(capi.memory_size, self._context, self._memory_at))

    def _phase_over(self) -> FiberState | None:
        """A call has ended: begin the next one (None), or say how the guest ended."""
        if self._future:
            capi.delete_future(self._future)
            self._future = None
        if self._trap or self._error:
            return self._ended_badly()
        if self._phase == "run":
            self.result = self._results[0].of.i32
            return FiberState.DONE
        if self._phase == "instantiate":
            if not self._memory_at:
                export = self._exported(b"memory")
                if export is not None:
                    self._keep_memory(export)
            self._phase = "_initialize"
            if self._begin(b"_initialize", 0):
                return None
        self._phase = "run"
        if not self._begin(b"run", 1):
            self.trap = TrapInfo("no_run", "the module exports no function run")
            return FiberState.TRAPPED
        return None

    def _exported(self, name: bytes) -> Any:
        export = raw.wasmtime_extern_t()
        if not capi.export_get(self._context, byref(self._instance), name, len(name), byref(export)):
            return None
        return export

    def _begin(self, name: bytes, results: int) -> bool:
        export = self._exported(name)
        if export is None:
            return False
        if export.kind != ffi.WASMTIME_EXTERN_FUNC.value:
            raw.wasmtime_extern_delete(byref(export))
            return False
        self._export = export
        function, ends = ctypes.addressof(export.of), (byref(self._trap), byref(self._error))
        self._future = capi.call(self._context, function, None, 0, self._results, results, *ends)
        return True

    def _ended_badly(self) -> FiberState:
        if self.exit_code is not None:
            self.result = self.exit_code
            self._drop_trap()
            return FiberState.DONE
        if self._trap.value:
            self.trap = capi.trap_info(self._trap.value, "start" if self._phase == "instantiate" else self._phase)
        else:
            message = capi.error_text(self._error.value or 0)
            self._error = c_void_p()
            kind = "memory_limit" if "limit" in message else "instantiation"
            if "mmap failed" in message or "os error 12" in message:
                # ENOMEM: the process has no mapping or memory left for a stack or a guest's memory.
                kind = "no_room"
            self.trap = TrapInfo(kind, message.splitlines()[0] if message else "the module cannot be started")
        self._drop_trap()
        return FiberState.TRAPPED

    def _drop_trap(self) -> None:
        trap, self._trap = self._trap, c_void_p()
        if trap:
            capi.trap_delete(trap)
        error, self._error = self._error, c_void_p()
        if error.value:
            capi.error_text(error.value)
