"""The host functions: one method each, of the same name as its entry in :data:`abi.FUNCTIONS`.

Arguments are decoded and checked by :mod:`decoding` before a method sees them. A method returns the
result, raises :class:`~realm.guests.decoding.Refused` for an error code, or returns None when the
guest has to wait: for the engine, the store, the client, or work (:mod:`deferral`) that needs more
stack or time than a guest's fiber should give.
"""

from __future__ import annotations

from realm.guests import abi, wasi
from realm.guests.abi import ErrorCode
from realm.guests.calls_batch import BatchCalls
from realm.guests.calls_logits import LogitsCalls
from realm.guests.calls_model import ModelCalls
from realm.guests.calls_session import SessionCalls
from realm.guests.calls_text import TextCalls
from realm.guests.decoding import compile_steps, joined, value_types
from realm.guests.fiber_types import FUEL_SLICE, Handler
from realm.guests.fibers import Code, Engine, LinkedModule, Linker
from realm.guests.run import HOST_CALL_FUEL, GuestRun

REFUSED_FUEL = 3_000
"""What a refusal costs besides: its exception and its text take some 0.8 us."""


class HostCalls(ModelCalls, BatchCalls, LogitsCalls, TextCalls, SessionCalls):
    """All host functions of ABI version 1."""


def make_handler(function: abi.Function, calls: HostCalls) -> Handler:
    """Joins the decoder made from the table with the method of the same name."""
    name, suspends = function.name, function.suspends
    decode = joined(compile_steps(function))
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
            result: int | None = method(run, *decode(run, values))
        except Exception as error:
            run.debt += REFUSED_FUEL
            result = run.failed(name, error)
        if run.debt >= FUEL_SLICE and run.fiber is not None:
            run.fiber.give_way()
        return result

    return handler


def define_host_functions(linker: Linker, wide: bool = False) -> None:
    """Make every function of the table importable from module ``realm``; ``wide`` for 64-bit memories."""
    calls = HostCalls()
    for function in abi.FUNCTIONS:
        handler = make_handler(function, calls)
        linker.define(abi.IMPORT_MODULE, function.name, value_types(function, wide), function.result, handler)


class HostLinkers:
    """The host functions for both widths of memory; the module's own memory says which it gets.

    WASI has no signatures for 64-bit memories, so such guests do without.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._narrow, self._wide = Linker(engine), Linker(engine)
        define_host_functions(self._narrow)
        wasi.define_wasi(self._narrow)
        define_host_functions(self._wide, wide=True)

    def link(self, code: Code) -> LinkedModule:
        return (self._wide if code.wide else self._narrow).link(code)


_shared: HostLinkers | None = None


def shared_linkers() -> HostLinkers:
    """The process's engine with all host functions; made once, because defining them takes milliseconds."""
    global _shared
    if _shared is None:
        _shared = HostLinkers(Engine())
    return _shared
