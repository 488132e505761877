"""Small model files of every kind that an import reads, made from random numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from safetensors.numpy import save_file

from realm.models.tokenizer import byte_alphabet

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("in", "g")]
SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *byte_alphabet(), *(left + right for left, right in MERGES)]
VOCAB = len(TOKENS)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"

Array = npt.NDArray[Any]


def random_weights(*, tied: bool = True, bias: bool = False, seed: int = 0) -> dict[str, Array]:
    """Weights with Hugging Face names, float32."""
    rng = np.random.default_rng(seed)

    def make(*shape: int) -> Array:
        return rng.normal(0, 0.1, shape).astype(np.float32)

    weights = {"model.embed_tokens.weight": make(VOCAB, HIDDEN), "model.norm.weight": make(HIDDEN)}
    if not tied:
        weights["lm_head.weight"] = make(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": make(HIDDEN),
            at + "post_attention_layernorm.weight": make(HIDDEN),
            at + "self_attn.q_proj.weight": make(HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": make(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": make(KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": make(HIDDEN, HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": make(INNER, HIDDEN),
            at + "mlp.up_proj.weight": make(INNER, HIDDEN),
            at + "mlp.down_proj.weight": make(HIDDEN, INNER),
        }
        if bias:
            weights |= {
                at + "self_attn.q_proj.bias": make(HEADS * HEAD_DIM),
                at + "self_attn.k_proj.bias": make(KV_HEADS * HEAD_DIM),
                at + "self_attn.v_proj.bias": make(KV_HEADS * HEAD_DIM),
            }
    return weights


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    for theirs, ours in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ):
        name = name.replace(theirs, ours)
    return name


def permute(weight: Array, heads: int) -> Array:
    """What llama.cpp's converter does to Q and K (its own words, from convert_hf_to_gguf.py)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    weights: dict[str, Array] | None = None,
    *,
    arch: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    tokens: list[str] | None = None,
    change: Any = None,
    extra: dict[str, Array] | None = None,
) -> Path:
    """Write a GGUF as llama.cpp's converter would.

    Args:
        change: called with the dict of metadata (key to value; a value of None leaves the key out).
        extra: further tensors, by GGUF name.
    """
    weights = random_weights() if weights is None else weights
    tokens = TOKENS if tokens is None else tokens
    meta: dict[str, Any] = {
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.block_count": LAYERS,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }
    if change:
        change(meta)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in meta.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, weight in weights.items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = permute(weight, HEADS if ".q_proj." in name else KV_HEADS)
        if weight.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), weight)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hf_config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of the small model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


def tokenizer_definition(**changes: Any) -> dict[str, Any]:
    """``tokenizer.json`` of the small model."""
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            | {"special": True}
            for i, t in enumerate(SPECIAL)
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(TOKENS)},
            "merges": [list(pair) for pair in MERGES],
        },
    } | changes


def write_folder(
    folder: Path,
    weights: dict[str, Array] | None = None,
    *,
    config: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Write a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights() if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config or hf_config()))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or tokenizer_definition()))
    settings = {"chat_template": TEMPLATE, "bos_token": SPECIAL[1]} if settings is None else settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        names = list(weights)[shard::shards]
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
