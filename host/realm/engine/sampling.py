"""Drawing the next tokens of a whole batch.

The order of operations is that of :class:`realm.messages.SamplingParams`; each filter sees the
distribution renormalised after the one before it. One uniform number a row, given by the caller,
makes the draw: the result depends on nothing else in the batch. Equal probabilities are ordered by
token id, because bf16 logits tie often and a tie must not depend on the batch.

Cost matters more than code here, and so does its bound: a tenant may choose temperature 100 for all
rows of a step that others wait for. Top-k and top-p look at the :data:`CANDIDATES` most likely tokens
of many rows first (30 us a row of 49,152). A row that is not decided by them is sorted by itself:
numpy sorts such a row in 90 us (AVX-512), whatever its values, where torch takes 4-8 ms; the
whole row then takes 0.2 ms. Rows are taken some at a time, because temporaries of a few MB stay in the
cache while those of a whole step are mapped and faulted in anew, which cost more than the arithmetic.

Any finite parameters give a token: sums are clamped so that no infinity meets another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from realm.engine.batch import Draws, Floats
from realm.guests.draws import uniform
from realm.messages import SamplingParams

CANDIDATES = 128
"""How many of the most likely tokens are looked at first."""

LEAST_TEMPERATURE = 1e-8
"""A temperature below this counts as this: only exact ties of the best token still share the draw."""

MOST_TOP_K = (1 << 31) - 1
"""A top-k above this counts as this: no vocabulary is so large."""

_LARGEST = np.float32(1e30)
"""Logits are kept within this after penalty and bias; divided by the least temperature they are finite."""

_ROWS = 16
"""Rows that are worked on together."""

_CHUNK = 256
"""Tokens a chunk in the two-level search of a cumulative sum."""

_HIDDEN = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 0, -np.inf, 0
).astype(np.float32)
"""What a byte of a mask adds to its eight logits."""

Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Drawn:
    """Tokens [m] and log-probabilities [m] (NaN where not asked for).

    ``sorted_rows`` are the rows that the most likely tokens did not decide: they cost the most.
    """

    tokens: list[int]
    logprobs: list[float]
    sorted_rows: list[int]


def draw(logits: Tensor, params: Sequence[SamplingParams], history: Sequence[Ids | None]) -> Drawn:
    """Draw one token a row, with all that a caller may ask for.

    Args:
        logits: float32 [m, vocab] on the CPU; not modified.
        params: one a row.
        history: uint32 tokens of the row's sequence, needed where ``repetition_penalty`` is not 1.
    """
    shaped = [row for row, p in enumerate(params) if _shapes(p)]
    return _draw(logits, draws_of(params), shaped, lambda copy, row: _shape(copy, params[row], history[row]))


def draw_batch(logits: Tensor, draws: Draws) -> Drawn:
    """:func:`draw` for parameters in arrays, which have no penalty and no bias."""
    masks = dict(draws.masks)
    return _draw(logits, draws, sorted(masks), lambda copy, row: _mask(copy, masks[row]))


def draws_of(params: Sequence[SamplingParams]) -> Draws:
    """The same in arrays, but for penalties and biases."""
    return Draws(
        # Not below the least temperature: float32 would round it to 0, which is greedy.
        temperature=np.array(
            [max(p.temperature, LEAST_TEMPERATURE) if p.temperature else 0.0 for p in params], np.float32
        ),
        top_k=np.array([min(p.top_k, MOST_TOP_K) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        uniform=np.array([p.uniform if p.number < 0 else uniform(p.key, p.number) for p in params], np.float64),
        logprob=np.array([p.logprob for p in params], np.bool_),
        masks=[(row, p.mask) for row, p in enumerate(params) if p.mask is not None],
    )


def _draw(logits: Tensor, draws: Draws, shaped: list[int], shape: Callable[[Floats, int], None]) -> Drawn:
    """Draw all rows, those of ``shaped`` from copies which ``shape`` has changed in place."""
    tokens = [0] * len(logits)
    costly: list[int] = []
    if not shaped and draws.greedy:
        tokens = logits.argmax(-1).tolist()
    else:
        # Shaped rows are copied before they change, so no row pays for another's mask.
        apart = set(shaped)
        plain = [row for row in range(len(tokens)) if row not in apart]
        costly += _draw_plain(logits, draws, plain, tokens)
    for at in range(0, len(shaped), _ROWS):
        rows = shaped[at : at + _ROWS]
        copies = logits[rows]
        for copy, row in zip(copies.numpy(), rows, strict=True):
            shape(copy, row)
        drawn = [0] * len(rows)
        costly += [rows[at] for at in _draw_plain(copies, taken(draws, rows), list(range(len(rows))), drawn)]
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    logprobs = [float("nan")] * len(tokens)
    wanted = np.flatnonzero(draws.logprob).tolist()
    for at in range(0, len(wanted), _ROWS):
        rows = wanted[at : at + _ROWS]
        raw = logits[rows]
        at_tokens = torch.tensor([[tokens[row]] for row in rows])
        values = raw.gather(1, at_tokens).squeeze(1) - raw.logsumexp(-1)
        for row, value in zip(rows, values.tolist(), strict=True):
            logprobs[row] = value
    return Drawn(tokens, logprobs, costly)


def taken(draws: Draws, rows: list[int]) -> Draws:
    """Some rows of ``draws``, in the order of ``rows``."""
    masks = dict(draws.masks)
    return Draws(
        draws.temperature[rows],
        draws.top_k[rows],
        draws.top_p[rows],
        draws.min_p[rows],
        draws.uniform[rows],
        draws.logprob[rows],
        [(at, masks[row]) for at, row in enumerate(rows) if row in masks],
    )


def _shapes(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.bias_tokens is not None or p.mask is not None


def _shape(row: Floats, p: SamplingParams, history: Ids | None) -> None:
    """Repetition penalty (Keskar et al., CTRL, 2019), bias and mask, in place on one row."""
    if p.repetition_penalty != 1:
        assert history is not None
        # A token that comes twice is computed twice from the same old value: no need to find unique ones.
        seen = history.astype(np.int64)
        values = row[seen]
        penalty = np.float32(p.repetition_penalty)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
    if p.bias_tokens is not None and p.bias_values is not None:
        where = np.frombuffer(p.bias_tokens, dtype="<u4").astype(np.int64)
        with np.errstate(over="ignore"):
            np.add.at(row, where, np.frombuffer(p.bias_values, dtype="<f4"))
    if p.repetition_penalty != 1 or p.bias_tokens is not None:
        np.clip(row, -_LARGEST, _LARGEST, out=row)
    if p.mask is not None:
        _mask(row, p.mask)


def _mask(row: Floats, mask: bytes) -> None:
    """Hide the tokens whose bit of ``mask`` is 0, in place on one row."""
    # Eight tokens a byte of the mask: a table is five times as fast as unpacked bits.
    octets = np.frombuffer(mask, dtype=np.uint8)[: -(-len(row) // 8)]
    row += _HIDDEN[octets].reshape(-1)[: len(row)]


def _draw_plain(logits: Tensor, draws: Draws, rows: list[int], tokens: list[int]) -> list[int]:
    """Fill ``tokens`` for rows whose logits are shaped already; returns the rows that were sorted."""
    greedy: list[int] = []
    narrow: list[int] = []
    whole: list[int] = []
    best = draws.temperature == 0
    # A top-k beyond the candidates could not be decided there: its mass is not known.
    few = ((draws.top_k > 0) & (draws.top_k <= CANDIDATES)) | ((draws.top_k == 0) & (draws.top_p < 1))
    for row in rows:
        (greedy if best[row] else narrow if few[row] else whole).append(row)
    for at in range(0, len(greedy), _ROWS):
        some = greedy[at : at + _ROWS]
        for row, token in zip(some, logits[some].argmax(-1).tolist(), strict=True):
            tokens[row] = token
    size = min(CANDIDATES, logits.shape[1])
    for at in range(0, len(narrow), _ROWS):
        whole += _draw_from_top(logits, draws, narrow[at : at + _ROWS], size, tokens)
    if whole:
        drawer = _RowDrawer(logits.shape[1])
        # At the ends of the ranges differences overflow; what is infinitely less likely has no weight.
        with np.errstate(over="ignore", invalid="ignore"):
            for row in whole:
                tokens[row] = drawer.draw(logits[row].numpy(), draws, row)
    return [row for row in whole if draws.top_k[row] > 0 or draws.top_p[row] < 1]


def _draw_from_top(shaped: Tensor, draws: Draws, rows: list[int], size: int, tokens: list[int]) -> list[int]:
    """Draw for the rows that the ``size`` most likely tokens decide; returns the undecided rows.

    Rows have a top-k of at most ``size``, or only a top-p.
    """
    vocab = shaped.shape[1]
    scaled = shaped[rows].div_(_column(draws.temperature, rows).clamp_(min=LEAST_TEMPERATURE))
    values, ids = scaled.topk(size, dim=-1)
    # topk orders equal values as it likes: order them by id.
    ids, by_id = ids.sort(-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    best = values[:, :1]
    weights = (values - best).double().exp()
    top_k = _column(draws.top_k, rows).float()
    top_k = torch.where(top_k > 0, top_k, float(vocab))
    rank = torch.arange(size)
    weights = torch.where(rank < top_k, weights, 0.0)
    mass = weights.cumsum(-1)
    total = mass[:, -1:]
    if size < vocab and bool((top_k == vocab).any()):
        everything = (scaled - best).exp_().sum(-1, keepdim=True, dtype=torch.float64)
        total = torch.where(top_k == vocab, everything, total)
    top_p = _column(draws.top_p, rows).double()
    # A weight of 0 (masked out) is never kept, so a narrow mask is decided by the first candidates.
    # The best is kept even where top_p is so small that float32 rounds it to 0.
    reached = (mass - weights < top_p * total) | (top_p >= 1) | (rank == 0)
    keep = (rank < top_k) & (weights > 0) & reached
    kept = torch.where(keep & (weights >= _column(draws.min_p, rows)), weights, 0.0)
    # Decided when a token that is left out was seen, and no equal one can be beyond the horizon.
    count = keep.sum(-1, keepdim=True)
    boundary = values.gather(1, (count - 1).clamp(min=0))
    decided = ((count < size) & (boundary > values[:, -1:])).squeeze(1) | (size == vocab)
    # Inverse CDF in vocabulary order: the kept candidates by id.
    ids, by_id = ids.sort(-1)
    kept = kept.gather(1, by_id)
    chosen = ids.gather(1, _first_above(kept.cumsum(-1), _column(draws.uniform, rows))).squeeze(1)
    undecided: list[int] = []
    for row, token, done in zip(rows, chosen.tolist(), decided.tolist(), strict=True):
        if done:
            tokens[row] = token
        else:
            undecided.append(row)
    return undecided


def _first_above(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Index [m, 1] of the first entry of ``cumulative`` [m, n] above ``uniform * total``."""
    total = cumulative[:, -1:]
    # A product rounded up to the total must not run past the last entry of weight.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)


