"""Launches with little work for the CPU: triton's own way finds the compiled kernel anew from every argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton compiles loads of 16 bytes where a tensor's address is a multiple of it."""

INTEGERS = (torch.int32, torch.int64)


def power_of_two(count: int) -> int:
    """The smallest one that is at least ``count``. (Triton's own function costs as much as a launch.)"""
    return 1 << (count - 1).bit_length()


class Kernel:
    """A Triton function with its compiled variants.

    Its parameters are tensors, then integers that it is not specialized on (``do_not_specialize``), then constants.
    Tensors of integers are such that it is not specialized on their alignment either.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._compiled: dict[Any, Any] = {}

    def launch(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Tensor, ...],
        integers: tuple[int, ...],
        constants: tuple[object, ...],
        *,
        warps: int,
        stages: int = 3,
    ) -> None:
        """Compiles at the first use of these types and constants. ``integers`` fit in 31 bits."""
        kinds: list[torch.dtype] = []
        addresses = 0
        for tensor in tensors:
            kind = tensor.dtype
            kinds.append(kind)
            if kind not in INTEGERS:
                addresses |= tensor.data_ptr()
        # A variant for aligned tensors must not get others.
        if addresses % ALIGNMENT:
            self._function[grid](*tensors, *integers, *constants, num_warps=warps, num_stages=stages)
            return
        key = (*kinds, constants, warps, stages, tensors[0].device)
        compiled = self._compiled.get(key)
        if compiled is None:
            # None from the interpreter: it compiles nothing.
            self._compiled[key] = self._function[grid](
                *tensors, *integers, *constants, num_warps=warps, num_stages=stages
            )
        else:
            compiled[grid](*tensors, *integers, *constants)
