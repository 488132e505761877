"""The engine's numbers against transformers, for every member of the family."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realm.errors import RealmError
from realm.models.config import ModelConfig
from tests.tiny import SHAPE, VARIANTS, Driver, make_engine, make_model, oracle_logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, variant: str) -> None:
    model = make_model(tmp_path, variant)
    driver = Driver(make_engine(tmp_path, token_budget=24))
    rng = random.Random(1)
    prompts = [[rng.randrange(97) for _ in range(n)] for n in (1, 2, 15, 16, 17, 40, 100, 200)]
    calls = [driver.ask(driver.open(), prompt, logits=True) for prompt in prompts]
    for prompt, done in zip(prompts, driver.wait(*calls), strict=True):
        assert done.logits is not None
        ours = torch.from_numpy(np.frombuffer(done.logits, dtype=np.float32).copy())
        theirs = oracle_logits(model, prompt)[-1]
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_decoding_in_a_mixed_batch_equals_transformers(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    driver = Driver(make_engine(tmp_path, token_budget=16))
    rng = random.Random(2)
    texts = {driver.open(): [rng.randrange(97) for _ in range(n)] for n in (1, 5, 33, 60)}
    asked = dict(texts)
    for _ in range(20):
        calls = {seq: driver.ask(seq, asked[seq], logits=True) for seq in texts}
        for seq, done in zip(calls, driver.wait(*calls.values()), strict=True):
            theirs = oracle_logits(model, texts[seq])[-1]
            ours = torch.from_numpy(np.frombuffer(done.logits or b"", dtype=np.float32).copy())
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
            asked[seq] = [rng.randrange(97)]
            texts[seq] = texts[seq] + asked[seq]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "rope_scaling"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_scaling": [8]}, "rope_scaling"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"bos_token_id": True}, "bos_token_id"),
    ],
)
def test_a_wrong_configuration_names_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(RealmError) as caught:
        ModelConfig.parse({"architectures": ["LlamaForCausalLM"], **SHAPE, **change})
    assert caught.value.code == "model_invalid"
    assert caught.value.details["field"] == field


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*SHAPE, "rope_scaling", "rope_theta", "rms_norm_eps", "head_dim"]), junk))
def test_no_configuration_raises_anything_else(change: dict[str, object]) -> None:
    with contextlib.suppress(RealmError):
        ModelConfig.parse({"architectures": ["LlamaForCausalLM"], **SHAPE, **change})


def test_a_missing_or_misshapen_tensor_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(RealmError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        make_engine(tmp_path)
    save_file({**weights, name: weights[name][:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(RealmError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \[79, 48\]"):
        make_engine(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RealmError, match="cannot be read"):
        make_engine(tmp_path)
