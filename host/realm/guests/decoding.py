"""Decodes and checks the arguments of host functions, driven by the tables in :mod:`abi`.

For each function a tuple of small steps is made once; a call runs them in order and gives the
method of :mod:`hostcalls` values that it can trust:

=================  ====================================================================
parameter          value
=================  ====================================================================
``Scalar``         int in range
``Handle``         the guest's :class:`~realm.guests.sequences.GuestSequence`
``Input``          ``bytes`` (``str`` where ``utf8``), or a list of tuples for structs
``Output``         :class:`Room`: pointer and capacity, inside the memory
``InOut``          :class:`Rows`: pointer and the structs as tuples
``StructIn``       the struct's ``bytes``, or None
``StructOut``      pointer, or 0
=================  ====================================================================

What is copied is charged before it is read: a call that is refused has cost the host as much.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from realm.guests import abi
from realm.guests.abi import ErrorCode
from realm.guests.deferral import COPY_FUEL
from realm.guests.fiber_types import OutOfBounds, ValueType

if TYPE_CHECKING:
    from realm.guests.run import GuestRun

Step = Callable[["GuestRun", tuple[int, ...]], Any]

ELEMENT_SIZE = {"u8": 1, "u32": 4, "f32": 4}
LAYOUTS = {s.name: struct.Struct(s.format) for s in abi.STRUCTS}


class Refused(Exception):
    """The call gives an error code; ``text`` says what is wrong, for the run's log."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Room(NamedTuple):
    """Where a result may be written: ``capacity`` elements at ``pointer``."""

    pointer: int
    capacity: int


class Rows(NamedTuple):
    """Structs that are read and answered in place."""

    pointer: int
    rows: list[tuple[Any, ...]]


def value_types(function: abi.Function, wide: bool = False) -> tuple[ValueType, ...]:
    """How each WASM parameter of a host function is read; ``wide`` is for 64-bit memories."""
    address: ValueType = "u64" if wide else "u32"
    types: list[ValueType] = []
    for p in function.parameters:
        if isinstance(p, abi.Scalar):
            types.append(p.kind)
        elif isinstance(p, abi.Handle):
            types.append("i32")
        elif isinstance(p, abi.Input | abi.Output | abi.InOut):
            types += [address, address]
        else:
            types.append(address)
    return tuple(types)


def compile_steps(function: abi.Function) -> tuple[Step, ...]:
    """One step a parameter, in order."""
    steps: list[Step] = []
    at = 0
    for p in function.parameters:
        match p:
            case abi.Scalar():
                steps.append(_scalar(p, at))
            case abi.Handle():
                steps.append(_handle(p, at))
            case abi.Input():
                steps.append(_input(p, at))
            case abi.Output():
                steps.append(_output(p, at))
            case abi.InOut():
                steps.append(_in_out(p, at))
            case abi.StructIn():
                steps.append(_struct_in(p, at))
            case abi.StructOut():
                steps.append(_struct_out(p, at))
        at += 2 if isinstance(p, abi.Input | abi.Output | abi.InOut) else 1
    return tuple(steps)


def joined(steps: tuple[Step, ...]) -> Callable[[GuestRun, tuple[int, ...]], Sequence[Any]]:
    """All steps as one. Those of the calls behind every token are written out: a loop takes 0.3 us."""
    if len(steps) == 1:
        (a,) = steps
        return lambda run, values: (a(run, values),)
    if len(steps) == 4:
        a, b, c, d = steps
        return lambda run, values: (a(run, values), b(run, values), c(run, values), d(run, values))
    return lambda run, values: [step(run, values) for step in steps]


def _outside(name: str, pointer: int, size: int, run: GuestRun) -> Refused:
    return Refused(
        ErrorCode.BAD_POINTER,
        f"{name}: {size} bytes at {pointer} reach outside the memory of {run.memory.size} bytes",
    )


def _scalar(p: abi.Scalar, at: int) -> Step:
    low, high = p.low, p.high

    def step(run: GuestRun, values: tuple[int, ...]) -> int:
        value = values[at]
        if (low is not None and value < low) or (high is not None and value > high):
            raise Refused(
                ErrorCode.INVALID_ARGUMENT,
                f"{p.name} is {value}; it must be {'any' if low is None else low}..{'any' if high is None else high}",
            )
        return value

    return step


