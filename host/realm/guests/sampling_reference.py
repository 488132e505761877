"""Sampling in numpy and float64: what ``sample``, ``score`` and ``logits_topk`` compute.

It follows :class:`realm.messages.SamplingParams` to the letter, slowly, and is also what the
engine's batched sampler is tested against.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from realm.guests import draws
from realm.messages import SamplingParams

Floats = npt.NDArray[np.float64]

LEAST_TEMPERATURE = 1e-8
"""A temperature below this counts as this."""
_LARGEST = 1e30
"""Logits are kept within this after penalty and bias. Both are the engine's, so that draws agree."""


def adjusted_logits(logits: npt.NDArray[Any], params: SamplingParams, history: npt.NDArray[Any] | None) -> Floats:
    """Logits [vocab] after repetition penalty, bias and mask (dropped tokens are -inf).

    Args:
        history: token ids of the whole sequence; needed when there is a penalty.
    """
    out = logits.astype(np.float64)
    if params.repetition_penalty != 1.0 and history is not None and len(history):
        seen = np.unique(history)
        values = out[seen]
        out[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.bias_tokens and params.bias_values:
        tokens = np.frombuffer(params.bias_tokens, dtype="<u4")
        np.add.at(out, tokens, np.frombuffer(params.bias_values, dtype="<f4").astype(np.float64))
    if params.repetition_penalty != 1.0 or params.bias_tokens:
        np.clip(out, -_LARGEST, _LARGEST, out=out)
    if params.mask is not None:
        allowed = np.unpackbits(np.frombuffer(params.mask, dtype=np.uint8), bitorder="little", count=len(out))
        out[allowed == 0] = -np.inf
    return out


def filtered_probabilities(adjusted: Floats, params: SamplingParams) -> Floats:
    """Weights [vocab] of the tokens that temperature, top-k, top-p and min-p keep; the others are 0.

    The largest weight is 1; the sum is not.
    """
    scaled = adjusted / max(params.temperature, LEAST_TEMPERATURE)
    weights = np.exp(scaled - scaled.max())
    keep = weights > 0
    order = np.argsort(-scaled, kind="stable")
    if 0 < params.top_k < len(order):
        keep[order[params.top_k :]] = False
    if params.top_p < 1.0:
        ranked = np.where(keep[order], weights[order], 0.0)
        before = np.concatenate(([0.0], np.cumsum(ranked)[:-1]))
        keep[order[before >= params.top_p * ranked.sum()]] = False
    if params.min_p > 0:
        keep &= weights >= params.min_p
    kept: Floats = np.where(keep, weights, 0.0)
    return kept


def draw_token(
    logits: npt.NDArray[Any], params: SamplingParams, history: npt.NDArray[Any] | None = None
) -> tuple[int, float]:
    """One draw: (token, log-probability under the model, or NaN when not asked for).

    Raises:
        ValueError: the mask allows no token, or the logits are not finite.
    """
    adjusted = adjusted_logits(logits, params, history)
    best = float(adjusted.max())
    if not np.isfinite(best):
        raise ValueError("no token is left to draw from")
    if params.temperature == 0:
        token = int(np.argmax(adjusted))
    else:
        cumulative = np.cumsum(filtered_probabilities(adjusted, params))
        total = float(cumulative[-1])
        # A product rounded up to the total must not run past the last token of weight.
        uniform = params.uniform if params.number < 0 else draws.uniform(params.key, params.number)
        target = min(uniform * total, float(np.nextafter(total, 0.0)))
        token = int(np.searchsorted(cumulative, target, side="right"))
    logprob = float(log_probabilities(logits, np.array([token]))[0]) if params.logprob else float("nan")
    return token, logprob


def log_probabilities(logits: npt.NDArray[Any], tokens: npt.NDArray[Any]) -> Floats:
    """Log-probabilities of ``tokens`` [n] under softmax of ``logits`` [vocab]."""
    values = logits.astype(np.float64)
    best = values.max()
    normalizer = best + np.log(np.exp(values - best).sum())
    result: Floats = values[tokens] - normalizer
    return result


def most_likely(logits: npt.NDArray[Any], count: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """The ``count`` most likely tokens, best first and equal ones by id, with log-probabilities."""
    count = min(count, len(logits))
    if count == 0:
        return np.empty(0, dtype=np.int64), np.empty(0)
    if count < len(logits):
        # Everything as good as the count-th best, so that ties at the border go by id.
        border = np.partition(logits, len(logits) - count)[len(logits) - count]
        candidates = np.flatnonzero(logits >= border)
    else:
        candidates = np.arange(len(logits))
    order = np.argsort(-logits[candidates].astype(np.float64), kind="stable")[:count]
    tokens = candidates[order].astype(np.int64)
    return tokens, log_probabilities(logits, tokens)
