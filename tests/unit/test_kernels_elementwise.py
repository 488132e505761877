"""The elementwise kernels against float64, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import tests.interpreter  # noqa: F401
from realm.engine.kernels.elementwise import add_rms_norm, silu_mul

# bfloat16: a step or two of its 8 bits, because both a sum and its norm are rounded (by the interpreter, cut off).
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 48, 576, 2048, 4097])
@pytest.mark.parametrize("add", [False, True])
def test_add_rms_norm(dtype: torch.dtype, width: int, add: bool) -> None:
    torch.manual_seed(width)
    x, residual = (3 * torch.randn(5, width, dtype=torch.float32).to(dtype) for _ in range(2))
    if not add:
        residual.fill_(float("nan"))
    weight = torch.randn(width).to(dtype)
    total = x.double() + residual.double() if add else x.double()
    total = total.to(dtype).double()
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out = torch.full_like(x, float("nan"))
    add_rms_norm(x, residual, weight, out, 1e-5, add=add)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(residual.double(), total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_add_rms_norm_may_write_over_its_input() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(2, 48), torch.randn(2, 48), torch.randn(48)
    total = x + residual
    add_rms_norm(x, residual, weight, x, 1e-5, add=True)
    torch.testing.assert_close(x, torch.nn.functional.rms_norm(total, (48,), weight, 1e-5))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [1, 80, 1024, 1536])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    gate_up = (4 * torch.randn(3, 2 * width)).to(dtype)
    # Far out, exp overflows or vanishes; the result must not.
    gate_up[0, 0], gate_up[1, 0] = -200.0, 200.0
    gate, up = gate_up.double().chunk(2, dim=-1)
    out = torch.full((3, width), float("nan"), dtype=dtype)
    silu_mul(gate_up, out)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), gate * torch.sigmoid(gate) * up, rtol=tolerance, atol=tolerance)
