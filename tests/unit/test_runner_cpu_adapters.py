"""Adapters on the CPU runner: what rows with and without them compute, and where the weights are kept."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.adapters.weights import GROUP_TARGETS, GROUPS, AdapterWeights, group_widths
from realm.engine import segmented
from realm.engine.batch import LAST_DRAWN, Chunk, StepBatch, StepResult
from realm.engine.runners.cpu import CpuRunner
from realm.engine.segmented import AdapterSlots, PreparedAdapter
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights
from tests.adapter_files import block_deltas, load, random_tensors, stored_deltas, tiny_config, write_adapter
from tests.runner_steps import LANES, PAGES, Gate, chunk, step
from tests.tiny import make_model, oracle_logits

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
KINDS: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = [
    (1, ("q_proj",), ()),
    (4, ("v_proj", "down_proj"), ()),
    (16, ATTENTION, ()),
    (17, ALL, ()),
    (40, ALL, (1,)),
    (3, ("k_proj", "up_proj"), (0, 2)),
]
"""Rank, targets and layers of the adapters of slots 0 to 5."""
NONE = -1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return make_model(folder, "llama-biases")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder for each of :data:`KINDS`. Their scaling is 2."""
    folders = []
    for slot, (rank, targets, layers) in enumerate(KINDS):
        tensors = random_tensors(tiny_config(), targets, rank=rank, seed=slot, layers=layers)
        named = {"r": rank, "lora_alpha": 2 * rank, "target_modules": [*targets]}
        folders.append(write_adapter(tmp_path_factory.mktemp("adapter") / str(slot), tensors, **named))
    return folders


@pytest.fixture(scope="module")
def merged(oracle: transformers.PreTrainedModel, adapters: list[Path]) -> dict[int, transformers.PreTrainedModel]:
    """By slot transformers' model in float64 with W + scaling * B @ A in place of each W."""
    models = {NONE: copy.deepcopy(oracle).double()}
    for slot, folder in enumerate(adapters):
        models[slot] = copy.deepcopy(models[NONE])
        for module, delta in stored_deltas(folder).items():
            models[slot].get_submodule(module).weight.data += delta
    return models


def make(folder: Path, dtype: torch.dtype) -> LlamaModel:
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config, dtype=dtype, device=torch.device("cpu"), progress=None)
    with torch.inference_mode():
        return LlamaModel(config, weights)


def put(runner: CpuRunner, slot: int, folder: Path, room: int = 1 << 20) -> AdapterWeights:
    """Each slot has ``room`` bytes of its own."""
    weights = load(folder, runner.config, runner.adapters.dtype)
    assert weights.nbytes <= room
    runner.adapters.put(slot, slot * room, weights)
    return weights


@pytest.fixture
def model(folder: Path, oracle: transformers.PreTrainedModel) -> LlamaModel:
    return make(folder, torch.float32)


@pytest.fixture(params=[False, True], ids=["inline", "threaded"])
def runner(request: pytest.FixtureRequest, model: LlamaModel, adapters: list[Path]) -> Iterator[CpuRunner]:
    runner = CpuRunner(model, pages=PAGES, lanes=LANES, threaded=request.param)
    for slot, folder in enumerate(adapters):
        put(runner, slot, folder)
    yield runner
    runner.close()


def threads() -> int:
    """Of this process, libgomp's too."""
    return len(list(Path("/proc/self/task").iterdir()))


def adapted(batch: StepBatch, slots: list[int]) -> StepBatch:
    batch.adapters = np.array(slots, np.int32)
    return batch


def logits_of(result: StepResult) -> torch.Tensor:
    assert result.logits is not None
    return torch.from_numpy(np.array(result.logits))


# --- what is computed -----------------------------------------------------------------------------


