"""The engine under a plain loop, without guests: what tokens cost when nobody is behind them.

Run as ``python -m realm.bench.native``, a process of its own so that the device's memory is free again when
it ends: a :class:`Job` comes as a line of JSON on standard input, and each case's measure leaves as a line.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from realm.bench.children import Children
from realm.bench.workload import Measured, Prompts, Workload
from realm.engine.lanes import ANSWER, CLAIM
from realm.engine.options import EngineOptions
from realm.engine.workers import WORKER_SHIFT
from realm.errors import RealmError
from realm.messages import (
    NO_LANE,
    EndRun,
    EngineOp,
    EngineResult,
    Forward,
    ForwardDone,
    OpenSequence,
    SamplingParams,
)
from realm.settings import ServeSettings
from realm.supervisor import engine_environment

if TYPE_CHECKING:
    from realm.engine.core import EngineCore

_WORKER = 1


class Job(msgspec.Struct, kw_only=True):
    """What the process is to do. ``model`` is the model's folder, token ids of prompts are below ``vocab``."""

    model: str
    options: EngineOptions
    workload: Workload
    vocab: int


def measure_native(
    settings: ServeSettings,
    workload: Workload,
    model: Path,
    *,
    vocab: int,
    quiet: bool,
    progress: Callable[[str], None],
) -> Iterator[Measured]:
    """All cases of a workload, in a process that loads the engine for itself.

    Raises:
        RealmError: ``bench_failed`` when that process fails.
    """
    job = Job(model=str(model), options=settings.engine, workload=workload, vocab=vocab)
    progress("loading the model, without guests")
    with Children(quiet=quiet) as children:
        child = children.spawn("realm.bench.native", environment=engine_environment(settings), talks=True)
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(msgspec.json.encode(job) + b"\n")
        child.stdin.close()
        for count, _, counts in workload.rounds():
            line = child.stdout.readline()
            if not line:
                child.wait()
                raise children.failure("the process without guests has ended")
            progress(f"{count} sequences without guests")
            if counts:
                yield msgspec.json.decode(line, type=Measured)


class _Loop:
    """Sequences that go on with each token they get, as the guests of a worker do."""

    def __init__(self, core: EngineCore, workload: Workload) -> None:
        self._core = core
        self._workload = workload
        self._most_in_flight = 2 if core.run_ahead else 1
        self._next = (_WORKER << WORKER_SHIFT) + 1

    def measure(self, prompts: Prompts, count: int, new: int) -> Measured:
        """Draw ``new`` tokens for each of ``count`` prompts. Sequences and their calls have the same numbers."""
        core = self._core
        self._base, self._new, self._left = self._next, new, count
        self._next += count
        self._made = np.zeros(count, np.int64)
        ops: list[EngineOp] = []
        for at, prompt in enumerate(prompts.take(count)):
            number = self._base + at
            ops += [OpenSequence(number, f"t{at % 3}", number)]
            ops += [Forward(number, number, prompt.astype("<u4").tobytes(), self._sampling(at), False)]
        before, cpu, began = core.stats(), time.thread_time(), time.perf_counter()
        first: float | None = None
        core.submit(_WORKER, ops)
        while self._left:
            while core.in_flight < self._most_in_flight and core.launch():
                pass
            core.settle(wait=True)
            for results, drawn in core.take().values():
                self._go_on(results, drawn)
            if first is None and self._made.all():
                first = time.perf_counter() - began
        seconds, cpu = time.perf_counter() - began, time.thread_time() - cpu
        core.submit(_WORKER, [EndRun(self._base + at) for at in range(count)])
        after = core.stats()
        return Measured(
            requests=count,
            tokens=count * new,
            began=began,
            seconds=seconds,
            last_first_seconds=first,
            steps=after.steps - before.steps,
            rows=after.sequences - before.sequences,
            device_seconds=after.busy_seconds - before.busy_seconds,
            engine_cpu=cpu,
        )

    def _sampling(self, at: int) -> SamplingParams:
        workload = self._workload
        if not workload.temperature:
            return SamplingParams()
        return SamplingParams(
            temperature=workload.temperature,
            top_p=workload.top_p,
            top_k=workload.top_k,
            key=self._base + at,
            number=int(self._made[at]),
        )

    def _go_on(self, results: list[EngineResult], drawn: bytes) -> None:
        """Call again for every sequence that has a token and needs more."""
        rows = np.frombuffer(drawn, ANSWER)
        at = (rows["call"] - self._base).astype(np.int64)
        self._made[at] += 1
        going = self._made[at] < self._new
        self._left -= len(rows) - int(going.sum())
        held = going & (rows["lane"] != NO_LANE)
        continues = np.empty(int(held.sum()), CLAIM)
        for name in ("call", "lane", "token"):
            continues[name] = rows[name][held]
        continues["seq"] = continues["call"]
        ops: list[EngineOp] = [
            self._forward(int(row["call"]), int(row["token"])) for row in rows[going & (rows["lane"] == NO_LANE)]
        ]
        for result in results:
            if not isinstance(result, ForwardDone):
                raise RealmError("bench_failed", f"a call failed: {result}")
            self._made[result.call - self._base] += 1
            if self._made[result.call - self._base] < self._new:
                ops.append(self._forward(result.call, result.token))
            else:
                self._left -= 1
        self._core.submit(_WORKER, ops, continues.tobytes())

    def _forward(self, number: int, token: int) -> Forward:
        return Forward(number, number, token.to_bytes(4, "little"), self._sampling(number - self._base), False)


def main() -> int:
    """Entry point of the process; returns its exit status."""
    from realm.engine.loading import load_engine

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    try:
        # As the engine's own process computes.
        core = load_engine(Path(job.model), dataclasses.replace(job.options, threaded=True))
        gc.collect()
        gc.freeze()
        loop = _Loop(core, job.workload)
        prompts = Prompts(job.vocab, job.workload.prompt, job.workload.seed)
        for count, new, _ in job.workload.rounds():
            sys.stdout.buffer.write(msgspec.json.encode(loop.measure(prompts, count, new)) + b"\n")
            sys.stdout.buffer.flush()
        core.close()
    except RealmError as error:
        logging.getLogger("realm.bench").error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
