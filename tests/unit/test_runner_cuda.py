"""The CUDA runner's whole way of a step, on the CPU through Triton's interpreter, without graphs."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tests.interpreter  # noqa: F401
from realm.engine.batch import LAST_DRAWN, StepBatch
from realm.engine.runners import cuda_decode, cuda_pass
from realm.engine.runners.cuda import RING, CudaRunner
from realm.engine.runners.cuda_staging import Block
from realm.engine.sampling import draw_batch
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights
from tests.runner_book import Book
from tests.tiny import make_model, oracle_logits

pytestmark = pytest.mark.usefixtures("one_thread")

LANES = 16
"""So a step has up to 8 output rows."""


def make_runner(folder: Path, pages: int = 80, lanes: int = LANES, adapter_memory: int = 0) -> CudaRunner:
    """A runner on the CPU; its cache is full of NaN, which must never reach a result."""
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device=torch.device("cpu"))
    with torch.inference_mode():
        model = LlamaModel(config, weights)
        runner = CudaRunner(model, pages=pages, lanes=lanes, token_budget=256, adapter_memory=adapter_memory)
        runner._pass.cache.fill_(float("nan"))
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return make_model(folder, num_hidden_layers=2)


@pytest.fixture
def runner(folder: Path, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> CudaRunner:
    """All passes with torch's matrix products: to interpret those of few rows takes a second a step."""
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", 0)
    return make_runner(folder)


def prompt(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(count)]


def expect_logits(ours: np.ndarray, model: transformers.PreTrainedModel, tokens: list[int]) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), oracle_logits(model, tokens)[-1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("variant", "few"), [("llama-biases", cuda_pass.FEW_ROWS), ("llama-untied", 0), ("llama-head-dim", 0)]
)
def test_chunks_and_decoding_equal_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, few: int
) -> None:
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", few)
    model = make_model(tmp_path, variant, num_hidden_layers=2)
    runner = make_runner(tmp_path)
    book = Book(runner)
    texts = {lane: prompt(lane, count) for lane, count in {0: 1, 7: 18}.items()}
    # The first part of one prompt alone, the rest of it beside the others, then all of them decode.
    runner.launch(book.step({}, [book.chunk(7, texts[7][:4], draws=False)])).wait()
    chunks = [book.chunk(lane, text[4:] if lane == 7 else text) for lane, text in texts.items()]
    result = runner.launch(book.step({}, chunks, logits=range(2))).wait()
    for _ in range(2):
        assert result.logits is not None
        for (lane, text), row, token in zip(texts.items(), result.logits, result.tokens, strict=True):
            expect_logits(row, model, text)
            assert token == row.argmax(), lane
            text.append(int(token))
        result = runner.launch(book.step(dict.fromkeys(texts, LAST_DRAWN), logits=range(2))).wait()


@pytest.mark.parametrize("few", [0, cuda_pass.FEW_ROWS])
def test_decoding_beside_chunks(
    runner: CudaRunner, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", few)
    book = Book(runner, 1)
    texts = {lane: prompt(lane, 2 + 3 * lane) for lane in range(3)}
    drawn = runner.launch(book.step({}, [book.chunk(lane, texts[lane]) for lane in texts])).wait().tokens
    late = prompt(9, 18)
    # Lane 1 goes on with its token, lane 0 with another, lane 2 waits; two chunks of a new prompt come by.
    step = book.step({1: LAST_DRAWN, 0: 5}, [book.chunk(4, late[:7], draws=False)], logits=[0, 1])
    first = runner.launch(step)
    step = book.step({2: LAST_DRAWN}, [book.chunk(4, late[7:])], logits=[0, 1])
    second = runner.launch(step)
    for launched, expected in [
        (first, [[*texts[1], int(drawn[1])], [*texts[0], 5]]),
        (second, [[*texts[2], int(drawn[2])], late]),
    ]:
        result = launched.wait()
        assert result.logits is not None
        assert len(result.tokens) == 2
        for row, tokens in zip(result.logits, expected, strict=True):
            expect_logits(row, oracle, tokens)


def test_many_steps_in_flight_keep_their_results(runner: CudaRunner, oracle: transformers.PreTrainedModel) -> None:
    book = Book(runner)
    text = prompt(3, 15)
    launched = [runner.launch(book.step({}, [book.chunk(2, text)]))]
    launched += [runner.launch(book.step({2: LAST_DRAWN})) for _ in range(RING + 1)]
    tokens = [int(step.wait().tokens[0]) for step in reversed(launched)][::-1]
    for token in tokens:
        assert int(oracle_logits(oracle, text)[-1].argmax()) == token
        text.append(token)
    assert all(step.done() for step in launched)


def test_a_lane_that_changes_hands_reads_its_own_pages(
    runner: CudaRunner, oracle: transformers.PreTrainedModel
) -> None:
    book = Book(runner)
    for seed in range(2):
        text = prompt(seed, 16)
        runner.launch(book.step({}, [book.chunk(0, text)])).wait()
        result = runner.launch(book.step({0: 7}, logits=[0])).wait()
        assert result.logits is not None
        expect_logits(result.logits[0], oracle, [*text, 7])
        book.drop(0)


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, uniform=0.3),
    SamplingParams(temperature=1.3, uniform=0.9, top_k=5),
    SamplingParams(temperature=1.3, uniform=0.6, top_p=0.7, logprob=True),
    SamplingParams(temperature=1.3, uniform=0.99, min_p=0.2),
    SamplingParams(temperature=2.0, uniform=0.5, mask=bytes([0, 0b1010, 255] + [0] * 10)),
    SamplingParams(mask=bytes([0, 0b1010, 0] + [0] * 10), logprob=True),
]


