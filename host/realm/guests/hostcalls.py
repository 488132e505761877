"""The host functions: one method each, of the same name as its entry in :data:`abi.FUNCTIONS`.

Arguments are decoded and checked by :mod:`decoding` before a method sees them. A method returns the
result, raises :class:`~realm.guests.decoding.Refused` for an error code, or returns None when the
guest has to wait: for the engine, the store, the client, or work that is :func:`deferred` because it
needs more stack or time than a guest's fiber should give.
"""

from __future__ import annotations

from realm.guests import abi, wasi
from realm.guests.abi import ErrorCode
from realm.guests.calls_model import ModelCalls
from realm.guests.calls_session import SessionCalls
from realm.guests.calls_text import TextCalls
from realm.guests.decoding import compile_steps, value_types
from realm.guests.fiber_types import Handler
from realm.guests.fibers import Engine, Linker
from realm.guests.run import HOST_CALL_FUEL, GuestRun


class HostCalls(ModelCalls, TextCalls, SessionCalls):
    """All host functions of ABI version 1."""


def make_handler(function: abi.Function, calls: HostCalls) -> Handler:
    """Joins the decoder made from the table with the method of the same name."""
    name, suspends = function.name, function.suspends
    steps = compile_steps(function)
    method = getattr(calls, name)

    def handler(run: GuestRun, values: tuple[int, ...]) -> int | None:
        usage = run.usage
        if not usage.host_calls:
            usage.first_call_seconds = run.runtime.clock() - run.started
        usage.host_calls += 1
        run.last_call = name
        run.debt += HOST_CALL_FUEL
        if suspends and run.closing is not None:
            return int(ErrorCode.CLOSED)
        try:
            result: int | None = method(run, *[step(run, values) for step in steps])
            return result
        except Exception as error:
            return run.failed(name, error)

    return handler


def define_host_functions(linker: Linker) -> None:
    """Make every function of the table importable from module ``realm``."""
    calls = HostCalls()
    for function in abi.FUNCTIONS:
        handler = make_handler(function, calls)
        linker.define(abi.IMPORT_MODULE, function.name, value_types(function), function.result, handler)


_shared: tuple[Engine, Linker] | None = None


def shared_linker() -> Linker:
    """The process's engine with all host functions; made once, because defining them takes milliseconds."""
    global _shared
    if _shared is None:
        engine = Engine()
        linker = Linker(engine)
        define_host_functions(linker)
        wasi.define_wasi(linker)
        _shared = (engine, linker)
    return _shared[1]
