"""GGUF to a model folder: ``config.json``, ``model.safetensors``, ``tokenizer.json``, ``tokenizer_config.json``.

Peak memory is that of the header and one piece of one tensor: rows are dequantized and written as they come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import msgspec
import numpy as np
import numpy.typing as npt

from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.gguf_file import GgufFile, GgufTensor
from realm.models.gguf_tokenizer import Vocabulary, build_settings, build_tokenizer, read_vocabulary
from realm.models.loading import expected_shapes
from realm.models.safetensors_file import PIECE, Writer, invalid

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total): bytes for downloads and hashes, tensors for weights."""

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""GGUF architectures that are read (Mistral's files say llama), and their Hugging Face names."""

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"

# Metadata that changes what the model computes, and the only value that the engine computes.
_NEUTRAL: dict[str, Any] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "use_parallel_residual": False,
}


def import_gguf(path: Path, folder: Path, *, dtype: str, progress: Progress) -> None:
    """Convert ``path`` into the empty ``folder``, weights stored as ``dtype``.

    Raises:
        RealmError: ``model_invalid`` or ``model_unsupported`` naming the field or the tensor.
    """
    file = GgufFile(path)
    try:
        fields = file.fields
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in FAMILIES:
            raise _unsupported(
                "general.architecture", f"is {str(architecture)[:100]!r}; supported are {', '.join(FAMILIES)}"
            )
        embedding = _tensor(file, "token_embd.weight", 2)
        vocabulary = read_vocabulary(fields, embedding.shape[0])
        raw_config = build_config(file, architecture, vocabulary) | {"torch_dtype": dtype}
        config = ModelConfig.parse(raw_config)
        sources = _match_tensors(file, config)
        progress("tokenizer", 0, 1)
        tokenizer = build_tokenizer(fields, vocabulary)
        _write_json(folder / "tokenizer.json", tokenizer)
        _write_json(folder / "tokenizer_config.json", build_settings(fields, vocabulary, config.context_length))
        _write_json(folder / "config.json", raw_config)
        progress("tokenizer", 1, 1)
        _write_weights(file, config, sources, folder, dtype, progress, permuted=architecture == "llama")
    finally:
        file.close()


