"""Carries out a step plan on the model: one pass over all sequences of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from realm.engine.attention.sdpa import KvCache, PagedAttention, SequenceRows, decode_order
from realm.engine.scheduler import Part, StepPlan
from realm.models.llama import LlamaModel


class ModelRunner:
    """Owns the model's weights and the KV cache's tensors."""

    def __init__(self, model: LlamaModel, pages: int) -> None:
        config = model.config
        self.model = model
        self._cache = KvCache(config.layers, pages, config.kv_heads, config.head_dim, model.dtype, model.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan, parts: list[Part]) -> Tensor | None:
        """Compute every part of the plan.

        Returns:
            Logits, float32 [m, vocab], of the last token of each of ``parts`` (in that order), which
            are the parts whose calls want them; None when there are none.
        """
        if plan.fresh:
            self._cache.clear(plan.fresh)
        if plan.copies:
            self._cache.copy(plan.copies)
        decodes = [part for part in plan.parts if part.count == 1]
        order = decode_order([part.start for part in decodes])
        batch = [decodes[index] for index in order] + [part for part in plan.parts if part.count > 1]
        rows = [SequenceRows(part.count, part.start + part.count, part.sequence.pages) for part in batch]
        attention = PagedAttention(self._cache, rows, self.model.dtype)
        ids: list[int] = []
        last: dict[int, int] = {}
        for part in batch:
            ids += part.sequence.tokens[part.start : part.start + part.count]
            last[part.sequence.id] = len(ids) - 1
        hidden = self.model.hidden(torch.tensor(ids), attention.positions, attention)
        if not parts:
            return None
        return self.model.logits(hidden[[last[part.sequence.id] for part in parts]])
