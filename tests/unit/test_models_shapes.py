"""Model folders of published shapes without weights, and weights made up for them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

from realm.errors import RealmError
from realm.guests.facts import ModelFacts
from realm.models.config import ModelConfig, RopeScaling
from realm.models.llama import LlamaModel
from realm.models.loading import expected_shapes, random_weights
from realm.models.shapes import SHAPES, parameters, write_shape
from realm.models.store import choose_model, list_models, models_dir
from realm.models.tokenizer import Tokenizer
from tests.tiny import make_model

# As the publishers give them: 134,515,008, 1.23 and 8.03 billion.
PARAMETERS = {"smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for shape in SHAPES:
        write_shape(models_dir(home) / shape, shape)
    return home


def test_shapes_have_the_published_numbers_of_parameters() -> None:
    assert {name: parameters(config) for name, config in SHAPES.items()} == PARAMETERS


def test_llama_shapes_stretch_positions_as_published() -> None:
    # Llama 3.2 stretches by 32, Llama 3.1 by 8; both were trained with 8,192 positions before.
    assert SHAPES["llama-3.2-1b"].rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert SHAPES["llama-3.1-8b"].rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert SHAPES["smollm2-135m"].rope_scaling is None
    assert {config.context_length for config in SHAPES.values()} == {8192, 131_072}


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_the_same_model_from_the_folder(homes: Path, shape: str) -> None:
    config = transformers.AutoConfig.from_pretrained(homes / "models" / shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[shape]
    assert {name for name, _ in model.named_parameters()} == expected_shapes(SHAPES[shape]).keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_guests_can_use_the_folder(homes: Path, shape: str) -> None:
    folder = choose_model(homes, shape)
    assert ModelConfig.load(folder) == SHAPES[shape]
    tokenizer = Tokenizer(folder)
    facts = ModelFacts.load(folder, bos=tokenizer.bos, eos=tokenizer.eos)
    assert facts.vocab_size == tokenizer.vocab_size == SHAPES[shape].vocab_size
    assert (tokenizer.bos, tokenizer.eos) == (SHAPES[shape].bos, SHAPES[shape].eos)
    text = "What is the capital of France? Ōtautahi, 東京, 🦦.\n"
    assert tokenizer.decode(tokenizer.encode(text, special=False)) == text
    stream = tokenizer.stream()
    everything = range(tokenizer.vocab_size)
    assert "".join(map(stream.push, ([token] for token in everything))) + stream.flush() == tokenizer.decode(everything)
    # Every token but the special ones has a text of its own.
    plain = [tokenizer.decode([token], special=True) for token in everything if token not in {*facts.eos, facts.bos}]
    whole = [piece for piece in plain if "\N{REPLACEMENT CHARACTER}" not in piece]
    assert len(set(whole)) == len(whole) == len(plain) - 128 and all(whole)
    chat = tokenizer.chat([{"role": "user", "content": "Hello"}], generate=True)
    assert "Hello" in chat


def test_words_of_the_tokenizer_are_single_tokens(homes: Path) -> None:
    tokenizer = Tokenizer(homes / "models" / "smollm2-135m")
    assert len(tokenizer.encode(" cat dog", special=False)) == 2


def test_the_store_lists_shapes_as_models(homes: Path) -> None:
    entries = {entry.name: entry for entry in list_models(homes)}
    assert {name: entry.parameters for name, entry in entries.items()} == PARAMETERS
    assert {entry.source for entry in entries.values()} == {f"shape:{name}" for name in SHAPES}
    # Written again, a folder stays what it was.
    write_shape(entries["smollm2-135m"].path, "smollm2-135m")
    assert len(list_models(homes)) == len(SHAPES)


def test_a_shape_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(RealmError, match=r"smollm2-135m, llama-3\.2-1b") as caught:
        write_shape(tmp_path / "m", "gpt-2")
    assert caught.value.details == {"param": "shape"} and not (tmp_path / "m").exists()


def test_random_weights_fit_and_repeat(tmp_path: Path) -> None:
    make_model(tmp_path, "llama-biases")
    config = ModelConfig.load(tmp_path)
    cpu = torch.device("cpu")
    done: list[tuple[int, int]] = []

    def made(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return random_weights(config, dtype=dtype, device=cpu, seed=seed)

    weights = random_weights(config, dtype=torch.float32, device=cpu, progress=lambda *pair: done.append(pair))
    shapes = expected_shapes(config)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    assert done == [(at, len(shapes)) for at in range(1, len(shapes) + 1)]
    same, other = made(0), made(1)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    assert all(torch.equal(weights[name], same[name]) for name in shapes)
    assert not any(torch.equal(weights[name], other[name]) for name in matrices)
    for name in matrices:
        count = weights[name].numel()
        # Five standard errors of an estimated deviation, and of a mean.
        assert abs(weights[name].std().item() - 0.02) < 5 * 0.02 / math.sqrt(2 * count)
        assert abs(weights[name].mean().item()) < 5 * 0.02 / math.sqrt(count)
    assert {weight.dtype for weight in made(0, torch.bfloat16).values()} == {torch.bfloat16}
    assert LlamaModel(config, weights).dtype == torch.float32
