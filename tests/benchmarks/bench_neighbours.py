"""The time between a quiet tenant's tokens while another tenant's guests spin in the same worker.

    python -m tests.benchmarks.bench_neighbours [--kinds loop,fill,...] [--counts 0,1,64] [--tokens 128]
        [--repeats 3] [--workers 1] [--unthrottled] [--json FILE]

A real ``realm serve`` with the real model in bf16; the quiet tenant runs the ``decode`` guest and takes the time
at which each piece of its text arrives at its SDK client. The spinning guests belong to another tenant, whose
clients are a process of their own (but share the processors, as everything here does). Within every repeat all
cases are taken in turn, so that all see the same machine; intervals of all repeats are put together.

The kinds of spinner: a plain loop; ``memory.fill`` and ``memory.copy`` over all of a memory of 64 MiB (16 MiB each
where there are more than eight: a worker's memory is bounded); a loop that stores to one page after another;
``tokenize`` of 64 KiB; a flood of the smallest host call; of sequences opened and freed; and of output, which the
spinner's client reads.

Spinners have the default ``fuel_per_second`` unless ``--unthrottled``, and no other limit that ends them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.benchmarks.host import REPOSITORY, server

if TYPE_CHECKING:
    from realm_sdk import Client

FEW = 8
QUIET = "0 none"

BODIES: dict[str, str] = {
    "loop": "(loop $l (br $l))",
    "fill": "(loop $l (memory.fill (i32.const 0) (i32.const 7) (global.get $size)) (br $l))",
    "copy": "(loop $l (memory.copy (i32.const 1) (i32.const 0) (i32.sub (global.get $size) (i32.const 1))) (br $l))",
    "pages": """(loop $l (local.set $at (i32.const 0))
        (loop $p (i32.store (local.get $at) (i32.const 1))
          (br_if $p (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 4096))) (global.get $size))))
        (br $l))""",
    "tokenize": """(memory.fill (i32.const 0) (i32.const 32) (i32.const 65536))
      (loop $l (drop (call $tokenize (i32.const 0) (i32.const 65536) (i32.const 0) (i32.const 0) (i32.const 0)))
        (br $l))""",
    "host calls": "(loop $l (drop (call $fuel_left)) (br $l))",
    "sequences": "(loop $l (drop (call $seq_free (call $seq_new))) (br $l))",
    "output": """(memory.fill (i32.const 0) (i32.const 46) (i32.const 1024))
      (loop $l (drop (call $emit (i32.const 0) (i32.const 1024))) (br $l))""",
}
"""What each kind does without end, after one host call and one output by which its client knows that it runs."""

UNBOUNDED = {
    "fuel_per_run": 1 << 50,
    "seconds_per_run": 86_400,
    "output_bytes_per_run": 1 << 50,
    "running_guests": 1024,
}


def spinner(kind: str, count: int) -> bytes:
    """The module of one of ``count`` spinners."""
    import wasmtime

    from tests.wat import guest

    pages = 1024 if count <= FEW else 256
    body = f"""(local $at i32)
      (drop (call $emit (i32.const 0) (i32.const 1)))
      {BODIES[kind]} (i32.const 0)"""
    names = ("emit", "fuel_left", "tokenize", "seq_new", "seq_free")
    size = f"(global $size i32 (i32.const {pages << 16}))"
    return bytes(wasmtime.wat2wasm(guest(body, *names, memory=str(pages), extra=size)))


# --- the spinners' process ------------------------------------------------------------------------------


def spin(url: str, key: str, kind: str, count: int) -> None:
    """Run spinners, say on stdout when all of them run, and go on until the process is ended."""

    async def main() -> None:
        from realm_sdk import Client, Output

        async with Client(url, key) as client:
            await client.push("spinner", spinner(kind, count))
            spinning = asyncio.Semaphore(0)

            async def one() -> None:
                first = True
                async for event in client.run("spinner"):
                    if first and isinstance(event, Output):
                        spinning.release()
                        first = False

            async with asyncio.TaskGroup() as group:
                for _ in range(count):
                    group.create_task(one())
                for _ in range(count):
                    await spinning.acquire()
                print("all run", flush=True)

    asyncio.run(main())


@contextlib.contextmanager
def spinning(url: str, key: str, kind: str, count: int) -> Iterator[None]:
    """``count`` guests spin while the context lasts."""
    if not count:
        yield
        return
    command = [sys.executable, "-m", "tests.benchmarks.bench_neighbours", "--spin", kind, "--counts", str(count)]
    process = subprocess.Popen(
        [*command, "--url", url, "--key", key], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "all run":
            raise SystemExit(f"the spinners ({kind}) did not start; their messages are above")
        yield
        if process.poll() is not None:
            raise SystemExit(f"the spinners ({kind}) ended while they were measured")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


# --- the quiet tenant -----------------------------------------------------------------------------------


async def intervals(client: Client, tokens: int) -> list[float]:
    """Seconds between one piece of text and the next, as they arrive. The first token's wait is left out."""
    from realm_sdk import Output

    times: list[float] = []
    async for event in client.run("decode", f"16 {tokens}", seed=1):
        if isinstance(event, Output):
            times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


