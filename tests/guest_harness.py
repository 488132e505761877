"""Runs real guests in the real guest runtime against an engine that answers as a test scripts it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import wasmtime

from realm.guests.abi import ErrorCode
from realm.guests.bulk_memory import rewrite
from realm.guests.facts import ModelFacts
from realm.guests.fibers import Engine
from realm.guests.module_format import parse_module
from realm.guests.runtime import GuestRuntime
from realm.guests.sampling_reference import draw_token
from realm.messages import (
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
    OpenSequence,
    TruncateSequence,
)
from realm.run_messages import ClientMessage, Log, Output, RunFinished, RunLimits, StartRun

EOS, START, ANSWER = 256, 257, 258
SPECIAL = {EOS: "<end>", START: "<start>", ANSWER: "<answer>"}
WORDS = ["Hel", "lo", " wor", "ld", "\u00e9t\u00e9", ' "', '", "', "ann", "42", "  "]
WORD = {text: 259 + index for index, text in enumerate(WORDS)}
VOCAB = 259 + len(WORDS)

Policy = Callable[[list[int]], Any]
"""From a sequence's tokens to logits [VOCAB]."""


class WordTokenizer:
    """Tokens are bytes, a few special tokens, and a few words that only a model would write.

    Text is encoded to bytes, so an answer made of words is another list of tokens when it is read again.
    """

    def __init__(self, template: bool = True) -> None:
        self.has_chat_template = template

    def _bytes(self, token: int, special: bool) -> bytes:
        if token < 256:
            return bytes([token])
        if token in SPECIAL:
            return SPECIAL[token].encode() if special else b""
        return WORDS[token - 259].encode()

    def encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return list(text.encode())
        ids: list[int] = []
        for part in re.split("(<end>|<start>|<answer>)", text):
            ids += next(([token] for token, name in SPECIAL.items() if name == part), list(part.encode()))
        return ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        return b"".join(self._bytes(token, special) for token in ids).decode("utf-8", "replace")

    def stream(self, special: bool = False) -> WordStream:
        return WordStream(self, special)

    def chat(self, messages: list[dict[str, Any]], generate: bool) -> str:
        turns = [f"<answer>{m['content']}<end>" if m["role"] == "assistant" else _turn(m) for m in messages]
        return "".join(turns) + ("<answer>" if generate else "")


def _turn(message: dict[str, Any]) -> str:
    return f"<start>{message['role']}:{message['content']}<end>"


class WordStream:
    def __init__(self, tokenizer: WordTokenizer, special: bool) -> None:
        self._tokenizer, self._special, self._waiting = tokenizer, special, b""

    def push(self, ids: Sequence[int]) -> str:
        data = self._waiting + b"".join(self._tokenizer._bytes(token, self._special) for token in ids)
        whole = len(data)
        while whole and len(data) - whole < 4 and not _is_text(data[:whole]):
            whole -= 1
        self._waiting = data[whole:]
        return data[:whole].decode()

    def flush(self) -> str:
        text, self._waiting = self._waiting.decode("utf-8", "replace"), b""
        return text


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def answers(*scripts: Sequence[int]) -> Policy:
    """A model that gives these answers, one a turn, each ended by EOS."""

    def policy(tokens: list[int]) -> Any:
        turns = [at for at, token in enumerate(tokens) if token == ANSWER]
        script = [*scripts[len(turns) - 1], EOS]
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[script[len(tokens) - turns[-1] - 1]] = 40
        return logits

    return policy


