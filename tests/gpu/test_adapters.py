"""Adapters on a GPU: kernels at the sizes of real models, graphs, streams, and loading beside running steps."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.jit import JITFunction

from realm.adapters.weights import AdapterWeights
from realm.engine.batch import LAST_DRAWN, StepBatch
from realm.engine.kernels.lora import FEW, MANY, SPLIT_ROWS, Group
from realm.engine.runners import cuda_decode, cuda_lora
from realm.engine.runners.cuda import RING, CudaRunner
from realm.engine.runners.cuda_memory import activation_bytes, adapter_bytes
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights, random_weights
from realm.models.shapes import SHAPES
from tests.lora_cases import LoraCase, fill, make_lora, merge, random_adapter
from tests.runner_book import Book
from tests.tiny import make_model

CUDA = torch.device("cuda")
MEMORY = 16 << 20
RANKS = ([16, 16, 0, 0], [0, 32, 16, 16], [48, 0, 16, 0], [128, 128, 0, 0], [16, 16, 16, 16])


# --- kernels -------------------------------------------------------------------------------------

LLAMA_1B = (
    Group(0, 2048, (2048, 512, 512)),
    Group(1, 2048, (2048,)),
    Group(2, 2048, (8192, 8192)),
    Group(3, 8192, (2048,)),
)
SMOL = (Group(0, 576, (576, 192, 192)), Group(1, 576, (576,)), Group(2, 576, (1536, 1536)), Group(3, 1536, (576,)))
MIXED = [[16, 16, 0, 16], [128, 64, 16, 0], [0, 256, 32, 48], [256, 16, 16, 32], [16, 32, 16, 16]]


def mix(rows: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(-1, len(MIXED)) for _ in range(rows)]


def near(case: LoraCase, seed: int = 0) -> None:
    limit = 1e-5 if case.adapters.weights.dtype == torch.float32 else 6e-3
    for group in case.groups:
        x, out = case.operands(group, seed)
        expected, before = case.expected(x, out, group), out.clone()
        case.run(x, out, group, multiprocessors=132)
        error = (out.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < limit, (group, error.max())
        for row, slot in enumerate(case.slots):
            assert (slot >= 0 and case.ranks[slot, group.number] > 0) != torch.equal(out[row], before[row]), row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("groups", [LLAMA_1B, SMOL], ids=["1B", "135M"])
@pytest.mark.parametrize(("rows", "tile"), [(1, FEW), (64, FEW), (200, FEW), (5, MANY), (300, MANY)])
def test_kernels(groups: Sequence[Group], rows: int, tile: int, dtype: torch.dtype) -> None:
    slots = [3] if rows == 1 else mix(rows, rows)
    near(make_lora(groups, slots, MIXED, tile=tile, dtype=dtype, device="cuda"))


def test_many_rows_are_not_split() -> None:
    near(make_lora(SMOL[:2], mix(SPLIT_ROWS + 100, 1), [ranks[:2] for ranks in MIXED], tile=MANY, device="cuda"))


@pytest.mark.parametrize("tile", [FEW, MANY])
def test_results_repeat_and_do_not_depend_on_the_others(tile: int) -> None:
    """To the bit, whatever the order in which programs happen to run."""
    group = LLAMA_1B[0]
    slots = mix(100, 7)
    case = make_lora(LLAMA_1B, slots, MIXED, tile=tile, dtype=torch.bfloat16, device="cuda")
    x, base = case.operands(group)
    results = []
    for _ in range(20):
        out = base.clone()
        case.run(x, out, group, multiprocessors=132)
        results.append(out)
    assert all(torch.equal(results[0], out) for out in results)
    for row in range(0, 100, 9):
        alone = [-1] * 100
        alone[row] = slots[row]
        other = LoraCase(case.groups, alone, case.ranks, case.adapters, case.layers, tile)
        out = base.clone()
        other.run(x, out, group, multiprocessors=132)
        assert torch.equal(out[row], results[0][row])


# --- the runner ----------------------------------------------------------------------------------


def make_runner(
    folder: Path, merged: AdapterWeights | None = None, *, memory: int = MEMORY, lanes: int = 96
) -> CudaRunner:
    """A float32 runner; its cache is full of NaN, which must never reach a result."""
    config = ModelConfig.load(folder)
    with torch.inference_mode():
        model = LlamaModel(config, load_weights(folder, config, dtype=torch.float32, device=CUDA))
        if merged is not None:
            merge(model, merged)
        runner = CudaRunner(model, pages=600, lanes=lanes, token_budget=512, adapter_memory=memory)
        runner._pass.cache.fill_(float("nan"))
        torch.cuda.synchronize()
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(folder: Path) -> list[AdapterWeights]:
    return [random_adapter(ModelConfig.load(folder), ranks, seed=seed) for seed, ranks in enumerate(RANKS)]


@pytest.fixture(scope="module")
def runner(folder: Path, adapters: list[AdapterWeights]) -> CudaRunner:
    runner = make_runner(folder)
    fill(runner, adapters)
    return runner


def prompt(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(count)]


def adapted(step: StepBatch, slots: Sequence[int]) -> StepBatch:
    step.adapters = np.array(slots, np.int32)
    return step


def play(runner: CudaRunner, slots: Sequence[int] | None) -> list[np.ndarray]:
    """Prompts, prompts beside decoding rows, and decoding in batches of several sizes: logits of each lane."""
    book = Book(runner, 3)
    found: list[np.ndarray] = []

    def launch(tokens: dict[int, int], lanes: Sequence[int]) -> None:
        chunks = [book.chunk(lane, prompt(lane, 3 + 5 * lane)) for lane in lanes]
        step = book.step(tokens, chunks, logits=range(len(tokens) + len(chunks)))
        if slots is not None:
            adapted(step, [slots[lane] for lane in (*tokens, *lanes)])
        result = runner.launch(step).wait()
        assert result.logits is not None
        found.extend(result.logits)

    launch({}, range(6))
    launch(dict.fromkeys(range(6), 5), range(6, 12))
    launch({}, range(12, 14))
    for lanes in (range(14), [3], [2, 7, 9], range(14), [0, 1]):
        launch(dict.fromkeys(lanes, 9), [])
    return found


SLOTS = [0, -1, 1, 2, 3, 4, -1, 0, 0, 3, 1, -1, 2, 4]


def test_a_mixed_batch_computes_as_with_merged_weights(
    folder: Path, runner: CudaRunner, adapters: list[AdapterWeights]
) -> None:
    mixed = play(runner, SLOTS)
    lanes = [*range(6), *range(6), *range(6, 12), 12, 13, *range(14), 3, 2, 7, 9, *range(14), 0, 1]
    assert len(mixed) == len(lanes)
    for slot in range(-1, len(adapters)):
        one = make_runner(folder, None if slot < 0 else adapters[slot], memory=0)
        for lane, logits, expected in zip(lanes, mixed, play(one, None), strict=True):
            if SLOTS[lane] == slot:
                error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
                assert error < 1e-4, (lane, slot, error)
        one.close()


def test_steps_without_adapters_are_the_same_to_the_bit(folder: Path, runner: CudaRunner) -> None:
    without = make_runner(folder, memory=0)
    for first, second in zip(play(without, None), play(runner, None), strict=True):
        assert np.array_equal(first, second)
    without.close()


def test_graphs_of_the_start_are_used_and_none_is_made_later(
    runner: CudaRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes, chunks = runner._decodes, runner._chunks
    assert len(decodes._adapted) == 2 * len(decodes._sizes)
    assert len(chunks._adapted) == 2 * len(chunks._adapted_rooms)

    def late(*arguments: object) -> None:
        raise AssertionError("a graph is captured late")

    def compiles(function: JITFunction, *arguments: object, **options: object) -> None:
        raise AssertionError(f"{function.__name__} is compiled")

    def eager(*arguments: object, **options: object) -> None:
        raise AssertionError("a forward pass is launched kernel by kernel")

    monkeypatch.setattr(cuda_decode, "captured", late)
    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    monkeypatch.setattr(cuda_lora, "lora_expand", eager)
    for slots in (SLOTS, [0] * 14, [-1] * 13 + [4]):
        play(runner, slots)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_launches_never_wait_for_the_device(runner: CudaRunner) -> None:
    book = Book(runner)
    chunks = [book.chunk(lane, prompt(lane, 20)) for lane in range(5)]
    steps = [adapted(book.step({}, chunks, logits=[1]), [0, 1, -1, 2, 0])]
    for slots in ([0, 1, -1, 2, 0], [0, 1, -1, 2, 0], [4, 1, 3, 2, 0]):
        steps.append(adapted(book.step(dict.fromkeys(range(5), LAST_DRAWN)), slots))
    for step in steps:
        runner.launch(step).wait()
    allocated = torch.cuda.memory_stats()["segment.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = [runner.launch(step) for step in steps[:RING]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step in launched:
        step.wait()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == allocated, "no memory is asked of the driver"


def test_adapters_come_while_steps_run(runner: CudaRunner, adapters: list[AdapterWeights]) -> None:
    """Others' rows stay the same to the bit, nothing waits for the whole device, and what came is right."""
    failures: list[BaseException] = []
    stop, puts = threading.Event(), [0]
    expected = play(runner, SLOTS)
    base = sum(-(-adapter.nbytes // 256) * 256 for adapter in adapters)

    def load() -> None:
        try:
            while not stop.is_set():
                runner.adapters.put(7 + puts[0] % 3, base, adapters[puts[0] % len(adapters)])
                puts[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(10):
            for found, wanted in zip(play(runner, SLOTS), expected, strict=True):
                assert np.array_equal(found, wanted)
    finally:
        stop.set()
        thread.join()
    assert not failures and puts[0] > 20
    for slot in range(len(adapters)):
        runner.adapters.put(9, base, adapters[slot])
        moved = [9 if other == slot else other for other in SLOTS]
        for found, wanted in zip(play(runner, moved), expected, strict=True):
            assert np.allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_near_with_adapters_as_without() -> None:
    """To the same weights in float32: within 1%, or within a half more than without adapters."""
    config = SHAPES["smollm2-135m"]
    with torch.inference_mode():
        weights = random_weights(config, dtype=torch.bfloat16, device=CUDA)
        exact = {name: weight.float() for name, weight in weights.items()}
        runners = [
            CudaRunner(LlamaModel(config, tensors), pages=200, lanes=32, token_budget=512, adapter_memory=64 << 20)
            for tensors in (weights, exact)
        ]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, 7 + 9 * lane).tolist() for lane in range(8)]
    errors = {}
    for slots in (None, [0, 1, 0, -1, 1, 0, 1, 0]):
        found = []
        for made, dtype in zip(runners, (torch.bfloat16, torch.float32), strict=True):
            at = 0
            for slot, ranks in enumerate(([16, 16, 0, 0], [16, 32, 16, 16])):
                # Of the same numbers, rounded once.
                adapter = random_adapter(config, ranks, dtype=torch.bfloat16, seed=slot)
                adapter = AdapterWeights(
                    adapter.data.to(dtype), adapter.ranks, adapter.a_at, adapter.b_at, adapter.rank, adapter.widths
                )
                made.adapters.put(slot, at, adapter)
                at += -(-adapter.nbytes // 256) * 256
            book = Book(made)
            steps = [book.step({}, [book.chunk(lane, text) for lane, text in enumerate(texts)], logits=range(8))]
            steps.append(book.step(dict.fromkeys(range(8), 7), logits=range(8)))
            for step in steps:
                result = made.launch(step if slots is None else adapted(step, slots)).wait()
                assert result.logits is not None
                found.append(result.logits)
        half, whole = np.concatenate(found[:2]), np.concatenate(found[2:])
        error = np.linalg.norm(half - whole, axis=1) / np.linalg.norm(whole, axis=1)
        errors["plain" if slots is None else "adapted"] = error
        print(f"slots {slots}: relative errors {error.min():.4f} to {error.max():.4f}")
    assert errors["adapted"].max() < max(1e-2, 1.5 * errors["plain"].max())
    for made in runners:
        made.close()


def test_memory_stays_within_the_estimate() -> None:
    config = SHAPES["smollm2-135m"]
    with torch.inference_mode():
        model = LlamaModel(config, random_weights(config, dtype=torch.bfloat16, device=CUDA))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    runner = CudaRunner(model, pages=1600, lanes=1024, token_budget=8192, adapter_memory=64 << 20)
    taken = before - torch.cuda.mem_get_info()[0] - runner._pass.cache.nbytes - (64 << 20)
    estimate = activation_bytes(config, torch.bfloat16, 8192, 1024) + adapter_bytes(config, torch.bfloat16, 8192, 1024)
    print(f"{taken / 2**20:,.0f} MiB beside KV pages and adapters, estimated {estimate / 2**20:,.0f}")
    assert taken <= estimate
    book = Book(runner)
    adapter = random_adapter(config, [16, 16, 16, 16], dtype=torch.bfloat16)
    runner.adapters.put(0, 0, adapter)
    rng = np.random.default_rng(0)
    chunks = [book.chunk(lane, rng.integers(0, config.vocab_size, 128).tolist()) for lane in range(64)]
    how = [SamplingParams()] * 64
    tokens = runner.launch(adapted(book.step({}, chunks, how), [0] * 64)).wait().tokens
    assert len(tokens) == 64
    runner.close()
