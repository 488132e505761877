"""The sampler's kernels compile for compute capability 9.0 and fit on a multiprocessor. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from tests.kernel_compiler import Compiled

PROGRAM = """
import msgspec, torch
from dataclasses import asdict
from realm.engine.kernels.sampling import DeviceDraws, DeviceSampler
from tests.kernel_compiler import compiled

sampler = DeviceSampler(128_256, 4, "cpu")
floats, ints = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
draws = DeviceDraws(floats, ints, floats, floats, floats.double(), torch.zeros(4, 4008, dtype=torch.int32))

def sample(dtype, **flags):
    logits = torch.zeros(4, 128_256, dtype=dtype)
    return compiled(lambda: sampler.sample(logits, 4, draws, ints, floats, **flags))

kernels = sample(torch.bfloat16, greedy=True, filtered=False, masked=False, logprobs=False)
kernels += sample(torch.bfloat16, greedy=False, filtered=False, masked=False, logprobs=False)
kernels += sample(torch.float32, greedy=False, filtered=True, masked=True, logprobs=True)
for kernel in kernels:
    print(msgspec.json.encode(asdict(kernel)).decode())
"""


def test_kernels_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, env=environment)
    assert run.returncode == 0, run.stderr.decode()
    kernels = [msgspec.json.decode(line, type=Compiled) for line in run.stdout.splitlines()]
    searched = ["begin_kernel", "split_kernel", "window_kernel", "gather_kernel", "cut_kernel", "weigh_kernel"]
    plain = ["survey_kernel", "choose_kernel"]
    assert [kernel.name for kernel in kernels] == [*plain * 2, "survey_kernel", *searched, "choose_kernel"]
    for kernel in kernels:
        assert kernel.shared <= 48 * 1024, kernel
        assert kernel.stack <= 64, f"registers are spilled: {kernel}"
        # All of a multiprocessor's 65,536 registers for one program would leave the others waiting.
        assert kernel.registers * 32 * kernel.warps <= 65_536, kernel
