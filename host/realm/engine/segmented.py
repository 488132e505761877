"""Adapters on the CPU: segmented products, where each row of a step has its own adapter or none.

The rows of a step are grouped by adapter once; in each adapted linear layer a group goes through two small
products, ``(x @ A.T) @ B.T``, and is added to its rows of the layer's output (as in Punica, Chen et al. 2023,
and S-LoRA, Sheng et al. 2023, whose kernels do this for all groups at once). Rows without an adapter are not
touched: what they compute is bit for bit what they compute in a step without adapters.

How the products are kept is measured (two AVX512-BF16 cores, SmolLM2-135M, rank 16, weights not in a near cache).
A call of oneDNN's bf16 product costs 11 to 15 µs however small it is, one of MKL's float32 product 3 to 10, and a
group of a decoding step has few rows. So small factors are kept in float32, B by target: the two products
of q, k, v take 18 rather than 31 µs for one row, 26 rather than 29 for four. From some
:data:`SMALL` elements on (rank 48 for q, k, v) bf16 in oneDNN's layout wins, with the targets' B as one
block-diagonal matrix: rank 256 takes 72 rather than 136 µs for one row, 138 rather than 360 for 32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from realm.adapters.weights import GROUPS, group_widths
from realm.engine.batch import Longs
from realm.models.config import ModelConfig
from realm.models.llama import Linear

if TYPE_CHECKING:
    from realm.adapters.weights import AdapterBlock, AdapterWeights

SLOTS = 1024
SMALL = 3 << 15
"""Elements of a group's wider factor up to which float32 products are faster than oneDNN's."""
FEW = 64
"""Rows up to which small products are computed by one thread. Several would gain next to nothing and meet some
thousand times a step: beside busy processes, 32 rows with eight adapters took 5 times as long."""

_GROUP = {name: number for number, name in enumerate(GROUPS)}


class _Target(NamedTuple):
    """Columns ``first .. first + rank`` of x @ A.T give columns ``begin .. begin + width`` of the output."""

    first: int
    begin: int
    width: int
    b: Tensor | None
    """[rank, width], or None for a target that is not adapted."""


class _Small:
    """A group's factors in float32, B by target."""

    def __init__(self, a: Tensor, b: Tensor, ranks: list[int], widths: list[int]) -> None:
        """``a`` [sum(ranks), in]; ``b`` [sum(widths), >= max(ranks)], of which each target's columns count as far as
        its rank."""
        self._a = a.float().t().contiguous()
        self._targets: list[_Target] = []
        first = begin = 0
        for rank, width in zip(ranks, widths, strict=True):
            own = b[begin : begin + width, :rank].float().t().contiguous() if rank else None
            self._targets.append(_Target(first, begin, width, own))
            first, begin = first + rank, begin + width
        self.nbytes = self._a.nbytes + sum(target.b.nbytes for target in self._targets if target.b is not None)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """``x`` [n, in] and ``out`` [n, out], float32; ``out`` is overwritten."""
        shrunk = torch.mm(x, self._a)
        for first, begin, width, b in self._targets:
            part = out if width == out.shape[1] else out.narrow(1, begin, width)
            if b is None:
                part.zero_()
            else:
                torch.mm(shrunk.narrow(1, first, b.shape[0]), b, out=part)


class _Packed:
    """A group's factors in bf16 as :class:`Linear` keeps them; B is block-diagonal."""

    def __init__(self, a: Tensor, b: Tensor, ranks: list[int], widths: list[int]) -> None:
        """As for :class:`_Small`."""
        diagonal = torch.zeros(sum(widths), sum(ranks), dtype=b.dtype)
        first = begin = 0
        for rank, width in zip(ranks, widths, strict=True):
            diagonal[begin : begin + width, first : first + rank] = b[begin : begin + width, :rank]
            first, begin = first + rank, begin + width
        self._dtype = b.dtype
        self._a, self._b = Linear(a), Linear(diagonal)
        self.nbytes = sum(_kept(linear.weight) for linear in (self._a, self._b))

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """As for :class:`_Small`; what ``x`` holds was bf16 before."""
        out.copy_(self._b(self._a(x.to(self._dtype))))


