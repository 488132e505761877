"""Where a process's time goes: spans of it, recorded in memory that is taken at the start.

A span costs about half a microsecond, so a trace can cover a whole benchmark. Each process writes its own
file; :mod:`realm.bench.tracing` merges them, because all of them read the same clock.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import msgspec

CAPACITY = 1 << 19
"""Spans that a trace keeps: at eight a step and 1,000 steps a second, the last minute. 12 MiB."""


class Recorded(msgspec.Struct, kw_only=True):
    """The first line of a trace's file, as JSON; the columns follow it as raw little-endian numbers.

    They are ``count`` numbers each: began and ended (float64 seconds of :func:`time.perf_counter`), then the
    name's place in ``names`` and the value (int32).
    """

    process: str
    names: list[str]
    count: int
    lost: int


class Trace:
    """Spans of one process, the newest ``capacity`` of them. One thread owns it.

    The file is opened at once and written by :meth:`close`, because a contained process opens none later.
    """

    def __init__(self, path: Path, process: str, capacity: int = CAPACITY) -> None:
        """``process`` is what the trace calls this process, such as ``engine``. Raises OSError."""
        self._file = path.open("wb")
        self._process = process
        self._capacity = capacity
        self._count = 0
        self._names: dict[str, int] = {}
        self._began = array("d", bytes(8 * capacity))
        self._ended = array("d", bytes(8 * capacity))
        self._name = array("i", bytes(4 * capacity))
        self._value = array("i", bytes(4 * capacity))

    def span(self, name: str, began: float, ended: float, value: int = 0) -> None:
        """Add a span, in seconds of :func:`time.perf_counter`.

        Args:
            name: one of a few; ``row/what`` where spans overlap others of the process, such as ``gpu/step``.
            value: how much was done in it (rows, tokens), for the reader of the trace; below 2**31.
        """
        number = self._names.get(name)
        if number is None:
            number = self._names[name] = len(self._names)
        at = self._count % self._capacity
        self._began[at] = began
        self._ended[at] = ended
        self._name[at] = number
        self._value[at] = value
        self._count += 1

    def close(self) -> None:
        """Write the file. Idempotent. Raises OSError."""
        if self._file.closed:
            return
        with self._file as file:
            kept = min(self._count, self._capacity)
            head = Recorded(process=self._process, names=list(self._names), count=kept, lost=self._count - kept)
            file.write(msgspec.json.encode(head) + b"\n")
            columns: tuple[array[Any], ...] = (self._began, self._ended, self._name, self._value)
            for column in columns:
                file.write(memoryview(column)[:kept])

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
