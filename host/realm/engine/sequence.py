"""What the engine knows of one sequence."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from realm.engine.kv_cache import PAGE_SIZE
from realm.messages import SamplingParams

TOKEN_BYTES = 4


@dataclass(slots=True)
class Call:
    """A pending ``forward``: done when everything in its sequence is computed.

    Attributes:
        number: the worker's number for the call. order: engine-wide arrival number.
        count: tokens the call appended. cached: of those, how many the prefix cache held.
    """

    number: int
    order: int
    count: int
    sampling: SamplingParams | None
    want_logits: bool
    cached: int = 0
    matched: bool = False


@dataclass(slots=True)
class Sequence:
    """Tokens of one sequence and how much of their KV stands in pages.

    ``tokens`` is the truth; pages can be dropped at any time (preemption) and are recomputed.

    Invariants: ``computed <= len(tokens)``; ``len(pages) * PAGE_SIZE >= computed``;
    ``keys[i]`` is the key of ``pages[i]`` for the leading full pages whose key is known.

    Attributes:
        arrival: engine-wide number of the sequence's creation; older ones are preempted last.
        last_step: number of the last step that computed it.
    """

    id: int
    worker: int
    tenant: str
    run: int
    arrival: int
    root: bytes
    tokens: array[int] = field(default_factory=lambda: array("I"))
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    call: Call | None = None
    last_step: int = -1

    @property
    def remaining(self) -> int:
        """Tokens still to compute before the pending call is done."""
        return len(self.tokens) - self.computed

    def page_tokens(self, page: int) -> bytes:
        """uint32 bytes of the tokens of the page at index ``page``."""
        return self.tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes()

    def parent_key(self, page: int) -> bytes:
        """Key that page index ``page`` is chained to; all earlier pages must have keys."""
        return self.keys[page - 1] if page else self.root
