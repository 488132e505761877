"""The tensors of a PEFT adapter: a bounded reader of a hostile safetensors file, and how they lie in a model.

Stricter than the reader of models' files: names, types, shapes and order are what PEFT writes, tensors fill
the file without holes, and no header is larger than one that the model's modules could need.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from realm.adapters.strict_json import JsonError, parse_object, shown
from realm.errors import RealmError
from realm.models.config import ModelConfig

GROUPS = ("qkv", "output", "gate_up", "down")
"""The names of the linear fields of :class:`realm.models.llama.Layer`."""
GROUP_TARGETS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "output": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The published matrices that each of them stacks, in order."""
TARGETS = tuple(target for group in GROUPS for target in GROUP_TARGETS[group])

ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one element, for the types that a tensor may have."""
LARGEST = 3.3895313892515355e38
"""The largest finite bfloat16: no scaled element may be beyond it, whatever type the model has."""

_PREFIX = "base_model.model."
_MODULE = r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?:self_attn\.(?:[qkvo]_proj)|mlp\.(?:gate|up|down)_proj)"
_NAME = re.compile(rf"base_model\.model\.(?P<module>{_MODULE})\.lora_(?P<part>[AB])\.weight")

_HEADER_BASE, _HEADER_TENSOR = 64 << 10, 512
_PIECE = 1 << 18
"""Elements checked at a time."""


class Ranks(Protocol):
    """What the configuration says of a module: see :class:`realm.adapters.peft.PeftConfig`."""

    def rank_of(self, module: str) -> int: ...

    def scaling(self, module: str) -> float: ...


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file; ``start`` is in bytes from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, int]
    start: int


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted matrix of the model.

    Attributes:
        layer, target: which one, such as 3 and ``q_proj``. rank: of ``a`` [rank, in] and ``b`` [out, rank].
        scaling: ``b @ a`` times this is added to the matrix.
    """

    layer: int
    target: str
    rank: int
    scaling: float
    a: StoredTensor
    b: StoredTensor


