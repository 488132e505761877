"""PEFT folders for tests: made up for a model's shape, saved by PEFT itself, or broken on purpose."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE
from realm.adapters.peft import parse_config
from realm.adapters.tensors import GROUP_TARGETS, GROUPS, TARGETS, group_widths, module_name
from realm.adapters.weights import AdapterWeights, load_adapter
from realm.models.config import ModelConfig

if TYPE_CHECKING:
    import transformers

Array = npt.NDArray[Any]

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
"""The least that a configuration says."""


def tiny_config(**changes: Any) -> ModelConfig:
    """The shape of :mod:`tests.tiny`'s models; ``changes`` are fields of a Hugging Face configuration."""
    from tests.tiny import SHAPE

    return ModelConfig.parse({"architectures": ["LlamaForCausalLM"], **SHAPE, **changes})


def tensor_name(layer: int, target: str, part: str) -> str:
    """The name by which PEFT saves a tensor; ``part`` is A or B."""
    return f"base_model.model.{module_name(layer, target)}.lora_{part}.weight"


def tensor_shape(model: ModelConfig, target: str, part: str, rank: int) -> tuple[int, int]:
    """The shape that a tensor must have."""
    for group in GROUPS:
        if target in GROUP_TARGETS[group]:
            fan_in, outs = group_widths(model, group)
            return (rank, fan_in) if part == "A" else (outs[GROUP_TARGETS[group].index(target)], rank)
    raise ValueError(target)


def random_tensors(
    model: ModelConfig, targets: Sequence[str] = TARGETS, *, rank: int = 4, seed: int = 0, layers: Sequence[int] = ()
) -> dict[str, Array]:
    """A and B for each target in each of ``layers`` (all of them, if none are given), float32."""
    rng = np.random.default_rng(seed)
    return {
        tensor_name(layer, target, part): rng.normal(0, 0.1, tensor_shape(model, target, part, rank)).astype(np.float32)
        for layer in layers or range(model.layers)
        for target in targets
        for part in "AB"
    }


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes) -> bytes:
    """A safetensors file with any header and data, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def described(tensors: dict[str, Array], types: dict[str, str] | None = None) -> tuple[dict[str, Any], bytes]:
    """The header of a good file, and its data. uint16 arrays are BF16's bits, unless ``types`` says otherwise."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "float64": "F64"}
    header, data = {}, b""
    for name, array in tensors.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": (types or {}).get(name, names[array.dtype.name]),
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def write_adapter(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    """Write a PEFT folder with these tensors; ``config`` are fields beside :data:`CONFIG`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS_FILE).write_bytes(safetensors_bytes(*described(tensors)))
    (folder / CONFIG_FILE).write_text(json.dumps({**CONFIG, **config}))
    return folder


def load(folder: Path, model: ModelConfig, dtype: torch.dtype = torch.float32) -> AdapterWeights:
    """The weights of a PEFT folder."""
    config = parse_config((folder / CONFIG_FILE).read_bytes())
    return load_adapter(folder / TENSORS_FILE, config, model, dtype)


def peft_model(model: transformers.PreTrainedModel, seed: int = 0, *, random: bool = True, **config: Any) -> Any:
    """transformers' ``model`` with a new adapter: random (B too), or as PEFT makes it. ``model`` is changed."""
    import peft

    torch.manual_seed(seed)
    with _known_warnings():
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if random and "lora_" in name:
                parameter.normal_(0.0, 0.1)
    return adapted.eval()


def from_peft(model: transformers.PreTrainedModel, folder: Path) -> Any:
    """transformers' ``model`` with the adapter in ``folder``, as PEFT computes it. ``model`` is changed."""
    import peft

    with _known_warnings():
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


@contextmanager
def _known_warnings() -> Iterator[None]:
    """PEFT asks transformers for what that has renamed; tests turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def block_deltas(weights: AdapterWeights, model: ModelConfig) -> dict[str, torch.Tensor]:
    """What the blocks add to each matrix [out, in], float64; matrices of groups that are not adapted are left out."""
    deltas: dict[str, torch.Tensor] = {}
    for layer in range(model.layers):
        for number, group in enumerate(GROUPS):
            block = weights.block(layer, number)
            if block is None:
                continue
            above = 0
            outs = group_widths(model, group)[1]
            for index, (target, out) in enumerate(zip(GROUP_TARGETS[group], outs, strict=True)):
                a = block.a[index * block.rank : (index + 1) * block.rank].double()
                deltas[module_name(layer, target)] = block.b[above : above + out].double() @ a
                above += out
    return deltas


def stored_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """B @ A times the scaling of each module in a PEFT folder, float64, computed from the files alone.

    For configurations without expressions in their patterns.
    """
    config = json.loads((folder / CONFIG_FILE).read_text())
    tensors = load_file(folder / TENSORS_FILE)
    deltas = {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        short = module.rpartition(".")[2]
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(module, patterns.get(short, config["lora_alpha"]))
        rank = a.shape[0]
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        deltas[module] = tensors[name.replace(".lora_A.", ".lora_B.")].double() @ a.double() * scaling
    return deltas
