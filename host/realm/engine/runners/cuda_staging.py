"""How a step's inputs reach the device, and its results come back, without a wait.

A step's arrays are written one after another into one pinned block of a ring, and one asynchronous copy
brings them to a device buffer of the same layout. The device buffer is one for all steps: they run in
order on one stream, so the copy of a step comes after everything that reads the step before. A block of
the ring is written again only when its step is done.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 16
"""Arrays begin at multiples of this many bytes: a kernel is compiled once more for a pointer that does not."""

TORCH_TYPES: dict[type, torch.dtype] = {
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.float32: torch.float32,
    np.float64: torch.float64,
}

Array = npt.NDArray[Any]
A = TypeVar("A", Array, Tensor)


class Event(Protocol):
    """A point in a stream, as :class:`torch.cuda.Event` has it."""

    def record(self, stream: Any) -> None:
        """Put the point after all that was launched so far on ``stream``."""
        ...

    def query(self) -> bool:
        """Whether the stream has passed it."""
        ...

    def synchronize(self) -> None:
        """Wait until the stream has passed it."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this point to ``end``."""
        ...


class HostEvent:
    """The same on a CPU, where all that was launched is done."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self, stream: Any) -> None:
        """See :class:`Event`."""
        self._at = time.perf_counter()

    def query(self) -> bool:
        """See :class:`Event`."""
        return True

    def synchronize(self) -> None:
        """See :class:`Event`."""

    def elapsed_time(self, end: HostEvent) -> float:
        """See :class:`Event`."""
        return (end._at - self._at) * 1e3


def new_event(device: torch.device) -> Event:
    """An event that can tell times, for work on ``device``."""
    if device.type != "cuda":
        return HostEvent()
    event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


@dataclass(frozen=True, slots=True)
class DrawFields(Generic[A]):
    """:class:`realm.engine.batch.Draws` of n rows, and the lanes (int32) that keep their tokens."""

    lanes: A
    temperature: A
    top_k: A
    top_p: A
    min_p: A
    uniform: A


class Block:
    """A pinned block of bytes and a device buffer, filled with arrays from the front.

    Attributes:
        number: its place in the ring. end: how far it is filled, in bytes.
    """

    def __init__(self, number: int, host: Tensor, device: Tensor) -> None:
        """Both are uint8 and of one size."""
        self.number = number
        self._host = host
        self._bytes: npt.NDArray[np.uint8] = host.numpy()
        self._device = device
        self.end = 0

    def reset(self, end: int = 0) -> None:
        """Go on filling from byte ``end``, which a layout of this block gave before."""
        self.end = end

    def place(self, kind: type, count: int) -> tuple[Array, Tensor]:
        """Room for ``count`` values: where to write them, and where they will be on the device.

        Raises:
            ValueError: when the block is full.
        """
        first = self.end
        last = first + count * np.dtype(kind).itemsize
        if last > len(self._bytes):
            raise ValueError(f"a step's inputs take more than {len(self._bytes):,} bytes")
        self.end = -(-last // ALIGNMENT) * ALIGNMENT
        return self._bytes[first:last].view(kind), self._device[first:last].view(TORCH_TYPES[kind])

    def draws(self, count: int) -> tuple[DrawFields[Array], DrawFields[Tensor]]:
        """Room for the draws of ``count`` rows."""
        kinds = (np.int32, np.float32, np.int32, np.float32, np.float32, np.float64)
        places = [self.place(kind, count) for kind in kinds]
        return DrawFields(*(place[0] for place in places)), DrawFields(*(place[1] for place in places))

    def send(self) -> None:
        """Start the copy of all that was placed since the last :meth:`reset` to 0."""
        self._device[: self.end].copy_(self._host[: self.end], non_blocking=True)


class Results:
    """Tokens and log-probabilities of up to ``rows`` output rows, on the device and pinned."""

    def __init__(self, rows: int, tokens: Tensor, logprobs: Tensor) -> None:
        """``tokens`` int32 and ``logprobs`` float32, [rows], are the device's, the same for all steps."""
        pinned = tokens.device.type == "cuda"
        self._tokens, self._logprobs = tokens, logprobs
        self._host_tokens = torch.empty(rows, dtype=torch.int32, pin_memory=pinned)
        self._host_logprobs = torch.empty(rows, dtype=torch.float32, pin_memory=pinned)

    def fetch(self, count: int, logprobs: bool) -> None:
        """Start the copies of the first ``count`` rows to the host."""
        self._host_tokens[:count].copy_(self._tokens[:count], non_blocking=True)
        if logprobs:
            self._host_logprobs[:count].copy_(self._logprobs[:count], non_blocking=True)

    def take(self, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """What was fetched, once the step is done; copies, since the next step of this slot overwrites it."""
        return self._host_tokens[:count].numpy().copy(), self._host_logprobs[:count].numpy().copy()