def build_config(file: GgufFile, architecture: str, vocabulary: Vocabulary) -> dict[str, Any]:
    """``config.json`` in Hugging Face's style from the metadata and the tensors that exist.

    Raises:
        RealmError: ``model_invalid`` or ``model_unsupported`` naming the key.
    """
    meta = _Metadata(file.fields, architecture)
    for key, neutral in _NEUTRAL.items():
        meta.only(key, neutral)
    heads = meta.integer("attention.head_count", 1, 1024)
    hidden = meta.integer("embedding_length", 1, 1 << 17)
    head_dim = meta.integer("attention.key_length", 2, 1024, default=hidden // heads)
    meta.only("attention.value_length", head_dim)
    meta.only("rope.dimension_count", head_dim)
    context = meta.integer("context_length", 1, 1 << 24)
    # Beyond its window such a model would attend to less than the engine does: serve only what is the same.
    window = meta.integer("attention.sliding_window", 0, 1 << 24, default=0)
    biased = "blk.0.attn_q.bias" in file.tensors
    config: dict[str, Any] = {
        "architectures": [FAMILIES[architecture]],
        "model_type": architecture,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length", 1, 1 << 20),
        "num_hidden_layers": meta.integer("block_count", 1, 1024),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", 1, 1024, default=heads),
        "head_dim": head_dim,
        "max_position_embeddings": min(context, window) if window else context,
        "rms_norm_eps": meta.positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": meta.positive("rope.freq_base", default=10000.0),
        "rope_scaling": _rope_scaling(file, meta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
        "bos_token_id": vocabulary.special_ids.get("bos"),
        "eos_token_id": list(vocabulary.end_ids),
        "pad_token_id": vocabulary.special_ids.get("padding"),
    }
    if architecture == "llama":
        config |= {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    return config


class _Metadata:
    """Typed reads of ``<architecture>.<key>``, each error naming the key."""

    def __init__(self, fields: dict[str, Any], architecture: str) -> None:
        self._fields = fields
        self._architecture = architecture

    def get(self, key: str) -> tuple[str, Any]:
        name = f"{self._architecture}.{key}"
        value = self._fields.get(name)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one value a layer, all the same
        return name, value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        name, value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _invalid(name, f"is {str(value)[:50]}; an integer from {low} to {high} is needed")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        name, value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
            raise _invalid(name, f"is {str(value)[:50]}; a positive number is needed")
        # A float32 such as 9.999999747e-06 was written as 1e-05.
        return float(str(np.float32(value)))

    def only(self, key: str, neutral: Any) -> None:
        """Refuse a value that the engine does not compute with."""
        name, value = self.get(key)
        if value is not None and value != neutral:
            raise _unsupported(name, f"is {str(value)[:50]}; only {neutral} is supported")


def _rope_scaling(file: GgufFile, meta: _Metadata, head_dim: int) -> dict[str, Any] | None:
    """Llama-3 scaling, which a GGUF holds as one divisor for each frequency.

    The divisors follow from four numbers; those of the published models are tried, and the
    divisors must come out the same.
    """
    meta.only("rope.scaling.type", "none")
    tensor = file.tensors.get(_ROPE_FREQUENCIES)
    if tensor is None:
        return None
    if tensor.shape != (head_dim // 2,):
        raise invalid(_ROPE_FREQUENCIES, f"has shape {list(tensor.shape)} instead of {[head_dim // 2]}")
    divisors = np.concatenate(list(_pieces(file, tensor, None))).astype(np.float64)
    if not np.isfinite(divisors).all():
        raise invalid(_ROPE_FREQUENCIES, "has values that are not finite")
    theta = meta.positive("rope.freq_base", default=10000.0)
    for original in (8192, 4096, 2048, 16384, 32768):
        scaling = {
            "rope_type": "llama3",
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if divisors.max() >= 1 and np.allclose(divisors, _divisors(scaling, theta, head_dim), rtol=1e-4):
            return None if divisors.max() == 1 else scaling
    raise _unsupported(_ROPE_FREQUENCIES, "has divisors that Llama-3 scaling does not give")


def _divisors(scaling: dict[str, Any], theta: float, head_dim: int) -> npt.NDArray[np.float64]:
    """What Llama-3 scaling divides each RoPE frequency by: [head_dim / 2]."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (scaling["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    return divisors


def _tensor(file: GgufFile, name: str, dimensions: int) -> GgufTensor:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise invalid(name, "is missing")
    if len(tensor.shape) != dimensions:
        raise invalid(name, f"has shape {list(tensor.shape)}; {dimensions} dimensions are needed")
    return tensor


def _match_tensors(file: GgufFile, config: ModelConfig) -> dict[str, GgufTensor]:
    """The GGUF tensor of every tensor of the model, all shapes and types checked, none left over."""
    sources: dict[str, GgufTensor] = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FREQUENCIES:
            continue
        target = _target_name(name)
        if target is None:
            raise invalid(name, "is not one of a Llama-family model")
        sources[target] = tensor
    shapes = expected_shapes(config)
    for target, shape in shapes.items():
        source = sources.get(target)
        if source is None:
            raise invalid(_source_name(target), "is missing")
        if source.shape != shape:
            raise invalid(source.name, f"has shape {list(source.shape)}; the metadata ask for {list(shape)}")
        _check_quantization(source)
    extra = next((sources[target].name for target in sources if target not in shapes), None)
    if extra is not None:
        raise invalid(extra, "is not one that the metadata ask for")
    return {target: sources[target] for target in shapes}


def _target_name(name: str) -> str | None:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[3] not in ("weight", "bias") or parts[2] not in _BLOCK_NAMES:
        return None
    if not (parts[1].isascii() and parts[1].isdecimal()) or str(int(parts[1][:5])) != parts[1]:
        return None
    return f"model.layers.{parts[1]}.{_BLOCK_NAMES[parts[2]]}.{parts[3]}"


def _source_name(target: str) -> str:
    for name, known in _TOP_NAMES.items():
        if target == known:
            return name
    _, _, layer, rest = target.split(".", 3)
    stem, _, suffix = rest.rpartition(".")
    block = next(name for name, known in _BLOCK_NAMES.items() if known == stem)
    return f"blk.{layer}.{block}.{suffix}"


def _check_quantization(tensor: GgufTensor) -> None:
    """Refuse a type that cannot be dequantized before any work is done."""
    block, size = gguf.GGML_QUANT_SIZES[tensor.quantization]
    try:
        values = gguf.dequantize(np.zeros((1, size), dtype=np.uint8), tensor.quantization)
    except NotImplementedError as error:
        raise invalid(tensor.name, f"has type {tensor.quantization.name}, which cannot be dequantized") from error
    if values.size != block:
        raise invalid(tensor.name, f"has type {tensor.quantization.name}, which cannot be dequantized")


def _write_weights(
    file: GgufFile,
    config: ModelConfig,
    sources: dict[str, GgufTensor],
    folder: Path,
    dtype: str,
    progress: Progress,
    *,
    permuted: bool,
) -> None:
    writer = Writer(folder / "model.safetensors", expected_shapes(config), dtype)
    try:
        for number, (target, tensor) in enumerate(sources.items()):
            progress("weights", number, len(sources))
            heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(target.split(".")[-2]) if permuted else None
            order = _row_order(config.head_dim, heads) if heads else None
            writer.write(target, _pieces(file, tensor, order))
        writer.close()
    finally:
        writer.abandon()
    progress("weights", len(sources), len(sources))


def _row_order(head_dim: int, heads: int) -> npt.NDArray[np.intp]:
    """Which row of a Llama GGUF's Q or K becomes row i of the original.

    llama.cpp interleaves the two halves of each head's rows for its way of rotating.
    """
    rows = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _pieces(
    file: GgufFile, tensor: GgufTensor, order: npt.NDArray[np.intp] | None
) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's values as flat float32 pieces, rows taken in ``order``."""
    vector = len(tensor.shape) == 1
    rows = math.prod(tensor.shape[:-1])
    step = max(1, PIECE // tensor.shape[-1])
    for first in range(0, rows, step):
        last = min(rows, first + step)
        if order is None or vector:
            data = file.rows(tensor, first, last)
        else:
            data = file.rows(tensor, 0, rows)[order[first:last]]
        # A hostile scale may overflow; the writer refuses what is not finite.
        with np.errstate(all="ignore"):
            values = gguf.dequantize(np.ascontiguousarray(data), tensor.quantization)
        values = values.astype(np.float32, copy=False).reshape(-1)
        yield values[order] if order is not None and vector else values


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))


def _invalid(field: str, problem: str) -> RealmError:
    return RealmError("model_invalid", f"GGUF: {field} {problem}", details={"field": field})


def _unsupported(field: str, problem: str) -> RealmError:
    return RealmError("model_unsupported", f"GGUF: {field} {problem}", details={"field": field})
