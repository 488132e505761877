"""What a run costs before its first token, and what the host holds.

    python -m tests.benchmarks.bench_start [--runs 50] [--model FOLDER] [--json FILE]

A real ``realm serve``, a client on the same machine, and a cached guest that says one word: the time from the
client's call to that word and back, and from the run's start in the worker to the guest's first host call.
Then the memory of all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import wasmtime

from realm.settings import default_home
from realm_sdk import Client
from tests.benchmarks.host import server

GREETING = """(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 8) "hi")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (call $emit (i32.const 8) (i32.const 2))))"""
"""A guest whose first host call is seen by its client."""


def memory_megabytes(pid: int) -> dict[str, float]:
    """Of a process and its children: the sum of their peaks, and what they hold now without counting
    shared pages twice. Read once, after the load: sampling it meanwhile slows what it watches."""
    import psutil

    root = psutil.Process(pid)
    peak = held = 0
    for process in [root, *root.children(recursive=True)]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak += int(status.split("VmHWM:")[1].split()[0]) * 1024
        held += process.memory_full_info().pss
    return {"peak_mb": peak / 1e6, "held_mb": held / 1e6}


async def measure(url: str, key: str, runs: int) -> dict[str, float]:
    """Medians over so many runs, one after the other."""
    there_and_back, first_call = [], []
    async with Client(url, key) as client:
        with tempfile.TemporaryDirectory() as folder:
            greeting = Path(folder) / "greeting.wasm"
            await asyncio.to_thread(greeting.write_bytes, wasmtime.wat2wasm(GREETING))
            await client.push("greeting", greeting)
        for _ in range(runs):
            began = time.perf_counter()
            async for event in client.run("greeting"):
                if event.kind == "output":
                    there_and_back.append(time.perf_counter() - began)
                elif event.kind == "finished":
                    first_call.append(event.usage.first_call_seconds)
    return {
        "first_output_ms": statistics.median(there_and_back) * 1e3,
        "first_call_ms": statistics.median(first_call) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--model", type=Path, default=default_home() / "models" / "smollm2-135m-instruct")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        server(Path(home) / "realm", options.model.resolve()) as (url, key, pid),
    ):
        found = asyncio.run(measure(url, key, options.runs)) | memory_megabytes(pid)
    print(
        f"a cached guest, from the client's run to its first host call and back: {found['first_output_ms']:.2f} ms; "
        f"inside the worker {found['first_call_ms']:.2f} ms (medians of {options.runs})\n"
        f"memory of all processes: peaks sum to {found['peak_mb']:.0f} MB; {found['held_mb']:.0f} MB held at the end"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