def group_widths(model: ModelConfig, group: str) -> tuple[int, list[int]]:
    """Of a group of :data:`GROUPS`: the elements of its input, and of the output of each of its targets."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return {
        "qkv": (hidden, [q_width, kv_width, kv_width]),
        "output": (q_width, [hidden]),
        "gate_up": (hidden, [inner, inner]),
        "down": (inner, [hidden]),
    }[group]


def module_name(layer: int, target: str) -> str:
    """The name of a matrix in the model, such as ``model.layers.3.self_attn.q_proj``."""
    part = "self_attn" if target in (*GROUP_TARGETS["qkv"], *GROUP_TARGETS["output"]) else "mlp"
    return f"model.layers.{layer}.{part}.{target}"


def invalid(tensor: str, problem: str) -> RealmError:
    """``adapter_invalid`` that names a tensor."""
    return RealmError(
        "adapter_invalid", f"tensor {shown(tensor, 200)} {problem}", details={"tensor": shown(tensor, 200)}
    )


def layout(file: Path, config: Ranks, model: ModelConfig) -> list[AdaptedModule]:
    """The adapted matrices of a file, by layer and then in the order of :data:`TARGETS`. Reads the header only.

    Raises:
        RealmError: ``adapter_invalid`` naming the tensor that is missing, wrong, unknown or does not fit.
    """
    parts: dict[tuple[int, str], dict[str, StoredTensor]] = {}
    for tensor in _read_header(file, model):
        match = _NAME.fullmatch(tensor.name)
        if match is None:
            raise invalid(tensor.name, _why_unknown(tensor.name))
        layer = int(match["layer"])
        if layer >= model.layers:
            raise invalid(tensor.name, f"is of layer {layer}; the model has layers 0 to {model.layers - 1}")
        parts.setdefault((layer, match["module"].rpartition(".")[2]), {})[match["part"]] = tensor
    if not parts:
        raise RealmError(
            "adapter_invalid",
            f"{file.name} has no tensors, so the adapter would change nothing. Save it after training",
            details={"field": "target_modules"},
        )
    widths = {
        target: (fan_in, fan_out)
        for group in GROUPS
        for fan_in, outs in [group_widths(model, group)]
        for target, fan_out in zip(GROUP_TARGETS[group], outs, strict=True)
    }
    order = {target: number for number, target in enumerate(TARGETS)}
    return [
        _module(layer, target, parts[layer, target], config, *widths[target])
        for layer, target in sorted(parts, key=lambda key: (key[0], order[key[1]]))
    ]


def _module(
    layer: int, target: str, parts: dict[str, StoredTensor], config: Ranks, fan_in: int, fan_out: int
) -> AdaptedModule:
    module = module_name(layer, target)
    for part in "AB":
        if part not in parts:
            raise invalid(f"{_PREFIX}{module}.lora_{part}.weight", "is missing, and its other half is there")
    rank = config.rank_of(module)
    for tensor, shape, words in (
        (parts["A"], (rank, fan_in), "[rank, input]"),
        (parts["B"], (fan_out, rank), "[output, rank]"),
    ):
        if tensor.shape != shape:
            raise invalid(
                tensor.name,
                f"has shape {list(tensor.shape)}; for this model and the rank {rank} of adapter_config.json"
                f" {list(shape)} is needed, {words}",
            )
    return AdaptedModule(layer, target, rank, config.scaling(module), parts["A"], parts["B"])


def _why_unknown(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "belongs to DoRA, which is not supported"
    if "embed" in name or "lm_head" in name:
        return "belongs to the embedding or the head, which cannot be adapted"
    if name.endswith(".bias"):
        return "is a bias, which cannot be adapted"
    if re.search(r"\.lora_[AB]\.\w+\.weight$", name):
        return "has an adapter's name in it. Save the adapter with save_pretrained"
    if "lora_" not in name:
        return "is no part of a LoRA adapter, and whole modules (modules_to_save) are not supported"
    return f"is of no matrix that can be adapted: {_PREFIX}model.layers.N. and one of {', '.join(TARGETS)} are"


# --- the file ---


def _read_header(file: Path, model: ModelConfig) -> list[StoredTensor]:
    most = _HEADER_BASE + _HEADER_TENSOR * 2 * len(TARGETS) * model.layers
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            prefix = opened.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise _bad_file(file, f"its header claims {length} bytes; the file has {size}")
            if length > most:
                raise _bad_file(file, f"its header has {length} bytes; for this model at most {most} are read")
            header = parse_object(opened.read(length))
    except OSError as error:
        raise unreadable(file, error) from error
    except JsonError as error:
        raise _bad_file(file, f"its header {error}") from error
    header.pop("__metadata__", None)
    at = 8 + length
    tensors = []
    for tensor, end in sorted(
        (_stored(name, entry, 8 + length) for name, entry in header.items()), key=lambda item: item[0].start
    ):
        if tensor.start != at:
            raise invalid(
                tensor.name, f"begins at byte {tensor.start}; the one before ends at {at}, and they may leave no holes"
            )
        if end > size:
            raise invalid(tensor.name, f"ends at byte {end}; the file has {size}")
        tensors.append(tensor)
        at = end
    if at != size:
        raise _bad_file(file, f"its tensors end at byte {at}; the file has {size}")
    return tensors


def _bad_file(file: Path, problem: str) -> RealmError:
    return RealmError(
        "adapter_invalid", f"{file.name} cannot be read: {shown(problem, 200)}", details={"field": file.name}
    )


def unreadable(file: Path, error: OSError) -> RealmError:
    """``adapter_invalid`` that says why a file cannot be read."""
    return _bad_file(file, error.strerror or str(error))


def _stored(name: str, entry: Any, data: int) -> tuple[StoredTensor, int]:
    """A tensor, and where it ends."""
    if not isinstance(entry, dict):
        raise invalid(name, "has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise invalid(name, f"has dtype {shown(repr(dtype))}; supported are {', '.join(ITEM_SIZES)}")
    if not _naturals(shape) or len(shape) != 2 or 0 in shape:
        raise invalid(name, f"has shape {shown(repr(shape))}; two positive integers are needed")
    if not _naturals(offsets) or len(offsets) != 2:
        raise invalid(name, f"has data_offsets {shown(repr(offsets))}; two integers are needed")
    needed = ITEM_SIZES[dtype] * shape[0] * shape[1]
    if offsets[1] - offsets[0] != needed:
        raise invalid(name, f"needs {needed} bytes and lies at {offsets[0]} to {offsets[1]}")
    return StoredTensor(name, dtype, (shape[0], shape[1]), data + offsets[0]), data + offsets[1]


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62 for v in value
    )


# --- values ---

_BITS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F32": (np.uint32, 0x7FFFFFFF),
    "F16": (np.uint16, 0x7FFF),
    "BF16": (np.uint16, 0x7FFF),
}
"""The unsigned integers of the same size, and all bits but the sign: by them magnitudes are ordered."""


def check_magnitudes(tensor: StoredTensor, raw: npt.NDArray[np.uint8], scaling: float) -> None:
    """Check a piece of a tensor's bytes.

    Raises:
        RealmError: ``adapter_invalid`` naming the tensor: an element is not finite, or too large once scaled.
    """
    kind, mask = _BITS[tensor.dtype]
    largest = _magnitude(tensor.dtype, int((raw.view(kind) & kind(mask)).max()))
    if not largest < float("inf"):
        raise invalid(tensor.name, "has values that are not finite")
    if largest * abs(scaling) > LARGEST:
        raise invalid(tensor.name, f"has values beyond the range of bfloat16, scaled by {scaling:g}")


def _magnitude(dtype: str, bits: int) -> float:
    if dtype == "F16":
        return float(np.array(bits, np.uint16).view(np.float16))
    return float(np.array(bits if dtype == "F32" else bits << 16, np.uint32).view(np.float32))


def scaled_tensors(modules: list[AdaptedModule]) -> list[tuple[StoredTensor, AdaptedModule, float]]:
    """All tensors in the order of the file, each with its module and what it is multiplied by."""
    pairs = [(module.a, module, 1.0) for module in modules] + [(module.b, module, module.scaling) for module in modules]
    return sorted(pairs, key=lambda pair: pair[0].start)


def pieces(
    opened: io.RawIOBase | io.BufferedIOBase, tensor: StoredTensor, elements: int, into: npt.NDArray[np.uint8]
) -> Iterator[npt.NDArray[np.uint8]]:
    """The tensor's bytes in pieces of ``elements``, each in ``into`` until the next one is asked for.

    Raises:
        RealmError: ``adapter_invalid`` if the file has become shorter.
    """
    size = ITEM_SIZES[tensor.dtype]
    left = size * tensor.shape[0] * tensor.shape[1]
    opened.seek(tensor.start)
    while left:
        piece = into[: min(left, size * elements)]
        if opened.readinto(piece.data) != len(piece):
            raise invalid(tensor.name, "cannot be read to its end")
        left -= len(piece)
        yield piece


def check_values(file: Path, modules: list[AdaptedModule]) -> None:
    """Check that every element is finite, also when scaled. Holds 1 MiB of the file.

    Raises:
        RealmError: ``adapter_invalid`` naming the tensor.
    """
    buffer = np.empty(4 * _PIECE, np.uint8)
    try:
        with file.open("rb") as opened:
            for tensor, _, scaling in scaled_tensors(modules):
                for piece in pieces(opened, tensor, _PIECE, buffer):
                    check_magnitudes(tensor, piece, scaling)
    except OSError as error:
        raise unreadable(file, error) from error