@dataclass
class ScriptedEngine:
    """Answers every operation at once, with the policy's logits, or those of the sequence's adapter.

    ``batches`` says how many forwards came together, ``applied`` which adapters were asked for.
    """

    policy: Policy
    context: int
    adapters: dict[str, Policy] = field(default_factory=dict)
    adapter_of: dict[int, str] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    sequences: dict[int, list[int]] = field(default_factory=dict)
    forwards: list[list[int]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    truncations: int = 0
    forks: int = 0

    def submit(self, ops: list[EngineOp]) -> list[EngineResult]:
        results: list[EngineResult] = []
        for op in ops:
            match op:
                case OpenSequence():
                    self.sequences[op.seq] = []
                case ForkSequence():
                    self.forks += 1
                    self.sequences[op.child] = list(self.sequences[op.parent])
                    self.adapter_of[op.child] = self.adapter_of.get(op.parent, "")
                case TruncateSequence():
                    self.truncations += 1
                    del self.sequences[op.seq][op.length :]
                case FreeSequence():
                    del self.sequences[op.seq]
                case EndRun():
                    self.sequences.clear()
                case ApplyAdapter():
                    results.append(self._apply(op))
                case Forward():
                    results.append(self._forward(op))
                case _:
                    raise AssertionError(op)
        together = sum(isinstance(result, ForwardDone) for result in results)
        if together:
            self.batches.append(together)
        return results

    def _apply(self, op: ApplyAdapter) -> EngineResult:
        assert op.seq in self.sequences
        self.applied.append(op.name)
        if op.name and op.name not in self.adapters:
            return CallFailed(op.call, ErrorCode.NOT_FOUND, f"there is no adapter {op.name!r}")
        self.adapter_of[op.seq] = op.name
        return CallDone(op.call, 8 if op.name else 0)

    def _forward(self, op: Forward) -> ForwardDone:
        added = list(array("I", op.tokens))
        self.forwards.append(added)
        tokens = self.sequences[op.seq]
        tokens += added
        assert len(tokens) <= self.context
        logits = {**self.adapters, "": self.policy}[self.adapter_of.get(op.seq, "")](tokens)
        token, logprob = -1, float("nan")
        if op.sampling is not None:
            token, logprob = draw_token(logits, op.sampling, np.array(tokens))
        return ForwardDone(op.call, token, logprob, 0, logits.tobytes() if op.want_logits else None)


@dataclass
class Ran:
    """What a run gave. ``pieces`` are the single emits."""

    outcome: str
    code: int
    pieces: list[str]
    logs: list[tuple[str, str]]
    finished: RunFinished
    engine: ScriptedEngine

    @property
    def text(self) -> str:
        return "".join(self.pieces)


_artifacts: dict[Path, tuple[str, str]] = {}
_folder: tempfile.TemporaryDirectory[str] | None = None


def _artifact(wasm: Path) -> tuple[str, str]:
    global _folder
    if wasm not in _artifacts:
        _folder = _folder or tempfile.TemporaryDirectory(prefix="realm-tests-")
        path = Path(_folder.name) / f"{len(_artifacts)}.cwasm"
        data = wasm.read_bytes()
        artifact = bytes(wasmtime.Module(Engine().inner, rewrite(data, parse_module(data))).serialize())
        path.write_bytes(artifact)
        _artifacts[wasm] = str(path), hashlib.sha256(artifact).hexdigest()
    return _artifacts[wasm]


def run_guest(
    wasm: Path,
    input: bytes | dict[str, Any],
    policy: Policy,
    *,
    messages: Sequence[bytes] = (),
    context: int = 4096,
    template: bool = True,
    seed: int = 1,
    limits: RunLimits | None = None,
    adapters: dict[str, Policy] | None = None,
) -> Ran:
    """Run a guest to its end. Each log line that asks for a message is answered with the next one.

    ``adapters`` are the models that sequences with an adapter of that name get.
    """
    facts = ModelFacts(VOCAB, context, bos=None, eos=frozenset({EOS}), layers=1, hidden_size=8)
    now = 0.0
    runtime = GuestRuntime(1, WordTokenizer(template), facts, clock=lambda: now, wall_clock=lambda: 1.0)
    engine = ScriptedEngine(policy, context, adapters or {})
    data = input if isinstance(input, bytes) else json.dumps(input).encode()
    path, sha256 = _artifact(wasm)
    runtime.start(StartRun(1, "tenant", "guest", path, data, seed, limits or RunLimits(), 1 << 24, sha256))
    waiting, pieces, logs, replies = list(messages), [], [], 0
    for _ in range(100_000):
        turn = runtime.turn(now)
        results = engine.submit(turn.ops)
        for event in turn.events:
            if isinstance(event, Output):
                pieces.append(event.data.decode())
            elif isinstance(event, Log):
                logs.append((event.level, event.text))
                if event.text == "waiting for the next message" and waiting:
                    runtime.message(ClientMessage(1, waiting.pop(0)))
            elif isinstance(event, RunFinished):
                assert runtime.live == 0 and runtime.pending_calls == 0
                return Ran(event.outcome, event.code, pieces, logs, event, engine)
        if results:
            replies += 1
            runtime.deliver(EngineReply(replies, results))
        elif not turn.busy and not turn.events and turn.deadline is not None:
            now = turn.deadline
    raise AssertionError("the guest does not finish")
