"""The Llama family's forward pass from kernels: what :class:`realm.models.llama.LlamaModel` computes from
torch operations, with the page cache of the device.

A layer is four matrix products (cuBLAS) and, between them, fused kernels (:mod:`realm.engine.kernels`):
norm with the residual's sum, attention with the rotation and the cache's writes, and the gated activation.
With few rows the launches cost most: then norm, activation and sum are part of the matrix products.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from realm.engine.kernels.elementwise import add_rms_norm, silu_mul
from realm.engine.kernels.skinny import SKINNY_ROWS, skinny_linear
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cuda_kernels import embed
from realm.models.llama import LlamaModel

FEW_ROWS = SKINNY_ROWS
"""Rows up to which a pass is made of our own matrix products, in which the small kernels are fused."""


class Attend(Protocol):
    """Attention of a step's rows against one layer's pages."""

    def __call__(self, qkv: Tensor, pages: Tensor, out: Tensor) -> None:
        """Rotate the queries and keys of ``qkv`` [n, (heads + 2 * kv_heads) * head_dim], store the keys and
        values in ``pages`` [2, pages, kv_heads, PAGE_SIZE, head_dim], and attend into ``out`` [n, heads * head_dim].
        """
        ...


class Hidden(NamedTuple):
    """Rows after the last layer, [n, hidden_size]: ``residual``, to which ``last`` has still to be added."""

    last: Tensor | None
    residual: Tensor

    def rows(self, numbers: Tensor) -> Hidden:
        """Some of the rows, int64 [m]."""
        last = None if self.last is None else self.last.index_select(0, numbers)
        return Hidden(last, self.residual.index_select(0, numbers))


class DevicePass:
    """A model, and the keys and values of its pages.

    Attributes:
        cache: [layers, 2, pages + 1, kv_heads, PAGE_SIZE, head_dim], keys first. The last page is nobody's:
            rows that only fill a batch write there.
        lane_tokens: int32 [lanes + 1], the token that each lane drew last. The last lane is nobody's.
    """

    def __init__(self, model: LlamaModel, pages: int, lanes: int) -> None:
        config = model.config
        self.model = model
        shape = (config.layers, 2, pages + 1, config.kv_heads, PAGE_SIZE, config.head_dim)
        # Not cleared: no kernel loads a position that its sequence has not written.
        self.cache = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.lane_tokens = torch.zeros(lanes + 1, dtype=torch.int32, device=model.device)
        self._layers = list(zip(model.layers, self.cache.unbind(0), strict=True))

    def hidden(self, tokens: Tensor, lanes: Tensor, attend: Attend, *, every: bool) -> Hidden:
        """Compute all layers for int32 ``tokens`` [n]; a negative one stands for what its lane drew last.

        ``every``: ``attend`` writes every row; otherwise it may leave out rows that only fill the batch.
        """
        count, model = len(tokens), self.model
        residual = torch.empty((count, model.config.hidden_size), dtype=model.dtype, device=model.device)
        embed(tokens, lanes, self.lane_tokens, model.embedding, residual)
        shape = (count, model.config.heads * model.config.head_dim)
        # What was in memory before would do no harm, but might look like a fault: infinities, NaN.
        attended = residual.new_empty(shape) if every else residual.new_zeros(shape)
        layers = self._few if count <= FEW_ROWS else self._many
        return layers(residual, attended, attend)

    def _few(self, residual: Tensor, attended: Tensor, attend: Attend) -> Hidden:
        """A layer of few rows in five launches."""
        config, eps = self.model.config, self.model.config.norm_eps
        count = len(residual)
        qkv = residual.new_empty((count, (config.heads + 2 * config.kv_heads) * config.head_dim))
        active = residual.new_empty((count, config.intermediate_size))
        for layer, pages in self._layers:
            norm, w = layer.input_norm, layer.qkv
            skinny_linear(residual, w.weight, qkv, bias=w.bias, gain=norm, eps=eps)
            attend(qkv, pages, attended)
            skinny_linear(attended, layer.output.weight, residual, bias=layer.output.bias, add=True)
            norm, w = layer.post_norm, layer.gate_up
            skinny_linear(residual, w.weight, active, bias=w.bias, gain=norm, eps=eps, gated=True)
            skinny_linear(active, layer.down.weight, residual, bias=layer.down.bias, add=True)
        return Hidden(None, residual)

    def _many(self, residual: Tensor, attended: Tensor, attend: Attend) -> Hidden:
        """Layers of a library's matrix products. What a block gives is added to the residual by the next norm."""
        config, eps = self.model.config, self.model.config.norm_eps
        count = len(residual)
        normed = torch.empty_like(residual)
        active = residual.new_empty((count, config.intermediate_size))
        x, add = residual, False
        for layer, pages in self._layers:
            add_rms_norm(x, residual, layer.input_norm, normed, eps, add=add)
            attend(layer.qkv(normed), pages, attended)
            add_rms_norm(layer.output(attended), residual, layer.post_norm, normed, eps, add=True)
            silu_mul(layer.gate_up(normed), active)
            x, add = layer.down(active), True
        return Hidden(x, residual)

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
            normed = torch.empty_like(residual)
            add_rms_norm(hidden.last, residual, model.norm, normed, eps, add=True)
            torch.mm(normed, head.t(), out=out)
