"""What ``realm doctor`` looks at. Every check says what it found; a failed one says what to do."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.text import Text

import realm.guests
from realm import sandbox
from realm.child import how_it_ended
from realm.cli.terminal import size
from realm.errors import RealmError
from realm.models.store import list_models
from realm.sandbox import kernel
from realm.settings import gpu_present

GOOD, DOUBTFUL, FAILED = "ok", "warn", "fail"
_STYLES = {GOOD: "green", DOUBTFUL: "yellow", FAILED: "bold red"}
_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
_WASMTIME = "50.0.1"
_NEEDED_MEMORY = 1 << 30
_NEEDED_DISK = 1 << 30
_NEEDED_CAPABILITY = 8
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """What one check found; ``state`` is ok, warn or fail."""

    name: str
    state: str
    text: str

    def line(self) -> Text:
        return Text.assemble((f"{self.state:5}", _STYLES[self.state]), f"{self.name:10} {self.text}")


def examine(home: Path, port: int) -> Iterator[Finding]:
    """All checks, in an order in which each failure explains those after it."""
    checks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("gpu", _gpu),
        ("wasmtime", _wasmtime),
        ("processor", _processor),
        ("memory", _memory),
        ("mappings", _mappings),
        ("seccomp", _seccomp),
        ("landlock", _landlock),
        ("sandbox", _sandbox),
        ("data", lambda: _data(home)),
        ("disk", lambda: _disk(home)),
        ("models", lambda: _models(home)),
        ("port", lambda: _port(port)),
        ("compile", _compile),
    ]
    for name, check in checks:
        try:
            state, text = check()
        except (RealmError, OSError, ImportError, subprocess.SubprocessError) as error:
            state, text = FAILED, str(error)
        yield Finding(name, state, text)


def _python() -> tuple[str, str]:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if platform.python_implementation() != "CPython" or sys.version_info >= (3, 13):
        return DOUBTFUL, f"{found}: tested with CPython 3.11 and 3.12"
    return GOOD, found


def _torch() -> tuple[str, str]:
    import torch

    return GOOD, f"{torch.__version__}, {torch.get_num_threads()} threads"


def _gpu() -> tuple[str, str]:
    """The GPU that ``--device auto`` takes, and whether the kernels can run on it."""
    import torch

    if not torch.cuda.is_available():
        if not gpu_present():
            return GOOD, "none: the engine computes on the CPU"
        if torch.version.cuda is None:
            return DOUBTFUL, "there is one, but torch is built for CPUs only: install torch's CUDA build"
        return DOUBTFUL, f"there is one, but torch (CUDA {torch.version.cuda}) cannot use it: look at its driver"
    facts = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    found = (
        f"{facts.name}, {size(free)} free of {size(total)}, compute capability {facts.major}.{facts.minor}, "
        f"CUDA {torch.version.cuda}{_driver()}"
    )
    try:
        found = f"{found}, Triton {version('triton')}"
    except PackageNotFoundError:
        return FAILED, f"{found}, no Triton: pip install triton, in the version that torch {torch.__version__} needs"
    if facts.major < _NEEDED_CAPABILITY:
        return DOUBTFUL, f"{found}: bfloat16 kernels need {_NEEDED_CAPABILITY}.0; serve with --dtype float32"
    others = torch.cuda.device_count() - 1
    return GOOD, f"{found}; {others} more unused" if others else found


def _driver() -> str:
    """The driver's version as a continuation of a sentence; empty where the kernel does not tell it."""
    try:
        found = re.search(r"\d+\.\d[\d.]*", _DRIVER.read_text())
    except OSError:
        return ""
    return f", driver {found[0]}" if found else ""


def _wasmtime() -> tuple[str, str]:
    try:
        found = version("wasmtime")
    except PackageNotFoundError:
        return FAILED, f"not installed: pip install wasmtime=={_WASMTIME}"
    if found != _WASMTIME:
        return FAILED, f"{found}: exactly {_WASMTIME} is needed, because its C bindings are used"
    return GOOD, found


