"""What the engine itself costs a step, beside a device that takes no time.

    python -m tests.benchmarks.bench_engine_loop [--rows 1,8,64,256] [--steps 500] [--json FILE]

Every sequence goes on as before, asked for by one worker's rows (:data:`realm.messages.CONTINUE`), one step
behind the engine that runs ahead. Microseconds a step, medians: ``claim`` takes in the calls, ``launch`` plans
and fills the batch, ``settle`` takes in what was drawn and answers, ``plain`` is one whole step of the same
sequences without lanes, by messages.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from realm.engine.batch import NoAdapterMemory, StepBatch, StepResult
from realm.engine.core import EngineCore
from realm.engine.lanes import ANSWER, CLAIM
from realm.engine.scheduler import Scheduler
from realm.engine.workers import WORKER_SHIFT
from realm.messages import Forward, ForwardDone, OpenSequence, SamplingParams, TenantQuota
from realm.models.shapes import SHAPES

WORKER = 1
PROMPT = 128


class InstantRunner:
    """A device that has drawn token 7 for every row before it is asked."""

    def __init__(self, rows: int) -> None:
        self.config = SHAPES["llama-3.2-1b"]
        self.lanes = 2 * rows
        self.pages = 64 * rows + 64
        self.adapters = NoAdapterMemory(torch.bfloat16)

    def launch(self, batch: StepBatch) -> InstantRunner:
        count = batch.outputs
        self._result = StepResult(np.full(count, 7, np.int32), np.full(count, np.nan, np.float32))
        return self

    def done(self) -> bool:
        return True

    def wait(self) -> StepResult:
        return self._result

    def fileno(self) -> int:
        return -1

    def close(self) -> None: ...


def prompts(rows: int, run_ahead: int) -> tuple[EngineCore, list[int]]:
    """An engine that has computed a prompt for each of its sequences, and their numbers."""
    runner = InstantRunner(rows)
    engine = EngineCore(
        "loop", runner, Scheduler(runner.pages, token_budget=1 << 20, max_sequences=rows), run_ahead=run_ahead
    )
    engine.set_quota(TenantQuota("", 1 << 40, 1 << 40, 1))
    numbers = [(WORKER << WORKER_SHIFT) + row for row in range(rows)]
    rng = np.random.default_rng(1)
    for row, number in enumerate(numbers):
        tokens = rng.integers(0, 1000, PROMPT, dtype=np.uint32).tobytes()
        engine.submit(WORKER, [OpenSequence(number, "t", row), Forward(row, number, tokens, SamplingParams(), False)])
    return engine, numbers


def in_lanes(rows: int, steps: int) -> dict[str, float]:
    """Microseconds a step, by what they are for."""
    engine, numbers = prompts(rows, 2)
    seconds: dict[str, list[float]] = {"claim": [], "launch": [], "settle": []}
    engine.launch()
    order = np.array(numbers, dtype=np.int64)
    for _ in range(steps):
        began = time.perf_counter()
        engine.launch()
        launched = time.perf_counter()
        engine.settle(True)
        (messages, drawn) = engine.take()[WORKER]
        settled = time.perf_counter()
        assert not messages and len(drawn) == rows * ANSWER.itemsize
        answers = np.frombuffer(drawn, dtype=ANSWER)
        claims = np.empty(rows, dtype=CLAIM)
        claims["call"] = answers["call"]
        claims["seq"], claims["lane"], claims["token"] = order[answers["call"]], answers["lane"], answers["token"]
        rows_of_calls = claims.tobytes()
        before = time.perf_counter()
        engine.submit(WORKER, [], rows_of_calls)
        seconds["claim"].append(time.perf_counter() - before)
        seconds["launch"].append(launched - began)
        seconds["settle"].append(settled - launched)
    return {name: statistics.median(values) * 1e6 for name, values in seconds.items()}


def by_messages(rows: int, steps: int) -> float:
    """Microseconds a step without lanes."""
    engine, numbers = prompts(rows, 0)
    token = (7).to_bytes(4, "little")
    ops = [Forward(row, number, token, SamplingParams(), False) for row, number in enumerate(numbers)]
    engine.step()
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        engine.submit(WORKER, ops)
        results = engine.step()[WORKER]
        seconds.append(time.perf_counter() - began)
        assert len(results) == rows and all(isinstance(result, ForwardDone) for result in results)
    return statistics.median(seconds) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,64,256")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table(
        "rows", "claim", "launch", "settle", "together", "plain", title="engine, µs a step", title_justify="left"
    )
    figures = {}
    for rows in (int(text) for text in options.rows.split(",")):
        spent = in_lanes(rows, options.steps)
        plain = by_messages(rows, max(10, options.steps // 10))
        figures[rows] = {**spent, "plain": plain}
        together = sum(spent.values())
        table.add_row(str(rows), *(f"{value:,.0f}" for value in (*spent.values(), together, plain)))
    Console().print(table)
    if options.json is not None:
        facts = {"python": platform.python_version(), "numpy": np.__version__, "us_a_step": figures}
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
