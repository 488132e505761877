"""What adapters cost on a GPU: their kernels, and steps of the CUDA runner with and without them.

Random weights of Llama-3.2-1B's shape, bf16. A row's adapter is drawn uniformly from those that there are.
``python -m tests.benchmarks.bench_lora`` (about a minute, of which most is compiling, where nothing is cached).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from realm.adapters.weights import AdapterWeights
from realm.engine.batch import StepBatch
from realm.engine.kernels.lora import Adapters, Group, lora_expand, lora_shrink, lora_tile, workspace_size
from realm.engine.kernels.lora_plan import lora_plan
from realm.engine.runners import cuda_lora
from realm.engine.runners.cuda import CudaRunner
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import random_weights
from realm.models.shapes import SHAPES
from tests.benchmarks.bench_kernels import CUDA, LAUNCHES, microseconds, random
from tests.benchmarks.bench_steps import chunk_step, decode_steps, draws, run
from tests.lora_cases import random_adapter

MODEL = "llama-3.2-1b"
ROWS = (1, 8, 64, 256)
ADAPTERS = (1, 16, 64, 512)
LAYERS = 16
QKV, OUTPUT = Group(0, 2048, (2048, 512, 512)), Group(1, 2048, (2048,))
ATTENTION = [16, 16, 0, 0]


def kernels(console: Console) -> None:
    """Microseconds of both launches of one product, each of another layer's weights than the one before."""
    table = Table("product", "rank", "rows", "of adapters", "shrink us", "expand us", "MiB", "TB/s", title="kernels")
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    for group, rank in itertools.product((QKV, OUTPUT), (16, 128)):
        sizes = [len(group.widths) * rank * group.inner, sum(group.widths) * rank]
        each = sum(sizes)
        adapters = Adapters(
            random(ADAPTERS[-1] * LAYERS * each),
            torch.arange(ADAPTERS[-1] * LAYERS, device=CUDA).view(-1, LAYERS, 1, 1) * each
            + torch.tensor([0, sizes[0]], device=CUDA),
            torch.full((ADAPTERS[-1], LAYERS, 1), rank, dtype=torch.int32, device=CUDA),
        )
        lines = np.full((ADAPTERS[-1], 1), rank * len(group.widths), np.int32)
        group = group._replace(number=0)
        for rows, count in itertools.product((*ROWS, 2048), ADAPTERS):
            if count > rows and count != ADAPTERS[-1]:
                continue
            slots = np.random.default_rng(rows).integers(0, count, rows).astype(np.int32)
            slots = np.sort(slots) if rows > ROWS[-1] else slots
            tile = lora_tile(rows if rows > ROWS[-1] else 0)
            plan = torch.from_numpy(lora_plan(slots, lines, [0], tile=tile, block=tile)).to(CUDA)
            x, out = random(rows, group.inner), random(rows, sum(group.widths))
            partial = torch.zeros(workspace_size(rows), device=CUDA)

            def shrink(number: int, a=(x, adapters, plan, partial, group), t=tile) -> None:  # type: ignore[no-untyped-def]
                lora_shrink(*a, layer=number % LAYERS, tile=t, multiprocessors=multiprocessors)

            def expand(number: int, a=(partial, adapters, plan, out, group), t=tile) -> None:  # type: ignore[no-untyped-def]
                lora_expand(*a, layer=number % LAYERS, tile=t, multiprocessors=multiprocessors)

            first, second = microseconds(shrink), microseconds(expand)
            distinct = len(np.unique(slots))
            moved = 2.0 * distinct * each
            table.add_row(
                "qkv" if len(group.widths) == 3 else "output",
                str(rank),
                str(rows),
                f"{distinct} of {count}",
                f"{first:.2f}",
                f"{second:.2f}",
                f"{moved / 2**20:.1f}",
                f"{moved / (first + second) / 1e6:.2f}",
            )
        del adapters
    console.print(table)
    torch.cuda.empty_cache()


