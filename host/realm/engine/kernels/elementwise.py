"""RMS norm with the residual sum, and the gated activation of the feed-forward block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realm.engine.kernels.launching import Kernel, power_of_two

ACTIVATION_BLOCK = 1024
"""Elements of a row that one program of :func:`silu_mul` computes: 8 (16 bytes of bf16) for each of 128 threads."""


@triton.jit
def _add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + at + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded as it is stored: the norm is of the residual stream that later layers see.
    rounded = value.to(residual.dtype.element_ty)
    tl.store(residual + at + column, rounded, mask=inside)
    value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / WIDTH + EPS)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at + column, (value * scale * gain).to(out.dtype.element_ty), mask=inside)


ADD_RMS_NORM = Kernel(_add_rms_norm_kernel)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, *, add: bool) -> None:
    """``residual += x`` (``= x`` where not ``add``), then ``out = residual / rms(residual) * weight``.

    Zhang & Sennrich 2019. ``x``, ``residual`` and ``out`` are [n, hidden], contiguous, ``weight`` [hidden]; each
    bfloat16 or float32, computed in float32. ``x`` and ``out`` may be the same tensor, ``x`` and ``residual`` too.
    """
    rows, width = x.shape
    block = power_of_two(width)
    # A thread has 8 elements: 16 bytes of bf16.
    warps = min(16, max(1, block // 256))
    ADD_RMS_NORM.launch((rows, 1, 1), (x, residual, weight, out), (), (eps, width, block, add), warps=warps)


@triton.jit
def _silu_mul_kernel(gate_up: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = gate_up + row * 2 * WIDTH + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * WIDTH + column, result.to(out.dtype.element_ty), mask=inside)


SILU_MUL = Kernel(_silu_mul_kernel)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """``out = silu(gate) * up`` (SwiGLU, Shazeer 2020), computed in float32.

    ``gate_up`` is [n, 2 * width], gates first, ``out`` [n, width]; both contiguous, bfloat16 or float32.
    """
    rows, width = out.shape
    grid = (rows, -(-width // ACTIVATION_BLOCK), 1)
    SILU_MUL.launch(grid, (gate_up, out), (), (width, ACTIVATION_BLOCK), warps=4)
