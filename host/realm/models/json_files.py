"""The JSON files of a model folder, read with a size limit; every error names the file or the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from realm.errors import RealmError

MAX_FILE = 128 << 20
"""Largest file in bytes (the largest published ``tokenizer.json`` have 35 MB)."""


def read_bytes(path: Path) -> bytes:
    """The file's content.

    Raises:
        RealmError: ``model_invalid`` naming the file if it is missing, unreadable or over :data:`MAX_FILE`.
    """
    try:
        if path.stat().st_size > MAX_FILE:
            raise _invalid(path.name, f"{path.name} is over {MAX_FILE} bytes")
        return path.read_bytes()
    except OSError as error:
        raise _invalid(path.name, f"{path.name} cannot be read: {error}") from error


def parse_object(name: str, raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``; ``name`` is the file's, for the error (``model_invalid``)."""
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _invalid(name, f"{name} is not a JSON object: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at ``path``. Raises as the two above."""
    return parse_object(path.name, read_bytes(path))


def read_optional(path: Path) -> dict[str, Any]:
    """As :func:`read_object`; empty if there is no such file."""
    return read_object(path) if path.exists() else {}


def _invalid(field: str, message: str) -> RealmError:
    return RealmError("model_invalid", message, details={"field": field})
