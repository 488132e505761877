"""The worst legal call of each host function: how long one guest can keep the worker's thread.

Each guest fills its memory, waits for a message, and then makes one call with the largest arguments
that the tables allow. What counts is the longest time from the message on in which the thread did not
get to look at its links: a long turn, or the helper thread holding the interpreter. It is the best of
some rounds, because a busy machine adds to it. Run from the repository's root, with a model folder:

    python -m tests.benchmarks.bench_host_calls MODEL_FOLDER
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import wasmtime

from realm.guests import abi, wasi
from realm.guests.facts import ModelFacts
from realm.guests.fibers import Engine
from realm.guests.helper import HelperThread
from realm.guests.runtime import GuestRuntime, tune_collector, tune_switching
from realm.messages import EngineReply, EngineResult, Forward, ForwardDone
from realm.models.tokenizer import Tokenizer
from realm.run_messages import ClientMessage, RunFinished, RunLimits, StartRun, StoreReply, StoreSet

DATA = 1 << 16
ROOM = 40 << 20
"""Where a call finds its input, and where it has room for results."""
PAGES = 2048
CONTEXT = 1 << 20


@dataclass
class Case:
    """One call: its arguments, what lies at :data:`DATA`, and how many sequences it needs."""

    name: str
    call: str
    arguments: tuple[int, ...]
    data: bytes = b""
    sequences: int = 1
    message: bytes = b"go"
    limits: dict[str, int] = field(default_factory=dict)


def high(function: str, parameter: str) -> int:
    (found,) = [p for p in abi.BY_NAME[function].parameters if p.name == parameter]
    return int(found.high or 0)  # type: ignore[union-attr]


def sampling(**values: float) -> bytes:
    names = [f.name for f in abi.SAMPLING.fields]
    return struct.pack(abi.SAMPLING.format, *[values.get(name, 0) for name in names])


def cases(vocab: int) -> list[Case]:
    """The largest legal call of each function that does more than look something up."""
    text, messages = high("tokenize", "text"), high("chat_template", "messages")
    tokens, scored = high("detokenize", "tokens"), high("score", "tokens")
    turns = [{"role": "user", "content": "x" * max(1, min(messages, 4 << 20) // 4096 - 64)}] * 4000
    few = [{"role": "user", "content": "\u00e9" * (min(messages, 4 << 20) // 3)}]
    words = -(-vocab // 32)
    bias = b"".join(struct.pack("<If", t, 1.0) for t in range(4096))
    masks, biases = 8 << 20, 12 << 20
    parameters = b"".join(
        sampling(
            temperature=1, mask=DATA + masks + 4 * n, mask_words=words, bias=DATA + biases + 8 * n, bias_count=4000
        )
        for n in range(1024)
    )
    items = b"".join(
        struct.pack(abi.ITEM.format, n + 1, 1, DATA + (4 << 20), DATA + (1 << 20) + n * abi.SAMPLING.size, 0, 0, 0, 0)
        for n in range(1024)
    )
    batch = bytearray(13 << 20)
    batch[: len(items)] = items
    batch[1 << 20 : (1 << 20) + len(parameters)] = parameters
    batch[masks : masks + (1 << 20)] = b"\xff" * (1 << 20)
    batch[biases : biases + len(bias)] = bias
    long_items = b"".join(
        struct.pack(abi.ITEM.format, n + 1, CONTEXT - 1, DATA + (1 << 20), 0, 0, 0, 0, 0) for n in range(1024)
    )
    plain = b"".join(struct.pack(abi.ITEM.format, n + 1, 1, DATA + (1 << 20), 0, 0, 0, 0, 0) for n in range(1024))
    vectors = b"".join(struct.pack("<II", DATA + (1 << 20), 1 << 20) for _ in range(1024))
    lines = vectors + bytes((1 << 20) - len(vectors)) + b"\n" * (1 << 20)
    draw = sampling(temperature=1, top_p=0.9, min_p=0.1, flags=1)
    return [
        Case("tokenize digits", "tokenize", (DATA, text, 0, ROOM, 1 << 22), b"1" * text),
        Case(
            "tokenize words",
            "tokenize",
            (DATA, text, 1, ROOM, 1 << 22),
            (b"the quick brown fox " * (text // 20 + 1))[:text],
        ),
        Case(
            "chat_template, 4,000 messages",
            "chat_template",
            (DATA, len(json.dumps(turns)), 1, ROOM, 1 << 24),
            json.dumps(turns).encode(),
        ),
        Case(
            "chat_template, one message",
            "chat_template",
            (DATA, len(json.dumps(few, ensure_ascii=False).encode()), 1, ROOM, 1 << 24),
            json.dumps(few, ensure_ascii=False).encode(),
        ),
        Case(
            "chat_template, nested",
            "chat_template",
            (DATA, messages, 1, ROOM, 1 << 24),
            (b"[{" * (messages // 2))[:messages],
        ),
        Case(
            "chat_template, small objects",
            "chat_template",
            (DATA, messages // 4 * 4, 1, ROOM, 1 << 24),
            b"[" + b"{}, " * (messages // 4 - 1) + b"{}]",
        ),
        Case("detokenize", "detokenize", (0, DATA, tokens, 0, ROOM, 1 << 24), array("I", [500]).tobytes() * tokens),
        Case(
            "detokenize, stream",
            "detokenize",
            (5, DATA, tokens, 0, ROOM, 1 << 24),
            array("I", [500]).tobytes() * tokens,
        ),
        Case("score", "score", (1, DATA, scored, ROOM, scored), bytes(4 * scored)),
        Case("sample", "sample", (1, DATA, 0), draw),
        Case("logits_topk", "logits_topk", (1, ROOM, 65_536)),
        Case("logits_read", "logits_read", (1, ROOM, vocab)),
        Case("forward, a full context", "forward", (1, DATA, CONTEXT - 1, 0, 0), bytes(4 * CONTEXT)),
        Case("batch_forward, masks and biases", "batch_forward", (DATA, 1024), bytes(batch), 1024),
        Case(
            "batch_forward, full contexts",
            "batch_forward",
            (DATA, 1024),
            long_items + bytes((6 << 20) - len(long_items)),
            1024,
        ),
        Case(
            "batch_forward, one token each", "batch_forward", (DATA, 1024), plain + bytes((2 << 20) - len(plain)), 1024
        ),
        Case("input_read", "input_read", (0, DATA, 32 << 20), bytes(32 << 20)),
        Case("emit", "emit", (DATA, 1 << 20), b"a" * (1 << 20)),
        Case("log", "log", (1, DATA, 65_536), b"\xff" * 65_536),
        Case("recv, 4 MiB", "recv", (ROOM, 8 << 20, 0), message=bytes(4 << 20)),
        Case("kv_set", "kv_set", (DATA, 128, DATA, 65_536), b"k" * 65_536),
        Case("random_get", "random_get", (ROOM, high_random())),
        Case("fd_write, 1,024 buffers", "fd_write", (1, DATA, 1024, ROOM), lines, limits={"log_bytes": 64 << 20}),
    ]


def high_random() -> int:
    return 1 << 16


def declared(module: str, name: str, types: list[str]) -> str:
    parameters = f"(param {' '.join(types)})" if types else ""
    return f'(import "{module}" "{name}" (func ${name} {parameters} (result i32)))'


def guest(case: Case) -> str:
    """Sequences with kept logits, the data, a wait for ``go``, the call."""
    names = dict.fromkeys(["seq_new", "forward", "input_read", "recv"])
    own = ""
    if case.call in abi.BY_NAME:
        names[case.call] = None
        types = [str(kind) for kind in abi.wasm_parameters(abi.BY_NAME[case.call])]
    else:
        types = ["i64" if kind == "u64" else "i32" for kind in wasi.parameters(case.call)]
        own = declared(wasi.IMPORT_MODULE, case.call, types)
    imports = "".join(declared("realm", n, [str(k) for k in abi.wasm_parameters(abi.BY_NAME[n])]) for n in names)
    arguments = "".join(f"({kind}.const {value})" for kind, value in zip(types, case.arguments, strict=True))
    return f"""(module {imports} {own} (memory (export "memory") {PAGES})
      (func (export "realm_abi_version") (result i32) (i32.const 1))
      (func (export "run") (result i32) (local $n i32) (local $r i32)
        (loop $more
          (drop (call $forward (call $seq_new) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0)))
          (br_if $more (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const {case.sequences}))))
        (local.set $n (i32.const 0))
        (loop $all (local.set $n (i32.add (local.get $n) (local.tee $r (call $input_read (local.get $n)
          (i32.add (i32.const {DATA}) (local.get $n)) (i32.const {32 << 20})))))
          (br_if $all (local.get $r)))
        (drop (call $recv (i32.const 0) (i32.const {DATA}) (i32.const 60000)))
        (call ${case.call} {arguments})))"""


class Bench:
    def __init__(self, model: Path, folder: Path) -> None:
        self._tokenizer = Tokenizer(model)
        facts = ModelFacts.load(model)
        self._facts = ModelFacts(facts.vocab_size, CONTEXT, facts.bos, facts.eos, facts.layers, facts.hidden_size)
        self._logits = np.random.default_rng(1).normal(size=facts.vocab_size).astype("<f4").tobytes()
        self._folder = folder
        self._engine = Engine()
        self.vocab = facts.vocab_size

    def measure(self, case: Case) -> tuple[float, float, int, int]:
        """Longest turn, wall time of the call (both in ms), fuel of the call, and its result."""
        path = self._folder / "guest.cwasm"
        path.write_bytes(wasmtime.Module(self._engine.inner, wasmtime.wat2wasm(guest(case))).serialize())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        helper = HelperThread()
        runtime = GuestRuntime(1, self._tokenizer, self._facts, helper=helper)
        limits = RunLimits(memory_bytes=4 << 30, sequences=2000, tokens=1 << 40, fuel=1 << 50, **case.limits)
        runtime.start(StartRun(1, "a", "m", str(path), case.data, 1, limits, 1 << 30, digest))
        replies, longest, fuel = 0, 0.0, 0
        began: float | None = None
        until = time.monotonic() + 120
        at = time.perf_counter()
        while time.monotonic() < until:
            turn = runtime.turn(time.monotonic())
            now = time.perf_counter()
            if began is not None:
                longest = max(longest, now - at)
            at = now
            if not turn.busy:
                # Without the interpreter for longer than this: another thread kept it.
                time.sleep(0.0001)
            for event in turn.events:
                if isinstance(event, RunFinished):
                    wall = time.perf_counter() - (began or at)
                    runtime.close()
                    helper.close()
                    return longest * 1e3, wall * 1e3, event.usage.fuel - fuel, event.code
            calls = [op.call for op in turn.ops if isinstance(op, Forward)]
            if calls:
                replies += 1
                results: list[EngineResult] = [ForwardDone(call, -1, float("nan"), 0, self._logits) for call in calls]
                runtime.deliver(EngineReply(replies, results))
            elif began is None and not turn.busy:
                (run,) = runtime._runs.values()
                assert run.last_call == "recv"
                fuel = limits.fuel - run.fuel_left()
                runtime.message(ClientMessage(1, case.message))
                began = time.perf_counter()
            for event in turn.events:
                if isinstance(event, StoreSet):
                    runtime.store_reply(StoreReply(event.call, 0))
        raise SystemExit(f"{case.name}: no end")


ROUNDS = 5


def main() -> None:
    tune_collector()
    tune_switching()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(sys.argv[1]), Path(folder))
        for case in cases(bench.vocab):
            rounds = [bench.measure(case) for _ in range(ROUNDS)]
            longest, wall = (min(row[at] for row in rounds) for at in (0, 1))
            _, _, fuel, result = rounds[0]
            print(
                f"{case.name:34s} {longest:9.2f} ms without a look {wall:9.2f} ms in all {fuel:14,d} fuel  -> {result}",
                flush=True,
            )


if __name__ == "__main__":
    main()
