"""Adapters that PEFT made and saved: what we add to each matrix is what PEFT adds."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE, write_random_adapter
from realm.adapters.peft import check_adapter, parse_config
from realm.adapters.tensors import TARGETS
from realm.errors import RealmError
from realm.models.config import ModelConfig
from tests.adapter_files import block_deltas, from_peft, load, peft_model, tensor_name
from tests.tiny import SHAPE

# Wide enough for rank 256 to be more than a name, two layers.
WIDE: dict[str, Any] = {**SHAPE, "hidden_size": 96, "intermediate_size": 272, "num_hidden_layers": 2}


def base(**changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes})).eval()


def config_of(model: transformers.PreTrainedModel) -> ModelConfig:
    return ModelConfig.parse({**model.config.to_dict(), "architectures": [type(model).__name__]})


def peft_deltas(adapted: Any) -> dict[str, torch.Tensor]:
    """PEFT's own, float32, by the matrix's name."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def compare(folder: Path, adapted: Any, model: ModelConfig) -> None:
    """Load a folder; each matrix's part must be PEFT's, and all others zero or not there."""
    info = check_adapter(folder / TENSORS_FILE, parse_config((folder / CONFIG_FILE).read_bytes()), model)
    wanted, found = peft_deltas(adapted), block_deltas(load(folder, model), model)
    assert wanted
    assert wanted.keys() <= found.keys()
    assert set(info.targets) == {name.rpartition(".")[2] for name in wanted}
    for name, delta in found.items():
        if name in wanted:
            largest = wanted[name].abs().max()
            assert largest > 0
            assert (delta.float() - wanted[name]).abs().max() <= 1e-6 * largest, name
        else:
            assert not delta.any()


def saved(folder: Path, changes: dict[str, Any] | None = None, **config: Any) -> None:
    """Let PEFT make and save an adapter, and compare."""
    model = base(**(changes or {}))
    shape = config_of(model)
    adapted = peft_model(model, **config)
    adapted.save_pretrained(folder)
    compare(folder, adapted, shape)


def test_every_subset_of_targets(tmp_path: Path) -> None:
    subsets = [s for size in range(1, len(TARGETS) + 1) for s in itertools.combinations(TARGETS, size)]
    assert len(subsets) == 127
    for number, subset in enumerate(subsets):
        saved(tmp_path, {"num_hidden_layers": 1}, r=3 + number % 5, lora_alpha=7, target_modules=list(subset))


@pytest.mark.parametrize("rank", [1, 2, 4, 15, 16, 17, 64, 100, 255, 256])
@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings(tmp_path: Path, rank: int, rslora: bool) -> None:
    saved(tmp_path, WIDE, r=rank, lora_alpha=24, use_rslora=rslora, target_modules="all-linear")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 9}, {"v_proj": 3}),
        ({"model.layers.1.self_attn.q_proj": 20, "q_proj": 2}, {}),
        ({r"^model\.layers\.[01]\..*": 5}, {".*": 11, r".*\.mlp\..*": 2}),
        ({r"^model\.layers\.[01]\..*": 5}, {r".*\.mlp\..*": 2, ".*": 11}),
        ({"(self_attn|mlp).[qu]p?_proj": 6, "o_proj": 33}, {"^model.*q_proj": 100, "gate.proj": 50}),
        ({r"1\.\w+\.\w+": 3}, {r"layers.(0|2).*(q|down)_proj": 0.5, "0.mlp.gate_proj": 3}),
    ],
)
def test_patterns(tmp_path: Path, ranks: dict[str, int], alphas: dict[str, float], rslora: bool) -> None:
    """The first key that matches counts, in the order of the file: PEFT sorts keys when it saves."""
    model = base()
    shape = config_of(model)
    peft_model(
        model,
        r=4,
        lora_alpha=9,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern=ranks,
        alpha_pattern=alphas,
    ).save_pretrained(tmp_path)
    compare(tmp_path, from_peft(base(), tmp_path), shape)


