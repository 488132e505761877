"""Engines on a real GPU: how memory is given out, and what is said where it is not enough."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from realm.engine.core import EngineCore
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.loading import EngineOptions, load_engine
from realm.engine.memory import page_bytes, weight_bytes
from realm.errors import RealmError
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.loading import load_weights, random_weights
from realm.models.shapes import SHAPES, write_shape
from tests.tiny import Driver, make_model

GPU = torch.device("cuda")
SMALL: dict[str, Any] = {"token_budget": 256, "max_sequences": 8}


def free() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@contextmanager
def loaded(folder: Path, **options: Any) -> Iterator[EngineCore]:
    engine = load_engine(folder, EngineOptions(device="cuda", **options))
    try:
        yield engine
    finally:
        engine.runner.close()


@pytest.fixture(scope="module")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    write_shape(folder, "smollm2-135m")
    return folder


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What a test took of the GPU is given back; graphs' own libraries may keep a little."""
    before = free()
    yield
    assert free() > before - (1 << 30)


@pytest.mark.parametrize("variant", ["llama-tied", "llama-untied", "qwen2"])
def test_the_gpu_computes_what_the_cpu_does(tmp_path: Path, variant: str) -> None:
    make_model(tmp_path, variant)
    prompt = [5, 9, 33, 2, 7, 7, 50, 61, 13]
    cpu = Driver(load_engine(tmp_path, EngineOptions(device="cpu", dtype="float32", pages=64)))
    with loaded(tmp_path, dtype="float32", pages=64, **SMALL) as engine:
        gpu = Driver(engine)
        assert gpu.greedy(prompt, 40) == cpu.greedy(prompt, 40)
        rows = []
        for driver in (gpu, cpu):
            (done,) = driver.wait(driver.ask(driver.open(), prompt, SamplingParams(), logits=True))
            assert done.logits is not None
            rows.append(np.frombuffer(done.logits, np.float32))
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4, atol=1e-4)


def test_weights_go_to_the_gpu_without_a_copy_in_main_memory(tmp_path: Path) -> None:
    config = SHAPES["smollm2-135m"]
    weights = random_weights(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    save_file(weights, tmp_path / "model.safetensors")
    names = list(weights)
    kept = {name: weights[name].clone() for name in names[:5]}
    size = weight_bytes(config, torch.bfloat16)
    del weights
    torch.zeros(1, device=GPU)
    # Pages of the mapped file are the kernel's to drop and do not count: only anonymous memory does.
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.001):
            most[0] = max(most[0], anonymous())

    before = anonymous()
    watcher = threading.Thread(target=watch)
    watcher.start()
    onto = load_weights(tmp_path, config, dtype=torch.bfloat16, device=GPU)
    over.set()
    watcher.join()
    assert {weight.device.type for weight in onto.values()} == {"cuda"} and onto.keys() == {*names}
    for name, weight in kept.items():
        assert torch.equal(onto[name].cpu(), weight)
    # The largest tensor, and some for buffers of the driver.
    largest = config.vocab_size * config.hidden_size * 2
    assert most[0] - before < largest + (64 << 20) < size


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def test_full_steps_stay_within_what_was_reserved(smol: Path) -> None:
    config = SHAPES["smollm2-135m"]
    before = free()
    with loaded(smol, random_weights=True, kv_fraction=0.99, token_budget=2048, max_sequences=64) as engine:
        pool = engine.scheduler.pool.total * page_bytes(config, torch.bfloat16)
        assert 0.9 * before < pool < before
        driver = Driver(engine)
        rng = np.random.default_rng(0)
        # The second is drawn by a graph that is made only now.
        for sampling in (SamplingParams(), SamplingParams(temperature=1.0, top_p=0.9, uniform=0.5)):
            prompts = [rng.integers(3, config.vocab_size, 200).tolist() for _ in range(64)]
            sequences = [driver.open() for _ in prompts]
            calls = [driver.ask(seq, prompt, sampling) for seq, prompt in zip(sequences, prompts, strict=True)]
            tokens = [done.token for done in driver.wait(*calls)]
            for _ in range(3):
                calls = [driver.ask(seq, [token], sampling) for seq, token in zip(sequences, tokens, strict=True)]
                tokens = [done.token for done in driver.wait(*calls)]
        # Of the hundredth that pages did not get, next to nothing was needed.
        assert torch.cuda.mem_get_info()[0] > 0.005 * pool


def test_a_context_of_32_thousand_tokens(tmp_path: Path) -> None:
    write_shape(tmp_path, "llama-3.2-1b")
    with loaded(tmp_path, random_weights=True) as engine:
        assert engine.scheduler.pool.total * PAGE_SIZE >= engine.config.context_length
        driver = Driver(engine)
        prompt = np.random.default_rng(1).integers(0, 128_000, 32_700).tolist()
        assert len(driver.greedy(prompt, 70)) == 70


def test_more_pages_than_the_gpu_holds(smol: Path) -> None:
    before = free()
    with pytest.raises(RealmError) as caught:
        load_engine(smol, EngineOptions(device="cuda", random_weights=True, pages=1 << 30, **SMALL))
    error = caught.value
    assert error.code == "engine_start" and "--kv-pages" in error.message and error.details["needed"] > before
    # The advice of the error works, on the same GPU in the same process.
    advised = int(error.message.partition("give --kv-pages ")[2].split()[0])
    del caught, error
    with loaded(smol, random_weights=True, pages=int(advised * 0.95), **SMALL) as engine:
        assert len(Driver(engine).greedy([5, 6, 7], 3)) == 3


def test_a_gpu_that_others_have_filled(smol: Path) -> None:
    config = ModelConfig.load(smol)
    hog = torch.empty(free() - (100 << 20), dtype=torch.uint8, device=GPU)
    try:
        with pytest.raises(RealmError, match="the weights need") as caught:
            load_engine(smol, EngineOptions(device="cuda", random_weights=True, **SMALL))
        assert caught.value.code == "engine_start"
        assert caught.value.details["needed"] == weight_bytes(config, torch.bfloat16)
        assert caught.value.details["free"] < 200 << 20
    finally:
        del hog


def test_memory_that_ends_while_weights_are_loaded(tmp_path: Path) -> None:
    """Free when it is looked at, taken when it is used: the allocator's own error becomes ours."""
    config = SHAPES["smollm2-135m"]
    write_shape(tmp_path, "smollm2-135m")
    save_file(random_weights(config, dtype=torch.bfloat16, device=torch.device("cpu")), tmp_path / "model.safetensors")
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((100 << 20) / total)
    try:
        with pytest.raises(RealmError, match="the weights need") as caught:
            load_engine(tmp_path, EngineOptions(device="cuda", **SMALL))
        assert caught.value.code == "engine_start"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_random_weights_on_the_gpu_repeat() -> None:
    config = SHAPES["smollm2-135m"]
    first, second = (random_weights(config, dtype=torch.bfloat16, device=GPU, seed=3) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) and first[name].is_cuda for name in first)
