"""``realm bench serving``, from the command line to its files, on real processes and a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from realm.guests.abi import ErrorCode
from realm.models import shapes
from realm.models.config import ModelConfig
from tests.cli_harness import Invoke, invoke_fixture

__all__ = ["invoke_fixture"]

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "vocab_size": 400,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(name="tiny", autouse=True)
def tiny_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that loads in no time."""
    monkeypatch.setitem(shapes._CONFIGS, "tiny", TINY)
    monkeypatch.setitem(shapes.SHAPES, "tiny", ModelConfig.parse(TINY))


SMALL = ["--shape", "tiny", "--guests", "1,3", "--prompt", "20", "--new", "6", "--repeats", "2"]
SMALL += ["--device", "cpu", "--kv-pages", "64", "--workers", "2", "--threads", "1"]


def cases(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    written = json.loads(path.read_text())
    assert written["asked"]["workload"]["new"] == 6 and written["asked"]["engine"]["random_weights"]
    return {(case["kind"], case["requests"]): case for case in written["cases"]}


def test_engine_and_workers_with_and_without_guests(invoke: Invoke, tmp_path: Path) -> None:
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    result = invoke("bench", "serving", *SMALL, "--native", "--json", str(figures), "--trace", str(trace))
    assert result.exit_code == 0, result.output
    found = cases(figures)
    assert list(found) == [("native", 1), ("native", 3), ("guests", 1), ("guests", 3)]
    for (kind, requests), case in found.items():
        assert len(case["repeats"]) == 2
        for repeat in case["repeats"]:
            assert repeat["tokens"] == 6 * requests and repeat["seconds"] > 0
            # Each pass draws at most one token of a request, and no prompt was found in the cache.
            assert repeat["steps"] >= 6 and repeat["rows"] >= 6 * requests
            assert (repeat["workers_cpu"] is None) == (kind == "native")
            assert repeat["last_first_seconds"] <= repeat["seconds"]
    assert "3  guests" in result.output and "3  native" in result.output
    # The trace has the measured cases, their steps, and every process.
    assert "3 guests: " in result.output and "gap of" in result.output
    events = json.loads(trace.read_text())["traceEvents"]
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert processes == {"cases", "engine", "worker 1", "worker 2"}
    assert len([event for event in events if event["name"] == "step"]) >= 12


def test_the_whole_server_with_clients(invoke: Invoke, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    drawn = ["--temperature", "0.8", "--top-p", "0.9"]
    result = invoke("bench", "serving", *SMALL, *drawn, "--no-processes", "--clients", "--json", str(figures))
    assert result.exit_code == 0, result.output
    found = cases(figures)
    assert list(found) == [("clients", 1), ("clients", 3)]
    for (_, requests), case in found.items():
        for repeat in case["repeats"]:
            assert repeat["tokens"] == 6 * requests and repeat["steps"] >= 6
            assert 0 < repeat["first_seconds"] <= repeat["last_first_seconds"] <= repeat["seconds"]
            assert repeat["gateway_cpu"] > 0 and repeat["workers_cpu"] > 0 and repeat["engine_cpu"] > 0
    assert "temperature 0.8, top-p 0.9" in result.output


@pytest.mark.parametrize("extra", [["--native", "--no-processes"], [], ["--no-processes", "--clients"]])
def test_a_process_that_cannot_start_is_an_error_with_its_reason(invoke: Invoke, extra: list[str]) -> None:
    # There is no attention of that kind on a CPU: the engine says so, and ends.
    result = invoke("bench", "serving", *SMALL, "--attention", "triton", *extra)
    assert result.exit_code == 1
    assert "bench_failed: " in result.stderr and "--attention triton does not work with --device cpu" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--shape", "tiny", "--model", "x"], "not both"),
        ([], "--shape or --model"),
        (["--shape", "tiny", "--guests", "1,a"], "1,a"),
        (["--shape", "tiny", "--guests", "2,2"], "2,2"),
        (["--shape", "tiny", "--guests", "0"], "'0'"),
        (["--shape", "tiny", "--no-processes"], "nothing to measure"),
        (["--shape", "tiny", "--no-processes", "--native", "--trace", "x"], "--trace"),
        (["--shape", "tiny", "--no-processes", "--native", "--adapters", "1"], "--adapters"),
        (["--shape", "tiny", "--adapters", "1,x"], "1,x"),
        (["--shape", "tiny", "--adapters", "-1"], "'-1'"),
        (["--shape", "tiny", "--adapters", "1,1"], "1,1"),
        (["--shape", "tiny", "--adapters", "1", "--adapter-targets", "q,lm_head"], "q,lm_head"),
        (["--shape", "tiny", "--adapters", "1", "--adapter-targets", "q,q"], "q,q"),
        (["--shape", "tiny", "--adapters", "1", "--adapter-mix", "pareto"], "pareto"),
        (["--shape", "tiny", "--adapters", "1", "--adapter-share", "0"], "--adapter-share"),
        (["--shape", "tiny", "--adapters", "1", "--adapter-share", "1.5"], "--adapter-share"),
        (["--shape", "tiny", "--adapters", "1", "--adapter-rank", "257"], "--adapter-rank"),
    ],
)
def test_what_cannot_be_measured_is_refused(invoke: Invoke, arguments: list[str], problem: str) -> None:
    result = invoke("bench", "serving", *arguments)
    assert result.exit_code == 2 and problem in result.stderr