def test_mixed_steps_equal_merged_weights(runner: CpuRunner, merged: dict[int, transformers.PreTrainedModel]) -> None:
    """Decoding rows, chunks of any size and rows without adapters, in any order, each lane with one of its own."""
    rng = random.Random(7)
    slots = [0, 1, 2, 3, 4, 5, NONE, 2]
    texts: list[list[int]] = [[] for _ in slots]
    seen: set[tuple[int, bool]] = set()
    for _ in range(40):
        rows: dict[int, tuple[int, int]] = {}
        chunks: list[Chunk] = []
        for lane in rng.sample(range(LANES), rng.randint(1, LANES)):
            start, count = len(texts[lane]), rng.choice([1, 1, 1, 2, 9])
            new = [rng.randrange(97) for _ in range(count)]
            texts[lane] += new
            if count == 1 and start and rng.random() < 0.6:
                rows[lane] = (new[0], start)
            else:
                chunks.append(chunk(new, start, lane))
            seen.add((slots[lane], lane in rows))
        lanes = [*rows, *(chunk.lane for chunk in chunks)]
        batch = step(rows, *chunks, logits=list(range(len(lanes))))
        result = runner.launch(adapted(batch, [slots[lane] for lane in lanes])).wait()
        want = torch.stack([oracle_logits(merged[slots[lane]], texts[lane])[-1] for lane in lanes])
        torch.testing.assert_close(logits_of(result), want, rtol=2e-4, atol=2e-4)
        assert result.tokens.tolist() == want.argmax(-1).tolist()
    assert len(seen) == 14, "not every adapter had decoding rows and chunks"


def test_each_adapter_changes_much(merged: dict[int, transformers.PreTrainedModel]) -> None:
    """Else the tests here would hold of a runner that leaves them out."""
    text = [5, 6, 7, 8]
    plain = oracle_logits(merged[NONE], text)
    for slot in range(len(KINDS)):
        assert (oracle_logits(merged[slot], text) - plain).abs().max() > 0.05


def test_lanes_go_on_with_tokens_that_their_adapters_drew(
    runner: CpuRunner, merged: dict[int, transformers.PreTrainedModel]
) -> None:
    prompts, slots = {0: [1, 2, 3], 1: [1, 2, 3], 2: [1, 2, 3]}, [3, NONE, 2]
    steps = [adapted(step({}, *(chunk(prompt, 0, lane) for lane, prompt in prompts.items())), slots)]
    steps += [adapted(step(dict.fromkeys(prompts, (LAST_DRAWN, 3 + number))), slots) for number in range(6)]
    launched = [runner.launch(batch) for batch in steps]
    drawn = np.stack([one.wait().tokens for one in launched]).T.tolist()
    for slot, tokens in zip(slots, drawn, strict=True):
        want = oracle_logits(merged[slot], [1, 2, 3, *tokens])[2:-1].argmax(-1)
        assert tokens == want.tolist()
    assert len({tuple(tokens) for tokens in drawn}) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("small", [segmented.SMALL, 0], ids=["float32 products", "packed products"])
