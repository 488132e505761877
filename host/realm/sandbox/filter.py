"""Builds seccomp filters: classic BPF programs that look at a system call's number and arguments.

A filter is a list of :class:`Rule`; what no rule names is refused. Pure: bytes come out, nothing is
asked of the system. The machine is described in the kernel's ``Documentation/networking/filter.rst``,
and what a program sees in ``struct seccomp_data`` of ``linux/seccomp.h``.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from realm.sandbox.numbers import CALLS, NEWEST

ALLOW: Final = 0x7FFF_0000
KILL: Final = 0x8000_0000
"""Ends the whole process by SIGSYS."""


def refuse(number: int) -> int:
    """The verdict that makes a call fail with this error number."""
    return 0x0005_0000 | number


DEFAULT: Final = refuse(errno.EPERM)
UNKNOWN: Final = refuse(errno.ENOSYS)
"""For calls newer than our table: the C library then does without, as on an older kernel."""


@dataclass(frozen=True)
class Arch:
    """A processor: ``audit`` is its AUDIT_ARCH word, ``column`` its place in the table of numbers."""

    audit: int
    column: int
    foreign: int | None = None
    """Numbers from here on are another calling convention's (x32)."""


ARCHES: Final = {"x86_64": Arch(0xC000_003E, 0, 0x4000_0000), "aarch64": Arch(0xC000_00B7, 1)}


@dataclass(frozen=True)
class Check:
    """``arguments[argument] & mask == value``. 64 bits are compared where the mask has more than 32."""

    argument: int
    mask: int
    value: int


@dataclass(frozen=True)
class Rule:
    """What happens to one system call.

    Attributes:
        call: its name; on a processor that does not have it the rule is left out.
        ways: with none, ``verdict`` is for every call. Otherwise for those that pass all checks of one way.
        otherwise: what happens to the others.
    """

    call: str
    verdict: int = ALLOW
    ways: tuple[tuple[Check, ...], ...] = ()
    otherwise: int = DEFAULT


_LOAD, _AND, _RETURN, _EQUAL, _AT_LEAST = 0x20, 0x54, 0x06, 0x15, 0x35
_NUMBER_AT, _ARCH_AT, _ARGUMENTS_AT = 0, 4, 16
_LONGEST = 4096
_WORD = 0xFFFF_FFFF

Instruction = tuple[int, int, int, int]
"""Code, how many to skip when true, how many when false, constant."""


def build(rules: Iterable[Rule], arch: Arch) -> list[Instruction]:
    """The program of a filter.

    Raises:
        ValueError: two rules for one call, a call that the table does not know, or a rule or a program
            too long for the machine.
    """
    program: list[Instruction] = [
        # First of all: the same number is another call in another architecture's table.
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, arch.audit),
        (_RETURN, 0, 0, KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if arch.foreign is not None:
        program += [(_AT_LEAST, 0, 1, arch.foreign), (_RETURN, 0, 0, KILL)]
    seen: set[str] = set()
    for rule in rules:
        if rule.call in seen:
            raise ValueError(f"two rules for {rule.call}")
        if rule.call not in CALLS:
            raise ValueError(f"no number is known for {rule.call}")
        seen.add(rule.call)
        number = CALLS[rule.call][arch.column]
        if number is None:
            continue
        block = _block(rule)
        program += [(_EQUAL, 0, _skip(len(block)), number), *block]
    program += [(_AT_LEAST, 0, 1, NEWEST + 1), (_RETURN, 0, 0, UNKNOWN), (_RETURN, 0, 0, DEFAULT)]
    if len(program) > _LONGEST:
        raise ValueError(f"a filter of {len(program)} instructions is over {_LONGEST}")
    return program


def _block(rule: Rule) -> list[Instruction]:
    """What follows when the number fits. It always returns, so the number need not be loaded again."""
    if not rule.ways:
        return [(_RETURN, 0, 0, rule.verdict)]
    block: list[Instruction] = []
    for way in rule.ways:
        steps = [step for check in way for step in _steps(check)]
        for at, (code, _, _, constant) in enumerate(steps):
            # A comparison that fails goes on behind this way's verdict.
            block.append((code, 0, _skip(len(steps) - at) if code == _EQUAL else 0, constant))
        block.append((_RETURN, 0, 0, rule.verdict))
    return [*block, (_RETURN, 0, 0, rule.otherwise)]


def _steps(check: Check) -> list[Instruction]:
    if check.value & ~check.mask:
        raise ValueError(f"{check} can never be true")
    # Both processors are little-endian: the low word comes first.
    at = _ARGUMENTS_AT + 8 * check.argument
    steps: list[Instruction] = []
    for place, mask, value in (
        (at, check.mask & _WORD, check.value & _WORD),
        (at + 4, check.mask >> 32, check.value >> 32),
    ):
        if mask:
            steps += [(_LOAD, 0, 0, place), (_AND, 0, 0, mask), (_EQUAL, 0, 0, value)]
    return steps


def _skip(count: int) -> int:
    if count > 255:
        raise ValueError("a rule is too long for a jump")
    return count


def assemble(program: Iterable[Instruction]) -> bytes:
    """The program as the kernel takes it: ``struct sock_filter``, 8 bytes an instruction."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
