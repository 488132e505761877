"""From the last layer's rows to drawn tokens, on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from realm.engine.batch import Draws
from realm.engine.kernels.sampling import DeviceDraws, DeviceSampler
from realm.engine.runners.cuda_buckets import Variant
from realm.engine.runners.cuda_kernels import keep
from realm.engine.runners.cuda_pass import DevicePass, Hidden
from realm.engine.runners.cuda_staging import Array, Block, DrawFields

WORD = 32
"""Tokens that one int32 of a mask allows or forbids."""


def fill_draws(host: DrawFields[Array], draws: Draws, variant: Variant) -> None:
    """Write what ``variant`` reads of ``draws``; rows beyond them take the most likely token."""
    if variant.greedy:
        return
    count = len(draws.temperature)
    host.temperature[:count] = draws.temperature
    host.temperature[count:] = 0
    host.uniform[:count] = draws.uniform
    host.uniform[count:] = 0
    if variant.filtered:
        host.top_k[:count] = draws.top_k
        host.top_k[count:] = 0
        host.top_p[:count] = draws.top_p
        host.top_p[count:] = 1
        host.min_p[:count] = draws.min_p
        host.min_p[count:] = 0


class OutputRows:
    """Logits, tokens and log-probabilities of a step's output rows.

    Attributes:
        logits: [rows, vocab], of the model's dtype. tokens: int32 [rows]. logprobs: float32 [rows].
            All are static: the output of the last step that was launched.
    """

    def __init__(self, device_pass: DevicePass, rows: int) -> None:
        model = device_pass.model
        vocab, device = model.config.vocab_size, model.device
        self._pass = device_pass
        self._mask_bytes = -(-vocab // 8)
        self._words = -(-vocab // WORD)
        self._masks = torch.full((rows, self._words), -1, dtype=torch.int32, device=device)
        self._sampler = DeviceSampler(vocab, rows, device)
        self.logits = torch.empty((rows, vocab), dtype=model.dtype, device=device)
        self.tokens = torch.empty(rows, dtype=torch.int32, device=device)
        self.logprobs = torch.empty(rows, dtype=torch.float32, device=device)

    def place_masks(self, block: Block, masks: list[tuple[int, bytes]]) -> tuple[Tensor, Tensor]:
        """Write the masks of a step into ``block``: (rows, words) on the device, for :meth:`spread_masks`."""
        rows, device_rows = block.place(np.int64, len(masks))
        words, device_words = block.place(np.int32, len(masks) * self._words)
        rows[:] = [row for row, _ in masks]
        octets = words.view(np.uint8).reshape(len(masks), -1)
        octets[:, self._mask_bytes :] = 0
        for at, (_, mask) in enumerate(masks):
            octets[at, : self._mask_bytes] = np.frombuffer(mask, np.uint8, self._mask_bytes)
        return device_rows, device_words.view(len(masks), -1)

    def allow_all(self, count: int) -> None:
        """Let the first ``count`` output rows draw any token."""
        self._masks[:count].fill_(-1)

    def spread_masks(self, rows: Tensor, words: Tensor) -> None:
        """Give output rows, int64 [m], the masks that :meth:`place_masks` placed."""
        self._masks.index_copy_(0, rows, words)

    def compute(self, hidden: Hidden) -> None:
        """Logits of the rows."""
        self._pass.logits(hidden, self.logits[: len(hidden.residual)])

    def draw(self, count: int, fields: DrawFields[Tensor], variant: Variant) -> None:
        """Tokens of the first ``count`` rows, from their logits; lanes keep them."""
        tokens, logits = self.tokens[:count], self.logits[:count]
        draws = DeviceDraws(
            fields.temperature,
            fields.top_k,
            fields.top_p,
            fields.min_p,
            fields.uniform,
            self._masks if variant.masked else None,
        )
        self._sampler.sample(logits, count, draws, tokens, self.logprobs, **variant._asdict())
        keep(tokens, fields.lanes, self._pass.lane_tokens)
