"""An adapter's weights as runners use them: of each layer and group of matrices one A and one B.

The matrices that the model stacks (``qkv``, ``gate_up``) share an input, so their adapters are stacked too:
one product with all A shrinks it, and each line of B reads the part of that which belongs to its target.
Ranks are padded to multiples of 16 in each group of each layer by itself, not to the largest of the adapter
(S-LoRA, Sheng et al. 2023, keeps ranks apart for the same reason).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from realm.adapters.tensors import (
    GROUP_TARGETS,
    GROUPS,
    AdaptedModule,
    Ranks,
    check_magnitudes,
    group_widths,
    layout,
    pieces,
    scaled_tensors,
    unreadable,
)
from realm.models.config import ModelConfig

__all__ = [
    "GROUPS",
    "GROUP_TARGETS",
    "RANK_UNIT",
    "AdapterBlock",
    "AdapterWeights",
    "group_widths",
    "load_adapter",
    "packed_bytes",
]

RANK_UNIT = 16
"""Ranks are padded to a multiple of this."""
_ALIGN = 128
"""Each a and b begins at a multiple of so many elements."""
_PIECE = 32_512
"""Elements converted at a time: torch computes fewer than 32,768 in the calling thread alone, and a thread that
loads adapters must neither start a pool of threads of its own nor hold the engine's up for long."""

_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterBlock(NamedTuple):
    """The adapter of one group of matrices of one layer.

    Attributes:
        a: [targets * rank, in]: the A of each of the group's targets (zeros where it is not adapted), each padded
            with zero lines to ``rank``.
        b: [out, rank], ``out`` being the widths of the targets together: line o belongs to the target that has
            output o, and its columns to the lines of that target's A. The scaling is in it.
        rank: a multiple of :data:`RANK_UNIT`.
    """

    a: Tensor
    b: Tensor
    rank: int


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """All blocks of one adapter.

    Attributes:
        data: 1-D and contiguous, on the CPU, in the model's dtype; a and b of each block begin at multiples of 128
            elements, and what lies between is zero.
        ranks: int32 [layers, 4], of each layer and group of :data:`GROUPS` the padded rank; 0: it is not adapted.
        a_at, b_at: int64 [layers, 4], where a and b begin in ``data``, in elements.
        rank: the largest rank of a module, not padded.
        widths: of each group the elements of its input and of its output, and how many targets it has.
    """

    data: Tensor
    ranks: npt.NDArray[np.int32]
    a_at: npt.NDArray[np.int64]
    b_at: npt.NDArray[np.int64]
    rank: int
    widths: tuple[tuple[int, int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of ``data``."""
        return self.data.numel() * self.data.element_size()

    def block(self, layer: int, group: int) -> AdapterBlock | None:
        """Views of ``data``; ``group`` is an index of :data:`GROUPS`. None where that is not adapted."""
        rank = int(self.ranks[layer, group])
        if not rank:
            return None
        fan_in, fan_out, targets = self.widths[group]
        a, b = int(self.a_at[layer, group]), int(self.b_at[layer, group])
        return AdapterBlock(
            self.data[a : a + targets * rank * fan_in].view(targets * rank, fan_in),
            self.data[b : b + fan_out * rank].view(fan_out, rank),
            rank,
        )


def load_adapter(
    file: Path, config: Ranks, model: ModelConfig, dtype: torch.dtype, rest: Callable[[], None] | None = None
) -> AdapterWeights:
    """Read an ``adapter_model.safetensors``; ``config`` is what :func:`realm.adapters.peft.parse_config` gave.

    Each element is scaled in float32 and rounded once. Beside the result 128 KiB are held. ``rest`` is called after
    each tensor.

    Raises:
        RealmError: ``adapter_invalid`` as :func:`realm.adapters.peft.check_adapter`: the file is checked again.
    """
    modules = layout(file, config, model)
    plan = _Plan(modules, model)
    # Not by torch, which fills so much with several threads: see _PIECE.
    data = torch.from_numpy(np.zeros(plan.elements * dtype.itemsize, np.uint8)).view(dtype)
    buffer = np.empty(4 * _PIECE, np.uint8)
    try:
        with file.open("rb", buffering=0) as opened:
            for tensor, module, scaling in scaled_tensors(modules):
                target = plan.place(data, module, tensor is module.a)
                # Whole lines, where they are not contiguous in the target.
                at, line = 0, 1 if target.dim() == 1 else target.shape[1]
                for piece in pieces(opened, tensor, _PIECE // line * line, buffer):
                    check_magnitudes(tensor, piece, scaling)
                    values = torch.from_numpy(piece).view(_TORCH_TYPES[tensor.dtype])
                    lines = values.numel() // line
                    if scaling != 1.0:
                        values = values.float().mul_(scaling)
                    target[at : at + lines].copy_(values if target.dim() == 1 else values.view(lines, line))
                    at += lines
                if rest is not None:
                    rest()
    except OSError as error:
        raise unreadable(file, error) from error
    return AdapterWeights(data, plan.ranks, plan.a_at, plan.b_at, max(m.rank for m in modules), plan.widths)


def packed_bytes(file: Path, config: Ranks, model: ModelConfig, dtype: torch.dtype) -> int:
    """``nbytes`` that :func:`load_adapter` would give, from the header alone. Raises as that."""
    return _Plan(layout(file, config, model), model).elements * dtype.itemsize


class _Plan:
    """Where everything comes to lie."""

    def __init__(self, modules: list[AdaptedModule], model: ModelConfig) -> None:
        self.ranks = np.zeros((model.layers, len(GROUPS)), np.int32)
        self.a_at = np.zeros((model.layers, len(GROUPS)), np.int64)
        self.b_at = np.zeros((model.layers, len(GROUPS)), np.int64)
        groups = [group_widths(model, group) for group in GROUPS]
        self.widths = tuple((fan_in, sum(outs), len(outs)) for fan_in, outs in groups)
        self._places: dict[str, tuple[int, int, int, int]] = {}
        for number, (group, (_, outs)) in enumerate(zip(GROUPS, groups, strict=True)):
            for index, target in enumerate(GROUP_TARGETS[group]):
                self._places[target] = number, index, sum(outs[:index]), outs[index]
        for module in modules:
            at = module.layer, self._places[module.target][0]
            self.ranks[at] = max(int(self.ranks[at]), -(-module.rank // RANK_UNIT) * RANK_UNIT)
        self.elements = 0
        for layer, number in np.argwhere(self.ranks).tolist():
            fan_in, fan_out, targets = self.widths[number]
            rank = int(self.ranks[layer, number])
            self.a_at[layer, number] = self._take(targets * rank * fan_in)
            self.b_at[layer, number] = self._take(fan_out * rank)

    def _take(self, elements: int) -> int:
        at = self.elements
        self.elements += -(-elements // _ALIGN) * _ALIGN
        return at

    def place(self, data: Tensor, module: AdaptedModule, is_a: bool) -> Tensor:
        """Where a module's A goes in ``data`` [rank * in], or its B: [out, rank], or flat if it needs no padding."""
        number, index, above, out = self._places[module.target]
        rank, fan_in = int(self.ranks[module.layer, number]), self.widths[number][0]
        if is_a:
            a = int(self.a_at[module.layer, number]) + index * rank * fan_in
            return data[a : a + module.rank * fan_in]
        b = int(self.b_at[module.layer, number]) + above * rank
        lines = data[b : b + out * rank]
        return lines if module.rank == rank else lines.view(out, rank)[:, : module.rank]
