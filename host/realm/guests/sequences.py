"""The sequences of one guest, as the worker knows them: handles, lengths, kept logits, draws."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from realm.guests.draws import stream_key

if TYPE_CHECKING:
    from realm.guests.calls_model import ForwardAnswer


class GuestSequence:
    """One sequence.

    Attributes:
        handle: the guest's name for it, which is its ordinal in the run.
        id: the engine's number for it, unique over all workers.
        length: tokens so far, counted when a call is made.
        sampled: the token drawn last and not yet forwarded, or -1.
        logits: the kept logits, float32 bytes of vocab entries, or None.
        draws: numbers of its random stream that are used up.
        unknown: leading tokens whose values this worker does not know (it was opened by name).
        lane: what the engine has to be told to go on with this sequence by a row of
            :data:`~realm.messages.CONTINUE`, or -1 when something else was asked of it since.
        going: the ``realm_sampling`` of its last call where a row can repeat it, else None.
        answer: takes the engine's answer to a ``forward``; made by the first one.
    """

    # fmt: off
    __slots__ = (
        "_frozen", "_key", "_tail", "answer", "draws", "going", "handle", "id", "lane", "length", "logits", "sampled",
        "unknown",
    )
    # fmt: on

    def __init__(self, id: int, seed: int, ordinal: int) -> None:
        self.id = id
        self.handle = ordinal
        self.length = 0
        self.sampled = -1
        self.logits: bytes | None = None
        self.unknown = 0
        self._key = stream_key(seed, ordinal)
        self.draws = 0
        self.lane = -1
        self.going: bytes | None = None
        self.answer: ForwardAnswer | None = None
        # Tokens: pieces shared with forks, then the own ones.
        self._frozen: tuple[bytes, ...] = ()
        self._tail = array("I")

    def append(self, tokens: bytes) -> None:
        """``tokens`` are uint32 bytes."""
        self._tail.frombytes(tokens)
        self.length += len(tokens) >> 2

    def truncate(self, length: int) -> None:
        """Drop the tokens after the first ``length``; kept logits and the drawn token go too."""
        dropped = self.length - length
        if dropped <= len(self._tail):
            del self._tail[len(self._tail) - dropped :]
        else:
            tokens = array("I")
            tokens.frombytes(self.tokens()[: max(0, length - self.unknown) * 4])
            self._frozen, self._tail = (), tokens
            self.unknown = min(self.unknown, length)
        self.length = length
        self.logits = None
        self.sampled = self.lane = -1

    def change_model(self) -> None:
        """Its tokens stay; what another model gave for them goes: kept logits and the drawn token."""
        self.logits = self.going = None
        self.sampled = self.lane = -1

    def fork(self, id: int, seed: int, ordinal: int) -> GuestSequence:
        """A copy with its own draws. Tokens and logits are shared, not copied."""
        if self._tail:
            self._frozen += (self._tail.tobytes(),)
            self._tail = array("I")
        self.lane = -1
        child = GuestSequence(id, seed, ordinal)
        child.length = self.length
        child.sampled = self.sampled
        child.logits = self.logits
        child.unknown = self.unknown
        child.draws = self.draws
        child._frozen = self._frozen
        return child

    def tokens(self) -> bytes:
        """All known tokens (after the first ``unknown``), uint32 bytes."""
        return b"".join((*self._frozen, self._tail.tobytes()))

    def draw_key(self, seed: int | None) -> int:
        """The key of its draws (:func:`~realm.guests.draws.uniform`); ``seed`` in place of the run's seed."""
        return self._key if seed is None else stream_key(seed, 0)
