"""``adapter_model.safetensors`` of junk: never anything but the typed error, and the same when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm.adapters.peft import PeftConfig, check_adapter
from realm.adapters.weights import load_adapter
from realm.errors import RealmError
from tests.adapter_files import described, random_tensors, safetensors_bytes, tensor_name, tiny_config

MODEL = tiny_config()
CONFIG = PeftConfig(rank=4, alpha=8.0)
A, B = tensor_name(0, "q_proj", "A"), tensor_name(0, "q_proj", "B")
HEADER, DATA = described(random_tensors(MODEL, ["q_proj"], layers=[0]))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
extents = st.sampled_from([0, 1, 4, 48, 192, 768, 1536, 1 << 31, 1 << 63, -1, 4.0])
entries = json_values | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "", 1]),
        "shape": st.lists(extents, max_size=3) | json_values,
        "data_offsets": st.lists(extents, max_size=3) | json_values,
    }
)
names = st.sampled_from([A, B, tensor_name(1, "down_proj", "A"), tensor_name(7, "up_proj", "B")]) | st.text(max_size=20)


def survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    answers = []
    for read in (
        lambda: check_adapter(path, CONFIG, MODEL),
        lambda: load_adapter(path, CONFIG, MODEL, torch.bfloat16),
    ):
        try:
            read()
            answers.append(None)
        except RealmError as error:
            assert error.code == "adapter_invalid"
            msgspec.json.encode([error.message, error.details])
            assert len(error.message) < 1000
            answers.append(error.message)
    assert answers[0] == answers[1]


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(names, entries, max_size=4), good=st.booleans(), tail=st.integers(0, 2000))
@example(header={"__metadata__": 3}, good=True, tail=0)
@example(header={A: {"dtype": "F32", "shape": [4, 48], "data_offsets": [768, 1536]}}, good=True, tail=0)
def test_junk_in_headers(tmp_path_factory: Any, header: dict[str, Any], good: bool, tail: int) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.safetensors"
    survives(path, safetensors_bytes({**(HEADER if good else {}), **header}, DATA + b"\0" * tail))


@settings(max_examples=300, deadline=None)
@given(junk=st.binary(max_size=40), at=st.integers(0, 2000), drop=st.integers(0, 40))
@example(junk=b"\x00\x00\x80\x7f", at=-4, drop=4)
def test_junk_in_bytes(tmp_path_factory: Any, junk: bytes, at: int, drop: int) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.safetensors"
    survives(path, junk)
    right = safetensors_bytes(HEADER, DATA)
    at %= len(right)
    survives(path, right[:at] + junk + right[at + drop :])
