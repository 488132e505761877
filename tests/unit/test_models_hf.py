"""Hugging Face folders: right values from good ones, a typed error that names the culprit from bad ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from realm.errors import RealmError
from realm.models.config import ModelConfig
from realm.models.hf_import import folder_files, import_hf
from realm.models.safetensors_file import MAX_HEADER, Writer, from_bfloat16, read_header, to_bfloat16
from realm.models.tokenizer import Tokenizer
from tests.model_files import hf_config, random_weights, tokenizer_definition, write_folder

Q = "model.layers.0.self_attn.q_proj.weight"


def convert(source: Path, dtype: str = "float32") -> Path:
    folder = source.with_name(source.name + ".out")
    folder.mkdir()
    import_hf(source, folder, dtype=dtype, progress=lambda stage, done, total: None)
    return folder


def refused(source: Path) -> RealmError:
    with pytest.raises(RealmError) as caught:
        convert(source)
    return caught.value


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_copied_whole_or_sharded(tmp_path: Path, shards: int) -> None:
    weights = random_weights()
    source = write_folder(tmp_path / "m", weights, shards=shards)
    (source / "generation_config.json").write_text('{"eos_token_id": [0]}')
    (source / "pickle.bin").write_text("is not copied")
    folder = convert(source)
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(loaded[name], weight)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert Tokenizer(folder).eos == {0, 2}
    assert ModelConfig.load(folder) == ModelConfig.load(source)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_every_stored_type_becomes_bfloat16(tmp_path: Path, kind: str) -> None:
    weights = random_weights()
    source = write_folder(tmp_path / "m", weights)
    if kind == "F16":
        weights = {name: weight.astype(np.float16).astype(np.float32) for name, weight in weights.items()}
        save_file({name: weight.astype(np.float16) for name, weight in weights.items()}, source / "model.safetensors")
    if kind == "BF16":
        weights = {name: from_bfloat16(to_bfloat16(weight)) for name, weight in weights.items()}
        (source / "model.safetensors").unlink()
        writer = Writer(source / "model.safetensors", {n: w.shape for n, w in weights.items()}, "bfloat16")
        for name, weight in weights.items():
            writer.write(name, [weight.reshape(-1)])
        writer.close()
    folder = convert(source, "bfloat16")
    raw = (folder / "model.safetensors").read_bytes()
    for name, tensor in read_header(folder / "model.safetensors").items():
        bits = np.frombuffer(raw[tensor.start : tensor.end], dtype=np.uint16).reshape(tensor.shape)
        np.testing.assert_array_equal(bits, to_bfloat16(weights[name]))


def test_computed_and_tied_tensors_of_old_exports_are_left_out(tmp_path: Path) -> None:
    weights = random_weights()
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, dtype=np.float32),
        "lm_head.weight": weights["model.embed_tokens.weight"],
    }
    assert (
        load_file(convert(write_folder(tmp_path / "m", weights | extra)) / "model.safetensors").keys() == weights.keys()
    )


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    source = write_folder(tmp_path / "m")
    (source / name).unlink()
    assert refused(source).details == {"field": name}


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    error = refused(write_folder(tmp_path / "m", config=hf_config(architectures=["MambaForCausalLM"])))
    assert error.details == {"field": "architectures"} and "MambaForCausalLM" in error.message


def test_missing_misshapen_strange_and_infinite_tensors_are_named(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"drop": Q},
        {Q: np.ones((63, 64), dtype=np.float32)},
        {"model.strange": np.ones(3, dtype=np.float32)},
        {Q: np.full((64, 64), np.nan, dtype=np.float32)},
        {Q: np.ones((64, 64), dtype=np.int8)},
    ]
    for number, change in enumerate(changes):
        weights: dict[str, Any] = random_weights()
        if "drop" in change:
            del weights[Q]
        else:
            weights |= change
        error = refused(write_folder(tmp_path / str(number), weights))
        assert error.code == "model_invalid"
        assert error.details == {"tensor": "model.strange" if "model.strange" in change else Q}


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/x.safetensors", ".hidden.safetensors", "model.bin", "a\0.safetensors"]
)
def test_an_index_may_not_name_files_elsewhere(tmp_path: Path, file: str) -> None:
    source = write_folder(tmp_path / "m", shards=2)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][Q] = file
    index.write_text(json.dumps(content))
    assert refused(source).details == {"tensor": Q}


def test_an_index_must_agree_with_its_files(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "a", shards=2)
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"][Q] = next(file for file in files if file != content["weight_map"][Q])
    index.write_text(json.dumps(content))
    assert refused(source).details == {"tensor": Q}
    source = write_folder(tmp_path / "b", shards=2)
    content = json.loads((source / index.name).read_text())
    del content["weight_map"][Q]
    (source / index.name).write_text(json.dumps(content))
    assert refused(source).details == {"tensor": Q}
    for number, text in enumerate(("{", "[]", "{}", '{"weight_map": {"a": 5}}', "[" * 100_000)):
        source = write_folder(tmp_path / f"c{number}", shards=2)
        (source / index.name).write_text(text)
        assert refused(source).details == {"field": index.name}


def container(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(**changes: Any) -> bytes:
    return json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


@pytest.mark.parametrize(
    ("raw", "culprit"),
    [
        (b"", "f.safetensors"),
        (b"\x01\0\0", "f.safetensors"),
        (container(b"{}", length=(1 << 64) - 1), "f.safetensors"),
        (container(b"{}", length=MAX_HEADER + 1), "f.safetensors"),
        (container(b"{}", length=3), "f.safetensors"),
        (container(b"[]"), "f.safetensors"),
        (container(b"\xff\xfe"), "f.safetensors"),
        (container(b'{"t":' + b"[" * 100_000), "f.safetensors"),
        (container(b'{"t": 5}'), "t"),
        (container(entry(dtype="I8"), bytes(8)), "t"),
        (container(entry(dtype=["F32"]), bytes(8)), "t"),
        (container(entry(shape=[-2]), bytes(8)), "t"),
        (container(entry(shape="2"), bytes(8)), "t"),
        (container(entry(shape=[1 << 62, 1 << 62]), bytes(8)), "t"),
        (container(entry(shape=[True]), bytes(8)), "t"),
        (container(entry(shape=[1] * 10_000), bytes(8)), "t"),
        (container(entry(data_offsets=[0]), bytes(8)), "t"),
        (container(entry(data_offsets=[8, 0]), bytes(8)), "t"),
        (container(entry(data_offsets=[0, 4]), bytes(8)), "t"),
        (container(entry(data_offsets=[4, 12]), bytes(8)), "t"),
        (container(entry(), bytes(7)), "t"),
        (
            container(json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ta"}).encode())
            + bytes(8),
            "a",
        ),
    ],
)
def test_hostile_safetensors_headers_are_named(tmp_path: Path, raw: bytes, culprit: str) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(raw)
    with pytest.raises(RealmError) as caught:
        read_header(path)
    assert caught.value.code == "model_invalid"
    assert culprit in (caught.value.details.get("field"), caught.value.details.get("tensor"))


@settings(max_examples=100, deadline=None)
@given(
    file=st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]),
    mutations=st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3),
    length=st.none() | st.integers(0, 5000),
)
def test_any_mutation_of_a_folder_imports_or_gives_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, file: str, mutations: list[tuple[int, bytes]], length: int | None
) -> None:
    source = write_folder(tmp_path_factory.mktemp("fuzz") / "m")
    raw = bytearray((source / file).read_bytes())
    for at, new in mutations:
        raw[at : at + len(new)] = new
    (source / file).write_bytes(raw if length is None else raw[:length])
    try:
        folder_files(source)
        Tokenizer(convert(source))
    except RealmError as error:
        assert error.code in ("model_invalid", "model_unsupported")
        assert error.details.get("field") or error.details.get("tensor")


def test_tensors_are_written_in_the_declared_order_and_all_of_them(tmp_path: Path) -> None:
    one = np.ones(2, dtype=np.float32)
    writer = Writer(tmp_path / "x", {"a": (2,), "b": (2,)}, "float32")
    with pytest.raises(ValueError, match="b is out of order"):
        writer.write("b", [one])
    writer.abandon()
    writer = Writer(tmp_path / "y", {"a": (2,), "b": (2,)}, "float32")
    with pytest.raises(ValueError, match="4 bytes instead of 8"):
        writer.write("a", [one[:1]])
    with pytest.raises(ValueError, match=r"a has|b was not written"):
        writer.close()
    writer.abandon()


def test_the_tokenizer_definition_of_these_tests_is_one_the_library_reads() -> None:
    import tokenizers

    assert tokenizers.Tokenizer.from_str(json.dumps(tokenizer_definition())).encode("the").tokens == ["the"]
