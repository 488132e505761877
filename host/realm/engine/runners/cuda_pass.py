"""The Llama family's forward pass from kernels: what :class:`realm.models.llama.LlamaModel` computes from
torch operations, with the page cache of the device.

A layer is four matrix products (cuBLAS) and, between them, fused kernels (:mod:`realm.engine.kernels`):
norm with the residual's sum, attention with the rotation and the cache's writes, and the gated activation.
With few rows the launches cost most: then norm, activation and sum are part of the matrix products.

The residual stream is float32, whatever the model's type: in bfloat16 its roundings alone, two a layer, are half
of the error of the logits (30 layers at random: 1.2% against 0.6% of their norm).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from realm.engine.kernels.elementwise import add_rms_norm, silu_mul
from realm.engine.kernels.skinny import SKINNY_ROWS, skinny_linear
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda_kernels import embed
from realm.models.llama import Linear, LlamaModel

_PRODUCT_ROWS = 128
"""Rows that sizes are apart at which :meth:`DevicePass.load_products` looks for kernels."""

FEW_ROWS = SKINNY_ROWS
"""Rows up to which a pass is made of our own matrix products, in which the small kernels are fused."""


class Attend(Protocol):
    """Attention of a step's rows against one layer's pages."""

    def __call__(self, qkv: Tensor, pages: Tensor, out: Tensor) -> None:
        """Rotate the queries and keys of ``qkv`` [n, (heads + 2 * kv_heads) * head_dim], store the keys and
        values in ``pages`` [2, pages, kv_heads, PAGE_SIZE, head_dim], and attend into ``out`` [n, heads * head_dim].
        """
        ...


class Adapted(Protocol):
    """What adapters add to a layer's products, which are numbered as they come: qkv, output, gate_up, down."""

    def begin(self, layer: int, product: int, x: Tensor) -> None:
        """Called before a product of ``x`` [n, in] is launched."""
        ...

    def end(self, layer: int, product: int, out: Tensor) -> None:
        """Called after it: adds to ``out`` [n, out]."""
        ...


class Hidden(NamedTuple):
    """Rows after the last layer, [n, hidden_size]: ``residual``, float32, to which ``last`` has still to be added."""

    last: Tensor | None
    residual: Tensor

    def rows(self, numbers: Tensor) -> Hidden:
        """Some of the rows, int64 [m]."""
        last = None if self.last is None else self.last.index_select(0, numbers)
        return Hidden(last, self.residual.index_select(0, numbers))


def _product(x: Tensor, w: Linear, out: Tensor) -> None:
    """``x @ w.weight.T + w.bias`` into ``out``."""
    if w.bias is None:
        torch.mm(x, w.weight.t(), out=out)
    else:
        torch.addmm(w.bias, x, w.weight.t(), out=out)


