"""Linear layers of one row, with what comes before and after them in the same launch.

At batch 1 a decode step is as long as its launches and the reading of its weights. Here a layer is five
launches: the norm goes into the product that follows it, the activation and the residual sum into the
product before. Measured on an H200, a layer's products take 14 to 47% less than cuBLAS and kernels of their
own; from two rows on, cuBLAS is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from realm.engine.kernels.launching import Kernel, power_of_two

SKINNY_ROWS = 1
"""Rows that these layers take."""

PROGRAMS = 400
"""How many programs there should be at least: three a multiprocessor."""

TILE = 4096
"""Weights that a program loads at once, in elements."""

STAGES = 2
"""How many tiles are in flight."""


@triton.jit
def _skinny_linear_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    INNER: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < WIDTH
    line = weight + column.to(tl.int64)[:, None] * INNER
    squares = tl.zeros([DEPTH], tl.float32)
    total = tl.zeros([COLUMNS, DEPTH], tl.float32)
    second = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in tl.range(0, INNER, DEPTH, num_stages=STAGES):
        inner = start + tl.arange(0, DEPTH)
        present = inner < INNER
        seen = used[:, None] & present[None, :]
        value = tl.load(x + inner, mask=present, other=0.0).to(tl.float32)
        if NORM:
            squares += value * value
            value *= tl.load(gain + inner, mask=present, other=0.0).to(tl.float32)
        total += value[None, :] * tl.load(line + inner[None, :], mask=seen, other=0.0).to(tl.float32)
        if GATED:
            up_line = line + WIDTH * INNER
            second += value[None, :] * tl.load(up_line + inner[None, :], mask=seen, other=0.0).to(tl.float32)
    result = tl.sum(total, 1)
    up = tl.sum(second, 1)
    if NORM:
        # The norm's factor is the same for the whole row, so it can come after the product.
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / INNER + EPS)
        result *= scale
        up *= scale
    if BIAS:
        result += tl.load(bias + column, mask=used, other=0.0).to(tl.float32)
    if GATED:
        if BIAS:
            up += tl.load(bias + WIDTH + column, mask=used, other=0.0).to(tl.float32)
        result = result / (1.0 + tl.exp(-result)) * up
    if ADD:
        result += tl.load(out + column, mask=used, other=0.0).to(tl.float32)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=used)


SKINNY_LINEAR = Kernel(_skinny_linear_kernel)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> None:
    """``out = x @ weight.T + bias`` for one row, and more:

    * with ``gain`` [inner], ``x`` is RMS-normed first (``x / rms(x) * gain``, see ``add_rms_norm``);
    * ``gated``: ``weight`` and ``bias`` have twice as many lines as ``out`` has columns, and
      ``out = silu(first half) * second half`` (see ``silu_mul``);
    * ``add``: the result is added to ``out``.

    ``x`` is [1, inner], ``weight`` [width, inner] (or [2 * width, inner]), ``out`` [1, width], another tensor than x;
    all contiguous, each bfloat16 or float32. Computed in float32.
    """
    width, inner = out.shape[1], x.shape[1]
    columns = min(16, 1 << max(0, (width // PROGRAMS).bit_length() - 1))
    depth = min(power_of_two(inner), TILE // columns)
    SKINNY_LINEAR.launch(
        (-(-width // columns), 1, 1),
        (x, weight, weight if bias is None else bias, weight if gain is None else gain, out),
        (),
        (eps, width, inner, bias is not None, gain is not None, gated, add, columns, depth, STAGES),
        warps=4,
    )
