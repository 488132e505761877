"""Drawing the next tokens of a whole batch on tensors.

The order of operations is that of :class:`realm.messages.SamplingParams`; each filter sees the
distribution renormalised after the one before it. One uniform number a row, given by the caller,
makes the draw: the result depends on nothing else in the batch. Equal probabilities are ordered by
token id, because bf16 logits tie often and a tie must not depend on the batch.

Cost matters more than code here: sorting one row of 49,152 takes 8 ms on two cores, the top 128 of
32 rows take 1 ms. So top-k and top-p look at the :data:`CANDIDATES` most likely tokens first; the
rows that are not decided by them find their threshold by two histograms over the bits of the values: the
cost is the same however flat the distribution (a tenant may choose temperature 100).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realm.messages import SamplingParams

CANDIDATES = 128
"""How many of the most likely tokens are looked at first."""

_ROWS = 2
"""Rows whose threshold is searched together."""

_CHUNK = 256
"""Tokens a chunk in the two-level search of a cumulative sum."""


@dataclass(frozen=True)
class Drawn:
    """Tokens [m] (int64) and log-probabilities [m] (float32; NaN where not asked for)."""

    tokens: list[int]
    logprobs: list[float]


def draw(logits: Tensor, params: list[SamplingParams], history: list[np.ndarray | None]) -> Drawn:
    """Draw one token a row.

    Args:
        logits: float32 [m, vocab]; not modified.
        params: one a row.
        history: uint32 tokens of the row's sequence, needed where ``repetition_penalty`` is not 1.
    """
    wanted = [row for row, p in enumerate(params) if p.logprob]
    shaped = logits
    if any(_shapes(p) for p in params):
        shaped = logits.clone()
        for row, p in enumerate(params):
            if _shapes(p):
                _shape(shaped[row], p, history[row])
    greedy = [row for row, p in enumerate(params) if p.temperature == 0]
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    if len(greedy) == len(params):
        tokens = shaped.argmax(-1)
    else:
        if greedy:
            rows = torch.tensor(greedy, device=logits.device)
            tokens[rows] = shaped[rows].argmax(-1)
        _draw_rows(shaped, params, tokens)
    logprobs = [float("nan")] * len(params)
    if wanted:
        rows = torch.tensor(wanted, device=logits.device)
        raw = logits[rows]
        values = raw.gather(1, tokens[rows].unsqueeze(1)).squeeze(1) - raw.logsumexp(-1)
        for row, value in zip(wanted, values.tolist(), strict=True):
            logprobs[row] = value
    return Drawn(tokens.tolist(), logprobs)


def _shapes(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.bias_tokens is not None or p.mask is not None


def _shape(row: Tensor, p: SamplingParams, history: np.ndarray | None) -> None:
    """Repetition penalty (Keskar et al., CTRL, 2019), bias and mask, in place on one row."""
    if p.repetition_penalty != 1:
        assert history is not None
        seen = torch.from_numpy(np.unique(history).astype(np.int64))
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    if p.bias_tokens is not None and p.bias_values is not None:
        where = torch.from_numpy(np.frombuffer(p.bias_tokens, dtype="<u4").astype(np.int64))
        row.index_add_(0, where, torch.from_numpy(np.frombuffer(p.bias_values, dtype="<f4").copy()))
    if p.mask is not None:
        bits = np.unpackbits(np.frombuffer(p.mask, dtype=np.uint8), bitorder="little", count=row.shape[0])
        row.masked_fill_(torch.from_numpy(bits == 0), float("-inf"))


def _draw_rows(shaped: Tensor, params: list[SamplingParams], tokens: Tensor) -> None:
    """Fill ``tokens`` for the rows with a temperature."""
    filtered: list[int] = []
    whole: list[int] = []
    for row, p in enumerate(params):
        if p.temperature > 0:
            # A top-k beyond the candidates could not be decided there: its mass is not known.
            narrow = 0 < p.top_k <= CANDIDATES or (p.top_k == 0 and p.top_p < 1)
            (filtered if narrow else whole).append(row)
    if filtered:
        whole += _draw_from_top(shaped, params, filtered, min(CANDIDATES, shaped.shape[1]), tokens)
    if whole:
        rows = torch.tensor(whole, device=shaped.device)
        # In place where nothing needs the value again: a pass over 32 rows costs about 1 ms.
        scaled = shaped[rows].div_(_column(params, whole, "temperature"))
        weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
        top_k, top_p = _column(params, whole, "top_k"), _column(params, whole, "top_p").double()
        if bool((top_k > 0).any()):
            most = torch.where(top_k > 0, top_k, float(shaped.shape[1])).double()
            weights = _keep_mass(scaled, torch.ones_like(weights), weights, most)
        if bool((top_p < 1).any()):
            total = weights.sum(-1, keepdim=True, dtype=torch.float64)
            weights = _keep_mass(scaled, weights, weights, torch.where(top_p < 1, top_p * total, torch.inf))
        min_p = _column(params, whole, "min_p")
        if bool((min_p > 0).any()):
            weights = torch.where(weights >= min_p, weights, 0.0)
        tokens[rows] = _search(weights, _column(params, whole, "uniform"))


def _keep_mass(scaled: Tensor, mass: Tensor, weights: Tensor, wanted: Tensor) -> Tensor:
    """:func:`_keep_mass_of` some rows at a time: temporaries of a few MB stay in the cache and in the
    allocator's hands, those of 32 rows are mapped and faulted in anew (24 ms for 32 rows, not 45-90)."""
    slices = [slice(row, row + _ROWS) for row in range(0, scaled.shape[0], _ROWS)]
    return torch.cat([_keep_mass_of(scaled[at], mass[at], weights[at], wanted[at]) for at in slices])


