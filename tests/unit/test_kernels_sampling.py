"""The device's sampler against a float64 oracle and the CPU's sampler, through Triton's interpreter.

On a GPU, at the sizes of real vocabularies: tests/gpu/test_sampling.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import tests.interpreter  # noqa: F401
from realm.engine.kernels.sampling import DeviceDraws, DeviceSampler
from realm.engine.sampling import draw
from realm.messages import SamplingParams
from tests.sampling_cases import Oracle, logprob, mask_of, sampled


def check(logits: np.ndarray, params: list[SamplingParams], tile: int, sample: int = 32) -> None:
    """Every row is drawn as the oracle does, up to rounding, and as the CPU's sampler does, up to the same."""
    vocab = logits.shape[1]
    tokens, logprobs = sampled(
        DeviceSampler(vocab, len(params), "cpu", tile=tile, sample=sample), torch.from_numpy(logits), params
    )
    on_cpu = draw(torch.from_numpy(logits), params, [None] * len(params)).tokens
    for row, p in enumerate(params):
        oracle = Oracle(logits[row], p)
        assert oracle.allows(tokens[row]), (p, tokens[row], oracle.token())
        assert tokens[row] == on_cpu[row] or oracle.allows(on_cpu[row]), (p, tokens[row], on_cpu[row])
        assert logprobs[row] == pytest.approx(logprob(logits[row], tokens[row]), rel=1e-6, abs=2e-5)


KINDS = [
    SamplingParams(0.0),
    SamplingParams(1.0),
    SamplingParams(1e-6, top_k=3, top_p=0.5),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(1.3, top_k=5),
    SamplingParams(2.5, top_k=40, top_p=0.8),
    SamplingParams(100.0, top_p=0.95, min_p=0.9),
    SamplingParams(100.0, top_k=200, top_p=0.001),
    SamplingParams(1.0, min_p=0.1),
    SamplingParams(1.0, top_k=1),
    SamplingParams(5.0, top_k=150, top_p=0.99),
    SamplingParams(1.0, top_k=10_000, top_p=1.0),
]


def with_uniform(p: SamplingParams, uniform: float, mask: bytes | None = None) -> SamplingParams:
    return SamplingParams(p.temperature, p.top_k, p.top_p, p.min_p, uniform=uniform, mask=mask, logprob=True)


@pytest.mark.parametrize("step", [0.0, 0.25, 1.0], ids=["no ties", "some ties", "many ties"])
@pytest.mark.parametrize(("vocab", "tile"), [(301, 128), (77, 128), (999, 256)])
def test_every_kind_of_row_in_one_batch(vocab: int, tile: int, step: float) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 3, (len(KINDS), vocab)).astype(np.float32)
    if step:
        logits = (np.round(logits / step) * step).astype(np.float32)
    check(logits, [with_uniform(p, float(rng.random())) for p in KINDS], tile)


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.5, 100.0, 1e6]),
    top_k=st.sampled_from([0, 1, 5, 60, 129, 4_000_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-3, 1e-30, 1 - 2**-24]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)


