"""A guest in one process with a real (tiny) engine: :mod:`realm.local`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wasmtime import wat2wasm

from realm.adapters.made_up import CONFIG_FILE, TENSORS_FILE, write_random_adapter
from realm.engine.core import EngineCore
from realm.engine.loading import EngineOptions, load_engine
from realm.errors import RealmError
from realm.guests.abi import ErrorCode
from realm.local import run_local
from realm.run_messages import Log, Output, RunFinished
from tests.model_files import write_folder
from tests.wat import GENERATE, guest, sampling


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


@pytest.fixture
def engine(model: Path) -> EngineCore:
    return load_engine(model, EngineOptions(dtype="float32", pages=16, token_budget=32))


def events(
    folder: Path, model: Path, engine: EngineCore, wat: str, data: bytes, seed: int = 1, **adapters: Path
) -> list[object]:
    wasm = folder / "guest.wasm"
    wasm.write_bytes(wat2wasm(wat))
    options: dict[str, Any] = {"cache": folder / "cache", "seed": seed, "engine": engine, "adapters": adapters}
    return list(run_local(wasm, data, model, **options))


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


# GENERATE, with the adapter that the input names behind the sampling.
WITH_ADAPTER = GENERATE.replace(
    '(import "realm" "seq_new"',
    '(import "realm" "lora_apply" (func $lora_apply (param i32 i32 i32) (result i32))) (import "realm" "seq_new"',
).replace(
    "(local.set $a (call $seq_new))",
    """(local.set $a (call $seq_new))
    (drop (call $input_read (i32.const 56) (i32.const 900) (i32.const 64)))
    (local.set $c (call $lora_apply (local.get $a) (i32.const 900) (i32.const 5)))
    (if (i32.lt_s (local.get $c) (i32.const 0)) (then (return (local.get $c))))""",
)


def test_a_local_run_may_have_adapters(tmp_path: Path, model: Path, engine: EngineCore) -> None:
    folders = {name: tmp_path / name for name in ("legal", "poets")}
    for seed, folder in enumerate(folders.values()):
        write_random_adapter(folder, engine.config, rank=4, seed=seed, scale=0.5)
    base = output(events(tmp_path, model, engine, GENERATE, sampling(1.0)))
    found = {}
    for name in folders:
        assert WITH_ADAPTER.count("lora_apply") == 3
        seen = events(tmp_path, model, engine, WITH_ADAPTER, sampling(1.0) + name.encode(), **folders)
        end = seen[-1]
        assert isinstance(end, RunFinished)
        assert (end.outcome, end.usage.new_tokens) == ("complete", 12)
        found[name] = output(seen)
        again = events(tmp_path, model, engine, WITH_ADAPTER, sampling(1.0) + name.encode(), **folders)
        assert output(again) == found[name]
    assert len({base, *found.values()}) == 3
    end = events(tmp_path, model, engine, WITH_ADAPTER, sampling(1.0) + b"other", **folders)[-1]
    assert isinstance(end, RunFinished)
    assert end.code == ErrorCode.NOT_FOUND
    engine.check()
    engine.close()


# Draws 12 tokens one after another, greedily; from the fifth on with the adapter, from the ninth on without it.
CHANGING = guest(
    """
    (local.set $a (call $seq_new))
    (i32.store (i32.const 512) (i32.const 5))
    (loop $again
      (if (i32.eq (local.get $b) (i32.const 4))
        (then (drop (call $lora_apply (local.get $a) (i32.const 900) (i32.const 5)))))
      (if (i32.eq (local.get $b) (i32.const 8))
        (then (drop (call $lora_apply (local.get $a) (i32.const 900) (i32.const 0)))))
      (i32.store (i32.const 512)
        (call $forward (local.get $a) (i32.const 512) (i32.const 1) (i32.const 600) (i32.const 0)))
      (drop (call $emit (i32.const 512) (i32.const 4)))
      (br_if $again (i32.lt_u (local.tee $b (i32.add (local.get $b) (i32.const 1))) (i32.const 12))))
    (i32.const 0)""",
    *("seq_new", "lora_apply", "forward", "emit"),
    extra='(data (i32.const 900) "legal")',
)
# Draws one token after all those of the input; the first byte of it says whether with the adapter.
AT_ONCE = guest(
    """
    (local.set $a (call $seq_new))
    (drop (call $input_read (i32.const 0) (i32.const 511) (i32.const 80)))
    (local.set $b (i32.div_u (call $input_len) (i32.const 4)))
    (drop (call $lora_apply (local.get $a) (i32.const 900) (i32.load8_u (i32.const 511))))
    (i32.store (i32.const 512)
      (call $forward (local.get $a) (i32.const 512) (local.get $b) (i32.const 600) (i32.const 0)))
    (drop (call $emit (i32.const 512) (i32.const 4)))
    (i32.const 0)""",
    *("seq_new", "lora_apply", "forward", "emit", "input_len", "input_read"),
    extra='(data (i32.const 900) "legal")',
)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_change_of_adapter_is_as_if_from_the_first_token(tmp_path: Path, model: Path, run_ahead: int) -> None:
    engine = load_engine(model, EngineOptions(dtype="float32", pages=16, token_budget=32, run_ahead=run_ahead))
    legal = tmp_path / "legal"
    write_random_adapter(legal, engine.config, rank=4, seed=1, scale=0.5)
    drawn = output(events(tmp_path, model, engine, CHANGING, b"", legal=legal))
    assert len(drawn) == 4 * 12
    tokens = (5).to_bytes(4, "little") + drawn

    def next_of(count: int, name: bytes) -> bytes:
        data = bytes([len(name)]) + tokens[: 4 * count]
        return output(events(tmp_path, model, engine, AT_ONCE, data, legal=legal))

    # The first and the last token of each part.
    different = 0
    for n in (0, 3, 4, 7, 8, 11):
        base, adapted = next_of(n + 1, b""), next_of(n + 1, b"legal")
        assert (adapted if 4 <= n < 8 else base) == drawn[4 * n : 4 * n + 4]
        different += base != adapted
    assert different > 3, "the adapter hardly changes anything: the test says nothing"
    engine.check()
    engine.close()


def test_a_bad_adapter_is_refused_before_the_guest_runs(tmp_path: Path, model: Path, engine: EngineCore) -> None:
    with pytest.raises(RealmError, match=r"none/adapter_config\.json: No such file.*; a PEFT folder has"):
        events(tmp_path, model, engine, GENERATE, sampling(), legal=tmp_path / "none")
    folder = tmp_path / "legal"
    write_random_adapter(folder, engine.config, rank=4, seed=1)
    (folder / TENSORS_FILE).write_bytes((folder / TENSORS_FILE).read_bytes()[:-1])
    with pytest.raises(RealmError, match="adapter_invalid: the adapter 'legal'"):
        events(tmp_path, model, engine, GENERATE, sampling(), legal=folder)
    write_random_adapter(folder, engine.config, rank=4, seed=1)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(RealmError) as caught:
        events(tmp_path, model, engine, GENERATE, sampling(), legal=folder)
    assert caught.value.details == {"field": "use_dora"}
    assert engine.adapters.find("local", "legal") is None
    engine.close()
