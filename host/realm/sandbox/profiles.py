"""What a contained process may ask of the kernel, with reasons. What is not named here fails with EPERM.

Both profiles are entered late: links are connected, files to be written are open, libraries are loaded.
So neither has a call that makes a socket, a process, or a file that can be written.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from realm.sandbox.filter import KILL, Check, Rule, refuse

_INT: Final = 0xFFFF_FFFF
_POINTER: Final = 0xFFFF_FFFF_FFFF_FFFF

# openat: O_ACCMODE, O_CREAT, O_TRUNC, O_APPEND and the bit of O_TMPFILE that is not O_DIRECTORY's.
_OPEN_TO_WRITE: Final = 0o3 | 0o100 | 0o1000 | 0o2000 | 0o20000000
# What the C library's threads are made with. Without CLONE_THREAD, or with a namespace, it is refused.
_THREAD: Final = 0x003D_0F00
_CLONE_DETACHED: Final = 0x0040_0000  # set by musl, without effect
_PROT_WRITE, _PROT_EXEC = 2, 4
_MAP_SHARED, _MAP_GROWSDOWN = 1, 0x100
_FIOCLEX, _FIONBIO, _TCGETS = 0x5451, 0x5421, 0x5401
_RLIMIT_DATA: Final = 2
_F_GETFD, _F_SETFD, _F_GETFL, _F_ADD_SEALS = 1, 2, 3, 1033


@dataclass(frozen=True)
class Profile:
    """``rules`` makes the filter's rules for a process of that id."""

    name: str
    rules: Callable[[int], list[Rule]]


def _named(names: str) -> list[Rule]:
    return [Rule(name) for name in names.split()]


def _one_of(argument: int, *values: int) -> tuple[tuple[Check, ...], ...]:
    return tuple((Check(argument, _INT, value),) for value in values)


def _common(pid: int) -> list[Rule]:
    not_executable = Check(2, _PROT_EXEC, 0)
    not_writable = Check(2, _PROT_WRITE, 0)
    # Private only: RLIMIT_DATA counts nothing else, so a shared page would be a way around the ceiling.
    private = Check(3, _MAP_SHARED | _MAP_GROWSDOWN, 0)
    reading = Check(2, _OPEN_TO_WRITE, 0)
    ours = Check(0, _INT, 0)
    return [
        # Reading a limit of our own, and moving the soft one of memory below the hard one, which stays.
        Rule(
            "prlimit64",
            ways=((ours, Check(2, _POINTER, 0)), (ours, Check(1, _INT, _RLIMIT_DATA), Check(3, _POINTER, 0))),
        ),
        # Open descriptors: standard streams, links, files opened for reading, pipes between own threads.
        *_named("read write readv writev pread64 lseek close fstat pipe2"),
        Rule("fcntl", ways=_one_of(1, _F_GETFD, _F_SETFD, _F_GETFL, _F_ADD_SEALS)),
        # Non-blocking sockets, and Python's question whether a file is a terminal.
        Rule("ioctl", ways=_one_of(1, _FIONBIO, _FIOCLEX, _TCGETS)),
        # Files: imports, tracebacks and compiled modules are read. Landlock says which.
        Rule("openat", ways=((reading,),)),
        Rule("open", ways=((Check(1, _OPEN_TO_WRITE, 0),),)),
        *_named("newfstatat stat lstat statx access faccessat readlink readlinkat getcwd getdents64"),
        # Memory: Wasmtime makes a guest's pages accessible and its loaded code executable, never both
        # writable and executable at a time.
        Rule("mmap", ways=((not_executable, private), (not_writable, private))),
        Rule("mprotect", ways=((not_executable,), (not_writable,))),
        *_named("munmap mremap madvise brk membarrier"),
        # Wasmtime keeps the first content of a module's memory in a nameless file of memory, which it seals.
        # The ceiling of memory does not count those.
        *_named("memfd_create ftruncate pwrite64"),
        # Signals: traps of guests arrive as such. Only our own process can be signalled: abort does.
        *_named("rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall"),
        *(Rule(name, ways=_one_of(0, pid)) for name in ("kill", "tgkill")),
        # Threads of this process, and waiting for them.
        Rule("clone", ways=((Check(0, _INT & ~_CLONE_DETACHED, _THREAD),),)),
        *_named("futex set_robust_list rseq sched_yield sched_getaffinity exit exit_group"),
        # Clocks, chance, and facts about ourselves.
        *_named("clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getrandom times"),
        *_named("getpid getppid gettid getuid geteuid getgid getegid uname sysinfo getrusage getrlimit"),
        # The C library takes the older call when it is told that there is no such call: clone, whose
        # flags can be seen, where those of clone3 are behind a pointer.
        *(Rule(name, refuse(errno.ENOSYS)) for name in ("clone3", "openat2", "faccessat2")),
        # No program of ours does any of this: somebody else's code runs, and the process has to go.
        *(Rule(name, KILL) for name in _HOSTILE.split()),
    ]


_HOSTILE: Final = (
    "execve execveat ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd "
    "bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register "
    "mount umount2 move_mount open_tree fsopen fsconfig fsmount pivot_root chroot setns unshare "
    "add_key request_key keyctl init_module finit_module delete_module kexec_load kexec_file_load "
    "reboot swapon swapoff iopl ioperm modify_ldt"
)


def _worker(pid: int) -> list[Rule]:
    return [
        # The two links, which are connected: data without an address, and waiting for it. First, because rules
        # that look at arguments are gone through one by one; the kernel remembers the others' answer.
        Rule("sendto", ways=((Check(4, _POINTER, 0),),)),
        *_named("recvfrom poll ppoll select pselect6"),
        *_common(pid),
    ]


WORKER: Final = Profile("worker", _worker)
"""A guest worker with connected links."""

COMPILER: Final = Profile("compiler", _common)
"""A compile child with its output file open: it reads, computes in threads, and writes to what it has."""