def fill(runner: CudaRunner, adapter: AdapterWeights, count: int) -> tuple[float, float]:
    """Put one adapter into so many slots; milliseconds of one in the mean, and at most."""
    times = []
    for slot in range(count):
        began = time.perf_counter()
        runner.adapters.put(slot, slot * -(-adapter.nbytes // 256) * 256, adapter)
        times.append(time.perf_counter() - began)
    return sum(times) / count * 1e3, max(times) * 1e3


def with_adapters(steps: list[StepBatch], count: int, some: float = 1.0) -> list[StepBatch]:
    """The same steps, whose rows have adapters of ``count``, the same in all steps; ``some``: part of the rows."""
    if not count:
        return steps
    rows = len(steps[0].decodes) + len(steps[0].chunks)
    rng = np.random.default_rng(rows)
    slots = rng.integers(0, count, rows).astype(np.int32)
    slots[rng.random(rows) >= some] = -1
    return [dataclasses.replace(step, adapters=slots) for step in steps]


def decode_table(runner: CudaRunner, options: argparse.Namespace, title: str, cases: list[int]) -> Table:
    """Decode steps with adapters against the same steps without, measured in turns."""
    table = Table("rows", "of adapters", "GPU ms", "launch us", "ms/step", "without", "ratio", title=title)
    for rows in ROWS:
        steps = decode_steps(rows, options.context - options.steps // 2, options.steps, runner, draws(rows, 0, 1))
        for count in cases:
            if count > rows and count != cases[-1] and count > 1:
                continue
            mixed = with_adapters(steps, count)
            run(runner, mixed[:8])
            # The better of two each, in turns.
            measured = [(run(runner, steps), run(runner, mixed)) for _ in range(2)]
            plain = min(pair[0][0] for pair in measured)
            gpu, launch, whole = min(pair[1] for pair in measured)
            table.add_row(
                str(rows),
                str(count),
                f"{gpu:.3f}",
                f"{launch:.0f}",
                f"{whole:.3f}",
                f"{plain:.3f}",
                f"{plain / gpu:.3f}",
            )
    return table


def chunk_table(runner: CudaRunner, title: str) -> Table:
    """Prompts of 128 tokens beside decoding rows, all with adapters of 16."""
    table = Table("chunks", "decoding beside", "GPU ms", "launch us", "without", "ratio", title=title)
    for chunks, beside in ((1, 0), (8, 0), (1, 7), (1, 63), (8, 200)):
        steps = [chunk_step(runner, chunks, beside)] * 12
        mixed = with_adapters(steps, 16)
        run(runner, steps[:3])
        run(runner, mixed[:3])
        plain, (gpu, launch, _) = run(runner, steps)[0], run(runner, mixed)
        table.add_row(str(chunks), str(beside), f"{gpu:.3f}", f"{launch:.0f}", f"{plain:.3f}", f"{plain / gpu:.3f}")
    return table


def steps(console: Console, options: argparse.Namespace, config: ModelConfig, model: LlamaModel, beside: bool) -> None:
    """Build a runner and print its tables. ``beside``: shrink on a stream of its own (the default), or in line."""
    cuda_lora.BESIDE = beside
    pages = 256 * (-(-(options.context + options.steps) // 16) + 1)
    began = time.perf_counter()
    runner = CudaRunner(model, pages=pages, lanes=512, token_budget=2048, adapter_memory=8 << 30)
    how = "shrink beside the product" if beside else "shrink in line"
    console.print(f"[bold]{how}[/]: runner built in {time.perf_counter() - began:.1f} s")
    attention = random_adapter(config, ATTENTION, dtype=torch.bfloat16)
    mean, most = fill(runner, attention, ADAPTERS[-1])
    console.print(f"an adapter of {attention.nbytes / 2**20:.1f} MiB put in {mean:.2f} ms, at most {most:.2f}")
    console.print(decode_table(runner, options, f"rank 16 on q k v o; {how}", [1, *ADAPTERS[1:]]))
    console.print(chunk_table(runner, f"16 adapters, chunks of 128 tokens; {how}"))
    if beside:
        for name, ranks, count in (("rank 16 on all", [16] * 4, 64), ("rank 128 on q k v o", [128, 128, 0, 0], 64)):
            adapter = random_adapter(config, ranks, dtype=torch.bfloat16)
            fill(runner, adapter, count)
            console.print(decode_table(runner, options, name, [16, count]))
    runner.close()


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", choices=["kernels", "steps"])
    options = parser.parse_args()
    console = Console(width=120)
    console.print(f"{torch.cuda.get_device_name()}, {LAUNCHES} launches a graph")
    if options.only != "steps":
        kernels(console)
    if options.only != "kernels":
        config = dataclasses.replace(SHAPES[MODEL], context_length=4096)
        with torch.inference_mode():
            model = LlamaModel(config, random_weights(config, dtype=torch.bfloat16, device=CUDA))
        for beside in (True, False):
            steps(console, options, config, model, beside)


if __name__ == "__main__":
    main()
