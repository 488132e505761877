"""The few system calls that contain a process, by ctypes: Python has no functions for them. Linux only.

Nothing is decided here. What a platform does not have is :class:`Lacking`; a call that fails although
the platform has it is :class:`KernelRefused`, which is a defect and not to be passed over.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from ctypes import c_int, c_long, c_ulong, c_void_p
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_GET_ACTION_AVAIL: Final = 2
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_SECCOMP_RET_KILL_PROCESS: Final = 0x8000_0000
# These have the same number everywhere.
_CLOSE_RANGE: Final = 436
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_CREATE_RULESET_VERSION: Final = 1
_LANDLOCK_RULE_PATH_BENEATH: Final = 1

READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
"""Rights over files, of ``linux/landlock.h``: the only two that are ever given."""
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""All rights over files by the ABI that brought them; each is taken away."""
_NET_RIGHTS_ABI: Final = 4
_NET_RIGHTS: Final = 0b11
_SCOPES_ABI: Final = 6
_SCOPES: Final = 0b11
"""Abstract Unix sockets and signals of processes outside."""


class Lacking(Exception):
    """This platform does not have a mechanism. ``mechanism`` names it, ``reason`` says how it shows."""

    def __init__(self, mechanism: str, reason: str) -> None:
        super().__init__(f"{mechanism}: {reason}")
        self.mechanism = mechanism
        self.reason = reason


class KernelRefused(OSError):
    """The kernel refused a call that it knows."""


def _libc() -> ctypes.CDLL:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl.argtypes = [c_int, c_ulong, c_ulong, c_ulong, c_ulong]
        libc.prctl.restype = c_int
        libc.syscall.restype = c_long
    except (OSError, AttributeError) as error:
        raise Lacking("prctl", "this system is not Linux") from error
    return libc


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, value, 0, 0, 0) != 0:
        raise KernelRefused(ctypes.get_errno(), f"prctl({option}, {value}): {os.strerror(ctypes.get_errno())}")


def _call(number: int, *arguments: int | c_void_p) -> int:
    """A system call; the result, or ``-errno``."""
    # Converted by hand: a variadic C function takes ints as 32 bits unless told otherwise.
    libc = _libc()
    result: int = libc.syscall(c_long(number), *(a if isinstance(a, c_void_p) else c_long(a) for a in arguments))
    return -ctypes.get_errno() if result == -1 else result


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise KernelRefused(-result, f"{what}: {os.strerror(-result)}")
    return result


def set_no_new_privileges() -> None:
    """No program that this process starts has more rights than itself; both mechanisms below need it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def set_not_dumpable() -> None:
    """Other processes of the user can neither trace this one nor read its memory; it leaves no core."""
    _prctl(_PR_SET_DUMPABLE, 0)


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this signal when the thread that started this process ends."""
    _prctl(_PR_SET_PDEATHSIG, number)


def close_from(first: int) -> None:
    """Close all descriptors from ``first`` on."""
    if _call(_CLOSE_RANGE, first, 0xFFFF_FFFF, 0) < 0:
        # Kernels before 5.9 do not have it.
        os.closerange(first, os.sysconf("SC_OPEN_MAX"))


# --- seccomp ------------------------------------------------------------------------------------------


def seccomp_number() -> int:
    """The number of ``seccomp`` on this machine, known to work.

    Raises:
        Lacking: another processor, or a kernel (or a container around us) without it.
    """
    machine = platform.machine()
    number = _SECCOMP.get(machine)
    if number is None:
        raise Lacking("seccomp", f"no filter is written for processors of type {machine}")
    action = ctypes.c_uint32(_SECCOMP_RET_KILL_PROCESS)
    result = _call(number, _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.cast(ctypes.byref(action), c_void_p))
    if result < 0:
        raise Lacking("seccomp", f"the kernel does not offer it ({os.strerror(-result)})")
    return number


def install_filter(program: bytes) -> None:
    """Put a classic BPF program (8 bytes an instruction) between all threads of this process and the kernel.

    Raises:
        Lacking: see :func:`seccomp_number`.
    """
    number = seccomp_number()
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count of instructions, padding, and their address.
    head = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code)), 16)
    address = ctypes.cast(head, c_void_p)
    result = _call(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, address)
    if result > 0:
        raise KernelRefused(errno.EBUSY, f"seccomp: thread {result} cannot be given the filter")
    _checked(result, "seccomp")


# --- Landlock -----------------------------------------------------------------------------------------


def landlock_abi() -> int:
    """The version of Landlock's interface, from 1.

    Raises:
        Lacking: the kernel does not have it, or it is off.
    """
    result = _call(_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    if result < 0:
        how = "it is turned off at boot" if result == -errno.EOPNOTSUPP else os.strerror(-result)
        raise Lacking("landlock", f"the kernel does not offer it ({how})")
    return result


def restrict_files(readable: Iterable[Path]) -> int:
    """Let this thread, and those it starts, only read what is at or below these paths.

    Everything else that Landlock knows is taken away: writing and making files, TCP, and, outside of
    this process and its children, abstract Unix sockets and signals. Returns the ABI.

    Raises:
        Lacking: see :func:`landlock_abi`.
    """
    abi = landlock_abi()
    files = sum(rights for since, rights in _FILE_RIGHTS.items() if since <= abi)
    attributes = struct.pack("=Q", files)
    if abi >= _NET_RIGHTS_ABI:
        attributes += struct.pack("=Q", _NET_RIGHTS)
    if abi >= _SCOPES_ABI:
        attributes += struct.pack("=Q", _SCOPES)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = _call(_LANDLOCK_CREATE_RULESET, ctypes.cast(buffer, c_void_p), len(attributes), 0)
    ruleset = _checked(result, "landlock_create_ruleset")
    try:
        for path in readable:
            _allow_reading(ruleset, path)
        _checked(_call(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)
    return abi


def _allow_reading(ruleset: int, path: Path) -> None:
    rights = READ_FILE | READ_DIR if path.is_dir() else READ_FILE
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor), 12)
        address = ctypes.cast(rule, c_void_p)
        result = _call(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, address, 0)
        _checked(result, f"landlock_add_rule for {path}")
    finally:
        os.close(descriptor)