def _kept(weight: Tensor) -> int:
    """Bytes of a weight, in whichever layout."""
    return int(torch.ops.mkldnn._nbytes(weight)) if weight.is_mkldnn else weight.nbytes


def _products(block: AdapterBlock, widths: list[int]) -> _Small | _Packed | None:
    """None where all of A is zero."""
    a, b = block.a, block.b
    # A target's lines beyond its own rank are zero, and so are all of a target's that is not adapted.
    used = (a != 0).any(dim=1).numpy()
    ranks = []
    for target in range(len(widths)):
        lines = np.flatnonzero(used[target * block.rank : (target + 1) * block.rank])
        ranks.append(int(lines[-1]) + 1 if len(lines) else 0)
    if not any(ranks):
        return None
    # A copy: what is kept must not be a view of the whole adapter's data.
    own = torch.cat([a[target * block.rank :][:rank] for target, rank in enumerate(ranks)])
    small = a.dtype == torch.float32 or len(own) * max(a.shape[1], len(b)) <= SMALL
    return (_Small if small else _Packed)(own, b, ranks, widths)


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes in the calling thread alone. Threads that have computed before keep theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class PreparedAdapter:
    """An adapter's weights as steps take them.

    Attributes:
        products: of layer l and group g at l * 4 + g, None where it is not adapted.
        adapted: bool, one for each of ``products``: whether there are some. nbytes: of all of them.
    """

    def __init__(self, weights: AdapterWeights, model: ModelConfig) -> None:
        """Takes copies. Raises ValueError for weights of a model with other layers."""
        if weights.ranks.shape != (model.layers, len(GROUPS)):
            raise ValueError(f"an adapter of {len(weights.ranks)} layers for a model of {model.layers}")
        widths = [group_widths(model, group)[1] for group in GROUPS]
        self.products: list[_Small | _Packed | None] = []
        for layer in range(model.layers):
            for group in range(len(GROUPS)):
                block = weights.block(layer, group)
                self.products.append(None if block is None else _products(block, widths[group]))
        self.adapted = np.array([products is not None for products in self.products])
        self.nbytes = sum(products.nbytes for products in self.products if products is not None)


AdapterRows = list[tuple[PreparedAdapter, Longs]]
"""Adapters of a step, each with its rows, ascending; no row has two."""


