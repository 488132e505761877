"""The WASI preview-1 functions that C, Go and Rust libraries pull in, made harmless.

No files, no sockets, no environment. Standard output and error go to the run's log, line by line;
random numbers come from the run's seed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Literal

from realm.guests.fiber_types import FUEL_SLICE, GuestExit, Handler, OutOfBounds, ValueType
from realm.guests.fibers import Linker
from realm.guests.run import HOST_CALL_FUEL, GuestRun

IMPORT_MODULE = "wasi_snapshot_preview1"

SUCCESS, EBADF, EFAULT, EINVAL, ENOSYS, ESPIPE = 0, 8, 21, 28, 52, 70
MAX_BUFFERS = 1024
MAX_LINE = 4096
"""A line of standard output longer than this is cut in two."""
MAX_WRITE = 64 << 10
MAX_LINES = 256
"""Bytes and lines that one ``fd_write`` takes."""
_WRITE_FUEL, _BUFFER_FUEL, _LINE_FUEL = 4, 3_000, 5_000
_RANDOM_FUEL = 50
"""Fuel a byte, a buffer, a line and a random byte: what they take, and somewhat more."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PAIR = struct.Struct("<II")
_FDSTAT = struct.Struct("<BxHxxxxQQ")
_CHARACTER_DEVICE = 2
_RIGHT_FD_WRITE = 1 << 6

Work = Callable[[GuestRun, tuple[int, ...]], int]

# Parameters of every function, u for u32, U for u64.
SIGNATURES: dict[str, str] = {
    "args_get": "uu",
    "args_sizes_get": "uu",
    "environ_get": "uu",
    "environ_sizes_get": "uu",
    "clock_res_get": "uu",
    "clock_time_get": "uUu",
    "fd_advise": "uUUu",
    "fd_allocate": "uUU",
    "fd_close": "u",
    "fd_datasync": "u",
    "fd_fdstat_get": "uu",
    "fd_fdstat_set_flags": "uu",
    "fd_fdstat_set_rights": "uUU",
    "fd_filestat_get": "uu",
    "fd_filestat_set_size": "uU",
    "fd_filestat_set_times": "uUUu",
    "fd_pread": "uuuUu",
    "fd_prestat_dir_name": "uuu",
    "fd_prestat_get": "uu",
    "fd_pwrite": "uuuUu",
    "fd_read": "uuuu",
    "fd_readdir": "uuuUu",
    "fd_renumber": "uu",
    "fd_seek": "uUuu",
    "fd_sync": "u",
    "fd_tell": "uu",
    "fd_write": "uuuu",
    "path_create_directory": "uuu",
    "path_filestat_get": "uuuuu",
    "path_filestat_set_times": "uuuuUUu",
    "path_link": "uuuuuuu",
    "path_open": "uuuuuUUuu",
    "path_readlink": "uuuuuu",
    "path_remove_directory": "uuu",
    "path_rename": "uuuuuu",
    "path_symlink": "uuuuu",
    "path_unlink_file": "uuu",
    "poll_oneoff": "uuuu",
    "proc_exit": "u",
    "proc_raise": "u",
    "random_get": "uu",
    "sched_yield": "",
    "sock_accept": "uuu",
    "sock_recv": "uuuuuu",
    "sock_send": "uuuuu",
    "sock_shutdown": "uu",
}


def parameters(name: str) -> tuple[ValueType, ...]:
    """How the WASM parameters of one function are read."""
    return tuple("u32" if kind == "u" else "u64" for kind in SIGNATURES[name])


def result(name: str) -> Literal["i32"] | None:
    """Its result: an error number, except for the one that does not return."""
    return None if name == "proc_exit" else "i32"


# --- the functions that do something ----------------------------------------------------------------


def _nothing(run: GuestRun, values: tuple[int, ...]) -> int:
    return SUCCESS


def _two_zeros(run: GuestRun, values: tuple[int, ...]) -> int:
    run.memory.pack(_U32, values[0], 0)
    run.memory.pack(_U32, values[1], 0)
    return SUCCESS


def _clock_res_get(run: GuestRun, values: tuple[int, ...]) -> int:
    if values[0] > 3:
        return EINVAL
    run.memory.pack(_U64, values[1], 1_000_000)
    return SUCCESS


def _clock_time_get(run: GuestRun, values: tuple[int, ...]) -> int:
    clock, _precision, out = values
    if clock > 3:
        return EINVAL
    seconds = run.runtime.wall_clock() if clock == 0 else run.runtime.clock()
    run.memory.pack(_U64, out, int(seconds * 1000) * 1_000_000)
    return SUCCESS


def _fd_fdstat_get(run: GuestRun, values: tuple[int, ...]) -> int:
    fd, out = values
    if fd > 2:
        return EBADF
    run.memory.pack(_FDSTAT, out, _CHARACTER_DEVICE, 0, _RIGHT_FD_WRITE if fd else 0, 0)
    return SUCCESS


