"""Builds every guest in this folder with the compiler of the PyPI package ``ziglang``.

Usage: ``python guest_modules/build.py [--check] [NAME ...]``. With ``--check`` the guests are built
in a temporary folder and compared, byte for byte, with the committed modules.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
ZIG_VERSION = "0.17.1"

# Zig puts the stack below the data: it overflows into address 0, which traps, rather than into the data.
LINK = ["-Wl,--no-entry", "-Wl,-z,stack-size=65536"]
C = ["cc", "-target", "wasm32-freestanding", "-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-nostdlib", *LINK]
ZIG = ["build-exe", "-target", "wasm32-freestanding", "-O", "ReleaseSmall", "-fno-entry"]
ZIG += ["--export=run", "--export=realm_abi_version"]
ZIG += ["-fno-strip", "--stack", "131072"]


@dataclass(frozen=True)
class Guest:
    """One guest: ``source`` and the committed ``module``, both relative to the repository."""

    name: str
    source: str
    module: str

    @property
    def path(self) -> Path:
        return REPOSITORY / self.module


GUESTS = (
    # The host ships this one: it is what `generate` of the wire protocol runs.
    Guest("generate", "guest_modules/generate/generate.c", "host/realm/guests/builtin/generate.wasm"),
    Guest("chat", "guest_modules/chat/chat.c", "guest_modules/chat/chat.wasm"),
    Guest("best_of_n", "guest_modules/best_of_n/best_of_n.c", "guest_modules/best_of_n/best_of_n.wasm"),
    Guest("ab_test", "guest_modules/ab_test/ab_test.c", "guest_modules/ab_test/ab_test.wasm"),
    Guest("constrained", "guest_modules/constrained/constrained.zig", "guest_modules/constrained/constrained.wasm"),
    Guest("decode", "guest_modules/decode/decode.c", "guest_modules/decode/decode.wasm"),
    # The host ships this one too, for `realm bench`.
    Guest("bench", "guest_modules/bench/bench.c", "host/realm/bench/bench.wasm"),
)


def zig(arguments: list[str]) -> None:
    """Runs the compiler in the repository's root, so that no other path can get into its output."""
    environment = dict(os.environ)
    cache = REPOSITORY / ".cache" / "zig"
    environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(cache))
    environment.setdefault("ZIG_LOCAL_CACHE_DIR", str(cache))
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"zig {' '.join(arguments)} failed:\n{done.stderr}")


def _number(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned LEB128 at an offset, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def without_debug(wasm: bytes) -> bytes:
    """The module without its custom sections but for ``name``, which gives backtraces their names.

    The compiler can only strip both, and the debug sections hold paths of the building machine.
    """
    out, at = bytearray(wasm[:8]), 8
    while at < len(wasm):
        size, body = _number(wasm, at + 1)
        length, name = _number(wasm, body)
        if wasm[at] != 0 or wasm[name : name + length] == b"name":
            out += wasm[at : body + size]
        at = body + size
    return bytes(out)


def compile_c(source: Path, output: Path, include: tuple[str, ...] = ()) -> None:
    """Compiles one freestanding C source to a guest module; also used by tests for throw-away guests."""
    folders = [f"-I{folder}" for folder in ("guest_modules/abi", *include)]
    zig([*C, *folders, "-o", str(output), str(source)])


def compile_zig(source: Path, output: Path) -> None:
    """Compiles one Zig source, which may import "realm", to a guest module."""
    zig([*ZIG, "--dep", "realm", f"-Mroot={source}", "-Mrealm=guest_modules/abi/realm.zig", f"-femit-bin={output}"])


def build(guest: Guest, output: Path) -> None:
    """Builds one guest into ``output``."""
    if guest.source.endswith(".c"):
        compile_c(Path(guest.source), output)
    else:
        compile_zig(Path(guest.source), output)
    output.write_bytes(without_debug(output.read_bytes()))
    output.chmod(0o644)


def differing(guests: tuple[Guest, ...] = GUESTS) -> list[str]:
    """Names of guests whose committed module is not what their source builds to."""
    names = []
    with tempfile.TemporaryDirectory() as folder:
        for guest in guests:
            fresh = Path(folder) / f"{guest.name}.wasm"
            build(guest, fresh)
            if not guest.path.is_file() or guest.path.read_bytes() != fresh.read_bytes():
                names.append(guest.name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed module differs")
    parser.add_argument("names", nargs="*", metavar="NAME", help="guests to build (all)")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {g.name for g in GUESTS}
    if unknown:
        parser.error(f"no such guest: {', '.join(sorted(unknown))}; there are {', '.join(g.name for g in GUESTS)}")
    guests = tuple(g for g in GUESTS if not arguments.names or g.name in arguments.names)
    if arguments.check:
        names = differing(guests)
        for name in names:
            print(f"{name}: the committed module differs from a fresh build", file=sys.stderr)
        return 1 if names else 0
    for guest in guests:
        build(guest, guest.path)
        print(f"{guest.module}: {guest.path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
