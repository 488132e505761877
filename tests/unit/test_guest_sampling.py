"""The reference sampler, the repeatable draws, and a guest's own view of its sequences."""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realm.guests.draws import mix, random_bits, stream_key, uniform
from realm.guests.sampling_reference import draw_token, filtered_probabilities, log_probabilities, most_likely
from realm.guests.sequences import GuestSequence
from realm.messages import SamplingParams

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], dtype=np.float64)).astype(np.float32)


def kept(params: SamplingParams, logits: np.ndarray = LOGITS) -> list[int]:  # type: ignore[type-arg]
    return np.flatnonzero(filtered_probabilities(logits.astype(np.float64), params)).tolist()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(1.0), [0, 1, 2, 3, 4]),
        (SamplingParams(1.0, top_k=2), [1, 3]),
        (SamplingParams(1.0, top_k=99), [0, 1, 2, 3, 4]),
        (SamplingParams(1.0, top_p=0.3), [1]),
        (SamplingParams(1.0, top_p=0.41), [1, 3]),
        (SamplingParams(1.0, top_p=0.8), [1, 3, 4]),
        (SamplingParams(1.0, min_p=0.49), [1, 3, 4]),
        (SamplingParams(1.0, min_p=1.0), [1]),
        (SamplingParams(1.0, top_k=3, top_p=0.5), [1, 3]),
        (SamplingParams(1.0, top_p=1e-9), [1]),
    ],
)
def test_filters(params: SamplingParams, expected: list[int]) -> None:
    assert kept(params) == expected


def test_equal_tokens_are_kept_by_id() -> None:
    logits = np.zeros(6, dtype=np.float32)
    assert kept(SamplingParams(1.0, top_k=2), logits) == [0, 1]
    assert kept(SamplingParams(1.0, top_p=0.34), logits) == [0, 1, 2]


@pytest.mark.parametrize(
    ("draw", "token"), [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.4999, 1), (0.501, 2), (0.551, 3), (1 - 2**-53, 4)]
)
def test_the_draw_is_an_inverse_cdf_in_vocabulary_order(draw: float, token: int) -> None:
    assert draw_token(LOGITS, SamplingParams(1.0, uniform=draw))[0] == token


def test_greedy_takes_the_lowest_of_equals_and_obeys_mask_bias_and_penalty() -> None:
    flat = np.zeros(5, dtype=np.float32)
    assert draw_token(flat, SamplingParams())[0] == 0
    assert draw_token(flat, SamplingParams(mask=bytes([0b11000])))[0] == 3
    bias = SamplingParams(bias_tokens=array("I", [2]).tobytes(), bias_values=array("f", [0.5]).tobytes())
    assert draw_token(flat, bias)[0] == 2
    tall = np.array([1.0, 2.0, 1.5], dtype=np.float32)
    assert draw_token(tall, SamplingParams(repetition_penalty=2.0), np.array([1]))[0] == 2
    with pytest.raises(ValueError, match="no token"):
        draw_token(flat, SamplingParams(mask=b"\0"))


def test_log_probabilities_are_the_models_own() -> None:
    token, logprob = draw_token(LOGITS, SamplingParams(temperature=5.0, uniform=0.2, logprob=True))
    assert logprob == pytest.approx(float(log_probabilities(LOGITS, np.array([token]))[0]))
    assert np.exp(log_probabilities(LOGITS, np.arange(5))).sum() == pytest.approx(1.0)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, -3.0]), min_size=1, max_size=40), st.integers(0, 45))
def test_most_likely_is_a_stable_sort(values: list[float], count: int) -> None:
    logits = np.array(values, dtype=np.float32)
    tokens, logprobs = most_likely(logits, count)
    assert tokens.tolist() == sorted(range(len(values)), key=lambda t: (-values[t], t))[:count]
    assert len(logprobs) == len(tokens)


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    values = [uniform(stream_key(seed, ordinal), n) for seed in range(5) for ordinal in range(20) for n in range(100)]
    assert all(0 <= v < 1 for v in values)
    assert len(set(values)) == len(values)
    buckets = Counter(int(v * 10) for v in values)
    assert all(850 < buckets[b] < 1150 for b in range(10))
    assert len({mix(n) for n in range(1000)}) == 1000
    assert all(0 <= random_bits(2**64 - 1, n) < 2**63 for n in range(50))


@given(st.lists(st.tuples(st.sampled_from(["append", "fork", "truncate"]), st.integers(0, 9)), max_size=30))
def test_sequences_know_their_tokens(actions: list[tuple[str, int]]) -> None:
    sequences = [(GuestSequence(1, 7, 1), [])]
    for number, (action, value) in enumerate(actions):
        sequence, model = sequences[value % len(sequences)]
        if action == "append":
            tokens = [number * 10 + at for at in range(value + 1)]
            sequence.append(array("I", tokens).tobytes())
            model.extend(tokens)
        elif action == "fork":
            sequences.append((sequence.fork(number + 2, 7, number + 2), list(model)))
        else:
            length = min(len(model), value)
            sequence.truncate(length)
            del model[length:]
    for sequence, model in sequences:
        assert sequence.length == len(model)
        assert list(array("I", sequence.tokens())) == model


def test_an_opened_sequence_has_tokens_that_are_not_known() -> None:
    sequence = GuestSequence(1, 7, 1)
    sequence.length = sequence.unknown = 10
    sequence.append(array("I", [1, 2, 3]).tobytes())
    fork = sequence.fork(2, 7, 2)
    fork.truncate(12)
    assert (fork.unknown, list(array("I", fork.tokens()))) == (10, [1, 2])
    fork.truncate(4)
    assert (fork.length, fork.unknown, fork.tokens()) == (4, 4, b"")
    assert list(array("I", sequence.tokens())) == [1, 2, 3]
