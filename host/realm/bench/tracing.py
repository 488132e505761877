"""Puts the traces of all processes together: one file for a trace viewer, and a summary in words.

The file is Chrome's trace event format, which ``chrome://tracing`` and https://ui.perfetto.dev open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from realm.engine.trace import Recorded

Seconds = npt.NDArray[np.float64]

DEVICE = "gpu/step"
"""Spans of the device's steps, in the engine's trace."""

WAIT = "wait"
"""Spans in which a process sleeps until something comes."""

GAPS = 5
"""Largest gaps that a summary names."""


@dataclass(frozen=True)
class Window:
    """A part of the traces, in seconds of :func:`time.perf_counter`."""

    name: str
    began: float
    ended: float


@dataclass(frozen=True)
class Spans:
    """One process's trace. ``name`` are places in ``names``."""

    process: str
    names: list[str]
    began: Seconds
    ended: Seconds
    name: npt.NDArray[np.int32]
    value: npt.NDArray[np.int32]

    def within(self, window: Window) -> Spans:
        """The spans that overlap a window, cut at its borders."""
        kept = (self.ended > window.began) & (self.began < window.ended)
        began = np.maximum(self.began[kept], window.began)
        ended = np.minimum(self.ended[kept], window.ended)
        return Spans(self.process, self.names, began, ended, self.name[kept], self.value[kept])

    def named(self, name: str) -> Spans:
        """The spans of one name, ordered by their beginnings."""
        kept = self.name == (self.names.index(name) if name in self.names else -1)
        order = np.argsort(self.began[kept], kind="stable")
        began, ended, numbers, values = (
            column[kept][order] for column in (self.began, self.ended, self.name, self.value)
        )
        return Spans(self.process, self.names, began, ended, numbers, values)

    def seconds(self) -> float:
        """Of all spans together."""
        return float((self.ended - self.began).sum())


def read_spans(path: Path) -> Spans:
    """A file of :class:`realm.engine.trace.Trace`. Raises OSError, ValueError or msgspec.MsgspecError."""
    with path.open("rb") as file:
        head = msgspec.json.decode(file.readline(), type=Recorded)
        kinds = ("<f8", "<f8", "<i4", "<i4")
        columns = [np.frombuffer(file.read(head.count * int(kind[-1])), dtype=kind) for kind in kinds]
    if any(len(column) != head.count for column in columns):
        raise ValueError(f"{path} is not whole")
    return Spans(head.process, head.names, columns[0], columns[1], columns[2], columns[3])


