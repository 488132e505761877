"""What adapters add to a forward pass: their part of each product, and the plan of who has which.

Of an adapter's two launches a product, only the second is in the way of what follows: the first needs what the base
model's product needs, so it runs beside it on a stream of its own, forked and joined within the capture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import Ints
from realm.engine.kernels.lora import FEW, MANY, SPLIT_ROWS, lora_expand, lora_shrink, workspace_size
from realm.engine.kernels.lora_plan import lora_plan
from realm.engine.runners.cuda_adapters import DeviceAdapters
from realm.engine.runners.cuda_memory import plan_words
from realm.engine.runners.cuda_pass import DevicePass
from realm.engine.runners.cuda_staging import Block

ATTENTION_ONLY, EVERY = (0, 1), (0, 1, 2, 3)
FAMILIES = (EVERY, ATTENTION_ONLY)
"""Groups of products that a graph with adapters adapts. Most adapters leave the feed-forward block alone, and a
launch that finds nothing to do still takes its 2 µs."""

BESIDE = True
"""Whether the first launch runs beside the base model's product."""


class AdaptedSteps:
    """Plans of steps with adapters, and the products that read them.

    The plan on the device is the last step's; a step with the same rows and adapters sends none.
    """

    def __init__(self, memory: DeviceAdapters, device_pass: DevicePass, token_budget: int, rows: int) -> None:
        """``rows``: most output rows of a step. ``token_budget``: most tokens of its chunks."""
        assert memory.device is not None
        device = device_pass.model.device
        cuda = device.type == "cuda"
        self._memory = memory
        self._pass = device_pass
        self._weights = memory.device
        self._plan = torch.zeros(plan_words(token_budget, rows), dtype=torch.int32, device=device)
        size = workspace_size(device_pass.rows)
        self._partial = torch.empty(size, dtype=torch.float32, device=device)
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
        self._side: Any = torch.cuda.Stream(device) if cuda and BESIDE else None  # type: ignore[no-untyped-call]
        self._events: list[Any] = []
        if self._side is not None:
            self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._there: tuple[Ints, object] | None = None
        self._placed: tuple[Ints, object, Tensor] | None = None

    def family(self, adapters: Ints) -> tuple[int, ...] | None:
        """Which groups the slots of a step (-1: none) adapt; None where that is no group at all."""
        lines = self._memory.lines[adapters[adapters >= 0]]
        if lines[:, len(ATTENTION_ONLY) :].any():
            return EVERY
        return ATTENTION_ONLY if lines.any() else None

    def products(self, groups: tuple[int, ...], tile: int) -> AdaptedProducts:
        """What adds the adapters' part, for tiles of so many rows (:func:`realm.engine.kernels.lora.lora_tile`)."""
        return AdaptedProducts(self, groups, tile)

    def reset(self) -> None:
        """Forget what was placed for a step that was not launched."""
        self._placed = None

    def place(self, block: Block, slots: Ints, groups: tuple[int, ...], tile: int) -> None:
        """Write a step's plan into ``block``, unless the device has it.

        Args:
            slots: int32 [rows], of each row of the pass, -1 for none; rows that only fill it may be left out.

        Raises:
            ValueError: when the step has more sequences than the runner was made for.
        """
        kind = (groups, tile, self._memory.version)
        if self._there is not None and self._there[1] == kind and np.array_equal(self._there[0], slots):
            return
        plan = lora_plan(slots, self._memory.lines, groups, tile=tile, block=tile)
        if len(plan) > len(self._plan):
            raise ValueError(f"adapters of {len(slots)} rows take {len(plan):,} numbers, more than {len(self._plan):,}")
        host, device = block.place(np.int32, len(plan))
        host[:] = plan
        self._placed = slots.copy(), kind, device

    def spread(self) -> None:
        """Bring what :meth:`place` wrote to its place, after the block was sent."""
        if self._placed is not None:
            slots, kind, sent = self._placed
            self._there = None
            self._plan[: len(sent)].copy_(sent, non_blocking=True)
            self._there, self._placed = (slots, kind), None

    def compile_kernels(self) -> None:
        """Launch both kernels in every way that a step may need, with a plan of nothing."""
        for rows in {1, min(self._pass.rows, SPLIT_ROWS + 1)}:
            for tile in (FEW, MANY):
                products = self.products(EVERY, tile)
                for group, (_, x, out) in enumerate(self._pass.operands(rows)):
                    products.begin(0, group, x)
                    products.end(0, group, out)

    def shrink(self, layer: int, group: int, x: Tensor, tile: int) -> None:
        """The first launch, beside what is launched next on the current stream."""
        if self._side is None:
            self._shrink(layer, group, x, tile)
            return
        fork, join = self._events
        fork.record()
        self._side.wait_event(fork)
        with torch.cuda.stream(self._side):
            self._shrink(layer, group, x, tile)
            join.record()

    def _shrink(self, layer: int, group: int, x: Tensor, tile: int) -> None:
        lora_shrink(
            x,
            self._weights,
            self._plan,
            self._partial,
            self._memory.groups[group],
            layer=layer,
            tile=tile,
            multiprocessors=self._multiprocessors,
        )

    def expand(self, layer: int, group: int, out: Tensor, tile: int) -> None:
        """The second launch, after the first and all that was launched on the current stream."""
        if self._side is not None:
            torch.cuda.current_stream().wait_event(self._events[1])
        lora_expand(
            self._partial,
            self._weights,
            self._plan,
            out,
            self._memory.groups[group],
            layer=layer,
            tile=tile,
            multiprocessors=self._multiprocessors,
        )


class AdaptedProducts:
    """See :class:`realm.engine.runners.cuda_pass.Adapted`."""

    def __init__(self, steps: AdaptedSteps, groups: tuple[int, ...], tile: int) -> None:
        self._steps = steps
        self._groups = groups
        self._tile = tile

    def begin(self, layer: int, group: int, x: Tensor) -> None:
        """See :class:`realm.engine.runners.cuda_pass.Adapted`."""
        if group in self._groups:
            self._steps.shrink(layer, group, x, self._tile)

    def end(self, layer: int, group: int, out: Tensor) -> None:
        """See :class:`realm.engine.runners.cuda_pass.Adapted`."""
        if group in self._groups:
            self._steps.expand(layer, group, out, self._tile)
