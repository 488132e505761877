"""A guest in one process with a real (tiny) engine: :mod:`realm.local`."""

from __future__ import annotations

from pathlib import Path

import pytest
from wasmtime import wat2wasm

from realm.engine.core import EngineCore
from realm.engine.loading import EngineOptions, load_engine
from realm.errors import RealmError
from realm.local import run_local
from realm.messages import Log, Output, RunFinished
from tests.model_files import write_folder
from tests.wat import GENERATE, guest, sampling


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def engine(model: Path) -> EngineCore:
    return load_engine(model, EngineOptions(dtype="float32", pages=16, token_budget=32))


def events(folder: Path, model: Path, engine: EngineCore, wat: str, data: bytes, seed: int = 1) -> list[object]:
    wasm = folder / "guest.wasm"
    wasm.write_bytes(wat2wasm(wat))
    return list(run_local(wasm, data, model, cache=folder / "cache", seed=seed, engine=engine))


def output(found: list[object]) -> bytes:
    return b"".join(e.data for e in found if isinstance(e, Output))


def test_a_local_run_repeats_itself(tmp_path: Path, model: Path, engine: EngineCore) -> None:
    first = events(tmp_path, model, engine, GENERATE, sampling(1.0))
    end = first[-1]
    assert isinstance(end, RunFinished)
    assert (end.outcome, end.usage.new_tokens) == ("complete", 12)
    assert output(events(tmp_path, model, engine, GENERATE, sampling(1.0))) == output(first)
    assert output(events(tmp_path, model, engine, GENERATE, sampling(1.0), seed=2)) != output(first)
    assert not engine.has_work()
    engine.check()
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_running_ahead_changes_nothing(tmp_path: Path, model: Path, engine: EngineCore, temperature: float) -> None:
    options = EngineOptions(dtype="float32", pages=16, token_budget=32, run_ahead=2)
    ahead = load_engine(model, options)
    found = [events(tmp_path, model, core, GENERATE, sampling(temperature)) for core in (engine, ahead)]
    assert output(found[0]) == output(found[1])
    tenant = ahead.stats().tenants["local"]
    # The guest asked for each token by a row, and the engine had begun it before.
    assert tenant.ahead_tokens > 0
    assert tenant.decode_tokens == engine.stats().tenants["local"].decode_tokens
    ahead.close()


def test_store_log_and_a_client_that_is_not_there(tmp_path: Path, model: Path, engine: EngineCore) -> None:
    body = """
      (if (i32.ne (call $kv_get (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 8)) (i32.const -7))
        (then unreachable))
      (drop (call $kv_set (i32.const 0) (i32.const 1) (i32.const 100) (i32.const 3)))
      (if (i32.ne (call $kv_get (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 8)) (i32.const 3))
        (then unreachable))
      (drop (call $kv_set (i32.const 0) (i32.const 1) (i32.const 100) (i32.const 0)))
      (if (i32.ne (call $kv_get (i32.const 0) (i32.const 1) (i32.const 8) (i32.const 8)) (i32.const -7))
        (then unreachable))
      (drop (call $log (i32.const 1) (i32.const 8) (i32.const 3)))
      (call $recv (i32.const 0) (i32.const 8) (i32.const 60000))"""
    wat = guest(body, "kv_get", "kv_set", "log", "recv", extra='(data (i32.const 100) "abc")')
    found = events(tmp_path, model, engine, wat, b"")
    assert [e.text for e in found if isinstance(e, Log) and e.level == "info"] == ["abc"]
    end = found[-1]
    assert isinstance(end, RunFinished)
    assert end.error is not None
    assert end.error.details["name"] == "closed"


def test_leaving_early_frees_the_engine(tmp_path: Path, model: Path, engine: EngineCore) -> None:
    wasm = tmp_path / "guest.wasm"
    wasm.write_bytes(wat2wasm(GENERATE))
    run = run_local(wasm, sampling(), model, cache=tmp_path / "cache", engine=engine)
    assert isinstance(next(run), Output)
    run.close()  # type: ignore[attr-defined]
    assert engine.stats().pages_used == 0
    assert not engine.has_work()


def test_a_bad_module_is_refused(tmp_path: Path, model: Path, engine: EngineCore) -> None:
    with pytest.raises(RealmError, match="module_export_missing"):
        events(tmp_path, model, engine, "(module)", b"")
