"""The engine's core on the CUDA runner (on the CPU, through Triton's interpreter): lanes, forks and steps ahead."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import tests.interpreter  # noqa: F401
from realm.engine.core import EngineCore
from realm.engine.runners import cuda_decode, cuda_pass
from realm.engine.scheduler import Scheduler
from realm.messages import ForwardDone, SamplingParams
from tests.ahead_chats import Chats
from tests.tiny import make_engine, make_model
from tests.unit.test_runner_cuda import make_runner, prompt
from tests.unit.test_runner_cuda_start import replaying

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = 24


def play(engine: EngineCore) -> list[list[int]]:
    """Chats that come, go on, part ways and step back; the tokens of each in the end."""
    chats = Chats(engine, checked=False)
    first, second = chats.begin(prompt(1, 17), prompt(2, 3))
    chats.turn(first, second)
    third = chats.start(prompt(3, 15), SamplingParams(1.5, key=5, number=0, logprob=True))
    for _ in range(2):
        chats.ask(first)
        chats.answer(third)
        chats.answer(first)
        chats.ask(third)
    chats.answer(third)
    child = chats.fork(first)
    # The child takes a page of its own; the page's other tokens are copied into it.
    chats.sampling[child] = SamplingParams(0.9, top_p=0.8, key=6, number=0)
    chats.turn(child, first, second)
    chats.turn(child, second)
    chats.truncate(second, 2)
    chats.ask(second, [7, 8])
    chats.answer(second)
    # As many as have places, some with a mask.
    more = [
        chats.start(prompt(seed, 5), SamplingParams(mask=b"\x3f" * 13) if seed % 2 else SamplingParams())
        for seed in range(10, 14)
    ]
    for seq in more:
        chats.answer(seq)
    chats.turn(*more, first)
    chats.rest()
    assert all(isinstance(result, ForwardDone) for result in chats.given.values())
    return [chats.tokens[seq] + [chats.given[seq].token] for seq in chats.tokens]


def test_an_engine_on_it_gives_what_one_on_the_cpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, num_hidden_layers=2)
    expected = play(make_engine(tmp_path, pages=PAGES, max_sequences=8))
    monkeypatch.setattr(cuda_pass, "FEW_ROWS", 0)
    monkeypatch.setattr(cuda_decode, "captured", replaying)
    runner = make_runner(tmp_path, PAGES)
    runner._decodes._pool = object()
    engine = EngineCore(
        "it", runner, Scheduler(PAGES, token_budget=64, max_sequences=8), clock=time.monotonic, run_ahead=2
    )
    assert play(engine) == expected
    assert engine.stats().tenants["a"].ahead_tokens > 10