def write_chrome(traces: Iterable[Spans], windows: Iterable[Window], path: Path) -> None:
    """Write the parts of all traces that lie in ``windows``, and the device's idle gaps. Raises OSError."""
    windows = list(windows)
    events = list(_marks(windows))
    zero = min(window.began for window in windows)
    for process, spans in enumerate(traces, start=1):
        events.append(_label("process_name", process, 0, spans.process))
        rows: dict[str, int] = {}
        for window in windows:
            for event in _events(spans.within(window), process, rows, zero):
                events.append(event)
            device = spans.named(DEVICE).within(window)
            for began, ended in gaps(device, window):
                events.append(
                    _span("idle", process, rows.setdefault("gpu idle", len(rows)), began - zero, ended - began)
                )
        events += [_label("thread_name", process, number, row) for row, number in rows.items()]
    path.write_bytes(msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"}))


def _marks(windows: list[Window]) -> Iterator[dict[str, Any]]:
    """The windows themselves, as a process of their own."""
    yield _label("process_name", 0, 0, "cases")
    for window in windows:
        yield _span(window.name, 0, 0, window.began - windows[0].began, window.ended - window.began)


def _events(spans: Spans, process: int, rows: dict[str, int], zero: float) -> Iterator[dict[str, Any]]:
    columns = (spans.began.tolist(), spans.ended.tolist(), spans.name.tolist(), spans.value.tolist())
    for began, ended, number, value in zip(*columns, strict=True):
        row, slash, name = spans.names[number].rpartition("/")
        event = _span(
            name, process, rows.setdefault(row if slash else spans.process, len(rows)), began - zero, ended - began
        )
        event["args"] = {"value": value}
        yield event


def _span(name: str, process: int, row: int, began: float, seconds: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": process, "tid": row, "ts": began * 1e6, "dur": seconds * 1e6}


def _label(kind: str, process: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}


def gaps(steps: Spans, window: Window) -> list[tuple[float, float]]:
    """The times in a window in which no step ran, from the first step on; ``steps`` are in order."""
    found = []
    if len(steps.began):
        # Steps may overlap by what two clocks differ.
        ends = np.maximum.accumulate(steps.ended)
        for ended, began in zip(ends[:-1].tolist(), steps.began[1:].tolist(), strict=True):
            if began > ended:
                found.append((ended, began))
        if window.ended > ends[-1]:
            found.append((float(ends[-1]), window.ended))
    return found


def summary(traces: list[Spans], window: Window, tokens: int) -> list[str]:
    """What a window's time went to, in lines: the device, the engine's thread, the workers, the gaps."""
    spent = window.ended - window.began
    lines = [f"{window.name}: {spent * 1e3:.1f} ms"]
    engine = next((spans.within(window) for spans in traces if spans.process == "engine"), None)
    workers = [spans.within(window) for spans in traces if spans.process.startswith("worker")]
    if engine is not None:
        lines += _engine_lines(engine, window)
    busy = sum(_busy(worker) for worker in workers)
    if workers and tokens:
        parts = _shares(workers, tokens)
        lines.append(
            f"  {len(workers)} workers: {busy / tokens * 1e6:.1f} µs a token, each busy "
            f"{busy / len(workers) / spent:.0%} ({parts} µs a token)"
        )
    if engine is not None:
        lines += _gap_lines(engine, window)
    return lines


def _engine_lines(engine: Spans, window: Window) -> Iterator[str]:
    steps = engine.named(DEVICE)
    count = max(1, len(steps.began))
    idle = sum(ended - began for began, ended in gaps(steps, window))
    lead = float(steps.began[0]) - window.began if len(steps.began) else 0.0
    spent = window.ended - window.began
    yield (
        f"  device: {len(steps.began)} steps, {steps.seconds() / count * 1e3:.3f} ms each, busy "
        f"{1 - (idle + lead) / spent if len(steps.began) else 0:.1%}; idle {idle / count * 1e6:.0f} µs a step, "
        f"{lead * 1e3:.1f} ms before the first"
    )
    yield f"  engine: {_busy(engine) / count * 1e6:.0f} µs a step ({_shares([engine], count)} µs a step)"


def _busy(spans: Spans) -> float:
    """Seconds in which a process's own thread did something."""
    own = [name for name in spans.names if "/" not in name and name != WAIT]
    return sum(spans.named(name).seconds() for name in own)


def _shares(processes: list[Spans], count: int) -> str:
    """Microseconds of each kind of span by ``count``, the largest first."""
    shares: dict[str, float] = {}
    for spans in processes:
        for name in spans.names:
            if "/" not in name:
                shares[name] = shares.get(name, 0.0) + spans.named(name).seconds()
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {seconds / count * 1e6:.1f}" for name, seconds in ordered)


def _gap_lines(engine: Spans, window: Window) -> Iterator[str]:
    """The device's largest gaps, and what the engine's thread did in each."""
    found = sorted(gaps(engine.named(DEVICE), window), key=lambda gap: gap[0] - gap[1])[:GAPS]
    for began, ended in found:
        inside = engine.within(Window("", began, ended))
        doing = {name: inside.named(name).seconds() for name in inside.names if "/" not in name}
        parts = sorted(((seconds, name) for name, seconds in doing.items() if seconds), reverse=True)
        yield (
            f"  gap of {(ended - began) * 1e6:.0f} µs at {(began - window.began) * 1e3:.2f} ms: "
            + (", ".join(f"{name} {seconds * 1e6:.0f}" for seconds, name in parts) or "nothing recorded")
        )
