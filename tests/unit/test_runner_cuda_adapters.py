"""Adapters in the CUDA runner, on the CPU through Triton's interpreter: each row computes as with merged weights."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.interpreter  # noqa: F401
from realm.adapters.weights import GROUP_TARGETS, GROUPS, RANK_UNIT, AdapterWeights, group_widths
from realm.engine.batch import LAST_DRAWN, StepBatch
from realm.engine.kernels import lora, lora_plan
from realm.engine.runners import cuda_adapters, cuda_decode, cuda_lora, cuda_pass
from realm.engine.runners.cuda import CudaRunner
from realm.engine.runners.cuda_adapters import DeviceAdapters, model_groups
from realm.engine.runners.cuda_memory import activation_bytes, adapter_bytes, block_bytes, plan_words
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights
from realm.models.shapes import SHAPES
from tests.lora_cases import fill, merge, random_adapter
from tests.runner_book import Book
from tests.tiny import make_model
from tests.unit.test_runner_cuda import SAMPLINGS, make_runner, prompt
from tests.unit.test_runner_cuda_start import Recorder, replaying

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = 1 << 20
RANKS = ([16, 16, 0, 0], [0, 32, 16, 16], [48, 0, 16, 0])
"""Of the slots 0, 1 and 2: of each group of products."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, num_hidden_layers=2)
    return folder


@pytest.fixture(autouse=True)
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """All passes with torch's matrix products: to interpret those of few rows takes a second a step."""
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", 0)


@pytest.fixture(scope="module")
def adapters(folder: Path) -> list[AdapterWeights]:
    config = ModelConfig.load(folder)
    return [random_adapter(config, ranks, seed=seed) for seed, ranks in enumerate(RANKS)]


@pytest.fixture
def runner(folder: Path, adapters: list[AdapterWeights]) -> CudaRunner:
    runner = make_runner(folder, adapter_memory=MEMORY)
    fill(runner, adapters)
    return runner


def logits_of(folder: Path, adapter: AdapterWeights | None, tokens: list[int]) -> np.ndarray:
    """Of the last token, by a runner without adapters, whose weights have this one in them."""
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        model = LlamaModel(config, weights)
        if adapter is not None:
            merge(model, adapter)
        runner = CudaRunner(model, pages=20, lanes=4, token_budget=64)
    book = Book(runner)
    result = runner.launch(book.step({}, [book.chunk(0, tokens)], logits=[0])).wait()
    assert result.logits is not None
    return result.logits[0]


def with_adapters(step: StepBatch, slots: Sequence[int]) -> StepBatch:
    step.adapters = np.array(slots, np.int32)
    return step


def test_a_mixed_batch_computes_as_with_merged_weights(
    folder: Path, runner: CudaRunner, adapters: list[AdapterWeights]
) -> None:
    """Prompts alone, beside decoding rows, and rows that all decode; the base model's among them."""
    book = Book(runner)
    slot_of = {0: 1, 1: -1, 2: 0, 3: 2, 4: 0, 5: -1}
    texts = {lane: prompt(lane, 2 + 5 * lane) for lane in slot_of}

    def check(lanes: Sequence[int], logits: np.ndarray | None) -> None:
        assert logits is not None
        for lane, row in zip(lanes, logits, strict=True):
            adapter = None if slot_of[lane] < 0 else adapters[slot_of[lane]]
            np.testing.assert_allclose(row, logits_of(folder, adapter, texts[lane]), rtol=3e-4, atol=3e-4)

    first, second = [0, 1, 2], [3, 4, 5]
    chunks = [book.chunk(lane, texts[lane]) for lane in first]
    step = with_adapters(book.step({}, chunks, logits=range(3)), [slot_of[lane] for lane in first])
    check(first, runner.launch(step).wait().logits)
    for lane in first:
        texts[lane].append(lane)
    chunks = [book.chunk(lane, texts[lane]) for lane in second]
    step = book.step({lane: lane for lane in first}, chunks, logits=range(6))
    check([*first, *second], runner.launch(with_adapters(step, [slot_of[lane] for lane in slot_of])).wait().logits)
    order = [4, 1, 0, 3, 5, 2]
    for lane in order:
        texts[lane].append(7)
    step = book.step(dict.fromkeys(order, 7), logits=range(6))
    check(order, runner.launch(with_adapters(step, [slot_of[lane] for lane in order])).wait().logits)
    texts[3].append(9)
    step = book.step({3: 9}, logits=[0])
    check([3], runner.launch(with_adapters(step, [2])).wait().logits)


