"""``adapter_model.safetensors`` from strangers: what fits the model is taken, all else refused by the tensor's name."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from realm.adapters.peft import AdapterInfo, PeftConfig, check_adapter
from realm.adapters.tensors import TARGETS
from realm.adapters.weights import load_adapter, packed_bytes
from realm.errors import RealmError
from realm.models.safetensors_file import to_bfloat16
from realm.models.shapes import SHAPES
from tests.adapter_files import (
    Array,
    described,
    random_tensors,
    safetensors_bytes,
    tensor_name,
    tensor_shape,
    tiny_config,
)

MODEL = tiny_config()
CONFIG = PeftConfig(rank=4, alpha=8.0)
A, B = tensor_name(0, "q_proj", "A"), tensor_name(0, "q_proj", "B")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "adapter_model.safetensors"


def check(file: Path, raw: bytes, config: PeftConfig = CONFIG) -> AdapterInfo:
    file.write_bytes(raw)
    return check_adapter(file, config, MODEL)


def refused(file: Path, raw: bytes | None, config: PeftConfig = CONFIG) -> RealmError:
    """The error of the check, which must be that of loading too."""
    if raw is not None:
        file.write_bytes(raw)
    with pytest.raises(RealmError) as caught:
        check_adapter(file, config, MODEL)
    with pytest.raises(RealmError) as loading:
        load_adapter(file, config, MODEL, torch.bfloat16)
    error = caught.value
    assert error.code == "adapter_invalid"
    assert (loading.value.code, loading.value.message, loading.value.details) == (
        error.code,
        error.message,
        error.details,
    )
    msgspec.json.encode([error.message, error.details])  # it can be sent
    return error


def refused_tensor(file: Path, raw: bytes, tensor: str, problem: str = "", config: PeftConfig = CONFIG) -> None:
    error = refused(file, raw, config)
    assert error.details == {"tensor": tensor}
    assert tensor in error.message
    assert problem in error.message


def pair(**changes: Any) -> dict[str, Array]:
    """A and B of one matrix; ``changes`` by A and B."""
    return {**random_tensors(MODEL, ["q_proj"], layers=[0]), **{{"A": A, "B": B}[k]: v for k, v in changes.items()}}


def built(tensors: dict[str, Array], **types: str) -> bytes:
    return safetensors_bytes(*described(tensors, types))


def changed(name: str, **entry: Any) -> bytes:
    """A good file, but for what its header says of one tensor."""
    header, data = described(pair())
    header[name] = {**header.get(name, {}), **entry}
    return safetensors_bytes(header, data)


def test_a_good_file_is_described(file: Path) -> None:
    tensors = random_tensors(MODEL, ["down_proj", "k_proj", "q_proj"], layers=[0, 2])
    info = check(file, built(tensors))
    assert info == AdapterInfo(4, 8.0, ["q_proj", "k_proj", "down_proj"], 2, sum(t.size for t in tensors.values()))
    assert json.loads(msgspec.json.encode(info))["rank"] == 4


def test_metadata_and_padding_are_ignored(file: Path) -> None:
    header, data = described(pair())
    text = json.dumps({"__metadata__": {"format": "pt", "a": "b" * 1000}, **header}).encode() + b" " * 77
    assert check(file, safetensors_bytes(text, data)).layers == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rank", [1, 7, 256])
def test_every_matrix_and_rank(file: Path, target: str, rank: int) -> None:
    tensors = random_tensors(MODEL, [target], rank=rank)
    assert check(file, built(tensors), PeftConfig(rank, 1.0)) == AdapterInfo(
        rank, 1.0, [target], MODEL.layers, sum(t.size for t in tensors.values())
    )


def test_ranks_by_pattern(file: Path) -> None:
    tensors = random_tensors(MODEL, ["q_proj"]) | random_tensors(MODEL, ["o_proj"], rank=9, layers=[1])
    assert check(file, built(tensors), PeftConfig(4, 8.0, False, {"1.self_attn.o_proj": 9})).rank == 9
    name = tensor_name(1, "o_proj", "A")
    refused_tensor(file, built(tensors), name, "[4, 48]", PeftConfig(4, 8.0, False, {"2.self_attn.o_proj": 9}))


@pytest.mark.parametrize(
    "shapes",
    [
        {"A": (5, 48), "B": (48, 5)},  # not the rank of the configuration
        {"A": (3, 48)},
        {"B": (48, 5)},
        {"A": (4, 47)},
        {"B": (49, 4)},
        {"A": (48, 4), "B": (4, 48)},  # transposed
        {"A": (4 * 48,)},
        {"A": (4, 48, 1)},
        {"A": ()},
        {"A": (0, 48)},
        {"A": (4, 0)},
        {"B": (0, 0)},
    ],
)
def test_wrong_shapes(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = pair(**{part: np.zeros(shape, np.float32) for part, shape in shapes.items()})
    refused_tensor(file, built(tensors), A if "A" in shapes else B, "shape")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("part", ["A", "B"])
def test_half_of_a_pair(file: Path, target: str, part: str) -> None:
    tensors = random_tensors(MODEL, [target], layers=[1])
    name = tensor_name(1, target, part)
    del tensors[name]
    refused_tensor(file, built(tensors), name, "missing")


def test_halves_of_different_pairs(file: Path) -> None:
    tensors = pair()
    tensors[tensor_name(1, "q_proj", "B")] = tensors.pop(B)
    refused_tensor(file, built(tensors), B, "missing")


def test_no_tensors(file: Path) -> None:
    assert refused(file, built({})).details == {"field": "target_modules"}
    assert refused(file, safetensors_bytes({"__metadata__": {}}, b"")).details == {"field": "target_modules"}


_AT = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (_AT + "self_attn.q_proj.lora_magnitude_vector.weight", "DoRA"),
        (_AT + "self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.model.embed_tokens.weight", "embedding"),
        ("base_model.model.lm_head.lora_A.weight", "head"),
        ("base_model.model.lm_head.weight", "head"),
        (_AT + "self_attn.q_proj.lora_B.bias", "bias"),
        (_AT + "self_attn.q_proj.base_layer.bias", "bias"),
        (_AT + "self_attn.q_proj.lora_A.default.weight", "save_pretrained"),
        (_AT + "input_layernorm.weight", "modules_to_save"),
        (_AT + "self_attn.q_proj.lora_C.weight", "lora_C"),
        (_AT + "self_attn.down_proj.lora_A.weight", "can be adapted"),
        (_AT + "mlp.q_proj.lora_A.weight", "can be adapted"),
        (_AT + "self_attn.qkv_proj.lora_A.weight", "can be adapted"),
        (_AT.replace("0", "00") + "self_attn.q_proj.lora_A.weight", "can be adapted"),
        (_AT.replace("0", "-1") + "self_attn.q_proj.lora_A.weight", "can be adapted"),
        (_AT.replace("0", "٣") + "self_attn.q_proj.lora_A.weight", "can be adapted"),
        (_AT.replace("0", "3") + "self_attn.q_proj.lora_A.weight", "layers 0 to 2"),
        (_AT.replace("0", "999999") + "self_attn.q_proj.lora_A.weight", "layers 0 to 2"),
        (_AT.replace("0", "9" * 5000) + "self_attn.q_proj.lora_A.weight", "can be adapted"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", "can be adapted"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "can be adapted"),
        ("x" + A, "can be adapted"),
        (A + "\n", "can be adapted"),
        ("", "no part"),
        ("\x1b[2J", "no part"),
        ("\ud800", "no part"),
        ("../../etc/passwd", "no part"),
    ],
)
def test_tensors_that_have_no_place(file: Path, name: str, problem: str) -> None:
    error = refused(file, built(pair() | {name: np.zeros((4, 48), np.float32)}))
    assert problem in error.message
    shown = error.details["tensor"]
    assert len(shown) <= 201
    assert shown.replace("…", "").isascii() and shown.isprintable()
    assert shown in error.message
    if name.isascii() and name.isprintable() and len(name) < 200:
        assert shown == name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("at", [0, 100, -1])
def test_values_that_are_not_finite(file: Path, value: float, kind: str, part: str, at: int) -> None:
    tensors = pair()
    name = {"A": A, "B": B}[part]
    convert = {"F32": lambda t: t, "F16": lambda t: t.astype(np.float16), "BF16": lambda t: to_bfloat16(t)}[kind]
    good = {key: convert(tensor) for key, tensor in tensors.items()}
    check(file, built(good))
    tensors[name].reshape(-1)[at] = value
    with np.errstate(all="ignore"):
        bad = {key: convert(tensor) for key, tensor in tensors.items()}
    if kind == "BF16":
        bits = {np.nan: 0x7FC1, np.inf: 0x7F80, -np.inf: 0xFF80}[value]
        bad[name].reshape(-1)[at] = bits
    refused_tensor(file, built(bad), name, "not finite")


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFFFFFFF, 0x7FC00000])
def test_every_kind_of_nan(file: Path, bits: int) -> None:
    tensors = pair()
    tensors[A].view(np.uint32)[0, 0] = bits
    refused_tensor(file, built(tensors), A, "not finite")


def test_a_bad_value_in_any_piece(file: Path) -> None:
    """Values are checked in pieces, of 32,512 elements when loading and 262,144 in the gateway."""
    model = SHAPES["llama-3.1-8b"]
    tensors = random_tensors(model, ["down_proj"], rank=20, layers=[0])
    name = tensor_name(0, "down_proj", "A")
    for at in (32_511, 32_512, 262_143, 262_144, tensors[name].size - 1):
        flat = tensors[name].reshape(-1)
        before, flat[at] = flat[at], np.inf
        file.write_bytes(built(tensors))
        flat[at] = before
        with pytest.raises(RealmError) as caught:
            check_adapter(file, PeftConfig(20, 1.0), model)
        assert caught.value.details == {"tensor": name}
        with pytest.raises(RealmError) as caught:
            load_adapter(file, PeftConfig(20, 1.0), model, torch.bfloat16)
        assert caught.value.details == {"tensor": name}


def test_values_that_are_too_large_once_scaled(file: Path) -> None:
    tensors = pair()
    tensors[B][3, 1] = -3e38
    check(file, built(tensors), PeftConfig(4, 4.0))
    assert torch.isfinite(load_adapter(file, PeftConfig(4, 4.0), MODEL, torch.bfloat16).data).all()
    refused_tensor(file, built(tensors), B, "beyond the range", PeftConfig(4, 8.0))
    refused_tensor(file, built(tensors), B, "beyond the range", PeftConfig(4, -8.0))
    tensors = pair()
    # The largest float32 would be rounded to an infinity.
    tensors[A][0, 0] = np.finfo(np.float32).max
    refused_tensor(file, built(tensors), A, "beyond the range")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F64"},
        {"dtype": "I32"},
        {"dtype": "BOOL"},
        {"dtype": "F8_E4M3"},
        {"dtype": "f32"},
        {"dtype": None},
        {"dtype": ["F32"]},
        {"dtype": "x" * 1000},
        {"dtype": "F16"},  # its bytes do not match
        {"shape": [1 << 40, 1 << 40]},
        {"shape": [1 << 61, 8]},
        {"shape": [10**30, 1]},
        {"shape": [10**4000, 48]},
        {"shape": [-4, -48]},
        {"shape": [4.0, 48]},
        {"shape": [True, 48]},
        {"shape": "4,48"},
        {"shape": None},
        {"shape": [4] * 1000},
        {"data_offsets": [0, 1 << 62]},
        {"data_offsets": [-768, 0]},
        {"data_offsets": [768, 0]},
        {"data_offsets": [1, 769]},
        {"data_offsets": [0, 767]},
        {"data_offsets": [768, 1536]},  # where the other one is
        {"data_offsets": [1 << 40, (1 << 40) + 768]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 768, 768]},
        {"data_offsets": None},
        {"data_offsets": {"0": 768}},
    ],
)
def test_wrong_descriptions(file: Path, entry: dict[str, Any]) -> None:
    error = refused(file, changed(A, **entry))
    # Of two tensors in one place either may be named.
    assert error.details["tensor"] in (A, B)
    assert len(error.message) < 600


@pytest.mark.parametrize("description", [None, [], "F32", 1])
def test_no_description(file: Path, description: Any) -> None:
    header, data = described(pair())
    refused_tensor(file, safetensors_bytes({**header, B: description}, data), B, "no description")


def test_f64(file: Path) -> None:
    refused_tensor(file, built(pair(A=np.zeros((4, 48)))), A, "F64")


def test_a_hole_or_a_tail(file: Path) -> None:
    header, data = described(pair())
    assert refused(file, safetensors_bytes(header, data + b"\0")).details == {"field": file.name}
    refused_tensor(file, safetensors_bytes(header, data[:-1]), B, "the file has")
    header[B]["data_offsets"] = [offset + 8 for offset in header[B]["data_offsets"]]
    refused_tensor(file, safetensors_bytes(header, data[:768] + b"\0" * 8 + data[768:]), B, "holes")


def test_overlapping_tensors(file: Path) -> None:
    header, data = described(pair())
    header[B]["data_offsets"] = header[A]["data_offsets"]
    refused_tensor(file, safetensors_bytes(header, data[:768]), B, "begins")


def test_a_name_that_is_there_twice(file: Path) -> None:
    header, data = described(pair())
    text = json.dumps(header)[:-1] + f', "{A}": {json.dumps(header[A])}}}'
    error = refused(file, safetensors_bytes(text.encode(), data))
    assert "twice" in error.message and A[:40] in error.message
    text = json.dumps(header).replace('"dtype"', '"dtype": "F32", "dtype"', 1)
    assert "twice" in refused(file, safetensors_bytes(text.encode(), data)).message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"\0" * 7,
        b"\0" * 8,
        b"\xff" * 8,
        b"\xff" * 100,
        (1 << 40).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        safetensors_bytes(b"[]", b""),
        safetensors_bytes(b"null", b""),
        safetensors_bytes(b"{", b""),
        safetensors_bytes(b"\xff\xff", b""),
        safetensors_bytes(b'{"a": NaN}', b""),
        safetensors_bytes(b"[" * 20_000, b""),
        safetensors_bytes(b'{"a":' * 10_000, b""),
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}q\x00." + b"\0" * 100,
    ],
)
def test_what_is_no_safetensors_file(file: Path, raw: bytes) -> None:
    assert refused(file, raw).details == {"field": file.name}


def test_no_file(file: Path) -> None:
    assert refused(file, None).details == {"field": file.name}
    file.mkdir()
    assert refused(file, None).details == {"field": file.name}


def test_a_header_larger_than_any_that_is_needed(file: Path) -> None:
    header, data = described(pair())
    text = json.dumps(header).encode()
    most = (64 << 10) + 512 * 14 * MODEL.layers
    assert check(file, safetensors_bytes(text + b" " * (most - len(text)), data)).layers == 1
    assert refused(file, safetensors_bytes(text + b" " * (most - len(text) + 1), data)).details == {"field": file.name}


@pytest.mark.parametrize("name", ["llama-3.1-8b", "smollm2-135m"])
def test_the_largest_header_that_is_needed_is_read(file: Path, name: str) -> None:
    model = SHAPES[name]
    names = [(layer, target, part) for layer in range(model.layers) for target in TARGETS for part in "AB"]
    shapes = [tensor_shape(model, target, part, 1) for _, target, part in names]
    zero = {tensor_name(*key): np.zeros(shape, np.uint16) for key, shape in zip(names, shapes, strict=True)}
    header, data = described(zero)
    file.write_bytes(safetensors_bytes(json.dumps(header, indent=4).encode(), data))
    assert check_adapter(file, PeftConfig(1, 1.0), model).layers == model.layers


@pytest.mark.parametrize("claimed", [[1 << 20, 1 << 20], [256, 1 << 30], [1 << 31, 48]])
def test_nothing_is_allocated_for_what_a_header_claims(file: Path, claimed: list[int]) -> None:
    size = 4 * claimed[0] * claimed[1]
    raw = changed(A, shape=claimed, data_offsets=[0, size])
    refused(file, raw)
    tracemalloc.start()
    try:
        refused(file, raw)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_the_size_that_it_claims(file: Path) -> None:
    """A file may be as large as it says and hold nothing: it is refused by its shape before it is read."""
    size = 4 * (1 << 20) * (1 << 12)
    header, _ = described({B: pair()[B]})
    header[B]["data_offsets"] = [size, size + 768]
    header[A] = {"dtype": "F32", "shape": [1 << 20, 1 << 12], "data_offsets": [0, size]}
    raw = safetensors_bytes(header, b"")
    file.write_bytes(raw)
    os.truncate(file, len(raw) + size + 768)
    tracemalloc.start()
    try:
        refused_error = refused(file, None)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert refused_error.details == {"tensor": A}


def test_a_large_file_is_checked_in_pieces(file: Path) -> None:
    model = SHAPES["llama-3.1-8b"]
    config = PeftConfig(256, 256.0)
    shape = {part: tensor_shape(model, "up_proj", part, 256) for part in "AB"}
    header, at = {}, 0
    for layer in range(16):
        for part in "AB":
            size = 2 * shape[part][0] * shape[part][1]
            header[tensor_name(layer, "up_proj", part)] = {
                "dtype": "BF16",
                "shape": shape[part],
                "data_offsets": [at, at + size],
            }
            at += size
    raw = safetensors_bytes(header, b"")
    file.write_bytes(raw)
    os.truncate(file, len(raw) + at)
    assert at > 140 << 20
    tracemalloc.start()
    try:
        assert check_adapter(file, config, model).parameters == at // 2
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_it_takes_is_known_from_the_header(file: Path) -> None:
    file.write_bytes(built(random_tensors(MODEL, ["q_proj", "down_proj"])))
    for dtype in (torch.float32, torch.bfloat16):
        assert packed_bytes(file, CONFIG, MODEL, dtype) == load_adapter(file, CONFIG, MODEL, dtype).nbytes


def test_a_file_that_becomes_shorter_while_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from realm.adapters import peft, weights
    from realm.adapters.tensors import layout

    file.write_bytes(built(pair()))

    def cut(*args: Any) -> Any:
        modules = layout(*args)
        os.truncate(file, file.stat().st_size - 1)
        return modules

    for module in (peft, weights):
        file.write_bytes(built(pair()))
        monkeypatch.setattr(module, "layout", cut)
        with pytest.raises(RealmError) as caught:
            if module is peft:
                check_adapter(file, CONFIG, MODEL)
            else:
                load_adapter(file, CONFIG, MODEL, torch.float32)
        assert caught.value.details == {"tensor": B}
