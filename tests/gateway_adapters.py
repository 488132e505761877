"""Small adapters for the gateway's tests, and the model that they fit; nothing computes with either."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from realm.models.config import ModelConfig

if TYPE_CHECKING:
    from tests.fake_host import FakeClient, FakeHost

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
SHAPE = ModelConfig.parse(MODEL)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def weights(seed: int = 0, *, rank: int = 2, layers: int = 2, value: float | None = None) -> bytes:
    """A safetensors file with q_proj of the first ``layers``; ``value`` fills all tensors."""
    shapes = {"A": (rank, SHAPE.hidden_size), "B": (SHAPE.heads * SHAPE.head_dim, rank)}
    numbers = np.random.default_rng(seed)
    header: dict[str, Any] = {}
    data = b""
    for layer in range(layers):
        for part, shape in shapes.items():
            filled = numbers.standard_normal(shape) if value is None else np.full(shape, value)
            raw = filled.astype("<f4").tobytes()
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


async def begin(client: FakeClient, name: str, content: bytes, **changes: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    params = {"name": name, "size": len(content), "sha256": sha256, "config": CONFIG, **changes}
    return await client.data("adapters.begin", **params)


async def send(client: FakeClient, name: str, content: bytes, **changes: Any) -> int:
    """All but the commit: gives the upload."""
    begun = await begin(client, name, content, **changes)
    upload = begun["upload"]
    assert isinstance(upload, int)
    if not begun["exists"]:
        ack = await client.chunk(upload, 0, content)
        assert ack == {"type": "upload_ack", "upload": upload, "received": len(content)}
    return upload


async def add(client: FakeClient, name: str, content: bytes, **changes: Any) -> dict[str, Any]:
    return await client.data("adapters.commit", upload=await send(client, name, content, **changes))


def blob(host: FakeHost, content: bytes) -> Path:
    """Where a content is kept."""
    return host.registry.blobs.path(hashlib.sha256(content).hexdigest())


def files(host: FakeHost) -> list[bytes]:
    """All contents, and whatever an upload has left."""
    return sorted(
        file.read_bytes() for part in ("blobs", "incoming") for file in (host.home / part).rglob("*") if file.is_file()
    )


async def names(client: FakeClient) -> list[str]:
    return [adapter["name"] for adapter in (await client.data("adapters.list"))["adapters"]]


async def untouched(host: FakeHost) -> None:
    """A refusal has left nothing of the upload."""
    while host.gateway.quotas.of("alice").uploads:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert files(host) == [] and host.engine.adapters == []
    assert await host.registry.run(lambda database: database.adapters.all()) == []
