"""A fake engine and tokenizer for tests of the guest runtime: small, instant, and predictable."""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import wasmtime

from realm.guests.abi import ErrorCode
from realm.guests.bulk_memory import rewrite
from realm.guests.facts import ModelFacts
from realm.guests.fibers import Engine
from realm.guests.helper import Helper
from realm.guests.module_format import parse_module
from realm.guests.runtime import GuestRuntime, Turn
from realm.guests.sampling_reference import draw_token
from realm.messages import (
    CONTINUE,
    DRAWN,
    NO_LANE,
    ApplyAdapter,
    CallDone,
    CallFailed,
    EndRun,
    EngineOp,
    EngineReply,
    EngineResult,
    ForkSequence,
    Forward,
    ForwardDone,
    FreeSequence,
    OpenSaved,
    OpenSequence,
    SamplingParams,
    SaveSequence,
    TruncateSequence,
)
from realm.run_messages import (
    Log,
    Output,
    RunFinished,
    RunLimits,
    StartRun,
    StoreGet,
    StoreReply,
    StoreSet,
    WorkerEvent,
)

VOCAB = 100
CONTEXT = 64
FACTS = ModelFacts(vocab_size=VOCAB, context_length=CONTEXT, bos=1, eos=frozenset({2}), layers=3, hidden_size=48)


class FakeStream:
    def __init__(self) -> None:
        self._bytes = b""

    def push(self, ids: Sequence[int]) -> str:
        self._bytes += bytes(list(ids))
        whole = len(self._bytes)
        while whole and self._bytes[:whole].decode("utf-8", "ignore").encode() != self._bytes[:whole]:
            whole -= 1
        text, self._bytes = self._bytes[:whole].decode(), self._bytes[whole:]
        return text

    def flush(self) -> str:
        text, self._bytes = self._bytes.decode("utf-8", "replace"), b""
        return text


class FakeTokenizer:
    """A token is a byte; only those below the vocabulary's size can be forwarded."""

    has_chat_template = True

    def encode(self, text: str, special: bool) -> list[int]:
        return [2, *text.encode()] if special else list(text.encode())

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        return bytes(list(ids)).decode("utf-8", "replace")

    def stream(self, special: bool = False) -> FakeStream:
        return FakeStream()

    def chat(self, messages: list[dict[str, Any]], generate: bool) -> str:
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + ("<assistant>" if generate else "")


def logits_of(tokens: Sequence[int], adapter: str = "") -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits [VOCAB] as a function of nothing but the sequence's tokens and adapter."""
    seed = zlib.crc32(array("I", tokens).tobytes(), zlib.crc32(adapter.encode()))
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 3


def greedy(tokens: Sequence[int], adapter: str = "") -> int:
    """The token that a greedy forward of the fake engine draws."""
    return int(logits_of(tokens, adapter).argmax())