class AdapterSlots:
    """Where the CPU runner keeps adapters; see :class:`realm.engine.batch.AdapterMemory`.

    An adapter takes memory of its own, and ``at`` only says which others it replaces. Small factors of bf16 are
    kept in float32, and a block-diagonal B is larger than its blocks: an adapter takes up to twice its bytes, so
    for a bf16 model half of the memory is offered as capacity.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype, memory: int) -> None:
        """``memory``: bytes that adapters may take, about."""
        self.slots = SLOTS
        self.dtype = dtype
        self.capacity = memory if dtype == torch.float32 else memory // 2
        self._model = model
        self._kept: dict[int, tuple[int, int, PreparedAdapter]] = {}

    @property
    def nbytes(self) -> int:
        """What all adapters take in fact."""
        return sum(adapter.nbytes for _, _, adapter in self._kept.values())

    def put(self, slot: int, at: int, weights: AdapterWeights) -> None:
        """Raises ValueError for a slot, bytes or weights that are none of this memory's.

        Steps launched earlier go on with what the slot held. The caller's thread gets no pool of torch's threads:
        as long as such a thread lives, libgomp's do not spin, and steps take half as long again.
        """
        if not 0 <= slot < self.slots:
            raise ValueError(f"adapter slot {slot}: there are {self.slots}")
        end = at + weights.nbytes
        if at < 0 or end > self.capacity:
            raise ValueError(f"adapter bytes {at:,} to {end:,}: there are {self.capacity:,}")
        if weights.data.dtype != self.dtype:
            raise ValueError(f"an adapter in {weights.data.dtype} for a model in {self.dtype}")
        with _one_thread():
            adapter = PreparedAdapter(weights, self._model)
        # A new dict: a launch in another thread reads either.
        kept = {
            other: held for other, held in self._kept.items() if other != slot and (held[1] <= at or held[0] >= end)
        }
        kept[slot] = (at, end, adapter)
        self._kept = kept

    def of(self, slots: Longs) -> AdapterRows:
        """The adapters of rows with these slots (-1: none). Raises ValueError for a slot that holds none."""
        order = np.argsort(slots, kind="stable")
        present, firsts = np.unique(slots[order], return_index=True)
        kept, rows = self._kept, np.split(order, firsts[1:])
        found: AdapterRows = []
        for slot, own in zip(present.tolist(), rows, strict=True):
            if slot == -1:
                continue
            if slot not in kept:
                raise ValueError(f"a row has the adapter of slot {slot}, which holds none")
            found.append((kept[slot][2], own))
        return found


class _Rows:
    """The rows of a step that some of its adapters compute, gathered so that each adapter's lie together."""

    def __init__(self, members: AdapterRows, count: int) -> None:
        """``count``: rows of the step."""
        self.adapters = [adapter for adapter, _ in members]
        self._sizes = [len(rows) for _, rows in members]
        rows = np.concatenate([rows for _, rows in members])
        self._count = len(rows)
        self._first = int(rows[0])
        # One after another, as the rows of one chunk are, or of a whole step that has one adapter.
        self._consecutive = bool((np.diff(rows) == 1).all())
        self._all = self._consecutive and self._count == count
        self._rows = torch.from_numpy(rows)
        self._threads = torch.get_num_threads()
        self._buffers: dict[tuple[str, int], tuple[Tensor, Sequence[Tensor]]] = {}

    def _buffer(self, use: str, width: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Float32 [rows, width], all of it and by adapter; used by one layer after another."""
        found = self._buffers.get((use, width))
        if found is None:
            whole = torch.empty(self._count, width)
            found = self._buffers[use, width] = (whole, torch.split(whole, self._sizes))
        return found

    def add(self, at: int, x: Tensor, y: Tensor) -> None:
        chosen = [adapter.products[at] for adapter in self.adapters]
        alone = self._threads > 1 and self._count <= FEW and all(type(products) is _Small for products in chosen)
        if alone:
            torch.set_num_threads(1)
        try:
            self._add(chosen, x, y)
        finally:
            if alone:
                torch.set_num_threads(self._threads)

    def _add(self, chosen: Sequence[_Small | _Packed | None], x: Tensor, y: Tensor) -> None:
        if self._consecutive:
            taken = x if self._all else x.narrow(0, self._first, self._count)
        else:
            taken = x.index_select(0, self._rows)
        given, inputs = self._buffer("in", x.shape[1])
        made, outputs = self._buffer("out", y.shape[1])
        given.copy_(taken)
        for products, own, out in zip(chosen, inputs, outputs, strict=True):
            assert products is not None
            products(own, out)
        if self._consecutive:
            (y if self._all else y.narrow(0, self._first, self._count)).add_(made)
        else:
            y.index_add_(0, self._rows, made.to(y.dtype))


class StepAdapters:
    """The adapters of one step's rows, for :meth:`realm.models.llama.LlamaModel.hidden`."""

    def __init__(self, members: AdapterRows, count: int) -> None:
        """``count``: rows of the step, with those that have no adapter."""
        adapted = np.stack([adapter.adapted for adapter, _ in members])
        groups: dict[bytes, _Rows | None] = {b"\0" * len(members): None}
        # Of each layer and group: most often all adapters are adapted in the same ones.
        self._rows: list[_Rows | None] = []
        for at in range(adapted.shape[1]):
            who = adapted[:, at].tobytes()
            if who not in groups:
                own = [member for member, is_in in zip(members, adapted[:, at], strict=True) if is_in]
                groups[who] = _Rows(own, count)
            self._rows.append(groups[who])

    def add(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        """Add to ``y`` [n, out], which a layer's ``group`` made of ``x`` [n, in], what the adapters make of ``x``."""
        at = layer * len(GROUPS) + _GROUP[group]
        rows = self._rows[at]
        if rows is not None:
            rows.add(at, x, y)
