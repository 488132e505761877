"""Linear layers of one row against float64, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import tests.interpreter  # noqa: F401
from realm.engine.kernels.skinny import PROGRAMS, SKINNY_ROWS, skinny_linear
from tests.kernel_cases import Linear, make_linear

VARIANTS = {
    "plain": {"bias": False, "gain": False, "gated": False, "add": False},
    "qkv": {"bias": True, "gain": True, "gated": False, "add": False},
    "output": {"bias": True, "gain": False, "gated": False, "add": True},
    "gate_up": {"bias": False, "gain": True, "gated": True, "add": False},
    "gate_up with bias": {"bias": True, "gain": True, "gated": True, "add": False},
    "all": {"bias": True, "gain": True, "gated": True, "add": True},
}


def run(linear: Linear) -> None:
    skinny_linear(
        linear.x,
        linear.weight,
        linear.out,
        bias=linear.bias,
        gain=linear.gain,
        eps=linear.EPS,
        gated=linear.gated,
        add=linear.add,
    )


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("inner", "width"), [(48, 20), (8, 1), (333, 33), (4100, 3)])
def test_skinny_linear(variant: dict[str, bool], inner: int, width: int) -> None:
    linear = make_linear(SKINNY_ROWS, inner, width, **variant)
    expected = linear.expected()
    run(linear)
    torch.testing.assert_close(linear.out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_wide_result_has_programs_of_several_columns() -> None:
    linear = make_linear(1, 16, 2 * PROGRAMS + 1, **VARIANTS["all"])
    expected = linear.expected()
    run(linear)
    torch.testing.assert_close(linear.out.double(), expected, rtol=1e-5, atol=1e-5)