# The interpreter takes a second an example, so a failure is not shrunk.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example([SamplingParams(100.0, 60, 0.001, uniform=0.75)], 0, 130, 0.5, False, 32)
@example([SamplingParams(1.0, 5, 0.5, uniform=1 - 2**-53)], 1, 130, 50.0, True, 32)
@example([SamplingParams(1.0, top_p=0.95, uniform=0.99)] * 4, 5, 130, 3.0, True, 1)
@example([SamplingParams(1.0, top_p=0.5, uniform=0.99)] * 4, 6, 130, 0.5, False, 2)
@given(
    st.lists(params, min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 2, 17, 130]),
    st.sampled_from([1e-20, 0.5, 3.0, 50.0, 1e30]),
    st.booleans(),
    st.sampled_from([1, 4, 32, 256]),
)
def test_any_row(rows: list[SamplingParams], seed: int, vocab: int, spread: float, masked: bool, sample: int) -> None:
    """However few tokens of it the first guess is made from."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(0, 1, (len(rows), vocab)) * spread).astype(np.float32)
    logits[:, rng.random(vocab) < 0.3] = logits[:, :1]
    mask = mask_of(rng.integers(0, vocab, 9).tolist(), vocab) if masked else None
    check(logits, [with_uniform(p, p.uniform, mask) for p in rows], 64, sample)


@pytest.mark.parametrize(
    "p",
    [SamplingParams(1.0), SamplingParams(0.7, top_k=4), SamplingParams(1.5, top_p=0.8), SamplingParams(1, min_p=0.2)],
)
def test_each_token_has_exactly_its_share_of_the_draws(p: SamplingParams) -> None:
    """Just inside both ends of each token's part of [0, 1) that token is drawn, so the parts are the shares."""
    logits = np.random.default_rng(3).normal(0, 1.5, 11).astype(np.float32)
    logits[7] = logits[2]
    probabilities = Oracle(logits, p).probabilities()
    ends = np.cumsum(probabilities)
    rows, expected = [], []
    for token in np.flatnonzero(probabilities):
        for uniform in (ends[token] - probabilities[token] + 1e-5, ends[token] - 1e-5):
            rows.append(with_uniform(p, float(uniform)))
            expected.append(int(token))
    sampler = DeviceSampler(len(logits), len(rows), "cpu", tile=4)
    tokens, _ = sampled(sampler, torch.from_numpy(logits).expand(len(rows), -1), rows)
    assert tokens == expected


