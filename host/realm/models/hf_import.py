"""A local Hugging Face folder to a model folder: checked tensor by tensor, then copied as one file."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.json_files import read_object
from realm.models.loading import expected_shapes
from realm.models.safetensors_file import PIECE, StoredTensor, Writer, from_bfloat16, invalid, read_header

Progress = Callable[[str, int, int], None]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_COPIED = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
"""Taken along when they exist; ``config.json`` and ``tokenizer.json`` are required."""


def folder_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that an import reads, by name.

    Raises:
        RealmError: ``model_invalid`` naming a required file that is missing.
    """
    names = {"config.json", "tokenizer.json"} | {name for name in _COPIED if (folder / name).is_file()}
    if (folder / INDEX).is_file():
        names |= {INDEX, *_weight_map(folder / INDEX).values()}
    else:
        names.add(SINGLE)
    for name in sorted(names):
        if not (folder / name).is_file():
            raise RealmError("model_invalid", f"{folder.name} has no file {name}", details={"field": name})
    return [folder / name for name in sorted(names)]


def import_hf(source: Path, folder: Path, *, dtype: str, progress: Progress) -> None:
    """Check ``source`` and copy it into the empty ``folder``, weights stored as ``dtype``.

    Raises:
        RealmError: ``model_invalid`` naming the file, field or tensor.
    """
    folder_files(source)
    config = ModelConfig.load(source)
    found = _match_tensors(_tensors(source), config)
    progress("tokenizer", 0, 1)
    for name in ("config.json", "tokenizer.json", *_COPIED):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    progress("tokenizer", 1, 1)
    writer = Writer(folder / SINGLE, expected_shapes(config), dtype)
    try:
        for number, (name, (path, tensor)) in enumerate(found.items()):
            progress("weights", number, len(found))
            writer.write(name, _pieces(path, tensor))
        writer.close()
    finally:
        writer.abandon()
    progress("weights", len(found), len(found))


def _weight_map(path: Path) -> dict[str, str]:
    """Which file holds each tensor, as the index says."""
    try:
        files = msgspec.convert(read_object(path).get("weight_map"), dict[str, str])
    except msgspec.ValidationError as error:
        raise RealmError(
            "model_invalid", f"{INDEX} has no usable weight_map: {error}", details={"field": INDEX}
        ) from error
    for tensor, file in files.items():
        # A name is a file of the folder itself: nothing outside may be read.
        if not file.endswith(".safetensors") or file.startswith(".") or "/" in file or "\0" in file:
            raise invalid(tensor, f"lies in {file[:100]!r}, which is not a weight file of the folder")
    return files


def _tensors(source: Path) -> dict[str, tuple[Path, StoredTensor]]:
    """All tensors of the folder's weight files."""
    if not (source / INDEX).is_file():
        return {name: (source / SINGLE, tensor) for name, tensor in read_header(source / SINGLE).items()}
    weight_map = _weight_map(source / INDEX)
    headers = {file: read_header(source / file) for file in sorted(set(weight_map.values()))}
    found: dict[str, tuple[Path, StoredTensor]] = {}
    for name, file in weight_map.items():
        tensor = headers[file].pop(name, None)
        if tensor is None:
            raise invalid(name, f"is not in {file}, where the index puts it")
        found[name] = (source / file, tensor)
    for file, rest in headers.items():
        for name in rest:
            raise invalid(name, f"is in {file} but not in the index")
    return found


def _match_tensors(
    found: dict[str, tuple[Path, StoredTensor]], config: ModelConfig
) -> dict[str, tuple[Path, StoredTensor]]:
    """The tensors the model needs, in order; none missing, misshapen or left over."""
    shapes = expected_shapes(config)
    # Old exports hold tensors that are computed from the configuration, or a copy of tied embeddings.
    found = {
        name: entry
        for name, entry in found.items()
        if not name.endswith(".rotary_emb.inv_freq") and not (config.tied_embeddings and name == "lm_head.weight")
    }
    for name, shape in shapes.items():
        if name not in found:
            raise invalid(name, "is missing")
        stored = found[name][1].shape
        if stored != shape:
            raise invalid(name, f"has shape {list(stored)}; config.json asks for {list(shape)}")
    for name in found:
        if name not in shapes:
            raise invalid(name, "is not one that config.json asks for")
    return {name: found[name] for name in shapes}


def _pieces(path: Path, tensor: StoredTensor) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's values as flat float32 pieces."""
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
    count = math.prod(tensor.shape)
    data = np.memmap(path, mode="r", dtype=np.uint8)[tensor.start : tensor.end]
    size = np.dtype(kind).itemsize
    for first in range(0, count, PIECE):
        values: npt.NDArray[Any] = np.frombuffer(data[first * size : (first + PIECE) * size], dtype=kind)
        yield from_bfloat16(values) if tensor.dtype == "BF16" else values.astype(np.float32)
