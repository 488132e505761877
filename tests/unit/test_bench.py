"""What benchmarks ask, count and write; the guest that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realm.bench import report
from realm.bench.children import Children, children_of, process_seconds, thread_seconds
from realm.bench.clients import MODULE
from realm.bench.workload import Measured, Prompts, Workload
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from tests.guest_harness import EOS, VOCAB, WORD, run_guest

# --- the guest ----------------------------------------------------------------------------------


def counting(tokens: list[int]) -> Any:
    """A model whose next token is the sequence's length, as a letter; the fourth one would end it."""
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[EOS if len(tokens) == 6 else ord("a") + len(tokens)] = 40
    return logits


def test_the_guest_draws_as_many_as_it_is_told() -> None:
    ran = run_guest(MODULE, b"5 0 1000 0 7 200 8", counting)
    assert (ran.outcome, ran.code) == ("complete", 0)
    # It goes on after the end of a sequence, of which no text comes.
    assert ran.pieces == ["d", "e", "f", "h"]
    assert ran.engine.forwards == [[7, 200, 8], [ord("d")], [ord("e")], [ord("f")], [EOS]]
    assert ran.finished.usage.new_tokens == 5


def test_the_guest_draws_as_it_is_told() -> None:
    flat = np.zeros(VOCAB, dtype=np.float32)
    flat[WORD["42"]] = flat[WORD["ann"]] = 3.0

    def drawn(sampling: str) -> set[int]:
        forwards = [
            run_guest(MODULE, f"9 {sampling} 5".encode(), lambda _: flat, seed=s).engine.forwards for s in (1, 2)
        ]
        return {token for each in forwards for (token,) in each[1:]}

    assert drawn("0 1000 0") == {min(WORD["42"], WORD["ann"])}
    assert drawn("1000 1000 2") == {WORD["42"], WORD["ann"]}
    assert len(drawn("1000 1000 0")) > 5 and drawn("1000 100 0") <= {WORD["42"], WORD["ann"]}


@pytest.mark.parametrize(
    "input", [b"", b"5", b"5 0 1000 0", b"0 0 1000 0 7", b"5 0 1000 0 7 x", b"5 0 1000 0 7,8", b"x"]
)
def test_the_guest_refuses_other_input(input: bytes) -> None:
    ran = run_guest(MODULE, input, counting)
    assert (ran.outcome, ran.code) == ("error", ErrorCode.INVALID_ARGUMENT)


def test_the_workload_says_what_the_guest_reads() -> None:
    workload = Workload(guests=[1], temperature=0.7, top_p=0.95, top_k=40)
    assert workload.guest_input(np.array([3, 49_151], dtype=np.uint32), 128) == "128 700 950 40 3 49151"


# --- what is asked ------------------------------------------------------------------------------


def test_every_case_is_warmed_up_and_repeats_take_turns() -> None:
    workload = Workload(guests=[1, 8], new=100, warm_new=16, repeats=2)
    assert workload.rounds() == [
        (1, 16, False), (8, 16, False), (1, 100, True), (8, 100, True), (1, 100, True), (8, 100, True),
    ]  # fmt: skip
    assert [new for _, new, _ in Workload(guests=[1], new=4, repeats=1).rounds()] == [4, 4]


def test_no_two_prompts_share_a_page() -> None:
    prompts = Prompts(1000, 64, seed=1)
    taken = [*prompts.take(50), *prompts.take(50)]
    assert all(prompt.dtype == np.uint32 and len(prompt) == 64 and prompt.max() < 1000 for prompt in taken)
    assert len({prompt[at : at + 16].tobytes() for prompt in taken for at in range(0, 64, 16)}) == 400
    again = Prompts(1000, 64, seed=1).take(1)[0]
    assert (again == taken[0]).all() and (Prompts(1000, 64, seed=2).take(1)[0] != taken[0]).any()


# --- what is written ----------------------------------------------------------------------------


def measured(requests: int, seconds: float, **values: Any) -> Measured:
    return Measured(requests=requests, tokens=requests * 100, began=0.0, seconds=seconds, **values)