def test_ranks_that_are_not_the_files_are_refused_as_by_peft(tmp_path: Path) -> None:
    model = base()
    shape = config_of(model)
    ranks = {"q_proj": 2, "model.layers.1.self_attn.q_proj": 20}
    adapted = peft_model(model, r=4, lora_alpha=9, target_modules=["q_proj"], rank_pattern=ranks)
    adapted.save_pretrained(tmp_path)
    # It was 2 in all layers; in the file the keys are sorted, and layer 1 has rank 20.
    with pytest.raises(RuntimeError, match="size mismatch"), warnings.catch_warnings(action="ignore"):
        from_peft(base(), tmp_path)
    with pytest.raises(RealmError) as caught:
        load(tmp_path, shape)
    assert caught.value.details == {"tensor": tensor_name(1, "q_proj", "A")}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*layers\.[02]\..*(q|up)_proj"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0\..*"},
        {"target_modules": None},
        {"target_modules": "all-linear", "init_lora_weights": "gaussian", "lora_dropout": 0.3},
        {"target_modules": ["k_proj"], "init_lora_weights": "orthogonal"},
    ],
)
def test_other_ways_to_choose(tmp_path: Path, config: dict[str, Any]) -> None:
    saved(tmp_path, r=4, lora_alpha=4, **config)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"head_dim": 16}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Mistral", {"sliding_window": None}),
    ],
)
def test_other_models(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    shape = config_of(model)
    adapted = peft_model(model, r=5, lora_alpha=6, target_modules="all-linear")
    adapted.save_pretrained(tmp_path)
    compare(tmp_path, adapted, shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_saved_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = base()
    shape = config_of(model)
    adapted = peft_model(model, r=4, lora_alpha=4, target_modules="all-linear")
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    adapted.save_pretrained(tmp_path)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    compare(tmp_path, adapted, shape)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_peft_reads_what_is_made_up(tmp_path: Path, dtype: str) -> None:
    model = base()
    shape = config_of(model)
    write_random_adapter(
        tmp_path,
        shape,
        rank=6,
        seed=2,
        alpha=9,
        dtype=dtype,
        rank_pattern={"q_proj": 3, "model.layers.1.mlp.down_proj": 17},
        alpha_pattern={"up_proj": 1},
        rslora=True,
    )
    adapted = from_peft(model, tmp_path)
    assert {parameter.dtype for name, parameter in adapted.named_parameters() if "lora_" in name} == {torch.float32}
    compare(tmp_path, adapted, shape)


@pytest.mark.parametrize(
    ("config", "details"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, {"field": "use_dora"}),
        ({"target_modules": ["q_proj"], "lora_bias": True}, {"field": "lora_bias"}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"field": "modules_to_save"}),
        ({"target_modules": ["q_proj"], "bias": "all"}, {"field": "bias"}),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, {"field": "trainable_token_indices"}),
        ({"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]}, {"field": "layer_replication"}),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, {"field": "init_lora_weights"}),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, {"field": "init_lora_weights"}),
        ({"target_modules": ["q_proj"], "alora_invocation_tokens": [3]}, {"field": "alora_invocation_tokens"}),
        ({"target_modules": ["q_proj", "lm_head"]}, {"tensor": "base_model.model.lm_head."}),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"tensor": "base_model.model.model.embed_tokens."}),
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT says that some of these are unusual
def test_what_peft_can_and_we_cannot(tmp_path: Path, config: dict[str, Any], details: dict[str, str]) -> None:
    model = base(tie_word_embeddings=False)
    shape = config_of(model)
    adapted = peft_model(model, r=4, lora_alpha=4, **config)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(RealmError) as caught:
        check_adapter(tmp_path / TENSORS_FILE, parse_config((tmp_path / CONFIG_FILE).read_bytes()), shape)
    assert caught.value.code == "adapter_invalid"
    # PEFT saves an adapted embedding with the embedding itself: any of its tensors may be named.
    ((kind, name),) = details.items()
    assert caught.value.details.keys() == {kind}
    assert caught.value.details[kind].startswith(name)


@pytest.mark.filterwarnings("ignore:PiSSA changes")
def test_a_pissa_adapter_that_was_converted(tmp_path: Path) -> None:
    """PEFT turns an adapter that was trained beside changed weights into one for the model as it was."""
    model = base()
    shape = config_of(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = peft_model(model, random=False, r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    deltas = block_deltas(load(tmp_path / "end", shape), shape)
    merged = adapted.merge_and_unload().state_dict()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"):
        wanted = merged[name + ".weight"] - before[name + ".weight"]
        assert (deltas[name].float() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
