"""Adapters of a benchmark: which there are, which guest uses which, and the files that the engine reads.

Their weights are made up: what a step takes depends on ranks and on how many different ones it has, not on values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE, write_random_adapter
from realm.errors import RealmError
from realm.messages import AdapterFile
from realm.models.config import ModelConfig

TARGETS = {
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}
"""Modules that an adapter can change, by what the command line calls them."""

NONE, UNIFORM, ZIPF = "none", "uniform", "zipf"
MIXES = (UNIFORM, ZIPF)


class AdapterUse(msgspec.Struct, kw_only=True, frozen=True):
    """Which adapters there are, and what part guests take of them.

    Attributes:
        counts: numbers of registered adapters, in ascending order; each is measured with all numbers of guests, on
            the same engine. 0 comes first, before any is registered.
        rank: of each adapter. targets: modules that it changes, of :data:`TARGETS`' keys.
        mix: how a guest draws its adapter: ``uniform``, or ``zipf``: the k-th is drawn in proportion to 1 / k.
        share: part of the guests that draw one, more than 0; the others have none.
        warm: every adapter is applied once before its case is measured, so that what is measured reads from disk
            only what the engine's memory does not hold. Otherwise the warm-ups load what they draw.
    """

    counts: list[int]
    rank: int = 16
    targets: list[str] = msgspec.field(default_factory=lambda: ["q", "k", "v", "o"])
    mix: str = UNIFORM
    share: float = 1.0
    warm: bool = True


def adapter_name(number: int) -> str:
    """Of the adapter with this number, from 0 on."""
    return f"adapter-{number}"


class Draws:
    """Which guests use which adapter: the same for the same seed."""

    def __init__(self, use: AdapterUse, seed: int) -> None:
        self._use = use
        self._rng = np.random.default_rng((seed, 0xADA))

    def take(self, registered: int, guests: int) -> list[str]:
        """The adapter's name for each of ``guests`` guests, "" for those without."""
        using = round(self._use.share * guests)
        chances = None
        if self._use.mix == ZIPF:
            weights = 1.0 / np.arange(1, registered + 1)
            chances = weights / weights.sum()
        drawn = self._rng.choice(registered, size=using, p=chances)
        names = [adapter_name(int(number)) for number in drawn] + [""] * (guests - using)
        # Guests go to workers and tenants in turn: whoever has none must not always be the same one's.
        return [names[at] for at in self._rng.permutation(guests)]


class Library:
    """Made-up adapters in a folder, written when they are first wanted."""

    def __init__(self, folder: Path, model: ModelConfig, use: AdapterUse) -> None:
        self._folder = folder
        self._model = model
        self._use = use
        self._written = 0

    def up_to(self, count: int) -> Iterator[AdapterFile]:
        """Those of the first ``count`` adapters that were not given before, as the gateway announces them to the
        engine: shared ones, which every tenant's guests find.

        Raises:
            RealmError: ``bench_failed`` when they cannot be written.
        """
        while self._written < count:
            number, self._written = self._written, self._written + 1
            yield write_adapter(
                self._folder / f"{number}", self._model, adapter_name(number), self._use.rank, self._use.targets, number
            )


def write_adapter(
    folder: Path, model: ModelConfig, name: str, rank: int, targets: list[str], seed: int, *, tenant: str = ""
) -> AdapterFile:
    """Make up one adapter in ``folder``, in bfloat16, and say what the gateway would say of it.

    Raises:
        RealmError: ``bench_failed`` when it cannot be written.
    """
    try:
        write_random_adapter(
            folder, model, rank=rank, targets=tuple(TARGETS[target] for target in targets), seed=seed, dtype="BF16"
        )
        file = folder / TENSORS_FILE
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        config = (folder / CONFIG_FILE).read_bytes()
    except OSError as error:
        raise RealmError("bench_failed", f"adapters cannot be written to {folder}: {error}") from None
    return AdapterFile(tenant=tenant, name=name, path=str(file), sha256=digest, config=config)
