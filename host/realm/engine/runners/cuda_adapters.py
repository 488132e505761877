"""Adapters in a GPU's memory: one range of bytes for each, and tables of where what lies.

An adapter is copied while steps are launched and computed, on a stream of its own and through pinned memory of its
own, in pieces so small that a step's inputs, which take the same way to the device, wait for none of them long.
Nothing is allocated and no other stream is waited for.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from realm.adapters.tensors import GROUPS as GROUP_NAMES
from realm.adapters.tensors import group_widths
from realm.engine.batch import Ints
from realm.engine.kernels.lora import LEAST_RANK, Adapters, Group
from realm.engine.kernels.lora_plan import GROUP_TARGETS, MOST_RANK
from realm.engine.runners.cuda_staging import HostEvent
from realm.models.config import ModelConfig

if TYPE_CHECKING:
    from realm.adapters.weights import AdapterWeights

SLOTS = 2048
"""Adapters at most, however small they are."""

ALIGNMENT = 256
"""Bytes that adapters begin at multiples of."""

PIECE = 1 << 20
"""Bytes that are copied at once: some 20 µs on the way to a device. Two may be on their way."""

GROUPS = len(GROUP_TARGETS)


def model_groups(config: ModelConfig) -> tuple[Group, ...]:
    """A layer's products, in the order of :data:`realm.adapters.tensors.GROUPS`."""
    widths = [group_widths(config, group) for group in GROUP_NAMES]
    return tuple(Group(number, inner, tuple(outs)) for number, (inner, outs) in enumerate(widths))


def adapter_slack(config: ModelConfig) -> int:
    """Elements behind the last adapter. Rows in flight may read with the rank of an adapter and the place of the
    one that takes its slot: what comes of it is nobody's, but it must lie in memory that is there."""
    return MOST_RANK * max(len(g.widths) * g.inner + sum(g.widths) for g in model_groups(config))


class DeviceAdapters:
    """See :class:`realm.engine.batch.AdapterMemory`.

    Attributes:
        slots, capacity, dtype: see there.
        device: the weights and tables, for kernels; None where the capacity is 0.
        lines: int32 [slots, groups], of how many lines A is in each group, over all layers the most.
        version: changes with each adapter that comes.
    """

    @torch.inference_mode()
    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        """Take the memory. ``capacity``: bytes; 0 or less is no adapters."""
        self.capacity = max(0, capacity) // ALIGNMENT * ALIGNMENT
        self.slots = SLOTS if self.capacity else 0
        self.dtype = dtype
        self.groups = model_groups(config)
        self.lines: Ints = np.zeros((self.slots, GROUPS), np.int32)
        self.version = 0
        self.device: Adapters | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)
        if not self.capacity:
            return
        size = self.capacity + adapter_slack(config) * dtype.itemsize
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        shape = (self.slots, config.layers, GROUPS)
        self._places = torch.zeros((*shape, 2), dtype=torch.int64, device=device)
        self._ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self.device = Adapters(self._bytes.view(dtype), self._places, self._ranks)
        cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._staging = torch.empty((2, PIECE), dtype=torch.uint8, pin_memory=cuda)
        self._sent: list[Any] = [_waiting_event(cuda) for _ in range(2)]
        self._half = 0

    @torch.inference_mode()
    def put(self, slot: int, at: int, weights: AdapterWeights) -> None:
        """See :class:`realm.engine.batch.AdapterMemory`.

        Raises:
            ValueError: when slot, place or weights are not such as this memory takes. Nothing is changed then.
        """
        self._check(slot, at, weights)
        first = at // self.dtype.itemsize
        places = np.stack((weights.a_at, weights.b_at), -1).astype(np.int64) + first
        places[weights.ranks == 0] = 0
        data = _as_bytes(weights.data)
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            # Rows in flight that have the slot are nobody's from now on; better they find nothing than half of it.
            self._ranks[slot].zero_()
            self._send(data, self._bytes[at : at + len(data)])
            self._send(_as_bytes(torch.from_numpy(places)), _as_bytes(self._places[slot]))
            ranks = np.ascontiguousarray(weights.ranks, np.int32)
            self._send(_as_bytes(torch.from_numpy(ranks)), _as_bytes(self._ranks[slot]))
            for sent in self._sent:
                sent.synchronize()
        self.lines[slot] = weights.ranks.max(0) * np.array(GROUP_TARGETS, np.int32)
        self.version += 1

    def _send(self, data: Tensor, target: Tensor) -> None:
        """Copy bytes to the device, behind what was sent before. Waits for all but the last two pieces."""
        for begin in range(0, len(data), PIECE):
            piece = data[begin : begin + PIECE]
            half, self._half = self._half, 1 - self._half
            self._sent[half].synchronize()
            staged = self._staging[half, : len(piece)]
            staged.copy_(piece)
            target[begin : begin + len(piece)].copy_(staged, non_blocking=True)
            self._sent[half].record(self._stream)

    def _check(self, slot: int, at: int, weights: AdapterWeights) -> None:
        """The tables say what kernels read, so nothing in them may lead out of the adapter's bytes."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot}; there are {self.slots}")
        if at < 0 or at % ALIGNMENT or at + weights.nbytes > self.capacity:
            raise ValueError(f"{weights.nbytes:,} bytes at {at:,}; there are {self.capacity:,}")
        if weights.data.dtype != self.dtype or not weights.data.is_contiguous():
            raise ValueError(f"weights of {weights.data.dtype}; {self.dtype} is needed, one after another")
        ranks = weights.ranks
        shape = (self._ranks.shape[1], GROUPS)
        if ranks.shape != shape or weights.a_at.shape != shape or weights.b_at.shape != shape:
            raise ValueError(f"tables of {ranks.shape}; {shape} is needed")
        if (ranks % LEAST_RANK).any() or (ranks < 0).any() or (ranks > MOST_RANK).any():
            raise ValueError(f"ranks must be multiples of {LEAST_RANK} up to {MOST_RANK}")
        lines = np.array([len(group.widths) * group.inner for group in self.groups])
        columns = np.array([sum(group.widths) for group in self.groups])
        for begins, sizes in ((weights.a_at, ranks * lines), (weights.b_at, ranks * columns)):
            there = ranks > 0
            if (there & ((begins < 0) | (begins % 16 != 0) | (begins + sizes > weights.data.numel()))).any():
                raise ValueError("a block that is not within the weights")

    def close(self) -> None:
        """Give the memory back; none can be put any more. No adapter may be on its way."""
        self.slots = self.capacity = 0
        self.device = None
        self._bytes = torch.empty(0, dtype=torch.uint8)


def _as_bytes(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8)


def _waiting_event(cuda: bool) -> Any:
    """An event for which a thread sleeps rather than spins: the engine's thread wants the processor."""
    return torch.cuda.Event(blocking=True) if cuda else HostEvent()  # type: ignore[no-untyped-call]
