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
from typing import Any, NamedTuple

import msgspec

import realm
from realm.bench.adapters import NONE
from realm.bench.workload import Measured

PACKAGES = ("torch", "triton", "numpy", "wasmtime", "msgspec", "tokenizers", "websockets")
GPU_FACTS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem"),
    *("power.draw", "power.limit", "temperature.gpu", "clocks_throttle_reasons.active"),
)
"""What is asked of every GPU; clocks and power are those of the moment."""

SPREAD = "±"
"""Half of the difference between the fastest and the slowest repeat."""


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
    "adapter_tokens_per_second": ("with one", lambda m: _adapter_rate(m), ",.0f"),
    "plain_tokens_per_second": ("without", lambda m: _plain_rate(m), ",.0f"),
    "adapters_resident": ("resident", lambda m: m.adapters_resident, ",.0f"),
    "loads": ("loads", lambda m: m.loads, ",.0f"),
    "wasted": ("wasted ahead", lambda m: _each(m.wasted, m.tokens + (m.wasted or 0)), ".1%"),
}
"""Every figure: its name in JSON, its heading, how it follows from a measure, its format."""


class Case(NamedTuple):
    """What is the same in all repeats: how many requests, registered adapters (None: not asked for), and their mix."""

    requests: int
    adapters: int | None = None
    mix: str = NONE

    def __str__(self) -> str:
        guests = f"{self.requests} guests"
        return f"{guests}, {self.adapters} adapters {_used(self)}" if self.adapters else guests


def case_of(measured: Measured) -> Case:
    """Which case a measure is a repeat of."""
    return Case(measured.requests, measured.adapters, measured.mix)


def by_case(measured: Iterable[Measured]) -> dict[Case, list[Measured]]:
    """The repeats of each case."""
    cases: dict[Case, list[Measured]] = {}
    for one in measured:
        cases.setdefault(case_of(one), []).append(one)
    return cases


def medians(repeats: list[Measured]) -> dict[str, float | None]:
    """Every figure of one case."""
    return {name: median(repeats, value) for name, (_, value, _) in FIGURES.items()}


def table_rows(results: dict[str, list[Measured]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: a row for each number of requests and kind of benchmark, figures that nobody has left out.

    Cases with registered adapters are :func:`adapter_rows`'.
    """
    lines = []
    for kind, measured in results.items():
        for case, repeats in by_case(measured).items():
            if not case.adapters:
                lines.append((case.requests, kind, repeats))
    lines.sort(key=lambda line: line[0])
    used = [
        (heading, value, form)
        for heading, value, form in FIGURES.values()
        if any(median(repeats, value) is not None for _, _, repeats in lines)
    ]
    rows = []
    for requests, kind, repeats in lines:
        row = [f"{requests}", kind]
        row += [_cell(median(repeats, value), form) for _, value, form in used]
        rows.append([*row, _spread(repeats)])
    return ["requests", "measured", *(heading for heading, _, _ in used), SPREAD], rows


def adapter_rows(measured: Iterable[Measured]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the cases with adapters, beside those of the same run without; no rows where none has any.

    For "of none" and "of unused" see :func:`ratios`; unused ones were measured in turn with the others. The rates of
    requests with an adapter and of those without are given where a case has both.
    """
    cases = by_case(measured)
    if not any(case.adapters for case in cases):
        return [], []
    both = any(one.adapter_requests and one.plain_seconds for repeats in cases.values() for one in repeats)
    headings = ["adapters", "mix", "requests", "different", "tokens/s", "of none", "of unused"]
    figures = ["step_ms", "device_step_ms", "device_busy", "adapters_resident", "loads"]
    figures += ["adapter_tokens_per_second", "plain_tokens_per_second"] if both else []
    headings += [*(FIGURES[name][0] for name in figures), SPREAD]
    rows = []
    for case, repeats in sorted(cases.items(), key=lambda item: (item[0].requests, item[0].adapters or 0)):
        row = [f"{case.adapters or 0}", _used(case) if case.adapters else "-", f"{case.requests}"]
        row.append(_cell(median(repeats, lambda m: m.adapter_different if m.mix != NONE else None), ",.0f"))
        row.append(_cell(median(repeats, _rate), ",.0f"))
        row += [_cell(ratio, ".3f") for ratio in ratios(cases, case).values()]
        for name in figures:
            _, value, form = FIGURES[name]
            row.append(_cell(median(repeats, value), form))
        rows.append([*row, _spread(repeats)])
    return headings, rows


def ratios(cases: dict[Case, list[Measured]], case: Case) -> dict[str, float | None]:
    """A case's rate divided by those of the same requests without adapters; None where that was not measured.

    ``of_none``: before any was registered. ``of_unused``: with as many registered.
    """
    rate = median(cases[case], _rate)
    found: dict[str, float | None] = {}
    for name, other in (("of_none", Case(case.requests, 0)), ("of_unused", Case(case.requests, case.adapters))):
        against = median(cases.get(other, []), _rate) if other != case else None
        found[name] = rate / against if rate and against else None
    return found


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _spread(repeats: list[Measured]) -> str:
    rates = [one.rate for one in repeats]
    return f"{(max(rates) - min(rates)) / 2 / statistics.median(rates):.0%}"


def _used(case: Case) -> str:
    return "unused" if case.mix == NONE else case.mix


def _rate(measured: Measured) -> float:
    return measured.rate


def _adapter_rate(measured: Measured) -> float | None:
    """New tokens a second of the requests that have an adapter."""
    if not measured.adapter_seconds:
        return None
    return measured.tokens * measured.adapter_requests / measured.requests / measured.adapter_seconds


def _plain_rate(measured: Measured) -> float | None:
    """New tokens a second of the requests that have none, beside others that have one."""
    if not measured.plain_seconds or not measured.adapter_requests:
        return None
    plain = measured.requests - measured.adapter_requests
    return measured.tokens * plain / measured.requests / measured.plain_seconds


def as_json(results: dict[str, list[Measured]], asked: dict[str, Any], gpus: list[dict[str, str]]) -> bytes:
    """Everything: the machine, what was asked, each repeat, and the medians. ``gpus``: see :func:`gpus`."""
    cases = []
    for kind, measured in results.items():
        found = by_case(measured)
        for case, repeats in found.items():
            row = {"kind": kind, **case._asdict(), "median": medians(repeats)}
            if case.adapters is not None:
                row |= ratios(found, case)
            cases.append(row | {"repeats": msgspec.to_builtins(repeats)})
    document = {"environment": environment() | {"gpus": gpus}, "asked": asked, "cases": cases}
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