def test_the_table_has_a_row_for_each_case_and_no_empty_column() -> None:
    guests = [measured(8, s, steps=100, rows=750, device_seconds=s / 2, workers_cpu=0.008) for s in (2.0, 1.0, 4.0)]
    results = {"native": [measured(8, 1.0, steps=100, device_seconds=0.5)], "guests": [*guests, measured(1, 1.0)]}
    headings, rows = report.table_rows(results)
    assert headings == [
        "requests", "measured", "tokens/s", "steps", "rows/step",
        "ms/step", "device ms/step", "device busy", "worker µs/token", "±",
    ]  # fmt: skip
    assert rows == [
        ["1", "guests", "100", "-", "-", "-", "-", "-", "-", "0%"],
        ["8", "native", "800", "100", "-", "10.000", "5.000", "50%", "-", "0%"],
        # The median is the one of 2 s; the rates go from 200 to 800.
        ["8", "guests", "400", "100", "7.5", "20.000", "10.000", "50%", "10.0", "75%"],
    ]


def test_json_has_every_repeat_and_the_medians() -> None:
    results = {"guests": [measured(2, s, wasted=25) for s in (1.0, 2.0, 4.0)]}
    written = json.loads(report.as_json(results, {"model": "m"}, [{"name": "g"}]))
    assert written["asked"] == {"model": "m"}
    (case,) = written["cases"]
    assert (case["kind"], case["requests"], len(case["repeats"])) == ("guests", 2, 3)
    assert [repeat["seconds"] for repeat in case["repeats"]] == [1.0, 2.0, 4.0]
    assert case["median"]["tokens_per_second"] == 100.0 and case["median"]["wasted"] == pytest.approx(25 / 225)
    assert case["median"]["gateway_us"] is None
    machine = written["environment"]
    assert machine["gpus"] == [{"name": "g"}]
    assert machine["python"].startswith("3.") and machine["packages"]["wasmtime"] and machine["processors"] >= 1


def test_gpus_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.gpus() == []
    command = tmp_path / "nvidia-smi"
    values = [f"v{at}" for at in range(len(report.GPU_FACTS))]
    command.write_text(f"#!/bin/sh\necho '{', '.join(values)}'\n")
    command.chmod(0o755)
    assert report.gpus() == [dict(zip(report.GPU_FACTS, values, strict=True))]
    command.write_text("#!/bin/sh\nexit 9\n")
    assert report.gpus() == []


# --- the processes ------------------------------------------------------------------------------


def test_a_process_that_fails_has_the_last_word() -> None:
    with Children(quiet=True) as children:
        child = children.spawn("realm.engine.server", "--socket")
        child.wait()
        with pytest.raises(RealmError, match=r"ended with status 2(.|\n)*expected one argument") as caught:
            children.check()
    assert caught.value.code == "bench_failed"


def test_no_process_is_left_when_something_goes_wrong() -> None:
    with pytest.raises(ZeroDivisionError), Children(quiet=True) as children:
        child = children.spawn("http.server", "0", "--bind", "127.0.0.1")
        children.check()
        raise ZeroDivisionError
    assert child.returncode is not None


def test_children_get_no_environment_but_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("CHOSEN", "here")
    monkeypatch.delenv("OTHER", raising=False)
    with Children(quiet=True) as children:
        defaults = {"CHOSEN": "not here", "OTHER": "default"}
        child = children.spawn("http.server", "0", environment=defaults, variables={"SET": "x"})
        # The kernel lets it be read a moment before it is there.
        while not (environment := Path(f"/proc/{child.pid}/environ").read_text()):
            children.check()
        children.end(0.0)
    variables = dict(line.split("=", 1) for line in environment.split("\0") if line)
    assert "SECRET" not in variables
    assert (variables["CHOSEN"], variables["OTHER"], variables["SET"]) == ("here", "default", "x")


def test_processor_time_is_counted() -> None:
    code = "while sum(range(10000)): pass"
    busy = subprocess.Popen([sys.executable, "-c", code])
    try:
        while thread_seconds(busy.pid, busy.pid) < 0.05:
            assert busy.poll() is None
        assert process_seconds(busy.pid) >= 0.05
        assert code in children_of(os.getpid())[busy.pid]
    finally:
        busy.kill()
        busy.wait()
    with pytest.raises(OSError):
        process_seconds(busy.pid)
