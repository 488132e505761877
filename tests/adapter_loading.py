"""A loader of adapters that does its work when a test says so."""

from __future__ import annotations

from collections.abc import Callable

from realm.engine.core import EngineCore
from realm.errors import RealmError
from tests.checked_runner import CheckedMemory, FakeWeights

Outcome = FakeWeights | Exception | None


class ManualLoader:
    """See :class:`realm.engine.adapter_loader.AdapterLoader`. The content of a file is said by its path:
    ``"<contents> <bytes>"``, or ``"broken"``.

    Attributes:
        reads, puts: how many were asked for.
    """

    def __init__(self, memory: CheckedMemory) -> None:
        self.busy = False
        self.reads = self.puts = 0
        self._memory = memory
        self._job: Callable[[], Outcome] | None = None
        self._outcome: tuple[Outcome] | None = None

    def fileno(self) -> int:
        return -1

    def read(self, path: str, sha256: str, config: bytes) -> None:
        def job() -> Outcome:
            if path == "broken":
                return RealmError("adapter_invalid", "it is broken")
            contents, size = map(int, path.split())
            if size > self._memory.capacity:
                return RealmError("adapter_too_large", "it is too large")
            return FakeWeights(contents, size)

        self.reads += 1
        self._begin(job)

    def put(self, slot: int, at: int, weights: FakeWeights) -> None:
        self.puts += 1
        self._begin(lambda: self._memory.put(slot, at, weights))

    def _begin(self, job: Callable[[], Outcome]) -> None:
        assert not self.busy, "two jobs at a time"
        self.busy = True
        self._job = job

    def work(self) -> bool:
        """Do the job that was asked for; False if there is none."""
        if self._job is None:
            return False
        self._outcome = (self._job(),)
        self._job = None
        return True

    def take(self) -> tuple[Outcome] | None:
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self.busy = False
        return outcome

    def close(self) -> None:
        pass


def manual_loading(engine: EngineCore) -> ManualLoader:
    """Let an engine's adapters be loaded by hand."""
    memory = engine.runner.adapters
    assert isinstance(memory, CheckedMemory)
    engine.adapters.close()
    loader = ManualLoader(memory)
    engine.adapters._loader = loader  # type: ignore[assignment]
    return loader
