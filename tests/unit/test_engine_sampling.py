"""The tensor sampler against a float64 reference that does the obvious thing, one row at a time."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm.engine.sampling import draw, draw_batch, draws_of, taken
from realm.guests.draws import uniform
from realm.messages import SamplingParams


def distribution(logits: np.ndarray, p: SamplingParams, history: np.ndarray | None = None) -> np.ndarray:
    """Exact probabilities of the next token, as the documentation of SamplingParams says."""
    x = logits.astype(np.float64)
    if p.repetition_penalty != 1 and history is not None:
        for token in set(history.tolist()):
            x[token] = x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
    if p.bias_tokens is not None and p.bias_values is not None:
        for token, value in zip(np.frombuffer(p.bias_tokens, "<u4"), np.frombuffer(p.bias_values, "<f4"), strict=True):
            x[token] += value
    if p.mask is not None:
        allowed = np.unpackbits(np.frombuffer(p.mask, np.uint8), bitorder="little", count=len(x)).astype(bool)
        x[~allowed] = -np.inf
    if p.temperature == 0:
        out = np.zeros(len(x))
        out[int(np.argmax(x))] = 1
        return out
    # Order by what the engine sees (float32), so that ties are the same ones.
    x = x.astype(np.float32) / np.float32(p.temperature)
    weights = np.exp((x - x.max()).astype(np.float64))
    order = np.lexsort((np.arange(len(x)), -x))
    if p.top_k:
        weights[order[p.top_k :]] = 0
    if p.top_p < 1:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= np.float32(p.top_p) * weights.sum()]] = 0
    weights[weights < np.float32(p.min_p)] = 0
    return weights / weights.sum()


def expected(probabilities: np.ndarray, uniform: float) -> int:
    return int(np.searchsorted(np.cumsum(probabilities), uniform * np.cumsum(probabilities)[-1], side="right"))


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5, 100.0]),
    top_k=st.sampled_from([0, 1, 5, 128, 200, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.001]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    uniform=st.floats(0, 1, exclude_max=True),
    logprob=st.booleans(),
)


@settings(max_examples=150, deadline=None)
@example([SamplingParams(100.0, 200, 0.001, uniform=0.75)], 0, 2000, False)
@example([SamplingParams(2.5, 128, uniform=0.25)], 2, 300, True)
@given(
    st.lists(params, min_size=1, max_size=6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([17, 300, 2000]),
    st.booleans(),
)
def test_every_draw_is_the_reference_draw(rows: list[SamplingParams], seed: int, vocab: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (len(rows), vocab)).astype(np.float32)
    if coarse:  # bf16 logits tie often; make them tie always
        logits = np.round(logits)
    history = [rng.integers(0, vocab, 9).astype(np.uint32) for _ in rows]
    drawn = draw(torch.from_numpy(logits), rows, list(history))
    for row, p in enumerate(rows):
        probabilities = distribution(logits[row], p, history[row])
        want = expected(probabilities, p.uniform)
        got = drawn.tokens[row]
        if got != want:  # only where the draw lies on the border of two tokens, to rounding
            edges = np.cumsum(probabilities)
            border = min(abs(p.uniform - edges[max(got, want) - 1]), abs(p.uniform - edges[min(got, want)]))
            assert border < 1e-5, (p, got, want)
        if p.logprob:
            x = logits[row].astype(np.float64)
            assert drawn.logprobs[row] == pytest.approx(x[got] - np.log(np.exp(x - x.max()).sum()) - x.max(), abs=1e-4)
        else:
            assert math.isnan(drawn.logprobs[row])


@pytest.mark.parametrize("p", [SamplingParams(1.0), SamplingParams(0.7, top_k=4), SamplingParams(1.5, top_p=0.8)])
def test_draws_follow_the_distribution(p: SamplingParams) -> None:
    """Evenly spread draws hit each token as often as its probability says."""
    logits = np.random.default_rng(3).normal(0, 2, 40).astype(np.float32)
    count = 20_000
    rows = [SamplingParams(p.temperature, p.top_k, p.top_p, uniform=(i + 0.5) / count) for i in range(count)]
    tokens = draw(torch.from_numpy(logits).expand(count, -1), rows, [None] * count).tokens
    frequency = np.bincount(tokens, minlength=40) / count
    np.testing.assert_allclose(frequency, distribution(logits, p), atol=2 / count)


def test_mask_bias_and_penalty_apply_before_the_draw() -> None:
    logits = torch.zeros(1, 50)
    only = np.packbits(np.arange(50) == 33, bitorder="little").tobytes()
    for temperature in (0.0, 1.0):
        p = SamplingParams(temperature, mask=only, uniform=0.99, top_p=0.9)
        assert draw(logits, [p], [None]).tokens == [33]
    bias = SamplingParams(bias_tokens=np.array([7], "<u4").tobytes(), bias_values=np.array([1], "<f4").tobytes())
    assert draw(logits, [bias], [None]).tokens == [7]
    history = np.array([0, 1, 2], np.uint32)
    assert draw(logits + 1, [SamplingParams(repetition_penalty=2.0)], [history]).tokens == [3]
    assert not logits.any(), "the caller's logits must not change"


def test_a_row_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(np.round(rng.normal(0, 2, (64, 5000)), 1).astype(np.float32))
    rows = [
        SamplingParams(*choice, uniform=float(rng.random()))
        for choice in [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 50, 1.0), (1.0, 0, 0.9), (5.0, 0, 0.99), (1.0, 500, 0.5)]
        * 11
    ][:64]
    together = draw(logits, rows, [None] * 64).tokens
    alone = [draw(logits[i : i + 1], [rows[i]], [None]).tokens[0] for i in range(64)]
    assert together == alone


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(params, st.booleans()), min_size=1, max_size=20),
    st.integers(0, 2**32 - 1),
    st.sampled_from([17, 300, 2000]),
)
def test_arrays_of_parameters_draw_the_same(choices: list[tuple[SamplingParams, bool]], seed: int, vocab: int) -> None:
    """Masked rows between others, in steps larger than what is worked on together."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(np.round(rng.normal(0, 3, (len(choices), vocab)), 1).astype(np.float32))
    masks = [np.packbits(rng.random(vocab) < 0.3, bitorder="little") | np.uint8(1) for _ in choices]
    rows = [
        msgspec.structs.replace(p, repetition_penalty=1.0, mask=mask.tobytes() if masked else None)
        for (p, masked), mask in zip(choices, masks, strict=True)
    ]
    want = draw(logits, rows, [None] * len(rows))
    got = draw_batch(logits, draws_of(rows))
    assert (got.tokens, got.sorted_rows) == (want.tokens, want.sorted_rows)
    np.testing.assert_array_equal(got.logprobs, want.logprobs)
    alone = [draw(logits[row : row + 1], [p], [None]).sorted_rows for row, p in enumerate(rows)]
    assert sorted(got.sorted_rows) == [row for row, costly in enumerate(alone) if costly]
    for row, p in enumerate(rows):
        if p.mask is not None:
            assert masks[row][got.tokens[row] // 8] >> got.tokens[row] % 8 & 1
    some = rng.permutation(len(rows))[:5].tolist()
    assert draw_batch(logits[some], taken(draws_of(rows), some)).tokens == [want.tokens[row] for row in some]


def test_a_numbered_draw_is_the_streams() -> None:
    logits = torch.zeros(1, 1000)
    for number in (0, 1, 77):
        numbered = SamplingParams(1.0, uniform=0.5, key=12345, number=number)
        assert draw(logits, [numbered], [None]).tokens == [int(uniform(12345, number) * 1000)]
    assert draw(logits, [SamplingParams(1.0, uniform=0.5, key=12345)], [None]).tokens == [500]


@pytest.mark.parametrize("vocab", [40, 400])
def test_parameters_that_float32_rounds_to_zero(vocab: int) -> None:
    """The least top-p keeps the best token only, and the least temperature is not greedy on a tie."""
    logits = torch.zeros(1, vocab)
    logits[0, [5, 9]] = 1
    assert draw(logits, [SamplingParams(1.0, top_p=1e-60, uniform=0.9)], [None]).tokens == [5]
    assert draw(logits, [SamplingParams(1e-60, uniform=0.9)], [None]).tokens == [9]
    assert draw(logits, [SamplingParams(1e-60, uniform=0.1)], [None]).tokens == [5]
    assert draw(logits, [SamplingParams(1.0, top_k=(1 << 32) - 1, uniform=0.999)], [None]).tokens == [vocab - 1]
