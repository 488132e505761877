"""What the tables of :mod:`realm.guests.abi` are made of: structs, parameters and functions."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal


class ErrorCode(enum.IntEnum):
    """Negative results of host functions. The doc of each is in :data:`realm.guests.abi.ERROR_DOCS`."""

    INVALID_ARGUMENT = -1
    BAD_POINTER = -2
    BAD_HANDLE = -3
    NOT_SUPPORTED = -4
    CONTEXT_FULL = -5
    LIMIT = -6
    NOT_FOUND = -7
    NO_LOGITS = -8
    TIMED_OUT = -9
    CLOSED = -10
    OUT_OF_MEMORY = -11
    BAD_UTF8 = -12
    INTERNAL = -13


# --- structs --------------------------------------------------------------------------------------

FieldKind = Literal["i32", "u32", "u64", "f32"]


@dataclass(frozen=True)
class Field:
    name: str
    kind: FieldKind
    doc: str


@dataclass(frozen=True)
class StructType:
    """A C struct: fields in order, naturally aligned, no implicit padding (checked on import)."""

    name: str
    doc: str
    fields: tuple[Field, ...]

    @property
    def format(self) -> str:
        """The :mod:`struct` format, little-endian."""
        return "<" + "".join({"i32": "i", "u32": "I", "u64": "Q", "f32": "f"}[f.kind] for f in self.fields)

    @property
    def size(self) -> int:
        return sum(8 if f.kind == "u64" else 4 for f in self.fields)

    def __post_init__(self) -> None:
        offset = 0
        for f in self.fields:
            width = 8 if f.kind == "u64" else 4
            if offset % width:
                raise ValueError(f"{self.name}.{f.name} is not aligned")
            offset += width
        if offset % max(8 if f.kind == "u64" else 4 for f in self.fields):
            raise ValueError(f"{self.name} needs padding at its end")


# --- parameters and functions ---------------------------------------------------------------------

ScalarKind = Literal["i32", "u32", "i64", "u64"]
Element = Literal["u8", "u32", "f32"]


@dataclass(frozen=True)
class Scalar:
    """One WASM parameter. ``low``/``high`` are checked (inclusive), read as the kind says."""

    name: str
    kind: ScalarKind
    doc: str
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class Handle:
    """One ``i32``: a sequence of this guest."""

    name: str
    doc: str = "sequence handle"


@dataclass(frozen=True)
class Input:
    """Two WASM parameters, pointer and count of ``element``: read by the host before it returns.

    ``element`` is a scalar type or a struct; ``low``/``high`` bound the count (inclusive);
    ``utf8`` demands valid UTF-8.
    """

    name: str
    element: Element | StructType
    doc: str
    count: str = "len"
    low: int = 0
    high: int = 1 << 24
    utf8: bool = False


@dataclass(frozen=True)
class Output:
    """Two WASM parameters, pointer and capacity in ``element``: written before the call returns."""

    name: str
    element: Element | StructType
    doc: str
    capacity: str = "cap"
    high: int = 1 << 26


@dataclass(frozen=True)
class InOut:
    """Two WASM parameters, pointer and count of a struct: read, then its answer fields written."""

    name: str
    element: StructType
    doc: str
    count: str = "count"
    low: int = 1
    high: int = 1024


@dataclass(frozen=True)
class StructIn:
    """One pointer to a struct that the host reads; 0 means "not given" where ``optional``."""

    name: str
    struct: StructType
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class StructOut:
    """One pointer to a struct that the host writes; 0 means "not wanted" where ``optional``."""

    name: str
    struct: StructType
    doc: str
    optional: bool = False


Parameter = Scalar | Handle | Input | Output | InOut | StructIn | StructOut


@dataclass(frozen=True)
class Function:
    """One host function.

    Attributes:
        suspends: the guest's fiber may wait inside; others' guests run meanwhile.
        result: WASM result type. returns: what a non-negative result means.
        errors: codes beyond the ones that the parameters' checks give.
    """

    name: str
    group: str
    doc: str
    parameters: tuple[Parameter, ...]
    returns: str
    suspends: bool = False
    result: Literal["i32", "i64"] = "i32"
    errors: tuple[ErrorCode, ...] = field(default=())
