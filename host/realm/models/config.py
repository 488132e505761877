"""What a model folder's ``config.json`` says, checked.

Read without torch, because guest workers need the facts and not the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from realm.errors import RealmError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""The Llama family: they differ in biases and in RoPE, not in the way of a token."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (Llama 3.1 model card): see :func:`realm.models.llama.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one Llama-family model. Sizes are in elements, ``context_length`` in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    bos: int | None
    eos: frozenset[int]

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read ``folder/config.json``.

        Raises:
            RealmError: ``model_invalid`` naming the field that is missing, wrong or unsupported.
        """
        path = folder / "config.json"
        try:
            raw = msgspec.json.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise RealmError("model_invalid", f"{path.name} cannot be read: {error}") from error
        if not isinstance(raw, dict):
            raise RealmError("model_invalid", "config.json is not a JSON object")
        return cls.parse(raw)

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> ModelConfig:
        """Check the fields of a Hugging Face style configuration. Raises as :meth:`load`."""
        architectures = raw.get("architectures") or []
        architecture = architectures[0] if isinstance(architectures, list) and architectures else None
        if architecture not in ARCHITECTURES:
            raise _invalid("architectures", f"is {architecture!r}; supported are {', '.join(ARCHITECTURES)}")
        heads = _integer(raw, "num_attention_heads", 1, 1024)
        hidden = _integer(raw, "hidden_size", 1, 1 << 17)
        kv_heads = _integer(raw, "num_key_value_heads", 1, 1024, default=heads)
        head_dim = _integer(raw, "head_dim", 2, 1024, default=hidden // heads)
        if heads % kv_heads:
            raise _invalid("num_key_value_heads", f"{kv_heads} does not divide {heads} attention heads")
        if head_dim % 2:
            raise _invalid("head_dim", f"{head_dim} is odd")
        if raw.get("hidden_act", "silu") != "silu":
            raise _invalid("hidden_act", f"is {raw['hidden_act']!r}; only silu is supported")
        context = _integer(raw, "max_position_embeddings", 1, 1 << 24)
        # A window shorter than the context would change attention; claim only what is computed.
        window = raw.get("sliding_window")
        if isinstance(window, int) and raw.get("use_sliding_window", architecture == "MistralForCausalLM"):
            context = min(context, window)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        theta = raw.get("rope_theta", rope.get("rope_theta", 10000.0))
        if not isinstance(theta, int | float) or not math.isfinite(theta) or theta <= 0:
            raise _invalid("rope_theta", f"is {theta!r}; a positive number is needed")
        qwen = architecture == "Qwen2ForCausalLM"
        attention_bias = bool(raw.get("attention_bias", False))
        eos = raw.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=_integer(raw, "vocab_size", 1, 1 << 22),
            hidden_size=hidden,
            intermediate_size=_integer(raw, "intermediate_size", 1, 1 << 20),
            layers=_integer(raw, "num_hidden_layers", 1, 1024),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            context_length=context,
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(theta),
            rope_scaling=_rope_scaling(rope),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qwen or attention_bias,
            output_bias=attention_bias and not qwen,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            bos=raw.get("bos_token_id") if isinstance(raw.get("bos_token_id"), int) else None,
            eos=frozenset(eos if isinstance(eos, list) else [eos] if isinstance(eos, int) else []),
        )


def _invalid(field: str, problem: str) -> RealmError:
    return RealmError("model_invalid", f"config.json: {field} {problem}", details={"field": field})


def _integer(raw: dict[str, Any], field: str, low: int, high: int, default: int | None = None) -> int:
    value = raw.get(field, default)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _invalid(field, f"is {value!r}; an integer from {low} to {high} is needed")
    return value


def _rope_scaling(rope: Any) -> RopeScaling | None:
    if not isinstance(rope, dict):
        raise _invalid("rope_scaling", "is not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _invalid("rope_scaling", f"has type {kind!r}; supported are default and llama3")
    try:
        return RopeScaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context=int(rope["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid("rope_scaling", f"lacks or misstates {error}") from error
