"""Adapters in benchmarks: who uses which, what is written of them, and what the guest does with a name."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm.adapters.peft import check_adapter, parse_config
from realm.bench import report
from realm.bench.adapters import NONE, TARGETS, UNIFORM, ZIPF, AdapterUse, Draws, Library, adapter_name
from realm.bench.clients import MODULE
from realm.bench.tracing import Spans, Window
from realm.bench.workload import Measured, Workload
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.models.config import ModelConfig
from tests.benchmarks.bench_adapters import steps_within
from tests.benchmarks.watched_runs import Run
from tests.guest_harness import VOCAB, run_guest
from tests.unit.test_bench_serving import TINY

# --- the guest ----------------------------------------------------------------------------------


def letters(tokens: list[int], first: str = "a") -> Any:
    """The next token is the sequence's length, as a letter."""
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[ord(first) + len(tokens)] = 40
    return logits


def capitals(tokens: list[int]) -> Any:
    return letters(tokens, "A")


@pytest.mark.parametrize("name", ["x", "adapter-0", "x" * 128])
def test_the_guest_applies_an_adapter_before_its_first_forward(name: str) -> None:
    ran = run_guest(MODULE, f"2 0 1000 0 7 8 @{name}".encode(), letters, adapters={name: capitals})
    assert (ran.outcome, ran.code, ran.pieces) == ("complete", 0, ["C", "D"])
    assert ran.engine.applied == [name] and ran.engine.forwards == [[7, 8], [ord("C")]]
    ran = run_guest(MODULE, b"2 0 1000 0 7 8", letters, adapters={name: capitals})
    assert (ran.pieces, ran.engine.applied) == (["c", "d"], [])


def test_the_guest_ends_when_there_is_no_such_adapter() -> None:
    ran = run_guest(MODULE, b"2 0 1000 0 7 8 @y", letters, adapters={"x": capitals})
    assert (ran.outcome, ran.code) == ("error", ErrorCode.NOT_FOUND) and ran.engine.forwards == []


@pytest.mark.parametrize(
    "end",
    [b" @", b"@x", b" @x ", b" @x y", b" @x @y", b" x", b" @\xc3\xa9", b" @x\0", b"\0", b" @" + b"x" * 129, b" 8 @\n"],
)
def test_the_guest_refuses_what_is_not_the_name_of_an_adapter(end: bytes) -> None:
    ran = run_guest(MODULE, b"2 0 1000 0 7" + end, letters)
    assert (ran.outcome, ran.code) == ("error", ErrorCode.INVALID_ARGUMENT)
    assert ran.engine.forwards == []


def test_a_name_needs_a_prompt() -> None:
    ran = run_guest(MODULE, b"2 0 1000 0 @x", letters)
    assert (ran.outcome, ran.code) == ("error", ErrorCode.INVALID_ARGUMENT)


def test_the_workload_puts_the_adapter_last() -> None:
    prompt = np.array([3, 4], dtype=np.uint32)
    assert Workload(guests=[1]).guest_input(prompt, 9, "adapter-5") == "9 0 1000 0 3 4 @adapter-5"


# --- who uses which -----------------------------------------------------------------------------


def use(**values: Any) -> AdapterUse:
    return AdapterUse(**({"counts": [0, 4]} | values))


def test_draws_repeat_and_differ_from_round_to_round() -> None:
    one, two, other = (Draws(use(), seed) for seed in (1, 1, 2))
    first = one.take(100, 64)
    assert first == two.take(100, 64) and first != one.take(100, 64) and first != other.take(100, 64)
    assert {*first} <= {adapter_name(number) for number in range(100)} and len(first) == 64


def test_a_share_of_the_guests_has_none_wherever_they_run() -> None:
    names = Draws(use(share=0.5), 1).take(4, 400)
    assert names.count("") == 200
    # Guests go to workers and tenants in turn.
    for ways in (2, 3):
        assert all(80 / ways < names[at::ways].count("") < 320 / ways for at in range(ways))
    assert Draws(use(share=0.5), 1).take(4, 1).count("") in (0, 1)
    assert "" not in Draws(use(), 1).take(4, 50)


def test_mixes() -> None:
    drawn = Counter(Draws(use(mix=UNIFORM), 1).take(8, 8000))
    assert len(drawn) == 8 and max(drawn.values()) < 1.3 * min(drawn.values())
    drawn = Counter(Draws(use(mix=ZIPF), 1).take(8, 8000))
    # 1 / (1 + 1/2 + ... + 1/8) of all: 0.368.
    assert drawn[adapter_name(0)] == pytest.approx(0.368 * 8000, rel=0.1)
    assert drawn[adapter_name(0)] / drawn[adapter_name(3)] == pytest.approx(4, rel=0.2)


def test_the_number_registered_grows_and_each_is_measured_beside_none() -> None:
    workload = Workload(guests=[1, 8], new=100, warm_new=16, repeats=1, adapters=use(counts=[0, 1, 16]))
    assert workload.adapter_rounds() == [
        (1, 16, False, False), (1, 16, False, True), (8, 16, False, False), (8, 16, False, True),
        (1, 100, True, False), (1, 100, True, True), (8, 100, True, False), (8, 100, True, True),
    ]  # fmt: skip
    assert (workload.once(), workload.measures()) == (2, 10)
    assert Workload(guests=[1, 8], repeats=3).measures() == 6


