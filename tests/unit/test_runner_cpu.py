"""The CPU runner by itself: what it computes, in which order, and how its steps end."""

from __future__ import annotations

import gc
import logging
import random
import select
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.engine.attention.sdpa import ChunkRows, KvCache, PagedAttention
from realm.engine.batch import LAST_DRAWN, Chunk, Draws, StepBatch
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.runners.cpu import CpuRunner
from realm.engine.sampling import draws_of
from realm.messages import SamplingParams
from realm.models.config import ModelConfig
from realm.models.llama import LlamaModel
from realm.models.loading import load_weights
from tests.runner_steps import GREEDY, LANES, PAGES, SPARE, WIDTH, Gate, chunk, step
from tests.tiny import make_model, oracle_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    return make_model(folder)


@pytest.fixture
def model(folder: Path, oracle: transformers.PreTrainedModel) -> LlamaModel:
    config = ModelConfig.load(folder)
    weights = load_weights(folder, config, dtype=torch.float32, device=torch.device("cpu"), progress=None)
    with torch.inference_mode():
        return LlamaModel(config, weights)


@pytest.fixture(params=[False, True], ids=["inline", "threaded"])
def runner(request: pytest.FixtureRequest, model: LlamaModel) -> Iterator[CpuRunner]:
    runner = CpuRunner(model, pages=PAGES, lanes=LANES, threaded=request.param)
    yield runner
    runner.close()


@pytest.fixture
def threaded(model: LlamaModel) -> Iterator[CpuRunner]:
    runner = CpuRunner(model, pages=PAGES, lanes=LANES, threaded=True)
    yield runner
    runner.close()


def readable(runner: CpuRunner) -> bool:
    return bool(select.select([runner.fileno()], [], [], 0)[0])


# --- what is computed -----------------------------------------------------------------------------


