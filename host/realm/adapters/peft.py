"""What a PEFT folder's ``adapter_config.json`` says, checked, and whether its tensors fit a model.

A LoRA adapter (Hu et al., LoRA, 2021) adds ``scaling * B @ A`` to some of the model's matrices. Whatever
would change the model in another way is refused by name: an adapter is computed as its author meant it, or
not at all. Read without torch, because the gateway checks adapters and computes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from realm.adapters.patterns import PatternError, Patterns
from realm.adapters.strict_json import JsonError, parse_object, shown
from realm.adapters.tensors import TARGETS, check_values, layout
from realm.errors import RealmError
from realm.models.config import ModelConfig

MAX_CONFIG = 64 << 10
"""Largest ``adapter_config.json`` in bytes."""
MAX_RANK = 256
"""Largest rank of a module."""
MAX_ALPHA = 1e6
"""Largest absolute value of an alpha."""


@dataclass(frozen=True)
class PeftConfig:
    """Of an ``adapter_config.json`` what decides the arithmetic.

    Attributes:
        rank, alpha: of modules that no pattern matches. rslora: the scaling is alpha / sqrt(rank) (Kalajdzievski,
            A Rank Stabilization Scaling Factor, 2023) rather than alpha / rank.
        rank_pattern, alpha_pattern: for modules that match a key; the first key that does counts.
        target_modules: which modules the author named, for people: what is adapted is what has tensors.
    """

    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The rank of a module such as ``model.layers.3.self_attn.q_proj``."""
        return self._ranks.get(module, self.rank)

    def scaling(self, module: str) -> float:
        """What ``B @ A`` of a module is multiplied by."""
        rank = self.rank_of(module)
        return self._alphas.get(module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

    @cached_property
    def _ranks(self) -> Patterns[int]:
        return _patterns("rank_pattern", self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns[float]:
        return _patterns("alpha_pattern", self.alpha_pattern)


class AdapterInfo(msgspec.Struct, frozen=True):
    """What an adapter is.

    Attributes:
        rank: the largest of a module. alpha: of modules without one of their own.
        targets: which matrices it adapts in some layer, such as ``q_proj``. layers: how many layers it adapts.
        parameters: how many numbers it has.
    """

    rank: int
    alpha: float
    targets: list[str]
    layers: int
    parameters: int


def check_adapter(file: Path, config: PeftConfig, model: ModelConfig) -> AdapterInfo:
    """Check all of an ``adapter_model.safetensors`` against its configuration and the model.

    Reads the file once, in pieces of 1 MiB.

    Raises:
        RealmError: ``adapter_invalid``; ``details`` has the ``tensor`` that is wrong, or the ``field``.
    """
    modules = layout(file, config, model)
    check_values(file, modules)
    adapted = {module.target for module in modules}
    return AdapterInfo(
        rank=max(module.rank for module in modules),
        alpha=config.alpha,
        targets=[target for target in TARGETS if target in adapted],
        layers=len({module.layer for module in modules}),
        parameters=sum(math.prod(module.a.shape) + math.prod(module.b.shape) for module in modules),
    )


# --- adapter_config.json ---

# What says nothing about the arithmetic of a forward pass, whatever it is.
_INFORMATION = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    }
)
_USED = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "init_lora_weights",
        "bias",
    }
)
# What must be off (null, false, empty), and what it would be.
_OFF = {
    "modules_to_save": "whole modules trained beside the adapter",
    "use_dora": "DoRA",
    "lora_bias": "biases of the adapter",
    "fan_in_fan_out": "transposed weights",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapted parameters that belong to no linear module",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "modules of Megatron",
}
# Ways of initialising that leave the model's own weights alone. With the others the adapter was trained beside
# changed weights, and PEFT can convert it ("pissa" may be followed by more).
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def parse_config(raw: bytes) -> PeftConfig:
    """Check an ``adapter_config.json``.

    Raises:
        RealmError: ``adapter_invalid``; ``details`` has the ``field`` that is missing, wrong or not supported.
    """
    if len(raw) > MAX_CONFIG:
        raise _bad_file(f"has {len(raw)} bytes; at most {MAX_CONFIG} are read")
    try:
        fields = parse_object(raw)
    except JsonError as error:
        raise _bad_file(str(error)) from error
    if fields.get("peft_type") != "LORA":
        raise _invalid("peft_type", f'is {_value(fields.get("peft_type"))}; only "LORA" is supported')
    for name, value in fields.items():
        _check_off(name, value)
    _check_start(fields.get("init_lora_weights"))
    if fields.get("bias", "none") != "none":
        raise _invalid("bias", f'is {_value(fields["bias"])}; only "none" is supported: biases cannot be adapted')
    if not isinstance(rslora := fields.get("use_rslora", False), bool):
        raise _invalid("use_rslora", f"is {_value(rslora)}; true or false is needed")
    config = PeftConfig(
        rank=_rank("r", fields.get("r")),
        alpha=_alpha("lora_alpha", fields.get("lora_alpha")),
        rslora=rslora,
        rank_pattern={key: _rank("rank_pattern", value) for key, value in _mapping(fields, "rank_pattern").items()},
        alpha_pattern={key: _alpha("alpha_pattern", value) for key, value in _mapping(fields, "alpha_pattern").items()},
        target_modules=_targets(fields.get("target_modules")),
    )
    # Keys that cannot be matched are refused here and not when a module is looked up.
    _ = config._ranks, config._alphas
    return config


def _check_off(name: str, value: Any) -> None:
    if name in _INFORMATION or name in _USED or not value:
        return
    if name in _OFF:
        raise _invalid(name, f"is {_value(value)}; {_OFF[name]}: not supported")
    raise _invalid(
        name,
        f"is {_value(value)}; a field of this name is not known, and it may change what the adapter computes."
        " Remove it if it does not",
    )


def _check_start(value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_CHANGING_STARTS):
        raise _invalid(
            "init_lora_weights",
            f"is {_value(value)}, which changes the model's own weights. Save the adapter with"
            " path_initial_model_for_weight_conversion",
        )
    if name not in _HARMLESS_STARTS:
        raise _invalid(
            "init_lora_weights", f"is {_value(value)}; true, false and {', '.join(_HARMLESS_STARTS)} are supported"
        )


def _rank(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANK:
        raise _invalid(name, f"has the rank {_value(value)}; an integer from 1 to {MAX_RANK} is needed")
    return value


def _alpha(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -MAX_ALPHA <= value <= MAX_ALPHA:
        raise _invalid(name, f"has the alpha {_value(value)}; a number of at most {MAX_ALPHA:.0f} is needed")
    return float(value)


def _mapping(fields: dict[str, Any], name: str) -> dict[str, Any]:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise _invalid(name, f"is {_value(value)}; an object is needed")
    return value or {}


def _targets(value: Any) -> tuple[str, ...]:
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _invalid("target_modules", f"is {_value(value)}; names of modules are needed")
    return tuple(names)


def _patterns(name: str, values: dict[str, Any]) -> Patterns[Any]:
    try:
        return Patterns(values)
    except PatternError as error:
        raise _invalid(name, str(error)) from error


def _value(value: Any) -> str:
    return "missing" if value is None else shown(repr(value))


def _invalid(name: str, problem: str) -> RealmError:
    return RealmError(
        "adapter_invalid", f"adapter_config.json: {shown(name)} {problem}", details={"field": shown(name, 200)}
    )


def _bad_file(problem: str) -> RealmError:
    return RealmError(
        "adapter_invalid", f"adapter_config.json cannot be used: it {problem}", details={"field": "adapter_config.json"}
    )
