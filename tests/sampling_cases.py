"""Rows for the device's sampler, and a float64 oracle that knows what rounding can change and what it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from realm.engine.kernels.sampling import DeviceDraws, DeviceSampler
from realm.messages import SamplingParams

ROUNDING = 4e-6
"""How far float32 may move a border: a weight is right to 10 of its 2**-24 steps, a sum of them to about 75."""


def mask_of(allowed: Sequence[int], vocab: int) -> bytes:
    """A mask that allows some tokens."""
    bits = np.zeros(vocab, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def device_draws(params: Sequence[SamplingParams], vocab: int, device: torch.device | str) -> DeviceDraws:
    """The tensors of some rows. There are masks where a row has one."""

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype).to(device)

    mask = None
    if any(p.mask is not None for p in params):
        words = -(-vocab // 32)
        full = np.full((len(params), words), -1, "<i4")
        for row, p in zip(full, params, strict=True):
            if p.mask is not None:
                octets = row.view(np.uint8)
                octets[:] = 0
                octets[: len(p.mask)] = np.frombuffer(p.mask, np.uint8)[: len(octets)]
        mask = torch.from_numpy(full.astype(np.int32)).to(device)
    return DeviceDraws(
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float32),
        column("min_p", torch.float32),
        column("uniform", torch.float64),
        mask,
    )


def sampled(
    sampler: DeviceSampler, logits: torch.Tensor, params: Sequence[SamplingParams], *, filtered: bool = True
) -> tuple[list[int], list[float]]:
    """Draw a token for each row: tokens and log-probabilities. The outputs' rows beyond must stay as they are."""
    n = len(params)
    draws = device_draws(params, sampler.vocab, logits.device)
    tokens = torch.full((n + 1,), -7, dtype=torch.int32, device=logits.device)
    logprobs = torch.full((n + 1,), -7.0, device=logits.device)
    before = logits.clone()
    sampler.sample(
        logits,
        n,
        draws,
        tokens,
        logprobs,
        greedy=all(p.temperature == 0 for p in params),
        filtered=filtered,
        masked=draws.mask is not None,
        logprobs=True,
    )
    assert tokens[n] == -7 and logprobs[n] == -7, "written beyond the rows"
    assert torch.equal(before.view(torch.uint8), logits.view(torch.uint8)), "the logits have changed"
    return tokens[:n].tolist(), logprobs[:n].tolist()


class Oracle:
    """The distribution of one row in float64, as the documentation of :class:`SamplingParams` says.

    Only the order is that of float32, so that ties are the same ones.
    """

    def __init__(self, logits: np.ndarray, p: SamplingParams) -> None:
        """``logits``: [vocab], any float dtype."""
        self._p = p
        x = logits.astype(np.float32)
        if p.mask is not None:
            allowed = np.unpackbits(np.frombuffer(p.mask, np.uint8), bitorder="little", count=len(x))
            x = np.where(allowed == 1, x, np.float32(-np.inf))
        self._greedy = int(np.argmax(x))
        if p.temperature > 0:
            x = x / np.float32(max(p.temperature, 1e-8))
            self._order = np.lexsort((np.arange(len(x)), -x))
            self._weights = np.exp(x.astype(np.float64) - float(x.max()))

    def probabilities(self, slack_p: float = 0, slack_min: float = 0) -> np.ndarray:
        """[vocab]; the borders of top-p and min-p may be moved by a relative slack."""
        p = self._p
        weights = self._weights.copy()
        if p.top_k:
            weights[self._order[p.top_k :]] = 0
        if np.float32(p.top_p) < 1:
            ranked = weights[self._order]
            before = np.cumsum(ranked) - ranked
            before[0] = -1  # the most likely token is always kept
            weights[self._order[before >= float(np.float32(p.top_p)) * (1 + slack_p) * ranked.sum()]] = 0
        weights[self._weights < float(np.float32(p.min_p)) * (1 + slack_min)] = 0
        return weights / weights.sum()

    def token(self) -> int:
        """What an exact sampler draws."""
        if self._p.temperature == 0:
            return self._greedy
        return self._drawn(self.probabilities(), self._p.uniform)

    def allows(self, token: int, rounding: float = ROUNDING) -> bool:
        """Whether the token is drawn when no border is moved by more than the rounding."""
        if token == self.token():
            return True
        if self._p.temperature == 0:
            return False
        slacks = (-rounding, 0.0, rounding)
        # A moved border shifts the draw to a token nearby, which may have been cut itself but for the rounding.
        drawn = [
            self._drawn(self.probabilities(slack_p, slack_min), self._p.uniform + slack)
            for slack_p, slack_min, slack in product(slacks, slacks, slacks)
        ]
        return min(drawn) <= token <= max(drawn) and self.probabilities(rounding, -rounding)[token] > 0

    @staticmethod
    def _drawn(probabilities: np.ndarray, uniform: float) -> int:
        cumulative = np.cumsum(probabilities)
        kept = np.flatnonzero(probabilities)
        target = min(max(uniform, 0.0) * cumulative[-1], np.nextafter(cumulative[-1], 0))
        place = int(np.searchsorted(cumulative, target, side="right"))
        return int(min(max(place, kept[0]), kept[-1]))


def logprob(logits: np.ndarray, token: int) -> float:
    """The token's log-probability under the model's own distribution, in float64."""
    x = logits.astype(np.float64)
    return float(x[token] - x.max() - np.log(np.exp(x - x.max()).sum()))