def _column(values: npt.NDArray[Any], rows: list[int]) -> Tensor:
    """One parameter of some rows, [m, 1], a copy."""
    return torch.from_numpy(values[rows]).unsqueeze(1)


class _RowDrawer:
    """Draws from whole rows, one at a time, in memory of its own that every row uses again."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._chunks = -(-vocab // _CHUNK)
        # The places beyond the vocabulary are never written: their weight stays 0.
        self._scaled = np.empty(vocab, np.float32)
        self._sorted = np.empty(vocab, np.float32)
        self._weights = np.zeros((self._chunks, _CHUNK), np.float32)
        self._ranked = np.zeros((self._chunks, _CHUNK), np.float32)
        self._flags = np.empty(vocab, np.bool_)

    def draw(self, row: Floats, draws: Draws, at: int) -> int:
        """The token, with the parameters of row ``at``; ``row`` is not modified."""
        scaled = self._scaled
        np.divide(row, np.maximum(draws.temperature[at], np.float32(LEAST_TEMPERATURE)), out=scaled)
        best = scaled.max()
        weights = self._weights.reshape(-1)[: self._vocab]
        np.subtract(scaled, best, out=weights)
        np.exp(weights, out=weights)
        top_k, top_p, min_p = int(draws.top_k[at]), draws.top_p[at], draws.min_p[at]
        if 0 < top_k < self._vocab or top_p < 1:
            self._keep_best(top_k, top_p, weights)
        if min_p > 0:
            np.greater_equal(weights, min_p, out=self._flags)
            np.multiply(weights, self._flags, out=weights)
        return self._search(float(draws.uniform[at]))

    def _keep_best(self, top_k: int, top_p: np.float32, weights: Floats) -> None:
        """Set the weights to 0 that top-k and top-p leave out: both keep the first of one order."""
        order = self._sorted
        np.negative(self._scaled, out=order)
        order.sort()
        ranked = self._ranked.reshape(-1)[: self._vocab]
        np.subtract(order[0], order, out=ranked)
        np.exp(ranked, out=ranked)
        count = self._vocab
        if 0 < top_k < count:
            count = top_k
            ranked[count:] = 0
        if top_p < 1:
            sums = self._ranked.sum(-1, dtype=np.float64).cumsum()
            wanted = np.float64(top_p) * sums[-1]
            chunk = min(int(sums.searchsorted(wanted)), self._chunks - 1)
            inside = self._ranked[chunk].cumsum(dtype=np.float64)
            before = sums[chunk - 1] if chunk else 0.0
            count = max(1, min(count, chunk * _CHUNK + int(inside.searchsorted(wanted - before)) + 1))
        last = order[count - 1]
        better, equal = int(order.searchsorted(last)), int(order.searchsorted(last, "right"))
        np.greater_equal(self._scaled, -last, out=self._flags)
        if equal > count:
            # Of the equal last ones only the lowest ids are kept.
            self._flags[np.flatnonzero(self._scaled == -last)[count - better :]] = False
        np.multiply(weights, self._flags, out=weights)

    def _search(self, uniform: float) -> int:
        """Inverse CDF over the whole vocabulary: sums of chunks first, then within one chunk."""
        sums = self._weights.sum(-1, dtype=np.float64).cumsum()
        target = _below(uniform * sums[-1], sums[-1])
        chunk = min(int(sums.searchsorted(target, "right")), self._chunks - 1)
        inside = self._weights[chunk].cumsum(dtype=np.float64)
        # Rounding of the two sums may differ in the last bit: stay on an entry that has weight.
        target = _below(max(0.0, target - (sums[chunk - 1] if chunk else 0.0)), inside[-1])
        token = chunk * _CHUNK + int(inside.searchsorted(target, "right"))
        return min(token, self._vocab - 1)


def _below(value: float, total: float) -> float:
    """``value``, but less than ``total``."""
    return min(value, float(np.nextafter(total, 0.0)))