def _handle(p: abi.Handle, at: int) -> Step:
    def step(run: GuestRun, values: tuple[int, ...]) -> Any:
        sequence = run.sequences.get(values[at])
        if sequence is None:
            raise Refused(ErrorCode.BAD_HANDLE, f"{p.name}: {values[at]} is no sequence of this run")
        return sequence

    return step


def _count_error(name: str, value: int, low: int, high: int) -> Refused:
    return Refused(ErrorCode.INVALID_ARGUMENT, f"{name} is {value}; it must be {low}..{high}")


def _input(p: abi.Input, at: int) -> Step:
    name, count_name, low, high, utf8 = p.name, p.count, p.low, p.high, p.utf8
    if isinstance(p.element, abi.StructType):
        layout = LAYOUTS[p.element.name]
        size = layout.size
        fuel = COPY_FUEL * size

        def structs(run: GuestRun, values: tuple[int, ...]) -> list[tuple[Any, ...]]:
            pointer, count = values[at], values[at + 1]
            if not low <= count <= high:
                raise _count_error(count_name, count, low, high)
            run.debt += fuel * count
            try:
                return list(layout.iter_unpack(run.memory.read(pointer, count * size)))
            except OutOfBounds:
                raise _outside(name, pointer, count * size, run) from None

        return structs
    size = ELEMENT_SIZE[p.element]
    fuel = COPY_FUEL * size

    def plain(run: GuestRun, values: tuple[int, ...]) -> bytes | str:
        pointer, count = values[at], values[at + 1]
        if not low <= count <= high:
            raise _count_error(count_name, count, low, high)
        run.debt += fuel * count
        try:
            data = run.memory.read(pointer, count * size)
        except OutOfBounds:
            raise _outside(name, pointer, count * size, run) from None
        if not utf8:
            return data
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise Refused(ErrorCode.BAD_UTF8, f"{name} is not UTF-8 at byte {error.start}") from None

    return plain


def _output(p: abi.Output, at: int) -> Step:
    size = LAYOUTS[p.element.name].size if isinstance(p.element, abi.StructType) else ELEMENT_SIZE[p.element]
    name, capacity_name, high = p.name, p.capacity, p.high

    def step(run: GuestRun, values: tuple[int, ...]) -> Room:
        pointer, capacity = values[at], values[at + 1]
        if capacity > high:
            raise _count_error(capacity_name, capacity, 0, high)
        try:
            run.memory.check(pointer, capacity * size)
        except OutOfBounds:
            raise _outside(name, pointer, capacity * size, run) from None
        return Room(pointer, capacity)

    return step


def _in_out(p: abi.InOut, at: int) -> Step:
    layout = LAYOUTS[p.element.name]
    name, count_name, low, high = p.name, p.count, p.low, p.high
    fuel = COPY_FUEL * layout.size

    def step(run: GuestRun, values: tuple[int, ...]) -> Rows:
        pointer, count = values[at], values[at + 1]
        if not low <= count <= high:
            raise _count_error(count_name, count, low, high)
        run.debt += fuel * count
        try:
            return Rows(pointer, list(layout.iter_unpack(run.memory.read(pointer, count * layout.size))))
        except OutOfBounds:
            raise _outside(name, pointer, count * layout.size, run) from None

    return step


def _struct_in(p: abi.StructIn, at: int) -> Step:
    size = LAYOUTS[p.struct.name].size
    name, optional = p.name, p.optional

    def step(run: GuestRun, values: tuple[int, ...]) -> bytes | None:
        pointer = values[at]
        if pointer == 0:
            if optional:
                return None
            raise Refused(ErrorCode.BAD_POINTER, f"{name} is null")
        try:
            return run.memory.read(pointer, size)
        except OutOfBounds:
            raise _outside(name, pointer, size, run) from None

    return step


def _struct_out(p: abi.StructOut, at: int) -> Step:
    size = LAYOUTS[p.struct.name].size
    name, optional = p.name, p.optional

    def step(run: GuestRun, values: tuple[int, ...]) -> int:
        pointer = values[at]
        if pointer == 0:
            if optional:
                return 0
            raise Refused(ErrorCode.BAD_POINTER, f"{name} is null")
        try:
            run.memory.check(pointer, size)
        except OutOfBounds:
            raise _outside(name, pointer, size, run) from None
        return pointer

    return step
