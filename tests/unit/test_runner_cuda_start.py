"""What the CUDA runner does before its first step, and its graphs: on the CPU, with stand-ins for CUDA."""

from __future__ import annotations

import gc
import inspect
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tests.interpreter  # noqa: F401
from realm.engine.batch import LAST_DRAWN
from realm.engine.kernels import sampling
from realm.engine.kernels.launching import ALIGNMENT, Kernel
from realm.engine.runners import cuda_decode, cuda_kernels, cuda_pass
from realm.engine.runners.cuda import CudaRunner
from realm.engine.runners.cuda_buckets import COMMON, RARE
from realm.engine.runners.cuda_decode import captured
from realm.engine.runners.cuda_memory import MOST_PARTS
from realm.engine.runners.cuda_staging import Block
from realm.messages import SamplingParams
from tests.runner_book import Book
from tests.tiny import make_model, oracle_logits
from tests.unit.test_runner_cuda import SAMPLINGS, make_runner, prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return make_model(folder, num_hidden_layers=2)


@pytest.fixture
def runner(folder: Path, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> CudaRunner:
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", 0)
    return make_runner(folder)


# --- compiling -----------------------------------------------------------------------------------


class Recorder:
    """In place of kernels: notes what each launch would be compiled for, and computes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds: set[tuple[Any, ...]] = set()
        kinds = self.kinds

        def launch(kernel: Any, grid: Any, tensors: Any, integers: Any, constants: Any, **options: int) -> None:
            types = tuple((tensor.dtype, tensor.data_ptr() % ALIGNMENT == 0) for tensor in tensors)
            kinds.add((id(kernel), types, constants, *options.values()))

        monkeypatch.setattr(Kernel, "launch", launch)
        for module in (sampling, cuda_kernels):
            for name, function in list(vars(module).items()):
                if hasattr(function, "fn") and hasattr(function, "arg_names"):
                    monkeypatch.setattr(module, name, Function(name, function, kinds, module is sampling))


class Function:
    """``specialized``: triton compiles the function anew for integers that are 1, or multiples of 16."""

    def __init__(self, name: str, function: Any, kinds: set[tuple[Any, ...]], specialized: bool) -> None:
        self._name = name
        self._parameters = list(inspect.signature(function.fn).parameters.values())
        self._kinds = kinds
        self._specialized = specialized

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: int) -> None:
            pairs = zip(self._parameters, arguments, strict=True)
            kind = tuple(self._kind("constexpr" in str(parameter.annotation), value) for parameter, value in pairs)
            self._kinds.add((self._name, kind, *options.values()))

        return launch

    def _kind(self, constant: bool, value: Any) -> object:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % ALIGNMENT == 0
        if constant:
            return value
        return (value == 1, value % 16 == 0) if self._specialized else None


@pytest.mark.parametrize("few", [0, cuda_pass.FEW_ROWS])
def test_no_step_after_the_start_has_to_compile(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """To compile takes seconds, for which all tenants would wait."""
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", few)
    recorder = Recorder(monkeypatch)
    # So few that long contexts are split more often than short ones.
    runner._chunks._attention._multiprocessors = 8
    progress: list[tuple[int, int]] = []
    with torch.inference_mode():
        runner._start(256, lambda done, total: progress.append((done, total)))
    assert progress == [(done, len(progress)) for done in range(1, len(progress) + 1)]
    known = set(recorder.kinds)
    rng = random.Random(3)
    for _ in range(250):
        book = Book(runner)
        book.free = [0] * 1000
        lanes = rng.sample(range(16), rng.randint(1, 8))
        decodes = rng.randint(0, len(lanes))
        chunks = [book.chunk(lane, [1] * rng.choice([1, 2, 3, 6, 17, 60])) for lane in lanes[decodes:]]
        step = book.step(dict.fromkeys(lanes[:decodes], 1), chunks, rng.choices(SAMPLINGS, k=len(lanes)))
        step.decodes.longest = max(step.decodes.longest, rng.choice([0, 5000, 20_000, 130_000]))
        step.copies = [(1, 2), (3, 4)] if rng.random() < 0.2 else [(1, 2), (2, 3)]
        runner.launch(step).wait()
    assert recorder.kinds <= known, recorder.kinds - known


def test_every_kind_of_draw_is_common_or_rare(runner: CudaRunner) -> None:
    kinds = {(greedy, filtered) for greedy, filtered, _, _ in (*COMMON, *RARE)}
    assert kinds == {(True, False), (False, True), (False, False)}
    assert len({*COMMON, *RARE}) == len(COMMON) + len(RARE) == 12


# --- graphs --------------------------------------------------------------------------------------


def replaying(compute: Callable[[], None], pool: Any) -> Callable[[], None]:
    """In place of a capture: a graph does the same on the same buffers."""
    return lambda: compute()


def decode_with_logits(runner: CudaRunner, oracle: transformers.PreTrainedModel) -> None:
    """Greedy text of two lanes, with steps of several sizes and kinds, each launched behind others."""
    book = Book(runner)
    texts = {lane: prompt(lane + 2, 7 + lane) for lane in range(2)}
    sampling = SamplingParams(logprob=True, mask=b"\xff" * 13, temperature=1e-8)
    kinds: list[tuple[list[int], SamplingParams]] = [
        ([0, 1], SamplingParams()),
        ([1], SamplingParams()),
        ([0, 1], sampling),
        ([0], sampling),
        ([0, 1], SamplingParams()),
    ]
    launched = [([0, 1], runner.launch(book.step({}, [book.chunk(lane, text) for lane, text in texts.items()])))]
    for lanes, kind in kinds:
        step = book.step(dict.fromkeys(lanes, LAST_DRAWN), (), [kind] * len(lanes))
        launched.append((lanes, runner.launch(step)))
    for lanes, step in launched:
        for lane, token in zip(lanes, step.wait().tokens.tolist(), strict=True):
            assert token == int(oracle_logits(oracle, texts[lane])[-1].argmax())
            texts[lane].append(token)


def test_a_late_capture_changes_nothing_that_steps_need(
    runner: CudaRunner, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither pages nor the tokens of lanes, though all is computed once before it is captured."""
    monkeypatch.setattr(cuda_decode, "captured", replaying)
    runner._decodes._pool = object()
    decode_with_logits(runner, oracle)
    assert len(runner._decodes._graphs) == 4


@pytest.mark.parametrize("room", [0, 1])
def test_no_memory_for_a_graph_is_no_fault(
    runner: CudaRunner,
    oracle: transformers.PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    room: int,
) -> None:
    attempts: list[int] = []

    def fails(compute: Callable[[], None], pool: Any) -> Callable[[], None]:
        attempts.append(1)
        # What allocations say, and what the making of a graph says.
        raise (
            torch.OutOfMemoryError("CUDA out of memory")
            if len(attempts) % 2
            else RuntimeError("CUDA error: out of memory")
        )

    monkeypatch.setattr(cuda_decode, "captured", fails)
    runner._decodes._pool = object()
    runner._decodes._most_graphs = 4 * room
    decode_with_logits(runner, oracle)
    # Of four kinds each is tried once, and once more when the allocator has given back what it could.
    assert len(attempts) == 8 * room
    assert len([line for line in caplog.messages if "--kv-fraction" in line]) == 4 * room


class FakeGraph:
    def __init__(self) -> None:
        self.calls: list[str] = []
        graphs.append(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self.calls.append("begin")

    def capture_end(self) -> None:
        self.calls.append("end")

    def replay(self) -> None:
        self.calls.append("replay")


graphs: list[FakeGraph] = []


def test_nothing_is_collected_in_the_middle_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    collecting: list[bool] = []
    captured(lambda: collecting.append(gc.isenabled()), None)()
    assert collecting == [False]
    assert gc.isenabled()
    assert graphs[-1].calls == ["begin", "end", "replay"]
    with pytest.raises(ZeroDivisionError):
        captured(lambda: 1 / 0, None)  # type: ignore[arg-type, return-value]
    assert gc.isenabled()
    assert graphs[-1].calls == ["begin", "end"]


def test_a_step_without_memory_is_told_to_the_operator(
    runner: CudaRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(block: Block) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Block, "send", fails)
    book = Book(runner)
    with pytest.raises(torch.OutOfMemoryError):
        runner.launch(book.step({3: 4}, [book.chunk(0, prompt(0, 5))]))
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL]
    assert "1 rows and 5 tokens" in caplog.text
    assert "--kv-fraction" in caplog.text


def test_steps_of_one_shape_split_contexts_alike(folder: Path, oracle: transformers.PreTrainedModel) -> None:
    """Else a shape would be captured once for each number of decoding rows."""
    runner = make_runner(folder, lanes=64)
    runner._chunks._attention._multiprocessors = 132
    shapes = set()
    for decodes in range(1, 9):
        book = Book(runner)
        book.free = list(np.zeros(40, int))
        step = book.step(dict.fromkeys(range(decodes), 1), [book.chunk(20, [1] * 9)])
        shapes.add(runner._chunks.shape(step))
    assert len(shapes) == 1


def test_more_rows_than_parts_of_contexts_are_not_split(runner: CudaRunner) -> None:
    attention = runner._chunks._attention
    attention._multiprocessors = 132
    for rows in (1, 7, 256, MOST_PARTS, MOST_PARTS + 1, 10_000):
        splits = attention.splits(rows, 130_000)
        assert splits == 1 or (splits & (splits - 1) == 0 and rows * splits <= MOST_PARTS)


def test_another_fault_of_a_capture_is_one(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(compute: Callable[[], None], pool: Any) -> Callable[[], None]:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(cuda_decode, "captured", fails)
    runner._decodes._pool = object()
    with pytest.raises(RuntimeError, match="during capture"):
        runner.launch(Book(runner).step({0: 5}))
