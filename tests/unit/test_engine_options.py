"""What an operator may choose of the engine, and how it reaches the engine's process."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import realm.settings
from realm.engine.options import ATTENTIONS, DEVICES, DTYPES, MOST_AHEAD, MOST_MIB, EngineOptions, declare, read
from realm.errors import RealmError
from realm.settings import MAX_DEFAULT_WORKERS, ServeSettings, default_workers, gpu_present
from realm.supervisor import engine_arguments, engine_environment, worker_arguments

COUNTS = st.integers(0, 1 << 40)

OPTIONS = st.builds(
    EngineOptions,
    device=st.sampled_from(DEVICES),
    dtype=st.sampled_from(DTYPES),
    attention=st.sampled_from(ATTENTIONS),
    pages=COUNTS,
    kv_fraction=st.floats(0, 1, exclude_min=True),
    token_budget=COUNTS,
    max_sequences=COUNTS,
    run_ahead=st.integers(-1, MOST_AHEAD),
    threads=COUNTS,
    adapter_memory=st.integers(-1, MOST_MIB),
    adapter_cache=st.integers(-1, MOST_MIB),
    random_weights=st.booleans(),
)


def parse(words: list[str]) -> EngineOptions:
    parser = argparse.ArgumentParser()
    declare(parser)
    return read(parser.parse_args(words))


@given(OPTIONS)
def test_the_engine_process_gets_what_the_operator_chose(options: EngineOptions) -> None:
    assert parse(options.arguments()) == options


def test_defaults_are_the_same_on_both_sides() -> None:
    assert parse([]) == EngineOptions()


def test_arguments_of_the_processes(tmp_path: Path) -> None:
    settings = ServeSettings(home=tmp_path, engine=EngineOptions(device="cpu", run_ahead=-1))
    words = engine_arguments(settings, tmp_path / "s", tmp_path / "m")
    assert words[:4] == ["--socket", str(tmp_path / "s"), "--model", str(tmp_path / "m")]
    assert parse(words[4:]) == settings.engine
    # Code that the engine will run lies where only this user can write.
    assert engine_environment(settings)["TRITON_CACHE_DIR"] == str(tmp_path / "triton")
    words = worker_arguments(settings, 3, tmp_path / "e", tmp_path / "g", tmp_path / "m")
    named = dict(zip(words[::2], words[1::2], strict=True))
    assert named == {
        "--engine": str(tmp_path / "e"),
        "--gateway": str(tmp_path / "g"),
        "--model": str(tmp_path / "m"),
        "--cache": str(tmp_path / "cache"),
        "--worker": "3",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "tpu"),
        ("device", ""),
        ("dtype", "float16"),
        ("attention", "flash"),
        ("pages", -1),
        ("token_budget", -1),
        ("max_sequences", -5),
        ("threads", -1),
        ("kv_fraction", 0.0),
        ("kv_fraction", 1.01),
        ("kv_fraction", float("nan")),
        ("run_ahead", -2),
        ("adapter_memory", -2),
        ("adapter_memory", MOST_MIB + 1),
        ("adapter_cache", -2),
        ("adapter_cache", MOST_MIB + 1),
        ("run_ahead", MOST_AHEAD + 1),
    ],
)
def test_what_cannot_be_is_named(name: str, value: Any) -> None:
    with pytest.raises(RealmError) as caught:
        EngineOptions(**{name: value})
    assert caught.value.code == "invalid_params" and caught.value.details == {"param": name}


def test_the_gateway_reads_options_without_torch() -> None:
    # It would cost the gateway a second and 200 MB.
    program = "import sys, realm.settings, realm.supervisor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


class Machine:
    """A machine with so many processors and GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, devices: Path, processors: int) -> None:
        monkeypatch.setattr(realm.settings, "_GPUS", devices)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("processors", "on_cpu", "on_gpu"), [(1, 1, 1), (2, 1, 1), (4, 2, 1), (5, 2, 2), (16, 8, 13)])
def test_workers_leave_processors_for_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processors: int, on_cpu: int, on_gpu: int
) -> None:
    Machine(monkeypatch, tmp_path, processors)
    assert default_workers("cpu") == default_workers() == on_cpu
    assert default_workers("cuda") == on_gpu
    (tmp_path / "nvidia0").touch()
    assert default_workers() == ServeSettings().workers == on_gpu and default_workers("cpu") == on_cpu


def test_a_big_machine_does_not_get_a_worker_for_each_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Machine(monkeypatch, tmp_path, 192)
    assert default_workers("cuda") == MAX_DEFAULT_WORKERS


def test_a_gpu_that_is_hidden_is_not_present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Machine(monkeypatch, tmp_path, 8)
    (tmp_path / "nvidiactl").touch()
    assert not gpu_present()
    (tmp_path / "nvidia3").touch()
    assert gpu_present()
    for hidden in ("", "-1", " "):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not gpu_present()
    for visible in ("0", "3,1", "GPU-5c1e"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu_present()
