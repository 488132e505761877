"""The device's sampler on a GPU, at the sizes of real vocabularies, against the oracle of tests/sampling_cases.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realm.engine.kernels.sampling import DeviceDraws, DeviceSampler
from realm.messages import SamplingParams
from tests.sampling_cases import Oracle, device_draws, logprob, mask_of, sampled

CUDA = torch.device("cuda")


def random_rows(rng: np.random.Generator, count: int, *, greedy: bool = True) -> list[SamplingParams]:
    temperatures = [0.0, 1e-6, 0.3, 0.7, 1.0, 2.5, 100.0]
    return [
        SamplingParams(
            temperature=float(rng.choice(temperatures[0 if greedy else 1 :])),
            top_k=int(rng.choice([0, 0, 1, 40, 1000, 100_000])),
            top_p=float(rng.choice([1.0, 1.0, 0.99, 0.9, 0.5, 0.01])),
            min_p=float(rng.choice([0.0, 0.0, 0.05, 0.5])),
            uniform=float(rng.random()),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [128_256, 49_152, 50_257])
@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
def test_draws_are_those_of_the_oracle(vocab: int, dtype: torch.dtype, spread: float) -> None:
    rng = np.random.default_rng(vocab)
    params = random_rows(rng, 48)
    logits = torch.from_numpy(rng.normal(0, spread, (48, vocab)).astype(np.float32)).to(CUDA, dtype)
    tokens, logprobs = sampled(DeviceSampler(vocab, 48, CUDA), logits, params)
    values = logits.float().cpu().numpy()
    exact = 0
    for row, p in enumerate(params):
        oracle = Oracle(values[row], p)
        exact += tokens[row] == oracle.token()
        assert oracle.allows(tokens[row]), (p, tokens[row], oracle.token())
        assert logprobs[row] == pytest.approx(logprob(values[row], tokens[row]), abs=1e-4)
    # Flat rows have borders every 1e-5, so some draws do fall within the rounding of one.
    assert exact >= 36


def hard_rows(vocab: int) -> dict[str, np.ndarray]:
    """Rows that make the search of the cut work: ties, one value, tiny steps, values on both sides of zero."""
    rng = np.random.default_rng(0)
    places = np.arange(vocab)
    return {
        "one value": np.full(vocab, 1.5),
        "zeros of both signs": np.where(places % 3 == 0, -0.0, 0.0),
        "two values": np.where(places % 7 == 0, 1.0, 0.5),
        "neighbouring numbers": np.float32(1.0) + (places % 5) * 2.0**-23,
        "around zero": rng.normal(0, 1, vocab) ** 15,
        "almost zero": rng.normal(0, 1, vocab) * 1e-30,
        "one large": np.where(places == vocab - 1, 60.0, rng.normal(0, 1, vocab)),
        "mostly -inf": np.where(places % 1000 == 3, rng.normal(0, 1, vocab), -np.inf),
        "powers": np.exp2(-(places % 120).astype(np.float64)),
        "huge": rng.normal(0, 1, vocab) * 1e30,
    }


@pytest.mark.parametrize("kind", hard_rows(16))
def test_hard_rows(kind: str) -> None:
    vocab = 100_003
    values = hard_rows(vocab)[kind].astype(np.float32)
    params = random_rows(np.random.default_rng(5), 64, greedy=False)
    logits = torch.from_numpy(values).to(CUDA).expand(64, -1)
    tokens, _ = sampled(DeviceSampler(vocab, 64, CUDA), logits, params)
    for token, p in zip(tokens, params, strict=True):
        oracle = Oracle(values, p)
        assert oracle.allows(token), (p, token, oracle.token())


def test_of_equal_tokens_the_first_are_kept() -> None:
    """All logits are equal, so every sum is exact and so is every draw."""
    vocab, rows, expected = 128_256, [], []
    for p, kept in [
        (SamplingParams(1.0), vocab),
        (SamplingParams(1.0, top_k=20_001), 20_001),
        (SamplingParams(3.0, top_p=0.5), vocab // 2),
        (SamplingParams(1.0, top_k=64_000, top_p=0.25), 16_000),
    ]:
        for token in (0, 8191, 8192, kept - 1):
            rows.append(with_uniform(p, (token + 0.5) / kept))
            expected.append(token)
    logits = torch.full((len(rows), vocab), 2.0, dtype=torch.bfloat16, device=CUDA)
    assert sampled(DeviceSampler(vocab, len(rows), CUDA), logits, rows)[0] == expected


def with_uniform(p: SamplingParams, uniform: float) -> SamplingParams:
    return SamplingParams(p.temperature, p.top_k, p.top_p, p.min_p, uniform=uniform, mask=p.mask)


@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(1.0),
        SamplingParams(0.7, top_k=10),
        SamplingParams(1.5, top_p=0.8),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(2.0, top_k=40, top_p=0.9, mask=mask_of(range(0, 80, 3), 80)),
    ],
)
def test_draws_follow_the_distribution(p: SamplingParams) -> None:
    """Evenly spread draws hit each token as often as its probability says, to two draws."""
    count = 50_000
    logits = np.random.default_rng(3).normal(0, 2, 80).astype(np.float32)
    rows = [with_uniform(p, (i + 0.5) / count) for i in range(count)]
    sampler = DeviceSampler(80, count, CUDA)
    tokens, _ = sampled(sampler, torch.from_numpy(logits).to(CUDA).expand(count, -1), rows)
    frequency = np.bincount(tokens, minlength=80) / count
    np.testing.assert_allclose(frequency, Oracle(logits, p).probabilities(), atol=2 / count)


def test_random_draws_pass_a_chi_square_test() -> None:
    """With a fixed seed, so it passes always or never."""
    count, vocab = 60_000, 30
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 1, vocab).astype(np.float32)
    p = SamplingParams(0.9, top_k=25)
    rows = [with_uniform(p, float(u)) for u in rng.random(count)]
    tokens, _ = sampled(DeviceSampler(vocab, count, CUDA), torch.from_numpy(logits).to(CUDA).expand(count, -1), rows)
    expected = Oracle(logits, p).probabilities() * count
    observed = np.bincount(tokens, minlength=vocab)
    kept = expected > 0
    assert not observed[~kept].any()
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < 51.2, "24 degrees of freedom: 51.18 is passed once in a thousand"


def test_masks() -> None:
    vocab = 128_256
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0, 2, (40, vocab)).astype(np.float32)).to(CUDA, torch.bfloat16)
    params = []
    for row, p in enumerate(random_rows(rng, 40)):
        allowed = rng.integers(0, vocab, int(rng.choice([1, 2, 500, 60_000]))).tolist()
        mask = None if row % 5 == 0 else mask_of(allowed, vocab)
        params.append(SamplingParams(p.temperature, p.top_k, p.top_p, p.min_p, uniform=p.uniform, mask=mask))
    tokens, _ = sampled(DeviceSampler(vocab, 40, CUDA), logits, params)
    values = logits.float().cpu().numpy()
    for row, p in enumerate(params):
        assert Oracle(values[row], p).allows(tokens[row]), (row, tokens[row])


def test_a_row_does_not_depend_on_its_batch() -> None:
    vocab = 128_256
    rng = np.random.default_rng(6)
    params = random_rows(rng, 256)
    logits = torch.from_numpy(rng.normal(0, 1, (256, vocab)).astype(np.float32)).to(CUDA, torch.bfloat16)
    sampler = DeviceSampler(vocab, 256, CUDA)
    together = sampled(sampler, logits, params)
    assert together == sampled(sampler, logits, params), "the same again"
    for row in range(0, 256, 16):
        alone = sampled(sampler, logits[row : row + 1], params[row : row + 1])
        assert alone == ([together[0][row]], [together[1][row]])


@pytest.mark.parametrize(("greedy", "filtered"), [(True, False), (False, False), (False, True)])
def test_a_captured_graph_draws_from_what_the_buffers_hold_at_its_replay(greedy: bool, filtered: bool) -> None:
    vocab, count = 49_152, 8
    rng = np.random.default_rng(8)
    sampler = DeviceSampler(vocab, count, CUDA)
    logits = torch.zeros(count, vocab, dtype=torch.bfloat16, device=CUDA)
    buffers = device_draws([SamplingParams(1.0, uniform=0.5)] * count, vocab, CUDA)
    tokens = torch.zeros(count, dtype=torch.int32, device=CUDA)
    logprobs = torch.zeros(count, device=CUDA)

    def sample(draws: DeviceDraws) -> None:
        flags = {"greedy": greedy, "filtered": filtered, "masked": False, "logprobs": True}
        sampler.sample(logits, count, draws, tokens, logprobs, **flags)

    sample(buffers)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample(buffers)
    for _ in range(5):
        params = random_rows(rng, count)
        if not filtered:
            params = [SamplingParams(p.temperature, uniform=p.uniform) for p in params]
        if greedy:
            params = [SamplingParams()] * count
        fresh = device_draws(params, vocab, CUDA)
        for name in ("temperature", "top_k", "top_p", "min_p", "uniform"):
            getattr(buffers, name).copy_(getattr(fresh, name))
        logits.copy_(torch.from_numpy(rng.normal(0, 2, (count, vocab)).astype(np.float32)))
        graph.replay()
        replayed = tokens.tolist(), logprobs.tolist()
        sample(fresh)
        assert replayed == (tokens.tolist(), logprobs.tolist())
        values = logits.float().cpu().numpy()
        for row, p in enumerate(params):
            assert Oracle(values[row], p).allows(replayed[0][row]), p


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_draw_never_waits_for_the_host() -> None:
    sampler = DeviceSampler(5000, 4, CUDA)
    logits = torch.randn(4, 5000, device=CUDA)
    mask = mask_of(range(100), 5000)
    draws = device_draws([SamplingParams(1.0, 50, 0.9, 0.1, uniform=0.5, mask=mask)] * 4, 5000, CUDA)
    tokens, logprobs = torch.zeros(4, dtype=torch.int32, device=CUDA), torch.zeros(4, device=CUDA)
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(logits, 4, draws, tokens, logprobs, greedy=False, filtered=True, masked=True, logprobs=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated, "nothing is allocated"
    assert (tokens < 100).all()
