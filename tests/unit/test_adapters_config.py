"""``adapter_config.json``: what PEFT writes is understood, and all else is refused by the field's name."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm.adapters.peft import _INFORMATION, _OFF, _USED, MAX_ALPHA, MAX_CONFIG, MAX_RANK, PeftConfig, parse_config
from realm.adapters.strict_json import JsonError, parse_object, shown
from realm.errors import RealmError
from tests.adapter_files import CONFIG

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def parsed(**fields: Any) -> PeftConfig:
    return parse_config(json.dumps({**CONFIG, **fields}).encode())


def refused(raw: bytes) -> RealmError:
    with pytest.raises(RealmError) as caught:
        parse_config(raw)
    error = caught.value
    assert error.code == "adapter_invalid"
    msgspec.json.encode([error.message, error.details])  # it can be sent
    return error


def refused_field(**fields: Any) -> RealmError:
    error = refused(json.dumps({**CONFIG, **fields}).encode())
    assert error.details == {"field": next(iter(fields))}
    assert next(iter(fields)) in error.message
    return error


def test_the_least_configuration() -> None:
    config = parsed()
    assert (config.rank, config.alpha, config.rslora) == (4, 8.0, False)
    assert config.target_modules == ("q_proj",)
    assert (config.rank_of(Q), config.scaling(Q)) == (4, 2.0)


def test_what_peft_writes_is_understood(tmp_path: Any) -> None:
    import peft

    written = peft.LoraConfig(
        r=6,
        lora_alpha=9,
        use_rslora=True,
        target_modules="all-linear",
        lora_dropout=0.1,
        rank_pattern={"q_proj": 3},
        alpha_pattern={r".*layers\.1\..*": 5},
        task_type="CAUSAL_LM",
    )
    written.save_pretrained(tmp_path)
    config = parse_config((tmp_path / "adapter_config.json").read_bytes())
    assert config == PeftConfig(6, 9.0, True, {"q_proj": 3}, {r".*layers\.1\..*": 5.0}, ("all-linear",))
    assert config.rank_of(Q) == 3
    assert config.scaling(Q) == 9 / math.sqrt(3)
    assert config.rank_of(DOWN) == 6
    assert config.scaling(DOWN) == 5 / math.sqrt(6)


def test_every_field_of_pefts_is_judged() -> None:
    """A field that is new in PEFT is refused until somebody has looked at what it does."""
    import peft

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = _INFORMATION | _USED | _OFF.keys()
    assert fields - known == set()
    assert known - fields == set()
    assert not (_INFORMATION & _USED or _INFORMATION & _OFF.keys() or _USED & _OFF.keys())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["q_proj.weight"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"num_groups": 4}),
        ("monteclora_config", {"num_samples": 8}),
        ("megatron_config", {"hidden_size": 8}),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("bias", None),
        ("bias", 0),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("use_rslora", 1),
        ("use_rslora", "yes"),
        ("use_rslora", None),
        ("not_of_this_version", 0.5),
        ("not_of_this_version", {"on": True}),
        ("target_modules", 3),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", ["q_proj", 1]),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", "q_proj"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 257}),
        ("rank_pattern", {"q_proj": 8.0}),
        ("rank_pattern", {"q_proj": None}),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(q_proj": 8}),
        ("rank_pattern", {"x" * 2000: 8}),
        ("alpha_pattern", 8),
        ("alpha_pattern", {"q_proj": True}),
        ("alpha_pattern", {"q_proj": 1e300}),
        ("alpha_pattern", {"q_proj{3}": 8}),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(field: str, value: Any) -> None:
    refused_field(**{field: value})


@pytest.mark.parametrize("field", sorted(_OFF))
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_what_is_off_is_no_reason(field: str, value: Any) -> None:
    assert parsed(**{field: value}) == parsed()
    assert parsed(not_of_this_version=value) == parsed()


@pytest.mark.parametrize("field", sorted(_INFORMATION))
def test_information_may_be_anything(field: str) -> None:
    assert parsed(**{field: {"any": ["thing", 1]}}) == parsed()


@pytest.mark.parametrize("rank", [1, 2, 255, MAX_RANK])
def test_ranks_from_1_to_256(rank: int) -> None:
    assert parsed(r=rank).rank == rank
    assert parsed(rank_pattern={"q_proj": rank}).rank_of(Q) == rank


@pytest.mark.parametrize("rank", [0, -1, MAX_RANK + 1, 10**4000, 4.0, "4", True, None, [4], {}])
def test_other_ranks_are_refused(rank: Any) -> None:
    refused_field(r=rank)
    refused_field(rank_pattern={"q_proj": rank})


@pytest.mark.parametrize("alpha", [0, 1, 16, 0.5, -3, MAX_ALPHA, -MAX_ALPHA])
def test_alphas(alpha: float) -> None:
    assert parsed(lora_alpha=alpha).scaling(Q) == alpha / 4
    assert parsed(alpha_pattern={"q_proj": alpha}).scaling(Q) == alpha / 4
    assert parsed(alpha_pattern={"q_proj": alpha}).scaling(DOWN) == 2.0


@pytest.mark.parametrize("alpha", [MAX_ALPHA * 1.01, -1e7, 10**4000, "16", True, None, [], {}])
def test_other_alphas_are_refused(alpha: Any) -> None:
    refused_field(lora_alpha=alpha)
    refused_field(alpha_pattern={"q_proj": alpha})


@pytest.mark.parametrize("missing", ["r", "lora_alpha", "peft_type"])
def test_a_missing_field_is_named(missing: str) -> None:
    error = refused(json.dumps({name: value for name, value in CONFIG.items() if name != missing}).encode())
    assert error.details == {"field": missing}
    assert "missing" in error.message


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_ways_of_initialising_that_leave_the_model_alone(start: Any) -> None:
    assert parsed(init_lora_weights=start) == parsed()


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_ways_of_initialising_that_change_the_model(start: str) -> None:
    assert "path_initial_model_for_weight_conversion" in refused_field(init_lora_weights=start).message


@pytest.mark.parametrize("start", ["new", "", 1, 0, [], {"pissa": 1}, "evader"])
def test_unknown_ways_of_initialising(start: Any) -> None:
    refused_field(init_lora_weights=start)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"LORA"',
        b"\xff\xfe{}",
        "{}".encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'{"r": NaN}',
        b'{"r": Infinity}',
        b'{"r": 1, "r": 2}',
        b'{"eva_config": {"rho": 1, "rho": 2}}',
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"r": ' + b"[" * 30_000 + b"}",
        b'{"r": ' + b'{"a":' * 10_000 + b"}",
        b'{"\\ud800": 1, "\\ud800": 2}',
        b" " * (MAX_CONFIG + 1),
        b"{} {}",
    ],
)
def test_what_is_no_configuration(raw: bytes) -> None:
    assert refused(raw).details == {"field": "adapter_config.json"}


def test_the_largest_configuration() -> None:
    text = json.dumps(CONFIG)
    assert parse_config((text + " " * (MAX_CONFIG - len(text))).encode()) == parsed()


@pytest.mark.parametrize("name", ["\ud800", "\x1b[31m", "ü", "a\nb", "x" * 60_000, "\0"])
def test_odd_names_are_shown_as_printable_text(name: str) -> None:
    error = refused(json.dumps({**CONFIG, name: 1}).encode())
    text = error.message.replace("…", "")
    assert text.isascii() and text.isprintable()
    assert len(error.message) < 400
    assert len(error.details["field"]) <= 201


def test_shown() -> None:
    assert shown("plain") == "plain"
    assert shown("x" * 61) == "x" * 60 + "…"
    assert shown("a\x1bb") == "a\\x1bb"
    assert shown("ü" * 60) == ("\\xfc" * 15)
    assert shown(10**100, 10) == "1000000000…"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(sorted(_USED | _INFORMATION | _OFF.keys())) | st.text(max_size=10)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(fields, json_values, max_size=6), st.booleans())
@example({"r": 10**400}, True)
@example({"lora_alpha": -(10**400)}, True)
def test_junk_in_fields(junk: dict[str, Any], good: bool) -> None:
    try:
        config = parse_config(json.dumps({**(CONFIG if good else {}), **junk}).encode())
    except RealmError as error:
        assert error.code == "adapter_invalid"
        assert len(error.message) < 600
        msgspec.json.encode([error.message, error.details])
    else:
        assert 1 <= config.rank_of(Q) <= MAX_RANK
        assert math.isfinite(config.scaling(Q))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 200), st.integers(0, 8))
def test_junk_in_bytes(junk: bytes, at: int, drop: int) -> None:
    good = json.dumps({**CONFIG, "rank_pattern": {"q_proj": 8}}).encode()
    for raw in (junk, good[:at] + junk + good[at + drop :]):
        try:
            parse_config(raw)
        except RealmError as error:
            assert error.code == "adapter_invalid"


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), json_values.filter(lambda v: "NaN" not in json.dumps(v)), max_size=5))
def test_objects_are_read_as_they_are(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    if "Infinity" in text:
        with pytest.raises(JsonError):
            parse_object(text.encode())
    else:
        assert parse_object(text.encode()) == json.loads(text)