def test_mixed_steps_equal_transformers(runner: CpuRunner, oracle: transformers.PreTrainedModel) -> None:
    """Prompts in chunks of any size, one token too, between decoding rows of any length."""
    rng = random.Random(4)
    texts: list[list[int]] = [[] for _ in range(5)]
    for _ in range(25):
        rows: dict[int, tuple[int, int]] = {}
        chunks: list[Chunk] = []
        for lane in rng.sample(range(5), rng.randint(1, 5)):
            start, count = len(texts[lane]), rng.choice([1, 1, 1, 2, 16, 21])
            new = [rng.randrange(97) for _ in range(count)]
            texts[lane] += new
            if count == 1 and start and rng.random() < 0.7:
                rows[lane] = (new[0], start)
            else:
                chunks.append(chunk(new, start, lane, draws=rng.random() < 0.7))
        drawing = [*rows, *(chunk.lane for chunk in chunks if chunk.draws)]
        wanted = sorted(rng.sample(range(len(drawing)), rng.randint(0, len(drawing))))
        batch = step(rows, *chunks, logits=wanted)
        batch.draws.logprob[::2] = True
        # The core would name new pages that this step does not fill; those cleared here are unused, or new.
        batch.fresh = [lane * WIDTH + len(text) // PAGE_SIZE + 1 for lane, text in enumerate(texts)]
        result = runner.launch(batch).wait()
        assert result.tokens.dtype == np.int32 and len(result.tokens) == len(drawing)
        theirs = [oracle_logits(oracle, texts[lane])[-1] for lane in drawing]
        assert result.tokens.tolist() == [int(row.argmax()) for row in theirs]
        for at, (value, row, token) in enumerate(zip(result.logprobs, theirs, result.tokens, strict=True)):
            want = row.log_softmax(-1)[token].item() if at % 2 == 0 else float("nan")
            assert value == pytest.approx(want, abs=1e-3, nan_ok=True)
        if not wanted:
            assert result.logits is None
        else:
            ours = torch.from_numpy(np.array(result.logits))
            torch.testing.assert_close(ours, torch.stack([theirs[at] for at in wanted]), rtol=2e-4, atol=2e-4)


def test_a_step_without_outputs_only_fills_pages(runner: CpuRunner, oracle: transformers.PreTrainedModel) -> None:
    first = runner.launch(step({}, chunk([5, 6, 7], 0, 1, draws=False))).wait()
    assert (first.tokens.shape, first.logprobs.shape, first.logits) == ((0,), (0,), None)
    (token,) = runner.launch(step({1: (8, 3)})).wait().tokens
    assert token == int(oracle_logits(oracle, [5, 6, 7, 8])[-1].argmax())


def test_steps_run_ahead_of_their_draws(runner: CpuRunner, model: LlamaModel) -> None:
    """Ten steps launched before the first is waited for draw what ten steps one by one draw."""
    prompts = {lane: [lane + 1] * (3 * lane + 1) for lane in range(LANES)}
    lengths = {lane: len(prompt) for lane, prompt in prompts.items()}
    params = [
        SamplingParams(1.5, top_k=lane * 3, top_p=1 - lane / 20, uniform=(lane * 0.37) % 1) for lane in range(LANES)
    ]
    start = step({}, *(chunk(prompt, 0, lane) for lane, prompt in prompts.items()), params=params)

    calm = CpuRunner(model, pages=PAGES, lanes=LANES)
    last = calm.launch(start).wait().tokens.tolist()
    want = [last]
    for number in range(10):
        rows = {lane: (last[lane], lengths[lane] + number) for lane in range(LANES)}
        last = calm.launch(step(rows, params=params)).wait().tokens.tolist()
        want.append(last)
    assert len({tuple(tokens) for tokens in want}) > 1

    launched = [runner.launch(start)]
    for number in range(10):
        # Lanes need not come in order: each finds its own last token.
        rows = {lane: (LAST_DRAWN, lengths[lane] + number) for lane in reversed(range(LANES))}
        launched.append(runner.launch(step(rows, params=params[::-1])))
    got = [ahead.wait().tokens.tolist() for ahead in launched]
    assert got == [want[0], *(tokens[::-1] for tokens in want[1:])]


def test_launched_and_known_tokens_share_a_step(runner: CpuRunner, oracle: transformers.PreTrainedModel) -> None:
    """A lane's last token is what it drew last, not what the last step drew; no lane means not kept."""
    final = LANES - 1
    runner.launch(step({}, chunk([1, 2], 0, final), chunk([3], 0, 1)))
    other = chunk([9, 9, 9], 0, 4)
    other.lane = -1
    runner.launch(step({1: (7, 1)}, other))
    got = runner.launch(step({1: (LAST_DRAWN, 2), final: (LAST_DRAWN, 2)})).wait().tokens.tolist()
    first = int(oracle_logits(oracle, [1, 2])[-1].argmax())
    second = int(oracle_logits(oracle, [3, 7])[-1].argmax())
    assert got == [int(oracle_logits(oracle, text)[-1].argmax()) for text in ([3, 7, second], [1, 2, first])]


def test_pages_are_copied_before_others_are_cleared(runner: CpuRunner, oracle: transformers.PreTrainedModel) -> None:
    text = list(range(20))
    runner.launch(step({}, chunk(text, 0, 2, draws=False)))
    tables = np.full((LANES, WIDTH), -1, np.int32)
    tables[5, :2] = (2 * WIDTH, SPARE)
    batch = step({5: (40, 20)})
    batch.decodes.tables = tables
    batch.copies, batch.fresh = [(2 * WIDTH + 1, SPARE)], [2 * WIDTH + 1]
    assert runner.launch(batch).wait().tokens == int(oracle_logits(oracle, [*text, 40])[-1].argmax())


def test_a_row_that_cannot_be_drawn_fails_alone(runner: CpuRunner, caplog: pytest.LogCaptureFixture) -> None:
    params = [SamplingParams(logprob=True), SamplingParams(0.7, uniform=0.4, logprob=True), GREEDY]
    chunks = [chunk([lane + 1, 3], 0, lane) for lane in range(3)]
    good = runner.launch(step({}, *chunks, params=params)).wait()
    batch = step({}, *chunks, params=params)
    batch.draws.masks = [(1, b"\xff")]  # one byte, for a vocabulary of 97
    with caplog.at_level(logging.ERROR, "realm.engine"):
        bad = runner.launch(batch).wait()
    assert bad.tokens.tolist() == [good.tokens[0], -1, good.tokens[2]]
    np.testing.assert_array_equal(bad.logprobs, [good.logprobs[0], np.nan, np.nan])
    assert "xff" not in caplog.text and "(0.7" in caplog.text.replace("699999988079071", "7")
    # What was launched ahead of it is wasted, but does no harm.
    ahead = runner.launch(step({0: (LAST_DRAWN, 2), 1: (LAST_DRAWN, 2)})).wait().tokens
    assert ahead[0] == runner.launch(step({0: (int(good.tokens[0]), 2)})).wait().tokens[0]


def test_costly_rows_are_named(runner: CpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realm.engine.sampling.CANDIDATES", 8)
    flat = SamplingParams(100.0, top_p=0.99, uniform=0.5)
    rows = [chunk([lane + 1, 3], 0, lane) for lane in range(3)]
    result = runner.launch(step({}, *rows, params=[GREEDY, flat, SamplingParams(1.0)])).wait()
    assert result.flat == [1]
    assert result.seconds > 0


# --- steps and their ends -------------------------------------------------------------------------


@pytest.fixture
def gate(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(model)
    monkeypatch.setattr(model, "hidden", gate)
    yield gate
    gate.open(1000)


def test_a_launch_copies_what_the_core_will_change(gate: Gate, threaded: CpuRunner) -> None:
    def batches() -> list[StepBatch]:
        return [step({}, chunk([1, 2, 3], 0, 0), chunk([4], 0, 1)), step({0: (9, 3), 1: (LAST_DRAWN, 1)})]

    gate.open(2)
    want = [threaded.launch(batch).wait().tokens.tolist() for batch in batches()]
    launched = []
    for batch in batches():
        launched.append(threaded.launch(batch))
        for array in (batch.decodes.tables, batch.decodes.tokens, batch.decodes.lanes, batch.decodes.positions):
            array += 1
        for part in batch.chunks:
            part.tokens += 1
            part.pages.clear()
    gate.open(2)
    assert [ahead.wait().tokens.tolist() for ahead in launched] == want


def test_the_descriptor_is_readable_while_a_done_step_is_not_taken(gate: Gate, threaded: CpuRunner) -> None:
    first, second, third = (threaded.launch(step({}, chunk([1, 2], 0, lane))) for lane in range(3))
    assert not readable(threaded) and not first.done()
    gate.open()
    assert select.select([threaded.fileno()], [], [], 60)[0]
    assert first.done() and not second.done()
    assert first.wait() is first.wait()
    assert not readable(threaded)
    gate.open(2)
    third.wait()
    assert second.done() and readable(threaded), "the second step was not taken"
    second.wait()
    assert not readable(threaded)


def test_an_inline_runner_has_no_descriptor(model: LlamaModel) -> None:
    runner = CpuRunner(model, pages=PAGES, lanes=LANES)
    assert runner.fileno() == -1
    assert runner.launch(step({}, chunk([1, 2], 0, 0))).done()


def test_a_failed_step_raises_where_it_is_taken_and_ends_the_runner(runner: CpuRunner) -> None:
    good = runner.launch(step({}, chunk([1, 2], 0, 0)))
    failing = runner.launch(step({}, chunk([1, 1 << 20], 0, 1)))
    later = runner.launch(step({0: (LAST_DRAWN, 2)}))
    assert len(good.wait().tokens) == 1
    with pytest.raises(IndexError):
        failing.wait()
    with pytest.raises(RuntimeError, match="an earlier step failed: IndexError"):
        later.wait()
    assert failing.done() and later.done()


def test_close_ends_what_is_queued(gate: Gate, threaded: CpuRunner) -> None:
    first, second = (threaded.launch(step({}, chunk([1, 2], 0, lane))) for lane in range(2))
    assert gate.reached.acquire(timeout=60)
    closing = threading.Thread(target=threaded.close)
    closing.start()
    while threaded._device.stopped is None:
        time.sleep(0.001)
    gate.open(2)
    closing.join(60)
    assert not closing.is_alive()
    assert first.done() and len(first.wait().tokens) == 1
    with pytest.raises(RuntimeError, match="closed"):
        second.wait()
    assert threaded.fileno() == -1


def test_close_is_idempotent_and_later_steps_fail(runner: CpuRunner) -> None:
    runner.close()
    runner.close()
    assert "realm-compute" not in [thread.name for thread in threading.enumerate()]
    launched = runner.launch(step({}, chunk([1, 2], 0, 0)))
    with pytest.raises(RuntimeError, match="closed"):
        launched.wait()


def test_a_forgotten_runner_ends_its_thread(model: LlamaModel) -> None:
    before = threading.active_count()
    runner = CpuRunner(model, pages=PAGES, lanes=LANES, threaded=True)
    runner.launch(step({}, chunk([1, 2], 0, 0))).wait()
    assert threading.active_count() == before + 1
    del runner
    gc.collect()
    assert threading.active_count() == before


# --- attention ------------------------------------------------------------------------------------


def attended(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[heads, dim] of one query over [length, kv_heads, dim], float64."""
    heads, dim = query.shape
    share = heads // keys.shape[1]
    out = np.empty_like(query)
    for head in range(heads):
        scores = keys[:, head // share] @ query[head] / np.sqrt(dim)
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[:, head // share]
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 150), max_size=6),
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), max_size=3),
    st.sampled_from([(2, 1), (2, 3), (1, 4), (3, 1)]),
    st.integers(0, 2**32 - 1),
)
def test_attention_reads_its_own_pages_only(
    lengths: list[int], chunks: list[tuple[int, int]], shape: tuple[int, int], seed: int
) -> None:
    """Against float64; every page that nobody cleared or wrote holds NaN."""
    if not lengths and not chunks:
        return
    kv_heads, share = shape
    heads, dim = kv_heads * share, 8
    rng = np.random.default_rng(seed)
    cache = KvCache(1, 120, kv_heads, dim, torch.float32, torch.device("cpu"))
    cache.layers[0][:, :, : cache.empty] = float("nan")
    free = rng.permutation(120).tolist()
    spans = [(length - 1, length) for length in sorted(lengths)] + [(start, start + count) for start, count in chunks]
    tables = [[free.pop() for _ in range(-(-length // PAGE_SIZE))] for _, length in spans]
    cache.clear([page for table in tables for page in table])
    texts = [rng.normal(size=(2, length, kv_heads, dim)) for _, length in spans]
    for (start, _), table, text in zip(spans, tables, texts, strict=True):
        for position in range(start):
            page, at = table[position // PAGE_SIZE], position % PAGE_SIZE
            cache.layers[0][:, :, page, at] = torch.from_numpy(text[:, position]).float()
    width = max([len(table) for table in tables[: len(lengths)]], default=0)
    padded = np.full((len(lengths), width), 119, np.int64)  # what lies behind a row's pages is not read
    for row, table in enumerate(tables[: len(lengths)]):
        padded[row, : len(table)] = table
    attention = PagedAttention(
        cache,
        np.array(sorted(lengths), np.int64),
        padded,
        [
            ChunkRows(start, end, np.array(table, np.int64))
            for (start, end), table in zip(spans[len(lengths) :], tables[len(lengths) :], strict=True)
        ],
        torch.float32,
    )
    assert attention.positions.tolist() == [at for start, end in spans for at in range(start, end)]
    new = np.concatenate([text[:, start:] for (start, _), text in zip(spans, texts, strict=True)], axis=1)
    query = rng.normal(size=(new.shape[1], heads, dim))
    got = attention(0, *(torch.from_numpy(part).float() for part in (query, new[0], new[1])))
    rows = [(text, at) for (start, end), text in zip(spans, texts, strict=True) for at in range(start, end)]
    want = [attended(query[row], text[0, : at + 1], text[1, : at + 1]) for row, (text, at) in enumerate(rows)]
    np.testing.assert_allclose(got.numpy(), np.stack(want).reshape(len(rows), -1), rtol=1e-4, atol=1e-5)


def test_draws_name_their_variant() -> None:
    """The flags by which a device picks its kernels."""
    plain = draws_of([GREEDY, SamplingParams(0.5)])
    assert not plain.greedy and not plain.filtered
    assert draws_of([GREEDY, GREEDY]).greedy
    for p in (SamplingParams(1.0, top_k=3), SamplingParams(1.0, top_p=0.5), SamplingParams(1.0, min_p=0.1)):
        assert draws_of([GREEDY, p]).filtered
    assert isinstance(plain, Draws)