class DevicePass:
    """A model, and the keys and values of its pages.

    Attributes:
        cache: [layers, 2, pages + 1, kv_heads, PAGE_SIZE, head_dim], keys first. The last page is nobody's:
            rows that only fill a batch write there.
        lane_tokens: int32 [lanes + 1], the token that each lane drew last. The last lane is nobody's.
        rows: most rows of a pass.
    """

    def __init__(self, model: LlamaModel, pages: int, lanes: int, rows: int) -> None:
        config = model.config
        self.model = model
        self.rows = rows
        shape = (config.layers, 2, pages + 1, config.kv_heads, PAGE_SIZE, config.head_dim)
        # Not cleared: no kernel loads a position that its sequence has not written.
        self.cache = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.lane_tokens = torch.zeros(lanes + 1, dtype=torch.int32, device=model.device)
        self._layers = list(zip(model.layers, self.cache.unbind(0), strict=True))

        def space(width: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros((rows, width), dtype=dtype, device=model.device)

        # All that is between the weights, for every pass: they run one after another. The allocator would take
        # memory anew for a step larger than those before, which may wait for the device.
        heads = config.heads * config.head_dim
        self._qkv_width = heads + 2 * config.kv_heads * config.head_dim
        self._residual = space(config.hidden_size, torch.float32)
        self._normed, self._block = space(config.hidden_size), space(config.hidden_size)
        self._attended, self._active = space(heads), space(config.intermediate_size)
        self._wide = space(max(self._qkv_width, 2 * config.intermediate_size)).view(-1)

    def hidden(
        self, tokens: Tensor, lanes: Tensor, attend: Attend, *, every: bool, adapted: Adapted | None = None
    ) -> Hidden:
        """Compute all layers for int32 ``tokens`` [n]; a negative one stands for what its lane drew last.

        ``every``: ``attend`` writes every row; otherwise it may leave out rows that only fill the batch.
        ``adapted``: what some rows' adapters add.
        """
        count, model = len(tokens), self.model
        residual, attended = self._residual[:count], self._attended[:count]
        embed(tokens, lanes, self.lane_tokens, model.embedding, residual)
        if not every:
            # What was in memory before would do no harm, but might look like a fault: infinities, NaN.
            attended.zero_()
        if count <= FEW_ROWS and adapted is None:
            return self._few(residual, attended, attend)
        return self._many(residual, attended, attend, adapted)

    def _few(self, residual: Tensor, attended: Tensor, attend: Attend) -> Hidden:
        """A layer of few rows in five launches."""
        eps = self.model.config.norm_eps
        count = len(residual)
        qkv, active = self._wide_rows(count, self._qkv_width), self._active[:count]
        for layer, pages in self._layers:
            norm, w = layer.input_norm, layer.qkv
            skinny_linear(residual, w.weight, qkv, bias=w.bias, gain=norm, eps=eps)
            attend(qkv, pages, attended)
            skinny_linear(attended, layer.output.weight, residual, bias=layer.output.bias, add=True)
            norm, w = layer.post_norm, layer.gate_up
            skinny_linear(residual, w.weight, active, bias=w.bias, gain=norm, eps=eps, gated=True)
            skinny_linear(active, layer.down.weight, residual, bias=layer.down.bias, add=True)
        return Hidden(None, residual)

    def _many(self, residual: Tensor, attended: Tensor, attend: Attend, adapted: Adapted | None) -> Hidden:
        """Layers of a library's matrix products. What a block gives is added to the residual by the next norm."""

        def product(at: int, number: int, x: Tensor, w: Linear, out: Tensor) -> None:
            if adapted is not None:
                adapted.begin(at, number, x)
            _product(x, w, out)
            if adapted is not None:
                adapted.end(at, number, out)

        eps = self.model.config.norm_eps
        count = len(residual)
        normed, block, active = self._normed[:count], self._block[:count], self._active[:count]
        # Queries, keys and values are done with when the gated pair is computed.
        qkv = self._wide_rows(count, self._qkv_width)
        pair = self._wide_rows(count, 2 * self.model.config.intermediate_size)
        x, add = residual, False
        for at, (layer, pages) in enumerate(self._layers):
            add_rms_norm(x, residual, layer.input_norm, normed, eps, add=add)
            product(at, 0, normed, layer.qkv, qkv)
            attend(qkv, pages, attended)
            product(at, 1, attended, layer.output, block)
            add_rms_norm(block, residual, layer.post_norm, normed, eps, add=True)
            product(at, 2, normed, layer.gate_up, pair)
            silu_mul(pair, active)
            product(at, 3, active, layer.down, block)
            x, add = block, True
        return Hidden(x, residual)

    def _wide_rows(self, count: int, width: int) -> Tensor:
        return self._wide[: count * width].view(count, width)

    def load_products(self) -> None:
        """Multiply once with every few numbers of rows up to the most. The library has kernels for many sizes, and
        loads one when it first chooses it; that may wait for all that the device has to do."""
        for count in range(_PRODUCT_ROWS, self.rows + 1, _PRODUCT_ROWS):
            for linear, x, out in self.operands(count):
                _product(x, linear, out)

    def operands(self, count: int) -> list[tuple[Linear, Tensor, Tensor]]:
        """The first layer's products: weights, what goes in and what comes out, of ``count`` rows of anything."""
        layer, config = self.model.layers[0], self.model.config
        normed, block, active = self._normed[:count], self._block[:count], self._active[:count]
        return [
            (layer.qkv, normed, self._wide_rows(count, self._qkv_width)),
            (layer.output, self._attended[:count], block),
            (layer.gate_up, normed, self._wide_rows(count, 2 * config.intermediate_size)),
            (layer.down, active, block),
        ]

    def logits(self, hidden: Hidden, out: Tensor) -> None:
        """Logits of rows of :meth:`hidden`'s result into ``out`` [n, vocab_size]; changes what is given."""
        model, residual = self.model, hidden.residual
        eps, head = model.config.norm_eps, model.head.weight
        if len(residual) <= FEW_ROWS:
            if hidden.last is not None:
                residual.add_(hidden.last)
            skinny_linear(residual, head, out, gain=model.norm, eps=eps)
        else:
            assert hidden.last is not None
            normed = torch.empty_like(residual, dtype=model.dtype)
            add_rms_norm(hidden.last, residual, model.norm, normed, eps, add=True)
            torch.mm(normed, head.t(), out=out)
