"""Steps of the CUDA runner alone: GPU time, the host's time to launch, prefill, and graph capture.

Random weights, bf16, every row at the same context. ``python -m tests.benchmarks.bench_steps [SHAPE ...]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from realm.engine.batch import LAST_DRAWN, Chunk, Decodes, Draws, StepBatch
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda import CudaRunner
from realm.engine.runners.cuda_memory import activation_bytes
from realm.models.llama import LlamaModel
from realm.models.loading import random_weights
from realm.models.shapes import SHAPES

ROWS = (1, 8, 64, 256)
CHUNK = 128
IN_FLIGHT = 2


def draws(rows: int, temperature: float, top_p: float) -> Draws:
    """The same sampling for all rows."""
    column = np.ones(rows, np.float32)
    zeros = np.zeros(rows, np.int32)
    uniform = np.random.default_rng(0).random(rows)
    return Draws(column * temperature, zeros, column * top_p, column * 0, uniform, np.zeros(rows, np.bool_))


def decode_steps(rows: int, context: int, count: int, runner: CudaRunner, how: Draws) -> list[StepBatch]:
    """``count`` steps that go on from each other, the first at ``context`` tokens."""
    width = -(-runner.config.context_length // PAGE_SIZE)
    used = -(-(context + count) // PAGE_SIZE)
    tables = np.zeros((runner.lanes, width), np.int32)
    tables[:rows, :used] = np.random.default_rng(1).permutation(rows * used).reshape(rows, used)
    lanes = np.arange(rows, dtype=np.int32)
    tokens = np.full(rows, LAST_DRAWN, np.int32)
    positions = np.full(rows, context, np.int32)
    return [StepBatch(Decodes(lanes, tokens, positions + at, tables, context + at + 1), [], how) for at in range(count)]


def run(runner: CudaRunner, steps: list[StepBatch]) -> tuple[float, float, float]:
    """Medians of a step's GPU milliseconds and its launch's microseconds, and milliseconds a step in all."""
    launches: list[float] = []
    results: list[float] = []
    flying: list[Any] = []
    began = time.perf_counter()
    for step in steps:
        if len(flying) == IN_FLIGHT:
            results.append(flying.pop(0).wait().seconds)
        at = time.perf_counter()
        flying.append(runner.launch(step))
        launches.append(time.perf_counter() - at)
    results += [step.wait().seconds for step in flying]
    whole = (time.perf_counter() - began) / len(steps)
    return statistics.median(results) * 1e3, statistics.median(launches) * 1e6, whole * 1e3


def chunk_step(runner: CudaRunner, chunks: int, beside: int) -> StepBatch:
    """``chunks`` prompts of :data:`CHUNK` tokens, beside so many decoding rows at the same context."""
    rng = np.random.default_rng(2)
    used = CHUNK // PAGE_SIZE
    tables = np.arange(runner.lanes * (used + 1), dtype=np.int32).reshape(runner.lanes, -1) % runner.pages
    lanes = np.arange(beside, dtype=np.int32)
    decodes = Decodes(lanes, np.full(beside, LAST_DRAWN, np.int32), lanes * 0 + CHUNK, tables, CHUNK + 1)
    parts = [
        Chunk(
            rng.integers(0, runner.config.vocab_size, CHUNK, dtype=np.uint32),
            0,
            tables[at, :used].tolist(),
            True,
            at,
        )
        for at in range(beside, beside + chunks)
    ]
    return StepBatch(decodes, parts, draws(beside + chunks, 0, 1))


def bench(shape: str, options: argparse.Namespace) -> None:
    """Build the runner of one shape and print its tables."""
    console = Console(width=120)
    config = dataclasses.replace(SHAPES[shape], context_length=min(SHAPES[shape].context_length, options.context_limit))
    device = torch.device("cuda")
    with torch.inference_mode():
        weights = random_weights(config, dtype=torch.bfloat16, device=device)
        model = LlamaModel(config, weights)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    pages = 256 * -(-(options.context + options.steps + CHUNK) // PAGE_SIZE)
    began = time.perf_counter()
    runner = CudaRunner(model, pages=pages, lanes=1024, token_budget=8192)
    seconds = time.perf_counter() - began
    kv = runner._pass.cache.nbytes
    taken = before - torch.cuda.mem_get_info()[0] - kv
    estimate = activation_bytes(config, torch.bfloat16, 8192, 1024)
    console.print(
        f"[bold]{shape}[/]: runner built in {seconds:.1f} s; it took {taken / 2**20:,.0f} MiB beside KV"
        f" (estimated {estimate / 2**20:,.0f} MiB)"
    )
    table = Table(
        "rows", "draw", "GPU ms", "launch us", "ms/step", "tokens/s", title=f"decode around context {options.context}"
    )
    for name, how in (("greedy", (0.0, 1.0)), ("temperature 0.8", (0.8, 1.0)), ("top-p 0.95", (0.8, 0.95))):
        for rows in ROWS:
            steps = decode_steps(rows, options.context - options.steps // 2, options.steps, runner, draws(rows, *how))
            run(runner, steps[:8])
            gpu, launch, whole = run(runner, steps)
            table.add_row(str(rows), name, f"{gpu:.3f}", f"{launch:.0f}", f"{whole:.3f}", f"{rows / whole * 1e3:,.0f}")
    console.print(table)
    table = Table(
        "chunks", "decoding beside", "tokens", "GPU ms", "launch us", "ms/step", title=f"chunks of {CHUNK} tokens"
    )
    for chunks, beside in ((1, 0), (8, 0), (64, 0), (1, 7), (1, 63), (8, 200)):
        steps = [chunk_step(runner, chunks, beside)] * 12
        run(runner, steps[:3])
        gpu, launch, whole = run(runner, steps)
        tokens = str(chunks * CHUNK)
        table.add_row(str(chunks), str(beside), tokens, f"{gpu:.2f}", f"{launch:.0f}", f"{whole:.2f}")
    console.print(table)
    if options.profile:
        profile(runner, options, console)
    runner.close()


def profile(runner: CudaRunner, options: argparse.Namespace, console: Console) -> None:
    """Print which kernels the GPU's time of a decode step goes to."""
    for rows in ROWS:
        steps = decode_steps(rows, options.context, 10, runner, draws(rows, 0, 1))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            run(runner, steps)
        spent: dict[str, list[float]] = {}
        for event in recorded.events():
            kernel = spent.setdefault(event.name[:80], [0, 0.0])
            kernel[0] += 1
            kernel[1] += event.device_time
        table = Table("kernel", "a step", "us each", "us a step", title=f"{rows} rows")
        for name, (count, total) in sorted(spent.items(), key=lambda item: -item[1][1])[:16]:
            table.add_row(name, f"{count / 10:.1f}", f"{total / count:.2f}", f"{total / 10:.1f}")
        console.print(table)


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--context-limit", type=int, default=131_072)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step")
    options = parser.parse_args()
    if len(options.shapes) == 1:
        bench(options.shapes[0], options)
        return
    # A process each: what the profiler leaves behind slows every later launch.
    flags = [argument for argument in sys.argv[1:] if argument not in options.shapes]
    for shape in options.shapes:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.bench_steps", shape, *flags], check=True)


if __name__ == "__main__":
    main()