def _keep_mass_of(scaled: Tensor, mass: Tensor, weights: Tensor, wanted: Tensor) -> Tensor:
    """``weights`` of the fewest best tokens (by ``scaled``, then id) whose ``mass`` reaches ``wanted``.

    A radix search on the bits of the floats, whose order is that of the numbers once negative ones
    are flipped: a histogram of the upper 16 bits finds the half-way, one of the lower 16 the
    threshold, exactly. All arguments are [m, vocab] but ``wanted``, [m, 1] float64; a row whose
    whole mass is below ``wanted`` is kept whole.
    """
    # Adding 0 makes -0 and 0, which are equal, the same bits.
    bits = (scaled + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    exact = mass.double()
    upper = ((order >> 16) + 32768).long()
    bucket, missing = _bucket(upper, exact, wanted)
    inside = upper == bucket
    lower = (order & 0xFFFF).long()
    last, missing = _bucket(lower, torch.where(inside, exact, 0.0), missing)
    threshold = ((bucket - 32768) << 16) | last
    equal = order == threshold
    ties = torch.where(equal, exact, 0.0)
    keep = (order > threshold) | (equal & (ties.cumsum(-1) - ties < missing))
    return torch.where(keep, weights, 0.0)


def _bucket(keys: Tensor, mass: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The 16-bit key [m, 1] at which the mass of keys from the top reaches ``wanted``, and what is
    still missing there once all higher keys are taken. Key 0 where it is never reached."""
    histogram = torch.zeros(keys.shape[0], 1 << 16, dtype=torch.float64).scatter_add_(1, keys, mass)
    from_top = histogram.flip(-1).cumsum(-1)
    index = torch.searchsorted(from_top, wanted).clamp(max=(1 << 16) - 1)
    taken = torch.where(index > 0, from_top.gather(1, (index - 1).clamp(min=0)), 0.0)
    return (1 << 16) - 1 - index, wanted - taken


def _draw_from_top(
    shaped: Tensor, params: list[SamplingParams], rows: list[int], size: int, tokens: Tensor
) -> list[int]:
    """Draw for the rows that the ``size`` most likely tokens decide; returns the undecided rows.

    Rows have a top-k of at most ``size``, or only a top-p.
    """
    vocab = shaped.shape[1]
    at = torch.tensor(rows, device=shaped.device)
    scaled = shaped[at].div_(_column(params, rows, "temperature"))
    values, ids = scaled.topk(size, dim=-1)
    # topk orders equal values as it likes: order them by id.
    ids, by_id = ids.sort(-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    best = values[:, :1]
    weights = (values - best).double().exp()
    top_k = _column(params, rows, "top_k")
    top_k = torch.where(top_k > 0, top_k, float(vocab))
    rank = torch.arange(size, device=shaped.device)
    weights = torch.where(rank < top_k, weights, 0.0)
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    if size < vocab and bool((top_k == vocab).any()):
        everything = (scaled - best).exp_().sum(-1, keepdim=True, dtype=torch.float64)
        total = torch.where(top_k == vocab, everything, total)
    top_p = _column(params, rows, "top_p").double()
    # A weight of 0 (masked out) is never kept, so a narrow mask is decided by the first candidates.
    keep = (rank < top_k) & (weights > 0) & ((mass - weights < top_p * total) | (top_p >= 1))
    kept = torch.where(keep & (weights >= _column(params, rows, "min_p")), weights, 0.0)
    # Decided when a token that is left out was seen, and no equal one can be beyond the horizon.
    count = keep.sum(-1, keepdim=True)
    boundary = values.gather(1, (count - 1).clamp(min=0))
    decided = ((count < size) & (boundary > values[:, -1:])).squeeze(1) | (size == vocab)
    # Inverse CDF in vocabulary order: the kept candidates by id.
    ids, by_id = ids.sort(-1)
    kept = kept.gather(1, by_id)
    chosen = ids.gather(1, _first_above(kept.cumsum(-1), _column(params, rows, "uniform")))
    tokens[at[decided]] = chosen.squeeze(1)[decided]
    return [row for row, done in zip(rows, decided.tolist(), strict=True) if not done]


def _first_above(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Index [m, 1] of the first entry of ``cumulative`` [m, n] above ``uniform * total``."""
    total = cumulative[:, -1:]
    # A product rounded up to the total must not run past the last entry of weight.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)


def _search(weights: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF over the whole vocabulary, [m]: sums of chunks first, then within one chunk."""
    count, vocab = weights.shape
    if vocab % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, -vocab % _CHUNK))
    padded = weights.view(count, -1, _CHUNK)
    sums = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    chunk = _first_above(sums, uniform)
    before = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, chunk.unsqueeze(-1).expand(-1, -1, _CHUNK)).squeeze(1).double().cumsum(-1)
    total = sums[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total))) - before
    # Rounding of the two sums may differ in the last bit: stay on an entry that has weight.
    last = inside[:, -1:]
    target = torch.minimum(target.clamp(min=0.0), torch.nextafter(last, torch.zeros_like(last)))
    index = torch.searchsorted(inside, target, right=True)
    return (chunk * _CHUNK + index).squeeze(1)


def _column(params: list[SamplingParams], rows: list[int], name: str) -> Tensor:
    """One parameter of the rows as float32 [m, 1] (float64 for the draw, whose bits matter)."""
    dtype = torch.float64 if name == "uniform" else torch.float32
    return torch.tensor([[getattr(params[row], name)] for row in rows], dtype=dtype)
