"""realm_json.h against Python's json, through a small WASM guest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import wasmtime
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.test_modules_abi import build

DEPTH = 64

SOURCE = r"""
#include "realm.h"
#include "realm_json.h"
#include "realm_support.h"
REALM_GUEST
REALM_EXPORT(run) int32_t run(void) { return 0; }

static char text[1 << 20], out[1 << 21];
static struct realm_json root, value;

REALM_EXPORT(text_at) char *text_at(void) { return text; }
REALM_EXPORT(out_at) char *out_at(void) { return out; }
REALM_EXPORT(parse) int32_t parse(uint32_t size) {
    bool good = realm_json_parse(text, size, &root);
    value = root;
    return good;
}
REALM_EXPORT(kind) int32_t kind(void) { return realm_json_kind(value); }
REALM_EXPORT(slice_start) int32_t slice_start(void) { return value.at - text; }
REALM_EXPORT(slice_end) int32_t slice_end(void) { return value.end - text; }
REALM_EXPORT(string) int64_t string(uint32_t room) { return realm_json_string(value, out, room); }
REALM_EXPORT(number) double number(void) { double d = -7; return realm_json_number(value, &d) ? d : -7; }
REALM_EXPORT(is_integer) int32_t is_integer(void) { int64_t n; return realm_json_integer(value, &n); }
REALM_EXPORT(integer) int64_t integer(void) { int64_t n = 0; realm_json_integer(value, &n); return n; }
REALM_EXPORT(boolean) int32_t boolean(void) { bool b; return realm_json_bool(value, &b) ? b : -1; }
/* The key stands at out, ended by 0. */
REALM_EXPORT(find) int32_t find(void) { return realm_json_find(root, out, &value); }
REALM_EXPORT(item) int32_t item(int32_t index) {
    struct realm_json found = {0, 0};
    for (int32_t i = 0; i <= index; i++)
        if (!realm_json_next(root, &found)) return 0;
    value = found;
    return 1;
}
REALM_EXPORT(write) uint64_t write(uint32_t size, uint32_t room) {
    return realm_json_write_string(text, size, out, room);
}
"""


class Reader:
    """The guest's exports, with text in and out of its memory."""

    def __init__(self, wasm: Path) -> None:
        self.store = wasmtime.Store()
        module = wasmtime.Module.from_file(self.store.engine, str(wasm))
        self.exports = wasmtime.Instance(self.store, module, []).exports(self.store)
        memory = self.exports["memory"]
        assert isinstance(memory, wasmtime.Memory)
        self.memory = memory
        self.text, self.out = self.call("text_at"), self.call("out_at")

    def call(self, name: str, *arguments: int) -> Any:
        function = self.exports[name]
        assert isinstance(function, wasmtime.Func)
        return function(self.store, *arguments)

    def parse(self, text: bytes) -> bool:
        # What follows the document must not matter.
        self.memory.write(self.store, text + b'"]}0', self.text)
        return bool(self.call("parse", len(text)))

    def slice(self) -> bytes:
        start, end = self.call("slice_start"), self.call("slice_end")
        return bytes(self.memory.read(self.store, self.text + start, self.text + end))

    def string(self) -> str | None:
        size = self.call("string", 1 << 21)
        if size < 0:
            return None
        assert self.call("string", size) == size
        return bytes(self.memory.read(self.store, self.out, self.out + size)).decode()

    def find(self, key: str) -> bool:
        self.memory.write(self.store, key.encode() + b"\0", self.out)
        return bool(self.call("find"))

    def write(self, text: bytes) -> bytes:
        self.memory.write(self.store, text, self.text)
        size = self.call("write", len(text), 1 << 21)
        return bytes(self.memory.read(self.store, self.out, self.out + size))

    def value(self) -> Any:
        """The present value through the reader for its kind."""
        kind = chr(self.call("kind"))
        if kind == "n":
            return None
        if kind in "tf":
            return bool(self.call("boolean"))
        if kind == '"':
            return self.string()
        if kind == "0":
            return self.call("integer") if self.call("is_integer") else self.call("number")
        return json.loads(self.slice())


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("json")
    (folder / "reader.c").write_text(SOURCE)
    build.compile_c(folder / "reader.c", folder / "reader.wasm")
    return Reader(folder / "reader.wasm")


