"""Checking and compiling modules: what is refused, with which words, and what the cache keeps."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest
from wasmtime import wat2wasm

from realm.errors import RealmError
from realm.guests import compile_child, compiler
from realm.guests.bulk_memory import HELPER_PREFIX
from realm.guests.check import allowed_imports
from realm.guests.compiler import compile_module, compile_module_sync
from realm.guests.fibers import Engine
from tests.module_bytes import RETURN_0, body, module

VERSION = '(func (export "realm_abi_version") (result i32) (i32.const 1))'
RUN = '(func (export "run") (result i32) (i32.const 0))'
MEMORY = '(memory (export "memory") 1)'
VERSION_EXPORT = '(export "realm_abi_version")'
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
    assert error.details == {"name": "module_bytes", "limit": 50, "used": len(wat2wasm(GOOD))}


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
        (f'(module (global (export "memory") i32 (i32.const 0)) {VERSION} {RUN})', ["memory"]),
        (f'(module (table (export "memory") 1 funcref) (memory 1) {VERSION} {RUN})', ["memory"]),
        (f'(module (memory (export "Memory") 1) {VERSION} {RUN})', ["memory"]),
        (f'(module {MEMORY} {VERSION} (func (export "run") (param i32) (result i32) (i32.const 0)))', ["run"]),
        (f'(module {MEMORY} {VERSION} (func (export "run") (result i64) (i64.const 0)))', ["run"]),
        (f'(module {MEMORY} {VERSION} (func (export "run") (result i32 i32) (i32.const 0) (i32.const 0)))', ["run"]),
        (f'(module {MEMORY} (global (export "realm_abi_version") i32 (i32.const 1)) {RUN})', ["realm_abi_version"]),
        (
            f'(module {MEMORY} (func (export "realm_abi_version") (result f32) (f32.const 1)) {RUN})',
            ["realm_abi_version"],
        ),
        (f'(module {MEMORY} {VERSION} {RUN} (table (export "_initialize") 1 funcref))', ["_initialize"]),
        ("(module)", ["realm_abi_version", "run", "memory"]),
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


def test_a_wasi_command_is_told_what_to_be(tmp_path: Path) -> None:
    error = refusal(tmp_path, f'(module {MEMORY} {VERSION} (func (export "_start")))')
    assert error.code == "module_export_missing"
    assert error.details["missing"] == ["run"]
    assert "reactor" in error.message


def test_a_64_bit_memory_has_64_bit_pointers(tmp_path: Path) -> None:
    memory = '(memory (export "memory") i64 1)'
    emit = '(import "realm" "emit" (func (param i64 i64) (result i32)))'
    compiled = compile_module_sync(write(tmp_path, f"(module {emit} {memory} {VERSION} {RUN})"), tmp_path / "wide")
    assert compiled.imports == ["realm.emit"]
    narrow = refusal(tmp_path, f"(module {emit.replace('i64', 'i32')} {memory} {VERSION} {RUN})")
    assert "(i64, i64) -> i32" in narrow.message
    wide = refusal(tmp_path, f"(module {emit} {MEMORY} {VERSION} {RUN})")
    assert "(i32, i32) -> i32" in wide.message
    wasi = '(import "wasi_snapshot_preview1" "proc_exit" (func (param i32)))'
    assert refusal(tmp_path, f"(module {wasi} {memory} {VERSION} {RUN})").code == "module_import_unknown"


@pytest.mark.parametrize(
    "what",
    [
        '"memory" (memory 1)',
        '"table" (table 1 funcref)',
        '"global" (global i32)',
        '"emit" (memory 1)',
        '"emit" (table 1 funcref)',
        '"emit" (global i32)',
        '"" (func)',
        '"run" (func (result i32))',
    ],
)
def test_only_functions_of_ours_can_be_imported(tmp_path: Path, what: str) -> None:
    memory = "" if "(memory" in what else MEMORY
    error = refusal(tmp_path, f'(module (import "realm" {what}) {memory} {VERSION} {RUN})')
    assert error.code == "module_import_unknown"
    assert error.details["unknown"] == ["realm." + what.split('"')[1]]


def test_everything_may_be_imported_and_twice(tmp_path: Path) -> None:
    lines = []
    for (module_name, name), (parameters, results) in allowed_imports().items():
        types = f"(param {' '.join(parameters)}) (result {' '.join(results)})"
        lines.append(f'(import "{module_name}" "{name}" (func {types}))')
    text = f"(module {' '.join(lines * 2)} {MEMORY} {VERSION} {RUN})"
    compiled = compile_module_sync(write(tmp_path, text), tmp_path / "cache")
    assert len(compiled.imports) == len(set(compiled.imports)) == len(allowed_imports())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("(loop $l (br $l)) (i32.const 1)", "fuel"),
        ("(unreachable)", "unreachable"),
        ("(call $self)", "stack"),
        ("(i32.load (i32.const -1))", "out of bounds"),
        ("(i32.div_s (i32.const 1) (i32.const 0))", "divide by zero"),
        # Every page of the most memory there is, again and again.
        (
            """(drop (memory.grow (i32.const 8191)))
            (loop $l (memory.fill (i32.const 0) (i32.const 1) (i32.const 0x1fff0000)) (br $l)) (i32.const 1)""",
            "fuel",
        ),
    ],
)
@pytest.mark.parametrize("where", ["version", "start"])
def test_a_hostile_version_or_start_function_is_cut(tmp_path: Path, body: str, says: str, where: str) -> None:
    hostile = f"(func $self {{}} (result i32) {body})"
    if where == "version":
        text = f"(module {MEMORY} {RUN} {hostile.replace('{}', VERSION_EXPORT)})"
    else:
        start = "(func $start (drop (call $self))) (start $start)"
        text = f"(module {MEMORY} {RUN} {VERSION} {hostile.replace('{}', '')} {start})"
    error = refusal(tmp_path, text)
    assert error.code == "module_invalid"
    assert says in error.message


# --- the child ------------------------------------------------------------------------------------


def test_too_slow(tmp_path: Path) -> None:
    error = refusal(tmp_path, GOOD, seconds=0.01)
    assert error.code == "compile_limit"
    with pytest.raises(RealmError, match="compile_limit"):
        asyncio.run(compile_module(write(tmp_path, GOOD), tmp_path / "cache", seconds=0.01))
    assert not list((tmp_path / "cache").iterdir())


def test_a_module_that_compiles_for_a_minute_is_given_up(tmp_path: Path) -> None:
    loops = body(b"\x03\x40" * 9_000 + b"\x0b" * 9_000 + RETURN_0)
    error = refusal(tmp_path, module(bodies=[loops] * 50), seconds=3)
    assert error.code == "compile_limit"
    # By the clock, or by the processor time that two threads have in that time.
    assert "longer than 3 seconds" in error.message or "signal 9" in error.message or "signal 24" in error.message


def test_a_module_that_needs_too_much_memory_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMPILE_MEMORY", 300 << 20)
    calls = body(b"\x10\0\x1a" * 300_000 + RETURN_0)
    error = refusal(tmp_path, module(bodies=[calls] * 4))
    assert error.code == "compile_limit"
    assert "300 MiB" in error.message and error.details["memory_bytes"] == 300 << 20


def _child_runs(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let the next children run a program of ours with the arguments and the environment of a real one."""
    command = compiler._command

    def other(*arguments: object) -> tuple[list[str], dict[str, str]]:
        words, environment = command(*arguments)  # type: ignore[arg-type]
        return [words[0], "-c", program, *words[4:]], environment

    monkeypatch.setattr(compiler, "_command", other)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
        ("import os; os.abort()", "signal 6"),
        ("import os; os.kill(os.getpid(), 31)", "by the sandbox"),
        ("raise SystemExit(3)", "status 3"),
        ("1 / 0", "status 1"),
        ("pass", "status 0"),
        ("print('[]')", "status 0"),
        ("print('{}')", "status 0"),
        ('print(\'{"error": {"code": 1}}\')', "status 0"),
        ("print('[' * 100_000)", "status 0"),
        ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "signal 9"),
        ("import sys\nfor _ in range(1 << 14): sys.stderr.write('x' * 65536)", "status 0"),
    ],
)
def test_a_child_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, says: str) -> None:
    _child_runs(monkeypatch, program)
    error = refusal(tmp_path, GOOD)
    assert error.code == "compile_limit"
    assert says in error.message


