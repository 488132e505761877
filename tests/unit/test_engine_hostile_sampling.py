"""Sampling parameters that no honest worker sends: out of range they fail their call, at its ends they draw a token."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realm.engine.checking import sampling_fault
from realm.engine.sampling import draw
from realm.guests.abi import ErrorCode
from realm.messages import (
    SamplingParams,
)
from tests.tiny import Driver, make_engine, make_model, pack

VOCAB = 97
GREEDY = SamplingParams()
HOSTILE = 3
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model(path)
    return path


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


# --- sampling parameters ----------------------------------------------------------------------------

BAD_SAMPLING: list[dict[str, Any]] = [
    *[{"temperature": value} for value in (NAN, INF, -INF, -1.0, -1e-30, 100.1, 1e308)],
    *[{"uniform": value} for value in (NAN, -0.1, 1.0, INF)],
    *[{"temperature": 1.0, "key": value, "number": 0} for value in (-1, -(1 << 63), 1 << 64)],
    *[{"temperature": 1.0, "number": value} for value in (-2, -(1 << 63), 1 << 62, (1 << 63) - 1, (1 << 64) - 1)],
    *[{"top_k": value} for value in (-1, -(1 << 63), 1 << 32, (1 << 64) - 1)],
    *[{"top_p": value} for value in (NAN, 0.0, -0.5, 1.1, INF)],
    *[{"min_p": value} for value in (NAN, -0.1, 1.1)],
    *[{"repetition_penalty": value} for value in (NAN, 0.0, -1.0, INF, 101.0)],
    *[{"mask": value} for value in (b"", b"\xff", bytes(13), b"\xff" * 12, b"\xff" * 400, bytes(12) + b"\x80")],
    {"bias_tokens": pack([1])},
    {"bias_values": floats(1)},
    {"bias_tokens": b"", "bias_values": b""},
    {"bias_tokens": pack([1, 2]), "bias_values": floats(1)},
    {"bias_tokens": b"abc", "bias_values": b"abc"},
    {"bias_tokens": pack([VOCAB]), "bias_values": floats(1)},
    {"bias_tokens": pack([2**32 - 1]), "bias_values": floats(1)},
    *[{"bias_tokens": pack([1]), "bias_values": floats(value)} for value in (NAN, INF, -INF)],
    {"bias_tokens": bytes(4 * 4097), "bias_values": bytes(4 * 4097)},
]


@pytest.mark.parametrize("changes", BAD_SAMPLING, ids=str)
def test_sampling_out_of_range_is_a_fault(changes: dict[str, Any]) -> None:
    assert sampling_fault(SamplingParams(**changes), VOCAB) is not None
    assert sampling_fault(SamplingParams(), VOCAB) is None


def test_sampling_out_of_range_fails_its_call_and_nothing_else(folder: Path) -> None:
    driver = Driver(make_engine(folder))
    want = driver.greedy([1, 2], 1)
    bad = driver.open("a")
    for changes in BAD_SAMPLING:
        failing = driver.ask(bad, [1, 2], SamplingParams(**changes))
        call = driver.ask(driver.open("b"), [1, 2], GREEDY)
        assert driver.wait_failed(failing).code == ErrorCode.INVALID_ARGUMENT
        (done,) = driver.wait(call)
        assert [done.token] == want
    (again,) = driver.wait(driver.ask(bad, [1, 2], GREEDY))
    assert [again.token] == want


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 1e-45},
    {"temperature": 5e-324},
    {"temperature": 1e-45, "top_p": 0.5},
    {"temperature": 1e-8, "top_k": 3},
    {"temperature": 100.0, "top_p": 1e-45, "top_k": 96},
    {"temperature": 1.0, "top_p": 5e-324, "min_p": 1.0},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.0, "top_k": (1 << 32) - 1},
    {"temperature": 1.0, "uniform": math.nextafter(1.0, 0.0)},
    {"temperature": 1.0, "top_p": 0.99, "uniform": math.nextafter(1.0, 0.0)},
    {"repetition_penalty": 1e-45},
    {"temperature": 1.0, "repetition_penalty": 1e-45},
    {"temperature": 1.0, "repetition_penalty": 5e-324, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 100.0},
    {"temperature": 1.0, "bias_tokens": pack([3, 3]), "bias_values": floats(3.4e38, 3.4e38)},
    {"temperature": 1e-45, "bias_tokens": pack([3, 3, 4]), "bias_values": floats(3.4e38, 3.4e38, 3.4e38)},
    {"temperature": 1.0, "bias_tokens": pack(list(range(VOCAB)) * 2), "bias_values": floats(*[-3.4e38] * 2 * VOCAB)},
    {
        "temperature": 0.5,
        "mask": b"\x08" + bytes(12),
        "bias_tokens": pack([3, 3]),
        "bias_values": floats(-3.4e38, -3.4e38),
    },
]


@pytest.mark.parametrize("changes", EXTREMES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e30, 0.0])
def test_arithmetic_that_overflows_still_draws_a_token(changes: dict[str, Any], scale: float) -> None:
    """Parameters in range, but at its ends: a token comes, and a mask is kept to."""
    params = SamplingParams(**changes, logprob=True)
    assert sampling_fault(params, VOCAB) is None
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)) * scale
    plain = SamplingParams(1.0, top_p=0.9, uniform=0.5)
    history = np.arange(50, dtype=np.uint32)
    drawn = draw(logits, [plain, params, plain], [None, history, None])
    assert all(0 <= token < VOCAB for token in drawn.tokens)
    if params.mask is not None:
        assert drawn.tokens[1] == 3
    if params.bias_tokens == pack([3, 3]):
        assert drawn.tokens[1] == 3
    alone = draw(logits[[0, 2]], [plain, plain], [None, None])
    assert [drawn.tokens[0], drawn.tokens[2]] == alone.tokens


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("changes", [{}, *EXTREMES, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_logits_that_are_no_numbers_hurt_only_their_own_row(changes: dict[str, Any], value: float) -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(size=(3, 600)).astype(np.float32))
    plain = [SamplingParams(1.0, top_p=0.9, uniform=0.5), SamplingParams(100.0, top_p=0.99, uniform=0.2)]
    want = draw(logits[[0, 2]], plain, [None, None]).tokens
    logits[1] = value
    changes = {name: item for name, item in changes.items() if name != "mask"}
    hurt = SamplingParams(**changes)
    drawn = draw(logits, [plain[0], hurt, plain[1]], [None, np.arange(9, dtype=np.uint32), None])
    assert [drawn.tokens[0], drawn.tokens[2]] == want
    assert 0 <= drawn.tokens[1] < 600


def test_a_draw_that_raises_fails_its_own_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The net below the checks: should one row still raise, the others of the step are drawn."""
    monkeypatch.setattr("realm.engine.core.sampling_fault", lambda params, vocab: None)
    driver = Driver(make_engine(folder))
    bad, good = driver.open("a"), driver.open("b")
    wrong = SamplingParams(bias_tokens=pack([5000]), bias_values=floats(1))
    failing, call = driver.ask(bad, [1, 2], wrong), driver.ask(good, [1, 2], GREEDY)
    assert driver.wait_failed(failing).code == ErrorCode.INTERNAL
    (done,) = driver.wait(call)
    (again,) = driver.wait(driver.ask(bad, [1, 2], GREEDY))
    assert again.token == done.token


