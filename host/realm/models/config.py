"""What a model folder's ``config.json`` says, checked.

Read without torch, because guest workers need the facts and not the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm.errors import RealmError
from realm.models.json_files import read_object

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
        return cls.parse(read_object(folder / "config.json"))

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
        rope = _object(raw, "rope_parameters") or _object(raw, "rope_scaling")
        theta = _number({"rope_theta": 10000.0, **rope, **raw}, "rope_theta")
        qwen = architecture == "Qwen2ForCausalLM"
        attention_bias = bool(raw.get("attention_bias", False))
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
            norm_eps=_number({"rms_norm_eps": 1e-6, **raw}, "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=_rope_scaling(rope),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=qwen or attention_bias,
            output_bias=attention_bias and not qwen,
            mlp_bias=bool(raw.get("mlp_bias", False)),
            bos=next(iter(_token_ids(raw, "bos_token_id")), None),
            eos=frozenset(_token_ids(raw, "eos_token_id")),
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


def _number(raw: dict[str, Any], field: str, owner: str = "") -> float:
    value = raw.get(field)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        name = owner or field
        raise _invalid(name, f"{'has ' + field + ' ' if owner else 'is '}{value!r}; a positive number is needed")
    return float(value)


def _object(raw: dict[str, Any], field: str) -> dict[str, Any]:
    value = raw.get(field)
    if value is not None and not isinstance(value, dict):
        raise _invalid(field, f"is {str(value)[:50]!r}; an object is needed")
    return value or {}


def _token_ids(raw: dict[str, Any], field: str) -> list[int]:
    value = raw.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise _invalid(field, f"is {str(value)[:50]!r}; token ids are needed")
    return ids


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", None if "factor" in rope else "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise _invalid("rope_scaling", f"has type {kind!r}; supported are default and llama3")
    return RopeScaling(
        factor=_number(rope, "factor", "rope_scaling"),
        low_freq_factor=_number(rope, "low_freq_factor", "rope_scaling"),
        high_freq_factor=_number(rope, "high_freq_factor", "rope_scaling"),
        original_context=int(_number(rope, "original_max_position_embeddings", "rope_scaling")),
    )