# --- the files ----------------------------------------------------------------------------------


def test_adapters_are_real_files_that_are_written_once(tmp_path: Path) -> None:
    model = ModelConfig.parse(TINY)
    library = Library(tmp_path, model, use(rank=4, targets=["q", "gate"]))
    files = [*library.up_to(2), *library.up_to(2), *library.up_to(3)]
    assert [file.name for file in files] == ["adapter-0", "adapter-1", "adapter-2"]
    assert {file.tenant for file in files} == {""} and len({file.sha256 for file in files}) == 3
    for file in files:
        assert file.sha256 == hashlib.sha256(Path(file.path).read_bytes()).hexdigest()
        info = check_adapter(Path(file.path), parse_config(file.config), model)
        assert (info.rank, info.targets) == (4, ["q_proj", "gate_proj"])


def test_a_disk_that_is_full_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "0").write_text("not a folder")
    with pytest.raises(RealmError) as caught:
        next(Library(tmp_path, ModelConfig.parse(TINY), use()).up_to(1))
    assert caught.value.code == "bench_failed"


# --- what is written ----------------------------------------------------------------------------


def measured(adapters: int | None, mix: str, seconds: float, **values: Any) -> Measured:
    return Measured(requests=8, tokens=800, began=0.0, seconds=seconds, adapters=adapters, mix=mix, **values)


USED = {"adapter_requests": 8, "adapter_different": 5, "adapter_seconds": 2.0}
CASES = [
    *(measured(0, NONE, seconds, steps=100) for seconds in (1.0, 2.0, 0.5)),
    measured(16, NONE, 1.25, steps=100, adapters_resident=16, loads=0),
    measured(16, ZIPF, 2.0, steps=100, adapters_resident=9, loads=3, **USED),
]
HEADINGS = ["adapters", "mix", "requests", "different", "tokens/s", "of none", "of unused"]
HEADINGS += ["ms/step", "device ms/step", "device busy", "resident", "loads"]


def test_the_table_has_what_adapters_cost() -> None:
    headings, rows = report.adapter_rows(CASES)
    assert headings == [*HEADINGS, "±"]
    assert rows == [
        ["0", "-", "8", "-", "800", "-", "-", "10.000", "-", "-", "-", "-", "75%"],
        ["16", "unused", "8", "-", "640", "0.800", "-", "12.500", "-", "-", "16", "0", "0%"],
        ["16", "zipf", "8", "5", "400", "0.500", "0.625", "20.000", "-", "-", "9", "3", "0%"],
    ]


def test_rates_of_both_halves_are_given_where_there_are_two() -> None:
    half = measured(4, UNIFORM, 2.0, adapter_requests=2, adapter_different=2, adapter_seconds=2.0, plain_seconds=1.5)
    headings, rows = report.adapter_rows([half])
    assert headings == [*HEADINGS, "with one", "without", "±"]
    # Two of the eight requests drew 200 tokens in 2 s, six drew 600 in 1.5 s; nothing to compare with was measured.
    assert rows == [["4", "uniform", "8", "2", "400", "-", "-", "-", "-", "-", "-", "-", "100", "400", "0%"]]


def test_without_adapters_nothing_is_different() -> None:
    assert report.adapter_rows([measured(None, NONE, 1.0), measured(0, NONE, 1.0)]) == ([], [])
    _, rows = report.table_rows({"guests": CASES})
    assert [row[:3] for row in rows] == [["8", "guests", "800"]]


def test_json_has_every_case_and_its_ratios() -> None:
    written = json.loads(report.as_json({"guests": CASES}, {}, []))
    keys = ("adapters", "mix", "of_none", "of_unused")
    assert [tuple(case[key] for key in keys) for case in written["cases"]] == [
        (0, "none", None, None), (16, "none", 0.8, None), (16, "zipf", 0.5, 0.625),
    ]  # fmt: skip
    assert written["cases"][2]["median"]["loads"] == 3
    assert written["cases"][2]["repeats"][0]["adapter_different"] == 5
    assert str(report.case_of(CASES[-1])) == "8 guests, 16 adapters zipf"
    assert str(report.case_of(CASES[-2])) == "8 guests, 16 adapters unused"
    assert str(report.case_of(CASES[0])) == "8 guests"


def test_every_target_of_the_command_line_is_a_module() -> None:
    assert [*TARGETS.values()] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- what tests/benchmarks/bench_adapters.py counts ---------------------------------------------


def test_tokens_that_came_together_share_their_time() -> None:
    run = Run(1, 0.0, times=[1.0, 2.0, 5.0, 5.5], counts=[1, 2, 5, 5])
    assert run.gaps() == [1.0, 1.0, 1.0, 1.0]
    assert Run(1, 0.0, times=[1.0], counts=[1]).gaps() == []


def test_steps_count_where_they_lie_whole_in_the_window() -> None:
    began, ended = np.array([0.0, 1.0, 2.0, 3.5, 4.0]), np.array([1.25, 2.0, 3.0, 4.0, 5.0])
    steps = Spans("engine", ["gpu/step"], began, ended, np.zeros(5, np.int32), np.zeros(5, np.int32))
    assert steps_within(steps, Window("swap", 0.5, 4.5)) == ([1.0, 1.0, 0.5], [1.0, 1.0])
