"""Which batch sizes have a graph of their own: few enough to capture, close enough to waste little."""

from __future__ import annotations

from bisect import bisect_left
from itertools import product
from typing import NamedTuple

from realm.engine.batch import Draws

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


def bucket_sizes(lanes: int) -> list[int]:
    """Batch sizes to capture for up to ``lanes`` rows, ascending; ``lanes`` is the last.

    Above 256 they are an eighth to a quarter apart: a matrix product's time grows in steps of its tiles.
    """
    sizes = [size for size in _SIZES if size < lanes]
    size = _SIZES[-1]
    while size < lanes:
        sizes += [size] if size > sizes[-1] else []
        size += max(64, 1 << (size.bit_length() - 3))
    return [*sizes, lanes]


def fit(sizes: list[int], rows: int) -> int:
    """The least of ``sizes`` that holds ``rows``."""
    return sizes[bisect_left(sizes, rows)]


GRAPH_TOKENS = 2048
"""Tokens of chunks up to which any step is filled up and captured; with more, filling up costs too much."""

_FULL = 7 / 8
"""Part of the token budget from which on a step counts as full, and is filled up too: where prompts wait, most are."""

_LEAST_TOKENS = 16
_DECODES = (0, 8, 32, 64, 128, 256)
_ADAPTED_DECODES = (0, 8, 64, 256)
"""With adapters there are fewer: each is captured twice, and most steps fill one of these up."""

_MOST_CHUNKS = 64
_TOKENS_OF_CHUNK = 16
_TOKENS_OF_FULL_CHUNK = 64


class Room(NamedTuple):
    """What a captured step with chunks has room for."""

    decodes: int
    tokens: int
    chunks: int

    def holds(self, decodes: int, tokens: int, chunks: int) -> bool:
        """Whether a step fits, and does not leave too much of it empty."""
        fits = tokens <= self.tokens and chunks <= self.chunks and decodes <= self.decodes
        return fits and (self.tokens <= GRAPH_TOKENS or tokens >= _FULL * self.tokens)


def chunk_rooms(token_budget: int, rows: int, *, adapted: bool = False) -> list[Room]:
    """Rooms to capture, ascending in tokens and then in decoding rows.

    A prompt that arrives alone needs few chunks; many chunks of few tokens take the room of more tokens.

    Args:
        token_budget: most tokens of a step's chunks. rows: most output rows of a step.
        adapted: for steps in which some rows have adapters.
    """
    tokens = _LEAST_TOKENS
    sizes = [(tokens, 4)]
    while tokens < min(token_budget, GRAPH_TOKENS):
        tokens *= 2
        sizes.append((tokens, min(_MOST_CHUNKS, max(4, tokens // _TOKENS_OF_CHUNK))))
    if token_budget > GRAPH_TOKENS:
        sizes.append((token_budget, max(_MOST_CHUNKS, token_budget // _TOKENS_OF_FULL_CHUNK)))
    rooms: list[Room] = []
    for tokens, wanted in sizes:
        chunks = min(wanted, max(1, rows // 2))
        most = rows - chunks
        usual = _ADAPTED_DECODES if adapted else _DECODES
        rooms += [Room(decodes, tokens, chunks) for decodes in [*(d for d in usual if d < most), most]]
    return rooms


def most_rows(token_budget: int, rows: int) -> int:
    """The most rows of any step, those that only fill it included."""
    return chunk_rooms(token_budget, rows)[-1].tokens + rows


class Variant(NamedTuple):
    """What a step's draws need: each combination is a graph of its own, so that no step pays for others.

    Attributes:
        greedy: every row takes the most likely token. filtered: some row has a top-k, top-p or min-p.
        masked: some row has a mask. logprobs: some row asks for its log-probability.
    """

    greedy: bool
    filtered: bool
    masked: bool
    logprobs: bool

    @classmethod
    def of(cls, draws: Draws) -> Variant:
        """What ``draws`` need. A greedy step has no filters: they keep the most likely token."""
        greedy = draws.greedy
        return cls(greedy, not greedy and draws.filtered, bool(draws.masks), bool(draws.logprob.any()))


COMMON = (
    Variant(True, False, False, False),
    Variant(False, False, False, False),
    Variant(False, True, False, False),
)
"""Captured at the start; the others when they are first needed."""

RARE = tuple(
    variant
    for variant in (Variant(*flags) for flags in product((True, False), repeat=4))
    if variant not in COMMON and not (variant.greedy and variant.filtered)
)
"""The others."""
