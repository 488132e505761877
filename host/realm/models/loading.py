"""Weights of a model folder: safetensors files, one or sharded, mapped and checked by name and shape.

Or, for measuring, weights of the right shapes made up where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from realm.errors import RealmError
from realm.models.config import ModelConfig

Progress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model needs (Hugging Face names)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (hidden,),
            at + "post_attention_layernorm.weight": (hidden,),
            at + "self_attn.q_proj.weight": (q_width, hidden),
            at + "self_attn.k_proj.weight": (kv_width, hidden),
            at + "self_attn.v_proj.weight": (kv_width, hidden),
            at + "self_attn.o_proj.weight": (hidden, q_width),
            at + "mlp.gate_proj.weight": (inner, hidden),
            at + "mlp.up_proj.weight": (inner, hidden),
            at + "mlp.down_proj.weight": (hidden, inner),
        }
        if config.qkv_bias:
            shapes |= {
                at + "self_attn.q_proj.bias": (q_width,),
                at + "self_attn.k_proj.bias": (kv_width,),
                at + "self_attn.v_proj.bias": (kv_width,),
            }
        if config.output_bias:
            shapes[at + "self_attn.o_proj.bias"] = (hidden,)
        if config.mlp_bias:
            shapes |= {
                at + "mlp.gate_proj.bias": (inner,),
                at + "mlp.up_proj.bias": (inner,),
                at + "mlp.down_proj.bias": (hidden,),
            }
    return shapes


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor.

    Raises:
        RealmError: ``model_invalid`` if a file is missing or its header is broken.
    """
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            weight_map = msgspec.json.decode(index.read_bytes(), type=dict[str, object])["weight_map"]
            names = msgspec.convert(weight_map, dict[str, str])
            if any("/" in file or file.startswith(".") for file in names.values()):
                raise RealmError("model_invalid", f"{index.name} names a file outside the folder")
            return {tensor: folder / file for tensor, file in names.items()}
        single = folder / "model.safetensors"
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except (OSError, KeyError, msgspec.MsgspecError, SafetensorError) as error:
        raise RealmError("model_invalid", f"the weights in {folder.name} cannot be read: {error}") from error


def load_weights(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """All weights of the model, in ``dtype`` on ``device``.

    Files are mapped, and tensors taken to the device one by one: main memory never holds a copy of more
    than one of them on the way to a GPU (nor on the way to the CPU, where a tensor of the right dtype
    stays a view of the file).

    Raises:
        RealmError: ``model_invalid`` naming the first tensor that is missing or has a wrong shape.
    """
    shapes = expected_shapes(config)
    files = weight_files(folder)
    missing = [name for name in shapes if name not in files]
    if missing:
        raise RealmError("model_invalid", f"tensor {missing[0]} is missing", details={"tensor": missing[0]})
    weights: dict[str, torch.Tensor] = {}
    by_file: dict[Path, list[str]] = {}
    for name in shapes:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    if tuple(tensor.shape) != shapes[name]:
                        raise RealmError(
                            "model_invalid",
                            f"tensor {name} has shape {list(tensor.shape)}; config.json asks for {list(shapes[name])}",
                            details={"tensor": name},
                        )
                    weights[name] = tensor.to(dtype)
                    if progress:
                        progress(len(weights), len(shapes))
        except (OSError, SafetensorError) as error:
            raise RealmError("model_invalid", f"{file.name} cannot be read: {error}") from error
    return weights


def random_weights(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Weights as :func:`load_weights` gives them, made up on ``device``: the same for the same seed and device.

    Matrices are normal with a standard deviation of 0.02 (as the published models were before training),
    norms are ones and biases zeros, so activations stay in range.
    """
    shapes = expected_shapes(config)
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=dtype, device=device)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            weights[name] = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        if progress:
            progress(len(weights), len(shapes))
    return weights
