"""How long the kernels of the forward pass take on a GPU: ``python -m tests.benchmarks.bench_kernels [--tune]``.

Microseconds a launch inside a CUDA graph of many, and how fast its bytes (what it must read and write)
move. Each launch of a graph works on memory of its own as far as that goes, so that little stays in the
second-level cache, as between the layers of a model.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from realm.engine.kernels import attention_decode as decoding
from realm.engine.kernels import attention_prefill as prefilling
from realm.engine.kernels import skinny
from realm.engine.kernels.elementwise import add_rms_norm, silu_mul
from realm.engine.kernels.rotary import rope_and_store
from tests.kernel_cases import PAGE, Shape

Launch = Callable[[int], None]

BF16 = torch.bfloat16
CUDA = torch.device("cuda")
MODELS = {
    "llama-3.2-1b": (Shape(32, 8, 64), 2048, 8192),
    "smollm2-135m": (Shape(9, 3, 64), 576, 1536),
    "llama-3.1-8b": (Shape(32, 8, 128), 4096, 14336),
}
BATCHES = (1, 8, 64, 256)
LAUNCHES = 32


def microseconds(launch: Launch) -> float:
    """Median time of one of :data:`LAUNCHES` launches in a graph; ``launch`` gets the launch's number."""
    stream = torch.cuda.Stream()
    # What is launched on was made on another stream.
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        launch(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for number in range(LAUNCHES):
                launch(number)
        times = []
        for _ in range(7):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(5):
                graph.replay()
            end.record()
            stream.synchronize()
            times.append(begin.elapsed_time(end) / (5 * LAUNCHES) * 1e3)
    return sorted(times)[3]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, dtype=BF16)


