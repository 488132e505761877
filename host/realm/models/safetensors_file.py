"""The safetensors container: a bounded reader of hostile headers and a streaming writer.

The library's own reader is used to load models; imports need a check that names the tensor and a
writer that never holds more than one piece of one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import msgspec
import numpy as np
import numpy.typing as npt

from realm.errors import RealmError

MAX_HEADER = 100_000_000
"""Largest header in bytes that the format allows."""

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one element, for the types a weight may have."""
OUTPUT_TYPES = {"bfloat16": "BF16", "float32": "F32"}
"""Our names for the types that an import can store."""

PIECE = 8 << 20
"""Elements converted at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file. ``start`` and ``end`` are bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def invalid(tensor: str, problem: str) -> RealmError:
    """``model_invalid`` that names a tensor."""
    return RealmError("model_invalid", f"tensor {tensor} {problem}", details={"tensor": tensor})


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, each checked to lie inside it.

    Raises:
        RealmError: ``model_invalid`` naming the file, or the tensor and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                raise _bad_file(path, f"its header claims {length} bytes; the file has {size}")
            header = msgspec.json.decode(file.read(length), type=dict[str, Any])
    except OSError as error:
        raise _bad_file(path, str(error)) from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _bad_file(path, f"its header is not a JSON object: {error}") from error
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < end:
            raise invalid(name, "overlaps another tensor")
        end = tensor.end
    return tensors


def _bad_file(path: Path, problem: str) -> RealmError:
    return RealmError("model_invalid", f"{path.name} cannot be read: {problem}", details={"field": path.name})


def _stored(name: str, entry: Any, data: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise invalid(name, "has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise invalid(name, f"has dtype {dtype!r}; supported are {', '.join(ITEM_SIZES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise invalid(name, f"has shape {str(shape)[:100]}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise invalid(name, f"has data_offsets {str(offsets)[:100]}")
    bytes_needed = ITEM_SIZES[dtype]
    for extent in shape:
        bytes_needed *= extent
    start, end = offsets
    if end - start != bytes_needed or data + end > size:
        raise invalid(
            name, f"needs {bytes_needed} bytes, lies at {start} to {end}, and the file has {max(size - data, 0)}"
        )
    return StoredTensor(dtype, tuple(shape), data + start, data + end)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in value
    )


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of ``values`` (finite) rounded to bfloat16, to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits: exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Writer:
    """Writes tensors one after another, in the order in which they were declared.

    Args:
        path: a new file.
        shapes: name and shape of every tensor.
        dtype: ``bfloat16`` or ``float32``.
    """

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
        self._dtype = OUTPUT_TYPES[dtype]
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        self._sizes: dict[str, int] = {}
        for name, shape in shapes.items():
            size = ITEM_SIZES[self._dtype] * int(np.prod(shape, dtype=object))
            header[name] = {"dtype": self._dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            self._sizes[name] = size
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file: BinaryIO = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._order = iter(list(shapes))

    def write(self, name: str, pieces: Iterable[npt.NDArray[np.float32]]) -> None:
        """Write the next tensor from flat float32 pieces, rounded to the file's type.

        Raises:
            RealmError: ``model_invalid`` if a value is not finite.
        """
        if next(self._order) != name:
            raise ValueError(f"{name} is out of order")
        written = 0
        for piece in pieces:
            data: npt.NDArray[Any] = np.ascontiguousarray(piece, dtype="<f4")
            if not np.isfinite(data).all():
                raise invalid(name, "has values that are not finite")
            if self._dtype == "BF16":
                data = to_bfloat16(data)
                # Rounding up the largest float32 values gives infinity.
                if ((data & 0x7F80) == 0x7F80).any():
                    raise invalid(name, "has values outside the range of bfloat16")
            written += self._file.write(data.data)
        if written != self._sizes[name]:
            raise ValueError(f"{name} has {written} bytes instead of {self._sizes[name]}")

    def close(self) -> None:
        """Flush to disk and close.

        Raises:
            ValueError: a declared tensor was not written.
        """
        missing = next(self._order, None)
        if missing is not None:
            raise ValueError(f"{missing} was not written")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close a file that is not complete."""
        self._file.close()
