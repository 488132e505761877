"""A reader of GGUF headers that trusts nothing.

The ``gguf`` package's reader believes every count and length in the file; a hostile header makes
it allocate without bound or fail anywhere. Here each number is checked against the file's size
before it is used, and each error names the field or tensor. Quantized blocks are left to the
package (:func:`gguf.quants.dequantize`).

Layout: magic, version, tensor count, key count, keys with typed values, tensor descriptions,
padding to the alignment, tensor data. All little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from realm.errors import RealmError
from realm.models.safetensors_file import invalid

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME = 65_535
MAX_STRING = 16 << 20
MAX_ITEMS = 1 << 23
"""Most elements of one array: twice the largest vocabulary that a model may have."""
MAX_ELEMENTS = 1 << 40
"""Most elements of one tensor."""
MAX_ALIGNMENT = 1 << 20

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor. ``shape`` has the slowest dimension first; ``start`` is a byte offset in the file."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    start: int
    size: int


class GgufFile:
    """A GGUF file, mapped, its header read and checked.

    Attributes:
        fields: metadata by key: int, float, bool, str, numpy array, or list of str.
        tensors: by name, in the file's order.

    Raises:
        RealmError: ``model_invalid`` naming the field or the tensor; ``model_unsupported`` for a
            version or byte order that is not read.
    """

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            if size < 24:
                raise _invalid("header", f"is truncated: the file has {size} bytes")
            self._data: npt.NDArray[np.uint8] = np.memmap(path, mode="r", dtype=np.uint8)
        except OSError as error:
            raise _invalid("file", f"cannot be read: {error}") from error
        self._view = self._data.data
        self._size = size
        self._at = 0
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        self._read_header()

    def rows(self, tensor: GgufTensor, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Raw bytes of rows ``first`` to ``last`` (a row is the fastest dimension): [rows, bytes of a row]."""
        count = 1
        for extent in tensor.shape[:-1]:
            count *= extent
        width = tensor.size // count
        data = self._data[tensor.start + first * width : tensor.start + last * width]
        return data.reshape(last - first, width)

    def close(self) -> None:
        """Let go of the map."""
        self._view.release()

    def _read_header(self) -> None:
        if bytes(self._take(4, "magic")) != b"GGUF":
            raise _invalid("magic", "is not GGUF")
        version = self._integer("<I", "version")
        if version & 0xFFFF == 0:
            raise _unsupported("version", "is of a big-endian file; only little-endian files are read")
        if version not in (2, 3):
            raise _unsupported("version", f"is {version}; 2 and 3 are read")
        tensor_count = self._count("tensor_count", MAX_TENSORS, 24)
        key_count = self._count("kv_count", MAX_KEYS, 13)
        for number in range(key_count):
            key = self._string(f"key {number}", MAX_NAME)
            if not key:
                raise _invalid(f"key {number}", "has no name")
            if key in self.fields:
                raise _invalid(key, "is there twice")
            self.fields[key] = self._value(key, self._integer("<I", key))
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _invalid("general.alignment", f"is {alignment!r}; a power of two up to {MAX_ALIGNMENT} is needed")
        found = [self._description(number) for number in range(tensor_count)]
        data = self._at + -self._at % alignment
        for name, shape, kind, offset in found:
            if name in self.tensors:
                raise invalid(name, "is there twice")
            self.tensors[name] = self._place(name, shape, kind, offset, data, alignment)
        end = data
        for tensor in sorted(self.tensors.values(), key=lambda t: t.start):
            if tensor.start < end:
                raise invalid(tensor.name, "overlaps another tensor")
            end = tensor.start + tensor.size

    def _take(self, size: int, what: str) -> memoryview:
        if size > self._size - self._at:
            raise _invalid(
                what, f"is truncated: it needs {size} bytes at {self._at}, and the file has {self._size} bytes"
            )
        self._at += size
        return self._view[self._at - size : self._at]

    def _integer(self, form: str, what: str) -> int:
        value: int = struct.unpack(form, self._take(struct.calcsize(form), what))[0]
        return value

    def _count(self, what: str, most: int, least_bytes: int) -> int:
        """A count of things of at least ``least_bytes`` bytes each, which must still fit into the file."""
        count = self._integer("<Q", what)
        room = (self._size - self._at) // least_bytes
        if count > most or count > room:
            raise _invalid(what, f"is {count}; at most {min(most, room)} fit into the file and its limits")
        return count

    def _string(self, what: str, most: int) -> str:
        size = self._integer("<Q", what)
        if size > most:
            raise _invalid(what, f"has a text of {size} bytes; the limit is {most}")
        try:
            return str(self._take(size, what), "utf-8")
        except UnicodeDecodeError as error:
            raise _invalid(what, "is not UTF-8") from error

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(key, MAX_STRING)
        if kind == _ARRAY:
            item = self._integer("<I", key)
            if item == _STRING:
                return [self._string(key, MAX_NAME) for _ in range(self._count(key, MAX_ITEMS, 8))]
            if item not in _SCALARS:
                raise _invalid(key, f"is an array of type {item}")
            dtype = np.dtype(_SCALARS[item])
            count = self._count(key, MAX_ITEMS, dtype.itemsize)
            return np.frombuffer(self._take(count * dtype.itemsize, key), dtype=dtype).copy()
        if kind not in _SCALARS:
            raise _invalid(key, f"has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._take(dtype.itemsize, key), dtype=dtype)[0].item()

    def _description(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f"tensor {number}", MAX_NAME)
        if not name:
            raise _invalid(f"tensor {number}", "has no name")
        dimensions = self._integer("<I", f"tensor {name}")
        if not 1 <= dimensions <= 4:
            raise invalid(name, f"has {dimensions} dimensions; 1 to 4 are possible")
        shape = tuple(reversed([self._integer("<Q", f"tensor {name}") for _ in range(dimensions)]))
        return name, shape, self._integer("<I", f"tensor {name}"), self._integer("<Q", f"tensor {name}")

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, alignment: int
    ) -> GgufTensor:
        elements = 1
        for extent in shape:
            elements *= extent
        if not 0 < elements <= MAX_ELEMENTS:
            raise invalid(name, f"has shape {list(shape)}")
        try:
            quantization = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[quantization]
        except (ValueError, KeyError) as error:
            raise invalid(name, f"has the unknown type {kind}") from error
        if shape[-1] % block:
            raise invalid(name, f"has rows of {shape[-1]}, which blocks of {block} ({quantization.name}) do not fill")
        size = elements // block * block_bytes
        if offset % alignment:
            raise invalid(name, f"lies at {offset}, which is no multiple of the alignment {alignment}")
        if data + offset + size > self._size:
            raise invalid(
                name, f"is truncated: it needs {size} bytes at {data + offset}, and the file has {self._size} bytes"
            )
        return GgufTensor(name, shape, quantization, data + offset, size)


def _invalid(field: str, problem: str) -> RealmError:
    return RealmError("model_invalid", f"GGUF: {field} {problem}", details={"field": field})


def _unsupported(field: str, problem: str) -> RealmError:
    return RealmError("model_unsupported", f"GGUF: {field} {problem}", details={"field": field})
