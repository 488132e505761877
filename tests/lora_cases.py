"""Adapters of any ranks in one batch at random, and what they add, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realm.adapters.weights import AdapterWeights
from realm.engine.kernels.lora import Adapters, Group, lora_expand, lora_shrink, splits, workspace_size
from realm.engine.kernels.lora_plan import lora_plan
from realm.engine.runners.cuda import CudaRunner
from realm.engine.runners.cuda_adapters import model_groups
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel


@dataclass(frozen=True)
class LoraCase:
    """One layer's products of rows, of which row i has the adapter in slot ``slots[i]``, or none where that is -1.

    ``ranks[slot][group]`` are of the only layer that has weights, the last of ``layers``; what no adapter has is NaN.
    """

    groups: tuple[Group, ...]
    slots: list[int]
    ranks: np.ndarray
    adapters: Adapters
    layers: int
    tile: int

    def block(self, slot: int, group: Group) -> tuple[Tensor, Tensor]:
        """A [targets * rank, inner] and B [width, rank]."""
        rank = int(self.ranks[slot, group.number])
        a_at, b_at = self.adapters.places[slot, -1, group.number].tolist()
        lines, width = len(group.widths) * rank, sum(group.widths)
        weights = self.adapters.weights
        a = weights[a_at : a_at + lines * group.inner].view(lines, group.inner)
        return a, weights[b_at : b_at + width * rank].view(width, rank)

    def expected(self, x: Tensor, out: Tensor, group: Group) -> Tensor:
        """``out`` with what the adapters add, in float64; ``y`` rounded as the kernels round it."""
        result = out.double()
        for row, slot in enumerate(self.slots):
            if slot < 0 or not (rank := int(self.ranks[slot, group.number])):
                continue
            a, b = self.block(slot, group)
            y = (a.double() @ x[row].double()).to(x.dtype).double()
            first = 0
            for target, width in enumerate(group.widths):
                columns = slice(first, first + width)
                result[row, columns] += b[columns].double() @ y[target * rank : (target + 1) * rank]
                first += width
        return result

    def plan(self) -> Tensor:
        lines = self.ranks * np.array([len(group.widths) for group in self.groups], np.int32)
        numbers = tuple(group.number for group in self.groups)
        plan = lora_plan(np.array(self.slots, np.int32), lines, numbers, tile=self.tile, block=self.tile)
        return torch.from_numpy(plan).to(self.adapters.weights.device)

    def run(self, x: Tensor, out: Tensor, group: Group, *, multiprocessors: int = 1) -> None:
        """Both launches, in a workspace full of NaN."""
        partial = torch.full((workspace_size(len(x)),), float("nan"), device=x.device)
        assert splits(len(x), group) * len(x) * group.most_lines <= len(partial)
        plan = self.plan()
        options = {"layer": self.layers - 1, "tile": self.tile, "multiprocessors": multiprocessors}
        lora_shrink(x, self.adapters, plan, partial, group, **options)
        lora_expand(partial, self.adapters, plan, out, group, **options)

    def operands(self, group: Group, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What goes into a product, and what the base model's gave: about one in size."""
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(len(self.slots), group.inner, generator=source)
        out = torch.randn(len(self.slots), sum(group.widths), generator=source)
        weights = self.adapters.weights
        return x.to(weights.device, weights.dtype), out.to(weights.device, weights.dtype)


def make_lora(
    groups: Sequence[Group],
    slots: Sequence[int],
    ranks: Sequence[Sequence[int]],
    *,
    tile: int = 16,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> LoraCase:
    """Blocks lie in the order of slots and groups, each behind a hole."""
    table = np.array(ranks, np.int32).reshape(len(ranks), len(groups))
    rng = np.random.default_rng(seed)
    places = np.zeros((len(table), layers, len(groups), 2), np.int64)
    parts: list[np.ndarray] = []
    end = 0
    for slot, of_slot in enumerate(table.tolist()):
        for group, rank in zip(groups, of_slot, strict=True):
            if not rank:
                continue
            sizes = (len(group.widths) * rank * group.inner, sum(group.widths) * rank)
            for which, (size, scale) in enumerate(zip(sizes, (group.inner, rank), strict=True)):
                hole = 128 - end % 128
                parts += [np.full(hole, np.nan), rng.standard_normal(size) * scale**-0.5]
                places[slot, -1, group.number, which] = end + hole
                end += hole + size
    everything = np.concatenate([*parts, np.full(128, np.nan)]).astype(np.float32)
    of_layers = np.zeros((len(table), layers, len(groups)), np.int32)
    of_layers[:, -1] = table
    adapters = Adapters(
        torch.from_numpy(everything).to(device, dtype),
        torch.from_numpy(places).to(device),
        torch.from_numpy(of_layers).to(device),
    )
    return LoraCase(tuple(groups), list(slots), table, adapters, layers, tile)


def random_adapter(
    config: ModelConfig, ranks: Sequence[int] | np.ndarray, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> AdapterWeights:
    """An adapter at random that changes results much. ``ranks``: of each group, or of each layer and group."""
    source = torch.Generator().manual_seed(seed)
    table = np.broadcast_to(np.asarray(ranks, np.int32), (config.layers, 4)).copy()
    a_at, b_at = np.zeros(table.shape, np.int64), np.zeros(table.shape, np.int64)
    parts: list[Tensor] = []
    end = 0
    groups = model_groups(config)
    for layer in range(config.layers):
        for group in groups:
            rank = int(table[layer, group.number])
            for begins, lines, columns, fan in (
                (a_at, len(group.widths) * rank, group.inner, group.inner),
                (b_at, sum(group.widths), rank, rank),
            ):
                if not rank:
                    continue
                begins[layer, group.number] = end
                block = torch.randn(lines * columns, generator=source) * 0.7 * fan**-0.5
                parts += [block, torch.zeros(-len(block) % 128)]
                end += len(block) + len(parts[-1])
    data = torch.cat(parts).to(dtype) if parts else torch.zeros(0, dtype=dtype)
    widths = tuple((group.inner, sum(group.widths), len(group.widths)) for group in groups)
    return AdapterWeights(data, table, a_at, b_at, int(table.max()), widths)


def merge(model: LlamaModel, adapter: AdapterWeights) -> LlamaModel:
    """``model`` with the adapter added to its weights, in place."""
    with torch.inference_mode():
        for number, layer in enumerate(model.layers):
            for group, linear in zip(
                model_groups(model.config), (layer.qkv, layer.output, layer.gate_up, layer.down), strict=True
            ):
                block = adapter.block(number, group.number)
                if block is None:
                    continue
                first, weight = 0, linear.weight
                for target, width in enumerate(group.widths):
                    a = block.a[target * block.rank : (target + 1) * block.rank].to(weight.device).double()
                    b = block.b[first : first + width].to(weight.device).double()
                    part = weight[first : first + width]
                    part.copy_(part.double() + b @ a)
                    first += width
    return model


def fill(runner: CudaRunner, adapters: Sequence[AdapterWeights]) -> None:
    """Slot i gets the i-th; they lie one after another."""
    at = 0
    for slot, adapter in enumerate(adapters):
        runner.adapters.put(slot, at, adapter)
        at += -(-adapter.nbytes // 256) * 256
