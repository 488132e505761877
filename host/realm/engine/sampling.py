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

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realm.messages import SamplingParams

CANDIDATES = 128
"""How many of the most likely tokens are looked at first."""

LEAST_TEMPERATURE = 1e-8
"""A temperature below this counts as this: only exact ties of the best token still share the draw."""

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

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class Drawn:
    """Tokens [m] and log-probabilities [m] (NaN where not asked for).

    ``sorted_rows`` are the rows that the most likely tokens did not decide: they cost the most.
    """

    tokens: list[int]
    logprobs: list[float]
    sorted_rows: list[int]


def draw(logits: Tensor, params: list[SamplingParams], history: list[np.ndarray | None]) -> Drawn:
    """Draw one token a row.

    Args:
        logits: float32 [m, vocab] on the CPU; not modified.
        params: one a row.
        history: uint32 tokens of the row's sequence, needed where ``repetition_penalty`` is not 1.
    """
    tokens = [0] * len(params)
    costly: list[int] = []
    # Shaped rows are copied before they change, so no row pays for another's mask.
    plain = [row for row, p in enumerate(params) if not _shapes(p)]
    if len(plain) == len(params) and all(p.temperature == 0 for p in params):
        tokens = logits.argmax(-1).tolist()
    else:
        costly += _draw_plain(logits, params, plain, tokens)
    if len(plain) < len(params):
        shaped = [row for row, p in enumerate(params) if _shapes(p)]
        for at in range(0, len(shaped), _ROWS):
            rows = shaped[at : at + _ROWS]
            copies = logits[rows]
            for copy, row in zip(copies.numpy(), rows, strict=True):
                _shape(copy, params[row], history[row])
            drawn = [0] * len(rows)
            chosen = [params[row] for row in rows]
            costly += [rows[at] for at in _draw_plain(copies, chosen, list(range(len(rows))), drawn)]
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    logprobs = [float("nan")] * len(params)
    wanted = [row for row, p in enumerate(params) if p.logprob]
    for at in range(0, len(wanted), _ROWS):
        rows = wanted[at : at + _ROWS]
        raw = logits[rows]
        at_tokens = torch.tensor([[tokens[row]] for row in rows])
        values = raw.gather(1, at_tokens).squeeze(1) - raw.logsumexp(-1)
        for row, value in zip(rows, values.tolist(), strict=True):
            logprobs[row] = value
    return Drawn(tokens, logprobs, costly)


def _shapes(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.bias_tokens is not None or p.mask is not None


def _shape(row: Floats, p: SamplingParams, history: np.ndarray | None) -> None:
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
        # Eight tokens a byte of the mask: a table is five times as fast as unpacked bits.
        octets = np.frombuffer(p.mask, dtype=np.uint8)[: -(-len(row) // 8)]
        row += _HIDDEN[octets].reshape(-1)[: len(row)]


def _draw_plain(logits: Tensor, params: list[SamplingParams], rows: list[int], tokens: list[int]) -> list[int]:
    """Fill ``tokens`` for rows whose logits are shaped already; returns the rows that were sorted."""
    greedy: list[int] = []
    narrow: list[int] = []
    whole: list[int] = []
    for row in rows:
        p = params[row]
        if p.temperature == 0:
            greedy.append(row)
        # A top-k beyond the candidates could not be decided there: its mass is not known.
        elif 0 < p.top_k <= CANDIDATES or (p.top_k == 0 and p.top_p < 1):
            narrow.append(row)
        else:
            whole.append(row)
    for at in range(0, len(greedy), _ROWS):
        some = greedy[at : at + _ROWS]
        for row, token in zip(some, logits[some].argmax(-1).tolist(), strict=True):
            tokens[row] = token
    size = min(CANDIDATES, logits.shape[1])
    for at in range(0, len(narrow), _ROWS):
        whole += _draw_from_top(logits, params, narrow[at : at + _ROWS], size, tokens)
    if whole:
        drawer = _RowDrawer(logits.shape[1])
        # At the ends of the ranges differences overflow; what is infinitely less likely has no weight.
        with np.errstate(over="ignore", invalid="ignore"):
            for row in whole:
                tokens[row] = drawer.draw(logits[row].numpy(), params[row])
    return [row for row in whole if params[row].top_k > 0 or params[row].top_p < 1]


def _draw_from_top(
    shaped: Tensor, params: list[SamplingParams], rows: list[int], size: int, tokens: list[int]
) -> list[int]:
    """Draw for the rows that the ``size`` most likely tokens decide; returns the undecided rows.

    Rows have a top-k of at most ``size``, or only a top-p.
    """
    vocab = shaped.shape[1]
    scaled = shaped[rows].div_(_column(params, rows, "temperature").clamp_(min=LEAST_TEMPERATURE))
    values, ids = scaled.topk(size, dim=-1)
    # topk orders equal values as it likes: order them by id.
    ids, by_id = ids.sort(-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    best = values[:, :1]
    weights = (values - best).double().exp()
    top_k = _column(params, rows, "top_k")
    top_k = torch.where(top_k > 0, top_k, float(vocab))
    rank = torch.arange(size)
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
    chosen = ids.gather(1, _first_above(kept.cumsum(-1), _column(params, rows, "uniform"))).squeeze(1)
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


def _column(params: list[SamplingParams], rows: list[int], name: str) -> Tensor:
    """One parameter of the rows as float32 [m, 1] (float64 for the draw, whose bits matter)."""
    dtype = torch.float64 if name == "uniform" else torch.float32
    return torch.tensor([[getattr(params[row], name)] for row in rows], dtype=dtype)


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

    def draw(self, row: Floats, p: SamplingParams) -> int:
        """The token; ``row`` is not modified."""
        scaled = self._scaled
        np.divide(row, np.float32(max(p.temperature, LEAST_TEMPERATURE)), out=scaled)
        best = scaled.max()
        weights = self._weights.reshape(-1)[: self._vocab]
        np.subtract(scaled, best, out=weights)
        np.exp(weights, out=weights)
        if 0 < p.top_k < self._vocab or p.top_p < 1:
            self._keep_best(p, weights)
        if p.min_p > 0:
            np.greater_equal(weights, np.float32(p.min_p), out=self._flags)
            np.multiply(weights, self._flags, out=weights)
        return self._search(p.uniform)

    def _keep_best(self, p: SamplingParams, weights: Floats) -> None:
        """Set the weights to 0 that top-k and top-p leave out: both keep the first of one order."""
        order = self._sorted
        np.negative(self._scaled, out=order)
        order.sort()
        ranked = self._ranked.reshape(-1)[: self._vocab]
        np.subtract(order[0], order, out=ranked)
        np.exp(ranked, out=ranked)
        count = self._vocab
        if 0 < p.top_k < count:
            count = p.top_k
            ranked[count:] = 0
        if p.top_p < 1:
            sums = self._ranked.sum(-1, dtype=np.float64).cumsum()
            wanted = np.float64(np.float32(p.top_p)) * sums[-1]
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
