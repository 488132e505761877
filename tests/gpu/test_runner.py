"""The CUDA runner on a GPU: graphs, streams and memory. What a step computes is checked on the CPU as well
(tests/unit/test_runner_cuda.py)."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from triton.runtime.jit import JITFunction

from realm.engine.batch import LAST_DRAWN, StepBatch
from realm.engine.runners.cuda import RING, CudaRunner
from realm.engine.runners.cuda_memory import activation_bytes
from realm.engine.sampling import draw_batch
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights, random_weights
from realm.models.shapes import SHAPES, write_shape
from tests.runner_book import Book
from tests.tiny import VARIANTS, make_model, oracle_logits

LANES = 96
CUDA = torch.device("cuda")


def make_runner(folder: Path, pages: int = 600) -> CudaRunner:
    """A float32 runner; its cache is full of NaN, which must never reach a result."""
    config = ModelConfig.load(folder)
    with torch.inference_mode():
        weights = load_weights(folder, config, dtype=torch.float32, device=CUDA)
        runner = CudaRunner(LlamaModel(config, weights), pages=pages, lanes=LANES, token_budget=2048)
        runner._pass.cache.fill_(float("nan"))
        torch.cuda.synchronize()
    return runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return make_model(folder)


@pytest.fixture(scope="module")
def runner(folder: Path, oracle: transformers.PreTrainedModel) -> CudaRunner:
    return make_runner(folder)


def prompt(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(count)]


def expect_logits(ours: np.ndarray, model: transformers.PreTrainedModel, tokens: list[int]) -> None:
    torch.testing.assert_close(torch.from_numpy(ours), oracle_logits(model, tokens)[-1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_text_equals_transformers(tmp_path: Path, variant: str) -> None:
    model = make_model(tmp_path, variant)
    runner = make_runner(tmp_path)
    book = Book(runner)
    texts = {lane: prompt(lane, 1 + 5 * lane) for lane in range(11)}
    launched = [runner.launch(book.step({}, [book.chunk(lane, text) for lane, text in texts.items()]))]
    # Steps of several sizes, each launched before the one before is done.
    asked = [list(texts)] * 12 + [[3]] * 3 + [[5, 4]] * 2 + [[9, 1, 0]] * 4
    launched += [runner.launch(book.step(dict.fromkeys(lanes, LAST_DRAWN))) for lanes in asked]
    for lanes, step in zip([list(texts), *asked], launched, strict=True):
        for lane, token in zip(lanes, step.wait().tokens.tolist(), strict=True):
            best = oracle_logits(model, texts[lane])[-1]
            assert best[token] >= best.max() - 1e-3, lane
            texts[lane].append(token)
    runner.close()


def test_logits_of_mixed_steps_equal_transformers(runner: CudaRunner, oracle: transformers.PreTrainedModel) -> None:
    book = Book(runner, 3)
    texts: dict[int, list[int]] = {}
    rng = random.Random(4)
    for lane in range(20):
        step = {other: rng.randrange(97) for other in texts if rng.random() < 0.7}
        for other, token in step.items():
            texts[other].append(token)
        texts[lane] = prompt(lane, rng.randint(1, 90))
        count = len(step) + 1
        result = runner.launch(book.step(step, [book.chunk(lane, texts[lane])], logits=range(count))).wait()
        assert result.logits is not None
        assert result.seconds > 0
        for other, row in zip([*step, lane], result.logits, strict=True):
            expect_logits(row, oracle, texts[other])


@pytest.mark.parametrize("late", [False, True])
def test_steps_with_chunks_are_captured_at_the_start_or_when_they_come_again(
    runner: CudaRunner, oracle: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    assert len(runner._chunks._graphs) == len(runner._chunks._rooms)
    if late:
        monkeypatch.setattr(runner._chunks, "_graphs", {})
        monkeypatch.setattr(runner._chunks, "_seen", set())
    book = Book(runner, 8)
    texts = {lane: prompt(lane, 10 + lane) for lane in range(3)}
    runner.launch(book.step({}, [book.chunk(lane, text) for lane, text in texts.items()])).wait()
    captured = len(runner._chunks._graphs)
    # Of one shape, but never the same lengths, and filled up differently.
    for turn, lanes in enumerate([[0, 1, 2], [2], [1, 0], [0, 1]]):
        new = {4 + 2 * turn: prompt(turn, 150 + 9 * turn), 5 + 2 * turn: prompt(turn + 9, 20 - turn)}
        for lane in lanes:
            texts[lane].append(turn)
        chunks = [book.chunk(lane, text) for lane, text in new.items()]
        step = book.step(dict.fromkeys(lanes, turn), chunks, logits=range(len(lanes) + 2))
        result = runner.launch(step).wait()
        assert len(runner._chunks._graphs) == captured + (late and turn > 0)
        assert result.logits is not None
        for text, row in zip([*(texts[lane] for lane in lanes), *new.values()], result.logits, strict=True):
            expect_logits(row, oracle, text)


SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, uniform=0.3),
    SamplingParams(temperature=1.3, uniform=0.9, top_k=5),
    SamplingParams(temperature=1.3, uniform=0.6, top_p=0.7, logprob=True),
    SamplingParams(temperature=1.3, uniform=0.99, min_p=0.2),
    SamplingParams(temperature=2.0, uniform=0.5, mask=bytes([0, 0b1010, 255] + [0] * 10)),
    SamplingParams(mask=bytes([0, 0b1010, 0] + [0] * 10), logprob=True),
]


@pytest.mark.parametrize("rows", [[0], [1], [0, 1], [1, 2, 3, 4], [0, 5], [6], [0, 1, 2, 3, 4, 5, 6], [3] * 40])
@pytest.mark.parametrize("chunks", [False, True])
def test_draws_are_those_of_the_host(runner: CudaRunner, rows: list[int], chunks: bool) -> None:
    book = Book(runner)
    texts = {lane: prompt(lane, 7) for lane in range(len(rows))}
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


def test_no_step_compiles_a_kernel(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are compiled at the start, whatever a step asks for: to compile takes seconds."""

    def compiles(function: JITFunction, *arguments: object, **options: object) -> None:
        raise AssertionError(f"{function.__name__} is compiled")

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    book = Book(runner, 5)
    for lane, sampling in enumerate(SAMPLINGS):
        for count in (1, 3, 40, 200):
            book.drop(lane)
            runner.launch(book.step({}, [book.chunk(lane, prompt(lane, count))], [sampling], [0])).wait()
        for lanes in ([lane], list(range(lane + 1))):
            runner.launch(book.step(dict.fromkeys(lanes, LAST_DRAWN), (), [sampling] * len(lanes))).wait()
        step = book.step({0: 1}, [book.chunk(20 + lane, [5, 6])], [sampling] * 2)
        step.copies = [(500, 501)] if lane % 2 else [(500, 501), (501, 502)]
        runner.launch(step).wait()
    # More sequences than any common shape has room for, with short chunks.
    runner.launch(book.step({}, [book.chunk(lane, [1, 2]) for lane in range(40, 86)])).wait()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_launches_never_wait_for_the_device(runner: CudaRunner) -> None:
    book = Book(runner)
    chunks = [book.chunk(lane, prompt(lane, 20)) for lane in range(5)]
    steps = [book.step({}, chunks, logits=[1])]
    sampled = [SAMPLINGS[1]] * 5
    for _ in range(2):
        steps += [book.step(dict.fromkeys(range(5), LAST_DRAWN), (), sampled)]
        batch = book.step(dict.fromkeys(range(5), LAST_DRAWN), (), [SAMPLINGS[6]] * 5, [2])
        steps += [StepBatch(batch.decodes, [], batch.draws, batch.logits, copies=[(500, 501)])]
    for step in steps:  # so that graphs are captured and kernels compiled
        runner.launch(step).wait()
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = [runner.launch(step) for step in steps[:RING]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step in launched:
        step.wait()


def test_a_graph_captured_behind_steps_in_flight(runner: CudaRunner, oracle: transformers.PreTrainedModel) -> None:
    book = Book(runner)
    text = prompt(5, 9)
    sampling = SamplingParams(logprob=True, mask=b"\xff" * 13, temperature=1e-8)
    launched = [runner.launch(book.step({}, [book.chunk(0, text)]))]
    launched += [runner.launch(book.step({0: LAST_DRAWN})), runner.launch(book.step({0: LAST_DRAWN}, (), [sampling]))]
    launched += [runner.launch(book.step({0: LAST_DRAWN}))]
    for step in launched:
        token = int(step.wait().tokens[0])
        assert token == int(oracle_logits(oracle, text)[-1].argmax())
        text.append(token)


@pytest.mark.parametrize("pairs", [[(0, 5), (1, 6), (0, 7)], [(0, 1), (1, 2), (2, 0)], [(4, 5), (3, 4)]])
def test_copies_are_read_before_any_is_written(runner: CudaRunner, pairs: list[tuple[int, int]]) -> None:
    cache = runner._pass.cache
    with torch.inference_mode():
        cache.copy_(torch.arange(cache.numel(), device=CUDA).reshape(cache.shape))
        expected = cache.clone()
        for source, target in pairs:
            expected[:, :, target] = cache[:, :, source]
        torch.cuda.synchronize()
    book = Book(runner)
    book.free = [20]
    batch = book.step({0: 3})
    runner.launch(StepBatch(batch.decodes, [], batch.draws, copies=pairs)).wait()
    others = [page for page in range(runner.pages) if page != 20]
    assert torch.equal(cache[:, :, others], expected[:, :, others])


def test_memory_stays_within_the_estimate_and_long_contexts_agree() -> None:
    config = dataclasses.replace(SHAPES["smollm2-135m"], context_length=20_000)
    with torch.inference_mode():
        model = LlamaModel(config, random_weights(config, dtype=torch.bfloat16, device=CUDA))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    runner = CudaRunner(model, pages=1600, lanes=1024, token_budget=8192)
    taken = before - torch.cuda.mem_get_info()[0] - runner._pass.cache.nbytes
    assert taken <= activation_bytes(config, torch.bfloat16, 8192, 1024)
    # A long row alone and beside short ones: decoding (split contexts) against a chunk of the same token.
    with torch.inference_mode():
        runner._pass.cache.fill_(float("nan"))
        torch.cuda.synchronize()
    book = Book(runner)
    rng = np.random.default_rng(0)
    for lane, count in enumerate((18_000, 4500, 100, 1)):
        tokens = rng.integers(0, config.vocab_size, count).tolist()
        for at in range(0, count, 8192):
            runner.launch(book.step({}, [book.chunk(lane, tokens[at : at + 8192])])).wait()
    for lanes in ([0], [0, 2], [0, 1, 2, 3], [1, 2, 3], [2, 3]):
        by_decode = runner.launch(book.step(dict.fromkeys(lanes, 7), logits=range(len(lanes)))).wait().logits
        for lane in lanes:
            book.lengths[lane] -= 1  # once more, in its place
        chunks = [book.chunk(lane, [7]) for lane in lanes]
        by_chunk = runner.launch(book.step({}, chunks, logits=range(len(lanes)))).wait().logits
        assert by_decode is not None
        assert by_chunk is not None
        error = np.linalg.norm(by_decode - by_chunk, axis=1) / np.linalg.norm(by_chunk, axis=1)
        assert (error < 0.03).all(), error
    runner.close()


@pytest.mark.parametrize("shape", ["smollm2-135m", "llama-3.2-1b"])
def test_bfloat16_logits_are_near_those_of_float64(tmp_path: Path, shape: str) -> None:
    """Prompt chunks and decoding, alone and in a batch, against transformers in float64 with the same weights.

    Within 1%, or where the shape's own roundings are more than that (all products of rows and weights take rows
    in bfloat16), nearer than transformers in bfloat16.
    """
    write_shape(tmp_path, shape)
    config = dataclasses.replace(SHAPES[shape], context_length=1024)
    with torch.inference_mode():
        weights = random_weights(config, dtype=torch.bfloat16, device=CUDA)
        definition = transformers.AutoConfig.from_pretrained(tmp_path)
        with CUDA:
            reference = transformers.LlamaForCausalLM(definition).double().eval()
        missing = reference.load_state_dict({name: w.double() for name, w in weights.items()}, strict=False)
        assert set(missing.missing_keys) <= {"lm_head.weight"}, "tied to the embedding"
        assert not missing.unexpected_keys
        rng = np.random.default_rng(1)
        texts = {lane: rng.integers(0, config.vocab_size, 5 + 37 * lane).tolist() for lane in range(9)}
        expected = np.stack(
            [reference(torch.tensor([[*text, 7]], device=CUDA)).logits[0, -2:].cpu().numpy() for text in texts.values()]
        )
        with CUDA:
            plain = transformers.AutoModelForCausalLM.from_config(definition, dtype=torch.bfloat16).eval()
        plain.load_state_dict(weights, strict=False)
        usual = np.stack(
            [plain(torch.tensor([[*text, 7]], device=CUDA)).logits[0, -1].float().cpu() for text in texts.values()]
        )
        worst = np.linalg.norm(usual - expected[:, 1], axis=1) / np.linalg.norm(expected[:, 1], axis=1)
        print(f"{shape}, transformers in bfloat16: relative errors {worst.min():.4f} to {worst.max():.4f}")
        del reference, plain
        runner = CudaRunner(LlamaModel(config, weights), pages=600, lanes=64, token_budget=2048)
    book = Book(runner)
    by_chunk = runner.launch(book.step({}, [book.chunk(lane, text) for lane, text in texts.items()], logits=range(9)))
    together = runner.launch(book.step(dict.fromkeys(texts, 7), logits=range(9)))
    found = {"chunks": by_chunk.wait().logits, "together": together.wait().logits}
    for lane in texts:
        book.lengths[lane] -= 1  # once more, in its place
    alone = [runner.launch(book.step({lane: 7}, logits=[0])).wait().logits for lane in texts]
    found["alone"] = np.concatenate([logits for logits in alone if logits is not None])
    for how, logits in found.items():
        assert logits is not None
        rows = expected[:, 0 if how == "chunks" else 1]
        error = np.linalg.norm(logits - rows, axis=1) / np.linalg.norm(rows, axis=1)
        print(f"{shape}, {how}: relative errors {error.min():.4f} to {error.max():.4f}")
        assert (error < 1e-2).all() or error.mean() < worst.mean(), how
    runner.close()
