"""Published models' shapes without their weights, for measuring: speed depends on sizes, not on values.

:func:`write_shape` makes a model folder that an engine with random weights and guests can use. Its
tokenizer has as many tokens as the model's, made up: the 256 bytes, special tokens where the model has
its own, and words of one to four letters.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.loading import expected_shapes
from realm.models.store import MODEL_FILE, ModelRecord
from realm.models.tokenizer import byte_alphabet

_LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
}
_SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# From the config.json that each model was published with.
_CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49_152,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama-3.2-1b": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": _SCALING | {"factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "llama-3.1-8b": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": _SCALING | {"factor": 8.0, "original_max_position_embeddings": 8192},
    },
}

SHAPES: dict[str, ModelConfig] = {name: ModelConfig.parse(raw) for name, raw in _CONFIGS.items()}
"""The shapes by name."""

_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def parameters(config: ModelConfig) -> int:
    """Number of weights, tied ones counted once."""
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def write_shape(folder: Path, shape: str) -> None:
    """Make ``folder`` a model folder of the shape called ``shape``, without weights; files in it are replaced.

    Raises:
        RealmError: ``invalid_params`` if there is no such shape.
    """
    if shape not in SHAPES:
        raise RealmError(
            "invalid_params", f"shape {shape[:120]!r} is not one of {', '.join(SHAPES)}", details={"param": "shape"}
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    described = json.dumps(_CONFIGS[shape], indent=1).encode()
    special = _special(config)
    (folder / "config.json").write_bytes(described)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(config.vocab_size, special)))
    settings = {"bos_token": special[config.bos], "chat_template": _TEMPLATE} if config.bos is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    record = ModelRecord(
        name=folder.name,
        source=f"shape:{shape}",
        sha256=hashlib.sha256(described).hexdigest(),
        architecture=config.architecture,
        parameters=parameters(config),
        dtype="bfloat16",
        context_length=config.context_length,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    (folder / MODEL_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))


def _special(config: ModelConfig) -> dict[int | None, str]:
    """Special tokens by id."""
    ends: dict[int | None, str] = {token: f"<|end_{at}|>" for at, token in enumerate(sorted(config.eos))}
    return ends if config.bos is None else ends | {config.bos: "<|begin|>"}


def _tokenizer(size: int, special: dict[int | None, str]) -> dict[str, Any]:
    """A byte-level ``tokenizer.json`` with ids 0 to ``size`` - 1."""
    plain = _contents()
    vocab = {special.get(token) or next(plain): token for token in range(size)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": vocab_name, **flags} for token, vocab_name in special.items()],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        # A word that is a token by itself is taken as that, so texts of such words need no merges.
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True},
    }


def _contents() -> Iterator[str]:
    """Texts of tokens, all different: the bytes, then words, in turn with a space in front and without."""
    yield from byte_alphabet()
    number = 0
    while True:
        word, rest = "", number
        while not word or rest:
            rest, letter = divmod(rest, 26)
            word += string.ascii_lowercase[letter]
        yield "Ġ" + word
        # Single letters are bytes, and there already.
        if len(word) > 1:
            yield word
        number += 1
