"""The patterns by which PEFT gives some modules another rank or alpha, without Python's ``re``.

PEFT takes each key as a regular expression, and of those that match ``(.*\\.)?(key)$`` from the start of a
module's name the first one (``peft.utils.other.get_pattern_key``). Keys come from tenants, and ``re``
backtracks: ``(a|a)*b`` keeps it busy for ever. So what is an ordinary name is looked up, and the rest are
automata of positions (Glushkov, The abstract theory of automata, 1961), whose time is linear in the name.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")

MAX_KEYS = 4096
"""Most keys of one mapping (a model of 126 layers has 882 modules)."""
MAX_LENGTH = 1024
"""Characters that the keys which are no ordinary names may have together."""
MAX_DEPTH = 16
"""Groups within groups."""

_ALPHABET = frozenset(map(chr, range(32, 127)))
_CLASSES = {
    "d": frozenset(string.digits),
    "w": frozenset(string.ascii_letters + string.digits + "_"),
    "s": frozenset(" "),
}
_CLASSES |= {name.upper(): _ALPHABET - chars for name, chars in _CLASSES.items()}

# Such a key matches the name that it is, or that ends with it after a dot, and no other one, although a dot
# stands for any character: in names of this form, letters and digits leave no other place for it.
_ORDINARY = re.compile(
    r"(?:(?:(?:model\.)?layers\.)?[0-9]{1,6}\.)?(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)"
    r"|[qkvo]_proj|(?:gate|up|down)_proj"
)

_BEGIN, _ANYWHERE = 0b01, 0b10
"""Bits of a set of positions: nothing has been read; a dot was the last, or nothing."""


class PatternError(ValueError):
    """A key that is no regular expression, or one that is not supported: what is wrong with it."""


class _Part(NamedTuple):
    """Of a part of an expression: can it be empty, and at which positions may it begin and end (bits)."""

    empty: bool
    first: int
    last: int


class _Automaton:
    """One expression, matched as PEFT does."""

    def __init__(self, text: str) -> None:
        if not _ALPHABET.issuperset(text):
            raise PatternError("has characters that no module's name has")
        self._text = text
        self._at = 0
        self._follow = [0, 0]
        self._accepts: dict[str, int] = dict.fromkeys(_ALPHABET, 0)
        self._last = 0
        self._steps: dict[tuple[int, str], int] = {}
        while True:
            begin = self._peek() == "^"
            self._at += begin
            part = self._sequence(0, top=True)
            self._follow[0 if begin else 1] |= part.first
            self._last |= part.last
            if self._at == len(text):
                return
            self._at += 1

    def matches(self, name: str) -> bool:
        """Does ``(.*\\.)?(expression)$`` match the whole name, which ends with no dot?"""
        state, steps = _BEGIN | _ANYWHERE, self._steps
        for char in name:
            after = steps.get((state, char))
            if after is None:
                after = steps[state, char] = self._step(state, char)
            state = after
        return bool(state & self._last)

    def _step(self, state: int, char: str) -> int:
        reached = 0
        while state:
            low = state & -state
            reached |= self._follow[low.bit_length() - 1]
            state ^= low
        # Whatever was read before, an expression that is not anchored may begin after a dot.
        return (reached & self._accepts.get(char, 0)) | (_ANYWHERE if char == "." else 0)

    # --- parsing: one method for each rule ---

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _sequence(self, depth: int, *, top: bool = False) -> _Part:
        whole = _Part(True, 0, 0)
        while self._at < len(self._text) and self._peek() not in "|)":
            if top and self._peek() == "$" and self._text[self._at + 1 : self._at + 2] in ("", "|"):
                self._at += 1
                break
            whole = self._joined(whole, self._repeated(depth))
        if top and self._peek() == ")":
            raise PatternError("has a ) without a (")
        return whole

    def _joined(self, left: _Part, right: _Part) -> _Part:
        self._link(left.last, right.first)
        return _Part(
            left.empty and right.empty,
            left.first | (right.first if left.empty else 0),
            right.last | (left.last if right.empty else 0),
        )

    def _link(self, last: int, first: int) -> None:
        while last:
            low = last & -last
            self._follow[low.bit_length() - 1] |= first
            last ^= low

    def _repeated(self, depth: int) -> _Part:
        part = self._atom(depth)
        sign = self._peek()
        if not sign or sign not in "*+?":
            return part
        self._at += 1
        # How much a repetition prefers to take says nothing about whether the whole matches.
        if self._peek() == "?":
            self._at += 1
        if self._peek() and self._peek() in "*+?":
            raise PatternError("repeats a repetition")
        if sign != "?":
            self._link(part.last, part.first)
        return _Part(part.empty or sign != "+", part.first, part.last)

    def _atom(self, depth: int) -> _Part:
        char = self._peek()
        self._at += 1
        if char == "(":
            return self._group(depth + 1)
        if char == "[":
            return self._position(self._class())
        if char == "\\":
            return self._position(self._escaped())
        if char == ".":
            return self._position(_ALPHABET)
        if char in "*+?":
            raise PatternError("repeats nothing")
        if char in "{}^$":
            raise PatternError(f"has a {char} where none is supported")
        return self._position(frozenset(char))

    def _group(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise PatternError(f"has over {MAX_DEPTH} groups within groups")
        if self._peek() == "?":
            if self._text[self._at : self._at + 2] != "?:":
                raise PatternError("has a group that begins with ?; only (?: is supported")
            self._at += 2
        whole = self._sequence(depth)
        while self._peek() == "|":
            self._at += 1
            branch = self._sequence(depth)
            whole = _Part(whole.empty or branch.empty, whole.first | branch.first, whole.last | branch.last)
        if self._peek() != ")":
            raise PatternError("has a ( without a )")
        self._at += 1
        return whole

    def _escaped(self) -> frozenset[str]:
        char = self._peek()
        self._at += 1
        if char in _CLASSES:
            return _CLASSES[char]
        if not char or char.isalnum():
            raise PatternError(f"has \\{char}, which is not supported")
        return frozenset(char)

    def _class(self) -> frozenset[str]:
        negated = self._peek() == "^"
        self._at += negated
        members: set[str] = set()
        first = True
        while first or self._peek() != "]":
            low = self._member()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._member()
                if len(low) != 1 or len(high) != 1 or min(low) > min(high):
                    raise PatternError("has a bad range in [ ]")
                members |= {chr(code) for code in range(ord(min(low)), ord(min(high)) + 1)}
            else:
                members |= low
            first = False
        self._at += 1
        return _ALPHABET - members if negated else frozenset(members)

    def _member(self) -> frozenset[str]:
        char = self._peek()
        if not char:
            raise PatternError("has a [ without a ]")
        self._at += 1
        return self._escaped() if char == "\\" else frozenset(char)

    def _position(self, accepts: frozenset[str]) -> _Part:
        bit = 1 << len(self._follow)
        self._follow.append(0)
        for char in accepts:
            self._accepts[char] |= bit
        return _Part(False, bit, bit)


@dataclass
class Patterns(Generic[Value]):
    """A mapping from keys as PEFT's to values, and which value a module has.

    Raises:
        PatternError: a key cannot be supported. Its text begins with the key.
    """

    values: dict[str, Value]
    _ordinary: dict[str, int] = field(default_factory=dict)
    _others: list[tuple[int, _Automaton]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.values) > MAX_KEYS:
            raise PatternError(f"has {len(self.values)} keys; {MAX_KEYS} at most are supported")
        length = 0
        for number, key in enumerate(self.values):
            if _ORDINARY.fullmatch(key):
                self._ordinary[key] = number
                continue
            length += len(key)
            if length > MAX_LENGTH:
                raise PatternError(f"has over {MAX_LENGTH} characters of expressions; name modules in full")
            try:
                self._others.append((number, _Automaton(key)))
            except PatternError as error:
                raise PatternError(f"{key[:100]!a} {error}") from None
        self._by_number = list(self.values.values())

    def get(self, module: str, default: Value) -> Value:
        """The value of the first key that matches ``module`` (such as ``model.layers.3.self_attn.q_proj``)."""
        if not self.values:
            return default
        found = len(self._by_number)
        at = 0
        while True:
            found = min(found, self._ordinary.get(module[at:], found))
            at = module.find(".", at) + 1
            if not at:
                break
        for number, automaton in self._others:
            if number > found:
                break
            if automaton.matches(module):
                found = number
        return self._by_number[found] if found < len(self._by_number) else default