class FakeEngine:
    """Answers every operation at once; checks what only a defective worker would send.

    With ``rows`` it lets sequences go on by rows of CONTINUE, as the real engine does, and checks that the
    worker sends one only where nothing else was asked of the sequence since.
    """

    def __init__(self, rows: bool = True) -> None:
        self.rows = rows
        self.continues = 0
        # By sequence: lane, token and sampling of its last call, while it may go on.
        self.going: dict[int, tuple[int, int, SamplingParams]] = {}
        self._lanes: dict[int, int] = {}
        self.sequences: dict[int, list[int]] = {}
        self.run_of: dict[int, int] = {}
        # Ranks of the adapters that there are, and which sequences have one.
        self.adapters: dict[str, int] = {}
        self.adapter_of: dict[int, str] = {}
        self.applied: list[tuple[int, str]] = []
        self.saved: dict[tuple[str, str], list[int]] = {}
        self.adapter_of_saved: dict[tuple[str, str], str] = {}
        self.results: deque[EngineResult] = deque()
        self.fail: Callable[[Forward], CallFailed | None] = lambda op: None
        self.forwards: list[Forward] = []
        self.ended: list[int] = []

    def submit(self, ops: list[EngineOp], continues: bytes = b"") -> None:
        for call, seq, lane, token in CONTINUE.iter_unpack(continues):
            known, drawn, params = self.going[seq]
            assert (lane, token) == (known, drawn), "a row goes on with what was not drawn"
            assert params.mask is None and params.bias_tokens is None
            self.continues += 1
            if params.temperature > 0:
                params = msgspec.structs.replace(params, number=params.number + 1)
            self._forward(Forward(call, seq, array("I", [token]).tobytes(), params, False))
        for op in ops:
            seq = getattr(op, "parent", getattr(op, "seq", None))
            self.going.pop(-1 if seq is None else seq, None)
            match op:
                case OpenSequence():
                    assert op.seq not in self.sequences
                    self.sequences[op.seq], self.run_of[op.seq] = [], op.run
                case ForkSequence():
                    self.sequences[op.child] = list(self.sequences[op.parent])
                    self.run_of[op.child] = self.run_of[op.parent]
                    self.adapter_of[op.child] = self.adapter_of.get(op.parent, "")
                case TruncateSequence():
                    assert op.length <= len(self.sequences[op.seq])
                    del self.sequences[op.seq][op.length :]
                case FreeSequence():
                    del self.sequences[op.seq], self.run_of[op.seq]
                case Forward():
                    self._forward(op)
                case ApplyAdapter():
                    self._apply(op)
                case SaveSequence():
                    tokens = self.sequences[op.seq]
                    self.saved[("a", op.name)] = list(tokens)
                    self.adapter_of_saved[("a", op.name)] = self.adapter_of.get(op.seq, "")
                    self.results.append(CallDone(op.call, len(tokens)))
                case OpenSaved():
                    found = self.saved.get((op.tenant, op.name))
                    if found is None:
                        self.results.append(CallFailed(op.call, ErrorCode.NOT_FOUND, "no such name"))
                    else:
                        self.sequences[op.seq], self.run_of[op.seq] = list(found), op.run
                        self.adapter_of[op.seq] = self.adapter_of_saved[(op.tenant, op.name)]
                        self.results.append(CallDone(op.call, len(found)))
                case EndRun():
                    self.ended.append(op.run)
                    for seq in [s for s, run in self.run_of.items() if run == op.run]:
                        del self.sequences[seq], self.run_of[seq]

    def _apply(self, op: ApplyAdapter) -> None:
        assert op.seq in self.sequences
        self.applied.append((op.seq, op.name))
        if op.name and op.name not in self.adapters:
            self.results.append(CallFailed(op.call, ErrorCode.NOT_FOUND, f"there is no adapter {op.name!r}"))
            return
        self.adapter_of[op.seq] = op.name
        self.results.append(CallDone(op.call, self.adapters.get(op.name, 0)))

    def _forward(self, op: Forward) -> None:
        self.forwards.append(op)
        failed = self.fail(op)
        if failed is not None:
            self.results.append(failed)
            return
        tokens = self.sequences[op.seq]
        tokens.extend(array("I", op.tokens))
        assert len(tokens) <= CONTEXT
        logits = logits_of(tokens, self.adapter_of.get(op.seq, ""))
        token, logprob = -1, float("nan")
        if op.sampling is not None:
            token, logprob = draw_token(logits, op.sampling, np.array(tokens))
        self.results.append(ForwardDone(op.call, token, logprob, 0, logits.tobytes() if op.want_logits else None))
        self.going.pop(op.seq, None)
        if self.rows and op.sampling is not None and not op.want_logits:
            # The real engine does not always have a lane to give.
            self._lanes[op.call] = lane = NO_LANE if len(self.forwards) % 5 == 4 else op.seq & 0xFFFF
            if lane != NO_LANE:
                self.going[op.seq] = lane, token, op.sampling

    def take(self, count: int | None = None) -> tuple[list[EngineResult], bytes]:
        """Results, all or the first ``count``: messages, and rows of DRAWN."""
        messages: list[EngineResult] = []
        rows = b""
        for _ in range(min(count or 1 << 30, len(self.results))):
            result = self.results.popleft()
            lane = self._lanes.pop(result.call, None)
            if isinstance(result, ForwardDone) and lane is not None:
                rows += DRAWN.pack(result.call, result.token, result.logprob, result.cached, lane)
            else:
                messages.append(result)
        return messages, rows


_engine: Engine | None = None
_folder: tempfile.TemporaryDirectory[str] | None = None
_artifacts: dict[str, str] = {}
_digests: dict[str, str] = {}


def artifacts_folder() -> Path:
    """Where :func:`compiled` puts its files."""
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory(prefix="realm-tests-")
    return Path(_folder.name)