def test_unknown_shapes_and_models_are_typed_errors(invoke: Invoke) -> None:
    result = invoke("bench", "serving", "--shape", "huge")
    assert result.exit_code == 1 and "invalid_params: shape 'huge'" in result.stderr
    result = invoke("bench", "serving", "--model", "nowhere")
    assert result.exit_code == 1 and "model_not_found" in result.stderr


ADAPTERS = ["--adapters", "4,0,1", "--adapter-rank", "4", "--adapter-targets", "q,down"]


def test_adapters_are_registered_loaded_and_used(invoke: Invoke, tmp_path: Path) -> None:
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    more = ["--adapter-mix", "zipf", "--native", "--json", str(figures), "--trace", str(trace)]
    result = invoke("bench", "serving", *SMALL, *ADAPTERS, *more)
    assert result.exit_code == 0, result.output
    written = json.loads(figures.read_text())["cases"]
    found = {(case["kind"], case["requests"], case["adapters"], case["mix"]): case for case in written}
    # More and more adapters are registered, 0 first, and each number is measured without using them too.
    guests = [("guests", count, 0, "none") for count in (1, 3)]
    for registered in (1, 4):
        guests += [("guests", count, registered, mix) for count in (1, 3) for mix in ("none", "zipf")]
    assert list(found) == [("native", 1, None, "none"), ("native", 3, None, "none"), *guests]
    for (_, requests, registered, mix), case in found.items():
        assert len(case["repeats"]) == 2
        for repeat in case["repeats"]:
            assert repeat["tokens"] == 6 * requests
            using = requests if mix == "zipf" else 0
            assert repeat["adapter_requests"] == using and (repeat["adapter_seconds"] is None) == (not using)
            assert repeat["adapter_different"] in range(bool(using), min(using, registered or 0) + 1)
            if registered:
                # All were applied before, and there is room for all.
                assert (repeat["loads"], repeat["adapters_resident"]) == (0, registered)
        if registered:
            assert case["of_none"] > 0 and (case["of_unused"] is None) == (mix == "none")
    assert "adapters of rank 4 on q,down, all loaded before" in result.output
    assert "3 guests, 4 adapters zipf: " in result.output and "3 guests, 4 adapters unused: " in result.output


def test_half_of_the_guests_may_have_no_adapter(invoke: Invoke, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    small = ["--adapters", "2", "--adapter-share", "0.5", "--adapter-cold", "--json", str(figures)]
    result = invoke("bench", "serving", *SMALL, "--guests", "4", "--repeats", "1", *small)
    assert result.exit_code == 0, result.output
    unused, used = json.loads(figures.read_text())["cases"]
    assert (unused["adapters"], unused["mix"], used["mix"]) == (2, "none", "uniform")
    assert used["of_none"] is None and used["of_unused"] > 0
    (repeat,) = used["repeats"]
    assert repeat["adapter_requests"] == 2 and repeat["adapter_seconds"] > 0 and repeat["plain_seconds"] > 0
    assert max(repeat["adapter_seconds"], repeat["plain_seconds"]) == repeat["seconds"]
    assert used["median"]["adapter_tokens_per_second"] > 0 and used["median"]["plain_tokens_per_second"] > 0
    assert "50% of the guests have one, loaded as they are drawn" in result.output


def test_an_engine_without_adapters_is_an_error_with_its_reason(invoke: Invoke) -> None:
    result = invoke("bench", "serving", *SMALL, "--adapters", "1", "--adapter-memory", "-1")
    assert result.exit_code == 1
    assert "bench_failed: a run ended otherwise than it should" in result.stderr
    assert f"code={ErrorCode.NOT_SUPPORTED.value}" in result.stderr
