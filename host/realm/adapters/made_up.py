"""Adapters of random numbers, for tests and for measuring: speed depends on sizes, not on values."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from realm.adapters.tensors import GROUP_TARGETS, GROUPS, ITEM_SIZES, TARGETS, group_widths, module_name
from realm.models.config import ModelConfig
from realm.models.safetensors_file import to_bfloat16

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"

_SUPPLY = (1 << 20) + 7
"""Random numbers that are made; tensors are cut from them at random places."""


def write_random_adapter(
    folder: Path,
    model: ModelConfig,
    *,
    rank: int,
    targets: Sequence[str] = TARGETS,
    seed: int,
    alpha: float | None = None,
    dtype: str = "BF16",
    scale: float = 0.05,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    layers: Sequence[int] | None = None,
) -> None:
    """Write a folder as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``. Files are replaced.

    Args:
        targets: short names such as ``q_proj``. layers: which are adapted; None is all.
        alpha: None is the rank, so that the scaling is 1. dtype: ``F32``, ``F16`` or ``BF16``.
        scale: standard deviation of the elements of A and B; those of B @ A have scale² * sqrt(rank).
        rank_pattern: by short name or by full name (``model.layers.3.self_attn.q_proj``); no expressions.

    The same arguments give the same bytes. Takes about as long as writing them.
    """
    ranks = rank_pattern or {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for layer in range(model.layers) if layers is None else layers:
        for group in GROUPS:
            fan_in, outs = group_widths(model, group)
            for target, out in zip(GROUP_TARGETS[group], outs, strict=True):
                if target not in targets:
                    continue
                module = module_name(layer, target)
                own = ranks.get(module, ranks.get(target, rank))
                for part, shape in (("A", (own, fan_in)), ("B", (out, own))):
                    size = ITEM_SIZES[dtype] * shape[0] * shape[1]
                    header[f"base_model.model.{module}.lora_{part}.weight"] = {
                        "dtype": dtype,
                        "shape": list(shape),
                        "data_offsets": [at, at + size],
                    }
                    at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    supply = _supply(dtype, scale).data.cast("B")
    places = random.Random(seed)
    with (folder / TENSORS_FILE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                begin = ITEM_SIZES[dtype] * places.randrange(_SUPPLY)
                left -= file.write(supply[begin : begin + left])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": rslora,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(alpha_pattern or {}),
        "target_modules": list(targets),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2))


@lru_cache(maxsize=4)
def _supply(dtype: str, scale: float) -> npt.NDArray[Any]:
    numbers = np.random.default_rng(0).normal(0.0, scale, _SUPPLY).astype(np.float32)
    if dtype == "BF16":
        return to_bfloat16(numbers)
    return numbers.astype(np.float16) if dtype == "F16" else numbers
