"""What is forbidden is really forbidden, and Python goes on: tried in real contained processes.

Where the platform lacks a mechanism, the same tests assert that this is reported.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from realm.sandbox import kernel
from realm.sandbox.kernel import Lacking

HOST = Path(__file__).parents[2] / "host"
PRELUDE = """
import errno, json, os, signal, socket, sys, threading, time
from pathlib import Path
from realm import sandbox
from realm.sandbox import kernel
from realm.sandbox.numbers import CALLS
import platform

folder, sibling = Path(sys.argv[1]), int(sys.argv[2])
READ, WRITE, EXECUTE, SHARED, PRIVATE, ANONYMOUS = 1, 2, 4, 1, 2, 0x20
sandbox.limit(1 << 30)

def number(name, x86, arm):
    return x86 if platform.machine() == "x86_64" else arm

def call(name, *arguments):
    # A system call by name, for those that the rules have a number for.
    return kernel._checked(kernel._call(CALLS[name][platform.machine() == "aarch64"], *arguments), name)

def raw(number, *arguments):
    return kernel._checked(kernel._call(number, *arguments), "call")

def attempt(work):
    try:
        work()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
"""


@pytest.fixture(scope="module")
def sibling() -> Any:
    """Another process of the same user, not contained."""
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        assert process.poll() is None, "the sibling was killed"
        process.communicate(b"\n")


def run(program: str, folder: Path, sibling: int = 0, profile: str = "WORKER") -> subprocess.CompletedProcess[str]:
    enter = f"containment = sandbox.enter(sandbox.{profile}, reads=[folder])\n"
    source = PRELUDE + textwrap.dedent(program).replace("ENTER\n", enter)
    environment = {**os.environ, "PYTHONPATH": str(HOST), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", source, str(folder), str(sibling)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def answers(program: str, folder: Path, sibling: int = 0, profile: str = "WORKER") -> Any:
    done = run(program, folder, sibling, profile)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return json.loads(done.stdout)


@cache
def has(mechanism: str) -> bool:
    try:
        kernel.landlock_abi() if mechanism == "landlock" else kernel.seccomp_number()
    except Lacking:
        return False
    return True


def test_it_tells_what_is_in_force(tmp_path: Path) -> None:
    told = answers(
        """
        ENTER
        import dataclasses
        print(json.dumps([dataclasses.asdict(containment), str(containment)]))
        """,
        tmp_path,
    )
    facts, text = told
    assert facts["seccomp"] == has("seccomp")
    assert bool(facts["landlock"]) == has("landlock")
    lacking = {reason.partition(":")[0] for reason in facts["lacking"]}
    assert lacking == {name for name in ("seccomp", "landlock") if not has(name)}
    assert ("seccomp" in text, "Landlock" in text) == (has("seccomp"), has("landlock"))


ALLOWED = """
    import logging, traceback, random, faulthandler, ctypes, fcntl
    (folder / "module.bin").write_bytes(b"data")
    logging.basicConfig(format="%(message)s")
    results = {}
    ENTER
    results["read a given file"] = (folder / "module.bin").read_bytes() == b"data"
    results["list a given folder"] = os.listdir(folder) == ["module.bin"]
    import decimal, statistics, zoneinfo, unicodedata
    results["late imports"] = str(decimal.Decimal("0.1") + 1) == "1.1"
    try:
        1 / 0
    except ZeroDivisionError:
        results["traceback"] = "1 / 0" not in traceback.format_exc() and "ZeroDivisionError" in traceback.format_exc()
        logging.exception("a logged traceback")
    try:
        textwrap = __import__("textwrap")
        textwrap.dedent(3)
    except TypeError:
        # Source lines are read when they are shown.
        results["source lines"] = "_whitespace_only_re" in traceback.format_exc()
    results["clock"] = time.time() > 0 and time.monotonic() > 0 and time.localtime().tm_year > 2000
    time.sleep(0.01)
    results["chance"] = len(os.urandom(8)) == 8 and random.random() < 1
    seen = []
    threads = [threading.Thread(target=seen.append, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results["threads"] = sorted(seen) == list(range(8))
    signal.signal(signal.SIGUSR1, lambda *_: seen.append("signal"))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    results["own signals"] = seen[8:] == ["signal", "signal"]
    faulthandler.enable()
    faulthandler.dump_traceback_later(60)
    faulthandler.cancel_dump_traceback_later()
    results["memory"] = len(bytearray(100 << 20)) == 100 << 20
    reader, writer = os.pipe()
    os.write(writer, b"x")
    results["own pipes"] = os.read(reader, 1) == b"x"
    image = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    results["sealed images"] = os.write(image, b"x") == 1 and fcntl.fcntl(image, fcntl.F_ADD_SEALS, 8) == 0
    results["not a terminal"] = not sys.stdin.isatty()
    import resource
    results["limits read"] = resource.getrlimit(resource.RLIMIT_DATA) == (1 << 30, 1 << 30)
    print(json.dumps(results))
"""


@pytest.mark.parametrize("profile", ["WORKER", "COMPILER"])
def test_python_goes_on(tmp_path: Path, profile: str) -> None:
    done = run(ALLOWED, tmp_path, profile=profile)
    assert done.returncode == 0, done.stderr
    assert [name for name, good in json.loads(done.stdout).items() if not good] == []
    assert "a logged traceback\nTraceback" in done.stderr


def test_connected_sockets_go_on(tmp_path: Path) -> None:
    assert answers(
        """
        import select
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        ENTER
        poll = select.poll()
        poll.register(ours, select.POLLIN)
        before = poll.poll(0)
        theirs.send(b"data")
        ready = bool(poll.poll(1000)), bool(select.select([ours], [ours], [], 1)[0])
        print(json.dumps([before, ready, ours.recv(10).decode(), attempt(lambda: ours.recv(1)), ours.close()]))
        """,
        tmp_path,
    ) == [[], [True, True], "data", "EAGAIN", None]


# What it is, how it is tried, and what stops it: both layers, or one of them.
REFUSED = {
    "read the passwords": ("open('/etc/passwd')", "landlock"),
    "read a file of the user": ("open(secret)", "landlock"),
    "list the user's folder": ("os.listdir(secret.parent)", "landlock"),
    "read our own memory map": ("open('/proc/self/maps')", "landlock"),
    "read another process's memory": ("open(f'/proc/{sibling}/mem', 'rb')", "landlock"),
    "read another process's environment": ("open(f'/proc/{sibling}/environ', 'rb')", "landlock"),
    "write our own memory": ("open('/proc/self/mem', 'r+b')", "both"),
    "write a given file": ("open(folder / 'kept', 'r+b')", "both"),
    "append to a given file": ("open(folder / 'kept', 'ab')", "both"),
    "truncate a given file": ("os.truncate(folder / 'kept', 0)", "both"),
    "make a file": ("open(folder / 'new', 'xb')", "both"),
    "make a nameless file": ("os.open(folder, os.O_TMPFILE | os.O_WRONLY)", "both"),
    "make a file elsewhere": ("open('/tmp/realm-test-escape', 'wb')", "both"),
    "make a folder": ("os.mkdir(folder / 'new')", "both"),
    "remove a file": ("os.unlink(folder / 'kept')", "both"),
    "rename a file": ("os.rename(folder / 'kept', folder / 'new')", "both"),
    "link a file": ("os.link(folder / 'kept', folder / 'new')", "both"),
    "make a symbolic link": ("os.symlink('/etc/passwd', folder / 'new')", "both"),
    "make a device": ("os.mkfifo(folder / 'new')", "both"),
    "change a file's mode": ("os.chmod(folder / 'kept', 0o777)", "seccomp"),
    "change a file's owner": ("os.chown(folder / 'kept', 1, 1)", "seccomp"),
    "change a file's times": ("os.utime(folder / 'kept')", "seccomp"),
    "open a TCP socket": ("socket.socket()", "seccomp"),
    "open a UDP socket": ("socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)", "seccomp"),
    "open a Unix socket": ("socket.socket(socket.AF_UNIX)", "seccomp"),
    "open a netlink socket": ("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "seccomp"),
    "make a pair of sockets": ("socket.socketpair()", "seccomp"),
    "connect a socket kept from before": ("kept_socket.connect(('127.0.0.1', 1))", "both"),
    "bind a socket kept from before": ("kept_socket.bind(('127.0.0.1', 0))", "both"),
    "listen with a socket kept from before": ("kept_socket.listen()", "seccomp"),
    "send to an address": ("kept_datagrams.sendto(b'x', ('127.0.0.1', 9))", "seccomp"),
    "send a descriptor": ("socket.send_fds(pair[0], [b'x'], [0])", "seccomp"),
    "fork": ("os.fork()", "seccomp"),
    "spawn a program": ("os.posix_spawn('/bin/true', ['true'], {})", "seccomp"),
    "signal the parent": ("os.kill(os.getppid(), 0)", "both"),
    "end another process": ("os.kill(sibling, signal.SIGKILL)", "both"),
    "signal the group": ("os.kill(0, 0)", "seccomp"),
    "signal everybody": ("os.kill(-1, 0)", "seccomp"),
    "hold another process": ("os.pidfd_open(sibling)", "seccomp"),
    "raise a limit": ("call('prlimit64', 0, 7, 8, 0)", "seccomp"),
    "limit another process": ("call('prlimit64', sibling, 0, 0, 0)", "seccomp"),
    "map a file for all": ("mmap.mmap(kept_file, 4096, mmap.MAP_SHARED, mmap.PROT_READ)", "seccomp"),
    "map memory uncounted": ("mmap.mmap(-1, 4096)", "seccomp"),
    "map writable code": ("raw_mmap(READ | WRITE | EXECUTE, PRIVATE | ANONYMOUS)", "seccomp"),
    "become another user": ("os.setuid(os.getuid())", "seccomp"),
    "take another priority": ("os.setpriority(os.PRIO_PROCESS, 0, 1)", "seccomp"),
    "choose processors": ("os.sched_setaffinity(0, os.sched_getaffinity(0))", "seccomp"),
    "change the folder": ("os.chdir('/')", "seccomp"),
    "leave the session": ("os.setsid()", "seccomp"),
    "duplicate descriptors": ("os.dup(0)", "seccomp"),
    "watch files": ("select.epoll()", "seccomp"),
    "be dumpable again": ("kernel._prctl(4, 1)", "seccomp"),
    "use a call that does not exist": ("raw(5000)", "seccomp"),
}
TRIES = """
    import mmap, select
    secret = folder.parent / "secret" / "file"
    secret.parent.mkdir(exist_ok=True)
    secret.write_text("secret")
    (folder / "kept").write_bytes(b"x" * 4096)
    kept_file = os.open(folder / "kept", os.O_RDONLY)
    kept_socket, kept_datagrams = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    pair = socket.socketpair()

    def raw_mmap(protection, flags):
        return raw({"x86_64": 9, "aarch64": 222}[platform.machine()], 0, 4096, protection, flags, -1, 0)

    ENTER
    print(json.dumps({
        TRIED
    }))
"""


@pytest.mark.parametrize("profile", ["WORKER", "COMPILER"])
def test_what_is_refused(tmp_path: Path, sibling: int, profile: str) -> None:
    given = tmp_path / "given"
    given.mkdir()
    tried = ",\n        ".join(f"{name!r}: attempt(lambda: {how})" for name, (how, _) in REFUSED.items())
    results = answers(TRIES.replace("TRIED", tried), given, sibling, profile)
    assert set(results) == set(REFUSED)
    for name, (_, layers) in REFUSED.items():
        mechanisms = ("seccomp", "landlock") if layers == "both" else (layers,)
        if any(has(mechanism) for mechanism in mechanisms):
            assert results[name] in ("EPERM", "EACCES", "ENOSYS"), (name, results[name])
    if has("seccomp") or has("landlock"):
        assert [path.name for path in given.iterdir()] == ["kept"]
        assert (given / "kept").read_bytes() == b"x" * 4096
        assert not Path("/tmp/realm-test-escape").exists()


KILLED = {
    "exec": "os.execv('/bin/true', ['true'])",
    "exec by descriptor": "call('execveat', -1, 0, 0, 0, 0)",
    "trace another process": "call('ptrace', 16, sibling, 0, 0)",
    "be traced": "call('ptrace', 0, 0, 0, 0)",
    "read another process": "call('process_vm_readv', sibling, 0, 0, 0, 0, 0)",
    "write another process": "call('process_vm_writev', sibling, 0, 0, 0, 0, 0)",
    "load a BPF program": "call('bpf', 0, 0, 0)",
    "catch page faults": "call('userfaultfd', 0)",
    "go around the filter": "call('io_uring_setup', 1, 0)",
    "read counters": "call('perf_event_open', 0, 0, 0, 0, 0)",
    "make a namespace": "call('unshare', 0x10000000)",
    "mount": "call('mount', 0, 0, 0, 0, 0)",
    "use keys": "call('keyctl', 0, 0, 0, 0, 0)",
    "load a module": "call('init_module', 0, 0, 0)",
    "use another calling convention": "raw(0x40000000 | 39)",
}


@pytest.mark.parametrize("name", KILLED)
def test_what_kills(tmp_path: Path, sibling: int, name: str) -> None:
    done = run(f"ENTER\nprint(containment.seccomp, flush=True)\nattempt(lambda: {KILLED[name]})\n", tmp_path, sibling)
    expected = {"True\n": -signal.SIGSYS, "False\n": 0}
    if "0x40000000" in KILLED[name] and os.uname().machine != "x86_64":
        expected["True\n"] = 0
    assert done.returncode == expected[done.stdout], done.stderr
    assert (done.stdout == "True\n") == has("seccomp")


def test_abort_and_faults_end_as_ever(tmp_path: Path) -> None:
    for work, number in (("os.abort()", signal.SIGABRT), ("__import__('ctypes').string_at(0)", signal.SIGSEGV)):
        assert run(f"import ctypes\nENTER\n{work}\n", tmp_path).returncode == -number


def test_threads_from_before_are_filtered_and_no_way_around_landlock(tmp_path: Path) -> None:
    told, thread = answers(
        """
        go, found = threading.Event(), []
        def wait():
            go.wait()
            found.append(attempt(socket.socket))
        thread = threading.Thread(target=wait)
        thread.start()
        ENTER
        go.set()
        thread.join()
        print(json.dumps([[containment.landlock, *containment.lacking], found]))
        """,
        tmp_path,
    )
    assert told[0] == 0 and any("other threads" in reason for reason in told[1:]) == has("landlock")
    assert thread == (["EPERM"] if has("seccomp") else ["done"])


def test_a_platform_that_has_nothing(tmp_path: Path) -> None:
    """Calls of a number that no kernel has: what an old kernel answers."""
    told, opened = answers(
        """
        kernel._LANDLOCK_CREATE_RULESET = 5000
        kernel._SECCOMP = {platform.machine(): 5000}
        ENTER
        socket.socket().close()
        print(json.dumps([[containment.seccomp, containment.landlock, *containment.lacking], str(containment)]))
        """,
        tmp_path,
    )
    assert told[:2] == [False, 0] and opened == "resource limits only"
    assert [reason.partition(" ")[0] for reason in told[2:]] == ["landlock:", "seccomp:"]
    assert all("Function not implemented" in reason for reason in told[2:])


@pytest.mark.parametrize("mechanism", ["seccomp", "landlock"])
def test_a_defect_is_not_taken_for_a_lack(tmp_path: Path, mechanism: str) -> None:
    program = """
        # A filter of no instructions, and a rule of a kind that there is not.
        from realm.sandbox import entering
        if MECHANISM == "seccomp":
            entering.assemble = lambda program: b""
        else:
            kernel._LANDLOCK_RULE_PATH_BENEATH = 77
        try:
            ENTER
            print(json.dumps(["entered", str(containment)]))
        except Exception as error:
            print(json.dumps([getattr(error, "code", "?"), str(error)]))
    """
    code, text = answers(program.replace("MECHANISM", repr(mechanism)), tmp_path)
    assert code == ("sandbox_failed" if has(mechanism) else "entered"), text


def test_limits_of_the_process(tmp_path: Path) -> None:
    # The prelude has called limit() with 1 GiB.
    program = """
        import resource
        class Kept: pass
        big, small = None, 0
        try:
            big = bytes(2 << 30)
        except MemoryError:
            small = len(bytearray(100 << 20)) >> 20
        print(json.dumps([
            big is None, small, resource.getrlimit(resource.RLIMIT_CORE), resource.getrlimit(resource.RLIMIT_DATA),
            resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 4096, sorted(map(int, os.listdir("/proc/self/fd")))[:3],
        ]))
    """
    assert answers(program, tmp_path) == [True, 100, [0, 0], [1 << 30, 1 << 30], True, [0, 1, 2]]


def test_guests_get_less_than_the_host(tmp_path: Path) -> None:
    told = answers(
        """
        import mmap
        def take(size):
            # Counted when it is mapped, and never touched.
            return mmap.mmap(-1, size << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        def room():
            for size in range(64, 2048, 16):
                try:
                    take(size).close()
                except OSError:
                    return size
        ceiling = sandbox.DataCeiling()
        ENTER
        full = room()
        ceiling.lower()
        low, crowded = room(), ceiling.crowded()
        ceiling.lift()
        lifted = room()
        # What comes near the guests' part is seen, though it may still grow.
        held = take(low - 24)
        print(json.dumps([full, low, lifted, crowded, ceiling.crowded(), ceiling.most >> 20]))
        """,
        tmp_path,
    )
    full, low, lifted, early, late, most = told
    assert full == lifted and abs(full - low - 256) <= 16 and most == 768
    assert (early, late) == (False, True)


def test_inherited_descriptors_are_closed(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    program = f"import os; from realm import sandbox; sandbox.limit(1 << 30); os.fstat({writer})"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, "PYTHONPATH": str(HOST)},
            pass_fds=[reader, writer],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and "Bad file descriptor" in done.stderr
    finally:
        os.close(reader)
        os.close(writer)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """Even when it listens to nobody."""
    program = f"""
    import subprocess
    child = subprocess.Popen([sys.executable, "-P", "-c", {CHILD!r}], stdout=subprocess.PIPE)
    child.stdout.readline()
    print(json.dumps(child.pid), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = run(program, tmp_path)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    # The process is gone, or nobody has collected it yet.
    status = Path(f"/proc/{pid}/stat")
    for _ in range(1000):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        subprocess.run(["sleep", "0.01"], check=True)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("it lives on")


CHILD = """
import time
from realm import sandbox
sandbox.limit(1 << 30)
print(flush=True)
time.sleep(100)
"""


def test_a_child_gives_way_between_sessions_too() -> None:
    """Each child has a session of its own; where the kernel groups by it, niceness within it is not enough."""
    code = (
        "from pathlib import Path; import os; from realm import sandbox; sandbox.give_way();"
        "group = Path('/proc/self/autogroup');"
        "print(os.nice(0), group.read_text().split()[-1] if group.exists() else '10')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True
    )
    assert all(int(niceness) >= 10 for niceness in done.stdout.split())
