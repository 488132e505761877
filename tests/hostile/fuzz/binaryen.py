"""Modules of binaryen's fuzzer (``wasm-opt --translate-to-fuzz``), grown out of the real guests.

The tool comes from the npm package ``binaryen``, which ``make fuzz`` puts into a folder of the cache;
tests use the modules kept in ``corpus/``, made by ``python -m tests.hostile.fuzz.binaryen``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

from tests.hostile.fuzz import modules

FEATURES = (
    "bulk-memory",
    "multivalue",
    "mutable-globals",
    "nontrapping-float-to-int",
    "sign-ext",
    "simd",
    "tail-call",
)
SMALL = [path for path in modules.GUESTS if path.stat().st_size < 40_000]
"""The tool, itself a WebAssembly module, takes seconds for larger ones."""
KEPT, KEPT_BYTES = 24, 8_000


def tool() -> Path | None:
    """``wasm-opt``, where ``FUZZ_BINARYEN`` names the folder that npm has installed into."""
    folder = os.environ.get("FUZZ_BINARYEN")
    path = Path(folder) / "node_modules" / ".bin" / "wasm-opt" if folder else None
    return path if path is not None and path.exists() else None


def translated(seed: int) -> bytes:
    """A module with a real guest's imports and exports. Raises :class:`modules.NoModule`."""
    program = tool()
    if program is None:
        raise modules.NoModule("binaryen is not installed")
    random = Random(seed)
    with tempfile.TemporaryDirectory(prefix="realm-fuzz-") as folder:
        given, made = Path(folder) / "given", Path(folder) / "made.wasm"
        given.write_bytes(random.randbytes(random.choice([300, 3000, 20_000])))
        done = subprocess.run(
            [
                str(program),
                str(given),
                "-ttf",
                f"--initial-fuzz={random.choice(SMALL)}",
                "--fuzz-preserve-imports-exports",
                *(["--fuzz-passes"] if random.random() < 0.3 else []),
                *(["--no-fuzz-oob"] if random.random() < 0.5 else []),
                *(f"--enable-{feature}" for feature in FEATURES),
                "-o",
                str(made),
            ],
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise modules.NoModule(done.stderr.decode(errors="replace")[-500:])
        # The fuzzer changes what functions return, too.
        return modules.versioned(made.read_bytes())


def main() -> int:
    """Fill the corpus with small modules."""
    modules.CORPUS.mkdir(exist_ok=True)
    kept = seed = 0
    while kept < KEPT:
        seed += 1
        try:
            made = translated(seed)
        except modules.NoModule as error:
            sys.stderr.write(f"{seed}: {error}\n")
            if tool() is None:
                return 1
            continue
        if len(made) <= KEPT_BYTES:
            (modules.CORPUS / f"binaryen_{seed}.wasm").write_bytes(made)
            kept += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
