"""Guests of :class:`realm.bench.processes.Processes` whose every piece of output is kept, with its time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from realm.bench.processes import Processes
from realm.bench.workload import Prompt, Workload
from realm.guests.compiler import CompiledModule
from realm.run_messages import Output

SILENCE_SECONDS = 120.0
"""After so long without a word runs count as stuck."""


@dataclass(eq=False)
class Run:
    """One guest. ``times`` and ``counts`` are of its pieces: when each came, and how many tokens there were by then."""

    number: int
    began: float
    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    ended: float | None = None
    tokens: int = 0
    cancelled: bool = False

    def gaps(self) -> list[float]:
        """Seconds between one token and the next, from the first on. Tokens that came together share their time."""
        found: list[float] = []
        for at in range(1, len(self.times)):
            count = self.counts[at] - self.counts[at - 1]
            found += [(self.times[at] - self.times[at - 1]) / count] * count if count else []
        return found


class Watch:
    """Starts guests, and takes the events of all of them."""

    def __init__(self, processes: Processes, module: CompiledModule, workload: Workload) -> None:
        self._processes = processes
        self._module = module
        self._workload = workload
        self._runs: dict[int, Run] = {}

    def start(self, wanted: Iterable[tuple[str, Prompt, int, str]]) -> list[Run]:
        """Start guests (tenant, prompt, new tokens, adapter) at once."""
        began, numbers = self._processes.start(self._workload, self._module, wanted)
        runs = [Run(number, began) for number in numbers]
        self._runs |= {run.number: run for run in runs}
        return runs

    def cancel(self, runs: Iterable[Run]) -> None:
        """End runs before they have ended by themselves."""
        for run in runs:
            run.cancelled = True
            self._processes.cancel([run.number])

    def until(self, done: Callable[[], bool]) -> None:
        """Take events until ``done``. Raises RealmError ``bench_failed`` if a run fails or nothing comes."""
        while not done():
            if not self.take(SILENCE_SECONDS):
                raise self._processes.failure("runs are stuck")

    def take(self, seconds: float) -> int:
        """Take what comes next, within ``seconds``; how many events that were."""
        at, events = self._processes.events(seconds)
        for event in events:
            run = self._runs[event.run]
            if isinstance(event, Output):
                run.times.append(at)
                run.counts.append(event.tokens)
                run.text += event.data
            else:
                if not run.cancelled and (event.outcome != "complete" or event.code):
                    raise self._processes.failure(f"a run ended otherwise than it should: {event}")
                run.ended, run.tokens = at, event.usage.new_tokens
        return len(events)


def all_ended(runs: list[Run]) -> Callable[[], bool]:
    return lambda: all(run.ended is not None for run in runs)


def all_began(runs: list[Run]) -> Callable[[], bool]:
    """Whether each has given a piece, or ended without one."""
    return lambda: all(run.times or run.ended is not None for run in runs)