@pytest.mark.parametrize(
    ("rows", "chunks"),
    [([0], True), ([0, 1], False), ([1, 2, 3, 4], False), ([6], True), ([0, 1, 2, 3, 4, 5, 6], False)],
)
def test_draws_are_those_of_the_host(runner: CudaRunner, rows: list[int], chunks: bool) -> None:
    book = Book(runner)
    texts = {lane: prompt(lane, 3) for lane in range(len(rows))}
    sampling = [SAMPLINGS[row] for row in rows]
    every = range(len(rows))
    runner.launch(book.step({}, [book.chunk(lane, text[:-1]) for lane, text in texts.items()])).wait()
    if chunks:
        step = book.step({}, [book.chunk(lane, text[-1:]) for lane, text in texts.items()], sampling, every)
    else:
        step = book.step({lane: text[-1] for lane, text in texts.items()}, (), sampling, every)
    result = runner.launch(step).wait()
    assert result.logits is not None
    expected = draw_batch(torch.from_numpy(result.logits), step.draws)
    assert result.tokens.tolist() == list(expected.tokens)
    np.testing.assert_allclose(result.logprobs, np.array(expected.logprobs, np.float32), rtol=1e-4)
    # The lanes keep them.
    assert runner._pass.lane_tokens[: len(rows)].tolist() == result.tokens.tolist()


@pytest.mark.parametrize("pairs", [[(0, 5), (1, 6), (0, 7)], [(0, 1), (1, 2), (2, 0)], [(4, 5), (3, 4)]])
def test_copies_are_read_before_any_is_written(runner: CudaRunner, pairs: list[tuple[int, int]]) -> None:
    cache = runner._pass.cache
    with torch.inference_mode():
        cache.copy_(torch.arange(cache.numel()).reshape(cache.shape))
        expected = cache.clone()
        for source, target in pairs:
            expected[:, :, target] = cache[:, :, source]
    book = Book(runner)
    book.free = [20]
    batch = book.step({0: 3})
    runner.launch(StepBatch(batch.decodes, [], batch.draws, copies=pairs)).wait()
    others = [page for page in range(runner.pages) if page != 20]
    assert torch.equal(cache[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("failing", [(Block, "send"), (cuda_decode, "spread_tables")], ids=["send", "spread"])
def test_a_step_that_fails_leaves_nothing_behind(
    runner: CudaRunner, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, failing: tuple[Any, str]
) -> None:
    book = Book(runner)
    text = prompt(1, 12)
    runner.launch(book.step({}, [book.chunk(3, text)])).wait()
    step = book.step({3: 4}, logits=[0])
    with monkeypatch.context() as broken:
        broken.setattr(*failing, lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.launch(step)
    runner.launch(book.step({}, [book.chunk(5, [9, 9])])).wait()
    result = runner.launch(step).wait()
    assert result.logits is not None
    expect_logits(result.logits[0], oracle, [*text, 4])


def test_a_step_beyond_the_runner_is_refused(runner: CudaRunner) -> None:
    book = Book(runner)
    with pytest.raises(ValueError, match="9 output rows; the runner has 8"):
        runner.launch(book.step(dict.fromkeys(range(9), 1)))
    # It goes on after that.
    assert len(runner.launch(book.step({}, [book.chunk(10, [1, 2])])).wait().tokens) == 1


def test_a_step_of_more_rows_than_there_is_memory_for_is_refused(runner: CudaRunner) -> None:
    """Else its rows would be written behind the activations."""
    most = runner._pass.rows
    book = Book(runner)
    book.free = [0] * most
    chunks = [book.chunk(lane, [1] * (most // 4 + 1)) for lane in range(4)]
    with pytest.raises(ValueError, match=f"rows; the runner has {most}"):
        runner.launch(book.step({}, chunks))
    assert len(runner.launch(Book(runner).step({3: 1})).wait().tokens) == 1


def test_room_for_chunks_is_one_of_few_and_enough(runner: CudaRunner) -> None:
    rng = random.Random(5)
    rooms = set()
    for _ in range(400):
        book = Book(runner)
        book.free = [0] * 100  # only shapes matter here
        lanes = rng.sample(range(8), rng.randint(1, 8))
        decodes = rng.randint(0, len(lanes) - 1)
        chunks = [book.chunk(lane, [1] * rng.choice([1, 2, 15, 16, 17, 100])) for lane in lanes[decodes:]]
        shape, common = runner._chunks.shape(book.step(dict.fromkeys(lanes[:decodes], 1), chunks))
        counts = [len(chunk.tokens) for chunk in chunks]
        needed = (decodes, sum(counts), len(chunks))
        assert all(room >= need for room, need in zip(shape, needed, strict=False))
        assert shape.outputs <= 8
        if common:
            rooms.add(shape)
        else:
            assert shape[:3] == needed
    assert len(rooms) <= 20


def test_a_closed_runner_has_given_its_memory_back(runner: CudaRunner) -> None:
    step = runner.launch(Book(runner).step({0: 5}))
    cache = weakref.ref(runner._pass.cache)
    runner.close()
    runner.close()
    assert len(step.wait().tokens) == 1
    gc.collect()
    assert cache() is None
