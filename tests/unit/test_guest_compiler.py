"""Checking and compiling modules: what is refused, with which words, and what the cache keeps."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from wasmtime import wat2wasm

from realm.errors import RealmError
from realm.guests import compiler
from realm.guests.check import allowed_imports
from realm.guests.compiler import compile_module, compile_module_sync

VERSION = '(func (export "realm_abi_version") (result i32) (i32.const 1))'
RUN = '(func (export "run") (result i32) (i32.const 0))'
MEMORY = '(memory (export "memory") 1)'
GOOD = f"(module {MEMORY} {VERSION} {RUN})"


def write(folder: Path, module: str | bytes) -> Path:
    path = folder / "guest.wasm"
    path.write_bytes(module if isinstance(module, bytes) else wat2wasm(module))
    return path


def refusal(folder: Path, module: str | bytes, **options: float) -> RealmError:
    with pytest.raises(RealmError) as caught:
        compile_module_sync(write(folder, module), folder / "cache", **options)  # type: ignore[arg-type]
    cache = folder / "cache"
    assert not list(cache.iterdir()) if cache.exists() else True
    return caught.value


def test_a_good_module_is_compiled_once(tmp_path: Path) -> None:
    wasm = write(
        tmp_path,
        f"""(module (import "realm" "now" (func (result i64)))
        (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))) {MEMORY} {VERSION} {RUN})""",
    )
    first = asyncio.run(compile_module(wasm, tmp_path / "cache"))
    assert first.imports == ["realm.now", "wasi_snapshot_preview1.proc_exit"]
    assert first.size == wasm.stat().st_size
    stamp = first.artifact.stat().st_mtime_ns
    again = compile_module_sync(wasm, tmp_path / "cache")
    assert again == first
    assert again.artifact.stat().st_mtime_ns == stamp
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "does not begin"),
        (b"\x7fELF" + bytes(100), "precompiled"),
        (b"\0asm\x0d\0\1\0", "component"),
        (b"\0asm\2\0\0\0", "version of WebAssembly"),
        (b"(module)", "wat2wasm"),
        (b"\0asm\1\0\0\0\xff\xff\xff\xff\xff", "not valid WebAssembly"),
        (b"\0asm\1\0\0\0" + bytes(50), "not valid WebAssembly"),
    ],
)
def test_what_is_no_module(tmp_path: Path, data: bytes, says: str) -> None:
    error = refusal(tmp_path, data)
    assert error.code == "module_invalid"
    assert says in error.message


@pytest.mark.parametrize(
    ("wat", "says"),
    [
        ('(module (memory (export "memory") 1 1 shared))', "threads"),
        ('(module (memory (export "memory") i64 1))', "memory64"),
        ("(module (memory 1) (memory 1))", "multi"),
        ("(module (tag))", "exceptions"),
        ("(module (type (struct)))", "gc"),
    ],
)
def test_features_that_are_off(tmp_path: Path, wat: str, says: str) -> None:
    error = refusal(tmp_path, wat)
    assert error.code == "module_invalid"
    assert says in error.message


def test_too_large(tmp_path: Path) -> None:
    error = refusal(tmp_path, GOOD, max_bytes=50)
    assert error.code == "module_too_large"
    assert error.details == {"limit": 50, "used": len(wat2wasm(GOOD))}


def test_unknown_imports_are_refused_with_what_there_is(tmp_path: Path) -> None:
    error = refusal(
        tmp_path,
        f"""(module (import "env" "f" (func)) (import "realm" "forwrd" (func))
        (import "realm" "emit" (func (param i64) (result i32))) (import "realm" "now" (global i64))
        {MEMORY} {VERSION} {RUN})""",
    )
    assert error.code == "module_import_unknown"
    assert error.details["unknown"] == ["env.f", "realm.forwrd", "realm.emit", "realm.now"]
    assert "did you mean forward?" in error.message
    assert "(i32, i32) -> i32" in error.message
    assert len(error.details["allowed"]) == len(allowed_imports())


@pytest.mark.parametrize(
    ("wat", "missing"),
    [
        (f"(module {VERSION} {RUN})", ["memory"]),
        (f"(module {MEMORY} {RUN})", ["realm_abi_version"]),
        (f"(module {MEMORY} {VERSION})", ["run"]),
        (f'(module {MEMORY} {VERSION} (func (export "run")))', ["run"]),
        (f'(module {MEMORY} {VERSION} (global (export "run") i32 (i32.const 1)))', ["run"]),
        (f'(module {MEMORY} {VERSION} {RUN} (func (export "_initialize") (param i32)))', ["_initialize"]),
        (f'(module (func (export "memory")) {VERSION} {RUN})', ["memory"]),
    ],
)
def test_missing_exports(tmp_path: Path, wat: str, missing: list[str]) -> None:
    error = refusal(tmp_path, wat)
    assert error.code == "module_export_missing"
    assert error.details["missing"] == missing


def test_the_abi_version_is_asked_with_little_fuel_and_no_host(tmp_path: Path) -> None:
    error = refusal(tmp_path, GOOD.replace("(i32.const 1))", "(i32.const 2))", 1))
    assert error.code == "module_abi_version"
    assert error.details == {"version": 2, "supported": [1]}
    spin = refusal(tmp_path, f"(module {MEMORY} {VERSION} {RUN} (func $s (loop $l (br $l))) (start $s))")
    assert spin.code == "module_invalid"
    assert "fuel" in spin.message
    asks = refusal(
        tmp_path,
        f"""(module (import "realm" "seq_new" (func $n (result i32))) {MEMORY} {RUN}
        (func (export "realm_abi_version") (result i32) (call $n)))""",
    )
    assert asks.code == "module_invalid"


def test_too_slow(tmp_path: Path) -> None:
    error = refusal(tmp_path, GOOD, seconds=0.01)
    assert error.code == "compile_limit"
    with pytest.raises(RealmError, match="compile_limit"):
        asyncio.run(compile_module(write(tmp_path, GOOD), tmp_path / "cache", seconds=0.01))
    assert not list((tmp_path / "cache").iterdir())


def test_a_child_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = compiler._command

    def killed(*arguments: object) -> tuple[list[str], dict[str, str]]:
        words, environment = command(*arguments)  # type: ignore[arg-type]
        return [words[0], "-c", "import os; os.kill(os.getpid(), 9)"], environment

    monkeypatch.setattr(compiler, "_command", killed)
    error = refusal(tmp_path, GOOD)
    assert error.code == "compile_limit"
    assert "signal 9" in error.message


def test_nothing_of_the_hosts_environment_reaches_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALM_SECRET", "x")
    job, _ = compiler._prepare(write(tmp_path, GOOD), tmp_path / "cache", 1000)
    _, environment = compiler._command(job, tmp_path / "out", 1000)
    assert set(environment) == {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "RAYON_NUM_THREADS", "LC_ALL"}


@pytest.mark.parametrize("damage", ["artifact", "facts", "swapped"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    wasm = write(tmp_path, GOOD)
    compiled = compile_module_sync(wasm, tmp_path / "cache")
    good = compiled.artifact.read_bytes()
    facts = compiled.artifact.with_suffix(".json")
    if damage == "artifact":
        compiled.artifact.write_bytes(good[:-100])
    elif damage == "facts":
        facts.write_text("{")
    else:
        facts.write_text(json.dumps({"artifact_sha256": "0" * 64, "imports": []}))
    again = compile_module_sync(wasm, tmp_path / "cache")
    assert again.artifact.read_bytes() == good
    assert json.loads(facts.read_bytes())["imports"] == []
