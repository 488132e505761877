"""Filters, run by an interpreter of classic BPF: each verdict without a kernel."""

from __future__ import annotations

import errno
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import ziglang
from hypothesis import given, settings
from hypothesis import strategies as st

from realm.sandbox.filter import (
    ALLOW,
    ARCHES,
    DEFAULT,
    KILL,
    UNKNOWN,
    Arch,
    Check,
    Instruction,
    Rule,
    assemble,
    build,
    refuse,
)
from realm.sandbox.numbers import CALLS, NEWEST
from realm.sandbox.profiles import COMPILER, WORKER, Profile

PID = 4242
FORK = 57
"""Of x86_64; no rule names it."""
HOSTILE = ["execve", "execveat", "ptrace", "process_vm_readv", "bpf", "userfaultfd", "io_uring_setup", "mount"]
WORD, LONG = (1 << 32) - 1, (1 << 64) - 1
X86, ARM = ARCHES["x86_64"], ARCHES["aarch64"]
PROGRAMS = {
    (profile.name, name): build(profile.rules(PID), arch)
    for profile in (WORKER, COMPILER)
    for name, arch in ARCHES.items()
}
O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE, O_DIRECTORY, O_CLOEXEC = 0o100, 0o1000, 0o2000, 0o20200000, 0o200000, 0o2000000


