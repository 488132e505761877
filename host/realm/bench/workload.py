"""What a benchmark asks of a host, and what it measures."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from realm.bench.adapters import NONE, AdapterUse

Prompt = npt.NDArray[np.uint32]


class Workload(msgspec.Struct, kw_only=True, frozen=True):
    """Requests that come all at once, each with a prompt of its own.

    Attributes:
        guests: numbers of concurrent requests; each is a case.
        prompt, new: tokens of each request.
        temperature, top_p, top_k: how tokens are drawn, as in :class:`realm.messages.SamplingParams`.
        repeats: how often each case is measured, all cases in turn.
        warm_new: new tokens of each case's warm-up, which is not measured.
        seed: of prompts and draws.
        adapters: which there are and who uses them; None for none.
    """

    guests: list[int]
    prompt: int = 128
    new: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repeats: int = 3
    warm_new: int = 16
    seed: int = 1
    adapters: AdapterUse | None = None

    def rounds(self) -> list[tuple[int, int, bool]]:
        """What to run, in order: (requests, new tokens of each, whether it is measured)."""
        warm = [(count, min(self.warm_new, self.new), False) for count in self.guests]
        return warm + [(count, self.new, True) for _ in range(self.repeats) for count in self.guests]

    def adapter_rounds(self) -> list[tuple[int, int, bool, bool]]:
        """What to run for each number of registered adapters, in order: as :meth:`rounds`, each without adapters
        and then with them; whether they are used comes last.
        """
        return [(*round, used) for round in self.rounds() for used in (False, True)]

    def once(self) -> int:
        """How often is measured without adapters: cases times repeats."""
        return len(self.guests) * self.repeats

    def measures(self) -> int:
        """How often is measured in all, where guests use adapters if there are any."""
        if self.adapters is None:
            return self.once()
        return self.once() * sum(2 if registered else 1 for registered in self.adapters.counts)

    def guest_input(self, prompt: Prompt, new: int, adapter: str = "") -> str:
        """The input of the ``bench`` guest."""
        head = f"{new} {round(self.temperature * 1000)} {round(self.top_p * 1000)} {self.top_k} "
        return head + " ".join(map(str, prompt.tolist())) + (f" @{adapter}" if adapter else "")


class Prompts:
    """Random prompts. No page of one is like a page of another, so none comes from the prefix cache."""

    def __init__(self, vocab: int, size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._vocab = vocab
        self._size = size

    def take(self, count: int) -> list[Prompt]:
        """So many prompts, each an array of token ids, uint32 [size]."""
        return list(self._rng.integers(0, self._vocab, (count, self._size), dtype=np.uint32))


class Measured(msgspec.Struct, kw_only=True):
    """One case, measured once. None is what this kind of benchmark does not see.

    Attributes:
        requests: how many there were. tokens: how many they drew, together.
        began: when, on the clock of :func:`time.perf_counter`, so that a trace can be cut.
        seconds: from the first request's start to the last one's end.
        first_seconds: from the start to the first output: of the median request.
        last_first_seconds: the same of the request that got it last.
        steps: model passes. rows: sequences that they computed, counted once a pass.
        device_seconds: how long the device computed.
        engine_cpu: processor seconds of the engine's main thread, with those in which it asks a device again and
            again whether it is done (a trace tells them apart). workers_cpu: of all guest workers.
        gateway_cpu: of the gateway.
        ahead: tokens computed before their guest had asked for them, and used. wasted: the same, not used.
        adapters: how many are registered. mix: how guests draw theirs; "none": they have none.
        adapter_requests: how many requests have one, of which adapter_different are different.
        adapter_seconds: from the first request's start to the end of the last one that has an adapter.
        plain_seconds: the same for those that have none; None if there are no such ones, as for adapter_seconds.
        adapters_resident: how many steps could use at once when all had ended, without bringing them in.
        loads: adapters that were read from disk meanwhile.
    """

    requests: int
    tokens: int
    began: float
    seconds: float
    first_seconds: float | None = None
    last_first_seconds: float | None = None
    steps: int | None = None
    rows: int | None = None
    device_seconds: float | None = None
    engine_cpu: float | None = None
    workers_cpu: float | None = None
    gateway_cpu: float | None = None
    ahead: int | None = None
    wasted: int | None = None
    adapters: int | None = None
    mix: str = NONE
    adapter_requests: int = 0
    adapter_different: int = 0
    adapter_seconds: float | None = None
    plain_seconds: float | None = None
    adapters_resident: int | None = None
    loads: int | None = None

    @property
    def rate(self) -> float:
        """New tokens a second, prefill included."""
        return self.tokens / self.seconds
