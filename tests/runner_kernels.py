"""Compile the CUDA runner's own kernels without a GPU: ``python -m tests.runner_kernels`` prints their names.

See :mod:`tests.kernel_compiler`.
"""

from __future__ import annotations

from tests.kernel_compiler import compiled


def launch_all() -> None:
    """Launch each kernel once, with tensors that hold nothing."""
    import torch

    from realm.engine.runners.cuda_kernels import copy_pages, embed, keep, spread_tables

    ints = torch.zeros(4, dtype=torch.int32)
    cache = torch.empty(2, 2, 5, 3, 16, 64, dtype=torch.bfloat16)
    embed(ints, ints, ints, torch.empty(7, 576, dtype=torch.bfloat16), torch.empty(4, 576, dtype=torch.bfloat16))
    keep(ints, ints, ints)
    spread_tables(ints.view(2, 2), torch.zeros(4, 64, dtype=torch.int32))
    copy_pages(cache, ints.long(), cache, ints.long())


if __name__ == "__main__":
    for kernel in compiled(launch_all):
        assert kernel.stack <= 64, f"registers are spilled: {kernel}"
        print(kernel.name)
