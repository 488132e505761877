"""Compile kernels for a GPU on a machine without one: ``python -m tests.kernel_compiler`` prints what they take.

A process of its own, because in the others triton interprets. Launchers are called as always; in place of
a launch, triton's compiler makes the code for compute capability 9.0 that the launch would have used.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

REPORT = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel's registers a thread, bytes of stack a thread, and shared memory a program in bytes."""

    name: str
    warps: int
    registers: int
    stack: int
    shared: int


def compiled(call: Callable[[], None]) -> list[Compiled]:
    """What the launches of ``call`` would run. Needs triton imported without its interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    found: list[Compiled] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options |= {"debug": False, "instrumentation_mode": ""}
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, parsed = binder(*args, **options)
        parsed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, parsed)
        source = ASTSource(self, signature, constants, attributes)
        kernel = compile(source, target=target, options=parsed.__dict__)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tools / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
            )
        numbers = REPORT.search(usage.stdout)
        assert numbers, usage.stdout
        registers, stack = map(int, numbers.groups())
        found.append(Compiled(self.fn.__name__, kernel.metadata.num_warps, registers, stack, kernel.metadata.shared))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return found


def forward_pass(heads: int, kv_heads: int, dim: int, hidden: int, inner: int, dtype: str) -> None:
    """Launch each kernel of a forward pass once, with tensors that hold nothing."""
    import torch

    from realm.engine.kernels.attention_decode import DecodeWorkspace, attention_decode
    from realm.engine.kernels.attention_prefill import TILES, attention_prefill, prefill_tile
    from realm.engine.kernels.elementwise import add_rms_norm, silu_mul
    from realm.engine.kernels.lora import FEW, MANY, SPLIT_ROWS, Adapters, Group, lora_expand, lora_shrink
    from realm.engine.kernels.rotary import rope_and_store
    from realm.engine.kernels.skinny import skinny_linear

    rows, kind = 4, getattr(torch, dtype)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind)

    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    cache, qkv, out = (
        floats(2, 9, kv_heads, 16, dim),
        floats(rows, (heads + 2 * kv_heads) * dim),
        floats(rows, heads * dim),
    )
    angles = floats(64, dim)
    workspace = DecodeWorkspace.allocate(rows * 8, rows, heads, dim, torch.device("cpu"))
    for splits in (1, 8):
        attention_decode(qkv, angles, angles, cache, ints(rows, 4), ints(rows), out, workspace, splits=splits)
    for longest in TILES:
        tile = prefill_tile(longest, heads // kv_heads, dim, kind)
        attention_prefill(qkv, cache, ints(1, 4), ints(2), ints(1), ints(1, 2), out, tile=tile)
    rope_and_store(qkv, angles, angles, ints(rows), ints(rows).long(), cache)
    add_rms_norm(floats(rows, hidden), floats(rows, hidden), floats(hidden), floats(rows, hidden), 1e-5, add=True)
    silu_mul(floats(rows, 2 * inner), floats(rows, inner))
    stream, wide = floats(1, hidden), floats(1, inner)
    skinny_linear(stream, floats(2 * inner, hidden), wide, gain=floats(hidden), eps=1e-5, gated=True)
    skinny_linear(wide, floats(hidden, inner), stream, bias=floats(hidden), add=True)
    adapters = Adapters(floats(16), ints(1, 1, 4, 2).long(), ints(1, 1, 4))
    keys = kv_heads * dim
    for group in (
        Group(0, hidden, (heads * dim, keys, keys)),
        Group(1, heads * dim, (hidden,)),
        Group(2, hidden, (inner, inner)),
        Group(3, inner, (hidden,)),
    ):
        for count, tile in ((rows, FEW), (rows, MANY), (SPLIT_ROWS + 1, MANY)):
            x, result = floats(1, group.inner).expand(count, -1), floats(1, sum(group.widths)).expand(count, -1)
            options = {"layer": 0, "tile": tile, "multiprocessors": 132}
            lora_shrink(x, adapters, ints(16), torch.empty(16), group, **options)
            lora_expand(torch.empty(16), adapters, ints(16), result, group, **options)


def main() -> None:
    shapes: list[tuple[int, int, int, int, int, str]] = msgspec.json.decode(sys.stdin.buffer.read())
    for shape in shapes:
        for kernel in compiled(lambda shape=shape: forward_pass(*shape)):  # type: ignore[misc]
            print(msgspec.json.encode(asdict(kernel)).decode())


if __name__ == "__main__":
    main()
