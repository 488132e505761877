"""The generated ABI files are up to date and say what the tables say, also to compilers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import wasmtime

from realm.guests import abi

ROOT = Path(__file__).parents[2]


def load_script(path: Path) -> ModuleType:
    """Import a script that belongs to no package."""
    name = f"guest_modules_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


generate = load_script(ROOT / "guest_modules/abi/generate.py")
build = load_script(ROOT / "guest_modules/build.py")


def imported_types(wasm: Path) -> dict[str, tuple[list[str], list[str]]]:
    """WASM parameter and result types of each function that a module imports from Realm."""
    module = wasmtime.Module.from_file(wasmtime.Engine(), str(wasm))
    found = {}
    for item in module.imports:
        assert item.module == abi.IMPORT_MODULE and item.name is not None
        assert isinstance(item.type, wasmtime.FuncType)
        found[item.name] = ([str(t) for t in item.type.params], [str(t) for t in item.type.results])
    return found


EXPECTED = {f.name: ([str(t) for t in abi.wasm_parameters(f)], [str(f.result)]) for f in abi.FUNCTIONS}


def test_committed_files_are_fresh() -> None:
    assert generate.stale() == []


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    for name, make in generate.OUTPUTS.items():
        (tmp_path / name).write_text(make(), encoding="utf-8")
    assert generate.stale(tmp_path) == []
    (tmp_path / "realm.zig").write_text("", encoding="utf-8")
    (tmp_path / "realm.h").unlink()
    assert generate.stale(tmp_path) == ["realm.h", "realm.zig"]


def test_c_declarations_have_the_tables_types(tmp_path: Path) -> None:
    """A guest that takes every function's address imports all of them, each with the right type."""
    addresses = ", ".join(f"(void *)realm_{f.name}" for f in abi.FUNCTIONS)
    source = tmp_path / "all.c"
    source.write_text(
        '#include "realm.h"\nREALM_GUEST\n'
        f"void *const volatile all[] = {{{addresses}}};\n"
        "REALM_EXPORT(run) int32_t run(void) { return all[0] != 0; }\n"
    )
    build.compile_c(source, tmp_path / "all.wasm")
    assert imported_types(tmp_path / "all.wasm") == EXPECTED


def test_zig_declarations_have_the_tables_types(tmp_path: Path) -> None:
    uses = "\n".join(f"    all[{i}] = @intFromPtr(&realm.{f.name});" for i, f in enumerate(abi.FUNCTIONS))
    source = tmp_path / "all.zig"
    source.write_text(
        'const realm = @import("realm");\n'
        f"var all: [{len(abi.FUNCTIONS)}]usize = undefined;\n"
        "export fn realm_abi_version() i32 {\n    return realm.abi_version;\n}\n"
        f"export fn run() i32 {{\n{uses}\n    return @intCast(@as(*volatile usize, &all[3]).*);\n}}\n"
    )
    build.compile_zig(source, tmp_path / "all.wasm")
    assert imported_types(tmp_path / "all.wasm") == EXPECTED


def test_c_constants_and_greedy(tmp_path: Path) -> None:
    """Codes and constants as a compiler sees them; REALM_GREEDY draws nothing and changes nothing."""
    checks = [f"REALM_{c.name} == {c.value}" for c in abi.ErrorCode]
    checks += [f"REALM_{name} == {value}" for name, (value, _) in abi.CONSTANTS.items()]
    asserts = "\n".join(f'_Static_assert({check}, "{check}");' for check in checks)
    source = tmp_path / "constants.c"
    source.write_text(
        f'#include "realm.h"\nREALM_GUEST\n{asserts}\n'
        "static struct realm_sampling greedy = REALM_GREEDY;\n"
        "REALM_EXPORT(run) int32_t run(void) {\n"
        "    return greedy.temperature == 0 && greedy.top_p == 1 && greedy.min_p == 0 &&\n"
        "           greedy.repetition_penalty == 1 && !greedy.top_k && !greedy.mask && !greedy.bias;\n}\n"
    )
    build.compile_c(source, tmp_path / "constants.wasm")
    store = wasmtime.Store()
    module = wasmtime.Module.from_file(store.engine, str(tmp_path / "constants.wasm"))
    run = wasmtime.Instance(store, module, []).exports(store)["run"]
    assert isinstance(run, wasmtime.Func)
    assert run(store) == 1


def test_reference_page_names_everything() -> None:
    page = (ROOT / "guest_modules/abi/realm_abi.md").read_text(encoding="utf-8")
    for function in abi.FUNCTIONS:
        assert f"### {function.name}\n" in page
    for struct in abi.STRUCTS:
        assert f"### struct {struct.name}\n" in page
    for code in abi.ErrorCode:
        assert f"| `REALM_{code.name}` | {code.value} |" in page


@pytest.mark.parametrize("function", abi.FUNCTIONS, ids=lambda f: f.name)
def test_buffer_lengths_of_one_function_have_different_names(function: abi.Function) -> None:
    names = list(generate._count_names(function).values()) + [p.name for p in function.parameters]
    assert len(names) == len(set(names))
