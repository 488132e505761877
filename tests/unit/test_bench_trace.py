"""Traces: what a process records, and what is made of the records of several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm.bench.tracing import Spans, Window, gaps, read_spans, summary, write_chrome
from realm.engine.trace import Trace


def recorded(folder: Path, process: str, *spans: tuple[Any, ...], capacity: int = 100) -> Spans:
    """What comes back of spans (name, began, ended[, value]) that were recorded."""
    path = folder / f"{process}.trace"
    with Trace(path, process, capacity) as trace:
        for span in spans:
            trace.span(*span)
    return read_spans(path)


def test_what_was_recorded_comes_back(tmp_path: Path) -> None:
    spans = recorded(tmp_path, "engine", ("plan", 1.0, 1.5), ("gpu/step", 1.25, 2.0, 256), ("plan", 2.0, 2.125, 3))
    assert (spans.process, spans.names) == ("engine", ["plan", "gpu/step"])
    assert spans.began.tolist() == [1.0, 1.25, 2.0] and spans.ended.tolist() == [1.5, 2.0, 2.125]
    assert spans.name.tolist() == [0, 1, 0] and spans.value.tolist() == [0, 256, 3]


def test_the_newest_spans_are_kept(tmp_path: Path) -> None:
    spans = recorded(tmp_path, "engine", *(("plan", float(at), at + 0.5) for at in range(250)), capacity=100)
    assert sorted(spans.began.tolist()) == [float(at) for at in range(150, 250)]
    # Which are in two pieces by now, and still found in order.
    assert spans.named("plan").began.tolist() == [float(at) for at in range(150, 250)]


def test_a_file_is_opened_at_once_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "worker.trace"
    trace = Trace(path, "worker 1")
    assert path.exists()
    trace.close()
    trace.close()
    assert len(read_spans(path).began) == 0
    with pytest.raises(OSError):
        Trace(tmp_path / "none" / "worker.trace", "worker 1")


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path, "engine", ("plan", 1.0, 2.0), ("plan", 3.0, 4.0))
    path = tmp_path / "engine.trace"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError):
        read_spans(path)


WINDOW = Window("4 guests", 10.0, 11.0)


def test_gaps_are_where_no_step_ran(tmp_path: Path) -> None:
    steps = recorded(
        tmp_path,
        "engine",
        ("gpu/step", 9.0, 10.25),
        ("gpu/step", 10.5, 10.625),
        # Two that overlap, of which the later one ends earlier.
        ("gpu/step", 10.625, 10.875),
        ("gpu/step", 10.75, 10.8125),
        ("gpu/step", 12.0, 13.0),
    )
    assert gaps(steps.within(WINDOW), WINDOW) == [(10.25, 10.5), (10.875, 11.0)]
    assert gaps(steps.within(Window("none", 14.0, 15.0)), WINDOW) == []


def test_a_summary_divides_by_steps_and_tokens(tmp_path: Path) -> None:
    engine = recorded(
        tmp_path,
        "engine",
        ("plan", 9.0, 9.5),  # before the window
        ("gpu/step", 10.125, 10.375, 4),
        ("gpu/step", 10.5, 10.75, 4),
        ("plan", 10.0, 10.0625),
        ("plan", 10.375, 10.4375),
        ("wait", 10.5, 10.75),
        ("send", 10.75, 10.875),
    )
    workers = [recorded(tmp_path, f"worker {n}", ("turn", 10.25, 10.5), ("wait", 10.5, 11.0)) for n in (1, 2)]
    lines = summary([engine, *workers], WINDOW, tokens=8)
    text = "\n".join(lines)
    assert lines[0] == "4 guests: 1000.0 ms"
    # Idle: 0.125 s before the first step, 0.125 s between, 0.25 s at the end.
    assert "2 steps, 250.000 ms each, busy 50.0%; idle 187500 µs a step, 125.0 ms before the first" in text
    assert "engine: 125000 µs a step (wait 125000.0, plan 62500.0, send 62500.0 µs a step)" in text
    assert "2 workers: 62500.0 µs a token, each busy 25% (wait 125000.0, turn 62500.0 µs a token)" in text
    first, second = [line.strip() for line in lines if "gap of" in line]
    assert first == "gap of 250000 µs at 750.00 ms: send 125000"
    assert second == "gap of 125000 µs at 375.00 ms: plan 62500"


def test_a_summary_of_nothing_is_short(tmp_path: Path) -> None:
    assert summary([], WINDOW, tokens=8) == ["4 guests: 1000.0 ms"]
    lines = summary([recorded(tmp_path, "engine")], WINDOW, tokens=8)
    assert "0 steps" in lines[1] and "busy 0.0%" in lines[1]


def test_the_chrome_file_has_a_row_for_each_kind(tmp_path: Path) -> None:
    engine = recorded(tmp_path, "engine", ("plan", 10.25, 10.5, 7), ("gpu/step", 10.0, 10.25), ("gpu/step", 10.5, 11.5))
    worker = recorded(tmp_path, "worker 1", ("turn", 10.75, 10.875), ("turn", 12.0, 13.0))
    path = tmp_path / "out.json"
    write_chrome([engine, worker], [WINDOW], path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    shown = [
        (processes[e["pid"]], names.get((e["pid"], e["tid"])), e["name"], e["ts"], e["dur"])
        for e in events
        if e["ph"] == "X"
    ]
    assert sorted(shown, key=str) == sorted(
        [
            ("cases", None, "4 guests", 0.0, 1e6),
            ("engine", "engine", "plan", 250_000.0, 250_000.0),
            ("engine", "gpu", "step", 0.0, 250_000.0),
            ("engine", "gpu", "step", 500_000.0, 500_000.0),
            ("engine", "gpu idle", "idle", 250_000.0, 250_000.0),
            ("worker 1", "worker 1", "turn", 750_000.0, 125_000.0),
        ],
        key=str,
    )
    assert [e["args"]["value"] for e in events if e["name"] == "plan"] == [7]


def test_spans_of_one_name_are_ordered(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    began = rng.random(50)
    spans = recorded(tmp_path, "engine", *((f"n{i % 3}", at, at + 0.1, i) for i, at in enumerate(began)))
    for name in range(3):
        assert spans.named(f"n{name}").began.tolist() == sorted(began[name::3].tolist())
    assert len(spans.named("other").began) == 0