def interpret(program: Sequence[Instruction], audit: int, number: int, arguments: Sequence[int] = ()) -> int:
    """The verdict on one system call: ``struct seccomp_data`` in, the constant of the RET reached out."""
    data = struct.pack("<IIQ6Q", number, audit, 0, *(*arguments, *[0] * (6 - len(arguments))))
    accumulator, at = 0, 0
    for _ in range(len(program)):
        code, yes, no, constant = program[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:
                accumulator &= constant
            case 0x15:
                at += yes if accumulator == constant else no
            case 0x35:
                at += yes if accumulator >= constant else no
            case 0x06:
                return constant
            case _:
                raise AssertionError(f"an instruction that filters do not use: {code:#x}")
    raise AssertionError("the program does not end")


def verdict(name: str, *arguments: int, profile: Profile = WORKER, machine: str = "x86_64") -> int:
    arch = ARCHES[machine]
    number = CALLS[name][arch.column]
    assert number is not None
    return interpret(PROGRAMS[profile.name, machine], arch.audit, number, arguments)


@pytest.mark.parametrize("column", [0, 1])
def test_numbers_are_the_kernels(column: int) -> None:
    include = Path(ziglang.__file__).parent / "lib" / "libc" / "include"
    header = include / ("x86-linux-any", "aarch64-linux-any")[column] / "asm" / "unistd_64.h"
    text = header.read_text()
    numbers = {match[1]: int(match[2]) for match in re.finditer(r"#define __NR_(\w+) (\d+)", text)}
    assert {name: numbers.get(name) for name in CALLS} == {name: both[column] for name, both in CALLS.items()}
    assert max(numbers.values()) >= NEWEST


@pytest.mark.parametrize("machine", ARCHES)
@pytest.mark.parametrize("profile", [WORKER, COMPILER])
def test_programs_are_what_the_kernel_takes(profile: Profile, machine: str) -> None:
    program = PROGRAMS[profile.name, machine]
    assert len(assemble(program)) == 8 * len(program) <= 8 * 4096
    for at, (code, yes, no, _) in enumerate(program):
        # The kernel's own check: every jump stays inside, and the last instruction returns.
        assert at + max(yes, no) + 1 < len(program) or (code == 0x06 and not yes and not no)
    assert program[-1][0] == 0x06


@given(st.integers(0, WORD), st.integers(0, WORD), st.lists(st.integers(0, LONG), max_size=6))
@settings(max_examples=300)
def test_another_architecture_is_killed(audit: int, number: int, arguments: list[int]) -> None:
    for (_, machine), program in PROGRAMS.items():
        if audit != ARCHES[machine].audit:
            assert interpret(program, audit, number, arguments) == KILL


@given(st.integers(0x4000_0000, WORD), st.lists(st.integers(0, LONG), max_size=6))
@settings(max_examples=200)
def test_x32_is_killed(number: int, arguments: list[int]) -> None:
    assert interpret(PROGRAMS["worker", "x86_64"], X86.audit, number, arguments) == KILL


@given(st.sampled_from([*PROGRAMS]), st.integers(0, NEWEST + 1000), st.lists(st.integers(0, LONG), max_size=6))
@settings(max_examples=2000)
def test_what_no_rule_names_is_refused(key: tuple[str, str], number: int, arguments: list[int]) -> None:
    name, machine = key
    arch = ARCHES[machine]
    rules = {"worker": WORKER, "compiler": COMPILER}[name].rules(PID)
    named = {CALLS[rule.call][arch.column]: rule for rule in rules}
    found = interpret(PROGRAMS[key], arch.audit, number, arguments)
    rule = named.get(number)
    if rule is not None:
        assert found == expected(rule, arguments)
    else:
        assert found == (UNKNOWN if number > NEWEST else DEFAULT)


def expected(rule: Rule, arguments: Sequence[int]) -> int:
    """What a rule says, without BPF."""
    given = [*arguments, *[0] * 6]
    if not rule.ways:
        return rule.verdict
    passed = any(all(given[t.argument] & t.mask == t.value for t in way) for way in rule.ways)
    return rule.verdict if passed else rule.otherwise


CHECKS = st.builds(
    lambda argument, mask, bits: Check(argument, mask, bits & mask),
    st.integers(0, 5),
    st.integers(0, LONG),
    st.integers(0, LONG),
)


def rules(names: list[str]) -> st.SearchStrategy[list[Rule]]:
    way = st.lists(CHECKS, min_size=1, max_size=3).map(tuple)
    ways = st.lists(way, max_size=3).map(tuple)
    verdicts = st.sampled_from([ALLOW, KILL, refuse(errno.ENOSYS), refuse(errno.EACCES)])
    return st.tuples(*(st.builds(Rule, st.just(name), verdicts, ways, verdicts) for name in names)).map(list)


@given(
    st.lists(st.sampled_from([*CALLS]), max_size=8, unique=True).flatmap(rules),
    st.sampled_from([*CALLS]),
    st.lists(st.integers(0, LONG), min_size=6, max_size=6),
    st.data(),
)
@settings(max_examples=500)
def test_any_rules_mean_what_they_say(made: list[Rule], name: str, arguments: list[int], data: st.DataObject) -> None:
    called = next((rule for rule in made if rule.call == name), None)
    if called is not None and called.ways and data.draw(st.booleans()):
        # Arguments that pass, which chance alone would hardly find.
        for check in data.draw(st.sampled_from(called.ways)):
            arguments[check.argument] = arguments[check.argument] & ~check.mask | check.value
    for arch in ARCHES.values():
        number = CALLS[name][arch.column]
        if number is not None:
            found = interpret(build(made, arch), arch.audit, number, arguments)
            assert found == (DEFAULT if called is None else expected(called, arguments))


def machines(name: str) -> Iterator[str]:
    return (machine for machine, arch in ARCHES.items() if CALLS[name][arch.column] is not None)


@pytest.mark.parametrize("name", HOSTILE)
def test_clear_hostility_is_killed(name: str) -> None:
    for machine in machines(name):
        assert verdict(name, machine=machine) == KILL


def test_files_are_opened_for_reading_only() -> None:
    for flags in (0, O_CLOEXEC, O_DIRECTORY | O_CLOEXEC):
        assert verdict("openat", 0, 0, flags) == verdict("open", 0, flags) == ALLOW
    for flags in (1, 2, 3, O_CREAT, O_TRUNC, O_APPEND, O_TMPFILE, O_CREAT | 1):
        assert verdict("openat", 0, 0, flags) == verdict("open", 0, flags) == DEFAULT


def test_memory_is_never_writable_and_executable() -> None:
    read, write, execute, private, shared, anonymous = 1, 2, 4, 2, 1, 0x20
    for protection in (0, read, read | write, read | execute):
        assert verdict("mprotect", 0, 0, protection) == ALLOW
        assert verdict("mmap", 0, 0, protection, private) == ALLOW
        assert verdict("mmap", 0, 0, protection, shared | anonymous) == DEFAULT
    assert verdict("mprotect", 0, 0, read | write | execute) == DEFAULT
    assert verdict("mmap", 0, 0, write | execute, private) == DEFAULT


def test_only_threads_are_cloned() -> None:
    thread, new_user, child_signal = 0x3D0F00, 0x1000_0000, 17
    for machine in ARCHES:
        assert (
            verdict("clone", thread, machine=machine) == verdict("clone", thread | 0x40_0000, machine=machine) == ALLOW
        )
        for flags in (child_signal, 0, 0x4111, 0x0120_0011, thread | new_user, thread & ~0x1_0000):
            assert verdict("clone", flags, machine=machine) == DEFAULT
        assert verdict("clone3", machine=machine) == refuse(errno.ENOSYS)
    assert interpret(PROGRAMS["worker", "x86_64"], X86.audit, FORK) == DEFAULT


@given(st.integers(0, WORD))
def test_only_itself_is_signalled(target: int) -> None:
    for name in ("kill", "tgkill"):
        assert verdict(name, target, 9) == (ALLOW if target == PID else DEFAULT)


@given(st.integers(1, LONG))
def test_nothing_is_sent_to_an_address(address: int) -> None:
    assert verdict("sendto", 3, 0, 0, 0, 0) == ALLOW
    assert verdict("sendto", 3, 0, 0, 0, address) == DEFAULT
    assert verdict("sendto", 3, 0, 0, 0, 0, profile=COMPILER) == DEFAULT


@given(st.integers(1, LONG))
def test_limits_are_read_and_only_the_soft_one_of_memory_is_set(address: int) -> None:
    assert verdict("prlimit64", 0, 7, 0, address) == verdict("prlimit64", 0, 2, address, 0) == ALLOW
    assert verdict("prlimit64", 0, 7, address, 0) == verdict("prlimit64", 0, 2, address, address) == DEFAULT
    assert verdict("prlimit64", 4242, 2, address, 0) == DEFAULT
    assert verdict("prlimit64", 1 + address % 1000, 7, 0, 0) == DEFAULT


def test_mistakes_in_rules_are_found() -> None:
    with pytest.raises(ValueError, match="two rules for read"):
        build([Rule("read"), Rule("read")], X86)
    with pytest.raises(ValueError, match="no number is known for frobnicate"):
        build([Rule("frobnicate")], ARM)
    with pytest.raises(ValueError, match="never be true"):
        build([Rule("read", ways=((Check(0, 1, 2),),))], X86)
    with pytest.raises(ValueError, match="too long"):
        build([Rule("read", ways=((Check(0, LONG, 1),),) * 50)], X86)
    with pytest.raises(ValueError, match="is over 4096"):
        build([Rule(name, ways=((Check(0, LONG, 1),),) * 30) for name in CALLS], Arch(1, 0))
