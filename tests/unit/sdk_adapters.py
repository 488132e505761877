"""A folder as PEFT writes it, and what a server says of an adapter: for the tests of ``client.adapters``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from realm_sdk.adapters import CONFIG_FILE, WEIGHTS_FILE

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32.5,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"lay\u00e9r": 4},
    "task_type": None,
}
DATA: dict[str, Any] = {
    "name": "legal",
    "model": "tiny",
    "sha256": "ab" * 32,
    "size": 3,
    "version": 2,
    "created": 5.5,
    "rank": 16,
    "alpha": 32.5,
    "targets": ["q_proj", "v_proj"],
    "parameters": 4096,
    "pinned": True,
    "shared": False,
    "own": True,
    "state": "resident",
    "sequences": 3,
    "loads": 1,
}


def folder(path: Path, weights: bytes = b"abc", config: dict[str, Any] | bytes = CONFIG) -> Path:
    """A folder as PEFT writes it."""
    path.mkdir(exist_ok=True)
    (path / CONFIG_FILE).write_bytes(config if isinstance(config, bytes) else json.dumps(config, indent=2).encode())
    (path / WEIGHTS_FILE).write_bytes(weights)
    return path
