"""What guests may know about the model, without torch and without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from realm.models.config import ModelConfig


class TextStream(Protocol):
    """Turns the tokens of one text into pieces of whole characters."""

    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class TokenizerLike(Protocol):
    """What the guest runtime needs of :class:`realm.models.tokenizer.Tokenizer`."""

    @property
    def has_chat_template(self) -> bool: ...

    def encode(self, text: str, special: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], special: bool = False) -> str: ...

    def stream(self, special: bool = False) -> TextStream: ...

    def chat(self, messages: list[dict[str, Any]], generate: bool) -> str: ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Sizes in elements, ``context_length`` in tokens; ``bos`` and ``eos`` are token ids."""

    vocab_size: int
    context_length: int
    bos: int | None
    eos: frozenset[int]
    layers: int
    hidden_size: int

    @property
    def mask_words(self) -> int:
        """``uint32`` words of a mask over the vocabulary."""
        return -(-self.vocab_size // 32)

    @classmethod
    def load(cls, folder: Path, *, bos: int | None = None, eos: frozenset[int] = frozenset()) -> ModelFacts:
        """Read ``folder/config.json``; ``bos`` and ``eos`` of the tokenizer add to what it says.

        Raises:
            RealmError: ``model_invalid`` naming the field.
        """
        config = ModelConfig.load(folder)
        return cls(
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            bos=config.bos if bos is None else bos,
            eos=config.eos | eos,
            layers=config.layers,
            hidden_size=config.hidden_size,
        )
