"""What a streamed token costs a guest worker, links included: the processor time of its own thread.

The worker of the host, with guests that stream an answer (``generate``: forward, detokenize, emit), sits
between an engine and a gateway played by this process, whose time is not counted. The engine answers
all calls at once, as it does where every guest is in every step. Run from the repository's root:

    python -m tests.benchmarks.bench_worker_tokens [--guests 1,32,256] [--tokens 100] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import json
import pstats
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from realm.channel import BlockingChannel
from realm.guests.compiler import compile_module_sync
from realm.guests.facts import ModelFacts
from realm.guests.runtime import GuestRuntime, Turn, tune_collector, tune_switching
from realm.guests.worker import GuestWorker
from realm.messages import CONTINUE, DRAWN, EngineReply, EngineResult, EngineToWorker, Forward, ForwardDone, ToEngine
from realm.models.tokenizer import Tokenizer
from realm.run_messages import GatewayToWorker, Output, RunFinished, RunLimits, StartRun, TenantShare, WorkerToGateway
from tests.model_files import write_folder

BUILTIN = Path(__file__).parents[2] / "host/realm/guests/builtin/generate.wasm"
TOKEN = 70
"""A letter: each token becomes text at once."""
NAN = float("nan")


class Bench:
    """One worker and its peers."""

    def __init__(self, tokenizer: Tokenizer, facts: ModelFacts, *, messages: bool = False) -> None:
        self._messages = messages
        self._rows = bytearray()
        links = [socket.socketpair() for _ in range(2)]
        self.engine: BlockingChannel[Any] = BlockingChannel(links[0][0], ToEngine)
        self.gateway: BlockingChannel[Any] = BlockingChannel(links[1][0], WorkerToGateway)
        self.runtime = GuestRuntime(1, tokenizer, facts)
        self.worker = GuestWorker(
            self.runtime,
            BlockingChannel(links[0][1], EngineToWorker),
            BlockingChannel(links[1][1], GatewayToWorker),
        )
        self.turn = Turn()
        self.replies = self.frames = self.outputs = self.bytes = self.finished = 0

    def worker_turn(self) -> float:
        """What the worker's loop does once it has something to do; processor seconds."""
        began = time.thread_time()
        self.turn = self.worker._serve(Turn(busy=True))
        return time.thread_time() - began

    def collect(self) -> None:
        """Take in what the worker sent."""
        for message in self.engine.receive():
            for op in message.ops:
                if isinstance(op, Forward):
                    self._rows += DRAWN.pack(op.call, TOKEN, NAN, 0, op.seq & 0xFFFF)
            for call, seq, _lane, _token in CONTINUE.iter_unpack(message.continues):
                self._rows += DRAWN.pack(call, TOKEN, NAN, 0, seq & 0xFFFF)
        for message in self.gateway.receive():
            self.frames += 1
            for event in message.events:
                if isinstance(event, Output):
                    self.outputs += 1
                    self.bytes += len(event.data)
                elif isinstance(event, RunFinished):
                    assert event.error is None, event.error
                    self.finished += 1

    @property
    def waiting(self) -> int:
        """Calls that have no answer yet."""
        return len(self._rows) // DRAWN.size

    def answer(self) -> None:
        """One reply to all calls."""
        rows, self._rows = bytes(self._rows), bytearray()
        self.replies += 1
        results: list[EngineResult] = []
        if self._messages:
            results = [ForwardDone(call, *rest) for call, *rest, _lane in DRAWN.iter_unpack(rows)]
        self.engine.send(EngineReply(self.replies, results, b"" if self._messages else rows))


def measure(
    bench: Bench, artifact: Path, guests: int, tokens: int, temperature: float, profile: cProfile.Profile | None
) -> dict[str, float]:
    """Microseconds of the worker for each token that all guests drew together."""
    digest = hashlib.sha256(artifact.read_bytes()).hexdigest()
    data = json.dumps({"prompt": "hello", "max_tokens": tokens, "temperature": temperature}).encode()
    bench.gateway.send(TenantShare("a", 1e15))
    first = bench.replies * 10_000 + 1
    limits = RunLimits()
    bench.frames = bench.outputs = bench.bytes = bench.finished = 0
    for run in range(first, first + guests):
        if not run % 32:
            # A link holds only so many messages that nobody reads.
            bench.worker_turn()
            bench.collect()
        bench.gateway.send(StartRun(run, "a", "generate", str(artifact), data, run, limits, 1 << 30, digest))
    rounds: list[float] = []
    spent = 0.0
    while bench.finished < guests:
        if profile is not None:
            profile.enable()
        spent += bench.worker_turn()
        if profile is not None:
            profile.disable()
        bench.collect()
        if bench.waiting == guests:
            rounds.append(spent)
            spent = 0.0
            bench.answer()
        elif not bench.turn.busy:
            time.sleep(0.001)
    assert bench.bytes == guests * tokens, "an answer is not whole"
    warm = rounds[1 + len(rounds) // 10 :]
    return {
        "median_us": statistics.median(warm) / guests * 1e6,
        "least_us": statistics.quantiles(warm, n=20)[0] / guests * 1e6,
        "outputs": bench.outputs / (guests * tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guests", default="1,32,256")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--messages", action="store_true", help="answer with a message each, not with rows")
    parser.add_argument("--profile", action="store_true", help="print where the time goes (and make it longer)")
    options = parser.parse_args()
    profile = cProfile.Profile() if options.profile else None
    tune_collector()
    tune_switching()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_folder(model)
        artifact = compile_module_sync(BUILTIN, Path(folder) / "cache").artifact
        bench = Bench(Tokenizer(model), ModelFacts(300, 1 << 17, 1, frozenset({2}), 2, 64), messages=options.messages)
        for guests in map(int, options.guests.split(",")):
            rows = [
                measure(bench, artifact, guests, options.tokens, options.temperature, profile)
                for _ in range(options.repeats)
            ]
            median = statistics.median(row["median_us"] for row in rows)
            least = min(row["least_us"] for row in rows)
            print(
                f"{guests:5d} guests: {median:6.2f} us a token (undisturbed {least:.2f}), "
                f"{rows[0]['outputs']:.2f} outputs a token",
                flush=True,
            )
        bench.runtime.close()
    if profile is not None:
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
