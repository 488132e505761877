"""What a benchmark writes: a table for people, and JSON with all that is needed to compare it later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

import realm
from realm.bench.workload import Measured

PACKAGES = ("torch", "triton", "numpy", "wasmtime", "msgspec", "tokenizers", "websockets")
GPU_FACTS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "clocks_throttle_reasons.active"),
)
"""What is asked of every GPU; clocks and power are those of the moment."""


def environment() -> dict[str, Any]:
    """The machine and the versions: nothing that names its owner."""
    versions = {"realm": realm.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "kernel": platform.release(),
        "machine": platform.machine(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def gpus() -> list[dict[str, str]]:
    """What ``nvidia-smi`` says of each GPU, now; nothing where there is none. It takes up to seconds."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.strip().splitlines())
    return [dict(zip(GPU_FACTS, row, strict=False)) for row in rows]


def median(repeats: Iterable[Measured], value: Callable[[Measured], float | None]) -> float | None:
    """Of a figure over repeats; None where it was not measured."""
    found = [figure for figure in map(value, repeats) if figure is not None]
    return statistics.median(found) if found else None


def _each(total: float | None, count: float | None) -> float | None:
    return None if total is None or not count else total / count


FIGURES: dict[str, tuple[str, Callable[[Measured], float | None], str]] = {
    "tokens_per_second": ("tokens/s", lambda m: m.rate, ",.0f"),
    "steps": ("steps", lambda m: m.steps, ",.0f"),
    "step_rows": ("rows/step", lambda m: _each(m.rows, m.steps), ".1f"),
    "step_ms": ("ms/step", lambda m: _each(m.seconds * 1e3, m.steps), ".3f"),
    "device_step_ms": ("device ms/step", lambda m: _each(m.device_seconds and m.device_seconds * 1e3, m.steps), ".3f"),
    "device_busy": ("device busy", lambda m: m.device_seconds and m.device_seconds / m.seconds, ".0%"),
    "first_ms": ("first token ms", lambda m: m.first_seconds and m.first_seconds * 1e3, ".1f"),
    "last_first_ms": ("last first ms", lambda m: m.last_first_seconds and m.last_first_seconds * 1e3, ".1f"),
    "engine_us": ("engine µs/step", lambda m: _each(m.engine_cpu and m.engine_cpu * 1e6, m.steps), ",.0f"),
    "worker_us": ("worker µs/token", lambda m: _each(m.workers_cpu and m.workers_cpu * 1e6, m.tokens), ".1f"),
    "gateway_us": ("gateway µs/token", lambda m: _each(m.gateway_cpu and m.gateway_cpu * 1e6, m.tokens), ".1f"),
    "wasted": ("wasted ahead", lambda m: _each(m.wasted, m.tokens + (m.wasted or 0)), ".1%"),
}
"""Every figure: its name in JSON, its heading, how it follows from a measure, its format."""


def by_requests(measured: Iterable[Measured]) -> dict[int, list[Measured]]:
    """The repeats of each case."""
    cases: dict[int, list[Measured]] = {}
    for one in measured:
        cases.setdefault(one.requests, []).append(one)
    return cases


def medians(repeats: list[Measured]) -> dict[str, float | None]:
    """Every figure of one case."""
    return {name: median(repeats, value) for name, (_, value, _) in FIGURES.items()}


def table_rows(results: dict[str, list[Measured]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each number of requests and kind of benchmark, figures that nobody has left out."""
    lines = []
    for kind, measured in results.items():
        for requests, repeats in by_requests(measured).items():
            lines.append((requests, kind, repeats))
    lines.sort(key=lambda line: line[0])
    used = [
        (heading, value, form)
        for heading, value, form in FIGURES.values()
        if any(median(repeats, value) is not None for _, _, repeats in lines)
    ]
    spread = "±"
    rows = []
    for requests, kind, repeats in lines:
        rates = [one.rate for one in repeats]
        row = [f"{requests}", kind]
        for _, value, form in used:
            found = median(repeats, value)
            row.append("-" if found is None else format(found, form))
        row.append(f"{(max(rates) - min(rates)) / 2 / statistics.median(rates):.0%}")
        rows.append(row)
    return ["requests", "measured", *(heading for heading, _, _ in used), spread], rows


def as_json(results: dict[str, list[Measured]], asked: dict[str, Any], gpus: list[dict[str, str]]) -> bytes:
    """Everything: the machine, what was asked, each repeat, and the medians. ``gpus``: see :func:`gpus`."""
    cases = [
        {"kind": kind, "requests": requests, "median": medians(repeats), "repeats": msgspec.to_builtins(repeats)}
        for kind, measured in results.items()
        for requests, repeats in by_requests(measured).items()
    ]
    document = {"environment": environment() | {"gpus": gpus}, "asked": asked, "cases": cases}
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
