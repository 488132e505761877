"""From options and a model folder to an engine: what is chosen, in which order memory is given out, what is refused."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from realm.engine import loading, memory
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.loading import EngineOptions, load_engine, resolve
from realm.engine.memory import page_bytes, weight_bytes
from realm.engine.runners.cpu import CpuRunner
from realm.errors import RealmError
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from tests.model_files import hf_config, write_folder
from tests.tiny import Driver, make_model

F32 = torch.float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder)
    return folder


def gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


# --- what is chosen ------------------------------------------------------------------------------


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, True)
    chosen = resolve(EngineOptions())
    assert (chosen.device, chosen.attention, chosen.run_ahead) == ("cuda", "triton", 2)
    assert (chosen.token_budget, chosen.max_sequences) == (8192, 512)
    assert resolve(EngineOptions(device="cpu")).device == "cpu"


def test_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, False)
    chosen = resolve(EngineOptions())
    assert (chosen.device, chosen.attention, chosen.token_budget, chosen.max_sequences) == ("cpu", "sdpa", 512, 256)
    # A runner that computes in its caller's thread has nothing to run ahead of.
    assert chosen.run_ahead == 0 and resolve(EngineOptions(threaded=True)).run_ahead == 1


@pytest.mark.parametrize("there", [True, False])
def test_what_the_operator_says_stays(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    gpu(monkeypatch, there)
    attention = "triton" if there else "sdpa"
    said = EngineOptions(attention=attention, token_budget=7, max_sequences=3, run_ahead=0, pages=9, threaded=True)
    chosen = resolve(said)
    assert (chosen.token_budget, chosen.max_sequences, chosen.run_ahead, chosen.pages) == (7, 3, 0, 9)
    assert resolve(EngineOptions(run_ahead=2)).run_ahead == 2


@pytest.mark.parametrize(("there", "device", "attention"), [(False, "cuda", "auto"), (False, "cpu", "triton")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_the_machine_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: bool, device: str, attention: str, dtype: str, tmp_path: Path
) -> None:
    gpu(monkeypatch, there)
    with pytest.raises(RealmError) as caught:
        # Before the folder is looked at.
        load_engine(tmp_path / "none", EngineOptions(device=device, attention=attention, dtype=dtype))
    assert caught.value.code == "engine_start"
    assert ("realm doctor" if device == "cuda" else "give sdpa") in caught.value.message


def test_attention_of_the_cpu_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, True)
    with pytest.raises(RealmError, match="give triton"):
        resolve(EngineOptions(attention="sdpa"))


# --- on the CPU ----------------------------------------------------------------------------------


def test_an_engine_on_the_cpu(folder: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    options = EngineOptions(device="cpu", dtype="float32", pages=32, token_budget=16, max_sequences=5)
    engine = load_engine(folder, options, name="it", progress=lambda *stage: stages.append(stage))
    assert engine.name == "it" and engine.scheduler.pool.total == 32
    assert {stage for stage, _, _ in stages} == {"weights"} and stages[-1][1] == stages[-1][2] == len(stages)
    assert len(Driver(engine).greedy([5, 6, 7], 3)) == 3


def test_a_start_that_takes_long_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    now = 100.0
    progress = loading._logged(lambda: now)
    for done in range(1, 11):
        now += 1.0
        progress("graphs", done, 10)
    assert caplog.messages == [f"loading: graphs {done} of 10" for done in (3, 6, 9)]


def test_random_weights_need_no_file_and_are_others(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "pages": 32}
    with pytest.raises(RealmError) as caught:
        load_engine(tmp_path, EngineOptions(**options))
    assert caught.value.code == "model_invalid"

    def logits(engine: Any) -> bytes:
        driver = Driver(engine)
        (done,) = driver.wait(driver.ask(driver.open(), [5, 6, 7], SamplingParams(), logits=True))
        assert done.logits is not None
        return done.logits

    made = logits(load_engine(tmp_path, EngineOptions(**options, random_weights=True)))
    # The same again, and not what lies in a folder that has weights.
    assert made == logits(load_engine(folder, EngineOptions(**options, random_weights=True)))
    assert made != logits(load_engine(folder, EngineOptions(**options)))


def test_a_server_computes_in_a_thread_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class Seen(CpuRunner):
        def __init__(self, model: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(model, **options)

    monkeypatch.setattr("realm.engine.runners.cpu.CpuRunner", Seen)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "pages": 32, "max_sequences": 3}
    load_engine(folder, EngineOptions(**options))
    load_engine(folder, EngineOptions(**options, threaded=True))
    usual = {"pages": 32, "lanes": 6, "adapter_memory": 512 << 20}
    assert made == [{**usual, "threaded": False}, {**usual, "threaded": True}]


def test_the_pool_is_sized_by_free_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    each = page_bytes(ModelConfig.load(folder), F32)
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 21 * each)
    options = EngineOptions(device="cpu", dtype="float32")
    assert load_engine(folder, options).scheduler.pool.total == 21


def test_a_cpu_engine_loads_neither_triton_nor_kernels(folder: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from realm.engine.loading import EngineOptions, load_engine\n"
        "load_engine(pathlib.Path(sys.argv[1]), EngineOptions(device='cpu', dtype='float32', pages=8))\n"
        "loaded = [name for name in sys.modules if name == 'triton' or name.startswith('realm.engine.kernels')]\n"
        "sys.exit(1 if loaded else 0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)


# --- on a GPU that is this machine's memory --------------------------------------------------------


class FakeGpu:
    """A GPU of ``total`` bytes whose tensors lie in main memory, and a runner that only takes its pages.

    ``events`` are what was asked for, in order.
    """

    RESERVED = 1 << 20
    FOR_ADAPTERS = 1 << 18

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int) -> None:
        self.free = total
        self.events: list[Any] = []
        self.failing: BaseException | None = None
        fake = self

        class Runner:
            def __init__(
                self, model: Any, *, pages: int, lanes: int, token_budget: int, adapter_memory: int, progress: Any
            ) -> None:
                if fake.failing is not None:
                    raise fake.failing
                self.config, self.pages, self.lanes = model.config, pages, lanes
                self.adapters = types.SimpleNamespace(slots=9, capacity=adapter_memory, dtype=F32)
                fake.events.append((pages, lanes, token_budget))
                progress(1, 2)

        def activation_bytes(config: ModelConfig, dtype: torch.dtype, token_budget: int, lanes: int) -> int:
            fake.events.append(("activations", token_budget, lanes))
            return FakeGpu.RESERVED

        def adapter_bytes(config: ModelConfig, dtype: torch.dtype, token_budget: int, lanes: int) -> int:
            return FakeGpu.FOR_ADAPTERS

        def load(*arguments: Any, **options: Any) -> Any:
            weights = real(*arguments, **options)
            fake.events.append("weights")
            fake.free -= sum(weight.nbytes for weight in weights.values())
            return weights

        real = loading.weights_of.load_weights
        gpu(monkeypatch, True)
        monkeypatch.setattr(loading, "_gpu", lambda: torch.device("cpu"))
        monkeypatch.setattr(memory, "device_memory", lambda device: fake.free)
        monkeypatch.setattr(memory, "available_memory", lambda: fake.free)
        monkeypatch.setattr(loading.weights_of, "load_weights", load)
        # Stand-ins for whole modules, so that this test needs neither CUDA nor Triton.
        for name, content in (
            ("cuda", {"CudaRunner": Runner}),
            ("cuda_memory", {"activation_bytes": activation_bytes, "adapter_bytes": adapter_bytes}),
        ):
            module = types.ModuleType(f"realm.engine.runners.{name}")
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)


OPTIONS: dict[str, Any] = {"dtype": "float32", "token_budget": 128, "max_sequences": 4}


def test_pages_take_what_weights_and_steps_leave(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.load(folder)
    fake = FakeGpu(monkeypatch, 64 << 20)
    stages: list[tuple[str, int, int]] = []
    engine = load_engine(folder, EngineOptions(**OPTIONS), progress=lambda *stage: stages.append(stage))
    left = (64 << 20) - weight_bytes(config, F32) - FakeGpu.RESERVED - page_bytes(config, F32)
    pages = int(left * 0.9) // page_bytes(config, F32)
    assert fake.events == ["weights", ("activations", 128, 8), (pages, 8, 128)]
    assert engine.scheduler.pool.total == pages
    assert [*dict.fromkeys(stage for stage, _, _ in stages)] == ["weights", "graphs"] and stages[-1] == ("graphs", 1, 2)


def test_chosen_pages_and_fraction_reach_the_runner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch, 64 << 20)
    load_engine(folder, EngineOptions(**OPTIONS, pages=77))
    fake.free = 64 << 20
    load_engine(folder, EngineOptions(**OPTIONS, kv_fraction=0.5))
    fake.free = 64 << 20
    load_engine(folder, EngineOptions(**OPTIONS, kv_fraction=1.0))
    first, half, whole = (event[0] for event in fake.events if len(event) == 3 and isinstance(event[0], int))
    assert first == 77 and whole // 2 == half


@pytest.mark.parametrize(
    ("total", "chosen", "expected"),
    [
        # Of 64 MiB too little for a quarter to be worth it; of 512 a quarter; of 2 GiB the least, of 6 a part.
        (64 << 20, 0, 0),
        (512 << 20, 0, 127 << 20),
        (2 << 30, 0, 256 << 20),
        (6 << 30, 0, 511 << 20),
        (512 << 20, 300, 300 << 20),
        (6 << 30, -1, 0),
    ],
)
def test_memory_for_adapters_is_taken_before_the_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, total: int, chosen: int, expected: int
) -> None:
    config = ModelConfig.load(folder)
    fake = FakeGpu(monkeypatch, total)
    engine = load_engine(folder, EngineOptions(**OPTIONS, adapter_memory=chosen))
    assert engine.runner.adapters.capacity == expected
    left = total - weight_bytes(config, F32) - FakeGpu.RESERVED - page_bytes(config, F32)
    left -= expected + FakeGpu.FOR_ADAPTERS if expected else 0
    assert engine.scheduler.pool.total == int(left * 0.9) // page_bytes(config, F32)
    assert fake.events[0] == "weights"


def test_adapters_leave_the_pages_that_were_chosen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.load(folder)
    each = page_bytes(config, F32)
    left = (512 << 20) - weight_bytes(config, F32) - FakeGpu.RESERVED - FakeGpu.FOR_ADAPTERS
    for beside, expected in ((100 << 20, 100 << 20), (10 << 20, 0)):
        FakeGpu(monkeypatch, 512 << 20)
        pages = (left - beside) // each - 1
        engine = load_engine(folder, EngineOptions(**OPTIONS, pages=pages))
        assert engine.runner.adapters.capacity == expected and engine.scheduler.pool.total == pages


def test_memory_for_adapters_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch, 64 << 20)
    with pytest.raises(RealmError, match="--adapter-memory") as caught:
        load_engine(folder, EngineOptions(**OPTIONS, adapter_memory=64))
    assert caught.value.code == "engine_start" and caught.value.details["needed"] > 64 << 20
    assert len(fake.events) == 2


@pytest.mark.parametrize(
    ("there", "options", "memory_mib", "cache_mib"),
    [
        (True, {}, 0, 4096),
        (False, {}, 512, -1),
        (True, {"adapter_memory": -1}, -1, -1),
        (False, {"adapter_memory": -1, "adapter_cache": 5}, -1, -1),
        (True, {"adapter_memory": 7, "adapter_cache": 9}, 7, 9),
        (False, {"adapter_memory": 7, "adapter_cache": 9}, 7, 9),
        (True, {"adapter_cache": -1}, 0, -1),
    ],
)
def test_room_for_adapters(
    monkeypatch: pytest.MonkeyPatch, there: bool, options: dict[str, int], memory_mib: int, cache_mib: int
) -> None:
    gpu(monkeypatch, there)
    chosen = resolve(EngineOptions(**options))
    assert (chosen.adapter_memory, chosen.adapter_cache) == (memory_mib, cache_mib)


def test_room_for_adapters_reaches_runner_and_core(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    core = loading.EngineCore

    def seen(*arguments: Any, **options: Any) -> Any:
        made.append(options)
        return core(*arguments, **options)

    monkeypatch.setattr(loading, "EngineCore", seen)
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "pages": 32}
    engines = [
        load_engine(folder, EngineOptions(**options, adapter_memory=3, adapter_cache=2)),
        load_engine(folder, EngineOptions(**options, adapter_memory=-1)),
    ]
    assert [engine.runner.adapters.capacity for engine in engines] == [3 << 20, 0]
    assert [options["adapter_cache"] for options in made] == [2 << 20, 0]


def test_a_gpu_without_room_for_cuda_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch, 1000)

    def fails() -> torch.device:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(loading, "_gpu", fails)
    with pytest.raises(RealmError, match="CUDA_VISIBLE_DEVICES") as caught:
        load_engine(folder, EngineOptions(**OPTIONS))
    assert caught.value.code == "engine_start"
    assert caught.value.details["free"] == 1000
    assert fake.events == []


def test_weights_that_cannot_fit_are_not_even_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch, 100_000)
    with pytest.raises(RealmError, match="the weights need") as caught:
        load_engine(folder, EngineOptions(**OPTIONS))
    needed = weight_bytes(ModelConfig.load(folder), F32)
    assert caught.value.code == "engine_start" and caught.value.details == {"needed": needed, "free": 100_000}
    assert "--dtype bfloat16" in caught.value.message and fake.events == []


def test_pages_that_cannot_fit_are_refused_before_they_are_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch, 16 << 20)
    with pytest.raises(RealmError, match="--kv-pages") as caught:
        load_engine(folder, EngineOptions(**OPTIONS, pages=100_000))
    assert caught.value.code == "engine_start" and caught.value.details["needed"] > 16 << 20
    assert "weights" in fake.events and len(fake.events) == 2


def test_memory_that_ends_while_graphs_are_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeGpu(monkeypatch, 64 << 20)
    fake.failing = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(RealmError, match="--kv-fraction") as caught:
        load_engine(folder, EngineOptions(**OPTIONS))
    assert caught.value.code == "engine_start" and caught.value.details["needed"] > 0
    fake.failing = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        load_engine(folder, EngineOptions(**OPTIONS))


def test_a_context_of_32_thousand_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = hf_config(max_position_embeddings=32_768)
    write_folder(tmp_path, config=config)
    FakeGpu(monkeypatch, 1 << 30)
    assert load_engine(tmp_path, EngineOptions(**OPTIONS)).scheduler.pool.total * PAGE_SIZE >= 32_768