def nesting(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((nesting(v) for v in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((nesting(v) for v in value), default=0)
    return 0


def refuse(constant: str) -> Any:
    raise ValueError(constant)


def reference(text: bytes) -> tuple[bool, Any]:
    """Whether Python reads the text as strict JSON that stands for UTF-8, and its value."""
    try:
        decoded = text.decode()
        if decoded.startswith("\ufeff"):
            return False, None
        # Floats stay text: Python's own limit on the digits of integers is no question of JSON.
        value = json.loads(decoded, parse_constant=refuse, parse_int=str, parse_float=str)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False, None
    return nesting(value) <= DEPTH, value


MARKS = (
    rb"""{ } [ ] , : " \ \u d83d \ud83d\ude00 \ude00 0 - 12 . e E+ true false null nul "a" "a": 1e5 NaN /* "\n" "\x" """
)
SPACES = [b" ", b"\n", b"\t", b"\x00", b"\x1f", b"\x0b", b"\x7f"]
UNICODE = [b"\xc3\xa9", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80", b"\xef\xbb\xbf"]
PIECES = st.sampled_from([*MARKS.split(), *SPACES, *UNICODE])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1.79e308, 1.79e308) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


@settings(max_examples=1500, deadline=None)
@given(st.lists(PIECES, max_size=14).map(b"".join) | st.binary(max_size=30))
@example(b"")
@example(b"[1,]")
@example(b'{"a":1,}')
@example(b'{"a"}')
@example(b'{"a":}')
@example(b"01")
@example(b"-")
@example(b"1.")
@example(b".5")
@example(b"+1")
@example(b"1e")
@example(b"[1 2]")
@example(b'"\\u12')
@example(b'"\\ud800"')
@example(b'"\\ud800\\u0041"')
@example(b'"\\')
@example(b'"\xf0\x9f\x98"')
@example(b"\x00")
@example(b"1\x00")
def test_accepts_what_python_accepts(reader: Reader, text: bytes) -> None:
    assert reader.parse(text) == reference(text)[0]


@settings(max_examples=500, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_reads_what_python_wrote(reader: Reader, value: Any, ascii: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii, indent=indent).encode()
    assert reader.parse(b" \n" + text + b"\t\r ") == (nesting(value) <= DEPTH)
    assert reader.slice() == text
    if isinstance(value, float):
        assert math.isclose(reader.call("number"), value, rel_tol=1e-13, abs_tol=1e-321)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        assert not reader.call("is_integer") or value == -(1 << 63)
    elif not isinstance(value, list | dict):
        assert reader.value() == value
    if isinstance(value, list):
        for index, item in enumerate(value):
            assert reader.call("item", index)
            assert json.loads(reader.slice()) == item
        assert not reader.call("item", len(value))
    else:
        assert not reader.call("item", 0)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=4).filter(lambda k: "\0" not in k), st.integers(0, 99)), max_size=8))
def test_finds_keys_and_the_last_of_equal_ones(reader: Reader, members: list[tuple[str, int]]) -> None:
    text = "{" + " , ".join(f"{json.dumps(k)} : {v}" for k, v in members) + "}"
    assert reader.parse(text.encode())
    for key, value in dict(members).items():
        assert reader.find(key)
        assert reader.call("integer") == value
    assert not reader.find("no such key")


def test_keys_inside_values_are_not_found(reader: Reader) -> None:
    assert reader.parse(b'{"a": {"b": 1}, "c": "b", "d": ["b"], "\\u0062b": 2}')
    assert not reader.find("b")
    assert not reader.find("")
    assert reader.find("bb")
    assert reader.parse(b'["a"]')
    assert not reader.find("a")


@settings(max_examples=300, deadline=None)
@given(st.integers())
@example((1 << 63) - 1)
@example(1 << 63)
@example(-(1 << 63))
@example(-(1 << 63) - 1)
@example(1 << 64)
@example(10**30)
def test_integers(reader: Reader, number: int) -> None:
    assert reader.parse(str(number).encode())
    fits = -(1 << 63) <= number < 1 << 63
    assert bool(reader.call("is_integer")) == fits
    if fits:
        assert reader.call("integer") == number


@settings(max_examples=500, deadline=None)
@given(st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,25})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
@example("0." + "0" * 400 + "1e401")
@example("1" + "0" * 400 + "e-400")
@example("1e999999999999999999999")
@example("0e999999999999999999999")
@example("1e-99999999999")
@example("4.9e-324")
@example("1.797e308")
@example("1e309")
def test_numbers(reader: Reader, text: str) -> None:
    assert reader.parse(text.encode())
    expected, got = float(text), reader.call("number")
    assert got == expected or math.isclose(got, expected, rel_tol=1e-13, abs_tol=1e-321)


@pytest.mark.parametrize("text", ["0.7", "0.95", "1.1", "1e-3", "123456789.25", "0.1", "2", "-0.5", "1e22"])
def test_usual_numbers_are_exact(reader: Reader, text: str) -> None:
    assert reader.parse(text.encode())
    assert reader.call("number") == float(text)


@pytest.mark.parametrize("pair", ["[]", '{"":}'])
def test_depth_is_bounded(reader: Reader, pair: str) -> None:
    opening, closing = pair[:-1], pair[-1]
    inner = "1"
    assert reader.parse((opening * DEPTH + inner + closing * DEPTH).encode())
    assert not reader.parse((opening * (DEPTH + 1) + inner + closing * (DEPTH + 1)).encode())
    # A megabyte of brackets must not overflow the guest's stack.
    assert not reader.parse((opening * 200_000).encode())


def test_a_string_that_does_not_fit_is_not_written(reader: Reader) -> None:
    assert reader.parse(b'"abc\\u00e9"')
    reader.memory.write(reader.store, b"....", reader.out)
    assert reader.call("string", 4) == 5
    assert bytes(reader.memory.read(reader.store, reader.out, reader.out + 4)) == b"...."


@pytest.mark.parametrize("text", [b"1", b"null", b"true", b"[]", b"{}"])
def test_wrong_kinds_are_refused(reader: Reader, text: bytes) -> None:
    assert reader.parse(text)
    assert reader.string() is None
    if text != b"1":
        assert reader.call("number") == -7
        assert not reader.call("is_integer")
    if text != b"true":
        assert reader.call("boolean") == -1


@settings(max_examples=500, deadline=None)
@given(st.text())
@example("".join(chr(c) for c in range(0x80)) + "é\u2028😀")
def test_written_strings_are_read_back(reader: Reader, text: str) -> None:
    written = reader.write(text.encode())
    assert json.loads(written) == text
    assert reader.parse(written)
    assert reader.string() == text


def test_a_written_string_that_does_not_fit_is_not_written(reader: Reader) -> None:
    reader.memory.write(reader.store, b"a\n", reader.text)
    reader.memory.write(reader.store, b"....", reader.out)
    assert reader.call("write", 2, 4) == 5
    assert bytes(reader.memory.read(reader.store, reader.out, reader.out + 4)) == b"...."