def compiled(wat: str) -> str:
    """Path of the compiled artifact of a module in text form; each is compiled once a process."""
    global _engine
    if wat not in _artifacts:
        _engine = _engine or Engine()
        wasm = bytes(wasmtime.wat2wasm(wat))
        artifact = bytes(wasmtime.Module(_engine.inner, rewrite(wasm, parse_module(wasm))).serialize())
        path = artifacts_folder() / f"{len(_artifacts)}.cwasm"
        path.write_bytes(artifact)
        _artifacts[wat] = str(path)
        _digests[str(path)] = hashlib.sha256(artifact).hexdigest()
    return _artifacts[wat]


def digest(path: str) -> str:
    """Hash of an artifact that :func:`compiled` wrote, as it was then."""
    return _digests[path]


class Host:
    """A runtime with a fake engine, a store and a clock that stands still unless told."""

    def __init__(
        self, facts: ModelFacts = FACTS, tokenizer: Any = None, helper: Helper | None = None, *, rows: bool = True
    ) -> None:
        self.now = 1000.0
        self.cpu = 0.0
        self.runtime = GuestRuntime(
            5,
            tokenizer or FakeTokenizer(),
            facts,
            clock=lambda: self.now,
            wall_clock=lambda: 1_700_000_000.0,
            cpu_clock=lambda: self.cpu,
            helper=helper,
        )
        self.engine = FakeEngine(rows)
        self.store: dict[str, bytes] = {}
        self.answer_store = True
        self.events: list[WorkerEvent] = []
        self.replies = 0
        self.runs = 0
        self.last = Turn()

    def start(
        self, wat: str, *, input: bytes = b"", seed: int = 7, credit: int = 1 << 20, tenant: str = "a", **limits: Any
    ) -> int:
        self.runs += 1
        path = compiled(wat)
        message = StartRun(self.runs, tenant, "m", path, input, seed, RunLimits(**limits), credit, digest(path))
        self.runtime.start(message)
        return self.runs

    def turn(self, *, engine: bool = True) -> Turn:
        """One turn and, with ``engine``, the engine's answers to it."""
        turn = self.last = self.runtime.turn(self.now)
        self.events += turn.events
        self.engine.submit(turn.ops, turn.continues)
        for event in turn.events:
            if self.answer_store and isinstance(event, StoreGet):
                value = self.store.get(event.key)
                code = 0 if value is not None else int(ErrorCode.NOT_FOUND)
                self.runtime.store_reply(StoreReply(event.call, code, value))
            elif self.answer_store and isinstance(event, StoreSet):
                self.store[event.key] = event.value
                self.runtime.store_reply(StoreReply(event.call, 0))
        if engine:
            self.deliver()
        return turn

    def deliver(self, count: int | None = None) -> None:
        """Hand over engine results, all or the first ``count``."""
        if self.engine.results:
            self.replies += 1
            self.runtime.deliver(EngineReply(self.replies, *self.engine.take(count)))

    def settle(self, turns: int = 10_000) -> None:
        """Turns until nothing moves any more."""
        for _ in range(turns):
            replies = self.replies
            turn = self.turn()
            if not (turn.busy or turn.ops or turn.continues or turn.events) and self.replies == replies:
                return
        raise AssertionError("the guests do not come to rest")

    def run(self, wat: str, **options: Any) -> RunFinished:
        """Start a guest and run everything until it has finished."""
        number = self.start(wat, **options)
        for _ in range(100_000):
            done = self.finished(number)
            if done is not None:
                return done
            self.turn()
        raise AssertionError("the guest does not finish")

    def finished(self, run: int) -> RunFinished | None:
        return next((e for e in self.events if isinstance(e, RunFinished) and e.run == run), None)

    def output(self, run: int) -> bytes:
        return b"".join(e.data for e in self.events if isinstance(e, Output) and e.run == run)

    def logs(self, run: int) -> list[tuple[str, str]]:
        return [(e.level, e.text) for e in self.events if isinstance(e, Log) and e.run == run]

    def check_empty(self) -> None:
        """Nothing is left of any run, here or in the engine."""
        assert self.runtime.live == 0
        assert self.runtime.pending_calls == 0
        self.runtime.check()
        assert not self.runtime.schedule.runnable
        assert not self.engine.sequences
        assert sorted(self.engine.ended) == list(range(1, self.runs + 1))