def _processor() -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0))
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            break
    bf16 = [flag for flag in _BF16_FLAGS if flag in flags]
    if not bf16:
        return DOUBTFUL, f"{cores} cores, no bf16 instructions: bfloat16 works, float32 may be faster"
    return GOOD, f"{cores} cores, {', '.join(bf16)}"


def _memory() -> tuple[str, str]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    free = fields["MemAvailable"]
    text = f"{size(free)} available of {size(fields['MemTotal'])}"
    if free < _NEEDED_MEMORY:
        return FAILED, f"{text}: a small model needs {size(_NEEDED_MEMORY)}"
    return GOOD, text


def _mappings() -> tuple[str, str]:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    # A suspended guest takes about five memory mappings.
    return (GOOD if most >= 65_530 else DOUBTFUL), f"vm.max_map_count {most}: about {most // 5:,} guests a worker"


def _seccomp() -> tuple[str, str]:
    try:
        kernel.seccomp_number()
    except kernel.Lacking as lacking:
        return DOUBTFUL, (
            f"{lacking.reason}: guest workers keep all system calls; use a kernel with CONFIG_SECCOMP_FILTER, and "
            "a container that allows seccomp()"
        )
    return GOOD, "guest workers keep only the system calls they need"


def _landlock() -> tuple[str, str]:
    try:
        abi = kernel.landlock_abi()
    except kernel.Lacking as lacking:
        return DOUBTFUL, (
            f"{lacking.reason}: guest workers can read what the user can; use Linux 5.13 or newer with landlock "
            "among the kernel's lsm="
        )
    return GOOD, f"ABI {abi}: guest workers read their model, their modules and Python, and write nothing"


def _sandbox() -> tuple[str, str]:
    """Enters a worker's sandbox in a process of its own: what a worker gets, not what it should get."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "realm.sandbox"], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or [how_it_ended(done.returncode)])[-1]
        return FAILED, f"a guest worker cannot enter it, so none would start: {cause}"
    containment = sandbox.Containment(**json.loads(done.stdout))
    text = f"a guest worker is held by {containment}"
    return (DOUBTFUL if containment.lacking else GOOD), text


def _data(home: Path) -> tuple[str, str]:
    if not home.exists():
        parent = next(folder for folder in home.parents if folder.exists())
        if not os.access(parent, os.W_OK):
            return FAILED, f"{home} cannot be made: {parent} is not writable"
        return GOOD, f"{home} (will be made)"
    with tempfile.TemporaryFile(dir=home):
        pass
    open_to = home.stat().st_mode & 0o077
    if open_to:
        return DOUBTFUL, f"{home} is open to other users: chmod 700 {home}"
    return GOOD, str(home)


def _disk(home: Path) -> tuple[str, str]:
    existing = home if home.exists() else next(folder for folder in home.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < _NEEDED_DISK:
        return DOUBTFUL, f"{size(free)} free: importing a small model takes up to {size(_NEEDED_DISK)}"
    return GOOD, f"{size(free)} free"


def _models(home: Path) -> tuple[str, str]:
    names = [entry.name for entry in list_models(home)]
    if not names:
        return FAILED, "none: run `realm models import`"
    return GOOD, ", ".join(names)


def _port(port: int) -> tuple[str, str]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return DOUBTFUL, f"{port} is not free ({error.strerror}): a server may run already, or choose another"
    return GOOD, f"{port} is free"


def _compile() -> tuple[str, str]:
    from realm.guests.compiler import compile_module

    guest = Path(str(realm.guests.__file__)).parent / "builtin" / "generate.wasm"
    with tempfile.TemporaryDirectory() as cache:
        began = time.monotonic()
        asyncio.run(compile_module(guest, Path(cache)))
        return GOOD, f"a guest compiles in {1000 * (time.monotonic() - began):.0f} ms"
