"""The folder of compiled modules: whatever happens to it, only what our own compiler wrote is taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from realm.errors import RealmError
from realm.guests import artifact_cache, compiler
from realm.guests.compiler import CompiledModule, compile_module_sync
from tests.unit.test_guest_compiler import GOOD, write


def _swap(compiled: CompiledModule, folder: Path) -> None:
    """Both files of another module under this one's names."""
    other = compile_module_sync(write(folder, GOOD.replace("(i32.const 0)", "(i32.const 7)")), folder / "cache")
    compiled.artifact.write_bytes(other.artifact.read_bytes())
    compiled.artifact.with_suffix(".json").write_bytes(other.artifact.with_suffix(".json").read_bytes())


def _link(path: Path, folder: Path, hard: bool) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.hardlink_to(elsewhere) if hard else path.symlink_to(elsewhere)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_bytes(b"x")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _change_facts(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


DAMAGE: dict[str, Callable[[Path, Path, CompiledModule, Path], object]] = {
    "artifact cut": lambda a, f, c, d: a.write_bytes(a.read_bytes()[:-100]),
    "artifact emptied": lambda a, f, c, d: a.write_bytes(b""),
    "artifact gone": lambda a, f, c, d: a.unlink(),
    "artifact with one bit changed": lambda a, f, c, d: a.write_bytes(_flipped(a.read_bytes())),
    "artifact a symbolic link": lambda a, f, c, d: _link(a, d, False),
    "artifact a hard link": lambda a, f, c, d: _link(a, d, True),
    "artifact a folder": lambda a, f, c, d: _directory(a),
    "artifact a pipe": lambda a, f, c, d: _pipe(a),
    "artifact writable by others": lambda a, f, c, d: a.chmod(0o666),
    "facts cut": lambda a, f, c, d: f.write_text("{"),
    "facts emptied": lambda a, f, c, d: f.write_bytes(b""),
    "facts gone": lambda a, f, c, d: f.unlink(),
    "facts of another type": lambda a, f, c, d: f.write_text("[1, 2]"),
    "facts too large": lambda a, f, c, d: f.write_text(f.read_text() + " " * (2 << 20) + "x"),
    "facts nested": lambda a, f, c, d: f.write_text("[" * 100_000),
    "facts a symbolic link": lambda a, f, c, d: _link(f, d, False),
    "facts a hard link": lambda a, f, c, d: _link(f, d, True),
    "facts a folder": lambda a, f, c, d: _directory(f),
    "facts a pipe": lambda a, f, c, d: _pipe(f),
    "facts writable by others": lambda a, f, c, d: f.chmod(0o622),
    "another hash": lambda a, f, c, d: _change_facts(f, artifact_sha256="0" * 64),
    "another key": lambda a, f, c, d: _change_facts(f, key="0" * 64),
    "wrong imports": lambda a, f, c, d: _change_facts(f, imports=[1]),
    "both of another module": lambda a, f, c, d: _swap(c, d),
}


def _flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one good entry, to be copied."""
    folder = tmp_path_factory.mktemp("compiled")
    return compile_module_sync(write(folder, GOOD), folder / "cache").artifact.parent


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(tmp_path: Path, compiled_once: Path, damage: str) -> None:
    wasm = write(tmp_path, GOOD)
    data = wasm.read_bytes()
    shutil.copytree(compiled_once, tmp_path / "cache")
    compiled = compile_module_sync(wasm, tmp_path / "cache")
    good = compiled.artifact.read_bytes()
    facts = compiled.artifact.with_suffix(".json")
    DAMAGE[damage](compiled.artifact, facts, compiled, tmp_path)
    wasm.write_bytes(data)
    _, found = compiler._prepare(wasm, tmp_path / "cache", 1000)
    assert found is None, "a damaged entry was taken"
    again = compile_module_sync(wasm, tmp_path / "cache")
    assert again == compiled
    assert again.artifact.read_bytes() == good
    assert not again.artifact.is_symlink() and again.artifact.stat().st_nlink == 1
    assert again.artifact_sha256 == hashlib.sha256(good).hexdigest()
    assert json.loads(facts.read_bytes())["imports"] == []
    assert compiler._prepare(wasm, tmp_path / "cache", 1000)[1] == again


def test_the_key_covers_all_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {artifact_cache.cache_key("a"), artifact_cache.cache_key("b")}
    for name, value in {"_FORMAT": 99, "REWRITER_VERSION": 99, "settings_fingerprint": lambda: "other"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(artifact_cache, name, value)
            keys.add(artifact_cache.cache_key("a"))
    with monkeypatch.context() as patch:
        patch.setattr(artifact_cache.abi, "ABI_VERSION", 99)
        keys.add(artifact_cache.cache_key("a"))
    assert len(keys) == 6


def test_a_folder_open_to_others_is_closed(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    compile_module_sync(write(tmp_path, GOOD), cache)
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_cache.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RealmError, match="belongs to another user") as caught:
        compile_module_sync(write(tmp_path, GOOD), tmp_path / "cache")
    assert caught.value.code == "internal"


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(RealmError, match="cannot be used") as caught:
        compile_module_sync(write(tmp_path, GOOD), tmp_path / "cache")
    assert caught.value.code == "internal"


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_folder_that_vanishes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    cache = tmp_path / "cache"
    times: list[None] = []

    def vanishing(function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any) -> Any:
            result = function(*arguments)
            if not times:
                times.append(None)
                shutil.rmtree(cache)
            return result

        return inner

    name = "_prepare" if when == "before" else "_command"
    monkeypatch.setattr(compiler, name, vanishing(getattr(compiler, name)))
    compiled = compile_module_sync(write(tmp_path, GOOD), cache)
    assert times and compiled.artifact.exists()
    assert len(list(cache.iterdir())) == 2


def test_what_killed_compilations_leave_is_swept(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    compile_module_sync(write(tmp_path, GOOD), cache)
    old, new, other = cache / ".new-old", cache / ".new-new", cache / "README"
    for path in (old, new, other):
        path.write_bytes(b"x")
    past = time.time() - artifact_cache.ABANDONED_SECONDS - 10
    for path in (old, other):
        os.utime(path, (past, past))
    compile_module_sync(write(tmp_path, GOOD.replace("(i32.const 0)", "(i32.const 7)")), cache)
    assert not old.exists() and new.exists() and other.exists()
    assert len(list(cache.glob("*.cwasm"))) == 2


def test_the_cache_keeps_to_its_size(tmp_path: Path) -> None:
    cache = artifact_cache.ArtifactCache(tmp_path / "cache", max_bytes=3000)
    entries = [cache.entry(str(number)) for number in range(5)]
    for at, entry in enumerate(entries):
        output = cache.temporary()
        output.write_bytes(bytes(1000))
        cache.install(entry, output, artifact_cache.Facts(entry.key, hashlib.sha256(bytes(1000)).hexdigest(), []))
        for path in (entry.artifact, entry.facts):
            os.utime(path, (1000 + at, 1000 + at))
    # Used again, so not the oldest any more.
    assert cache.find(entries[0]) is not None
    cache.sweep(keep=entries[1])
    assert [entry.artifact.exists() for entry in entries] == [True, True, False, False, True]
    assert [entry.facts.exists() for entry in entries] == [True, True, False, False, True]


def test_an_artifact_marked_as_used_is_kept(tmp_path: Path) -> None:
    cache = artifact_cache.ArtifactCache(tmp_path / "cache", max_bytes=1000)
    entries = [cache.entry(str(number)) for number in range(2)]
    for at, entry in enumerate(entries):
        output = cache.temporary()
        output.write_bytes(bytes(1000))
        cache.install(entry, output, artifact_cache.Facts(entry.key, "0" * 64, []))
        for path in (entry.artifact, entry.facts):
            os.utime(path, (1000 + at, 1000 + at))
    os.utime(entries[0].artifact, (2000, 2000))
    cache.sweep()
    assert [entry.artifact.exists() for entry in entries] == [True, False]