def _fd_read(run: GuestRun, values: tuple[int, ...]) -> int:
    if values[0] != 0:
        return EBADF
    run.memory.pack(_U32, values[3], 0)
    return SUCCESS


def _fd_seek(run: GuestRun, values: tuple[int, ...]) -> int:
    return ESPIPE if values[0] <= 2 else EBADF


def _fd_write(run: GuestRun, values: tuple[int, ...]) -> int:
    """Like any ``write``, it may take less than it is given."""
    fd, buffers_at, count, out = values
    if fd not in (1, 2):
        return EBADF
    if count > MAX_BUFFERS:
        return EINVAL
    memory = run.memory
    memory.check(out, 4)
    run.charge(_BUFFER_FUEL * count)
    pieces: list[bytes] = []
    room, total = MAX_WRITE, 0
    for pointer, length in _PAIR.iter_unpack(memory.read(buffers_at, count * _PAIR.size)):
        memory.check(pointer, length)
        total += length
        if room:
            pieces.append(memory.read(pointer, min(length, room)))
            room -= len(pieces[-1])
    data = b"".join(pieces)
    run.charge(_WRITE_FUEL * len(data))
    taken = _write_lines(run, fd, data)
    # Once the log is full the prints go nowhere, as on any full terminal: the guest is told that all is written.
    memory.pack(_U32, out, min(total, (1 << 32) - 1) if run.log_full else taken)
    return SUCCESS


def _write_lines(run: GuestRun, fd: int, data: bytes) -> int:
    """Log whole lines and keep the rest for later; how many bytes were taken."""
    kept = run.wasi_lines.get(fd, b"")
    waiting = kept + data
    at = 0
    for _ in range(MAX_LINES):
        end = waiting.find(b"\n", at, at + MAX_LINE)
        if run.log_full or (end < 0 and len(waiting) - at < MAX_LINE):
            break
        line = waiting[at : end if end >= 0 else at + MAX_LINE]
        at += len(line) + (end >= 0)
        run.charge(_LINE_FUEL)
        run.write_log(_level(fd), line.decode("utf-8", "replace"))
    else:
        run.wasi_lines[fd] = b""
        return at - len(kept)
    run.wasi_lines[fd] = b"" if run.log_full else waiting[at:]
    return len(data)


def _level(fd: int) -> str:
    return "info" if fd == 1 else "warning"


def flush_lines(run: GuestRun) -> None:
    """Log what the guest printed without a newline at its end."""
    for fd, rest in run.wasi_lines.items():
        if rest:
            run.write_log(_level(fd), rest.decode("utf-8", "replace"))
    run.wasi_lines.clear()


def _random_get(run: GuestRun, values: tuple[int, ...]) -> int:
    pointer, size = values
    if size > 1 << 16:
        return EINVAL
    run.memory.check(pointer, size)
    run.charge(size * _RANDOM_FUEL)
    run.memory.write(pointer, run.random_bytes(size))
    return SUCCESS


def _proc_exit(run: GuestRun, values: tuple[int, ...]) -> int:
    code = values[0]
    raise GuestExit(code - (1 << 32) if code >= 1 << 31 else code)


_WORK: dict[str, Work] = {
    "args_get": _nothing,
    "args_sizes_get": _two_zeros,
    "environ_get": _nothing,
    "environ_sizes_get": _two_zeros,
    "clock_res_get": _clock_res_get,
    "clock_time_get": _clock_time_get,
    "fd_fdstat_get": _fd_fdstat_get,
    "fd_read": _fd_read,
    "fd_seek": _fd_seek,
    "fd_write": _fd_write,
    "proc_exit": _proc_exit,
    "random_get": _random_get,
    "sched_yield": _nothing,
}


def _refuse(run: GuestRun, values: tuple[int, ...]) -> int:
    """Descriptors and paths: there are none."""
    return EBADF


def _unsupported(run: GuestRun, values: tuple[int, ...]) -> int:
    return ENOSYS


def _make_handler(name: str) -> Handler:
    work = _WORK.get(name, _refuse if name.startswith(("fd_", "path_", "sock_")) else _unsupported)
    label = f"wasi.{name}"

    def handler(run: GuestRun, values: tuple[int, ...]) -> int | None:
        usage = run.usage
        if not usage.host_calls:
            usage.first_call_seconds = run.runtime.clock() - run.started
        usage.host_calls += 1
        run.last_call = label
        run.debt += HOST_CALL_FUEL
        try:
            result = work(run, values)
        except OutOfBounds:
            result = EFAULT
        if run.debt >= FUEL_SLICE and run.fiber is not None:
            run.fiber.give_way()
        return result

    return handler


def define_wasi(linker: Linker) -> None:
    """Make the functions importable from module ``wasi_snapshot_preview1``."""
    for name in SIGNATURES:
        linker.define(IMPORT_MODULE, name, parameters(name), result(name), _make_handler(name))