def test_what_a_child_complains_of_is_logged_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _child_runs(monkeypatch, "import sys; sys.stderr.write('x' * 1_000_000 + 'the end'); sys.exit(1)")
    refusal(tmp_path, GOOD)
    (record,) = caplog.records
    assert record.message.endswith("xthe end") and len(record.message) < 5000


def test_nothing_of_the_hosts_environment_reaches_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALM_SECRET", "x")
    seen = tmp_path / "seen.json"
    _child_runs(
        monkeypatch,
        f"import json, os; fds = os.listdir('/proc/self/fd'); "
        f"json.dump([dict(os.environ), len(fds)], open({str(seen)!r}, 'w'))",
    )
    with (tmp_path / "inherited").open("wb"):
        refusal(tmp_path, GOOD)
    environment, descriptors = json.loads(seen.read_bytes())
    assert set(environment) - {"LC_CTYPE"} == {
        "PYTHONPATH",
        "PYTHONDONTWRITEBYTECODE",
        "RAYON_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "LC_ALL",
    }
    # The standard streams, and the one that lists them.
    assert descriptors == 4


def test_the_child_limits_and_contains_itself_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own entry, with a compiler that says what it finds instead."""
    program = """
import json, os, resource, socket, sys
from pathlib import Path
from realm.errors import RealmError
from realm.guests import compile_child
enter, found = compile_child.sandbox.enter, {}
def entering(profile):
    found.update(nice=os.nice(0))
    contained = enter(profile)
    found.update(profile=profile.name, seccomp=contained.seccomp, landlock=contained.landlock)