def test_rows_without_adapters_are_bit_for_bit_those_of_a_plain_step(
    folder: Path,
    oracle: transformers.PreTrainedModel,
    adapters: list[Path],
    dtype: torch.dtype,
    small: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(segmented, "SMALL", small)
    results = []
    for slots in (None, [2, NONE, 3, NONE, 4, NONE], [NONE, NONE, NONE, NONE, NONE, NONE]):
        runner = CpuRunner(make(folder, dtype), pages=PAGES, lanes=LANES)
        for slot, adapter in enumerate(adapters):
            put(runner, slot, adapter)
        for position in range(3):
            rows = {lane: (9 + lane, position) for lane in range(3)}
            chunks = [chunk([40 + position] * count, position * count, 3 + at) for at, count in enumerate((7, 4, 1))]
            batch = step(rows, *chunks, logits=list(range(6)))
            result = runner.launch(batch if slots is None else adapted(batch, slots)).wait()
        results.append(logits_of(result))
    plain, mixed, empty = results
    assert torch.equal(plain, empty)
    assert torch.equal(plain[1::2], mixed[1::2])
    assert ((plain - mixed)[0::2].abs().amax(-1) > 0.01).all()


def test_a_plain_step_calls_the_model_as_before(runner: CpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hidden = runner._device._model.hidden

    def counted(*args: Any) -> torch.Tensor:
        calls.append(len(args))
        return hidden(*args)

    monkeypatch.setattr(runner._device._model, "hidden", counted)
    runner.launch(step({}, chunk([1, 2], 0, 0))).wait()
    runner.launch(adapted(step({}, chunk([1, 2], 0, 0)), [NONE])).wait()
    runner.launch(adapted(step({}, chunk([1, 2], 0, 0)), [1])).wait()
    assert calls == [3, 3, 4]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(GROUPS),
    st.lists(st.sampled_from([0, 1, 5, 16, 20]), min_size=3, max_size=3),
    st.integers(1, 5),
    st.sampled_from(["float32", "bfloat16", "packed"]),
    st.integers(0, 2**32 - 1),
)
def test_products_equal_the_blocks(group: str, ranks: list[int], count: int, kind: str, seed: int) -> None:
    """Any rank in each target of a group, none too, against float64."""
    model, number = tiny_config(), GROUPS.index(group)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    fan_in, outs = group_widths(model, group)
    own = ranks[: len(outs)]
    padded = -(-max(own) // 16) * 16
    if not padded:
        return
    rng = np.random.default_rng(seed)
    a, b = np.zeros((len(outs) * padded, fan_in)), np.zeros((sum(outs), padded))
    for target, (rank, out) in enumerate(zip(own, outs, strict=True)):
        begin = sum(outs[:target])
        a[target * padded : target * padded + rank] = rng.normal(size=(rank, fan_in))
        b[begin : begin + out, :rank] = rng.normal(size=(out, rank))
    shape = (model.layers, len(GROUPS))
    at = np.zeros(shape, np.int64)
    present = np.zeros(shape, np.int32)
    present[1, number] = padded
    data = torch.from_numpy(np.concatenate((a.ravel(), b.ravel()))).to(dtype)
    widths = tuple((group_widths(model, g)[0], sum(group_widths(model, g)[1]), len(GROUP_TARGETS[g])) for g in GROUPS)
    weights = AdapterWeights(data, present, at, at + a.size, max(own), widths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmented, "SMALL", 0 if kind == "packed" else segmented.SMALL)
        adapter = PreparedAdapter(weights, model)
    assert np.flatnonzero(adapter.adapted).tolist() == [len(GROUPS) + number]
    products = adapter.products[len(GROUPS) + number]
    assert isinstance(products, segmented._Packed if kind == "packed" else segmented._Small)
    x = torch.from_numpy(rng.normal(size=(count, fan_in))).to(dtype)
    out = torch.full((count, sum(outs)), float("nan"))
    products(x.float(), out)
    deltas = block_deltas(weights, model)
    want = torch.cat([x.double() @ delta.T for delta in deltas.values()], dim=1)
    # Packed, what is between the two products is rounded to bf16, and what comes out.
    tolerance = 2e-2 if kind == "packed" else 1e-5
    assert (out.double() - want).abs().max() <= tolerance * want.abs().max()


# --- where the weights are ------------------------------------------------------------------------


def test_a_launched_step_keeps_its_weights(
    model: LlamaModel,
    adapters: list[Path],
    merged: dict[int, transformers.PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slot gets other weights while three steps are on their way: each has what was there at its launch."""
    gate = Gate(model)
    monkeypatch.setattr(model, "hidden", gate)
    runner = CpuRunner(model, pages=PAGES, lanes=LANES, threaded=True)
    try:
        launched = []
        for slot in (2, 3, 1):
            loading = threading.Thread(target=put, args=(runner, 0, adapters[slot]))
            loading.start()
            loading.join(60)
            launched.append(runner.launch(adapted(step({}, chunk([4, 5, 6], 0, slot), logits=[0]), [0])))
        gate.open(3)
        for slot, one in zip((2, 3, 1), launched, strict=True):
            want = oracle_logits(merged[slot], [4, 5, 6])[-1:]
            torch.testing.assert_close(logits_of(one.wait()), want, rtol=2e-4, atol=2e-4)
    finally:
        gate.open(100)
        runner.close()


def test_swapping_beside_running_steps_disturbs_nobody(
    runner: CpuRunner, adapters: list[Path], merged: dict[int, transformers.PreTrainedModel]
) -> None:
    """One thread puts adapters in slots 6 and up, without pause, while steps use slots 1 and 2."""
    stop, puts = threading.Event(), 0

    def load_all() -> None:
        nonlocal puts
        while not stop.is_set():
            put(runner, 6 + puts % 20, adapters[puts % len(adapters)])
            puts += 1

    loading = threading.Thread(target=load_all)
    loading.start()
    try:
        want = [oracle_logits(merged[slot], [4, 5, 6])[-1] for slot in (1, 2, NONE)]
        for _ in range(15):
            chunks = [chunk([4, 5, 6], 0, lane) for lane in range(3)]
            result = runner.launch(adapted(step({}, *chunks, logits=[0, 1, 2]), [1, 2, NONE])).wait()
            torch.testing.assert_close(logits_of(result), torch.stack(want), rtol=2e-4, atol=2e-4)
    finally:
        stop.set()
        loading.join(60)
    assert puts


def test_what_is_replaced_is_given_back(runner: CpuRunner, adapters: list[Path]) -> None:
    kept = {slot: weakref.ref(held[2]) for slot, held in runner.adapters._kept.items()}
    before = runner.adapters.nbytes
    size = kept[2]().nbytes  # type: ignore[union-attr]
    runner.launch(adapted(step({}, chunk([4, 5], 0, 0)), [2])).wait()
    put(runner, 2, adapters[0])
    gc.collect()
    assert kept[2]() is None and kept[0]() is not None
    assert runner.adapters.nbytes == before - size + kept[0]().nbytes  # type: ignore[union-attr]


def test_a_slot_that_holds_nothing_is_refused(runner: CpuRunner) -> None:
    with pytest.raises(ValueError, match="slot 9, which holds none"):
        runner.launch(adapted(step({}, chunk([4, 5], 0, 0)), [9]))
    assert len(runner.launch(step({}, chunk([4, 5], 0, 0))).wait().tokens) == 1


def test_what_does_not_fit_is_refused(adapters: list[Path]) -> None:
    model = tiny_config()
    weights = load(adapters[3], model)
    size = weights.nbytes
    slots = AdapterSlots(model, torch.float32, 4 * size)
    for slot, at in ((-1, 0), (slots.slots, 0), (0, -256), (0, 3 * size + 1)):
        with pytest.raises(ValueError, match="there are"):
            slots.put(slot, at, weights)
    with pytest.raises(ValueError, match="bfloat16 for a model in"):
        slots.put(0, 0, load(adapters[3], model, torch.bfloat16))
    other = AdapterSlots(tiny_config(num_hidden_layers=2), torch.float32, 4 * size)
    with pytest.raises(ValueError, match="3 layers for a model of 2"):
        other.put(0, 0, weights)
    assert slots.nbytes == other.nbytes == 0
    slots.put(0, 3 * size, weights)
    assert 0 < slots.nbytes <= size


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.integers(1, 4)), max_size=25))
def test_slots_whose_bytes_are_taken_hold_nothing(puts: list[tuple[int, int, int]]) -> None:
    """Against a list of who wrote each place of four bytes last."""
    model = tiny_config(num_hidden_layers=1)
    slots = AdapterSlots(model, torch.float32, 64)
    owners: list[int | None] = [None] * 16
    sizes: dict[int, int] = {}
    for slot, at, size in puts:
        nothing = np.zeros((1, len(GROUPS)), np.int64)
        weights = AdapterWeights(torch.zeros(size), nothing.astype(np.int32), nothing, nothing, 1, ())
        slots.put(slot, 4 * at, weights)
        owners = [None if owner == slot else owner for owner in owners]
        owners[at : at + size] = [slot] * size
        sizes[slot] = size
        whole = {slot for slot, size in sizes.items() if owners.count(slot) == size}
        # A slot that lost bytes stays lost, even where the bytes become free again.
        sizes = {slot: size for slot, size in sizes.items() if slot in whole}
        owners = [owner if owner in whole else None for owner in owners]
        assert slots._kept.keys() == whole


@pytest.mark.parametrize("rank", [1, 16, 64, 256])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ATTENTION, ALL], ids=len)
def test_an_adapter_takes_what_capacity_allows_for(tmp_path: Path, rank: int, targets: tuple[str, ...]) -> None:
    """A real model's shape in bf16, where small factors are kept in float32 and B of large ones with zeros."""
    model = tiny_config(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2
    )
    tensors = random_tensors(model, targets, rank=rank)
    folder = write_adapter(tmp_path / "a", tensors, r=rank, target_modules=[*targets])
    weights = load(folder, model, torch.bfloat16)
    slots = AdapterSlots(model, torch.bfloat16, 1 << 30)
    assert slots.capacity == 1 << 29
    slots.put(0, 0, weights)
    assert 0 < slots.nbytes <= 2 * weights.nbytes


def test_putting_starts_no_threads_and_leaves_others_theirs(runner: CpuRunner, adapters: list[Path]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        counts: list[int] = []

        def load_one() -> None:
            counts.append(threads())
            slots = AdapterSlots(tiny_config(), torch.bfloat16, 1 << 24)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(segmented, "SMALL", 0)
                slots.put(0, 0, load(adapters[3], tiny_config(), torch.bfloat16))
            assert any(isinstance(products, segmented._Packed) for products in slots._kept[0][2].products)
            counts.extend((threads(), torch.get_num_threads()))

        loading = threading.Thread(target=load_one)
        loading.start()
        loading.join(60)
        assert counts[0] == counts[1] and counts[2] == torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
