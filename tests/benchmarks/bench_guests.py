"""What the guest runtime costs: a host call at 1, 64 and 1,024 suspended guests, and a start.

The engine is a fake that answers at once with the same token, so the time is the runtime's own:
decode ``forward``, suspend, hand over, deliver, resume. Run from the repository's root:

    python -m tests.benchmarks.bench_guests [RESULT.json]
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import wasmtime

from realm.guests.compiler import compile_module_sync
from realm.guests.facts import ModelFacts
from realm.guests.runtime import GuestRuntime, tune_collector
from realm.messages import EngineReply, Forward, ForwardDone
from realm.run_messages import RunFinished, RunLimits, StartRun
from tests.fakes import FakeTokenizer

FACTS = ModelFacts(vocab_size=49_152, context_length=1 << 20, bos=1, eos=frozenset({2}), layers=30, hidden_size=576)

# Forwards one token again and again, as a guest that generates does: greedy, with an answer struct.
GUEST = """(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func (export "run") (result i32) (local $seq i32) (local $n i32)
    (local.set $seq (call $seq_new))
    (local.set $n (i32.const STEPS))
    (i32.store (i32.const 512) (i32.const 17))
    (loop $again
      (i32.store (i32.const 512) (call $forward
        (local.get $seq) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 700)))
      (br_if $again (local.tee $n (i32.sub (local.get $n) (i32.const 1)))))
    (i32.const 0)))"""


def artifact(folder: Path, steps: int) -> tuple[str, str]:
    """Path and hash of the compiled guest."""
    wasm = folder / f"guest{steps}.wasm"
    wasm.write_bytes(wasmtime.wat2wasm(GUEST.replace("STEPS", str(steps))))
    path = compile_module_sync(wasm, folder / "cache").artifact
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def measure(path: tuple[str, str], count: int, steps: int) -> dict[str, float]:
    """Microseconds a start and a call, with ``count`` guests."""
    runtime = GuestRuntime(1, FakeTokenizer(), FACTS)
    limits = RunLimits()
    # Loaded beforehand: this is the cost of one more guest of a module that is running.
    runtime.start(StartRun(0, "a", "m", path[0], b"", 1, limits, artifact_sha256=path[1]))
    while not any(isinstance(op, Forward) for op in runtime.turn(time.monotonic()).ops):
        pass
    tune_collector()
    began = time.perf_counter()
    for run in range(1, count + 1):
        runtime.start(StartRun(run, "a", "m", path[0], b"", 1, limits, artifact_sha256=path[1]))
    calls: list[int] = []
    while len(calls) < count:
        calls += [op.call for op in runtime.turn(time.monotonic()).ops if isinstance(op, Forward)]
    start = time.perf_counter() - began
    finished = done = replies = 0
    fake = spent = 0.0
    began = time.perf_counter()
    while finished < count:
        # The fake engine's own work is timed apart.
        at = time.perf_counter()
        replies += 1
        reply = EngineReply(replies, [ForwardDone(call, 17, float("nan"), 0) for call in calls])
        done += len(calls)
        fake += time.perf_counter() - at
        runtime.deliver(reply)
        turn = runtime.turn(time.monotonic())
        at = time.perf_counter()
        calls = [op.call for op in turn.ops if isinstance(op, Forward)]
        finished += sum(isinstance(event, RunFinished) for event in turn.events)
        fake += time.perf_counter() - at
        # Ending guests is not a call: stop the clock with the last round of calls.
        if calls:
            spent = time.perf_counter() - began - fake
    runtime.close()
    return {"guests": count, "start_us": start / count * 1e6, "call_us": spent / (done - count) * 1e6}


def main() -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for count, steps in ((1, 5000), (64, 200), (1024, 30), (4096, 10)):
            path = artifact(Path(folder), steps)
            rounds = [measure(path, count, steps) for _ in range(5)]
            row = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            row["call_us_best"] = min(r["call_us"] for r in rounds)
            rows.append(row)
            print(
                f"{count:5d} guests: {row['call_us']:6.2f} us a call (best {row['call_us_best']:.2f}), "
                f"{row['start_us']:6.1f} us from start to first forward",
                flush=True,
            )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps({"host_call": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
