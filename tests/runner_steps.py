"""Steps for a runner by itself, where lane n has the pages n * WIDTH to n * WIDTH + WIDTH - 1."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from realm.engine.batch import Chunk, Decodes, StepBatch
from realm.engine.sampling import draws_of
from realm.messages import SamplingParams
from realm.models.llama import LlamaModel

LANES, PAGES, WIDTH = 8, 130, 16
SPARE = LANES * WIDTH
"""A page of no lane."""
GREEDY = SamplingParams()


def decodes(rows: dict[int, tuple[int, int]], tables: np.ndarray | None = None) -> Decodes:
    """``rows``: lane -> (token, position). Lane n has pages n * WIDTH.. unless ``tables`` say otherwise."""
    if tables is None:
        tables = np.arange(LANES * WIDTH, dtype=np.int32).reshape(LANES, WIDTH)
    tokens, positions = (np.array([row[at] for row in rows.values()], np.int32) for at in (0, 1))
    return Decodes(np.array([*rows], np.int32), tokens, positions, tables, int(positions.max(initial=-1)) + 1)


def chunk(tokens: list[int], start: int, lane: int, *, draws: bool = True) -> Chunk:
    return Chunk(np.array(tokens, np.uint32), start, [lane * WIDTH + page for page in range(WIDTH)], draws, lane)


def step(
    rows: dict[int, tuple[int, int]],
    *chunks: Chunk,
    params: list[SamplingParams] | None = None,
    logits: list[int] | None = None,
) -> StepBatch:
    batch = StepBatch(decodes(rows), list(chunks), draws_of([]), logits or [])
    batch.draws = draws_of([GREEDY] * batch.outputs if params is None else params)
    return batch


class Gate:
    """Steps come up to it in the computing thread; each :meth:`open` lets some through."""

    def __init__(self, model: LlamaModel) -> None:
        self._hidden = model.hidden
        self._passes = threading.Semaphore(0)
        self.reached = threading.Semaphore(0)

    def open(self, count: int = 1) -> None:
        self._passes.release(count)

    def __call__(self, *args: Any) -> torch.Tensor:
        self.reached.release()
        assert self._passes.acquire(timeout=60)
        return self._hidden(*args)