def test_of_equal_tokens_the_first_are_kept_across_tiles() -> None:
    """All logits are equal, so sums are exact and the kept set is known to the token."""
    vocab, tile = 100, 16
    cases = [  # (params, tokens that are kept)
        (SamplingParams(1.0, top_k=33), 33),
        (SamplingParams(1.0, top_p=0.5), 50),
        (SamplingParams(1.0, top_p=0.001), 1),
        (SamplingParams(1.0, top_k=40, top_p=0.25), 10),
        (SamplingParams(1.0, top_k=99, min_p=1.0), 99),
        (SamplingParams(1.0), 100),
    ]
    rows, expected = [], []
    for p, kept in cases:
        for token in (0, kept // 2, kept - 1):
            rows.append(with_uniform(p, (token + 0.5) / kept))
            expected.append(token)
    tokens, _ = sampled(DeviceSampler(vocab, len(rows), "cpu", tile=tile), torch.full((len(rows), vocab), -3.25), rows)
    assert tokens == expected


def test_ties_at_the_cut_are_kept_by_id_whatever_is_above() -> None:
    logits = np.zeros((1, 60), np.float32)
    logits[0, [50, 10]] = 5.0
    # Kept: 10 and 50, then of the equal ones 0, 1 and 2.
    weights = np.zeros(60)
    weights[[0, 1, 2]], weights[[10, 50]] = 1, np.exp(5.0)
    ends = np.cumsum(weights) / weights.sum()
    wanted = [0, 1, 2, 10, 50]
    rows = [with_uniform(SamplingParams(1.0, top_k=5), float(ends[token]) - 1e-4) for token in wanted]
    sampler = DeviceSampler(60, len(rows), "cpu", tile=8)
    tokens, _ = sampled(sampler, torch.from_numpy(logits).expand(len(rows), -1), rows)
    assert tokens == wanted


def test_masks_allow_what_they_say() -> None:
    vocab = 70
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (1, vocab)).astype(np.float32))
    only = [0, 31, 32, 63, 64, 69]
    rows = [
        SamplingParams(temperature, top_p=top_p, uniform=0.999, mask=mask_of([token], vocab))
        for token in only
        for temperature, top_p in ((0.0, 1.0), (1.0, 0.9))
    ]
    sampler = DeviceSampler(vocab, len(rows), "cpu", tile=32)
    tokens, logprobs = sampled(sampler, logits.expand(len(rows), -1), rows)
    assert tokens == [token for token in only for _ in range(2)]
    # The log-probability is the model's own: the mask has no part in it.
    assert logprobs == pytest.approx([logprob(logits[0].numpy(), token) for token in tokens], abs=1e-5)


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_a_top_k_above_what_the_mask_leaves_takes_all_of_it(top_p: float) -> None:
    vocab = 150
    logits = np.random.default_rng(2).normal(0, 2, (4, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2] = 1
    mask = mask_of([3, 40, 41, 70, 99, 148], vocab)
    check(logits, [SamplingParams(1.0, 100, top_p, uniform=0.7, mask=mask, logprob=True)] * 4, 64)


@pytest.mark.parametrize("top_k", [60, 150, 190])
def test_top_p_takes_its_share_of_what_top_k_leaves_however_far_apart_they_cut(top_k: int) -> None:
    logits = np.linspace(0, -8, 200, dtype=np.float32)[np.random.default_rng(7).permutation(200)]
    rows = [SamplingParams(4.0, top_k, top_p, uniform=1 - 1e-4, logprob=True) for top_p in (0.1, 0.3, 0.6, 0.9)]
    check(np.tile(logits, (len(rows), 1)), rows, 64)


def test_a_row_does_not_depend_on_its_batch_or_on_the_kernels_of_its_batch() -> None:
    vocab = 200
    logits = torch.from_numpy(np.random.default_rng(9).normal(0, 2, (4, vocab)).astype(np.float32))
    rows = [
        SamplingParams(1.0, uniform=0.37),
        SamplingParams(0.0),
        SamplingParams(0.8, uniform=0.9),
        SamplingParams(0.0),
    ]
    sampler = DeviceSampler(vocab, 6, "cpu", tile=64)
    together, logprobs = sampled(sampler, logits, rows)
    plain, _ = sampled(sampler, logits, rows, filtered=False)
    alone = [sampled(sampler, logits[i : i + 1], rows[i : i + 1], filtered=False)[0][0] for i in range(4)]
    assert together == plain == alone
    assert sampled(sampler, logits, rows)[1] == logprobs


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = torch.zeros(3, 50)
    logits[1, [40, 17]] = 1.0
    logits[2, :] = -float("inf")
    logits[2, 49] = -1e30
    assert sampled(DeviceSampler(50, 3, "cpu", tile=16), logits, [SamplingParams()] * 3)[0] == [0, 17, 49]


def test_bfloat16_logits_and_strided_rows() -> None:
    rng = np.random.default_rng(4)
    wide = torch.from_numpy(rng.normal(0, 3, (4, 128)).astype(np.float32)).bfloat16()
    logits = wide[:, :90]
    rows = [with_uniform(p, float(rng.random())) for p in KINDS[:4]]
    tokens, logprobs = sampled(DeviceSampler(90, 4, "cpu", tile=32), logits, rows)
    for row, p in enumerate(rows):
        values = logits[row].float().numpy()
        assert Oracle(values, p).allows(tokens[row])
        assert logprobs[row] == pytest.approx(logprob(values, tokens[row]), abs=2e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_still_give_a_token(value: float) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    logits[:2] = value
    logits[2:, 20:45] = value
    rows = [SamplingParams(1.0, 5, 0.9, uniform=0.999), SamplingParams(0.0)] * 2
    with np.errstate(all="ignore"):
        tokens, _ = sampled(DeviceSampler(50, 4, "cpu", tile=16), logits, rows)
    assert all(0 <= token < 50 for token in tokens)


def test_what_does_not_fit_is_refused() -> None:
    sampler = DeviceSampler(50, 2, "cpu", tile=16)
    draws = DeviceDraws(*[torch.zeros(3)] * 5)
    tokens = torch.zeros(3, dtype=torch.int32)

    def sample(logits: torch.Tensor, n: int, *, masked: bool = False, logprobs: bool = False) -> None:
        sampler.sample(logits, n, draws, tokens, greedy=True, filtered=False, masked=masked, logprobs=logprobs)

    for logits, n in (
        (torch.zeros(3, 50), 3),
        (torch.zeros(1, 50), 2),
        (torch.zeros(2, 49), 2),
        (torch.zeros(2, 50), -1),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            sample(logits, n)
    for flags in ({"masked": True}, {"logprobs": True}):
        with pytest.raises(ValueError, match="missing"):
            sample(torch.zeros(2, 50), 2, **flags)
    with pytest.raises(ValueError, match="powers of two"):
        DeviceSampler(50, 2, "cpu", tile=24)