async def measure(options: argparse.Namespace, url: str, admin_key: str) -> dict[str, list[float]]:
    from realm_sdk import Client

    cases = [(QUIET, "loop", 0)]
    counts = [int(count) for count in options.counts.split(",")]
    cases += [(f"{count} {kind}", kind, count) for count in counts if count for kind in options.kinds.split(",")]
    found: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    async with Client(url, admin_key) as admin:
        keys = {}
        for tenant in ("quiet", "noisy"):
            await admin.add_tenant(tenant)
            keys[tenant] = (await admin.add_key(tenant)).key
        limits = UNBOUNDED | ({"fuel_per_second": 1 << 50} if options.unthrottled else {})
        await admin.call("tenants.set", {"name": "noisy", "limits": limits}, dict)
        async with Client(url, keys["quiet"]) as quiet:
            await quiet.push("decode", REPOSITORY / "guest_modules" / "decode" / "decode.wasm")
            await intervals(quiet, options.tokens)  # warm-up
            for _ in range(options.repeats):
                for name, kind, count in cases:
                    with spinning(url, keys["noisy"], kind, count):
                        await asyncio.sleep(0.5)
                        found[name] += await intervals(quiet, options.tokens)
                    # What is left of the case before must not reach into the next.
                    await quiet_again(admin)
                    print(f"  {name}: {summary(found[name])}", file=sys.stderr)
    return found


async def quiet_again(admin: Client) -> None:
    """Until no run is in progress."""
    for _ in range(600):
        if not (await admin.ps()).runs:
            return
        await asyncio.sleep(0.05)
    raise SystemExit("runs of spinners whose client is gone do not end")


def summary(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(value * 1e3 for value in values)
    return {
        "p50": round(statistics.median(ordered), 2),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 2),
        "max": round(ordered[-1], 2),
        "intervals": len(ordered),
    }


def report(found: dict[str, list[float]], options: argparse.Namespace) -> None:
    print(
        f"\ntime between a quiet tenant's tokens, ms; bf16, {options.tokens} tokens x {options.repeats}, "
        f"{options.workers} worker(s), {'no fuel_per_second' if options.unthrottled else 'default fuel_per_second'}\n"
    )
    print("| spinning neighbours | p50 | p99 | max | p50 over none | p99 over none |")
    print("|---|---|---|---|---|---|")
    alone = summary(found[QUIET])
    rows = []
    for name, values in found.items():
        row = summary(values)
        rows.append({"case": name, **row})
        ratios = " | ".join(f"{row[key] / alone[key]:.2f}" for key in ("p50", "p99"))
        print(f"| {name} | {row['p50']:.1f} | {row['p99']:.1f} | {row['max']:.1f} | {ratios} |")
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        chosen = {key: getattr(options, key) for key in ("tokens", "repeats", "workers", "unthrottled")}
        content = {"machine": machine, "options": chosen, "rows": rows, "raw": found}
        options.json.write_text(json.dumps(content, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(BODIES), help="what the neighbours do")
    parser.add_argument("--counts", default="0,1,64", help="how many neighbours spin at a time")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of the quiet tenant in each case")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="1 puts all guests into one process, the hardest case")
    parser.add_argument("--unthrottled", action="store_true", help="let the spinners have all the fuel they can burn")
    parser.add_argument("--model", type=Path, help="model folder (default: the one that make demo imports)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--spin", choices=BODIES, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.spin:
        spin(options.url, options.key, options.spin, int(options.counts))
        return
    from realm.settings import default_home

    model = (options.model or default_home() / "models" / "smollm2-135m-instruct").resolve()
    with (
        tempfile.TemporaryDirectory() as home,
        server(Path(home) / "realm", model, limits={}, workers=options.workers) as (url, key, _),
    ):
        found = asyncio.run(measure(options, url, key))
    report(found, options)


if __name__ == "__main__":
    main()
