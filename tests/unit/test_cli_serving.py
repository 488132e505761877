"""What ``realm serve`` makes of its flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import realm.serve
from realm.engine.options import EngineOptions
from realm.settings import ServeSettings, default_workers
from tests.cli_harness import Invoke, invoke_fixture

__all__ = ["invoke_fixture"]

Serve = Callable[..., ServeSettings]


@pytest.fixture
def serve(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Runs ``realm serve`` without a server; gives the settings that it would run with."""
    seen: list[ServeSettings] = []

    async def run(settings: ServeSettings, *, on_ready: Any) -> None:
        seen.append(settings)

    monkeypatch.setattr(realm.serve, "serve", run)

    def called(*flags: str) -> ServeSettings:
        result = invoke("serve", *flags)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return called


def test_without_flags_everything_is_the_default(serve: Serve) -> None:
    settings = serve()
    assert settings.engine == EngineOptions() and settings.workers == default_workers()


def test_flags_of_the_engine(serve: Serve) -> None:
    flags = "--device cuda --dtype float32 --attention triton --kv-pages 7 --kv-fraction 0.5 --token-budget 64"
    more = "--max-sequences 9 --run-ahead 0 --threads 3 --adapter-memory 96 --adapter-cache -1 --random-weights"
    assert serve(*flags.split(), *more.split()).engine == EngineOptions(
        device="cuda",
        dtype="float32",
        attention="triton",
        pages=7,
        kv_fraction=0.5,
        token_budget=64,
        max_sequences=9,
        run_ahead=0,
        threads=3,
        adapter_memory=96,
        adapter_cache=-1,
        random_weights=True,
    )


def test_workers_follow_the_device(serve: Serve) -> None:
    for device in ("auto", "cpu", "cuda"):
        assert serve("--device", device).workers == default_workers(device)
    assert serve("--device", "cuda", "--workers", "5").workers == 5


@pytest.mark.parametrize("flags", ["--device tpu", "--dtype int8", "--attention x", "--kv-fraction 0"])
def test_a_wrong_flag_is_a_line_before_anything_starts(invoke: Invoke, flags: str) -> None:
    result = invoke("serve", *flags.split())
    assert result.exit_code == 1
    assert result.stderr.startswith("invalid_params: ") and len(result.stderr.splitlines()) == 1


def test_run_ahead_is_bounded(invoke: Invoke) -> None:
    assert invoke("serve", "--run-ahead", "99").exit_code == 2


def test_help_shows_the_flags_that_are_for_operators(invoke: Invoke) -> None:
    text = invoke("serve", "--help").output
    assert "--kv-fraction" in text and "--run-ahead" in text and "--random-weights" not in text
