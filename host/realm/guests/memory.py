"""Checked access to a guest's linear memory."""

from __future__ import annotations

import struct
from collections.abc import Callable

from realm.guests.fiber_types import OutOfBounds

_NOTHING = memoryview(bytearray())


class Memory:
    """A guest's linear memory: every access is checked as unsigned and complete, or refused.

    The engine is set so that memories grow in place, so the base is fixed; the size only grows, so
    a size that is out of date can refuse but never allow, and is fetched again before it refuses.
    """

    __slots__ = ("_base", "_fetch", "_size", "_window")

    def __init__(self, window: memoryview | None = None) -> None:
        self._window = _NOTHING if window is None else window
        self._base = 0
        self._size = 0
        self._fetch: Callable[[], int] | None = None

    def attach(self, base: int, fetch_size: Callable[[], int]) -> None:
        """The memory begins at ``base`` of the window and has as many bytes as ``fetch_size`` says."""
        self._base, self._fetch = base, fetch_size
        self._size = fetch_size()

    def detach(self) -> None:
        """The store is about to go: nothing may reach the memory from now on."""
        self._base = self._size = 0
        self._fetch = None

    @property
    def size(self) -> int:
        """Size in bytes; 0 before there is one and after the fiber's end."""
        if self._fetch is not None:
            self._size = self._fetch()
        return self._size

    def check(self, pointer: int, length: int) -> None:
        """Raise :class:`OutOfBounds` unless ``length`` bytes at ``pointer`` are inside."""
        end = pointer + length
        if pointer < 0 or length < 0 or (end > self._size and end > self.size):
            raise OutOfBounds

    def read(self, pointer: int, length: int) -> bytes:
        """A copy of ``length`` bytes."""
        end = pointer + length
        if pointer < 0 or length < 0 or (end > self._size and end > self.size):
            raise OutOfBounds
        base = self._base
        return self._window[base + pointer : base + end].tobytes()

    def write(self, pointer: int, data: bytes | memoryview) -> None:
        """Copy all of ``data`` to ``pointer``."""
        end = pointer + len(data)
        if pointer < 0 or (end > self._size and end > self.size):
            raise OutOfBounds
        base = self._base
        self._window[base + pointer : base + end] = data

    def pack(self, layout: struct.Struct, pointer: int, *values: float) -> None:
        """Write a struct."""
        end = pointer + layout.size
        if pointer < 0 or (end > self._size and end > self.size):
            raise OutOfBounds
        layout.pack_into(self._window, self._base + pointer, *values)