class Caches:
    """KV caches of several layers for ``rows`` sequences of ``length`` tokens, and their table."""

    def __init__(self, shape: Shape, rows: int, length: int) -> None:
        width = -(-length // PAGE)
        size = 2 * (rows * width + 1) * shape.kv_heads * PAGE * shape.dim
        layers = max(1, min(LAUNCHES, (4 << 30) // (2 * size)))
        self.layers = [random(2, rows * width + 1, shape.kv_heads, PAGE, shape.dim) for _ in range(layers)]
        self.tables = torch.randperm(rows * width, device=CUDA).view(rows, width).int()
        self.bytes = 2 * 2 * rows * length * shape.kv_heads * shape.dim

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.layers[number % len(self.layers)]


def decode_launch(shape: Shape, rows: int, length: int, splits: int) -> tuple[Launch, int]:
    caches = Caches(shape, rows, length)
    qkv, angles = random(rows, shape.width), random(length, shape.dim)
    out = random(rows, shape.heads * shape.dim)
    lengths = torch.full((rows,), length, dtype=torch.int32, device=CUDA)
    workspace = decoding.DecodeWorkspace.allocate(rows * splits, rows, shape.heads, shape.dim, CUDA)

    def launch(number: int) -> None:
        decoding.attention_decode(
            qkv, angles, angles, caches[number], caches.tables, lengths, out, workspace, splits=splits
        )

    return launch, caches.bytes


def prefill_launch(shape: Shape, chunks: int, count: int, context: int) -> tuple[Launch, int]:
    """The second number is of floating point operations."""
    caches = Caches(shape, chunks, context + count)
    qkv = random(chunks * count, shape.width)
    out = random(chunks * count, shape.heads * shape.dim)
    starts = torch.arange(chunks + 1, dtype=torch.int32, device=CUDA) * count
    contexts = torch.full((chunks,), context, dtype=torch.int32, device=CUDA)
    group = shape.heads // shape.kv_heads
    tile = prefilling.prefill_tile(count, group, shape.dim, qkv.dtype)
    listed = prefilling.prefill_tiles(np.full(chunks, count), np.full(chunks, context), group, tile)
    tiles = torch.from_numpy(listed).to(CUDA)

    def launch(number: int) -> None:
        cache = caches[number]
        prefilling.attention_prefill(qkv, cache, caches.tables, starts, contexts, tiles, out, tile=tile)

    return launch, 4 * chunks * shape.heads * shape.dim * count * (context + (count + 1) // 2)


def torch_attention(shape: Shape, rows: int, count: int, context: int) -> Launch:
    """torch's own attention of ``count`` tokens a row after ``context`` (one of the two is 0 or 1), on keys and
    values that lie in order and are rotated and stored already: what ours has to beat with more to do."""
    length = context + count
    layers = max(1, min(LAUNCHES, (4 << 30) // (4 * rows * length * shape.kv_heads * shape.dim)))
    query = random(rows, shape.heads, count, shape.dim)
    caches = [random(2, rows, shape.kv_heads, length, shape.dim) for _ in range(layers)]

    def launch(number: int) -> None:
        keys, values = caches[number % layers]
        torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=count > 1, enable_gqa=True)

    return launch


def skinny_launches(hidden: int, inner: int, qkv: int) -> Iterator[tuple[str, Launch, Launch, float]]:
    """Products of a layer at one row: what, by ``skinny_linear``, as torch and other kernels do it, and its bytes."""
    layers = max(1, min(LAUNCHES, (1 << 30) // (2 * hidden * inner)))
    gain, act, residual = random(hidden), random(1, inner), random(1, hidden)
    normed, projected, both = random(1, hidden), random(1, qkv), random(1, 2 * inner)
    weights = [random(2 * inner, hidden) for _ in range(layers)]
    first = [weight[:qkv] for weight in weights]
    square = [weight[:hidden] for weight in weights]
    down = [weight[:inner].view(hidden, inner) for weight in weights]

    def torch_qkv(n: int) -> None:
        add_rms_norm(residual, residual, gain, normed, 1e-5, add=False)
        torch.mm(normed, first[n % layers].T, out=projected)

    def torch_gate_up(n: int) -> None:
        add_rms_norm(residual, residual, gain, normed, 1e-5, add=False)
        torch.mm(normed, weights[n % layers].T, out=both)
        silu_mul(both, act)

    yield (
        "norm, qkv",
        lambda n: skinny.skinny_linear(residual, first[n % layers], projected, gain=gain, eps=1e-5),
        torch_qkv,
        2.0 * qkv * hidden,
    )
    yield (
        "output, sum",
        lambda n: skinny.skinny_linear(normed, square[n % layers], residual, add=True),
        lambda n: residual.addmm_(normed, square[n % layers].T),
        2.0 * hidden * hidden,
    )
    yield (
        "norm, gate_up, silu",
        lambda n: skinny.skinny_linear(residual, weights[n % layers], act, gain=gain, eps=1e-5, gated=True),
        torch_gate_up,
        4.0 * inner * hidden,
    )
    yield (
        "down, sum",
        lambda n: skinny.skinny_linear(act, down[n % layers], residual, add=True),
        lambda n: residual.addmm_(act, down[n % layers].T),
        2.0 * inner * hidden,
    )


def measurements() -> Iterator[tuple[str, str, float, float, str]]:
    """Model, what, microseconds, amount, and the amount's unit."""
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    for model, (shape, hidden, inner) in MODELS.items():
        for rows in (*BATCHES, 8192):
            x, residual, out, gain = random(rows, hidden), random(rows, hidden), random(rows, hidden), random(hidden)
            time = microseconds(lambda _, a=(x, residual, gain, out): add_rms_norm(*a, 1e-5, add=True))
            yield model, f"add_rms_norm {rows}", time, 8.0 * rows * hidden, "B"
            gate_up, out = random(rows, 2 * inner), random(rows, inner)
            time = microseconds(lambda _, a=(gate_up, out): silu_mul(*a))
            yield model, f"silu_mul {rows}", time, 6.0 * rows * inner, "B"
        for what, fused, general, size in skinny_launches(hidden, inner, shape.width):
            yield model, f"{what}: skinny", microseconds(fused), size, "B"
            yield model, f"{what}: torch", microseconds(general), size, "B"
        caches, qkv, angles = Caches(shape, 64, 128), random(8192, shape.width), random(8192, shape.dim)
        positions = torch.arange(8192, dtype=torch.int32, device=CUDA)
        slots = torch.randperm(8192, device=CUDA)
        time = microseconds(lambda n, a=(qkv, angles, angles, positions, slots), c=caches: rope_and_store(*a, c[n]))
        moved = 2.0 * 8192 * 2 * shape.width
        yield model, "rope_and_store 8192", time, moved, "B"
        for rows, length in [*itertools.product(BATCHES, (129, 192, 256)), (1, 32768), (8, 32768), (64, 4096)]:
            splits = decoding.decode_splits(rows, shape.kv_heads, length, multiprocessors)
            launch, size = decode_launch(shape, rows, length, splits)
            yield model, f"attention_decode {rows} of {length}, {splits} splits", microseconds(launch), size, "B"
            time = microseconds(torch_attention(shape, rows, 1, length - 1))
            yield model, f"attention_decode {rows} of {length}: torch", time, size, "B"
        for chunks, count, context in [(1, 128, 0), (64, 128, 0), (1, 8192, 0), (1, 100, 32_000), (1, 8192, 24_000)]:
            launch, work = prefill_launch(shape, chunks, count, context)
            what = f"attention_prefill {chunks} x {count} after {context}"
            yield model, what, microseconds(launch), work, "FLOP"
            if not context:
                yield model, f"{what}: torch", microseconds(torch_attention(shape, chunks, count, 0)), work, "FLOP"


Found = dict[str, list[tuple[float, float, str]]]
"""By what was launched: microseconds, TB/s or TFLOP/s, and how."""


def tune(console: Console) -> None:
    """Other ways to launch than the ones chosen, the fastest five of each case (minutes: all are compiled)."""
    for model in ("llama-3.2-1b", "smollm2-135m"):
        shape, hidden, inner = MODELS[model]
        found: Found = {}
        tune_decode(shape, found)
        tune_prefill(shape, found)
        tune_skinny(shape, hidden, inner, found)
        for what, times in found.items():
            for time, rate, note in sorted(times)[:5]:
                console.print(f"{model} {what}: {time:.2f} us, {rate:.2f} T/s, {note}")


def tune_decode(shape: Shape, found: Found) -> None:
    few = [*itertools.product((8192, 16384), (4, 8), (3, 5), ((1, 64), (2, 128), (4, 64)))]
    many = [*itertools.product((4096, 8192, 16384), (2, 4, 8), (3, 5), ((1, 64),))]
    long = [*itertools.product((8192, 16384), (4, 8), (3, 5), ((32, 64), (64, 64)))]
    cases = {(1, 192): few, (8, 192): few, (64, 192): few, (256, 192): many, (256, 1024): many, (1, 32768): long}
    for (rows, length), ways in cases.items():
        for tile, warps, stages, (splits, part) in ways:
            decoding.TILE_BYTES, decoding.WARPS, decoding.STAGES, decoding.SHORTEST_PART = tile, warps, stages, part
            launch, size = decode_launch(shape, rows, length, splits)
            time = microseconds(launch)
            note = f"tile bytes {tile}, warps {warps}, stages {stages}, splits {splits} of {part} or more"
            found.setdefault(f"attention_decode {rows} of {length}", []).append((time, size / time / 1e6, note))


def tune_prefill(shape: Shape, found: Found) -> None:
    for chunks, count, context in [(64, 128, 0), (1, 8192, 0), (1, 100, 32_000)]:
        for prefilling.BLOCK, prefilling.STAGES in itertools.product((64, 128), (3, 4, 5)):
            launch, work = prefill_launch(shape, chunks, count, context)
            time = microseconds(launch)
            note = f"block {prefilling.BLOCK}, stages {prefilling.STAGES}"
            what = f"attention_prefill {chunks} x {count} after {context}"
            found.setdefault(what, []).append((time, work / time / 1e6, note))


def tune_skinny(shape: Shape, hidden: int, inner: int, found: Found) -> None:
    for way in itertools.product((200, 400, 800), (2048, 4096, 8192), (2, 3)):
        skinny.PROGRAMS, skinny.TILE, skinny.STAGES = way
        for what, launch, _, size in skinny_launches(hidden, inner, shape.width):
            time = microseconds(launch)
            note = f"programs, tile, stages = {way}"
            found.setdefault(f"skinny {what}", []).append((time, size / time / 1e6, note))


def main() -> None:
    console = Console(width=140)
    if "--tune" in sys.argv:
        tune(console)
        return
    table = Table("model", "kernel", "us", "rate", title=torch.cuda.get_device_name())
    for model, what, time, amount, unit in measurements():
        table.add_row(model, what, f"{time:.2f}", f"{amount / time / 1e6:.2f} T{unit}/s")
    console.print(table)


if __name__ == "__main__":
    main()
