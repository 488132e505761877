"""The compiler child's own checks, rewriting and compilation, called in this process: no process for each module."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import wasmtime

from realm.guests.compiler import compile_bytes
from realm.guests.fibers import Engine

_engine: Engine | None = None
_folder: tempfile.TemporaryDirectory[str] | None = None


def artifact(data: bytes) -> str:
    """Path of the compiled module. Raises RealmError, as the child would report it."""
    global _engine, _folder
    if _engine is None or _folder is None:
        _engine, _folder = Engine(), tempfile.TemporaryDirectory(prefix="realm-fuzz-")
    compiled, _imports = compile_bytes(_engine, data)
    path = Path(_folder.name) / f"{hashlib.sha256(data).hexdigest()}.cwasm"
    path.write_bytes(compiled)
    return str(path)


def artifact_of_text(text: str) -> str:
    """Path of the compiled module in text form."""
    return artifact(bytes(wasmtime.wat2wasm(text)))