def report(engine, data, max_bytes):
    found.update(bytes=len(data))
    for name in ("DATA", "CPU", "CORE", "FSIZE"):
        found[name] = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[0]
    for name, act in {"write": lambda: open(sys.argv[3], "r+b"), "socket": socket.socket}.items():
        try:
            act()
            found[name] = True
        except OSError:
            found[name] = False
    raise RealmError("module_invalid", "seen", details=found)
compile_child.compile_bytes, compile_child.sandbox.enter = report, entering
sys.exit(compile_child.main(sys.argv[1:]))
"""
    _child_runs(monkeypatch, program)
    found = refusal(tmp_path, GOOD, seconds=20).details
    assert found["bytes"] == len(wat2wasm(GOOD)) and found["nice"] >= 10
    assert (found["DATA"], found["CPU"], found["CORE"]) == (compiler.COMPILE_MEMORY, 40, 0)
    assert found["FSIZE"] == compile_child.ARTIFACT_BYTES
    # What the platform lacks is said by `realm doctor`; the rest is in force.
    assert found["profile"] == "compiler"
    assert found["socket"] == (not found["seccomp"])
    assert found["write"] == (not found["seccomp"] and not found["landlock"])


def test_a_module_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wasm = write(tmp_path, GOOD)
    prepare = compiler._prepare

    def swapped(*arguments: object) -> object:
        result = prepare(*arguments)  # type: ignore[arg-type]
        wasm.write_bytes(wasm.read_bytes() + b"\0\2\1a")
        return result

    monkeypatch.setattr(compiler, "_prepare", swapped)
    with pytest.raises(RealmError, match="changed while it was being read"):
        compile_module_sync(wasm, tmp_path / "cache")


def test_compiling_in_this_process_is_the_same() -> None:
    artifact, imports = compiler.compile_bytes(Engine(), wat2wasm(GOOD))
    assert artifact[:4] == b"\x7fELF" and imports == []
    with pytest.raises(RealmError, match="module_too_large"):
        compiler.compile_bytes(Engine(), wat2wasm(GOOD), 10)
    with pytest.raises(RealmError, match="precompiled"):
        compiler.compile_bytes(Engine(), artifact)


def test_a_guest_with_large_fills_runs_rewritten(tmp_path: Path) -> None:
    fill = "(memory.fill (i32.const 0) (i32.const 1) (i32.const 0x10000))"
    text = GOOD.replace("(i32.const 0))", f"(loop $l {fill}) (i32.const 0))", 1)
    small = compile_module_sync(write(tmp_path, text), tmp_path / "cache").artifact.read_bytes()
    large_text = text.replace("0x10000", "0x10001")
    large = compile_module_sync(write(tmp_path, large_text), tmp_path / "cache").artifact.read_bytes()
    assert HELPER_PREFIX not in small and HELPER_PREFIX in large


def test_a_cancelled_compilation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pid")
    _child_runs(
        monkeypatch, f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )

    async def cancel() -> None:
        task = asyncio.create_task(compile_module(write(tmp_path, GOOD), tmp_path / "cache"))
        # Opening a pipe waits for the child to open its end.
        pid = await asyncio.to_thread((tmp_path / "pid").read_text)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)

    asyncio.run(cancel())
    assert not list((tmp_path / "cache").iterdir())
