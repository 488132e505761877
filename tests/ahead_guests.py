"""Guests that an engine which runs ahead has to serve exactly as one that does not, and their worker.

A guest is a generator that follows a script: a list of (action, number). What it does depends on its
script and on its results only, never on when they come, so its log is the same whatever the engine does
in between; :func:`play` returns the logs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from realm.engine.core import EngineCore
from realm.guests import draws
from realm.messages import (
    CallDone,
    CallFailed,
    EndRun,
    EngineResult,
    ForkSequence,
    ForwardDone,
    FreeSequence,
    OpenSequence,
    SamplingParams,
    TruncateSequence,
)
from tests.ahead_worker import AheadWorker
from tests.tiny import pack

Script = list[tuple[str, int]]
Entry = tuple[Any, ...]
Oracle = Callable[[list[int], SamplingParams | None, ForwardDone], None]
"""Raises AssertionError if a call with these parameters, of a sequence with these tokens, gives another result."""


# --- guests -------------------------------------------------------------------------------------------------

ACTIONS = [
    "go on",
    "go on",
    "go on",
    "prompt",
    "other token",
    "two tokens",
    "sampling",
    "jump",
    "mask",
    "fork",
    "beam",
    "truncate",
    "step back",
    "no-op",
    "free",
    "abandon",
    "save",
    "logits",
    "silent",
    "late",
    "switch",
    "together",
    "end run",
    "by message",
]


@dataclass
class _Text:
    """One sequence as its guest knows it. ``drawn``: the token to go on with, if its last call drew one."""

    seq: int
    name: int
    key: int
    tokens: list[int] = field(default_factory=list)
    number: int = 0
    drawn: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True)
class Late:
    """Not now: resume after so many turns."""

    turns: int


class Guest:
    """Follows a script; ``log`` is all that it has seen."""

    MOST = 5
    """Sequences of one guest."""

    def __init__(
        self, worker: AheadWorker, tenant: str, run: int, script: Script, vocab: int, oracle: Oracle | None = None
    ) -> None:
        """``oracle``: what each call has to give, where that is known."""
        self.log: list[Entry] = []
        self.worker, self.tenant, self.run = worker, tenant, run
        self._vocab, self._oracle = vocab, oracle
        self._script = script
        self._texts: list[_Text] = []
        self._opened = 0

    def play(self) -> Generator[list[int] | Late, list[EngineResult], None]:
        self._open()
        yield from self._ask(self._texts[0], self._tokens(5 + self.run, 0), SamplingParams())
        for action, number in self._script:
            self.log.append((action, number))
            yield from getattr(self, "_do_" + action.replace(" ", "_").replace("-", "_"))(self._texts[0], number)

    # --- parts ----------------------------------------------------------------------------------------

    def _text(self) -> _Text:
        self._opened += 1
        return _Text(self.worker.fresh(), self._opened, draws.stream_key(self.run, self._opened))

    def _open(self) -> _Text:
        text = self._text()
        self.worker.op(OpenSequence(text.seq, self.tenant, self.run))
        self._texts.insert(0, text)
        return text

    def _fork(self, parent: _Text) -> _Text:
        child = self._text()
        child.tokens, child.drawn, child.sampling = parent.tokens[:], parent.drawn, parent.sampling
        self.worker.op(ForkSequence(parent.seq, child.seq))
        return child

    def _close(self, text: _Text) -> None:
        self.worker.op(FreeSequence(text.seq))
        self._texts.remove(text)
        if not self._texts:
            self._open()

    def _tokens(self, count: int, number: int) -> list[int]:
        # Few texts, so that prefixes of one tenant's guests are found in the cache.
        rng = random.Random(number % 3)
        return [rng.randrange(self._vocab) for _ in range(count)]

    def _sampling(self, text: _Text) -> SamplingParams:
        p = text.sampling
        if p.temperature > 0:
            p = msgspec.structs.replace(p, key=text.key, number=text.number)
            text.number += 1
        return p

    def _ask(
        self, text: _Text, tokens: list[int], sampling: SamplingParams | None, **how: bool
    ) -> Generator[list[int], list[EngineResult], None]:
        (result,) = yield [self.worker.forward(text.seq, tokens, sampling, **how)]
        self._note(text, result, tokens, sampling)

    def _note(self, text: _Text, result: EngineResult, tokens: list[int], sampling: SamplingParams | None) -> None:
        if isinstance(result, ForwardDone):
            text.tokens += tokens
            if self._oracle is not None:
                self._oracle(text.tokens, sampling, result)
            text.drawn = result.token if sampling is not None else None
            self.log.append(("done", text.name, result.token, result.logprob, result.logits))
        elif isinstance(result, CallFailed):
            self.log.append(("failed", text.name, result.code, result.message))
        else:
            self.log.append(("call", text.name, result.value))

    def _next(self, text: _Text) -> int:
        return 3 if text.drawn is None else text.drawn

    # --- actions --------------------------------------------------------------------------------------

    def _do_go_on(self, text: _Text, number: int) -> Any:
        for _ in range(1 + number % 7):
            yield from self._ask(text, [self._next(text)], self._sampling(text))

    def _do_by_message(self, text: _Text, number: int) -> Any:
        for _ in range(1 + number % 3):
            yield from self._ask(text, [self._next(text)], self._sampling(text), row=False)

    def _do_prompt(self, text: _Text, number: int) -> Any:
        yield from self._ask(text, self._tokens(1 + number % 50, number), self._sampling(text))

    def _do_other_token(self, text: _Text, number: int) -> Any:
        yield from self._ask(text, [(self._next(text) + 1 + number) % self._vocab], self._sampling(text))

    def _do_two_tokens(self, text: _Text, number: int) -> Any:
        yield from self._ask(text, [self._next(text), number % self._vocab], self._sampling(text))

    def _do_sampling(self, text: _Text, number: int) -> Any:
        bias = pack([number % self._vocab])
        text.sampling = [
            SamplingParams(),
            SamplingParams(logprob=True),
            SamplingParams(0.7),
            SamplingParams(1.0, top_p=0.9, logprob=True),
            SamplingParams(1.3, top_k=20, min_p=0.01),
            SamplingParams(0.8, repetition_penalty=1.2),
            SamplingParams(repetition_penalty=1.1, logprob=True),
            SamplingParams(0.9, bias_tokens=bias, bias_values=b"\0\0\x20\x41"),
        ][number % 8]
        yield from self._do_go_on(text, number // 8)

    def _do_jump(self, text: _Text, number: int) -> Any:
        """Another draw than the engine may have thought of: so many numbers on, or the same one again."""
        text.number = max(0, text.number + number % 3 - 1)
        yield from self._do_go_on(text, 1)

    def _do_mask(self, text: _Text, number: int) -> Any:
        for turn in range(1 + number % 3):
            mask = bytearray(-(-self._vocab // 8))
            for token in random.Random(number + turn).sample(range(self._vocab), 1 + number % 9):
                mask[token // 8] |= 1 << token % 8
            sampling = msgspec.structs.replace(self._sampling(text), mask=bytes(mask))
            yield from self._ask(text, [self._next(text)], sampling)

    def _do_fork(self, text: _Text, number: int) -> Any:
        """A child, and both go on; which one is used from now on is the script's choice."""
        if len(self._texts) >= self.MOST:
            self._close(self._texts[-1])
        child = self._fork(text)
        self._texts.insert(number % 2, child)
        yield from self._together([text, child])

    def _do_beam(self, text: _Text, number: int) -> Any:
        """Children with tokens of their own for two turns; the losers are freed."""
        width = 2 + number % 2
        for other in self._texts[width:]:
            self._close(other)
        parent, beams = self._texts[0], []
        for _ in range(width):
            beams.append(self._fork(parent))
        self._texts += beams
        asked = [[(self._next(beam) + at) % self._vocab] for at, beam in enumerate(beams)]
        yield from self._together(beams, asked)
        yield from self._together(beams)
        for beam in beams[1:]:
            self._close(beam)
        yield from self._together([parent, beams[0]])

    def _do_truncate(self, text: _Text, number: int) -> Any:
        length = number % (len(text.tokens) + 2)
        self.worker.op(TruncateSequence(text.seq, length))
        del text.tokens[length:]
        yield from self._ask(text, [self._next(text)], self._sampling(text))

    def _do_step_back(self, text: _Text, number: int) -> Any:
        """Take the last tokens back and give the same kind of call again."""
        length = max(0, len(text.tokens) - 1 - number % 3)
        self.worker.op(TruncateSequence(text.seq, length))
        del text.tokens[length:]
        yield from self._ask(text, [(self._next(text) + number // 3 % 2) % self._vocab], self._sampling(text))

    def _do_no_op(self, text: _Text, number: int) -> Any:
        """A truncation that drops nothing, and the drawn token."""
        self.worker.op(TruncateSequence(text.seq, len(text.tokens) + number % 2))
        yield from self._ask(text, [self._next(text)], self._sampling(text))

    def _do_free(self, text: _Text, number: int) -> Any:
        self._close(text)
        yield from self._ask(self._open(), self._tokens(1 + number % 40, number), SamplingParams())

    def _do_abandon(self, text: _Text, number: int) -> Any:
        """Free what has a call in flight, at once or some turns later."""
        self.worker.forward(text.seq, [self._next(text)], self._sampling(text))
        if number % 3:
            yield Late(number % 3)
        self._close(text)
        yield from self._ask(self._open(), self._tokens(1 + number % 20, number), SamplingParams())

    def _do_save(self, text: _Text, number: int) -> Any:
        name = f"{self.run}:{number % 2}"
        (result,) = yield [self.worker.save(text.seq, name)]
        self._note(text, result, [], None)
        if number % 4 < 2 and isinstance(result, CallDone):
            if len(self._texts) >= self.MOST:
                self._close(self._texts[-1])
            copy = self._text()
            copy.tokens = text.tokens[:]
            self._texts.append(copy)
            (result,) = yield [self.worker.open_saved(copy.seq, self.tenant, self.run, name)]
            self._note(copy, result, [], None)
            yield from self._together([text, copy])

    def _do_logits(self, text: _Text, number: int) -> Any:
        sampling = None if number % 3 == 0 else self._sampling(text)
        yield from self._ask(text, [self._next(text)], sampling, logits=True)

    def _do_silent(self, text: _Text, number: int) -> Any:
        yield from self._ask(text, self._tokens(1 + number % 3, number), None)

    def _do_late(self, text: _Text, number: int) -> Any:
        yield Late(1 + number % 6)
        yield from self._do_go_on(text, 1)

    def _do_switch(self, text: _Text, number: int) -> Any:
        self._texts.insert(0, self._texts.pop(number % len(self._texts)))
        yield from ()

    def _do_together(self, text: _Text, number: int) -> Any:
        for _ in range(1 + number % 4):
            yield from self._together(self._texts[: 1 + number % self.MOST])

    def _do_end_run(self, text: _Text, number: int) -> Any:
        """The run ends with calls in flight, at once or some turns later."""
        if number % 2:
            for other in self._texts:
                self.worker.forward(other.seq, [self._next(other)], self._sampling(other))
        if number % 3:
            yield Late(number % 3)
        self.worker.op(EndRun(self.run))
        self.run += 100
        self._texts.clear()
        yield from self._ask(self._open(), self._tokens(1 + number % 20, number), SamplingParams())

    def _together(self, texts: list[_Text], asked: list[list[int]] | None = None) -> Any:
        """One call for each sequence, all at once."""
        asked = asked or [[self._next(text)] for text in texts]
        params = [self._sampling(text) for text in texts]
        calls = [self.worker.forward(t.seq, a, p) for t, a, p in zip(texts, asked, params, strict=True)]
        results = yield calls
        for text, result, tokens, p in zip(texts, results, asked, params, strict=True):
            self._note(text, result, tokens, p)


# --- the play -------------------------------------------------------------------------------------------------

Taken = dict[int, tuple[list[EngineResult], bytes]]


class Stage:
    """An engine, its workers and their guests.

    ``drive`` moves the engine on by about a step and returns what it gave (:meth:`EngineCore.take`).
    """

    MOST_TURNS = 20_000

    def __init__(self, engine: EngineCore, drive: Callable[[], Taken], workers: int = 2, *, rows: bool = True) -> None:
        self.engine, self.drive = engine, drive
        self.workers = [AheadWorker(engine, number, rows=rows) for number in range(1, workers + 1)]
        self._lost: set[AheadWorker] = set()

    def play(
        self, guests: list[Guest], late: Callable[[], bool] = lambda: False, lose: tuple[int, int] | None = None
    ) -> None:
        """Until all guests are done.

        ``late``: whether a guest lets its results lie this turn. ``lose``: a turn, and the index of the
        worker that dies then with its guests.
        """
        running = {guest: guest.play() for guest in guests}
        waits: dict[Guest, list[int] | int] = {}
        for guest, play in running.items():
            waits[guest] = self._begin(next(play))
        for turn in range(self.MOST_TURNS):
            if lose is not None and turn == lose[0]:
                self._lose(self.workers[lose[1]], running)
            if not running:
                return
            for guest in list(running):
                answers = None if late() else self._ready(guest, waits)
                if answers is None:
                    continue
                try:
                    waits[guest] = self._begin(running[guest].send(answers))
                except StopIteration:
                    del running[guest]
            self.move()
        raise AssertionError("guests wait for ever")

    def move(self) -> None:
        """Send what was asked and let the engine go on."""
        for worker in self.workers:
            if worker not in self._lost:
                worker.flush()
        for number, (results, rows) in self.drive().items():
            assert self.workers[number - 1] not in self._lost, "results for a worker that is gone"
            self.workers[number - 1].receive(results, rows)
        self.engine.check()

    def _lose(self, worker: AheadWorker, running: dict[Guest, Any]) -> None:
        self._lost.add(worker)
        for guest in [guest for guest in running if guest.worker is worker]:
            running.pop(guest).close()
        self.engine.drop_worker(worker.number)
        self.engine.check()

    @staticmethod
    def _begin(wait: list[int] | Late) -> list[int] | int:
        return wait.turns if isinstance(wait, Late) else wait

    @staticmethod
    def _ready(guest: Guest, waits: dict[Guest, list[int] | int]) -> list[EngineResult] | None:
        """What the guest waits for, if it is all there. A number counts down."""
        wait = waits[guest]
        if isinstance(wait, int):
            waits[guest] = wait - 1
            return [] if wait <= 0 else None
        answers = guest.worker.answers
        return [answers.pop(call) for call in wait] if all(call in answers for call in wait) else None


def stepped(engine: EngineCore) -> Callable[[], Taken]:
    """One whole step at a time; rows come as messages."""
    return lambda: {worker: (results, b"") for worker, results in engine.step().items()}


def pipelined(
    engine: EngineCore, rng: random.Random, execute: Callable[[], None] = lambda: None
) -> Callable[[], Taken]:
    """Launches and settles in any order that a server may choose. ``execute``: the device goes on by a step."""
    most = rng.randint(1, 3)

    def launch() -> bool:
        return engine.in_flight < most and engine.launch()

    def drive() -> Taken:
        went_on = launch()
        for _ in range(rng.randrange(4)):
            match rng.randrange(5):
                case 0 | 1:
                    went_on |= launch()
                case 2:
                    execute()
                case 3:
                    went_on |= engine.settle(False)
                case 4:
                    went_on |= engine.settle(True)
        if not went_on and not engine.settle(True):
            taken = engine.take()
            assert taken or not engine.has_work(), "a guest waits, and the engine says there is nothing to do"
            return taken
        return engine.take()

    return drive


def same(mine: list[Entry], theirs: list[Entry], tolerance: float = 0.0) -> bool:
    """Whether two logs tell the same. Log-probabilities and logits may differ by ``tolerance``."""
    return len(mine) == len(theirs) and all(_alike(a, b, tolerance) for a, b in zip(mine, theirs, strict=True))


def _alike(a: Entry, b: Entry, tolerance: float) -> bool:
    if a[0] != "done" or b[0] != "done":
        return a == b
    (*mine, p, x), (*theirs, q, y) = a, b
    if mine != theirs or math.isnan(p) != math.isnan(q) or (x is None) != (y is None):
        return False
    close = math.isnan(p) or math.isclose(p, q, abs_tol=tolerance, rel_tol=0)
    if x is None:
        return close
    return close and np.allclose(np.frombuffer(x, "<f4"), np.frombuffer(y, "<f4"), rtol=0, atol=tolerance)
