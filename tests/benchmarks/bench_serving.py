"""Throughput of the whole stack, beside the same engine without guests and beside transformers.

    python -m tests.benchmarks.bench_serving [--guests 1,8,32] [--prompt 64] [--new 64] [--repeats 3] [--json FILE]

Three cases, each in its own process, taken in turn within every repeat so that all see the same
machine:

* ``transformers``: ``generate`` on one padded batch, bf16, greedy;
* ``native``: this engine's core under a plain Python loop, in one process, no guests;
* ``guests``: ``realm serve`` with the ``decode`` guest behind every token, all output streamed to SDK
  clients of three tenants over WebSocket. Clients run on the same cores and are part of the price.

Rates are new tokens a second, all requests together, prefill included. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GREETING = """(module
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 8) "hi")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (call $emit (i32.const 8) (i32.const 2))))"""
"""A guest whose first host call is seen by its client."""

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = ("transformers", "native", "guests")


def run_transformers(model: Path, counts: list[int], prompt: int, new: int) -> dict[str, Any]:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    rates = {}
    with torch.inference_mode():
        for count in [1, *counts]:  # the first is the warm-up, and is overwritten
            ids = torch.randint(3, 49000, (count, prompt))
            began = time.perf_counter()
            out = loaded.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, min_new_tokens=new
            )
            assert out.shape == (count, prompt + new)
            rates[count] = count * new / (time.perf_counter() - began)
    return {"rates": rates}


def run_native(model: Path, counts: list[int], prompt: int, new: int) -> dict[str, Any]:
    from realm.engine.core import EngineOptions, load_engine
    from realm.engine.workers import WORKER_SHIFT
    from realm.messages import EndRun, Forward, ForwardDone, OpenSequence, SamplingParams

    # The pool is that of the server, so that both touch memory alike.
    engine = load_engine(model, EngineOptions())
    greedy = SamplingParams()
    rng = random.Random(1)
    rates = {}
    busy = {}
    # An engine takes only numbers of the worker's own range.
    number = 1 << WORKER_SHIFT
    for count in [1, *counts]:
        began, before = time.perf_counter(), engine.stats().busy_seconds
        run = number + 1
        ops: list[Any] = []
        made: dict[int, int] = {}
        for _ in range(count):
            number += 1
            tokens = b"".join(rng.randrange(3, 49000).to_bytes(4, "little") for _ in range(prompt))
            ops += [OpenSequence(number, f"t{number % 3}", run), Forward(number, number, tokens, greedy, False)]
            made[number] = 0
        while made:
            engine.submit(1, ops)
            ops = []
            for result in engine.step().get(1, []):
                assert isinstance(result, ForwardDone)
                made[result.call] += 1
                if made[result.call] == new:
                    del made[result.call]
                else:
                    ops.append(Forward(result.call, result.call, result.token.to_bytes(4, "little"), greedy, False))
        rates[count] = count * new / (time.perf_counter() - began)
        busy[count] = engine.stats().busy_seconds - before
        engine.submit(1, [EndRun(run)])
    return {"rates": rates, "busy": busy}


LIMITS = {
    "running_guests": 65_536,
    "fuel_per_second": 1 << 50,
    "kv_pages": 1 << 50,
    "tokens_per_minute": 1 << 50,
    "requests_per_minute": 1 << 50,
}
"""One tenant may have the whole machine: what is measured is not a limit."""


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


@contextlib.contextmanager
def server(
    home: Path, model: Path, *, limits: dict[str, int] | None = None, **settings: int
) -> Iterator[tuple[str, str, int]]:
    """A real ``realm serve`` with a fresh registry: its URL, admin key and process id.

    ``limits`` go before the host's defaults of every tenant's limits; None lifts those that could be met.
    """
    (home / "models").mkdir(parents=True)
    (home / "models" / model.name).symlink_to(model)
    program = (
        "import asyncio, json, sys, pathlib\n"
        "from realm.serve import serve\n"
        "from realm.settings import ServeSettings\n"
        "def ready(info): print(json.dumps([info.url, info.admin_key]), flush=True)\n"
        "chosen = json.loads(sys.argv[3])\n"
        "settings = ServeSettings(home=pathlib.Path(sys.argv[1]), model=sys.argv[2], port=0, **chosen)\n"
        "asyncio.run(serve(settings, on_ready=ready))\n"
    )
    chosen = json.dumps({"defaults": LIMITS if limits is None else limits, **settings})
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(home), model.name, chosen], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start; its messages are above")
        url, key = json.loads(line)
        yield url, key, process.pid
    finally:
        process.terminate()
        process.wait(30)


def run_guests(model: Path, counts: list[int], prompt: int, new: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home, server(Path(home) / "realm", model) as (url, key, pid):
        result = asyncio.run(_drive_guests(url, key, counts, prompt, new))
        return {**result, **memory_megabytes(pid)}


async def _drive_guests(url: str, key: str, counts: list[int], prompt: int, new: int) -> dict[str, Any]:
    import wasmtime

    from realm_sdk import Client

    wasm = REPOSITORY / "guest_modules" / "decode" / "decode.wasm"
    async with contextlib.AsyncExitStack() as stack:
        admin = await stack.enter_async_context(Client(url, key))
        clients = []
        for name in ("ada", "bob", "cy"):
            await admin.add_tenant(name)
            tenant_key = (await admin.add_key(name)).key
            client = await stack.enter_async_context(Client(url, tenant_key))
            await client.push("decode", wasm)
            clients.append(client)
        rates, steps, start = {}, {}, []

        async def one(index: int) -> int:
            finished = None
            async for event in clients[index % 3].run("decode", f"{prompt} {new}"):
                if event.kind == "finished":
                    finished = event
            assert finished is not None
            start.append(finished.usage.first_call_seconds)
            return int(finished.usage.new_tokens)

        for count in [1, *counts]:
            before = (await admin.health()).engine
            began = time.perf_counter()
            tokens = await asyncio.gather(*(one(index) for index in range(count)))
            elapsed = time.perf_counter() - began
            assert tokens == [new] * count
            after = (await admin.health()).engine
            rates[count] = count * new / elapsed
            steps[count] = {
                "mean_sequences": (after["sequences"] - before["sequences"]) / (after["steps"] - before["steps"]),
                "shared": after["shared_steps"] - before["shared_steps"],
                "engine_busy": (after["busy_seconds"] - before["busy_seconds"]) / elapsed,
            }
        with tempfile.TemporaryDirectory() as folder:
            greeting = Path(folder) / "greeting.wasm"
            greeting.write_bytes(wasmtime.wat2wasm(GREETING))
            await clients[0].push("greeting", greeting)
        there_and_back = []
        for _ in range(50):
            began = time.perf_counter()
            async for event in clients[0].run("greeting"):
                if event.kind == "output":
                    there_and_back.append(time.perf_counter() - began)
        return {
            "rates": rates,
            "steps": steps,
            "first_call_ms": statistics.median(start) * 1e3,
            "first_output_ms": statistics.median(there_and_back) * 1e3,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guests", default="1,8,32", help="numbers of concurrent requests")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="model folder (default: the one that make demo imports)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from realm.settings import default_home

    counts = [int(count) for count in options.guests.split(",")]
    model = options.model or default_home() / "models" / "smollm2-135m-instruct"
    if options.case:
        run = {"transformers": run_transformers, "native": run_native, "guests": run_guests}[options.case]
        print(json.dumps(run(model.resolve(), counts, options.prompt, options.new)))
        return
    results: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for case in CASES:
            command = [sys.executable, "-m", "tests.benchmarks.bench_serving", "--case", case]
            command += ["--guests", options.guests, "--prompt", str(options.prompt), "--new", str(options.new)]
            done = subprocess.run(
                [*command, "--model", str(model)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
            )
            results[case].append(json.loads(done.stdout.splitlines()[-1]))
            rates = {count: round(rate) for count, rate in results[case][-1]["rates"].items()}
            print(f"  {case}: {rates}", file=sys.stderr)
    report(results, counts, options)


def report(results: dict[str, list[dict[str, Any]]], counts: list[int], options: argparse.Namespace) -> None:
    def median(case: str, count: int) -> float:
        return statistics.median(result["rates"][str(count)] for result in results[case])

    print(f"\n{options.prompt} prompt + {options.new} new tokens, bf16, new tokens/s (median of {options.repeats})\n")
    print("| requests | transformers | native loop | guests | guests/transformers | guests/native | guests/guests(1) |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for count in counts:
        rates = {case: median(case, count) for case in CASES}
        row = {
            "requests": count,
            **rates,
            "over_transformers": rates["guests"] / rates["transformers"],
            "over_native": rates["guests"] / rates["native"],
            "over_one": rates["guests"] / median("guests", counts[0]),
        }
        rows.append(row)
        cells = [f"{rates[case]:.0f}" for case in CASES]
        cells += [f"{row[key]:.2f}" for key in ("over_transformers", "over_native", "over_one")]
        print(f"| {count} | {' | '.join(cells)} |")
    last = results["guests"][-1]
    print(f"\nmemory of all processes: peaks sum to {last['peak_mb']:.0f} MB; {last['held_mb']:.0f} MB held at the end")
    print(
        f"a cached guest, from the client's run to its first host call and back: {last['first_output_ms']:.2f} ms; "
        f"inside the worker {last['first_call_ms']:.2f} ms (medians; the latter with up to {counts[-1]} at once)"
    )
    for count, step in last["steps"].items():
        print(
            f"{count} guests: {step['mean_sequences']:.1f} sequences a step, {step['shared']} steps shared by tenants, "
            f"engine busy {step['engine_busy']:.0%}"
        )
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows, "raw": results}, indent=1))


if __name__ == "__main__":
    main()
