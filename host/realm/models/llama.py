"""The Llama family as one function over a flat batch of tokens.

The batch has no sequence dimension: the tokens of all sequences of a step lie one after another,
each with its position. Only attention knows where one sequence ends (:mod:`realm.engine.attention`).
Numerically this follows the published model (Touvron et al. 2023; grouped queries of Ainslie et al.
2023; rotary positions of Su et al. 2021, rotating the two halves of each head).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from realm.models.config import ModelConfig


class Attention(Protocol):
    """What the model needs of the KV cache in one step."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Store ``key``/``value`` [n, kv_heads, head_dim], attend with ``query`` [n, heads, head_dim].

        Returns [n, heads * head_dim].
        """
        ...


class Adapters(Protocol):
    """Low-rank adapters of some of a step's rows (Hu et al. 2021)."""

    def add(self, layer: int, group: str, x: Tensor, y: Tensor) -> None:
        """Add to ``y`` [n, out] what the rows' adapters make of ``x`` [n, in]; other rows stay as they are.

        ``y`` is what the field ``group`` of :class:`Layer` gave for ``x``.
        """
        ...


class Linear:
    """``x @ weight.T + bias`` for a weight [out, in] that never changes.

    On a CPU with bf16 instructions the weight is kept in oneDNN's blocked layout: measured on two
    AVX512-BF16 cores for SmolLM2-135M, all layers take 7.3 ms rather than 10.2 ms at batch 1, and
    21 rather than 34 ms at batch 64, and one layout serves every batch size.

    Attributes:
        weight: [out, in], or oneDNN's layout of it. bias: [out] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._packed = (
            weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """One block. ``qkv`` and ``gate_up`` are the published matrices stacked, so two calls become one."""

    input_norm: Tensor
    qkv: Linear
    output: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Rotary inverse frequencies [head_dim / 2], float32, with Llama-3 scaling where configured.

    Llama-3 scaling (Llama 3.1 release): wavelengths beyond ``original_context / low_freq_factor``
    are stretched by ``factor``, those below ``original_context / high_freq_factor`` are kept, and
    the band between is interpolated linearly in the ratio.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    wavelength = 2 * math.pi / frequencies
    smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    low = wavelength > scaling.original_context / scaling.low_freq_factor
    high = wavelength < scaling.original_context / scaling.high_freq_factor
    return torch.where(low, frequencies / scaling.factor, torch.where(high, frequencies, blended))


def _owned(weight: Tensor) -> Tensor:
    """A tensor with memory of its own: a loaded one may be a view of a mapped file on the CPU, and one
    view would keep all of the file resident."""
    return weight.clone() if weight.device.type == "cpu" else weight


class LlamaModel:
    """Weights on one device, and the forward pass over a flat batch.

    Attributes:
        config: the model's shape.
        dtype: of weights and activations (bfloat16 or float32). device: where they are.
        embedding: [vocab_size, hidden_size]. layers: the blocks. norm: [hidden_size], before the head.
        head: to logits. cos, sin: [context_length, head_dim], the rotation of every position, with the
            same angle for both halves of a head.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        """``weights`` is consumed: tensors are dropped from it as they are packed, to halve the peak."""
        self.config = config
        self.embedding = _owned(weights.pop("model.embed_tokens.weight"))
        self.dtype = self.embedding.dtype
        self.device = self.embedding.device
        self.norm = _owned(weights.pop("model.norm.weight"))
        self.head = Linear(self.embedding if config.tied_embeddings else weights.pop("lm_head.weight"))
        self.layers = [self._layer(weights, layer) for layer in range(config.layers)]
        angles = torch.outer(torch.arange(config.context_length).float(), inverse_frequencies(config))
        both = torch.cat((angles, angles), dim=-1)
        self.cos = both.cos().to(self.dtype).to(self.device)
        self.sin = both.sin().to(self.dtype).to(self.device)

    @staticmethod
    def _layer(weights: dict[str, Tensor], layer: int) -> Layer:
        at = f"model.layers.{layer}."

        def stacked(group: str, *names: str) -> Linear:
            parts = [weights.pop(f"{at}{group}.{name}.weight") for name in names]
            biases = [weights.pop(f"{at}{group}.{name}.bias", None) for name in names]
            present = [bias for bias in biases if bias is not None]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            return Linear(weight, torch.cat(present) if present else None)

        return Layer(
            input_norm=_owned(weights.pop(at + "input_layernorm.weight")),
            qkv=stacked("self_attn", "q_proj", "k_proj", "v_proj"),
            output=stacked("self_attn", "o_proj"),
            post_norm=_owned(weights.pop(at + "post_attention_layernorm.weight")),
            gate_up=stacked("mlp", "gate_proj", "up_proj"),
            down=stacked("mlp", "down_proj"),
        )

    def hidden(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapters: Adapters | None = None
    ) -> Tensor:
        """Residual stream after the last layer, before the final norm: [n, hidden_size].

        ``tokens`` and ``positions`` are int64 [n]; positions are below ``context_length``.
        """

        def adapted(number: int, group: str, x: Tensor, y: Tensor) -> Tensor:
            if adapters is not None:
                adapters.add(number, group, x, y)
            return y

        config = self.config
        heads, rotated, dim = config.heads, config.heads + config.kv_heads, config.head_dim
        half, hidden, eps = dim // 2, (config.hidden_size,), config.norm_eps
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        x = self.embedding[tokens]
        count = x.shape[0]
        for number, layer in enumerate(self.layers):
            normed = F.rms_norm(x, hidden, layer.input_norm, eps)
            qkv = adapted(number, "qkv", normed, layer.qkv(normed)).view(count, -1, dim)
            qk = qkv[:, :rotated]
            turned = torch.cat((-qk[..., half:], qk[..., :half]), dim=-1)
            qk = torch.addcmul(qk * cos, turned, sin)
            attended = attention(number, qk[:, :heads], qk[:, heads:], qkv[:, rotated:])
            x = x + adapted(number, "output", attended, layer.output(attended))
            normed = F.rms_norm(x, hidden, layer.post_norm, eps)
            gate, up = adapted(number, "gate_up", normed, layer.gate_up(normed)).chunk(2, dim=-1)
            active = F.silu(gate) * up
            x = x + adapted(number, "down", active, layer.down(active))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [m, vocab_size], float32, of rows [m, hidden_size] of :meth:`hidden`."""
        normed = F.rms_norm(hidden, (self.config.hidden_size,), self.norm, self.config.norm_eps)
        return self.head(normed).float()
