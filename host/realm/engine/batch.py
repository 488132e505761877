"""What one step computes, as plain data: the contract between the engine's core and its runners.

The core fills a :class:`StepBatch` with a few array operations and gives it to a :class:`Runner`, which
starts it and returns at once with a :class:`Launched`. Steps are carried out in the order of their
launches, like the work of a CUDA stream: a step sees all that earlier ones wrote. So the core may launch
a step whose input tokens the step before has not drawn yet (:data:`LAST_DRAWN`), free pages that a step
in flight still writes, and give them to a sequence of a later step.

A *lane* is a place for one decoding sequence, ``0..max_sequences - 1``. A runner keeps for each lane the
token that was drawn for it last.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from realm.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from realm.adapters.weights import AdapterWeights

Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

LAST_DRAWN = -1
"""In place of an input token: the token that the row's lane drew in the last step that drew for it."""


@dataclass(slots=True)
class Decodes:
    """Rows that compute one token each.

    Attributes:
        lanes: [n], distinct. tokens: [n], input tokens, or :data:`LAST_DRAWN`.
        positions: [n], of the input token; its keys and values are written there, and attention
            reads positions up to and with it.
        tables: page numbers of every lane, [lanes, width]; row ``tables[lanes[i]]`` is row i's, valid as
            far as ``positions[i] // PAGE_SIZE``. The core's own array: a runner reads it during ``launch``
            only.
        longest: the largest number of tokens that a row attends to, its own with them.
    """

    lanes: Ints
    tokens: Ints
    positions: Ints
    tables: Ints
    longest: int

    def __len__(self) -> int:
        return len(self.lanes)


@dataclass(slots=True)
class Chunk:
    """Some tokens of one sequence's prompt (or of what it has to compute anew), at least one.

    ``tokens`` uint32 [count] at positions ``start ..``; ``pages`` hold positions 0 up to the last of
    them. ``draws``: its last position is an output row. ``lane``: where the token drawn from it is kept
    as the lane's last, or -1.
    """

    tokens: npt.NDArray[np.uint32]
    start: int
    pages: list[int]
    draws: bool
    lane: int = -1


@dataclass(slots=True)
class Draws:
    """How the next token of each output row is drawn: the semantics of :class:`realm.messages.SamplingParams`.

    ``uniform`` is the draw in [0, 1). ``logprob`` asks for the log-probability; where no row asks, it
    need not be computed. ``masks`` are (output row, mask bytes). Repetition penalties and biases never
    reach a runner: the core draws such rows itself, from logits that it asks for.
    """

    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    uniform: Doubles
    logprob: Flags
    masks: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def greedy(self) -> bool:
        """Whether every row takes the most likely token."""
        return not self.temperature.any()

    @property
    def filtered(self) -> bool:
        """Whether any row has a top-k, top-p or min-p."""
        return bool(self.top_k.any() or (self.top_p < 1).any() or self.min_p.any())


@dataclass(slots=True)
class StepBatch:
    """One step. Output rows are the rows of ``decodes``, in order, then the chunks that draw, in order.

    Attributes:
        draws: one row for each output row.
        logits: output rows whose logits come back too, ascending.
        copies: (source, destination) pages to copy before anything else, all read before any is written;
            destinations are distinct.
        fresh: pages to clear before anything is written: what the step leaves of them is read (and hidden).
        adapters: int32 [len(decodes) + len(chunks)], the slot of each decoding row's adapter, then of each chunk's;
            -1 is none. None where no row has one: such a step costs nothing more than without adapters.
    """

    decodes: Decodes
    chunks: list[Chunk]
    draws: Draws
    logits: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    adapters: Ints | None = None

    @property
    def outputs(self) -> int:
        """Number of output rows."""
        return len(self.decodes) + sum(chunk.draws for chunk in self.chunks)


@dataclass(slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        tokens: int32 [outputs]. logprobs: float32 [outputs], NaN where not asked for.
        logits: float32 [len(batch.logits), vocab], or None when none was asked for.
        flat: output rows whose draw was costly, because the most likely tokens did not decide it.
        seconds: how long the step took on its device.
    """

    tokens: Ints
    logprobs: Floats
    logits: Floats | None = None
    flat: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Launched(Protocol):
    """A step that was launched."""

    def done(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        ...

    def wait(self) -> StepResult:
        """The step's results; waits for them. Raises what went wrong on the device."""
        ...


class AdapterMemory(Protocol):
    """Where a runner keeps adapters that steps can use: bytes in a row, of which the core gives each adapter some.

    Attributes:
        slots: how many adapters at most. capacity: bytes; 0 where adapters are not to be had.
        dtype: of the weights.
    """

    @property
    def slots(self) -> int: ...

    @property
    def capacity(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def put(self, slot: int, at: int, weights: AdapterWeights) -> None:
        """Make an adapter usable as ``slot``, in the bytes from ``at`` (a multiple of 256); returns when it is.

        Called by one thread beside the owner's, while steps are launched and computed. No row launched from now
        on uses the slot before this returns, nor what lies in those bytes; rows in flight that do are nobody's.
        """
        ...


class NoAdapterMemory:
    """Of a runner that has none. See :class:`AdapterMemory`."""

    slots = 0
    capacity = 0

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def put(self, slot: int, at: int, weights: AdapterWeights) -> None:
        """Never called: there are no slots."""
        raise AssertionError("there is no memory for adapters")


class Runner(Protocol):
    """A model on a device, with its KV pages. One thread owns it.

    Attributes:
        config: the model's shape. lanes: how many there are. pages: KV pages of 16 tokens.
        adapters: where it keeps adapters.
    """

    config: ModelConfig
    lanes: int
    pages: int

    @property
    def adapters(self) -> AdapterMemory: ...

    def launch(self, batch: StepBatch) -> Launched:
        """Start a step after all that were launched before. Returns before it is done where the device can."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable while a done step has not been waited for, or -1 where there is
        none and :meth:`Launched.done` has to be asked."""
        ...

    def close(self) -> None:
        """Give the device back. Idempotent."""
        ...
