"""Every committed guest is what its source builds to, and asks for nothing but the ABI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wasmtime

from tests.unit.test_modules_abi import EXPECTED, ROOT, build, imported_types


def sections(wasm: bytes) -> list[tuple[int, bytes]]:
    """Each section's id and, for custom ones, its name."""
    found, at = [], 8
    while at < len(wasm):
        size, body = build._number(wasm, at + 1)
        length, name = build._number(wasm, body)
        found.append((wasm[at], wasm[name : name + length] if wasm[at] == 0 else b""))
        at = body + size
    return found


@pytest.mark.parametrize("guest", build.GUESTS, ids=lambda g: g.name)
def test_rebuilds_bit_by_bit(guest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another cache folder, so that nothing is compared with itself.
    monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(tmp_path / "cache"))
    fresh = tmp_path / f"{guest.name}.wasm"  # the name section holds the file's name
    build.build(guest, fresh)
    assert guest.path.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize("guest", build.GUESTS, ids=lambda g: g.name)
def test_imports_and_exports(guest: Any) -> None:
    imports = imported_types(guest.path)
    assert imports.items() <= EXPECTED.items()
    module = wasmtime.Module.from_file(wasmtime.Engine(), str(guest.path))
    assert {e.name for e in module.exports} == {"memory", "realm_abi_version", "run"}


@pytest.mark.parametrize("guest", build.GUESTS, ids=lambda g: g.name)
def test_names_are_kept_and_paths_are_not(guest: Any) -> None:
    wasm = guest.path.read_bytes()
    assert [name for kind, name in sections(wasm) if kind == 0] == [b"name"]
    assert str(ROOT).encode() not in wasm
    for path in (b"/home/", b"/root/", b"/usr/", b"site-packages", b".zig\0", b".c\0"):
        assert path not in wasm


@pytest.mark.parametrize("guest", build.GUESTS, ids=lambda g: g.name)
def test_has_a_page(guest: Any) -> None:
    page = (ROOT / guest.source).with_name("README.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {guest.name}\n")


def test_a_changed_module_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = build.Guest("chat", "guest_modules/chat/chat.c", str(tmp_path / "chat.wasm"))
    assert build.differing((guest,)) == ["chat"]
    (tmp_path / "chat.wasm").write_bytes(b"\0asm\1\0\0\0")
    assert build.differing((guest,)) == ["chat"]
    build.build(guest, guest.path)
    assert build.differing((guest,)) == []


def test_compiler_errors_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "wrong.c"
    source.write_text("int run(void) { return nothing; }\n")
    with pytest.raises(SystemExit, match="nothing"):
        build.compile_c(source, tmp_path / "wrong.wasm")