def test_ranks_may_differ_by_layer(folder: Path, runner: CudaRunner) -> None:
    ranks = np.array([[0, 16, 0, 0], [48, 0, 32, 16]])
    adapter = random_adapter(runner.config, ranks, seed=9)
    runner.adapters.put(7, 512 << 10, adapter)
    book = Book(runner)
    step = with_adapters(book.step({}, [book.chunk(0, prompt(1, 20))], logits=[0]), [7])
    result = runner.launch(step).wait()
    assert result.logits is not None
    np.testing.assert_allclose(result.logits[0], logits_of(folder, adapter, prompt(1, 20)), rtol=3e-4, atol=3e-4)


def test_one_row_with_an_adapter(
    folder: Path, runner: CudaRunner, adapters: list[AdapterWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of one row that are our own know no adapters."""
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", 1)
    book = Book(runner)
    text = prompt(4, 6)
    runner.launch(with_adapters(book.step({}, [book.chunk(0, text)]), [0])).wait()
    result = runner.launch(with_adapters(book.step({0: 5}, logits=[0]), [0])).wait()
    assert result.logits is not None
    np.testing.assert_allclose(result.logits[0], logits_of(folder, adapters[0], [*text, 5]), rtol=3e-4, atol=3e-4)


def test_a_step_without_adapters_is_the_same_to_the_bit(folder: Path, runner: CudaRunner) -> None:
    """With memory for adapters and without; and whether or not the batch says that nobody has one."""
    results = []
    for made, slots in ((make_runner(folder), None), (runner, None), (runner, -1)):
        book = Book(made)
        texts = {lane: prompt(lane, 3 + lane) for lane in range(3)}
        found = []
        for step in (
            book.step({}, [book.chunk(lane, text) for lane, text in texts.items()], logits=range(3)),
            book.step(dict.fromkeys(texts, LAST_DRAWN), logits=range(3)),
        ):
            if slots is not None:
                with_adapters(step, [slots] * 3)
            found.append(made.launch(step).wait().logits)
        results.append(np.stack([logits for logits in found if logits is not None]))
    assert results[0].shape == (2, 3, 97)
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_rows_without_adapter_are_the_same_beside_others(runner: CudaRunner) -> None:
    def play(slots: Sequence[int] | None) -> np.ndarray:
        book = Book(runner)
        chunks = [book.chunk(lane, prompt(lane, 4 + lane)) for lane in range(4)]
        steps = [book.step({}, chunks, logits=range(4)), book.step(dict.fromkeys(range(4), 5), logits=range(4))]
        found = []
        for step in steps:
            result = runner.launch(step if slots is None else with_adapters(step, slots)).wait()
            found.append(result.logits)
        return np.stack([logits for logits in found if logits is not None])

    plain, mixed, other = play(None), play([-1, 1, -1, 0]), play([-1, 2, -1, 0])
    np.testing.assert_allclose(mixed[:, [0, 2]], plain[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert not np.allclose(mixed[:, [1, 3]], plain[:, [1, 3]], atol=1e-2)
    # Of the others' adapters nothing is seen.
    assert np.array_equal(mixed[:, [0, 2, 3]], other[:, [0, 2, 3]]) and not np.array_equal(mixed[:, 1], other[:, 1])


def test_a_slot_that_changes_hands(folder: Path, runner: CudaRunner, adapters: list[AdapterWeights]) -> None:
    """The next step is of the same rows and slots, so only the memory can tell that the plan is another one."""
    text = prompt(2, 9)
    results = []
    for adapter in (None, adapters[1], random_adapter(runner.config, [16, 0, 64, 0], seed=5)):
        if adapter is not None:
            runner.adapters.put(0, 256 << 10, adapter)
        book = Book(runner)
        runner.launch(with_adapters(book.step({}, [book.chunk(0, text), book.chunk(1, text)]), [0, 2])).wait()
        result = runner.launch(with_adapters(book.step({0: 5, 1: 5}, logits=[0, 1]), [0, 2])).wait()
        assert result.logits is not None
        expected = logits_of(folder, adapter or adapters[0], [*text, 5])
        np.testing.assert_allclose(result.logits[0], expected, rtol=3e-4, atol=3e-4)
        results.append(result.logits[1])
    assert all(np.array_equal(results[0], row) for row in results), "the neighbour's is the same all along"


def test_adapters_come_from_another_thread_while_steps_run(runner: CudaRunner, adapters: list[AdapterWeights]) -> None:
    """A thread knows nothing of its creator's inference mode and current stream."""
    failures: list[Exception] = []
    ready, stop = threading.Event(), threading.Event()

    def load() -> None:
        try:
            for turn in range(200):
                runner.adapters.put(5, 300 << 10, adapters[turn % 3])
                ready.set()
                if stop.is_set():
                    return
        except Exception as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=load)
    book = Book(runner)
    runner.launch(with_adapters(book.step({}, [book.chunk(0, prompt(0, 5))]), [0])).wait()
    expected = runner.launch(with_adapters(book.step({0: 3}, logits=[0]), [0])).wait().logits
    thread.start()
    try:
        assert ready.wait(30)
        for _ in range(3):
            book.lengths[0] -= 1  # once more, in its place
            found = runner.launch(with_adapters(book.step({0: 3}, logits=[0]), [0])).wait().logits
            assert expected is not None and found is not None and np.array_equal(found, expected)
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert runner.adapters.version >= 4


def test_an_adapter_is_copied_in_pieces(
    folder: Path, adapters: list[AdapterWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_adapters, "PIECE", 1000)
    config = ModelConfig.load(folder)
    memory = DeviceAdapters(config, torch.float32, torch.device("cpu"), MEMORY)
    assert memory.device is not None
    with torch.inference_mode():
        memory.device.weights.fill_(float("nan"))
    memory.put(3, 4096, adapters[0])
    data = memory.device.weights[1024:][: adapters[0].data.numel()]
    assert torch.equal(data, adapters[0].data)
    assert memory.device.weights[:1024].isnan().all() and memory.device.weights[1024 + len(data) :].isnan().all()
    assert torch.equal(memory.device.ranks[3], torch.from_numpy(adapters[0].ranks))
    there = adapters[0].ranks > 0
    places = memory.device.places[3].numpy()
    assert (places[there][:, 0] == adapters[0].a_at[there] + 1024).all()
    assert (places[there][:, 1] == adapters[0].b_at[there] + 1024).all() and not places[~there].any()


# --- graphs and plans ----------------------------------------------------------------------------


def test_decoding_with_adapters_replays_a_graph_of_its_own(
    folder: Path, runner: CudaRunner, adapters: list[AdapterWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_decode, "captured", replaying)
    runner._decodes._pool = object()
    sampling = SamplingParams(temperature=1e-8, top_p=0.9, logprob=True, mask=b"\xff" * 13)
    book = Book(runner)
    text = prompt(6, 8)
    runner.launch(with_adapters(book.step({}, [book.chunk(0, text), book.chunk(1, text)]), [0, 1])).wait()
    for how, slots in ((SamplingParams(), [0, 1]), (sampling, [0, 1]), (SamplingParams(), [0, -1])):
        launched = runner.launch(with_adapters(book.step({0: 5, 1: 6}, (), [how] * 2, [0]), slots))
        text.append(5)
        result = launched.wait()
        assert result.logits is not None and result.tokens[0] == result.logits[0].argmax()
        np.testing.assert_allclose(result.logits[0], logits_of(folder, adapters[0], text), rtol=3e-4, atol=3e-4)
    # One for both groups of products, whichever way they draw, and one for attention alone.
    assert {groups for _, groups, _ in runner._decodes._adapted} == {(0, 1), (0, 1, 2, 3)}
    assert len(runner._decodes._adapted) == 2 and not runner._decodes._graphs


def test_a_plan_is_sent_once(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[np.ndarray] = []

    def counted(*arguments: Any, **options: Any) -> np.ndarray:
        made.append(plan(*arguments, **options))
        return made[-1]

    plan: Callable[..., np.ndarray] = lora_plan.lora_plan
    monkeypatch.setattr(cuda_lora, "lora_plan", counted)
    book = Book(runner)
    for turn, slots in enumerate(([0, 2], [0, 2], [0, 2], [2, 0], [2, 0], [-1, 0])):
        runner.launch(with_adapters(book.step({0: 5, 1: turn}), slots)).wait()
    assert len(made) == 3


def test_every_graph_of_the_start(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for both families of all sizes and rooms; what is launched in them was launched before."""
    monkeypatch.setattr(cuda_decode, "captured", replaying)
    monkeypatch.setattr(cuda_lora, "lora_shrink", lambda *arguments, **options: None)
    monkeypatch.setattr(cuda_lora, "lora_expand", lambda *arguments, **options: None)
    pool = object()
    runner._decodes._pool = runner._chunks._pool = pool
    monkeypatch.setattr(type(runner._pass), "hidden", lambda *arguments, **options: None)
    monkeypatch.setattr(type(runner._outputs), "compute", lambda *arguments: None)
    with torch.inference_mode():
        for size in runner._decodes._sizes:
            runner._decodes._capture_adapted(size)
        for room in runner._chunks._adapted_rooms:
            runner._chunks._capture_adapted(runner._slots[0].block, runner._chunks._filled(room, 1))
    assert len(runner._decodes._adapted) == 2 * len(runner._decodes._sizes)
    assert len(runner._chunks._adapted) == 2 * len(runner._chunks._adapted_rooms)
    assert len(runner._chunks._adapted_rooms) <= len(runner._chunks._rooms)


@pytest.mark.parametrize("few", [0, 1])
def test_no_step_with_adapters_has_to_compile(
    runner: CudaRunner, adapters: list[AdapterWeights], monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """After the start, as without them: to compile takes seconds, for which all tenants would wait."""
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", few)
    recorder = Recorder(monkeypatch)
    runner._chunks._attention._multiprocessors = 8
    with torch.inference_mode():
        runner._start(256, lambda done, total: None)
    known = set(recorder.kinds)
    rng = random.Random(4)
    for _ in range(150):
        book = Book(runner)
        book.free = [0] * 1000
        lanes = rng.sample(range(16), rng.randint(1, 8))
        decodes = rng.randint(0, len(lanes))
        chunks = [book.chunk(lane, [1] * rng.choice([1, 2, 3, 6, 17, 60])) for lane in lanes[decodes:]]
        step = book.step(dict.fromkeys(lanes[:decodes], 1), chunks, rng.choices(SAMPLINGS, k=len(lanes)))
        step.decodes.longest = max(step.decodes.longest, rng.choice([0, 5000, 130_000]))
        runner.launch(with_adapters(step, rng.choices([-1, 0, 1, 2], k=len(lanes)))).wait()
    assert recorder.kinds <= known, recorder.kinds - known
    # And they were all with adapters, of both tiles.
    assert any(id(lora.LORA_SHRINK) == kind[0] for kind in known)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot", "at", "what"),
    [
        (-1, 0, "slot -1"),
        (cuda_adapters.SLOTS, 0, "there are"),
        (0, -256, "bytes at"),
        (0, 100, "bytes at"),
        (0, MEMORY, "bytes at"),
        (0, MEMORY - 256, "bytes at"),
    ],
)
def test_an_adapter_beyond_the_memory_is_refused(
    runner: CudaRunner, adapters: list[AdapterWeights], slot: int, at: int, what: str
) -> None:
    version = runner.adapters.version
    with pytest.raises(ValueError, match=what):
        runner.adapters.put(slot, at, adapters[0])
    assert runner.adapters.version == version


@pytest.mark.parametrize(
    "change",
    [
        {"a_at": 1 << 40},
        {"a_at": -128},
        {"b_at": 8},
        {"ranks": 17},
        {"ranks": 272},
        {"ranks": -16},
        {"ranks": 256},
    ],
    ids=str,
)
def test_tables_that_lead_out_of_the_adapter_are_refused(
    runner: CudaRunner, adapters: list[AdapterWeights], change: dict[str, int]
) -> None:
    (name, value) = next(iter(change.items()))
    table = getattr(adapters[0], name).copy()
    table[1, 0] = value
    with pytest.raises(ValueError, match=r"ranks must|not within"):
        runner.adapters.put(0, 0, dataclasses.replace(adapters[0], **{name: table}))


def test_weights_of_another_type_or_model_are_refused(runner: CudaRunner, adapters: list[AdapterWeights]) -> None:
    with pytest.raises(ValueError, match="float32 is needed"):
        runner.adapters.put(0, 0, dataclasses.replace(adapters[0], data=adapters[0].data.bfloat16()))
    with pytest.raises(ValueError, match=r"\(2, 4\) is needed"):
        runner.adapters.put(0, 0, dataclasses.replace(adapters[0], ranks=adapters[0].ranks[:1]))


@pytest.mark.parametrize("slots", [[0], [0, 1, 2], [0, cuda_adapters.SLOTS], [-2, 0]], ids=str)
def test_a_step_with_wrong_adapters_is_refused(runner: CudaRunner, slots: list[int]) -> None:
    book = Book(runner)
    with pytest.raises(ValueError, match="adapters must be 2 numbers"):
        runner.launch(with_adapters(book.step({0: 1, 1: 1}), slots))
    assert len(runner.launch(with_adapters(book.step({2: 1, 3: 1}), [0, -1])).wait().tokens) == 2


def test_a_runner_without_memory_for_adapters_has_none(folder: Path, adapters: list[AdapterWeights]) -> None:
    runner = make_runner(folder)
    assert (runner.adapters.capacity, runner.adapters.slots) == (0, 0)
    with pytest.raises(ValueError, match="slot 0"):
        runner.adapters.put(0, 0, adapters[0])
    with pytest.raises(ValueError, match="adapters must be"):
        runner.launch(with_adapters(Book(runner).step({0: 1}), [0]))


def test_a_closed_runner_takes_no_adapters(runner: CudaRunner, adapters: list[AdapterWeights]) -> None:
    assert runner.adapters.device is not None
    memory = weakref.ref(runner.adapters.device.weights)
    runner.close()
    runner.close()
    with pytest.raises(ValueError, match="there are 0"):
        runner.adapters.put(0, 0, adapters[0])
    gc.collect()
    assert memory() is None


def test_a_step_of_the_most_sequences_fits(runner: CudaRunner) -> None:
    """All with the most lines that there may be."""
    runner.adapters.lines[:] = 256 * np.array([3, 1, 2, 1])
    lora_steps = runner._lora
    assert lora_steps is not None
    for rows, tile in ((8, lora.FEW), (8 + lora.FEW_TOKENS, lora.FEW), (runner._pass.rows, lora.MANY)):
        slots = np.arange(rows, dtype=np.int32) % 16
        runner._slots[0].block.reset()
        lora_steps.place(runner._slots[0].block, np.sort(slots), cuda_lora.EVERY, tile)
    # One adapter a row, beyond what a runner of so many output rows can have.
    with pytest.raises(ValueError, match="take"):
        lora_steps.place(
            runner._slots[0].block, np.arange(runner._pass.rows, dtype=np.int32), cuda_lora.EVERY, lora.FEW
        )
    lora_steps.reset()


# --- sizes ---------------------------------------------------------------------------------------


def test_kernels_and_format_agree() -> None:
    assert tuple(len(GROUP_TARGETS[group]) for group in GROUPS) == lora_plan.GROUP_TARGETS
    assert RANK_UNIT == lora.LEAST_RANK
    for config in SHAPES.values():
        for name, group in zip(GROUPS, model_groups(config), strict=True):
            inner, widths = group_widths(config, name)
            assert (group.inner, group.widths) == (inner, tuple(widths))


@pytest.mark.parametrize("name", SHAPES)
def test_memory_beside_the_adapters(name: str) -> None:
    config = SHAPES[name]
    extra = adapter_bytes(config, torch.bfloat16, 8192, 1024)
    # Beside a GPU's default of gigabytes for the adapters themselves; the most of it is for graphs.
    assert extra < min(1 << 30, activation_bytes(config, torch.bfloat16, 8192, 1024))
    plans = block_bytes(config, 8192, 512, adapters=True) - block_bytes(config, 8192, 512)
    assert plans == 4 * plan_words(8192, 512) < 2 << 20


def test_the_workspace_holds_the_parts_of_every_product() -> None:
    for config in SHAPES.values():
        for rows in (1, 64, 512, lora.SPLIT_ROWS, lora.SPLIT_ROWS + 1, 8704):
            for group in model_groups(config):
                assert lora.splits(rows, group) * rows * group.most_lines <= lora.workspace_size(rows)
