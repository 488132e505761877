"""What a guest module must be: sizes, imports, exports, ABI version.

:func:`check_bytes` looks at the first bytes only and may run anywhere. The rest takes the module
apart with Wasmtime and runs a bit of it, so it belongs in the compiler's child process.
"""

from __future__ import annotations

import difflib
from typing import Any

import wasmtime

from realm.errors import RealmError
from realm.guests import abi, wasi
from realm.guests.fibers import Engine
from realm.guests.instructions import over
from realm.guests.module_limits import ModuleLimits

MAX_MODULE_BYTES = ModuleLimits().module_bytes
MAX_START_MEMORY = ModuleLimits().memory_bytes
"""Most memory in bytes that a module may have while its version is read."""
VERSION_FUEL = 50_000_000
"""Fuel for setting up the memory (a unit a byte), the start function and ``realm_abi_version``: some 15 ms.
A fill of memory costs a unit a byte as well, so it bounds what a start function touches."""
MAX_START_TABLE = ModuleLimits().table_elements
"""Most elements of a table while the version is read."""

_CORE = b"\0asm\1\0\0\0"
_COMPONENT = b"\0asm\x0d\0\1\0"


def check_bytes(head: bytes, size: int, limit: int = MAX_MODULE_BYTES) -> None:
    """Refuse what is not a core WASM module by its size and first bytes.

    Raises:
        RealmError: ``module_too_large`` or ``module_invalid``.
    """
    if size > limit:
        raise over("module_bytes", limit, size, "bytes", "module_too_large")
    if head.startswith(_CORE):
        return
    if head.startswith(_COMPONENT):
        problem = "it is a component; Realm takes core modules (build without componentizing)"
    elif head.startswith(b"\x7fELF"):
        problem = "it is native code; precompiled modules are not taken, send the .wasm"
    elif head.lstrip().startswith(b"(module"):
        problem = "it is WebAssembly text; convert it first (wat2wasm)"
    elif head.startswith(b"\0asm"):
        problem = "its version of WebAssembly is unknown"
    else:
        problem = "it does not begin as a WebAssembly module does"
    raise RealmError("module_invalid", f"the file is no module that Realm can run: {problem}")


def _signature(kind: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(str(p) for p in kind.params), tuple(str(r) for r in kind.results)


def _text(signature: tuple[tuple[str, ...], tuple[str, ...]]) -> str:
    return f"({', '.join(signature[0])}) -> {', '.join(signature[1]) or 'nothing'}"


def allowed_imports(wide: bool = False) -> dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]]:
    """(module, name) -> (parameter types, result types) of everything a guest may import.

    ``wide`` is for guests with a 64-bit memory. WASI preview 1 has no functions for those.
    """
    allowed: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
        (abi.IMPORT_MODULE, f.name): (tuple(abi.wasm_parameters(f, wide)), (f.result,)) for f in abi.FUNCTIONS
    }
    if wide:
        return allowed
    for name in wasi.SIGNATURES:
        result = wasi.result(name)
        types = tuple("i64" if kind == "u64" else "i32" for kind in wasi.parameters(name))
        allowed[(wasi.IMPORT_MODULE, name)] = (types, () if result is None else (result,))
    return allowed


def _is_wide(module: wasmtime.Module) -> bool:
    return any(isinstance(item.type, wasmtime.MemoryType) and item.type.is_64 for item in module.exports)


def check_imports(module: wasmtime.Module) -> list[str]:
    """The names of the module's imports, each ``module.name`` and once.

    Raises:
        RealmError: ``module_import_unknown`` with the list of what may be imported.
    """
    allowed = allowed_imports(_is_wide(module))
    names: list[str] = []
    unknown: list[str] = []
    problems: list[str] = []
    for item in module.imports:
        name = f"{item.module}.{item.name}"[:200]
        names.append(name)
        wanted = allowed.get((item.module, item.name or ""))
        if wanted is None:
            unknown.append(name)
            near = difflib.get_close_matches(item.name or "", [n for _, n in allowed], n=1)
            problems.append(f"{name} is unknown" + (f" (did you mean {near[0]}?)" if near else ""))
        elif not isinstance(item.type, wasmtime.FuncType):
            unknown.append(name)
            problems.append(f"{name} must be imported as a function")
        elif _signature(item.type) != wanted:
            unknown.append(name)
            problems.append(f"{name} has type {_text(_signature(item.type))}; it must be {_text(wanted)}")
    if unknown:
        raise RealmError(
            "module_import_unknown",
            f"the module imports what Realm does not offer: {'; '.join(problems[:10])}",
            details={"unknown": unknown[:100], "allowed": sorted(f"{m}.{n}" for m, n in allowed)},
        )
    # One function may be imported many times.
    return list(dict.fromkeys(names))


_EXPORTS = {"realm_abi_version": ((), ("i32",)), "run": ((), ("i32",))}
_OPTIONAL_EXPORTS = {"_initialize": ((), ())}


def check_exports(module: wasmtime.Module) -> None:
    """Raises RealmError ``module_export_missing`` naming each export that lacks or has a wrong type."""
    found = {item.name: item.type for item in module.exports}
    missing: list[str] = []
    problems: list[str] = []
    for name, wanted in {**_EXPORTS, **_OPTIONAL_EXPORTS}.items():
        kind = found.get(name)
        if kind is None:
            if name in _EXPORTS:
                missing.append(name)
                problems.append(f"a function {name}{_text(wanted)} is missing")
        elif not isinstance(kind, wasmtime.FuncType) or _signature(kind) != wanted:
            missing.append(name)
            problems.append(f"{name} must be a function {_text(wanted)}")
    if not isinstance(found.get("memory"), wasmtime.MemoryType):
        missing.append("memory")
        problems.append("the memory must be exported as memory")
    if missing:
        if "_start" in found and "run" in missing:
            problems.append("it is a WASI command with _start; build a reactor that exports run instead")
        raise RealmError(
            "module_export_missing",
            f"the module lacks exports that Realm needs: {'; '.join(problems)}",
            details={"missing": missing, "needed": ["memory", *_EXPORTS]},
        )


def check_version(engine: Engine, module: wasmtime.Module) -> None:
    """Run ``realm_abi_version`` with little fuel and without host functions.

    Raises:
        RealmError: ``module_abi_version`` if it is not ours, ``module_invalid`` if it cannot be asked.
    """
    store = wasmtime.Store(engine.inner)
    store.set_limits(memory_size=MAX_START_MEMORY, table_elements=MAX_START_TABLE, instances=1, memories=1)
    store.set_fuel(VERSION_FUEL)
    linker = wasmtime.Linker(engine.inner)
    linker.define_unknown_imports_as_traps(module)
    try:
        instance = linker.instantiate(store, module)
        function = instance.exports(store)["realm_abi_version"]
        assert isinstance(function, wasmtime.Func)
        version = function(store)
    except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise RealmError(
            "module_invalid",
            f"realm_abi_version() cannot be run (no host function may be called before run): {lines[-1][:300]}",
        ) from None
    if version != abi.ABI_VERSION:
        raise RealmError(
            "module_abi_version",
            f"the module is built for ABI version {version}; this host has version {abi.ABI_VERSION}",
            details={"version": version, "supported": [abi.ABI_VERSION]},
        )


def check_module(engine: Engine, module: wasmtime.Module) -> list[str]:
    """All checks after compiling; gives the imports. Raises as the single ones."""
    imports = check_imports(module)
    check_exports(module)
    check_version(engine, module)
    return imports