# --- flat draws ---------------------------------------------------------------------------------------


def test_flat_rows_of_one_tenant_come_a_few_a_step_and_draw_the_same_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realm.engine.sampling.CANDIDATES", 8)
    monkeypatch.setattr("realm.engine.scheduler.COSTLY_ROWS", 4)
    flat = [SamplingParams(100.0, top_p=0.99, uniform=i / 40) for i in range(40)]

    def turn(driver: Driver, seqs: list[int]) -> list[int]:
        calls = [driver.ask(seq, [i], p) for i, (seq, p) in enumerate(zip(seqs, flat, strict=True))]
        return [done.token for done in driver.wait(*calls)]

    alone = Driver(make_engine(folder, token_budget=512))
    mine = [alone.open("flat") for _ in flat]
    want = [turn(alone, mine) for _ in range(3)]
    assert alone.engine.stats().steps == 3

    driver = Driver(make_engine(folder, token_budget=512))
    seqs, quiet = [driver.open("flat") for _ in flat], driver.open("quiet")
    driver.wait(driver.ask(quiet, [1], GREEDY))
    got = [turn(driver, seqs)]
    for _ in range(2):
        calls = [driver.ask(seq, [i], p) for i, (seq, p) in enumerate(zip(seqs, flat, strict=True))]
        steps = 0
        while not all(call in driver.answers for call in calls):
            before = sum(call in driver.answers for call in calls)
            served = driver.ask(quiet, [1], GREEDY)
            driver.step()
            assert served in driver.answers, "a quiet tenant's token waited for another's draws"
            assert sum(call in driver.answers for call in calls) - before <= 4
            steps += 1
        assert steps == 10
        got.append([done.token for done in driver.wait(*calls)])
    assert got == want
