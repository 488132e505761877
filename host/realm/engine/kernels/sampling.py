"""Drawing the next tokens of a step on the device, without a host synchronisation.

The semantics are those of :mod:`realm.engine.sampling` and :class:`realm.messages.SamplingParams`: mask,
temperature, top-k, top-p, min-p, then one draw by inverse CDF in vocabulary order; equal logits are
ordered by token id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from realm.engine.kernels.sampling_filters import (
    FIRST_PARTS,
    SAMPLE,
    begin_kernel,
    cut_kernel,
    gather_kernel,
    split_kernel,
    weigh_kernel,
    window_kernel,
)
from realm.engine.kernels.sampling_rows import SLOTS, choose_kernel, survey_kernel

TILE = 8192
"""Tokens that one program looks at. A draw's last bits depend on it, so it is the same for every batch."""

SPLIT_STEP = 2048
"""Tokens that are held against the first edges at once."""

GATHER_GROUP = 8
"""Neighbouring tokens that are counted together: 16 bytes of bfloat16, what a thread loads at once."""

CUT_STEP = 2048
"""Tokens of a row's list that one program of 512 threads measures at once."""


@dataclass(slots=True)
class DeviceDraws:
    """How each row is drawn, on the device; every tensor has at least as many rows as are drawn.

    Attributes:
        temperature: float32 [rows], 0 is greedy. top_k: int32 [rows], 0 is off. top_p: float32 [rows],
            1 is off. min_p: float32 [rows], 0 is off.
        uniform: float64 (or float32) [rows], in [0, 1).
        mask: int32 [rows, ceil(vocab / 32)], bit ``i % 32`` of word ``i // 32`` allows token i; rows
            without a mask hold -1. None where no step is masked.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor
    mask: Tensor | None = None


class DeviceSampler:
    """Draws tokens with Triton kernels. Owns all its scratch memory, so calls can be captured in a CUDA graph.

    Calls of one sampler must not overlap: they share the scratch memory.
    """

    def __init__(
        self, vocab: int, rows: int, device: torch.device | str, *, tile: int = TILE, sample: int = SAMPLE
    ) -> None:
        """``rows``: the most rows of one call. Memory: :meth:`bytes_needed`. ``tile``: see :data:`TILE`.
        ``sample``: see :data:`~realm.engine.kernels.sampling_filters.SAMPLE`."""
        if min(tile, sample) < 1 or tile & (tile - 1) or sample & (sample - 1):
            raise ValueError(f"a tile and a sample are powers of two, not {tile} and {sample}")
        self._sample = sample
        self.vocab = vocab
        self.rows = rows
        self._tile = min(tile, triton.next_power_of_2(vocab))
        self._tiles = -(-vocab // self._tile)
        self._places = triton.next_power_of_2(self._tiles)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(rows, *shape, dtype=dtype, device=device)

        tiles = self._tiles
        self._best, self._sum, self._least = empty(tiles), empty(tiles), empty(tiles)
        self._raw_best, self._raw_sum = empty(tiles), empty(tiles)
        self._token = empty(tiles, dtype=torch.int32)
        self._equal = empty(tiles, dtype=torch.int32)
        self._above_count = empty(tiles, FIRST_PARTS.value, dtype=torch.int32)
        self._above_mass = empty(tiles, FIRST_PARTS.value)
        self._length = empty(dtype=torch.int32)
        self._state = empty(SLOTS.value, dtype=torch.float64)
        self._listed = empty(vocab)

    @staticmethod
    def bytes_needed(vocab: int, rows: int) -> int:
        """Device memory that a sampler takes, in bytes, to within a few kilobytes."""
        tiles = -(-vocab // TILE)
        parts, slots = int(FIRST_PARTS.value), int(SLOTS.value)
        return rows * (4 * vocab + tiles * (32 + 8 * parts) + 8 * slots)

    def sample(
        self,
        logits: Tensor,
        n: int,
        draws: DeviceDraws,
        out_tokens: Tensor,
        out_logprobs: Tensor | None = None,
        *,
        greedy: bool,
        filtered: bool,
        masked: bool,
        logprobs: bool,
    ) -> None:
        """Draw one token for each of the first ``n`` rows of ``logits``.

        The flags choose kernels, so they are fixed when a graph is captured. A flag that is set although
        no row needs it changes no token; where ``greedy`` is False rows of temperature 0 may be among
        the others.

        Args:
            logits: bfloat16 or float32 [>= n, vocab]; rows may be strided. Not modified.
            n: rows to draw, 0 to ``rows``.
            draws: with ``greedy`` only its mask is read, and that only with ``masked``.
            out_tokens: int32 [>= n]. Always within the vocabulary, whatever the logits are.
            out_logprobs: float32 [>= n], written only with ``logprobs``, and then for all n rows.
            greedy: every row takes its most likely token.
            filtered: rows may have a top-k, top-p or min-p.
            masked: rows may have a mask.
            logprobs: write log-probabilities under the model's own distribution (temperature 1, no mask).
        """
        if n == 0:
            return
        if not 0 < n <= self.rows or logits.shape[0] < n or logits.shape[1] != self.vocab or logits.stride(1) != 1:
            raise ValueError(f"{n} rows of {tuple(logits.shape)} do not fit a sampler of {self.rows} x {self.vocab}")
        if (masked and draws.mask is None) or (logprobs and out_logprobs is None):
            raise ValueError("masks or a place for log-probabilities are missing")
        filtered = filtered and not greedy
        # What a kernel variant does not read may be any tensor of the right type.
        mask = self._token if draws.mask is None else draws.mask
        rows = (logits, logits.stride(0), self.vocab, draws.temperature)
        masks = (mask, mask.stride(0))
        tiles, tile, places = self._tiles, self._tile, self._places
        by_tile = (tiles, n)
        survey_kernel[by_tile](
            *rows, *masks,
            self._best, self._token, self._sum, self._least, self._raw_best, self._raw_sum,
            tiles, tile, greedy, filtered, masked, logprobs, num_warps=8,
        )  # fmt: skip
        if filtered:
            filters = (draws.top_k, draws.top_p)
            limits = (self.vocab, draws.temperature, *filters)
            above = (self._above_count, self._above_mass)
            begin_kernel[(n,)](
                *rows, *masks, *filters, self._best, self._sum, self._least, self._state, self._length,
                tiles, places, self._sample, masked, num_warps=4,
            )  # fmt: skip
            split_kernel[by_tile](
                *rows, *masks, *filters, self._state, *above, tiles, tile, min(SPLIT_STEP, tile), masked, num_warps=8
            )
            window_kernel[(n,)](*limits, self._state, *above, tiles, places, num_warps=4)
            gather_kernel[by_tile](
                *rows, *masks, self._state, self._length, self._listed,
                tile, min(GATHER_GROUP, tile), masked, num_warps=8,
            )  # fmt: skip
            cut_kernel[(n,)](*limits, self._state, self._length, self._listed, CUT_STEP, num_warps=16)
            weigh_kernel[by_tile](
                *rows, draws.min_p, *masks, self._state, self._sum, self._equal, tiles, tile, masked, num_warps=8
            )
        choose_kernel[(n,)](
            *rows, draws.min_p, draws.uniform, *masks,
            self._best, self._token, self._sum, self._equal, self._raw_best, self._raw_sum, self._state,
            out_tokens, self._raw_sum if out_logprobs is None else out_logprobs,
            tiles, places, tile, greedy, filtered, masked, logprobs, num_warps=16,
        )  # fmt: skip
