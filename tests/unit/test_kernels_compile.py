"""The kernels compile for compute capability 9.0 and fit on a multiprocessor. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest

from tests.kernel_compiler import Compiled

SHARED = 227 * 1024
"""Shared memory that one program may take, in bytes (CUDA C++ Programming Guide, compute capability 9.0)."""


@pytest.mark.parametrize(
    "shape",
    [
        (32, 8, 64, 2048, 8192, "bfloat16"),
        (9, 3, 128, 576, 1536, "bfloat16"),
        (8, 8, 256, 2048, 8192, "float32"),
    ],
    ids=str,
)
def test_kernels_compile(shape: tuple[object, ...]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernel_compiler"],
        input=msgspec.json.encode([shape]),
        capture_output=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr.decode()
    kernels = [msgspec.json.decode(line, type=Compiled) for line in run.stdout.splitlines()]
    assert {kernel.name for kernel in kernels} == {
        "_attention_decode_kernel",
        "_attention_prefill_kernel",
        "_rope_and_store_kernel",
        "_add_rms_norm_kernel",
        "_silu_mul_kernel",
        "_skinny_linear_kernel",
        "_lora_shrink_kernel",
        "_lora_expand_kernel",
    }
    for kernel in kernels:
        assert kernel.shared <= SHARED, kernel
        if shape[-1] == "bfloat16":
            assert kernel.stack <= 64, f"registers are spilled: {kernel}"
