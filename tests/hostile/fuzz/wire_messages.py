"""What clients of the wire protocol send: calls that are right or nearly so, and what is none."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import strategies as st

from realm.gateway.protocol import FUNCTIONS
from tests.fake_host import WASM

SHORT = st.text(max_size=12)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | SHORT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=3),
    max_leaves=6,
)
IDS: st.SearchStrategy[Any] = (
    st.integers(0, 3)
    | st.sampled_from(["a", "b", "", "x" * 128, 2**53, -(2**53)])
    | st.sampled_from([None, 1.5, True, "x" * 129, 2**53 + 1, [], {}])
)
INPUTS = st.sampled_from(
    ["echo me please", "hang", "fail", "flood", "store", "late", "", "\ud7ff", "caf\u00e9 \U0001f600"]
)
GOOD_PARAMS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "generate": st.fixed_dictionaries(
        {"prompt": INPUTS}, optional={"stream": st.booleans(), "max_tokens": st.integers(-1, 9), "seed": st.integers()}
    ),
    "run": st.fixed_dictionaries(
        {"module": st.sampled_from(["echo", "generate", "none", "../x"]), "input": INPUTS | JSON},
        optional={"stream": st.booleans(), "seed": st.integers(-1, 2**65)},
    ),
    "send": st.fixed_dictionaries({"run": st.sampled_from(["r1", "r0", "r999", "x"]), "data": INPUTS | JSON}),
    "cancel": st.fixed_dictionaries({}, optional={"run": st.sampled_from(["r1", "r2", "x"]), "id": IDS}),
    "logs": st.fixed_dictionaries({"run": st.sampled_from(["r1", "r3", "r999999", ""])}),
    "ps": st.fixed_dictionaries({}, optional={"all": st.booleans(), "limit": st.integers(-1, 2000)}),
    "modules.begin": st.fixed_dictionaries(
        {
            "name": st.sampled_from(["m", "echo", "generate", "../m", "m" * 65]),
            "size": st.sampled_from([0, 8, 20, 1 << 30, -1]),
            "sha256": st.sampled_from([hashlib.sha256(WASM).hexdigest(), "0" * 64, "0", "F" * 64]),
        }
    ),
    "modules.commit": st.fixed_dictionaries({"upload": st.integers(0, 5)}),
    "modules.abort": st.fixed_dictionaries({"upload": st.integers(0, 5)}),
    "modules.remove": st.fixed_dictionaries({"name": st.sampled_from(["m", "none"])}),
    # Real keys and tenants are needed further on; those that are not there may be asked for.
    "keys.revoke": st.fixed_dictionaries({"id": st.sampled_from(["", "nothing", "x" * 65])}),
    "keys.add": st.fixed_dictionaries({"tenant": st.sampled_from(["nobody", "Nobody", ""])}),
    "tenants.add": st.fixed_dictionaries({"name": st.sampled_from(["alice", "bob", "UPPER", "a/b"])}),
}
# What changes the limits that the machine itself lives under.
LEFT_OUT = frozenset({"tenants.set"})
NAMES = [name for name in FUNCTIONS if name not in LEFT_OUT]


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """A call that is right or nearly so."""
    name = draw(st.sampled_from(NAMES))
    params: Any = draw(GOOD_PARAMS.get(name, st.just({})))
    if name in ("keys.revoke", "keys.add", "tenants.add"):
        pass
    elif draw(st.integers(0, 9)) == 0:
        params = draw(JSON)
    elif isinstance(params, dict) and draw(st.integers(0, 9)) == 0:
        params = {**params, draw(st.sampled_from([*params, "x"]) if params else SHORT): draw(JSON)}
    call: dict[str, Any] = {"id": draw(IDS), "function": name, "params": params}
    if draw(st.integers(0, 19)) == 0:
        call["tenant_id"] = draw(st.sampled_from(["alice", "bob", "", 5]))
    if draw(st.integers(0, 19)) == 0:
        del call[draw(st.sampled_from(["id", "function", "params"]))]
    return call


RAW = st.sampled_from(
    [
        "",
        "{}",
        "[]",
        "null",
        "1",
        '{"id":1',
        '{"id":1,"function":"ps","id":2}',
        '{"id":1,"function":"nothing","params":{}}',
        "[" * 30_000,
        '{"id":1,"function":"run","params":{"module":"echo","input":' + "[" * 20_000 + "}}",
        '{"id":1,"function":"run","params":{"module":"echo","input":"\\ud800"}}',
        '{"id":"\\ud800","function":"health"}',
        '{"id":1e400,"function":"health"}',
        '{"id":' + "9" * 5000 + ',"function":"health"}',
        '{"type":"auth","api_key":"again"}',
        '{"id":7,"function":"health","params":null}',
        "\x00",
        " " * 60_000,
    ]
)
# Whole frames as they stand on the wire, masked with zeros, and pieces of them.
GARBAGE = st.sampled_from(
    [
        b"\xff" * 16,  # all reserved bits and an unknown opcode
        b"\x81\x05hello",  # not masked
        b"\xc1\x80\0\0\0\0",  # compressed, which was not agreed
        b"\x80\x80\0\0\0\0",  # a continuation of nothing
        b"\x89\xfe\x00\x7e\0\0\0\0" + b"x" * 126,  # a ping that is too long
        b"\x81\x81\0\0\0\0\xff",  # text that is not UTF-8
        b"\x88\x81\0\0\0\0\x01",  # a close with half a code
        b"\x88\x82\0\0\0\0\x03\xec",  # a close with a code that is never sent
        b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",  # more than there is memory
        b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",  # a length of 64 bits
    ]
)
