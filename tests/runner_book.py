"""Sequences in lanes and pages, as the engine's core keeps them, for tests of a runner alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from realm.engine.batch import Chunk, Decodes, Draws, Runner, StepBatch
from realm.engine.kv_cache import PAGE_SIZE
from realm.engine.sampling import draws_of
from realm.messages import SamplingParams

GREEDY = SamplingParams()


class Book:
    """One sequence a lane; pages come in a random order."""

    def __init__(self, runner: Runner, seed: int = 0) -> None:
        width = -(-runner.config.context_length // PAGE_SIZE)
        self.tables = np.full((runner.lanes, width), runner.pages, np.int32)
        self.lengths = [0] * runner.lanes
        self.free = list(range(runner.pages))
        random.Random(seed).shuffle(self.free)

    def grow(self, lane: int, count: int) -> int:
        """Take pages for ``count`` more tokens of a lane; returns where they begin."""
        start = self.lengths[lane]
        self.lengths[lane] += count
        for page in range(-(-start // PAGE_SIZE), -(-self.lengths[lane] // PAGE_SIZE)):
            self.tables[lane, page] = self.free.pop()
        return start

    def drop(self, lane: int) -> None:
        """Give a lane's pages back; its row of the tables keeps what it held."""
        used = -(-self.lengths[lane] // PAGE_SIZE)
        self.free += self.tables[lane, :used].tolist()
        self.lengths[lane] = 0

    def chunk(self, lane: int, tokens: Sequence[int], *, draws: bool = True) -> Chunk:
        """Some tokens of a lane's prompt."""
        start = self.grow(lane, len(tokens))
        used = -(-self.lengths[lane] // PAGE_SIZE)
        return Chunk(np.asarray(tokens, np.uint32), start, self.tables[lane, :used].tolist(), draws, lane)

    def decodes(self, tokens: dict[int, int]) -> Decodes:
        """One token for each lane of ``tokens``."""
        lanes = np.array(list(tokens), np.int32)
        positions = np.array([self.grow(lane, 1) for lane in tokens], np.int32)
        longest = int(positions.max()) + 1 if tokens else 0
        return Decodes(lanes, np.array(list(tokens.values()), np.int32), positions, self.tables, longest)

    def step(
        self,
        tokens: dict[int, int],
        chunks: Sequence[Chunk] = (),
        sampling: Sequence[SamplingParams] | None = None,
        logits: Sequence[int] = (),
    ) -> StepBatch:
        """A step of decoding lanes and chunks; greedy unless ``sampling`` says how each output row is drawn."""
        outputs = len(tokens) + sum(chunk.draws for chunk in chunks)
        draws: Draws = draws_of([GREEDY] * outputs if sampling is None else sampling)
        return StepBatch(self.decodes(tokens), list(chunks), draws, list(logits))
