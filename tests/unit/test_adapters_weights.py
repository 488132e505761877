"""An adapter's weights as runners get them: where everything lies, rounded once, and what loading takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE, write_random_adapter
from realm.adapters.peft import PeftConfig, check_adapter, parse_config
from realm.adapters.tensors import TARGETS, module_name
from realm.adapters.weights import GROUP_TARGETS, GROUPS, RANK_UNIT, AdapterWeights, group_widths, load_adapter
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import expected_shapes, random_weights
from realm.models.shapes import SHAPES
from tests.adapter_files import (
    block_deltas,
    described,
    load,
    random_tensors,
    safetensors_bytes,
    stored_deltas,
    tensor_name,
    tiny_config,
    write_adapter,
)

MODEL = tiny_config()
HEADS = tiny_config(head_dim=16)
"""Queries are wider than the hidden state."""


def blocks(weights: AdapterWeights, model: ModelConfig) -> int:
    """Check what holds of any weights; returns how many blocks there are."""
    data = weights.data
    assert data.is_contiguous() and data.dim() == 1 and data.device.type == "cpu"
    assert weights.nbytes == data.numel() * data.element_size()
    assert weights.ranks.shape == weights.a_at.shape == weights.b_at.shape == (model.layers, len(GROUPS))
    assert (weights.ranks.dtype, weights.a_at.dtype, weights.b_at.dtype) == (np.int32, np.int64, np.int64)
    assert (weights.ranks % RANK_UNIT == 0).all()
    used = torch.zeros(data.numel(), dtype=torch.int32)
    count = 0
    for layer in range(model.layers):
        for number, group in enumerate(GROUPS):
            block = weights.block(layer, number)
            if not weights.ranks[layer, number]:
                assert block is None
                continue
            assert block is not None
            count += 1
            fan_in, outs = group_widths(model, group)
            assert block.rank == weights.ranks[layer, number]
            assert block.a.shape == (len(outs) * block.rank, fan_in)
            assert block.b.shape == (sum(outs), block.rank)
            for part, at in ((block.a, weights.a_at), (block.b, weights.b_at)):
                begin = int(at[layer, number])
                assert begin % 128 == 0
                assert part.is_contiguous() and part.dtype == data.dtype
                assert part.data_ptr() == data.data_ptr() + begin * data.element_size()
                used[begin : begin + part.numel()] += 1
    # Blocks do not overlap, and between them are zeros.
    assert int(used.max()) == 1
    assert not data[used == 0].any()
    return count


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float) -> None:
    """Each of ``wanted`` within ``relative`` of its largest element; all others zero."""
    assert wanted.keys() <= found.keys()
    for name, delta in found.items():
        if name in wanted:
            assert (delta - wanted[name]).abs().max() <= relative * wanted[name].abs().max()
        else:
            assert not delta.any()


def test_groups_are_the_models_linear_fields() -> None:
    """What a block is added to: the stacked matrices of ``Layer``, in their order."""
    weights = random_weights(HEADS, dtype=torch.float32, device=torch.device("cpu"))
    named = {name: weight.clone() for name, weight in weights.items()}
    layer = LlamaModel(HEADS, weights).layers[1]
    for group in GROUPS:
        fan_in, outs = group_widths(HEADS, group)
        stacked = getattr(layer, group).weight
        parts = [named[f"{module_name(1, target)}.weight"] for target in GROUP_TARGETS[group]]
        assert [part.shape[0] for part in parts] == outs
        assert stacked.shape == (sum(outs), fan_in)
        assert torch.equal(stacked, torch.cat(parts))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_widths_are_the_models(name: str) -> None:
    shapes = expected_shapes(SHAPES[name])
    for group in GROUPS:
        fan_in, outs = group_widths(SHAPES[name], group)
        for target, out in zip(GROUP_TARGETS[group], outs, strict=True):
            assert shapes[f"{module_name(0, target)}.weight"] == (out, fan_in)


def test_a_block_by_hand(tmp_path: Path) -> None:
    """k and v of one layer, ranks 3 and 17: padded to 32, q's lines zero."""
    tensors = random_tensors(MODEL, ["k_proj"], rank=3, layers=[1]) | random_tensors(
        MODEL, ["v_proj"], rank=17, layers=[1]
    )
    folder = write_adapter(tmp_path, tensors, r=3, lora_alpha=6, rank_pattern={"v_proj": 17})
    weights = load(folder, MODEL)
    assert blocks(weights, MODEL) == 1
    assert weights.rank == 17
    assert weights.ranks.tolist() == [[0, 0, 0, 0], [32, 0, 0, 0], [0, 0, 0, 0]]
    block = weights.block(1, 0)
    assert block is not None
    q, k = 48, 16
    a = torch.zeros(3 * 32, 48)
    a[32:35] = torch.from_numpy(tensors[tensor_name(1, "k_proj", "A")])
    a[64:81] = torch.from_numpy(tensors[tensor_name(1, "v_proj", "A")])
    b = torch.zeros(q + 2 * k, 32)
    b[q : q + k, :3] = torch.from_numpy(tensors[tensor_name(1, "k_proj", "B")]) * 2
    b[q + k :, :17] = torch.from_numpy(tensors[tensor_name(1, "v_proj", "B")]) * torch.tensor(6 / 17)
    assert torch.equal(block.a, a)
    assert torch.equal(block.b, b)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_adapter(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any targets and layers, every module with a rank of its own."""
    folder = tmp_path_factory.getbasetemp() / "any"
    model = data.draw(st.sampled_from([MODEL, HEADS]))
    targets = data.draw(st.lists(st.sampled_from(TARGETS), min_size=1, unique=True))
    layers = data.draw(st.lists(st.integers(0, model.layers - 1), min_size=1, unique=True))
    ranks = {module_name(layer, target): data.draw(st.integers(1, 70)) for layer in layers for target in targets}
    alphas = data.draw(
        st.dictionaries(st.sampled_from(list(ranks)), st.sampled_from([-64.0, 0.0, 0.01, 0.3, 7.0, 64.0]), max_size=3)
    )
    write_random_adapter(
        folder,
        model,
        rank=8,
        targets=targets,
        seed=data.draw(st.integers(0, 99)),
        alpha=data.draw(st.sampled_from([None, 1, 3.5, 16])),
        dtype=data.draw(st.sampled_from(["F32", "F16", "BF16"])),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rslora=data.draw(st.booleans()),
        layers=layers,
    )
    weights = load(folder, model)
    padded = np.zeros_like(weights.ranks)
    for layer in layers:
        for number, group in enumerate(GROUPS):
            own = [ranks[module_name(layer, target)] for target in GROUP_TARGETS[group] if target in targets]
            padded[layer, number] = -(-max(own, default=0) // 16) * 16
    assert weights.ranks.tolist() == padded.tolist()
    assert weights.rank == max(ranks.values())
    assert blocks(weights, model) == np.count_nonzero(padded)
    close(block_deltas(weights, model), stored_deltas(folder), 1e-6)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [16, 5])
@pytest.mark.parametrize("rank", [16, 10])
def test_every_element_is_scaled_in_float32_and_rounded_once(
    tmp_path: Path, kind: str, dtype: torch.dtype, alpha: int, rank: int
) -> None:
    write_random_adapter(tmp_path, MODEL, rank=rank, seed=3, alpha=alpha, dtype=kind)
    weights = load(tmp_path, MODEL, dtype)
    assert weights.data.dtype == dtype
    stored = load_file(tmp_path / TENSORS_FILE)
    scaling = torch.tensor(alpha / rank, dtype=torch.float32)
    for layer in range(MODEL.layers):
        block = weights.block(layer, GROUPS.index("down"))
        assert block is not None
        a = stored[tensor_name(layer, "down_proj", "A")].float()
        b = stored[tensor_name(layer, "down_proj", "B")].float() * scaling
        assert torch.equal(block.a[:rank], a.to(dtype))
        assert torch.equal(block.b[:, :rank], b.to(dtype))


@pytest.mark.parametrize("rank", [256, 200, 1])
def test_tensors_of_many_pieces(tmp_path: Path, rank: int) -> None:
    """Larger than what is converted at a time, with and without padding."""
    model = SHAPES["llama-3.2-1b"]
    write_random_adapter(tmp_path, model, rank=rank, targets=["up_proj", "k_proj"], seed=1, alpha=2, layers=[0, 15])
    weights = load(tmp_path, model, torch.bfloat16)
    stored = load_file(tmp_path / TENSORS_FILE)
    for layer in (0, 15):
        block = weights.block(layer, GROUPS.index("gate_up"))
        assert block is not None
        inner = model.intermediate_size
        assert torch.equal(block.a[block.rank : block.rank + rank], stored[tensor_name(layer, "up_proj", "A")])
        b = (stored[tensor_name(layer, "up_proj", "B")].float() * (2 / rank)).bfloat16()
        assert torch.equal(block.b[inner:, :rank], b)
        assert not block.b[:inner].any() and not block.b[:, rank:].any() and not block.a[: block.rank].any()


def test_tensors_in_any_order_and_place(tmp_path: Path) -> None:
    """The file's order is not the model's, and tensors of two types begin at odd places."""
    tensors = random_tensors(MODEL, rank=3)
    order = np.random.default_rng(1).permutation(len(tensors))
    names = [list(tensors)[number] for number in order]
    mixed = {name: tensors[name].astype(np.float16) if n % 2 else tensors[name] for n, name in enumerate(names)}
    header, data = described(mixed)
    text = str(header).replace("'", '"').encode()
    (tmp_path / "f").write_bytes(safetensors_bytes(text + b" " * (1 - len(text) % 2), data))
    config = PeftConfig(3, 3.0)
    weights = load_adapter(tmp_path / "f", config, MODEL, torch.float32)
    assert blocks(weights, MODEL) == MODEL.layers * len(GROUPS)
    for name, tensor in mixed.items():
        if ".lora_A." in name and "down_proj" in name:
            block = weights.block(int(name.split(".")[4]), 3)
            assert block is not None
            assert torch.equal(block.a[:3], torch.from_numpy(tensor).float())


def test_weights_are_owned(tmp_path: Path) -> None:
    """Nothing of the file is needed any more, and nothing is shared between two that were loaded."""
    write_random_adapter(tmp_path, MODEL, rank=4, seed=1, dtype="F32")
    first, second = load(tmp_path, MODEL), load(tmp_path, MODEL)
    (tmp_path / TENSORS_FILE).write_bytes(b"")
    first.data.zero_()
    assert second.data.any()


_ALONE = """
import os, sys
from pathlib import Path
import torch
from realm.adapters.peft import parse_config
from realm.adapters.weights import load_adapter
from realm.models.shapes import SHAPES

torch.set_num_threads(4)
folder, model = Path(sys.argv[1]), SHAPES["llama-3.2-1b"]
config = parse_config((folder / "adapter_config.json").read_bytes())
small = load_adapter(folder / "small" / "adapter_model.safetensors", config, model, torch.bfloat16)

def memory(field):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10

before, threads = memory("VmRSS"), len(os.listdir("/proc/self/task"))
loaded = load_adapter(folder / "adapter_model.safetensors", config, model, torch.bfloat16)
print(memory("VmHWM") - before, loaded.nbytes, len(os.listdir("/proc/self/task")) - threads)
torch.ones(1 << 20) + 1
print(len(os.listdir("/proc/self/task")) - threads)
"""


def test_loading_rests_after_each_tensor(tmp_path: Path) -> None:
    """Whoever loads beside running steps lets them go first."""
    model = SHAPES["smollm2-135m"]
    write_random_adapter(tmp_path, model, rank=4, targets=("q_proj", "down_proj"), seed=1)
    rests = 0

    def rest() -> None:
        nonlocal rests
        rests += 1

    config = parse_config((tmp_path / CONFIG_FILE).read_bytes())
    rested = load_adapter(tmp_path / TENSORS_FILE, config, model, torch.bfloat16, rest)
    assert rests == 2 * 2 * model.layers
    assert torch.equal(rested.data, load_adapter(tmp_path / TENSORS_FILE, config, model, torch.bfloat16).data)


def test_loading_holds_little_more_than_the_result_and_starts_no_threads(tmp_path: Path) -> None:
    model = SHAPES["llama-3.2-1b"]
    write_random_adapter(tmp_path, model, rank=64, seed=1, alpha=16, dtype="F32")
    write_random_adapter(tmp_path / "small", model, rank=64, seed=1, dtype="F32", layers=[0])
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=100
    )
    more, nbytes, threads, after_torch = map(int, done.stdout.split())
    assert nbytes * 2 <= (tmp_path / TENSORS_FILE).stat().st_size
    assert nbytes - (8 << 20) <= more <= nbytes + (16 << 20)
    assert threads == 0
    # The count sees torch's threads where there are any.
    assert after_torch > 0


def test_the_gateway_needs_no_torch() -> None:
    text = (
        "import sys, realm.adapters.peft, realm.adapters.made_up; assert 'torch' not in sys.modules, 'torch';"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", text], check=True, timeout=60)


def test_random_adapters_are_what_was_asked_for(tmp_path: Path) -> None:
    model = SHAPES["smollm2-135m"]
    for dtype, size in (("F32", 4), ("F16", 2), ("BF16", 2)):
        write_random_adapter(tmp_path, model, rank=8, targets=["q_proj", "up_proj"], seed=5, alpha=4, dtype=dtype)
        config = parse_config((tmp_path / CONFIG_FILE).read_bytes())
        info = check_adapter(tmp_path / TENSORS_FILE, config, model)
        assert (info.rank, info.alpha, info.targets, info.layers) == (8, 4.0, ["q_proj", "up_proj"], 30)
        assert info.parameters * size < (tmp_path / TENSORS_FILE).stat().st_size < info.parameters * size + 40_000
        values = torch.cat([tensor.float().reshape(-1) for tensor in load_file(tmp_path / TENSORS_FILE).values()])
        assert 0.049 < float(values.std()) < 0.051
        assert abs(float(values.mean())) < 0.001


def test_random_adapters_are_the_same_for_the_same_seed_only(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_adapter(tmp_path / folder, MODEL, rank=4, seed=seed)
    raw = [(tmp_path / folder / TENSORS_FILE).read_bytes() for folder in "abc"]
    assert raw[0] == raw[1]
    assert raw[0] != raw[2]
    a = load_file(tmp_path / "a" / TENSORS_FILE)
    assert not torch.equal(a[tensor_name(0, "q_proj", "A")], a[tensor_name(1, "q_proj", "A")])
